//! The ways back up from a pooled map: max unpooling by kept indices, nearest unpooling, bed of nails.
//!
//! Three answers to where a pooled value came from: where its maximum lay, everywhere, or always in the corner. The
//! pooling itself lives in `pool`, interpolation in `resize`.

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp1, DType, Layout, Shape, Tensor, WithDType};

use crate::cpu::{Element, check_float, for_float, par_chunks, slice_of, with_slice};
use crate::error::{OpsError, Result};
use crate::graph;
use crate::planes::dims_nchw;
use crate::resize::repeat;

const MAX: &str = "max_unpool2d";

/// Puts every value of a pooled map back where its maximum lay, zeros elsewhere.
///
/// `out[n, c, indices[n, c, i]] += x[n, c, i]` over the pixels `i` of a plane. The output size is an argument, because
/// maps of odd sizes pool to the same size as those one pixel smaller.
///
/// # Shapes
/// - `x_nchw`: `[n, c, h, w]`, f32 or f64; `indices_nchw`: of the same shape, u32, as
///   [`max_pool2d_with_indices`](crate::max_pool2d_with_indices) gives them
/// - returns `[n, c, out_hw[0], out_hw[1]]`: pass the size that the pooling saw
/// # Gradient
/// Every value gets what reached its place: the operation is linear, and exact for shared places too.
/// # Errors
/// `Shape` unless both are of one shape of rank 4 without empty axes, or when an index lies outside the output; `Config`
/// for an output side of 0, other element types, tensors on two devices or a device without kernels.
/// # Source
/// Zeiler and Fergus 2014; Badrinarayanan et al. 2017 (SegNet), section 3; PyTorch `torch.nn.functional.max_unpool2d`.
/// DIFFERENCE: values that share a place (windows that overlap) add up, there one of them is kept.
/// # Example
/// ```
/// use candle_core::{Device, Tensor};
/// use segdistill_ops::{Pool2dConfig, max_pool2d_with_indices, max_unpool2d};
/// # fn main() -> segdistill_ops::Result<()> {
/// let halve = Pool2dConfig { kernel: [2, 2], stride: [2, 2], padding: [0, 0], ceil_mode: true };
/// let x = Tensor::new(&[[[[1f32, 5.0, 2.0], [4.0, 3.0, 9.0], [7.0, 6.0, 8.0]]]], &Device::Cpu)?;
/// let (maxima, indices) = max_pool2d_with_indices(&x, halve)?;
/// assert_eq!(indices.flatten_all()?.to_vec1::<u32>()?, [1, 5, 6, 8]);
/// let y = max_unpool2d(&maxima, &indices, [3, 3])?;
/// assert_eq!(y.flatten_all()?.to_vec1::<f32>()?, [0.0, 5.0, 0.0, 0.0, 0.0, 9.0, 7.0, 0.0, 8.0]);
/// # Ok(())
/// # }
/// ```
pub fn max_unpool2d(x_nchw: &Tensor, indices_nchw: &Tensor, out_hw: [usize; 2]) -> Result<Tensor> {
    check_float(MAX, &[x_nchw])?;
    let [n, c, h, w] = dims_nchw(MAX, x_nchw)?;
    if indices_nchw.dims() != x_nchw.dims() {
        return Err(OpsError::shape(
            MAX,
            format!("indices {:?} for x {:?}", indices_nchw.dims(), x_nchw.dims()),
            format!("indices {:?}", x_nchw.dims()),
            "keep the indices of the pooling that made a map of this shape",
        ));
    }
    if indices_nchw.dtype() != DType::U32 || !indices_nchw.device().same_device(x_nchw.device()) {
        return Err(OpsError::config(
            format!(
                "{MAX}: indices are {:?} on {:?}, expected U32 on {:?}",
                indices_nchw.dtype(),
                indices_nchw.device().location(),
                x_nchw.device().location()
            ),
            "pass the indices that max_pool2d_with_indices gave",
        ));
    }
    if out_hw.contains(&0) {
        return Err(OpsError::config(format!("{MAX}: output size is {out_hw:?}"), "pass the size before the pooling"));
    }
    let indices = indices_nchw.contiguous()?;
    let plane = out_hw[0] * out_hw[1];
    let largest = indices.flatten_all()?.max(0)?.to_scalar::<u32>()? as usize;
    if largest >= plane {
        return Err(OpsError::shape(
            MAX,
            format!("index {largest} for an output of {out_hw:?}"),
            format!("indices below {plane}"),
            "pass the size before the pooling",
        ));
    }
    if !x_nchw.device().is_cpu() {
        // candle's own is right here, its sums in a fixed order.
        let rows = |t: &Tensor| t.contiguous()?.reshape((n * c, h * w));
        let zeros = Tensor::zeros((n * c, plane), x_nchw.dtype(), x_nchw.device())?;
        let out = zeros.scatter_add(&rows(&indices)?, &rows(x_nchw)?, 1)?;
        return Ok(out.reshape((n, c, out_hw[0], out_hw[1]))?);
    }
    Ok(graph::apply1(&x_nchw.contiguous()?, MaxUnpool { dims: [n, c, h, w], indices, out_hw })?)
}

