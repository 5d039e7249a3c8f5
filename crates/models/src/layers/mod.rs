//! Layers with weights: convolution, batch normalisation and their usual companies.
//!
//! A layer comes in two steps. Its *shape* ([`ConvShape`], [`SeparableShape`]) is plain numbers: it knows output size,
//! parameters and multiply-accumulates and needs no memory. Built in a [`Scope`](segdistill_ops::Scope) it becomes a
//! layer with tensors. Names follow PyTorch (`weight`, `bias`, `running_mean`, `running_var`); `num_batches_tracked` is
//! not stored, nothing reads it.
//!
//! Convolutions start from Kaiming's normal distribution with fan-out, counted per group, so that a depthwise
//! convolution keeps the variance too, unless a network's publication says another; normalisations start from scale 1
//! and shift 0.

mod conv;
mod dense;
mod norm;
mod separable;
mod styled;
mod token;
mod transposed;

pub use conv::{Conv2d, ConvShape};
pub use dense::{DenseBlock, DenseLayerShape};
pub use norm::{BatchNorm2d, BnRelu, ConvBn, ConvBnRelu, ConvBnRelu6, ConvRelu};
pub use separable::{SeparableConv, SeparableShape};
pub use styled::{ConvStyle, StyledConv};
pub use token::{LayerNorm, Linear, LinearShape, MixBlock, MixBlockShape, PatchEmbedding, PatchShape};
pub use transposed::{ConvTranspose2d, TransposedShape};
