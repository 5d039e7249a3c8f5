//! Operations between convolutions: the answer in f32 is compared with the same operation in f64.

use candle_core::{DType, Device, Tensor, Var};
use segdistill_data::classes::VOID;
use segdistill_losses::{CrossEntropy, cross_entropy, valid_mask};
use segdistill_ops::{BatchNormConfig, Mode, Pool2dConfig, batch_norm_act, graph, max_pool2d, relu, resize_bilinear};

use super::{Answer, Workload, sizes};
use crate::case::Work;
use crate::error::{BenchError, Result};
use crate::fill::{filled, labels};

const POOL: Pool2dConfig = Pool2dConfig { kernel: [3, 3], stride: [2, 2], padding: [1, 1], ceil_mode: false };

/// Gradient of a result: the formula's, and 1 for a loss.
fn seed(y: &Tensor) -> Result<Tensor> {
    if y.rank() == 0 {
        return Ok(y.detach().ones_like()?);
    }
    Ok(filled("dy", y.dims(), 1.0)?.to_dtype(y.dtype())?)
}

/// An operation and the tensors whose gradient it forms.
pub(super) struct Operation {
    name: String,
    leaves: Vec<(String, Tensor)>,
    function: Function,
    /// Gradient of the result, made once.
    dy: Option<Tensor>,
}

enum Function {
    /// Inputs are the map, scale, shift, and the skip if there is one.
    BatchNorm {
        relu: bool,
    },
    Relu,
    MaxPool,
    Resize([usize; 2], bool),
    CrossEntropy {
        labels_nhw: Tensor,
        valid_nhw: Tensor,
    },
}

impl Function {
    fn apply(&self, inputs: &[(String, Tensor)]) -> Result<Tensor> {
        let x = &inputs[0].1;
        Ok(match self {
            Function::BatchNorm { relu } => {
                let [gamma, beta] = [&inputs[1].1, &inputs[2].1];
                let statistic = |value: f64| Tensor::full(value, gamma.dims(), &Device::Cpu)?.to_dtype(x.dtype());
                let (mean, var) = (statistic(0.0)?, statistic(1.0)?);
                let residual = inputs.get(3).map(|(_, t)| t);
                let (cfg, mode) = (BatchNormConfig::default(), Mode::Train { seed: 0, step: 0 });
                batch_norm_act(x, gamma, beta, &mean, &var, residual, *relu, cfg, mode)?
            }
            Function::Relu => relu(x)?,
            Function::MaxPool => max_pool2d(x, POOL)?,
            Function::Resize(to, align_corners) => resize_bilinear(x, *to, *align_corners)?,
            Function::CrossEntropy { labels_nhw, valid_nhw } => {
                cross_entropy(x, labels_nhw, valid_nhw, &CrossEntropy::default())?
            }
        })
    }
}

impl Operation {
    pub(super) fn new(name: String, work: &Work) -> Result<Self> {
        let mut extra: Vec<(&str, Vec<usize>)> = Vec::new();
        let (input, function) = match work {
            Work::BatchNorm { input, residual, relu } => {
                extra = vec![("gamma", vec![input[1]]), ("beta", vec![input[1]])];
                if *residual {
                    extra.push(("residual", input.to_vec()));
                }
                (input, Function::BatchNorm { relu: *relu })
            }
            Work::Relu { input } => (input, Function::Relu),
            Work::MaxPool { input } => (input, Function::MaxPool),
            Work::Resize { input, to, align_corners } => (input, Function::Resize(*to, *align_corners)),
            Work::CrossEntropy { input } => {
                let labels_nhw = labels(&[input[0], input[2], input[3]], input[1], VOID)?;
                let valid_nhw = valid_mask(&labels_nhw, VOID)?;
                (input, Function::CrossEntropy { labels_nhw, valid_nhw })
            }
            _ => return Err(BenchError::usage(format!("{name} is no operation"), "report this as a defect")),
        };
        let leaf = |key: &str, t: Tensor| -> Result<(String, Tensor)> {
            Ok((key.to_string(), Var::from_tensor(&t)?.as_tensor().clone()))
        };
        let mut leaves = vec![leaf("x", filled("x", input, 1.0)?)?];
        for (key, shape) in extra {
            leaves.push(leaf(key, filled(key, &shape, 1.0)?)?);
        }
        Ok(Self { name, leaves, function, dy: None })
    }

    /// Output and gradients, of `leaves` in any type.
    fn evaluate(&self, leaves: &[(String, Tensor)]) -> Result<Vec<(String, Tensor)>> {
        let y = self.function.apply(leaves)?;
        let grads = graph::backward_from(vec![(y.clone(), seed(&y)?)])?;
        let mut found = vec![("y".to_string(), y)];
        for (key, leaf) in leaves {
            let grad = grads.get(leaf).ok_or_else(|| BenchError::wrong(&self.name, format!("no gradient of {key}")))?;
            found.push((format!("grad-{key}"), grad.clone()));
        }
        Ok(found)
    }
}

impl Operation {
    /// Elements that are further than 1e-4 of the largest from the reference, beyond those few that rounding may carry
    /// across a rectifier's kink: some one in ten million lies that near.
    fn elements_off(&self, found: &Tensor, expected: &Tensor) -> Result<usize> {
        let values = |t: &Tensor| t.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>();
        let (found, expected) = (values(found)?, values(expected)?);
        let largest = expected.iter().fold(0.0, |most: f64, e| most.max(e.abs()));
        let off = found.iter().zip(&expected).filter(|(f, e)| !((*f - *e).abs() <= 1e-4 * largest)).count();
        let near_kinks = match self.function {
            Function::BatchNorm { relu: true } => 1 + found.len() / 1_000_000,
            _ => 0,
        };
        Ok(if found.len() == expected.len() { off.saturating_sub(near_kinks) } else { expected.len() })
    }
}

impl Workload for Operation {
    fn answer(&mut self) -> Result<Answer> {
        let found = self.evaluate(&self.leaves)?;
        let wide = |(key, t): &(String, Tensor)| -> Result<(String, Tensor)> {
            Ok((key.clone(), Var::from_tensor(&t.to_dtype(DType::F64)?)?.as_tensor().clone()))
        };
        let expected = self.evaluate(&self.leaves.iter().map(wide).collect::<Result<Vec<_>>>()?)?;
        for ((key, found), (_, expected)) in found.iter().zip(&expected) {
            let off = self.elements_off(found, expected)?;
            if off > 0 {
                return Err(BenchError::wrong(
                    &self.name,
                    format!("{off} elements of `{key}` differ from those in f64"),
                ));
            }
        }
        sizes(&self.name, found.iter().map(|(key, t)| (key.clone(), t)))
    }

    fn run(&mut self) -> Result<()> {
        let y = self.function.apply(&self.leaves)?;
        let dy = match &self.dy {
            Some(dy) => dy.clone(),
            None => self.dy.insert(seed(&y)?).clone(),
        };
        graph::backward_from(vec![(y, dy)])?;
        Ok(())
    }
}
