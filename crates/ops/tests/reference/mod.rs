//! What the integration tests of this crate share: fixtures, gradients of one input, pools of a given number of threads.
#![allow(dead_code)] // Each test file is its own crate and takes what it needs.

use std::collections::BTreeMap;
use std::path::PathBuf;

use candle_core::{DType, Device, Tensor, Var};
use segdistill_ops::Result;
use segdistill_ops::params::read_safetensors;
use segdistill_ops::testing::{assert_close, check_gradient, devices, random_f64};

/// Tensors of `fixtures/{name}.safetensors`, written by `fixtures/make_ops.py`.
pub(crate) fn fixture(name: &str) -> BTreeMap<String, Tensor> {
    // Cargo says where the crate lies; a test binary carried to another machine is told by the same variable.
    let home = std::env::var_os("CARGO_MANIFEST_DIR").map_or_else(|| env!("CARGO_MANIFEST_DIR").into(), PathBuf::from);
    read_safetensors(&home.join("tests/fixtures").join(format!("{name}.safetensors")), &Device::Cpu).unwrap()
}

/// Value of `f(x)` and the gradient of `sum(g * f(x))` with respect to x.
pub(crate) fn value_and_gradient(x: &Tensor, g: &Tensor, f: impl Fn(&Tensor) -> Result<Tensor>) -> (Tensor, Tensor) {
    let x = Var::from_tensor(x).unwrap();
    let y = f(x.as_tensor()).unwrap();
    assert_eq!(y.dims(), g.dims(), "shape of the result");
    let grads = (&y * g).unwrap().sum_all().unwrap().backward().unwrap();
    (y.detach(), grads.get(&x).expect("x is used").clone())
}

/// [`check_gradient`] with the inputs on every device.
pub(crate) fn check_gradients(
    inputs: &[Tensor],
    f: impl Fn(&[Tensor]) -> Result<Tensor>,
    max_probes: usize,
    tolerance: f64,
) -> Result<()> {
    for device in devices() {
        let there = inputs.iter().map(|t| t.to_device(&device)).collect::<candle_core::Result<Vec<_>>>()?;
        check_gradient(&there, &f, max_probes, tolerance)?;
    }
    Ok(())
}

/// Compares case `name` of a fixture with `f`, value and gradient, in f64 and f32, on every device.
pub(crate) fn check_case(
    cases: &BTreeMap<String, Tensor>,
    name: &str,
    f32_tolerance: f64,
    f: impl Fn(&Tensor) -> Result<Tensor>,
) {
    let part = |part: &str| cases.get(&format!("{name}.{part}")).unwrap_or_else(|| panic!("no {name}.{part}"));
    for device in devices() {
        for (dtype, tolerance, reason) in [
            (DType::F64, 1e-12, "f64 against f64: another order of sums"),
            (DType::F32, f32_tolerance, "f32 against f64: rounding of a few operations"),
        ] {
            let [x, g] = ["x", "g"].map(|p| part(p).to_dtype(dtype).unwrap().to_device(&device).unwrap());
            let (y, dx) = value_and_gradient(&x, &g, &f);
            assert_eq!((y.dtype(), dx.dtype()), (dtype, dtype), "{name}");
            // CUDA's exponentials and logarithms are off by one or two units in the last place.
            let tolerance = if device.is_cpu() { tolerance } else { 4.0 * tolerance };
            let place = device.location();
            assert_close(&y, part("y"), tolerance, &format!("{name} value on {place:?}, {reason}"));
            assert_close(&dx, part("dx"), tolerance, &format!("{name} gradient on {place:?}, {reason}"));
        }
    }
}

/// The bits of a tensor's f32 values.
pub(crate) fn bits(t: &Tensor) -> Vec<u32> {
    t.flatten_all().unwrap().to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect()
}

/// Asserts that value and gradient in f32 are the same, bit for bit, on pools of 1, 2 and 3 threads.
pub(crate) fn assert_threads_agree(shape: &[usize], f: impl Fn(&Tensor) -> Result<Tensor> + Sync) {
    let x = random_f64(5, "threads", shape).to_dtype(DType::F32).unwrap();
    let g = random_f64(6, "threads", f(&x).unwrap().dims()).to_dtype(DType::F32).unwrap();
    let run = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let (y, dx) = pool.install(|| value_and_gradient(&x, &g, &f));
        (bits(&y), bits(&dx))
    };
    let one = run(1);
    assert!(one.0.iter().any(|&b| b != one.0[0]), "a constant result proves nothing");
    assert!(one == run(2) && one == run(3), "results depend on the number of threads");
}

/// Asserts that the gradients of two consumers of one tensor add up: `f(x)` beside `3 x`.
pub(crate) fn assert_consumers_add(shape: &[usize], f: impl Fn(&Tensor) -> Result<Tensor>) {
    for device in devices() {
        let x = random_f64(7, "consumers", shape).to_device(&device).unwrap();
        let g = random_f64(8, "consumers", f(&x).unwrap().dims()).to_device(&device).unwrap();
        let (_, alone) = value_and_gradient(&x, &g, &f);
        let expected = (alone + 3.0).unwrap();
        for op_first in [true, false] {
            let var = Var::from_tensor(&x).unwrap();
            // A node between the variable and its consumers, as in a network.
            let shared = var.as_tensor().affine(1.0, 0.0).unwrap();
            let a = (f(&shared).unwrap() * &g).unwrap().sum_all().unwrap();
            let b = (shared * 3.0).unwrap().sum_all().unwrap();
            let loss = if op_first { (a + b).unwrap() } else { (b + a).unwrap() };
            let grads = loss.backward().unwrap();
            assert_close(grads.get(&var).unwrap(), &expected, 1e-12, "sums of two gradients");
        }
    }
}
