//! The CSC loss on copies of a smaller map's pixels.
//!
//! The loss is a mean over pairs of pixels: `r` copies of every pixel, wherever they lie, have the value of one, and
//! each copy has an `r`-th of the gradient. So the answer at half a million pixels is known from the pair-wise form in
//! f64 on a map of two thousand.

use candle_core::{DType, Device, Tensor, Var};
use segdistill_losses::{Csc, CscForm, csc};
use segdistill_ops::{graph, testing::relative_error};

use super::{Answer, Workload, sizes};
use crate::case::Form;
use crate::error::{BenchError, Result};
use crate::fill::filled;

/// A student's and a teacher's logits.
pub(super) struct Loss {
    name: String,
    student: Tensor,
    teacher: Tensor,
    valid_nhw: Tensor,
    cfg: Csc,
    /// The copied map `[c, s]` of student and teacher, and where each pixel comes from.
    source: [Tensor; 2],
    from: Tensor,
}

impl Loss {
    pub(super) fn new(name: String, form: Form, classes: usize, [h, w]: [usize; 2], source: usize) -> Result<Self> {
        let m = h * w;
        // Odd and without a factor in common with the sources: each of their pixels is taken equally often, scattered.
        let from: Vec<u32> = (0..m).map(|p| ((p * 4237 + p / source * 31) % source) as u32).collect();
        let from = Tensor::from_vec(from, m, &Device::Cpu)?;
        let source = [filled("student", &[classes, source], 4.0)?, filled("teacher", &[classes, source], 4.0)?];
        let spread = |t: &Tensor| -> Result<Tensor> { Ok(t.index_select(&from, 1)?.reshape((1, classes, h, w))?) };
        let (student, teacher) = (Var::from_tensor(&spread(&source[0])?)?, spread(&source[1])?);
        let form = match form {
            Form::Letter => CscForm::Letter,
            Form::Direct => CscForm::Direct,
            Form::Linear => CscForm::Linear,
        };
        let valid_nhw = Tensor::ones((1, h, w), DType::U8, &Device::Cpu)?;
        let student = student.as_tensor().clone();
        Ok(Self { name, student, teacher, valid_nhw, cfg: Csc { form }, source, from })
    }

    /// Value and gradient on the copied map itself, by pairs, in f64.
    fn expected(&self) -> Result<(f64, Tensor)> {
        let (c, s) = self.source[0].dims2()?;
        let wide = |t: &Tensor| t.to_dtype(DType::F64)?.reshape((1, c, 1, s));
        let student = Var::from_tensor(&wide(&self.source[0])?)?;
        let valid = Tensor::ones((1, 1, s), DType::U8, &Device::Cpu)?;
        let loss = csc(&student, &wide(&self.source[1])?, &valid, &Csc { form: CscForm::Direct })?;
        let grads = loss.backward()?;
        let grad = grads.get(&student).ok_or_else(|| BenchError::wrong(&self.name, "no gradient"))?;
        let (_, _, h, w) = self.student.dims4()?;
        let copies = (h * w / s) as f64;
        let spread = grad.reshape((c, s))?.index_select(&self.from, 1)?.reshape((1, c, h, w))?;
        Ok((loss.to_scalar::<f64>()?, (spread / copies)?))
    }
}

impl Workload for Loss {
    fn answer(&mut self) -> Result<Answer> {
        let loss = csc(&self.student, &self.teacher, &self.valid_nhw, &self.cfg)?;
        let grads = loss.backward()?;
        let grad = grads.get(&self.student).ok_or_else(|| BenchError::wrong(&self.name, "no gradient"))?;
        let value = f64::from(loss.to_scalar::<f32>()?);
        let (expected, expected_grad) = self.expected()?;
        let apart = [(value / expected - 1.0).abs(), relative_error(grad, &expected_grad)?];
        // The letter is a sum of candle's, which adds up to a hundred million squares in f32, one after the other.
        let letter = self.cfg.form == CscForm::Letter;
        if !(apart[0] <= if letter { 2e-2 } else { 1e-5 } && apart[1] <= 1e-4) {
            let [value_apart, grad_apart] = apart;
            let what = format!(
                "value {value:.7e}, expected {expected:.7e}; apart by {value_apart:.1e}, the gradient by {grad_apart:.1e}"
            );
            return Err(BenchError::wrong(&self.name, what));
        }
        let mut answer = sizes(&self.name, [("grad".to_string(), grad)])?;
        if !letter {
            answer.insert("value".into(), value);
        }
        Ok(answer)
    }

    fn run(&mut self) -> Result<()> {
        graph::backward(csc(&self.student, &self.teacher, &self.valid_nhw, &self.cfg)?)?;
        Ok(())
    }
}
