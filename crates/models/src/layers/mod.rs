//! Layers with weights: convolution, batch normalisation and their usual companies.
//!
//! A layer comes in two steps. Its *shape* ([`ConvShape`], [`SeparableShape`]) is plain numbers: it knows output size,
//! parameters and multiply-accumulates and needs no memory. Built in a [`Scope`](segdistill_ops::Scope) it becomes a
//! layer with tensors. Names follow PyTorch (`weight`, `bias`, `running_mean`, `running_var`); `num_batches_tracked` is
//! not stored, nothing reads it.
//!
//! Convolutions start from Kaiming's normal distribution with fan-out, counted per group, so that a depthwise
//! convolution keeps the variance too; normalisations start from scale 1 and shift 0.

mod conv;
mod norm;
mod separable;

pub use conv::{Conv2d, ConvShape};
pub use norm::{BatchNorm2d, ConvBn, ConvBnRelu};
pub use separable::{SeparableConv, SeparableShape};
