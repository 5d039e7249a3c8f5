//! Positions of a map set to 0, whatever they hold.

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp1, DType, Device, Layout, Shape, Tensor, WithDType};

use crate::cpu::{Element, check_float, for_float, par_chunks, slice_of, with_slice};
use crate::error::{OpsError, Result};
use crate::graph;

const NAME: &str = "masked";

/// The map where `keep` is 1, 0 elsewhere: `y[i, c, p] = keep[i, p] ? x[i, c, p] : 0`.
///
/// A choice, not a product: what is left out may be anything, NaN included.
///
/// # Shapes
/// - `x_nchw`: `[n, c, h, w]`, f32 or f64; `keep_nhw`: `[n, h, w]` u8, 0 or 1
/// - returns `[n, c, h, w]`
/// # Gradient
/// The same choice of the result's gradient.
/// # Errors
/// `Shape` when the grids differ; `Config` for another element type of `x_nchw`, for a mask that is not u8 or holds
/// another value.
/// # Example
/// ```
/// use candle_core::{Device, Tensor};
/// let x = Tensor::new(&[[[[1f32, f32::NAN]]]], &Device::Cpu)?;
/// let keep = Tensor::new(&[[[1u8, 0]]], &Device::Cpu)?;
/// assert_eq!(segdistill_ops::masked(&x, &keep)?.flatten_all()?.to_vec1::<f32>()?, [1.0, 0.0]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn masked(x_nchw: &Tensor, keep_nhw: &Tensor) -> Result<Tensor> {
    check_float(NAME, &[x_nchw])?;
    let (n, c, h, w) = x_nchw.dims4()?;
    if keep_nhw.dims() != [n, h, w] {
        let (found, expected) = (format!("keep {:?}", keep_nhw.dims()), format!("{:?}", [n, h, w]));
        return Err(OpsError::shape(NAME, found, expected, "give one value a position of each image"));
    }
    if keep_nhw.dtype() != DType::U8 {
        return Err(OpsError::config(format!("{NAME}: keep is {:?}, expected u8", keep_nhw.dtype()), "0 or 1 as u8"));
    }
    let keep = keep_nhw.to_device(&Device::Cpu)?.flatten_all()?.to_vec1::<u8>()?;
    if let Some(value) = keep.iter().find(|value| **value > 1) {
        return Err(OpsError::config(format!("{NAME}: keep holds {value}, expected 0 or 1"), "labels are no mask"));
    }
    if !x_nchw.device().is_cpu() {
        let keep = keep_nhw.to_device(x_nchw.device())?.unsqueeze(1)?.broadcast_as((n, c, h, w))?;
        return Ok(keep.where_cond(x_nchw, &x_nchw.zeros_like()?)?);
    }
    Ok(graph::apply1(&x_nchw.contiguous()?, Masked { keep, channels: c, plane: h * w })?)
}

struct Masked {
    keep: Vec<u8>,
    channels: usize,
    plane: usize,
}

impl Masked {
    /// Forward and backward alike: the operation is linear and diagonal.
    fn apply<T: Element>(&self, x: &[T]) -> Vec<T> {
        par_chunks(x.len(), self.plane, |at, out| {
            let x = &x[at * self.plane..][..out.len()];
            let keep = &self.keep[at / self.channels * self.plane..][..out.len()];
            for ((out, x), keep) in out.iter_mut().zip(x).zip(keep) {
                *out = if *keep == 1 { *x } else { T::ZERO };
            }
        })
    }
}

impl CustomOp1 for Masked {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        for_float!(NAME, x.dtype(), T => {
            let out = self.apply(slice_of::<T>(NAME, x, layout)?);
            Ok((T::to_cpu_storage_owned(out), layout.shape().clone()))
        })
    }

    fn bwd(&self, _x: &Tensor, _result: &Tensor, grad: &Tensor) -> candle_core::Result<Option<Tensor>> {
        let grad = grad.contiguous()?;
        for_float!(NAME, grad.dtype(), T => {
            let out = with_slice::<T, _>(NAME, &grad, |g| Ok(self.apply(g)))?;
            Ok(Some(Tensor::from_vec(out, grad.shape(), grad.device())?))
        })
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Var;

    use super::*;
    use crate::testing::{check_gradient, random_f64};

    fn keep() -> Tensor {
        Tensor::from_vec((0..2 * 3 * 5).map(|k| u8::from(k % 3 != 1)).collect::<Vec<u8>>(), (2, 3, 5), &Device::Cpu)
            .unwrap()
    }

    #[test]
    fn what_is_left_out_moves_nothing() {
        let x = random_f64(1, "x", &[2, 4, 3, 5]);
        let counted = keep().unsqueeze(1).unwrap().broadcast_as((2, 4, 3, 5)).unwrap();
        let nan = Tensor::full(f64::NAN, (2, 4, 3, 5), &Device::Cpu).unwrap();
        let expected = counted.where_cond(&x, &x.zeros_like().unwrap()).unwrap();
        let spoilt = Var::from_tensor(&counted.where_cond(&x, &nan).unwrap()).unwrap();
        let y = masked(spoilt.as_tensor(), &keep()).unwrap();
        let values = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f64>().unwrap();
        assert_eq!(values(&y), values(&expected));
        let gradient = graph::backward(y.sum_all().unwrap()).unwrap().get(&spoilt).unwrap().clone();
        assert_eq!(values(&gradient), values(&counted.to_dtype(DType::F64).unwrap()));
        assert_eq!(graph::handovers(&[y]), 0);
    }

    #[test]
    fn gradient_is_the_finite_difference() {
        check_gradient(&[random_f64(2, "x", &[2, 4, 3, 5])], |x| masked(&x[0], &keep()), 12, 1e-8).unwrap();
    }

    #[test]
    fn wrong_masks_are_refused() {
        let x = Tensor::zeros((2, 4, 3, 5), DType::F32, &Device::Cpu).unwrap();
        assert!(matches!(masked(&x, &keep().narrow(1, 0, 2).unwrap()), Err(OpsError::Shape { .. })));
        assert!(matches!(masked(&x, &keep().to_dtype(DType::U32).unwrap()), Err(OpsError::Config { .. })));
        assert!(
            masked(&x, &keep().ones_like().unwrap().affine(7.0, 0.0).unwrap()).unwrap_err().to_string().contains('7')
        );
    }
}
