//! Sums of three tensors in place, on any device: the steps of an optimizer.

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, InplaceOp3, Layout, Tensor};
use rayon::prelude::*;

#[cfg(feature = "cuda")]
use crate::cpu::for_float;
use crate::cpu::{Element, check_float, slice_of, vectorised};
#[cfg(feature = "cuda")]
use crate::cuda;
use crate::error::{OpsError, Result};
use crate::planes::CHUNK;

const NAME: &str = "combine_in_place";

/// `dst = factors[0] * dst + factors[1] * x + factors[2] * y`, element by element, in one pass.
///
/// A factor of 0 leaves its term out, so that what it would multiply may be anything, NaN included.
///
/// # Shapes
/// All three of one shape, any, contiguous, f32 or f64, on one device; `x` and `y` may be one tensor, but not `dst`
/// # Gradient
/// None: `dst` is changed where it lies, every tensor that shares its storage with it.
/// # Errors
/// `Shape` when the shapes differ; `Config` for mixed or other element types, or tensors on different devices; `Candle`
/// for tensors with gaps, or a `dst` that shares its storage.
/// # Source
/// BLAS `axpby`, with a third term.
/// # Example
/// ```
/// use candle_core::{Device, Tensor};
/// let tensor = |values: &[f32]| Tensor::new(values, &Device::Cpu);
/// let (velocity, gradient, weight) = (tensor(&[1.0, 2.0])?, tensor(&[0.5, 0.5])?, tensor(&[10.0, 20.0])?);
/// segdistill_ops::combine_in_place(&velocity, &gradient, &weight, [0.5, 1.0, 0.25])?;
/// assert_eq!(velocity.to_vec1::<f32>()?, [3.5, 6.5]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn combine_in_place(dst: &Tensor, x: &Tensor, y: &Tensor, factors: [f64; 3]) -> Result<()> {
    check_float(NAME, &[dst, x, y])?;
    if x.dims() != dst.dims() || y.dims() != dst.dims() {
        return Err(OpsError::shape(
            NAME,
            format!("{:?} and {:?}", x.dims(), y.dims()),
            format!("{:?}, the shape of what is changed", dst.dims()),
            "broadcast first",
        ));
    }
    Ok(dst.inplace_op3(x, y, &Combine { factors })?)
}

struct Combine {
    factors: [f64; 3],
}

impl InplaceOp3 for Combine {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(
        &self,
        dst: &mut CpuStorage,
        dst_layout: &Layout,
        x: &CpuStorage,
        x_layout: &Layout,
        y: &CpuStorage,
        y_layout: &Layout,
    ) -> candle_core::Result<()> {
        fn run<T: Element>(dst: &mut [T], x: &[T], y: &[T], [a, b, c]: [T; 3]) {
            dst.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK)).zip(y.par_chunks(CHUNK)).for_each(|((dst, x), y)| {
                vectorised(|| {
                    for ((dst, &x), &y) in dst.iter_mut().zip(x).zip(y) {
                        let mut sum = if a == T::ZERO { T::ZERO } else { a * *dst };
                        if b != T::ZERO {
                            sum += b * x;
                        }
                        if c != T::ZERO {
                            sum += c * y;
                        }
                        *dst = sum;
                    }
                });
            });
        }
        let Some((start, end)) = dst_layout.contiguous_offsets() else {
            return Err(candle_core::Error::RequiresContiguous { op: NAME }.bt());
        };
        match (dst, x.dtype()) {
            (CpuStorage::F32(dst), candle_core::DType::F32) => {
                let (x, y) = (slice_of(NAME, x, x_layout)?, slice_of(NAME, y, y_layout)?);
                run(&mut dst[start..end], x, y, self.factors.map(|f| f as f32));
                Ok(())
            }
            (CpuStorage::F64(dst), candle_core::DType::F64) => {
                let (x, y) = (slice_of(NAME, x, x_layout)?, slice_of(NAME, y, y_layout)?);
                run(&mut dst[start..end], x, y, self.factors);
                Ok(())
            }
            (_, other) => Err(candle_core::Error::UnsupportedDTypeForOp(other, NAME).bt()),
        }
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        dst: &mut CudaStorage,
        dst_layout: &Layout,
        x: &CudaStorage,
        x_layout: &Layout,
        y: &CudaStorage,
        y_layout: &Layout,
    ) -> candle_core::Result<()> {
        for_float!(NAME, dst.dtype(), T => {
            cuda::combine::<T>(NAME, (dst, dst_layout), (x, x_layout), (y, y_layout), self.factors)
        })
    }
}

#[cfg(test)]
mod tests {
    use candle_core::DType;

    use super::*;
    use crate::testing::{assert_close, devices, random_f64};

    #[test]
    fn the_sum_is_formed_in_place_on_every_device() -> Result<()> {
        for device in devices() {
            for (dtype, tolerance) in [(DType::F32, 1e-6), (DType::F64, 1e-15)] {
                let make = |name: &str| random_f64(0, name, &[3, 70_001]);
                let [dst, x, y] = ["dst", "x", "y"].map(make);
                let expected = (((&dst * 0.9)? + (&x * 0.3)?)? + (&y * -0.7)?)?;
                let there = |t: &Tensor| Ok::<_, OpsError>(t.to_dtype(dtype)?.to_device(&device)?.copy()?);
                let changed = there(&dst)?;
                let shared = changed.clone();
                combine_in_place(&changed, &there(&x)?, &there(&y)?, [0.9, 0.3, -0.7])?;
                assert_close(&shared, &expected, tolerance, "two roundings of numbers below 2");
            }
        }
        Ok(())
    }

    #[test]
    fn a_factor_of_zero_leaves_its_term_out() -> Result<()> {
        for device in devices() {
            let tensor = |values: [f32; 2]| Tensor::new(&values, &device);
            let (nan, one) = (tensor([f32::NAN, f32::INFINITY])?, tensor([1.0, 2.0])?);
            let dst = tensor([f32::NAN, f32::NAN])?;
            combine_in_place(&dst, &one, &nan, [0.0, 3.0, 0.0])?;
            assert_eq!(dst.to_vec1::<f32>()?, [3.0, 6.0]);
            combine_in_place(&dst, &nan, &one, [1.0, 0.0, -1.0])?;
            assert_eq!(dst.to_vec1::<f32>()?, [2.0, 4.0]);
        }
        Ok(())
    }

    #[test]
    fn misuse_is_refused() -> Result<()> {
        let [a, b] = [&[2][..], &[3]].map(|shape| random_f64(0, "x", shape));
        assert!(matches!(combine_in_place(&a, &a.copy()?, &b, [1.0; 3]), Err(OpsError::Shape { .. })));
        let narrow = a.to_dtype(DType::F32)?;
        assert!(matches!(combine_in_place(&a, &narrow, &narrow, [1.0; 3]), Err(OpsError::Config { .. })));
        Ok(())
    }
}
