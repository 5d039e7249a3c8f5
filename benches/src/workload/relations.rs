//! The losses over pairs of pixels, on copies of a smaller map's pixels.
//!
//! With `r` copies of every pixel, wherever they lie in their image, each of these losses has the value of one, and each
//! copy an `r`-th of the gradient: means over pairs stay what they are, and in a softmax a copy has an `r`-th of the
//! probability. So the answer is known from the same loss in f64 on a few hundred pixels.

use candle_core::{DType, Device, Tensor, Var};
use segdistill_losses::{
    MemoryContrast, MiniBatchContrast, PairSimilarity, cirkd_mini_batch, memory_contrast, pair_similarity,
};
use segdistill_ops::{graph, testing::relative_error};

use super::{Answer, Workload, sizes};
use crate::case::Relation;
use crate::error::{BenchError, Result};
use crate::fill::filled;

/// A student's and a teacher's features.
pub(super) struct Loss {
    name: String,
    loss: Relation,
    student: Tensor,
    teacher: Tensor,
    bank: Option<Tensor>,
    /// The copied maps `[n, d, 1, s]` of student and teacher, and where each pixel comes from.
    source: [Tensor; 2],
    from: Tensor,
}

impl Loss {
    pub(super) fn new(
        name: String,
        loss: Relation,
        [n, d, h, w]: [usize; 4],
        teacher_channels: usize,
        slots: usize,
        source: usize,
    ) -> Result<Self> {
        let m = h * w;
        // Odd and without a factor in common with the sources: each of their pixels is taken equally often, scattered.
        let from: Vec<u32> = (0..m).map(|p| ((p * 4237 + p / source * 31) % source) as u32).collect();
        let from = Tensor::from_vec(from, m, &Device::Cpu)?;
        let map = |name, d| filled(name, &[n, d, 1, source], 1.0);
        let source = [map("student", d)?, map("teacher", teacher_channels)?];
        let spread = |t: &Tensor| -> Result<Tensor> {
            let (n, d, ..) = t.dims4()?;
            Ok(t.index_select(&from, 3)?.reshape((n, d, h, w))?)
        };
        let (student, teacher) = (Var::from_tensor(&spread(&source[0])?)?, spread(&source[1])?);
        let bank = match slots {
            0 => None,
            slots => {
                let rows = filled("bank", &[slots, teacher_channels], 1.0)?;
                Some(rows.broadcast_div(&rows.sqr()?.sum_keepdim(1)?.sqrt()?)?)
            }
        };
        let student = student.as_tensor().clone();
        Ok(Self { name, loss, student, teacher, bank, source, from })
    }

    fn value(&self, student: &Tensor, teacher: &Tensor) -> Result<Tensor> {
        let (n, _, h, w) = student.dims4()?;
        let valid = Tensor::ones((n, h, w), DType::U8, &Device::Cpu)?;
        Ok(match (self.loss, &self.bank) {
            (Relation::PairSimilarity, _) => pair_similarity(student, teacher, &valid, &PairSimilarity::default())?,
            (Relation::CirkdMiniBatch, _) => cirkd_mini_batch(student, teacher, &valid, &MiniBatchContrast::cirkd())?,
            (Relation::MemoryContrast, Some(bank)) => {
                let bank = bank.to_dtype(student.dtype())?;
                memory_contrast(student, teacher, &bank, &valid, &MemoryContrast::cirkd())?
            }
            (Relation::MemoryContrast, None) => {
                return Err(BenchError::usage(format!("{} has no slots", self.name), "give it some in the catalogue"));
            }
        })
    }

    fn gradient(&self, student: &Tensor, loss: &Tensor) -> Result<Tensor> {
        let grads = loss.backward()?;
        grads.get(student).cloned().ok_or_else(|| BenchError::wrong(&self.name, "no gradient"))
    }

    /// Value and gradient on the copied map itself, in f64.
    fn expected(&self) -> Result<(f64, Tensor)> {
        let wide = |t: &Tensor| t.to_dtype(DType::F64);
        let student = Var::from_tensor(&wide(&self.source[0])?)?;
        let loss = self.value(&student, &wide(&self.source[1])?)?;
        let grad = self.gradient(&student, &loss)?;
        let copies = self.from.elem_count() as f64 / self.source[0].dim(3)? as f64;
        // Of the memory a mean over pixels is taken, of the others one over pairs: a pixel's share is the same.
        let spread = grad.index_select(&self.from, 3)?.reshape(self.student.shape())?;
        Ok((loss.to_scalar::<f64>()?, (spread / copies)?))
    }
}

impl Workload for Loss {
    fn answer(&mut self) -> Result<Answer> {
        let loss = self.value(&self.student, &self.teacher)?;
        let grad = self.gradient(&self.student, &loss)?;
        let value = f64::from(loss.to_scalar::<f32>()?);
        let (expected, expected_grad) = self.expected()?;
        let apart = [(value / expected - 1.0).abs(), relative_error(&grad, &expected_grad)?];
        if !(apart[0] <= 1e-5 && apart[1] <= 1e-4) {
            let [value_apart, grad_apart] = apart;
            let what = format!(
                "value {value:.7e}, expected {expected:.7e}; apart by {value_apart:.1e}, the gradient by {grad_apart:.1e}"
            );
            return Err(BenchError::wrong(&self.name, what));
        }
        let mut answer = sizes(&self.name, [("grad".to_string(), &grad)])?;
        answer.insert("value".into(), value);
        Ok(answer)
    }

    fn run(&mut self) -> Result<()> {
        graph::backward(self.value(&self.student, &self.teacher)?)?;
        Ok(())
    }
}
