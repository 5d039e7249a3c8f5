//! Losses of a student's map, beside a teacher's or labels, no pixel void: the answer in f32 is compared with the same loss in f64.

use candle_core::{DType, Device, Tensor, Var};
use segdistill_losses::{
    AttentionTransfer, BinaryCrossEntropy, ChannelKl, Dice, Dist, FeatureMse, Ifvd, Lovasz, Ohem, PixelKl,
    attention_transfer, binary_cross_entropy, channel_kl, dice, dist, feature_mse, ifvd, lovasz_softmax,
    ohem_cross_entropy, pixel_kl,
};
use segdistill_ops::{graph, testing::relative_error};

use super::{Answer, Workload, sizes};
use crate::case::LossKind;
use crate::error::{BenchError, Result};
use crate::fill::filled;

/// Classes of the labels, where a map has more channels.
const CLASSES: usize = 19;

/// Maps of one element type.
struct Maps {
    student: Tensor,
    teacher: Tensor,
    /// The labels as one map a class.
    one_hot: Tensor,
}

impl Maps {
    fn to_dtype(&self, dtype: DType) -> Result<Maps> {
        let [student, teacher, one_hot] = [&self.student, &self.teacher, &self.one_hot].map(|t| t.to_dtype(dtype));
        Ok(Maps { student: Var::from_tensor(&student?)?.as_tensor().clone(), teacher: teacher?, one_hot: one_hot? })
    }
}

/// A student's and a teacher's map; the labels are the teacher's choice among the first channels.
pub(super) struct Loss {
    name: String,
    loss: LossKind,
    maps: Maps,
    labels_nhw: Tensor,
    valid_nhw: Tensor,
}

impl Loss {
    pub(super) fn new(name: String, loss: LossKind, input: [usize; 4]) -> Result<Self> {
        let [student, teacher] = [filled("student", &input, 4.0)?, filled("teacher", &input, 4.0)?];
        let [n, c, h, w] = input;
        let classes = c.min(CLASSES);
        let labels = teacher.narrow(1, 0, classes)?.argmax(1)?.to_dtype(DType::F64)?;
        let valid_nhw = Tensor::ones((n, h, w), DType::U8, &Device::Cpu)?;
        let planes = (0..classes).map(|class| labels.eq(class as f64)).collect::<candle_core::Result<Vec<_>>>()?;
        let one_hot = Tensor::stack(&planes, 1)?;
        let maps = Maps { student, teacher, one_hot }.to_dtype(DType::F32)?;
        Ok(Self { name, loss, maps, labels_nhw: labels.to_dtype(DType::U8)?, valid_nhw })
    }

    /// The loss at the setting that `peers/losses.py` has.
    fn apply(&self, maps: &Maps) -> Result<Tensor> {
        let (student, teacher, labels, valid) = (&maps.student, &maps.teacher, &self.labels_nhw, &self.valid_nhw);
        Ok(match self.loss {
            LossKind::PixelKl => pixel_kl(student, teacher, valid, &PixelKl::cirkd())?,
            LossKind::ChannelKl => channel_kl(student, teacher, valid, &ChannelKl::cwd())?,
            LossKind::Dist => dist(student, teacher, valid, &Dist::default())?,
            LossKind::Ohem => ohem_cross_entropy(student, labels, valid, &Ohem::default())?,
            LossKind::Dice => dice(student, labels, valid, &Dice::default())?,
            LossKind::Lovasz => lovasz_softmax(student, labels, valid, &Lovasz::default())?,
            LossKind::BinaryCrossEntropy => {
                binary_cross_entropy(student, &maps.one_hot, valid, &BinaryCrossEntropy::default())?
            }
            LossKind::FeatureMse => feature_mse(student, teacher, valid, &FeatureMse::fitnet())?,
            LossKind::AttentionTransfer => attention_transfer(student, teacher, valid, &AttentionTransfer::squares())?,
            LossKind::Ifvd => ifvd(student, teacher, labels, valid, &Ifvd { n_classes: CLASSES })?,
        })
    }

    fn value_and_gradient(&self, maps: &Maps) -> Result<(f64, Tensor)> {
        let loss = self.apply(maps)?;
        let value = loss.to_dtype(DType::F64)?.to_scalar::<f64>()?;
        let grads = graph::backward(loss)?;
        let grad = grads.get(&maps.student).ok_or_else(|| BenchError::wrong(&self.name, "no gradient"))?;
        Ok((value, grad.clone()))
    }
}

impl Workload for Loss {
    fn answer(&mut self) -> Result<Answer> {
        let (value, grad) = self.value_and_gradient(&self.maps)?;
        let (expected, expected_grad) = self.value_and_gradient(&self.maps.to_dtype(DType::F64)?)?;
        let apart = [(value / expected - 1.0).abs(), relative_error(&grad, &expected_grad)?];
        if !(apart[0] <= self.loss.tolerance() && apart[1] <= self.loss.tolerance()) {
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
        graph::backward(self.apply(&self.maps)?)?;
        Ok(())
    }
}
