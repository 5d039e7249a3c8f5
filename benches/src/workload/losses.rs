//! Losses between two networks' maps, no pixel void: the answer in f32 is compared with the same loss in f64.

use candle_core::{DType, Device, Tensor, Var};
use segdistill_losses::{ChannelKl, Dist, PixelKl, channel_kl, dist, pixel_kl};
use segdistill_ops::{graph, testing::relative_error};

use super::{Answer, Workload, sizes};
use crate::case::LossKind;
use crate::error::{BenchError, Result};
use crate::fill::filled;

/// `loss` of student and teacher, at the setting that `peers/losses.py` has.
fn apply(loss: LossKind, student: &Tensor, teacher: &Tensor, valid_nhw: &Tensor) -> Result<Tensor> {
    Ok(match loss {
        LossKind::PixelKl => pixel_kl(student, teacher, valid_nhw, &PixelKl::cirkd())?,
        LossKind::ChannelKl => channel_kl(student, teacher, valid_nhw, &ChannelKl::cwd())?,
        LossKind::Dist => dist(student, teacher, valid_nhw, &Dist::default())?,
    })
}

/// A student's and a teacher's map.
pub(super) struct Loss {
    name: String,
    loss: LossKind,
    student: Tensor,
    teacher: Tensor,
    valid_nhw: Tensor,
}

impl Loss {
    pub(super) fn new(name: String, loss: LossKind, input: [usize; 4]) -> Result<Self> {
        let [student, teacher] = [filled("student", &input, 4.0)?, filled("teacher", &input, 4.0)?];
        let [n, _, h, w] = input;
        let valid_nhw = Tensor::ones((n, h, w), DType::U8, &Device::Cpu)?;
        Ok(Self { name, loss, student: Var::from_tensor(&student)?.as_tensor().clone(), teacher, valid_nhw })
    }

    fn value_and_gradient(&self, student: &Tensor, teacher: &Tensor) -> Result<(f64, Tensor)> {
        let loss = apply(self.loss, student, teacher, &self.valid_nhw)?;
        let value = loss.to_dtype(DType::F64)?.to_scalar::<f64>()?;
        let grads = graph::backward(loss)?;
        let grad = grads.get(student).ok_or_else(|| BenchError::wrong(&self.name, "no gradient"))?;
        Ok((value, grad.clone()))
    }
}

impl Workload for Loss {
    fn answer(&mut self) -> Result<Answer> {
        let (value, grad) = self.value_and_gradient(&self.student, &self.teacher)?;
        let student = Var::from_tensor(&self.student.to_dtype(DType::F64)?)?;
        let (expected, expected_grad) = self.value_and_gradient(&student, &self.teacher.to_dtype(DType::F64)?)?;
        let apart = [(value / expected - 1.0).abs(), relative_error(&grad, &expected_grad)?];
        if !(apart[0] <= 1e-5 && apart[1] <= 1e-5) {
            let what = format!(
                "value {value:.7e}, in f64 {expected:.7e}; apart by {:.1e}, the gradient by {:.1e}",
                apart[0], apart[1]
            );
            return Err(BenchError::wrong(&self.name, what));
        }
        let mut answer = sizes(&self.name, [("grad".to_string(), &grad)])?;
        answer.insert("value".into(), value);
        Ok(answer)
    }

    fn run(&mut self) -> Result<()> {
        graph::backward(apply(self.loss, &self.student, &self.teacher, &self.valid_nhw)?)?;
        Ok(())
    }
}
