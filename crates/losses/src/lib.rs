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
//! let weights = CrossEntropy { class_weights: Some(vec![1.0, 0.5]), ..CrossEntropy::default() };
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

mod ace;
mod adversarial;
mod attention_transfer;
mod auxiliary;
mod binary_cross_entropy;
mod channel_kl;
mod cirkd;
mod class_weights;
mod cross_entropy;
mod csc;
mod dice;
mod dist;
mod error;
mod feature_mse;
mod graded;
mod host;
mod ifvd;
mod lovasz;
mod mask;
mod nodes;
mod ohem;
mod omni_contrast;
mod pair_similarity;
mod pixel_kl;
mod soft_cross_entropy;
mod softmax;
mod targets;

pub use ace::{Ace, AceTarget, ace};
pub use adversarial::{gradient_penalty, hinge_critic, hinge_student, wgan_critic, wgan_student};
pub use attention_transfer::{AttentionTransfer, attention_transfer};
pub use auxiliary::with_auxiliary;
pub use binary_cross_entropy::{BinaryCrossEntropy, binary_cross_entropy};
pub use channel_kl::{ChannelKl, channel_kl};
pub use cirkd::{MemoryContrast, MiniBatchContrast, cirkd_mini_batch, memory_contrast};
pub use class_weights::enet_weights;
pub use cross_entropy::{CrossEntropy, cross_entropy};
pub use csc::{Csc, CscForm, csc};
pub use dice::{Dice, DiceNormaliser, dice};
pub use dist::{Dist, dist};
pub use error::{LossError, Result};
pub use feature_mse::{FeatureMse, MseNormaliser, feature_mse};
pub use ifvd::{Ifvd, ifvd};
pub use lovasz::{Lovasz, LovaszClasses, lovasz_softmax};
pub use mask::valid_mask;
pub use nodes::NodeKind;
pub use ohem::{Ohem, ohem_cross_entropy};
pub use omni_contrast::{OmniContrast, omni_contrast};
pub use pair_similarity::{NodePooling, PairNormaliser, PairSimilarity, pair_similarity};
pub use pixel_kl::{KlNormaliser, PixelKl, pixel_kl};
pub use soft_cross_entropy::{SoftCrossEntropy, soft_cross_entropy};
