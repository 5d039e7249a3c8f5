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
pub mod alloc;
mod attention;
mod combine;
mod concat;
mod conv;
mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod device;
mod dropout;
mod error;
mod gelu;
mod gemm;
pub mod graph;
mod growth;
mod kernels;
mod layer_norm;
mod linear;
mod masked;
mod math;
mod mode;
mod norm;
pub mod params;
mod pieces;
mod planes;
mod pool;
mod precision;
mod resize;
pub mod rng;
mod softmax;
pub mod testing;
mod tokens;
mod unpool;

pub use activation::{relu, relu6};
pub use attention::attention;
pub use combine::combine_in_place;
pub use concat::concat_channels;
pub use conv::{Conv2dConfig, ConvTranspose2dConfig, FusedConv2d, conv_transpose2d, conv2d, conv2d_fused};
pub use cpu::vectorised;
pub use dropout::{drop_path, dropout};
pub use error::{DTypeDifference, Mismatch, OpsError, Result, ShapeDifference};
pub use gelu::gelu;
pub use gemm::{Element, MatMut, MatRef, gemm};
pub use growth::{Pass, Step, grow_channels};
pub use layer_norm::layer_norm;
pub use linear::linear;
pub use masked::masked;
pub use math::Transcendental;
pub use mode::Mode;
pub use norm::{BatchNormConfig, batch_norm, batch_norm_act};
pub use params::{Init, NamedParam, ParamKind, ParamStore, Scope};
pub use pieces::{add, columns};
pub use planes::{block_sums, pixel_runs};
pub use pool::{Pool2dConfig, adaptive_avg_pool2d, avg_pool2d, max_pool2d, max_pool2d_with_indices};
pub use precision::Precision;
pub use resize::{resize_bilinear, resize_nearest};
pub use softmax::log_softmax;
pub use tokens::{to_maps, to_tokens};
pub use unpool::{bed_of_nails_unpool2d, max_unpool2d, nearest_unpool2d};
