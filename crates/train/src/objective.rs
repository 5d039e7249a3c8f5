//! The objective: a weighted, scheduled sum of loss terms (equation 6 of the patent is `csc` and `ce`).

use candle_core::Tensor;

use segdistill_losses::{CrossEntropy, Csc, cross_entropy, csc};

use crate::config::{TermConfig, TermKind};
use crate::error::{Result, TrainError};
use crate::schedule::WeightSchedule;
use crate::step::StepInputs;

#[derive(Clone, Debug)]
struct Term {
    kind: TermKind,
    weight: WeightSchedule,
}

/// A sum of loss terms, each with a weight and its schedule.
#[derive(Clone, Debug)]
pub struct Objective {
    terms: Vec<Term>,
    cross_entropy: CrossEntropy,
}

/// One term at one step.
#[derive(Clone, Debug)]
pub struct TermValue {
    /// Name of the term, as in metrics.csv.
    pub name: &'static str,
    /// Weight at this step.
    pub weight: f64,
    /// Unweighted loss, a scalar in the graph; `None` when the weight is 0 and nothing was computed.
    pub loss: Option<Tensor>,
}

impl Objective {
    /// The objective of `terms` over a run of `steps`, with the class weights of the cross entropy.
    pub fn new(terms: &[TermConfig], steps: u64, class_weights: Option<Vec<f64>>) -> Self {
        let term = |t: &TermConfig| Term { kind: t.loss, weight: WeightSchedule::new(t.weight, t.schedule, steps) };
        Self { terms: terms.iter().map(term).collect(), cross_entropy: CrossEntropy { class_weights } }
    }

    /// Names of the terms, in order.
    pub fn names(&self) -> Vec<&'static str> {
        self.terms.iter().map(|t| t.kind.name()).collect()
    }

    /// Every term at `step`.
    ///
    /// # Errors
    /// `Config` when a term needs a teacher and the inputs have none; what the losses report.
    pub fn terms(&self, inputs: &StepInputs, step: u64) -> Result<Vec<TermValue>> {
        let value = |t: &Term| {
            let weight = t.weight.at(step);
            let loss = if weight == 0.0 { None } else { Some(self.loss(t.kind, inputs)?) };
            Ok(TermValue { name: t.kind.name(), weight, loss })
        };
        self.terms.iter().map(value).collect()
    }

    /// Cross entropy of `logits_nchw` against the labels, at label resolution.
    fn labelled(&self, logits_nchw: &Tensor, inputs: &StepInputs) -> Result<Tensor> {
        let logits = inputs.at_labels(logits_nchw)?;
        Ok(cross_entropy(&logits, &inputs.labels_nhw, &inputs.valid_nhw, &self.cross_entropy)?)
    }

    fn loss(&self, kind: TermKind, inputs: &StepInputs) -> Result<Tensor> {
        match kind {
            TermKind::Ce => self.labelled(&inputs.student_logits_nchw, inputs),
            TermKind::Aux => {
                let logits = inputs.student_aux_logits_nchw.as_ref().ok_or_else(|| {
                    TrainError::config("term `aux` has no auxiliary head", "set model.aux, or take the term out")
                })?;
                self.labelled(logits, inputs)
            }
            TermKind::Csc => {
                let teacher = inputs.teacher_logits_nchw.as_ref().ok_or_else(|| {
                    TrainError::config("term `csc` has no teacher", "give the stage a teacher, or take the term out")
                })?;
                Ok(csc(&inputs.student_logits_nchw, teacher, &inputs.valid_at_logits_nhw, &Csc::default())?)
            }
        }
    }
}
