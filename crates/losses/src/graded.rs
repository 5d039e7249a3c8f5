//! Losses whose gradient is formed together with their value: one node of the graph, whatever the formula.
//!
//! Most distilling losses read large maps once, reduce them to a few sums, and know their gradient a pass later; kept in
//! one operation, neither the walk of `ops::graph` nor candle's sees the steps between.

use std::sync::{Arc, OnceLock};

use candle_core::{CpuStorage, CustomOp1, DType, Device, Layout, Shape, Tensor};
use rayon::prelude::*;
use segdistill_ops::graph;

use crate::error::Result;
use crate::host::{Real, slice};

/// Elements of one task.
const CHUNK: usize = 1 << 15;

/// The value of a loss and, where asked for, its gradient with respect to the student's map.
pub(crate) struct Graded<T> {
    pub(crate) value: f64,
    /// One number for each element of the student's map; empty when none was asked for.
    pub(crate) grad: Vec<T>,
}

/// A loss of the student's map, everything else known: teacher, mask, settings.
pub(crate) trait HostLoss: Send + Sync {
    /// Name in errors and in the graph.
    const NAME: &'static str;

    /// Value and, if `with_grad`, gradient for the student's elements, row-major. The same numbers for any number of
    /// threads.
    fn evaluate<T: Real>(&self, student: &[T], with_grad: bool) -> candle_core::Result<Graded<T>>;
}

/// `loss` of `student` as a scalar of its type, on its device, computed on the host.
pub(crate) fn graded<L: HostLoss + 'static>(student: &Tensor, loss: L) -> Result<Tensor> {
    let host = student.to_device(&Device::Cpu)?.contiguous()?;
    let with_grad = host.track_op();
    let value = match host.dtype() {
        DType::F64 => graph::apply1(&host, Node::<L, f64> { loss, with_grad, grad: Arc::default() })?,
        _ => graph::apply1(&host, Node::<L, f32> { loss, with_grad, grad: Arc::default() })?,
    };
    Ok(value.to_device(student.device())?)
}

struct Node<L, T> {
    loss: L,
    with_grad: bool,
    grad: Arc<OnceLock<Vec<T>>>,
}

impl<L: HostLoss, T: Real> CustomOp1 for Node<L, T> {
    fn name(&self) -> &'static str {
        L::NAME
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let Graded { value, grad } = self.loss.evaluate(slice::<T>(storage, layout)?, self.with_grad)?;
        // A second forward of the same operation cannot happen, and would store the same numbers.
        let _ = self.grad.set(grad);
        Ok((T::to_cpu_storage_owned(vec![T::narrow(value)]), Shape::from(())))
    }

    fn bwd(&self, student: &Tensor, _loss: &Tensor, grad_loss: &Tensor) -> candle_core::Result<Option<Tensor>> {
        let factor = grad_loss.to_dtype(DType::F64)?.to_scalar::<f64>()?;
        let unit = self.grad.get().expect("the forward pass stored its gradient");
        let mut grad = vec![T::zero(); unit.len()];
        grad.par_chunks_mut(CHUNK).zip(unit.par_chunks(CHUNK)).for_each(|(grad, unit)| {
            for (grad, unit) in grad.iter_mut().zip(unit) {
                *grad = T::narrow(factor * unit.wide());
            }
        });
        Ok(Some(Tensor::from_vec(grad, student.dims(), &Device::Cpu)?))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Var;

    use super::*;

    struct SumOfSquares;

    impl HostLoss for SumOfSquares {
        const NAME: &'static str = "sum_of_squares";

        fn evaluate<T: Real>(&self, student: &[T], with_grad: bool) -> candle_core::Result<Graded<T>> {
            let value = student.iter().map(|x| x.wide() * x.wide()).sum();
            let grad = student.iter().filter(|_| with_grad).map(|x| T::narrow(2.0 * x.wide())).collect();
            Ok(Graded { value, grad })
        }
    }

    #[test]
    fn value_and_gradient_pass_the_graph() -> Result<()> {
        let x = Var::new(&[1f32, -2.0, 3.0], &Device::Cpu)?;
        let doubled = (x.as_tensor() * 2.0)?;
        let loss = (graded(&doubled, SumOfSquares)? * 0.5)?;
        assert_eq!(loss.to_scalar::<f32>()?, 28.0);
        assert_eq!(loss.backward()?.get(&x).expect("a gradient").to_vec1::<f32>()?, [4.0, -8.0, 12.0]);
        let plain = Tensor::new(&[3f64], &Device::Cpu)?;
        assert_eq!(graded(&plain, SumOfSquares)?.to_scalar::<f64>()?, 9.0);
        Ok(())
    }
}
