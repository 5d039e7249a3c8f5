//! The one face of every segmentation network: [`Segmenter`], how to get one, and what it would cost.

use std::collections::BTreeMap;

use candle_core::Tensor;
use segdistill_ops::{Mode, ParamStore};

use crate::deeplab::DeepLabPlan;
use crate::encoders;
use crate::error::Result;
use crate::spec::{MODELS, ModelInfo, ModelSpec};

/// What a network gives for a batch of images.
#[derive(Clone, Debug)]
pub struct SegOutput {
    /// `[n, n_classes, h', w']` at the decoder's resolution (stride 4 for DeepLabV3+), before any softmax.
    pub logits_nchw: Tensor,
    /// Logits of an auxiliary head, where the network has one.
    pub aux_logits_nchw: Option<Tensor>,
    /// Feature maps by name; channels and strides are those of [`ModelInfo::taps`].
    pub features: BTreeMap<&'static str, Tensor>,
}

/// A segmentation network.
pub trait Segmenter: Send {
    /// Logits and features of a batch.
    ///
    /// # Shapes
    /// - `images_nchw`: `[n, 3, h, w]`, RGB in [0, 1], normalised inside; any `h` and `w` from 32 on, multiples of the
    ///   stride or not; converted to the weights' element type
    /// - logits: `[n, n_classes, ceil(h / 4), ceil(w / 4)]` for DeepLabV3+
    /// # Gradient
    /// Reaches every parameter of a trainable store in either mode.
    /// # Errors
    /// `Input` for another shape; `Ops` when an operation refuses, as batch normalisation does in training for a batch
    /// of one image (the image pooling branch has one value a channel then).
    fn forward(&self, images_nchw: &Tensor, mode: Mode) -> Result<SegOutput>;

    /// What the network says of itself.
    fn info(&self) -> &ModelInfo;
}

/// Builds the network of `spec` with its tensors in `store`, trainable or frozen.
///
/// Of a frozen store every tensor is asked for; what was missing or wrong is told by
/// [`ParamStore::finish`](segdistill_ops::ParamStore::finish). [`Frozen`](crate::Frozen) does both in one step. Over a
/// frozen store normalisations are folded into the convolutions, and training is refused.
///
/// # Errors
/// `Unknown` and `Setting` as [`ModelSpec::validate`]; `Ops(Config)` when the store holds a network already.
pub fn build(spec: &ModelSpec, store: &ParamStore) -> Result<Box<dyn Segmenter>> {
    Ok(Box::new(DeepLabPlan::new(spec)?.build(store)?))
}

/// What the network of `spec` would say of itself, without building it.
///
/// # Errors
/// As [`ModelSpec::validate`].
pub fn info(spec: &ModelSpec) -> Result<ModelInfo> {
    Ok(DeepLabPlan::new(spec)?.info())
}

/// Multiply-accumulates of one image of size `[h, w]`: convolutions and linear layers only, from the structure, without
/// running it. One such operation is two FLOP.
///
/// # Errors
/// As [`ModelSpec::validate`]; `Input` for a size outside 32 to 65536.
pub fn macs(spec: &ModelSpec, hw: [usize; 2]) -> Result<u64> {
    DeepLabPlan::new(spec)?.macs(hw)
}

/// A network that can be asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CatalogEntry {
    /// [`ModelSpec::name`].
    pub name: &'static str,
    /// [`ModelSpec::encoder`].
    pub encoder: &'static str,
    /// One line on it.
    pub description: &'static str,
}

/// Every network with every encoder.
pub fn catalog() -> Vec<CatalogEntry> {
    let with = |name| {
        encoders::ENCODERS.iter().map(move |e| CatalogEntry { name, encoder: e.name, description: e.description })
    };
    MODELS.into_iter().flat_map(with).collect()
}
