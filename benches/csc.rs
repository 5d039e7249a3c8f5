//! Times the forms of the CSC loss, value and gradient, over map sizes: `cargo bench -p segdistill-benches --bench csc`.
//!
//! At the smallest size every form is checked against the patent's letter before anything is timed.

use candle_core::{DType, Device, Result, Tensor, Var};
use segdistill_benches::{filter, least, wave};
use segdistill_losses::{Csc, CscForm, csc};

fn run(form: CscForm, classes: usize, hw: [usize; 2]) -> Result<(f32, Tensor)> {
    let shape = [1, classes, hw[0], hw[1]];
    let student = Var::from_tensor(&wave(&shape)?)?;
    let teacher = wave(&shape)?.affine(0.5, 0.1)?.sqr()?;
    let valid = Tensor::ones((1, hw[0], hw[1]), DType::U8, &Device::Cpu)?;
    let loss = csc(&student, &teacher, &valid, &Csc { form }).map_err(candle_core::Error::wrap)?;
    let grads = loss.backward()?;
    let grad = grads.get(&student).ok_or_else(|| candle_core::Error::Msg("no gradient".into()))?.clone();
    Ok((loss.to_scalar::<f32>()?, grad))
}

fn main() -> Result<()> {
    let filter = filter();
    for classes in [11, 19] {
        let (value, grad) = run(CscForm::Letter, classes, [15, 20])?;
        for form in [CscForm::Direct, CscForm::Linear] {
            let (v, g) = run(form, classes, [15, 20])?;
            let apart = segdistill_ops::testing::relative_error(&g, &grad).map_err(candle_core::Error::wrap)?;
            assert!(
                (v - value).abs() <= 1e-4 * value && apart < 1e-3,
                "{form:?} at {classes} classes: {v}, {value}, {apart}"
            );
        }
    }
    println!("{:<12} {:>9} {:>10} {:>12}", "form", "classes", "pixels", "f+b ms");
    for (form, name, most) in
        [(CscForm::Letter, "letter", 2_700), (CscForm::Direct, "direct", 10_800), (CscForm::Linear, "linear", 524_288)]
    {
        for classes in [11, 19] {
            for hw in [[23, 30], [45, 60], [90, 120], [256, 512], [512, 1024]] {
                let pixels = hw[0] * hw[1];
                if pixels > most || !name.contains(&filter) {
                    continue;
                }
                let seconds = least(|| run(form, classes, hw).map(|_| ()))?;
                println!("{name:<12} {classes:>9} {pixels:>10} {:>12.2}", seconds * 1e3);
            }
        }
    }
    Ok(())
}
