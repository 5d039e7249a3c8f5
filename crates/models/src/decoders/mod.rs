//! Decoders: from an encoder's maps to logits.
//!
//! A decoder is first a plan ([`DecoderPlan`]) made from what an encoder publishes, its taps and preferences; it never
//! asks the encoder's name. Encoder and decoder together are a network. A new decoder is one file and one line in the
//! table below.

mod aspp;
mod aux;
mod blocks;
mod deeplabv3;
mod deeplabv3plus;
mod fcn;
mod fcn_head;
mod pspnet;
mod segformer;
mod segnet;
mod unet;

use segdistill_ops::{Mode, Scope};

use crate::encoders::{self, EncoderOptions, EncoderOutput, EncoderPlan, EncoderTrace};
use crate::error::{ModelError, Result};
use crate::segmenter::SegOutput;
use crate::spec::{ModelSpec, PAPER, Tap};

/// What an image costs a decoder.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DecoderTrace {
    /// Multiply-accumulates of convolutions and linear layers in evaluation, where no auxiliary head runs.
    pub macs: u64,
    /// Multiply-accumulates of the auxiliary head, which runs in training only.
    pub aux_macs: u64,
    /// Height and width of each map of [`DecoderPlan::taps`].
    pub sizes: Vec<[usize; 2]>,
    /// Height and width of the logits.
    pub logits_hw: [usize; 2],
}

/// A decoder before it has weights.
pub trait DecoderPlan: Send + Sync {
    /// The encoder's maps it reads: their places in [`EncoderPlan::taps`], ascending, and the name each has among the
    /// network's features. The deepest is called `high`.
    fn inputs(&self) -> Vec<(usize, &'static str)>;

    /// Whether it unpools and so needs the indices of [`EncoderPlan::pools`].
    fn needs_pools(&self) -> bool {
        false
    }

    /// Maps of its own that it hands out, in the order in which they are formed.
    fn taps(&self) -> Vec<Tap>;

    /// Stride of the logits, in pixels.
    fn logits_stride(&self) -> usize;

    /// Whether the published network brings its logits to the image's size with corners aligned.
    fn align_corners(&self) -> bool {
        false
    }

    /// Trained elements, the auxiliary head's included where there is one.
    fn n_parameters(&self) -> usize;

    /// Cost and sizes for one image of size `[h, w]`, whose maps have the sizes of `encoder`.
    ///
    /// # Errors
    /// `Ops(Shape)` when a map is too small.
    fn trace(&self, image_hw: [usize; 2], encoder: &EncoderTrace) -> Result<DecoderTrace>;

    /// The decoder with weights, in `scope`.
    ///
    /// # Errors
    /// `Ops(Config)` when the names are taken.
    fn build(&self, scope: &Scope) -> Result<Box<dyn Decoder>>;
}

/// A decoder with weights.
pub trait Decoder: Send {
    /// Logits and features from an encoder's maps.
    ///
    /// # Shapes
    /// - `encoder`: the maps of [`DecoderPlan::inputs`], in that order
    /// - `image_hw`: height and width of the images they come from
    /// - logits: `[n, n_classes, h', w']`, as [`DecoderTrace::logits_hw`]; auxiliary logits in training only
    /// - features: those of [`DecoderPlan::inputs`] and [`DecoderPlan::taps`]
    /// # Gradient
    /// Reaches the maps and every parameter of a trainable store; those of an auxiliary head through its own logits.
    /// # Errors
    /// `Ops` when an operation refuses.
    /// # Source
    /// That of the network.
    fn forward(&self, encoder: EncoderOutput, image_hw: [usize; 2], mode: Mode) -> Result<SegOutput>;
}

/// A network of the catalogue: how its decoder comes from an encoder.
pub(crate) struct NetworkEntry {
    pub(crate) name: &'static str,
    pub(crate) description: &'static str,
    /// Layouts besides [`PAPER`].
    pub(crate) layouts: &'static [&'static str],
    /// Whether the encoder is dilated to [`ModelSpec::output_stride`]; else it is as published.
    pub(crate) dilated: bool,
    /// Whether it has an auxiliary head to train.
    pub(crate) aux: bool,
    /// What it asks of its encoder beyond output stride and width, which are set already.
    pub(crate) options: fn(&ModelSpec, EncoderOptions) -> EncoderOptions,
    /// The decoder's plan, from a spec that is checked and the encoder's plan.
    pub(crate) plan: fn(&ModelSpec, &dyn EncoderPlan) -> Result<Box<dyn DecoderPlan>>,
}

