//! A case made ready to run: its tensors, its answer, and the run itself.

mod conv;
mod csc;
mod losses;
mod network;
mod operation;
mod relations;

use std::collections::BTreeMap;

use candle_core::Tensor;
use segdistill_ops as ops;

use crate::case::{Case, Precision, Work};
use crate::error::{BenchError, Result};
use crate::fill::rms;

/// Named numbers that both sides compute and that must agree.
pub type Answer = BTreeMap<String, f64>;

/// A case that is ready to run.
pub trait Workload {
    /// The answer, checked element by element or against a reference where one exists, before anything is timed.
    ///
    /// # Errors
    /// `Wrong` when the check fails; what the operation refuses.
    fn answer(&mut self) -> Result<Answer>;

    /// What is timed.
    ///
    /// # Errors
    /// What the operation refuses.
    fn run(&mut self) -> Result<()>;
}

/// Makes `case` ready.
///
/// # Errors
/// `Usage` for a precision that the case or this build does not have; what the operations refuse.
pub fn prepare(case: &Case, precision: Precision) -> Result<Box<dyn Workload>> {
    let name = case.name.clone();
    if precision == Precision::Bf16 && !has_bf16(&case.work) {
        return Err(BenchError::usage(
            format!("{name} has no bf16 form"),
            "loss, norms, resizing and the optimizer stay in f32; leave --precision away",
        ));
    }
    Ok(match &case.work {
        Work::Conv { .. } => Box::new(conv::Convolution::new(name, &case.work, precision)?),
        Work::BatchNorm { .. }
        | Work::Relu { .. }
        | Work::MaxPool { .. }
        | Work::Resize { .. }
        | Work::CrossEntropy { .. } => Box::new(operation::Operation::new(name, &case.work)?),
        Work::Sgd { encoder, classes } => Box::new(network::SgdStep::new(name, encoder, *classes)?),
        Work::Csc { form, classes, hw, source } => Box::new(csc::Loss::new(name, *form, *classes, *hw, *source)?),
        Work::Loss { loss, input } => Box::new(losses::Loss::new(name, *loss, *input)?),
        Work::Relation { loss, input, teacher_channels, slots, source } => {
            Box::new(relations::Loss::new(name, *loss, *input, *teacher_channels, *slots, *source)?)
        }
        Work::Train { encoder, input, classes } => {
            Box::new(network::TrainStep::new(name, encoder, *input, *classes, precision)?)
        }
        Work::Inference { encoder, input, classes } => {
            Box::new(network::Inference::new(name, encoder, *input, *classes)?)
        }
    })
}

/// Whether the products of a case can be taken in bf16. A frozen network computes in f32 whatever it was trained in.
pub fn has_bf16(work: &Work) -> bool {
    matches!(work, Work::Conv { .. } | Work::Train { .. })
}

/// The precision as `ops` calls it.
///
/// # Errors
/// `Usage` where the processor has no instructions for it.
fn products(precision: Precision) -> Result<ops::Precision> {
    let products = match precision {
        Precision::F32 => ops::Precision::F32,
        Precision::Bf16 => ops::Precision::Bf16,
    };
    match products.on_cpu() {
        Ok(_) => Ok(products),
        Err(ops::OpsError::Config { what, hint }) => Err(BenchError::usage(what, hint)),
        Err(other) => Err(other.into()),
    }
}

/// Largest distance between the answers of two sides, as a share of the second's: how far rounding and, in gradients,
/// a value that it carries across a rectifier's kink may move them.
pub fn tolerance(key: &str, precision: Precision) -> f64 {
    match (precision, key.starts_with("grad")) {
        (Precision::F32, false) => 1e-3,
        (Precision::F32, true) => 3e-2,
        // Eight bits of mantissa through some forty layers.
        (Precision::Bf16, false) => 5e-2,
        (Precision::Bf16, true) => 0.3,
    }
}

