//! Time of a training step of batch normalisation on the stem's map of four CamVid images: `[4, 64, 90, 120]` in f32.
//!
//! `cargo run -p segdistill-ops --example norm_time`; candle's own composition of operations took 16 ms forward and
//! 114 ms backward on the two cores where ours was written.

use std::time::Instant;

use candle_core::{DType, Device, Tensor, Var};
use segdistill_ops::testing::random_f64;
use segdistill_ops::{BatchNormConfig, Mode, Result, batch_norm};

fn filled(c: usize, value: f64) -> Result<Tensor> {
    Ok(Tensor::full(value, c, &Device::Cpu)?.to_dtype(DType::F32)?)
}

fn main() -> Result<()> {
    let x = Var::from_tensor(&random_f64(10, "norm", &[4, 64, 90, 120]).to_dtype(DType::F32)?)?;
    let (gamma, beta) = (Var::from_tensor(&filled(64, 1.0)?)?, Var::from_tensor(&filled(64, 0.0)?)?);
    let (mean, var) = (filled(64, 0.0)?, filled(64, 1.0)?);
    let g = random_f64(11, "norm", &[4, 64, 90, 120]).to_dtype(DType::F32)?;
    let mode = Mode::Train { seed: 0, step: 0 };
    let (mut forward, mut backward, mut loss_alone) = (f64::INFINITY, f64::INFINITY, f64::INFINITY);
    for _ in 0..7 {
        let start = Instant::now();
        let y = batch_norm(&x, &gamma, &beta, &mean, &var, BatchNormConfig::default(), mode)?;
        forward = forward.min(start.elapsed().as_secs_f64());
        for (y, best) in [(&y, &mut backward), (x.as_tensor(), &mut loss_alone)] {
            let loss = (y * &g)?.sum_all()?;
            let start = Instant::now();
            loss.backward()?;
            *best = best.min(start.elapsed().as_secs_f64());
        }
    }
    let [forward, backward, loss_alone] = [forward, backward, loss_alone].map(|s| s * 1e3);
    println!("[4, 64, 90, 120]: forward {forward:.1} ms, backward {backward:.1} ms ({loss_alone:.1} of it the loss)");
    Ok(())
}
