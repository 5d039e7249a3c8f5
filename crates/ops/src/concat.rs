//! Concatenation along the channel axis.

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp2, CustomOp3, DType, Layout, Shape, Tensor, WithDType};

use crate::cpu::{Element, for_float, par_chunks, slice_of, with_slice};
use crate::error::{OpsError, Result};
use crate::graph;

const NAME: &str = "concat_channels";

/// Concatenates maps along the channel axis: `out[n, c_0 + .. + c_{i-1} + k, y, x] = map_i[n, k, y, x]`.
///
/// # Shapes
/// - `maps_nchw`: `[n, c_i, h, w]` each, one `n`, `h`, `w` and element type for all, any strides; one map may come
///   more than once
/// - returns `[n, sum c_i, h, w]`
/// # Gradient
/// Each map gets its channels of the gradient; one that was passed twice gets the sum of both.
/// # Errors
/// `Shape` when the maps disagree or are not of rank 4; `Config` when there is none, or when their types differ.
/// # Source
/// PyTorch `torch.cat(maps, dim=1)`. f32 and f64 maps on the CPU are copied by all threads, forward and backward; other
/// maps go through candle's own operation.
/// # Example
/// ```
/// use candle_core::{Device, Tensor};
/// let (a, b) = (Tensor::new(&[[[[1f32, 2.0]]]], &Device::Cpu)?, Tensor::new(&[[[[3f32, 4.0]]]], &Device::Cpu)?);
/// let joined = segdistill_ops::concat_channels(&[&a, &b])?;
/// assert_eq!(joined.flatten_all()?.to_vec1::<f32>()?, [1.0, 2.0, 3.0, 4.0]);
/// # Ok::<(), segdistill_ops::OpsError>(())
/// ```
pub fn concat_channels(maps_nchw: &[&Tensor]) -> Result<Tensor> {
    let Some(first) = maps_nchw.first() else {
        return Err(OpsError::config("concat_channels needs at least one map", "pass the maps to join"));
    };
    let grid = |map: &Tensor| match *map.dims() {
        [n, _, h, w] => Some([n, h, w]),
        _ => None,
    };
    let expected = match grid(first) {
        Some([n, h, w]) => format!("[{n}, _, {h}, {w}]"),
        None => "[n, c, h, w]".to_string(),
    };
    for (i, map) in maps_nchw.iter().enumerate() {
        if grid(map).is_none() || grid(map) != grid(first) {
            return Err(OpsError::shape(
                NAME,
                format!("map {i} is {:?}", map.dims()),
                expected,
                "resize the maps to one grid first",
            ));
        }
        if map.dtype() != first.dtype() {
            return Err(OpsError::config(
                format!("concat_channels: map {i} is {:?} beside {:?}", map.dtype(), first.dtype()),
                "give every map one type",
            ));
        }
    }
    let here = first.device().is_cpu() && matches!(first.dtype(), DType::F32 | DType::F64);
    if !here || first.elem_count() == 0 || maps_nchw.len() == 1 {
        return Ok(Tensor::cat(maps_nchw, 1)?);
    }
    let mut maps = maps_nchw.iter().map(|map| map.contiguous()).collect::<candle_core::Result<Vec<Tensor>>>()?;
    // An operation has three arguments at most: more maps are joined in threes, then what that gave.
    while maps.len() > 1 {
        maps = maps.chunks(3).map(join).collect::<candle_core::Result<Vec<Tensor>>>()?;
    }
    Ok(maps.swap_remove(0))
}

fn join(maps: &[Tensor]) -> candle_core::Result<Tensor> {
    let op = Concat { n: maps[0].dims()[0] };
    match maps {
        [a, b] => graph::apply2(a, b, op),
        [a, b, c] => graph::apply3(a, b, c, op),
        _ => Ok(maps[0].clone()),
    }
}

/// Elements of a map in one image.
fn per_image(shape: &Shape) -> usize {
    shape.dims()[1..].iter().product()
}

struct Concat {
    n: usize,
}

impl Concat {
    fn forward<const N: usize>(&self, maps: [(&CpuStorage, &Layout); N]) -> candle_core::Result<(CpuStorage, Shape)> {
        let (_, _, h, w) = maps[0].1.shape().dims4()?;
        let channels = maps.iter().map(|(_, layout)| layout.dims()[1]).sum::<usize>();
        let out = for_float!(NAME, maps[0].0.dtype(), T => {
            let mut sources = Vec::with_capacity(N);
            for (storage, layout) in maps {
                sources.push(slice_of::<T>(NAME, storage, layout)?);
            }
            // A task copies one plane.
            let out = par_chunks(self.n * channels * h * w, h * w, |plane, out: &mut [T]| {
                let (image, mut channel) = (plane / channels, plane % channels);
                for source in &sources {
                    let of_source = source.len() / (self.n * h * w);
                    if channel < of_source {
                        out.copy_from_slice(&source[(image * of_source + channel) * h * w..][..h * w]);
                        return;
                    }
                    channel -= of_source;
                }
            });
            Ok(T::to_cpu_storage_owned(out))
        })?;
        Ok((out, Shape::from((self.n, channels, h, w))))
    }

    /// The part of `grad` that belongs to each map, where a variable stands behind it.
    fn backward<const N: usize>(&self, maps: [&Tensor; N], grad: &Tensor) -> candle_core::Result<[Option<Tensor>; N]> {
        let grad = grad.contiguous()?;
        let whole = per_image(grad.shape());
        let mut parts = [const { None }; N];
        let mut start = 0;
        for (part, map) in parts.iter_mut().zip(maps) {
            let len = per_image(map.shape());
            if map.track_op() {
                *part = Some(for_float!(NAME, grad.dtype(), T => with_slice::<T, _>(NAME, &grad, |grad| {
                    Tensor::from_vec(self.part(grad, whole, start, map.dims()), map.shape(), map.device())
                }))?);
            }
            start += len;
        }
        Ok(parts)
    }

    /// Elements `start..` of each image of `grad`, as many as a map of `dims` has.
    fn part<T: Element>(&self, grad: &[T], whole: usize, start: usize, dims: &[usize]) -> Vec<T> {
        let (channels, m) = (dims[1], dims[2] * dims[3]);
        par_chunks(self.n * channels * m, m, |plane, out| {
            let (image, channel) = (plane / channels, plane % channels);
            out.copy_from_slice(&grad[image * whole + start + channel * m..][..m]);
        })
    }
}

impl CustomOp2 for Concat {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(
        &self,
        a: &CpuStorage,
        la: &Layout,
        b: &CpuStorage,
        lb: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        self.forward([(a, la), (b, lb)])
    }

    fn bwd(
        &self,
        a: &Tensor,
        b: &Tensor,
        _result: &Tensor,
        grad: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        Ok(self.backward([a, b], grad)?.into())
    }
}

impl CustomOp3 for Concat {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(
        &self,
        a: &CpuStorage,
        la: &Layout,
        b: &CpuStorage,
        lb: &Layout,
        c: &CpuStorage,
        lc: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        self.forward([(a, la), (b, lb), (c, lc)])
    }

    fn bwd(
        &self,
        a: &Tensor,
        b: &Tensor,
        c: &Tensor,
        _result: &Tensor,
        grad: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        Ok(self.backward([a, b, c], grad)?.into())
    }
}
