//! Differentiable operations that candle lacks, gets wrong or does slowly, with the parameter store and the seeded
//! randomness every other crate builds on.
//!
//! Everything here is a function of tensors: [`conv2d`], [`batch_norm`], [`max_pool2d`], [`resize_bilinear`] and their
//! kin take `[n, c, h, w]` tensors and record their own exact backward. CPU kernels run on rayon's global pool and give
//! the same bits for any number of threads.
//!
//! # Example
//! A depthwise convolution and the gradient of its kernel:
//! ```
//! use candle_core::{DType, Device, Tensor, Var};
//! use segdistill_ops::{Conv2dConfig, conv2d, relu};
//! # fn main() -> segdistill_ops::Result<()> {
//! let images = Tensor::ones((2, 8, 9, 7), DType::F32, &Device::Cpu)?;
//! let kernel = Var::ones((8, 1, 3, 3), DType::F32, &Device::Cpu)?;
//! let cfg = Conv2dConfig { stride: [2, 2], padding: [1, 1], groups: 8, ..Conv2dConfig::default() };
//! let maps = relu(&conv2d(&images, &kernel, None, cfg)?)?;
//! assert_eq!(maps.dims(), [2, 8, 5, 4]);
//! let gradients = maps.sum_all()?.backward()?;
//! assert_eq!(gradients.get(&kernel).expect("the kernel has a gradient").dims(), [8, 1, 3, 3]);
//! # Ok(())
//! # }
//! ```
//!
//! What does not live here: networks, losses, anything that knows a class, a file format of a data set or a step.

mod activation;
mod conv;
mod cpu;
mod dropout;
mod error;
mod gemm;
mod mode;
mod norm;
pub mod params;
mod planes;
mod pool;
mod resize;
pub mod rng;
mod softmax;
pub mod testing;

pub use activation::{relu, relu6};
pub use conv::{Conv2dConfig, conv2d};
pub use dropout::dropout;
pub use error::{DTypeDifference, Mismatch, OpsError, Result, ShapeDifference};
pub use gemm::{Element, MatMut, MatRef, gemm};
pub use mode::Mode;
pub use norm::{BatchNormConfig, batch_norm};
pub use params::{Init, NamedParam, ParamKind, ParamStore, Scope};
pub use pool::{Pool2dConfig, adaptive_avg_pool2d, avg_pool2d, max_pool2d};
pub use resize::{resize_bilinear, resize_nearest};
pub use softmax::log_softmax;

use candle_core::Tensor;

/// Concatenates maps along the channel axis: `out[n, c_0 + .. + c_{i-1} + k, y, x] = map_i[n, k, y, x]`.
///
/// # Shapes
/// - `maps_nchw`: `[n, c_i, h, w]` each, one `n`, `h`, `w` and element type for all, any strides; one map may come
///   more than once
/// - returns `[n, sum c_i, h, w]`
/// # Gradient
/// Each map gets its channels of the gradient; one that was passed twice gets the sum of both. Where a
/// variable stands behind one map, candle forms the others' parts too, which go nowhere.
/// # Errors
/// `Shape` when the maps disagree or are not of rank 4; `Config` when there is none, or when their types differ.
/// # Source
/// PyTorch `torch.cat(maps, dim=1)`. candle's own operation, with shapes told apart before.
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
                "concat_channels",
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
    Ok(Tensor::cat(maps_nchw, 1)?)
}
