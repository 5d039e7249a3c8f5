//! Segmentation networks on candle: encoders, decoders and the one face they share, [`Segmenter`].
//!
//! A network is written down as a [`ModelSpec`], described without memory by [`info`] and [`macs`], built trainable by
//! [`build`] over a parameter store, or as a teacher by [`Frozen`] over plain tensors. Images come as RGB in [0, 1];
//! each network normalises for itself. Tensors are named in PyTorch's manner, below `encoder` as torchvision (ResNet)
//! and timm (Xception) have them.
//!
//! Against PyTorch, with the same weights (`tests/pytorch.rs`): logits within 1e-12 (evaluation) and 1e-11 (training) in
//! f64 and every gradient within 1e-9, for all encoders, at full width too. In f32 logits lie within 1e-4 in evaluation
//! and 3e-4 in training, and gradients within 1e-3 in the calm cases (ResNet-34 at a quarter and at full width,
//! Xception-65 at an eighth), whose values keep away from the kinks of ReLU; training logits are within 1e-4 there. In
//! the other cases one value that rounding carries across a kink moves f32 gradients by up to 3 %, PyTorch's own (2 %)
//! as well as ours; they are bounded at three times what was measured.
//!
//! What does not live here: data sets, losses, optimisers, checkpoints, and renaming of foreign weights.
//!
//! # Example
//! ```
//! use candle_core::{DType, Device, Tensor};
//! use segdistill_models::{Frozen, ModelSpec, build, macs};
//! use segdistill_ops::{Mode, ParamStore};
//!
//! # fn main() -> segdistill_models::Result<()> {
//! let spec = ModelSpec { width: 0.125, ..ModelSpec::deeplabv3plus("resnet18", 11) };
//! let store = ParamStore::trainable(0, DType::F32, &Device::Cpu);
//! let student = build(&spec, &store)?;
//! println!("{} parameters, {} MACs", student.info().n_parameters, macs(&spec, [48, 64])?);
//!
//! let images = Tensor::full(0.5f32, (2, 3, 48, 64), &Device::Cpu)?;
//! let out = student.forward(&images, Mode::Train { seed: 0, step: 0 })?;
//! assert_eq!(out.logits_nchw.dims(), [2, 11, 12, 16]);
//! let gradients = out.logits_nchw.sqr()?.mean_all()?.backward()?;
//! assert!(store.named().iter().filter_map(|p| p.var.as_ref()).any(|var| gradients.get(var).is_some()));
//!
//! // The same weights as a teacher: no graph, no gradient.
//! let teacher = Frozen::new(&spec, store.tensors(), DType::F32, &Device::Cpu)?;
//! assert!(!teacher.forward(&images)?.logits_nchw.track_op());
//! # Ok(())
//! # }
//! ```

#![forbid(unsafe_code)]

pub mod adapter;
mod configurations;
pub mod decoders;
mod discriminator;
pub mod encoders;
mod error;
mod frozen;
pub mod layers;
mod network;
mod segmenter;
mod spec;
pub mod weights;

pub use configurations::{ClassifierCost, Configuration, Cost, Subject, configurations};
pub use discriminator::{Discriminator, DiscriminatorSpec};
pub use error::{ModelError, Result};
pub use frozen::Frozen;
pub use segmenter::{
    CatalogEntry, NetworkDescription, PyramidMap, SegOutput, Segmenter, Trace, build, catalog, info, macs, networks,
    pyramid, trace,
};
pub use spec::{ModelInfo, ModelSpec, Tap};