/// Compares the answers of two sides where both have one.
///
/// # Errors
/// `Wrong` naming the first number that differs, or that nothing could be compared.
pub fn compare(case: &str, ours: &Answer, theirs: &Answer, side: &str, precision: Precision) -> Result<()> {
    let mut compared = 0;
    for (key, &found) in ours {
        let Some(&expected) = theirs.get(key) else { continue };
        compared += 1;
        let allowed = tolerance(key, precision) * expected.abs() + 1e-12;
        // Written so that NaN fails too.
        if !((found - expected).abs() <= allowed) {
            return Err(BenchError::wrong(
                case,
                format!("`{key}` is {found:.7e} here and {expected:.7e} in {side}, allowed {allowed:.1e} apart"),
            ));
        }
    }
    match compared {
        0 => Err(BenchError::wrong(case, format!("{side} gave no number to compare with"))),
        _ => Ok(()),
    }
}

/// The root mean square of each named tensor; not finite is wrong.
fn sizes<'a>(case: &str, tensors: impl IntoIterator<Item = (String, &'a Tensor)>) -> Result<Answer> {
    let mut answer = Answer::new();
    for (key, tensor) in tensors {
        let size = rms(tensor)?;
        if !size.is_finite() {
            return Err(BenchError::wrong(case, format!("`{key}` is not finite")));
        }
        answer.insert(key, size);
    }
    Ok(answer)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalogue::cases;

    fn answer(pairs: &[(&str, f64)]) -> Answer {
        pairs.iter().map(|(key, value)| (key.to_string(), *value)).collect()
    }

    #[test]
    fn answers_agree_within_rounding_only() {
        let ours = answer(&[("loss", 2.0), ("grad", 1.0)]);
        let check = |theirs: &[(&str, f64)]| compare("case", &ours, &answer(theirs), "peer", Precision::F32);
        assert!(check(&[("loss", 2.0005), ("grad", 1.02)]).is_ok());
        for wrong in [&[("loss", 2.01)][..], &[("grad", 1.1)], &[("loss", f64::NAN)], &[("other", 1.0)], &[]] {
            let error = check(wrong).unwrap_err().to_string();
            assert!(error.contains("case") && error.contains("peer"), "{error}");
        }
    }

    /// The smallest case of each kind that costs little passes its own check; large ones are checked when they run.
    #[test]
    fn small_cases_pass_their_check_and_run() {
        let all = cases().unwrap();
        for name in [
            "resnet34/decoder.aspp.4.conv",
            "xception65/encoder.blocks.3.stack.conv1.conv_dw",
            "resnet34/encoder.layer4.0.relu",
            "xception65/encoder.blocks.3.stack.conv1.bn_dw",
            "csc/letter-11c-690",
            "csc/direct-11c-690",
            "csc/linear-19c-10800",
            "pixel-kl/11c-4x88x120",
            "channel-kl/11c-4x88x120",
            "dist/11c-4x88x120",
            "ohem/11c-4x88x120",
            "dice/11c-4x88x120",
            "lovasz/11c-4x88x120",
            "binary-cross-entropy/11c-4x88x120",
            "feature-mse/128c-4x64x128",
            "attention-transfer/128c-4x64x128",
            "ifvd/128c-4x64x128",
        ] {
            let case = all.iter().find(|case| case.name == name).unwrap();
            let mut workload = prepare(case, Precision::F32).unwrap();
            let answer = workload.answer().unwrap();
            assert!(!answer.is_empty() && answer.values().all(|v| v.is_finite()), "{name}: {answer:?}");
            workload.run().unwrap();
        }
    }

    #[test]
    fn f32_operations_refuse_bf16() {
        let all = cases().unwrap();
        let case = all.iter().find(|case| case.name == "resnet34/sgd").unwrap();
        assert!(matches!(prepare(case, Precision::Bf16), Err(BenchError::Usage { .. })));
    }
}