impl NetworkEntry {
    pub(crate) fn check_layout(&self, layout: &str) -> Result<()> {
        if layout == PAPER || self.layouts.contains(&layout) {
            return Ok(());
        }
        let known = std::iter::once(PAPER).chain(self.layouts.iter().copied()).collect();
        Err(ModelError::Unknown { what: "layout", found: layout.to_string(), known })
    }

    pub(crate) fn encoder_options(&self, spec: &ModelSpec) -> EncoderOptions {
        let output_stride = if self.dilated { spec.output_stride } else { 32 };
        (self.options)(spec, EncoderOptions { output_stride, width: spec.width, ..EncoderOptions::default() })
    }
}

pub(crate) const NETWORKS: &[NetworkEntry] = &[
    NetworkEntry {
        name: "deeplabv3plus",
        description: "atrous pyramid and a decoder on the fine map (Chen et al. 2018)",
        layouts: &["smp"],
        dilated: true,
        aux: false,
        options: |_, options| options,
        plan: deeplabv3plus::plan,
    },
    NetworkEntry {
        name: "deeplabv3",
        description: "atrous pyramid on the deepest map (Chen et al. 2017)",
        layouts: &["smp", "torchvision"],
        dilated: true,
        aux: true,
        options: deeplabv3::options,
        plan: deeplabv3::plan,
    },
    NetworkEntry {
        name: "pspnet",
        description: "pooling to four grids beside the deepest map (Zhao et al. 2017)",
        layouts: &["skd", "smp"],
        dilated: true,
        aux: true,
        options: pspnet::options,
        plan: pspnet::plan,
    },
    NetworkEntry {
        name: "fcn",
        description: "one convolution on the deepest map of a dilated encoder (torchvision's FCN)",
        layouts: &["torchvision"],
        dilated: true,
        aux: true,
        options: fcn_head::options,
        plan: fcn_head::plan,
    },
    NetworkEntry {
        name: "unet",
        description: "symmetric path with a skip at every stride (Ronneberger et al. 2015)",
        layouts: &["smp"],
        dilated: false,
        aux: false,
        options: |_, options| options,
        plan: unet::plan,
    },
    NetworkEntry {
        name: "fcn32s",
        description: "scores enlarged by transposed convolutions, in one step (Long et al. 2015)",
        layouts: &[],
        dilated: false,
        aux: false,
        options: |_, options| options,
        plan: fcn::plan_32s,
    },
    NetworkEntry {
        name: "fcn16s",
        description: "scores enlarged by transposed convolutions, with the scores of stride 16 (Long et al. 2015)",
        layouts: &[],
        dilated: false,
        aux: false,
        options: |_, options| options,
        plan: fcn::plan_16s,
    },
    NetworkEntry {
        name: "fcn8s",
        description: "scores enlarged by transposed convolutions, with the scores of strides 16 and 8 (Long et al. 2015)",
        layouts: &[],
        dilated: false,
        aux: false,
        options: |_, options| options,
        plan: fcn::plan_8s,
    },
    NetworkEntry {
        name: "segnet",
        description: "the encoder mirrored, poolings undone by their indices (Badrinarayanan et al. 2017)",
        layouts: &[],
        dilated: false,
        aux: false,
        options: |_, options| options,
        plan: segnet::plan,
    },
    NetworkEntry {
        name: "segformer",
        description: "linear layers on four stages of a transformer (Xie et al. 2021)",
        layouts: &[],
        dilated: false,
        aux: false,
        options: segformer::options,
        plan: segformer::plan,
    },
];

/// Place of the map an auxiliary head stands on: that which ends the stage before the last.
fn middle(encoder: &dyn EncoderPlan) -> usize {
    let stages = encoder.stages();
    stages[stages.len().saturating_sub(2)]
}

/// Channels of the decoder `name` on `encoder`, before `width`, as published; 256 for names that do not exist.
pub(crate) fn published_channels(name: &str, encoder: &str) -> usize {
    match (name, encoders::plan(encoder, EncoderOptions::default())) {
        ("segformer", Ok(plan)) => plan.decoder_channels(),
        _ => 256,
    }
}

/// Names of all networks.
pub(crate) fn names() -> Vec<&'static str> {
    NETWORKS.iter().map(|n| n.name).collect()
}

pub(crate) fn entry(name: &str) -> Result<&'static NetworkEntry> {
    let unknown = || ModelError::Unknown { what: "model", found: name.to_string(), known: names() };
    NETWORKS.iter().find(|n| n.name == name).ok_or_else(unknown)
}
