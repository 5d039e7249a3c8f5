//! The one face of every segmentation network: [`Segmenter`], how to get one, and what it would cost.

use std::collections::BTreeMap;

use candle_core::Tensor;
use segdistill_ops::{Mode, ParamStore};

use crate::decoders::NETWORKS;
use crate::encoders::ENCODERS;
use crate::error::Result;
use crate::network::NetworkPlan;
use crate::spec::{ModelInfo, ModelSpec, Tap};

/// What a network gives for a batch of images.
#[derive(Clone, Debug)]
pub struct SegOutput {
    /// `[n, n_classes, h', w']` at the decoder's resolution (stride 4 for DeepLabV3+), before any softmax.
    pub logits_nchw: Tensor,
    /// Logits of the auxiliary head at its own resolution, in training, where the network has one ([`ModelSpec::aux`]).
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
    /// - logits: `[n, n_classes, h', w']`, sizes as [`trace`] says; `[n, n_classes, ceil(h / 4), ceil(w / 4)]` for
    ///   DeepLabV3+
    /// # Gradient
    /// Reaches every parameter of a trainable store in either mode; those of an auxiliary head in training, through its
    /// own logits.
    /// # Errors
    /// `Input` for another shape; `Ops` when an operation refuses, as batch normalisation does in training for a batch
    /// of one image (the image pooling branch has one value a channel then).
    fn forward(&self, images_nchw: &Tensor, mode: Mode) -> Result<SegOutput>;

    /// As [`Segmenter::forward`] for images that are normalised already, `(rgb - mean) / std` by [`ModelInfo`]'s.
    ///
    /// # Errors
    /// As [`Segmenter::forward`].
    fn forward_normalised(&self, images_nchw: &Tensor, mode: Mode) -> Result<SegOutput>;

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
    Ok(Box::new(NetworkPlan::new(spec)?.build(store)?))
}

/// What the network of `spec` would say of itself, without building it.
///
/// # Errors
/// As [`ModelSpec::validate`].
pub fn info(spec: &ModelSpec) -> Result<ModelInfo> {
    Ok(NetworkPlan::new(spec)?.info())
}

/// Multiply-accumulates of one image of size `[h, w]`: convolutions and linear layers only, from the structure, without
/// running it. One such operation is two FLOP.
///
/// Counted as evaluation runs: no auxiliary head. Attention's own products are [`Trace::attention_macs`].
///
/// # Errors
/// As [`ModelSpec::validate`]; `Input` for a size outside 32 to 65536.
pub fn macs(spec: &ModelSpec, hw: [usize; 2]) -> Result<u64> {
    Ok(trace(spec, hw)?.macs)
}

/// What one image costs a network and the sizes of its maps, from the structure, without running it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Trace {
    /// Multiply-accumulates of convolutions and linear layers in evaluation.
    pub macs: u64,
    /// Multiply-accumulates of the auxiliary head, which runs in training only.
    pub aux_macs: u64,
    /// Multiply-accumulates of attention's two products, which `macs` leaves out.
    pub attention_macs: u64,
    /// Height and width of each map of [`ModelInfo::taps`].
    pub tap_sizes: Vec<[usize; 2]>,
    /// Height and width of the logits.
    pub logits_hw: [usize; 2],
}

/// Cost and sizes for one image of size `[h, w]`.
///
/// # Errors
/// As [`macs`].
pub fn trace(spec: &ModelSpec, hw: [usize; 2]) -> Result<Trace> {
    NetworkPlan::new(spec)?.trace(hw)
}

/// A map of the encoder under a network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PyramidMap {
    /// Its name, channels and stride, as the encoder publishes them.
    pub tap: Tap,
    /// Height and width.
    pub hw: [usize; 2],
    /// Name it has among the network's features, where the decoder reads it.
    pub read_as: Option<&'static str>,
    /// Whether the decoder undoes the pooling this map comes from by its indices.
    pub unpooled: bool,
}

/// Every map of the encoder under the network of `spec`, shallow to deep, for one image of size `[h, w]`.
///
/// # Errors
/// As [`macs`].
pub fn pyramid(spec: &ModelSpec, hw: [usize; 2]) -> Result<Vec<PyramidMap>> {
    NetworkPlan::new(spec)?.pyramid(hw)
}

/// A network that can be asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CatalogEntry {
    /// [`ModelSpec::name`].
    pub name: &'static str,
    /// [`ModelSpec::encoder`].
    pub encoder: &'static str,
    /// One line on the encoder.
    pub description: &'static str,
}

impl CatalogEntry {
    /// Its spec, as [`ModelSpec::new`].
    pub fn spec(&self, n_classes: usize) -> ModelSpec {
        ModelSpec::new(self.name, self.encoder, n_classes)
    }
}

/// Every network with every encoder it can stand on.
pub fn catalog() -> Vec<CatalogEntry> {
    let with = |name| ENCODERS.iter().map(move |e| CatalogEntry { name, encoder: e.name, description: e.description });
    let all = NETWORKS.iter().flat_map(|network| with(network.name));
    all.filter(|entry| NetworkPlan::new(&entry.spec(2)).is_ok()).collect()
}

/// A network of the catalogue, whatever its encoder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetworkDescription {
    /// [`ModelSpec::name`].
    pub name: &'static str,
    /// One line on it.
    pub description: &'static str,
    /// What [`ModelSpec::layout`] may be.
    pub layouts: Vec<&'static str>,
    /// Whether [`ModelSpec::output_stride`] is read.
    pub dilated: bool,
    /// Whether [`ModelSpec::aux`] may be set.
    pub aux: bool,
}

/// Every network, whatever its encoder.
pub fn networks() -> Vec<NetworkDescription> {
    let described = |n: &crate::decoders::NetworkEntry| NetworkDescription {
        name: n.name,
        description: n.description,
        layouts: std::iter::once(crate::spec::PAPER).chain(n.layouts.iter().copied()).collect(),
        dilated: n.dilated,
        aux: n.aux,
    };
    NETWORKS.iter().map(described).collect()
}
