//! Encoders: image classifiers without their classifier, dilated to a smaller output stride.
//!
//! An encoder is first a plan ([`EncoderPlan`]): plain numbers that say what it hands out, costs and weighs. Whoever
//! builds on it reads its taps and preferences from the plan and never asks its name. A new encoder is one file and one
//! line in the table below.

mod resnet;
mod xception;

use candle_core::Tensor;
use segdistill_ops::{Mode, Scope};

use crate::error::{ModelError, Result};
use crate::spec::Tap;

pub use resnet::ResNetPlan;
pub use xception::XceptionPlan;

/// What may be asked of every encoder.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct EncoderOptions {
    /// Stride of the last grid, in pixels: 8, 16 or 32. Strides beyond it become dilation.
    pub output_stride: usize,
    /// Multiplier of every channel count; products are rounded to multiples of 8, at least 8.
    pub width: f64,
}

/// The two feature maps a segmentation decoder works from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EncoderTaps {
    /// Fine, shallow map.
    pub low: Tap,
    /// Coarse, deep map.
    pub high: Tap,
}

/// How the images come in: `(rgb - mean) / std`, RGB in [0, 1].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Normalisation {
    /// Mean of each channel.
    pub mean: [f64; 3],
    /// Standard deviation of each channel.
    pub std: [f64; 3],
}

/// What an image costs an encoder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EncoderTrace {
    /// Multiply-accumulates of the convolutions.
    pub macs: u64,
    /// Size of the fine map.
    pub low_hw: [usize; 2],
    /// Size of the coarse map.
    pub high_hw: [usize; 2],
}

/// Feature maps of a batch.
#[derive(Clone, Debug)]
pub struct EncoderOutput {
    /// Fine, shallow map.
    pub low_nchw: Tensor,
    /// Coarse, deep map.
    pub high_nchw: Tensor,
}

/// An encoder before it has weights.
pub trait EncoderPlan: Send + Sync {
    /// The maps it hands out.
    fn taps(&self) -> EncoderTaps;

    /// The normalisation its published weights were trained with.
    fn normalisation(&self) -> Normalisation;

    /// Whether a decoder on top should use separable convolutions, as the encoder itself does.
    fn prefers_separable(&self) -> bool;

    /// Trained elements.
    fn n_parameters(&self) -> usize;

    /// Cost and sizes for one image of size `[h, w]`, without running it.
    ///
    /// # Errors
    /// `Ops(Shape)` when the image is empty.
    fn trace(&self, hw: [usize; 2]) -> Result<EncoderTrace>;

    /// The encoder with weights, in `scope`.
    ///
    /// # Errors
    /// `Ops(Config)` when the names are taken.
    fn build(&self, scope: &Scope) -> Result<Box<dyn Encoder>>;
}

/// An encoder with weights.
pub trait Encoder: Send {
    /// Feature maps of normalised images.
    ///
    /// # Shapes
    /// - `images_nchw`: `[n, 3, h, w]`, normalised by [`EncoderPlan::normalisation`]
    /// - returns maps of the channels and strides of [`EncoderPlan::taps`], sizes rounded up
    /// # Gradient
    /// Reaches every parameter of a trainable store, and the images; running statistics get none.
    /// # Errors
    /// `Ops(Shape)` when the images are not of this shape, or in training when a channel of some map has a single
    /// value.
    /// # Source
    /// That of the plan: [`ResNetPlan`], [`XceptionPlan`].
    fn forward(&self, images_nchw: &Tensor, mode: Mode) -> Result<EncoderOutput>;
}

/// An encoder of the catalogue.
pub(crate) struct EncoderEntry {
    pub(crate) name: &'static str,
    pub(crate) description: &'static str,
    plan: fn(EncoderOptions) -> Box<dyn EncoderPlan>,
}

pub(crate) const ENCODERS: [EncoderEntry; 3] = [
    EncoderEntry {
        name: "resnet18",
        description: "ResNet-18, 11.2 M parameters, torchvision's names and ImageNet normalisation",
        plan: |options| Box::new(ResNetPlan::resnet18(options)),
    },
    EncoderEntry {
        name: "resnet34",
        description: "ResNet-34, 21.3 M parameters, torchvision's names and ImageNet normalisation",
        plan: |options| Box::new(ResNetPlan::resnet34(options)),
    },
    EncoderEntry {
        name: "xception65",
        description: "aligned Xception-65, 37.9 M parameters, separable convolutions, timm's names",
        plan: |options| Box::new(XceptionPlan::xception65(options)),
    },
];

/// Names of all encoders.
pub fn names() -> Vec<&'static str> {
    ENCODERS.iter().map(|e| e.name).collect()
}

/// The plan of the encoder `name`.
///
/// # Errors
/// `Unknown` for another name; `Setting` for an output stride or width outside its range.
/// # Example
/// ```
/// use segdistill_models::encoders::{EncoderOptions, plan};
/// let plan = plan("resnet34", EncoderOptions { output_stride: 16, width: 1.0 }).unwrap();
/// assert_eq!(plan.n_parameters(), 21_284_672);
/// assert_eq!(plan.taps().high.channels, 512);
/// ```
pub fn plan(name: &str, options: EncoderOptions) -> Result<Box<dyn EncoderPlan>> {
    if ![8, 16, 32].contains(&options.output_stride) {
        let hint = "16 is the published setting of DeepLabV3+";
        return Err(ModelError::setting("output_stride", options.output_stride, "8, 16 or 32", hint));
    }
    if !(options.width > 0.0 && options.width <= 4.0) {
        return Err(ModelError::setting("width", options.width, "above 0, at most 4", "1 is the published width"));
    }
    let entry = ENCODERS.iter().find(|e| e.name == name);
    let unknown = || ModelError::Unknown { what: "encoder", found: name.to_string(), known: names() };
    Ok((entry.ok_or_else(unknown)?.plan)(options))
}