/// Repeats every pixel in a square of `factor` by `factor`.
///
/// # Shapes
/// - `x_nchw`: `[n, c, h, w]`, f32 or f64
/// - returns `[n, c, h * factor, w * factor]`
/// # Gradient
/// Every pixel gets the sum over its square.
/// # Errors
/// `Shape` unless rank 4 without empty axes; `Config` for a factor of 0, another element type or a device without
/// kernels.
/// # Source
/// Dosovitskiy et al. 2015; [`resize_nearest`](crate::resize_nearest) by a whole factor, where f32's rounding of the
/// index plays no part.
pub fn nearest_unpool2d(x_nchw: &Tensor, factor: usize) -> Result<Tensor> {
    let op = "nearest_unpool2d";
    check_float(op, &[x_nchw])?;
    check_factor(op, factor)?;
    repeat(x_nchw, factor, op)
}

/// Puts every pixel into the upper left corner of a square of `factor` by `factor`, zeros beside it.
///
/// `out[n, c, f y, f x] = in[n, c, y, x]`, 0 elsewhere: max unpooling for who kept no indices.
///
/// # Shapes
/// - `x_nchw`: `[n, c, h, w]`, f32 or f64
/// - returns `[n, c, h * factor, w * factor]`
/// # Gradient
/// Every pixel gets that of its corner.
/// # Errors
/// Those of [`nearest_unpool2d`].
/// # Source
/// Dosovitskiy et al. 2015, section 4.1 ("unpooling"). A [`conv_transpose2d`](crate::conv_transpose2d) of stride `factor`
/// with a single tap.
pub fn bed_of_nails_unpool2d(x_nchw: &Tensor, factor: usize) -> Result<Tensor> {
    let op = "bed_of_nails_unpool2d";
    check_float(op, &[x_nchw])?;
    let [n, c, h, w] = dims_nchw(op, x_nchw)?;
    check_factor(op, factor)?;
    if factor == 1 {
        return Ok(x_nchw.clone());
    }
    // [n, c, h, w] -> [n c h, 1, w, 1] -> [n c h, f, w, f]: the new axes lie behind the old ones.
    let nails = x_nchw.contiguous()?.reshape((n * c * h, 1, w, 1))?;
    let wide = nails.pad_with_zeros(3, 0, factor - 1)?.pad_with_zeros(1, 0, factor - 1)?;
    Ok(wide.reshape((n, c, h * factor, w * factor))?)
}

fn check_factor(op: &'static str, factor: usize) -> Result<()> {
    match factor {
        0 => Err(OpsError::config(format!("{op}: factor is 0, expected 1 or more"), "2 undoes a 2x2 pooling")),
        _ => Ok(()),
    }
}

struct MaxUnpool {
    dims: [usize; 4],
    /// Below `out_hw[0] * out_hw[1]`.
    indices: Tensor,
    out_hw: [usize; 2],
}

impl MaxUnpool {
    /// Calls `f` with the indices.
    fn with_indices<R>(&self, f: impl FnOnce(&[u32]) -> R) -> candle_core::Result<R> {
        let (storage, layout) = self.indices.storage_and_layout();
        match (&*storage, layout.contiguous_offsets()) {
            (candle_core::Storage::Cpu(CpuStorage::U32(indices)), Some((start, end))) => Ok(f(&indices[start..end])),
            _ => Err(candle_core::Error::RequiresContiguous { op: MAX }.bt()),
        }
    }

    fn forward<T: Element>(&self, x: &[T], indices: &[u32]) -> Vec<T> {
        let ([n, c, h, w], [oh, ow]) = (self.dims, self.out_hw);
        par_chunks(n * c * oh * ow, oh * ow, |p, out| {
            let range = p * h * w..(p + 1) * h * w;
            for (&index, &x) in indices[range.clone()].iter().zip(&x[range]) {
                out[index as usize] += x;
            }
        })
    }

    fn backward<T: Element>(&self, grad: &[T], indices: &[u32]) -> Vec<T> {
        let ([n, c, h, w], [oh, ow]) = (self.dims, self.out_hw);
        par_chunks(n * c * h * w, h * w, |p, dx| {
            let grad = &grad[p * oh * ow..][..oh * ow];
            for (dx, &index) in dx.iter_mut().zip(&indices[p * h * w..]) {
                *dx = grad[index as usize];
            }
        })
    }
}

impl CustomOp1 for MaxUnpool {
    fn name(&self) -> &'static str {
        MAX
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        for_float!(MAX, x.dtype(), T => {
            let x = slice_of::<T>(MAX, x, layout)?;
            let out = self.with_indices(|indices| self.forward(x, indices))?;
            let shape = Shape::from((self.dims[0], self.dims[1], self.out_hw[0], self.out_hw[1]));
            Ok((T::to_cpu_storage_owned(out), shape))
        })
    }

    fn bwd(&self, x: &Tensor, _result: &Tensor, grad: &Tensor) -> candle_core::Result<Option<Tensor>> {
        let grad = grad.contiguous()?;
        for_float!(MAX, grad.dtype(), T => {
            let dx = with_slice::<T, _>(MAX, &grad, |g| self.with_indices(|indices| self.backward(g, indices)))?;
            Ok(Some(Tensor::from_vec(dx, x.shape(), x.device())?))
        })
    }
}
