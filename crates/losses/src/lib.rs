//! Loss functions for semantic segmentation and its distillation: functions of tensors.
//!
//! No parameters, no state, no files and no resizing live here. Every loss takes logits `[n, c, h, w]` and a mask of
//! the pixels that count, student before teacher, and returns a scalar whose gradient candle's `backward` delivers.
//! The gradient reaches the first argument only. Results do not depend on the number of threads.
//!
//! # Example
//! A supervised term and a distilling one, and the gradient of their sum:
//! ```
//! use candle_core::{Device, Tensor, Var};
//! use segdistill_losses::{CrossEntropy, Csc, cross_entropy, csc, valid_mask};
//!
//! // One image of 1 x 3 pixels and 2 classes; the last pixel is void.
//! let student = Var::new(&[[[[0.5f32, -1.0, 9.0]], [[1.5, 2.0, 9.0]]]], &Device::Cpu)?;
//! let teacher = Tensor::new(&[[[[2.0f32, -1.0, 0.0]], [[0.1, 3.0, 0.0]]]], &Device::Cpu)?;
//! let labels = Tensor::new(&[[[0u8, 1, 255]]], &Device::Cpu)?;
//! let valid = valid_mask(&labels, 255)?;
//!
//! let weights = CrossEntropy { class_weights: Some(vec![1.0, 0.5]) };
//! let supervised = cross_entropy(&student, &labels, &valid, &weights)?;
//! let distilled = csc(&student, &teacher, &valid, &Csc::default())?;
//! let loss = (supervised + (distilled * 10.0)?)?;
//!
//! let grads = loss.backward()?;
//! let grad = grads.get(&student).expect("the student has a gradient").flatten_all()?.to_vec1::<f32>()?;
//! assert!(grad[0] < 0.0, "the logit of the labelled class should rise");
//! assert_eq!((grad[2], grad[5]), (0.0, 0.0), "void moves nothing");
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
#![forbid(unsafe_code)]

mod cross_entropy;
mod csc;
mod error;
mod host;
mod mask;

pub use cross_entropy::{CrossEntropy, cross_entropy};
pub use csc::{Csc, CscForm, csc};
pub use error::{LossError, Result};
pub use mask::valid_mask;
