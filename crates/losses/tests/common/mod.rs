//! What the tests of this crate share: fixtures, value with gradient, and thread pools.
#![allow(dead_code)] // each test file uses its part

use std::collections::HashMap;

use candle_core::{DType, Device, Tensor, Var};
use segdistill_losses::Result;
use segdistill_ops::OpsError;

/// Value and gradient of `loss` at `logits`, the value multiplied by `factor` before the way back.
pub(crate) fn value_and_grad(
    logits: &Tensor,
    factor: f64,
    loss: impl FnOnce(&Tensor) -> Result<Tensor>,
) -> (f64, Tensor) {
    let var = Var::from_tensor(logits).unwrap();
    let value = loss(var.as_tensor()).unwrap();
    assert!(value.dims().is_empty(), "a loss is a scalar");
    assert_eq!(value.dtype(), logits.dtype());
    let grads = (&value * factor).unwrap().backward().unwrap();
    let grad = grads.get(&var).expect("the logits got a gradient").clone();
    assert_eq!(grad.dims(), logits.dims());
    (scalar(&value), grad)
}

/// A scalar as f64.
pub(crate) fn scalar(value: &Tensor) -> f64 {
    value.to_dtype(DType::F64).unwrap().to_scalar::<f64>().unwrap()
}

/// Elements as f64, row-major.
pub(crate) fn elements(tensor: &Tensor) -> Vec<f64> {
    tensor.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1::<f64>().unwrap()
}

/// Elements of a u8 tensor, row-major.
pub(crate) fn bytes(tensor: &Tensor) -> Vec<u8> {
    tensor.flatten_all().unwrap().to_vec1::<u8>().unwrap()
}

/// `|a - b| / |b|`.
pub(crate) fn relative(found: f64, expected: f64) -> f64 {
    (found - expected).abs() / expected.abs().max(f64::MIN_POSITIVE)
}

/// A u8 map `[n, h, w]`, each pixel from `f(image, row, column)`.
pub(crate) fn map(n: usize, h: usize, w: usize, f: impl Fn(usize, usize, usize) -> u8) -> Tensor {
    let values: Vec<u8> = (0..n * h * w).map(|k| f(k / (h * w), k / w % h, k % w)).collect();
    Tensor::from_vec(values, (n, h, w), &Device::Cpu).unwrap()
}

/// A mask that holds about `keep` of the pixels.
pub(crate) fn random_mask(seed: u64, n: usize, h: usize, w: usize, keep: f64) -> Tensor {
    let mut stream = segdistill_ops::rng::Stream::new(seed, "mask", &[]);
    let values: Vec<u8> = (0..n * h * w).map(|_| u8::from(stream.chance(keep))).collect();
    Tensor::from_vec(values, (n, h, w), &Device::Cpu).unwrap()
}

/// The named cases of a fixture: case -> part -> tensor.
pub(crate) fn fixture(name: &str) -> HashMap<String, HashMap<String, Tensor>> {
    let path = format!("{}/tests/fixtures/{name}.safetensors", env!("CARGO_MANIFEST_DIR"));
    let mut cases: HashMap<String, HashMap<String, Tensor>> = HashMap::new();
    for (key, tensor) in candle_core::safetensors::load(path, &Device::Cpu).unwrap() {
        let (case, part) = key.split_once('.').unwrap();
        cases.entry(case.to_owned()).or_default().insert(part.to_owned(), tensor);
    }
    cases
}

/// For `check_gradient`, which speaks the error of `ops`.
pub(crate) fn as_ops(result: Result<Tensor>) -> segdistill_ops::Result<Tensor> {
    result.map_err(|e| OpsError::config(e.to_string(), "see the loss"))
}

/// What the system says of this process in MiB: `VmRSS` is its memory now, `VmHWM` the most it ever had. `None` where the
/// system does not tell.
#[allow(clippy::disallowed_methods)] // no path to name in an error: absence is an answer
pub(crate) fn process_mib(field: &str) -> Option<usize> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|l| l.starts_with(field))?;
    line.split_whitespace().nth(1)?.parse::<usize>().ok().map(|kib| kib / 1024)
}

/// Says what the harness would hide of a test that passes.
pub(crate) fn say(line: &str) {
    use std::io::Write;
    std::io::stderr().write_all(format!("{line}\n").as_bytes()).unwrap();
}

/// Runs `f` in rayon pools of 1, 2 and 3 threads and asserts that all results are the same, bit for bit.
pub(crate) fn assert_same_on_all_pools(f: impl Fn() -> (f64, Tensor) + Sync) {
    let runs: Vec<(u64, Vec<u64>)> = [1, 2, 3]
        .iter()
        .map(|&threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let (value, grad) = pool.install(&f);
            (value.to_bits(), elements(&grad).iter().map(|g| g.to_bits()).collect())
        })
        .collect();
    assert!(runs[0] == runs[1] && runs[0] == runs[2], "the number of threads changed the result");
}
