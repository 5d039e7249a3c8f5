//! Dropout, of elements or of whole branches, whose mask is a function of (seed, layer name, step).

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp1, Layout, Shape, Tensor, WithDType};
use rayon::prelude::*;

use crate::cpu::{Element, check_float, for_float, par_chunks, slice_of, vectorised, with_slice};
#[cfg(feature = "cuda")]
use crate::cuda;
use crate::error::{OpsError, Result};
use crate::graph;
use crate::mode::Mode;
use crate::planes::CHUNK;
use crate::rng::Stream;

const NAME: &str = "dropout";
/// Elements a word of the mask decides.
const BITS: usize = u64::BITS as usize;

/// Inverted dropout: `y = x * keep / (1 - p)`, with `keep` 0 with probability `p`, else 1.
///
/// In `Eval`, or for `p = 0`, it is `x` itself.
///
/// Element `i` (row-major) is dropped where word `i` of the stream (`seed`, `"dropout/{name}"`, `[step]`) is below
/// `round(p * 2^32)`: the mask depends on neither threads nor device, and a resumed run draws it again.
///
/// # Shapes
/// Any shape, f32 or f64; returns the same.
/// # Gradient
/// `keep / (1 - p)`, the mask of the forward pass.
/// # Errors
/// `Config` when `p` lies outside [0, 1), for another element type or a device without kernels.
/// # Source
/// Srivastava et al. 2014; scaled in training as in PyTorch `torch.nn.functional.dropout`.
pub fn dropout(x: &Tensor, p: f64, mode: Mode, name: &str) -> Result<Tensor> {
    check_probability(NAME, p, name)?;
    let Mode::Train { seed, step } = mode else { return Ok(x.clone()) };
    if p == 0.0 {
        return Ok(x.clone());
    }
    check_float(NAME, &[x])?;
    let stream = Stream::new(seed, &format!("dropout/{name}"), &[step]);
    let op = Dropout { keep: keep_bits(&stream, x.elem_count(), p), scale: 1.0 / (1.0 - p) };
    Ok(graph::apply1(&x.contiguous()?, op)?)
}

/// Stochastic depth: leaves a residual branch out, image by image: `y[i] = x[i] * keep[i] / (1 - p)`, with `keep` 0 with
/// probability `p`, else 1.
///
/// In `Eval`, or for `p = 0`, it is `x` itself. Image `i` is left out where word `i` of the stream
/// (`seed`, `"drop_path/{name}"`, `[step]`) is below `round(p * 2^32)`.
///
/// # Shapes
/// `[n, ..]`, f32 or f64; returns the same.
/// # Gradient
/// `keep / (1 - p)`, the mask of the forward pass.
/// # Errors
/// `Shape` for a tensor without dimensions; those of [`dropout`].
/// # Source
/// Huang et al. 2016; scaled in training as in timm's `DropPath`.
pub fn drop_path(x: &Tensor, p: f64, mode: Mode, name: &str) -> Result<Tensor> {
    check_probability("drop_path", p, name)?;
    let Mode::Train { seed, step } = mode else { return Ok(x.clone()) };
    if p == 0.0 {
        return Ok(x.clone());
    }
    check_float("drop_path", &[x])?;
    let Some(&n) = x.dims().first() else {
        return Err(OpsError::shape("drop_path", "a tensor without dimensions", "[n, ..]", "pass a batch"));
    };
    let keep = keep_bits(&Stream::new(seed, &format!("drop_path/{name}"), &[step]), n, p);
    let kept = |i: usize| if keep[i / BITS] >> (i % BITS) & 1 == 1 { 1.0 / (1.0 - p) } else { 0.0 };
    let factors: Vec<f64> = (0..n).map(kept).collect();
    let shape: Vec<usize> = std::iter::once(n).chain(std::iter::repeat_n(1, x.rank() - 1)).collect();
    let factors = Tensor::from_vec(factors, shape, &candle_core::Device::Cpu)?;
    Ok(x.broadcast_mul(&factors.to_dtype(x.dtype())?.to_device(x.device())?)?)
}

fn check_probability(op: &str, p: f64, name: &str) -> Result<()> {
    match (0.0..1.0).contains(&p) {
        true => Ok(()),
        false => Err(OpsError::config(
            format!("{op} `{name}`: p is {p}, expected 0 <= p < 1"),
            "p is the share of what is set to 0; 0.1 and 0.5 are usual",
        )),
    }
}

/// Bit `i` is 1 where element `i` stays.
fn keep_bits(stream: &Stream, len: usize, p: f64) -> Vec<u64> {
    let threshold = (p * 2f64.powi(32)).round() as u64;
    let mut keep = vec![0u64; len.div_ceil(BITS)];
    keep.par_chunks_mut(CHUNK / BITS).enumerate().for_each(|(i, bits)| {
        let mut stream = stream.clone();
        stream.skip_words((i * CHUNK) as u64);
        for bits in bits {
            *bits = (0..BITS).fold(0, |bits, k| bits | u64::from(u64::from(stream.word()) >= threshold) << k);
        }
    });
    keep
}

struct Dropout {
    keep: Vec<u64>,
    scale: f64,
}

impl Dropout {
    /// Forward and backward alike: the operation is linear and diagonal.
    fn apply<T: Element>(&self, x: &[T]) -> Vec<T> {
        let scale = T::from_f64(self.scale);
        par_chunks(x.len(), CHUNK, |i, out| {
            let (x, keep) = (&x[i * CHUNK..], &self.keep[i * CHUNK / BITS..]);
            vectorised(|| {
                for ((out, x), &bits) in out.chunks_mut(BITS).zip(x.chunks(BITS)).zip(keep) {
                    for (k, (out, &x)) in out.iter_mut().zip(x).enumerate() {
                        *out = if bits >> k & 1 == 1 { x * scale } else { T::ZERO };
                    }
                }
            });
        })
    }
}

impl CustomOp1 for Dropout {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        for_float!(NAME, x.dtype(), T => {
            let out = self.apply(slice_of::<T>(NAME, x, layout)?);
            Ok((T::to_cpu_storage_owned(out), layout.shape().clone()))
        })
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, x: &CudaStorage, layout: &Layout) -> candle_core::Result<(CudaStorage, Shape)> {
        let out = for_float!(NAME, x.dtype(), T => cuda::keep_scaled::<T>(NAME, x, layout, &self.keep, self.scale))?;
        Ok((out, layout.shape().clone()))
    }

    fn bwd(&self, _x: &Tensor, _result: &Tensor, grad: &Tensor) -> candle_core::Result<Option<Tensor>> {
        let grad = grad.contiguous()?;
        #[cfg(feature = "cuda")]
        if grad.device().is_cuda() {
            // The operation is linear: its backward is itself.
            return grad.apply_op1_no_bwd(self).map(Some);
        }
        for_float!(NAME, grad.dtype(), T => {
            let out = with_slice::<T, _>(NAME, &grad, |g| Ok(self.apply(g)))?;
            Ok(Some(Tensor::from_vec(out, grad.shape(), grad.device())?))
        })
    }
}
