//! What the benchmarks share: the allocator of the program, inputs without randomness, and the least of several runs.
#![forbid(unsafe_code)]

use std::time::Instant;

use candle_core::{DType, Device, Result, Tensor};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Values of a slow wave over `shape`, f32, in [-1, 1].
///
/// # Errors
/// `Candle` when the tensor cannot be made.
pub fn wave(shape: &[usize]) -> Result<Tensor> {
    let n = shape.iter().product::<usize>();
    Tensor::arange(0u32, n as u32, &Device::Cpu)?.to_dtype(DType::F32)?.affine(1.7, 0.3)?.sin()?.reshape(shape)
}

/// Seconds of the fastest of at least three runs, about a second in all.
///
/// # Errors
/// The first error of `run`.
pub fn least(mut run: impl FnMut() -> Result<()>) -> Result<f64> {
    let (mut best, begun, mut runs) = (f64::INFINITY, Instant::now(), 0);
    while runs < 3 || (begun.elapsed().as_secs_f64() < 1.0 && runs < 200) {
        let start = Instant::now();
        run()?;
        best = best.min(start.elapsed().as_secs_f64());
        runs += 1;
    }
    Ok(best)
}

/// The first argument that is no flag of cargo's: a part of the names to run.
pub fn filter() -> String {
    std::env::args().skip(1).find(|a| !a.starts_with("--")).unwrap_or_default()
}
