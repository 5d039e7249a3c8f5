//! Encoders: image classifiers without their classifier, dilated to a smaller output stride.
//!
//! An encoder is first a plan ([`EncoderPlan`]): plain numbers that say what it hands out, costs and weighs. It publishes
//! a pyramid of maps, shallow to deep. Whoever builds on it picks maps by their place, channels and stride, reads its
//! preferences from the plan and never asks its name. A new encoder is one file and one line in the table below.

mod densenet;
mod mit;
mod mobilenet;
mod resnet;
mod unet;
mod vgg;
mod xception;

use candle_core::Tensor;
use segdistill_ops::{Mode, OpsError, Pool2dConfig, Scope};

use crate::error::{ModelError, Result};
use crate::spec::Tap;

pub use densenet::DenseNetPlan;
pub use mit::MitPlan;
pub use mobilenet::MobileNetV2Plan;
pub use resnet::ResNetPlan;
pub use unet::UNetPlan;
pub use vgg::VggPlan;
pub use xception::XceptionPlan;

pub use crate::layers::ConvStyle;

/// What may be asked of every encoder.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct EncoderOptions {
    /// Stride of the last grid, in pixels: 8, 16 or 32. Strides beyond it become dilation.
    pub output_stride: usize,
    /// Multiplier of every channel count; products are rounded to multiples of 8, at least 8.
    pub width: f64,
    /// Published stages that are built, 1 to 5, the last of stride `2^depth` where nothing is dilated; later ones do not
    /// exist and have no weights.
    pub depth: usize,
    /// Whether a dilated stage begins with the dilation of the stage before, as in torchvision and CIRKD, rather than with
    /// its own, as in segmentation_models.pytorch. An encoder whose publication leaves no choice does not read it.
    pub gradual: bool,
    /// Whether a last pointwise expansion is built, such as MobileNetV2's to 1280 channels; an encoder without one does not
    /// read it.
    pub expansion: bool,
    /// Whether the pooling behind a ResNet's stem rounds its size up, as SKD's does; no other encoder reads it.
    pub ceil_pool: bool,
    /// Probability with which training leaves the last residual branch out, for encoders with stochastic depth, in [0, 1);
    /// the first is never left out, those between in proportion.
    pub drop_path: f64,
}

impl Default for EncoderOptions {
    /// As published: output stride 32, full width, all five stages.
    fn default() -> Self {
        Self {
            output_stride: 32,
            width: 1.0,
            depth: 5,
            gradual: false,
            expansion: true,
            ceil_pool: false,
            drop_path: 0.1,
        }
    }
}

/// How the images come in: `(rgb - mean) / std`, RGB in [0, 1].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Normalisation {
    /// Mean of each channel.
    pub mean: [f64; 3],
    /// Standard deviation of each channel.
    pub std: [f64; 3],
}

impl Normalisation {
    /// Mean and standard deviation of ImageNet, as torchvision's weights take them.
    pub const IMAGENET: Self = Self { mean: [0.485, 0.456, 0.406], std: [0.229, 0.224, 0.225] };
}

/// What an image costs an encoder.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EncoderTrace {
    /// Multiply-accumulates of convolutions and linear layers.
    pub macs: u64,
    /// Multiply-accumulates of attention's two products, queries by keys and weights by values; 0 without attention.
    pub attention_macs: u64,
    /// Height and width of each map of [`EncoderPlan::taps`].
    pub sizes: Vec<[usize; 2]>,
    /// Height and width before each pooling of [`EncoderPlan::pools`].
    pub pool_sizes: Vec<[usize; 2]>,
}

/// What is wanted of an encoder's maps; the others are dropped as soon as nothing needs them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    /// Places in [`EncoderPlan::taps`], ascending.
    pub taps: Vec<usize>,
    /// Whether the poolings' indices are wanted.
    pub pools: bool,
}

/// A 2x2 max pooling as unpooling needs it.
#[derive(Clone, Debug)]
pub struct Pooling {
    /// Where each maximum lay, as `max_pool2d_with_indices` gives it.
    pub indices: Tensor,
    /// Height and width before the pooling.
    pub hw: [usize; 2],
}

/// Feature maps of a batch.
#[derive(Clone, Debug)]
pub struct EncoderOutput {
    /// The maps of [`Wanted::taps`], in that order.
    pub maps_nchw: Vec<Tensor>,
    /// Every pooling of [`EncoderPlan::pools`] from the image on, where they are wanted; else nothing.
    pub pools: Vec<Pooling>,
}

impl EncoderOutput {
    /// Takes the maps out, `N` of them; a decoder asks for as many as it wants.
    ///
    /// # Errors
    /// `Ops(Config)` for another number.
    pub fn into_maps<const N: usize>(self) -> Result<[Tensor; N]> {
        let found = self.maps_nchw.len();
        let wrong = |_| {
            let what = format!("an encoder gave {found} maps, its decoder reads {N}");
            OpsError::config(what, "wanted maps and those handed out must be as many")
        };
        Ok(self.maps_nchw.try_into().map_err(wrong)?)
    }
}

/// Collects the wanted maps while an encoder runs.
pub(crate) struct Collector<'a> {
    wanted: &'a Wanted,
    found: EncoderOutput,
}

impl<'a> Collector<'a> {
    pub(crate) fn new(wanted: &'a Wanted) -> Self {
        Self { wanted, found: EncoderOutput { maps_nchw: Vec::with_capacity(wanted.taps.len()), pools: Vec::new() } }
    }

    /// Whether map `tap` is wanted.
    pub(crate) fn wants(&self, tap: usize) -> bool {
        self.wanted.taps.contains(&tap)
    }

    /// Whether the poolings' indices are wanted.
    pub(crate) fn wants_pools(&self) -> bool {
        self.wanted.pools
    }

    /// Keeps map `tap` if it is wanted; called once for each, in order.
    pub(crate) fn offer(&mut self, tap: usize, map_nchw: &Tensor) {
        if self.wants(tap) {
            self.found.maps_nchw.push(map_nchw.clone());
        }
    }

    /// Keeps a pooling; called only when they are wanted.
    pub(crate) fn keep_pool(&mut self, pooling: Pooling) {
        self.found.pools.push(pooling);
    }

    pub(crate) fn finish(self) -> EncoderOutput {
        self.found
    }
}

/// An encoder before it has weights.
pub trait EncoderPlan: Send + Sync {
    /// The maps it hands out, shallow to deep.
    fn taps(&self) -> Vec<Tap>;

    /// Places in [`EncoderPlan::taps`] of the maps that end the published stages, one a stride: what a decoder with skips
    /// takes. All of them unless the encoder hands out more.
    fn stages(&self) -> Vec<usize> {
        (0..self.taps().len()).collect()
    }

    /// Place in [`EncoderPlan::taps`] of the fine map that sharpens borders in DeepLabV3+: the deepest of stride 4 at
    /// most, unless the encoder's publication says another.
    fn low_level(&self) -> usize {
        self.taps().iter().rposition(|tap| tap.stride <= 4).unwrap_or(0)
    }

    /// Channels of each 2x2 max pooling whose indices it can hand out, from the image on.
    fn pools(&self) -> Vec<usize> {
        Vec::new()
    }

    /// The normalisation its published weights were trained with.
    fn normalisation(&self) -> Normalisation;

    /// Whether a decoder on top should use separable convolutions, as the encoder itself does.
    fn prefers_separable(&self) -> bool {
        false
    }

    /// Channels that a decoder of linear layers on top should have.
    fn decoder_channels(&self) -> usize {
        256
    }

    /// How its own convolutions are made up, for decoders that mirror it.
    fn conv_style(&self) -> ConvStyle {
        ConvStyle::Norm
    }

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
    /// - returns the wanted maps, of the channels and strides of [`EncoderPlan::taps`] and the sizes of
    ///   [`EncoderPlan::trace`]
    /// # Gradient
    /// Reaches every parameter of a trainable store, and the images; running statistics get none.
    /// # Errors
    /// `Ops(Shape)` when the images are not of this shape, or in training when a channel of some map has a single
    /// value.
    /// # Source
    /// That of the plan, such as [`ResNetPlan`] and [`XceptionPlan`].
    fn forward(&self, images_nchw: &Tensor, wanted: &Wanted, mode: Mode) -> Result<EncoderOutput>;
}

/// Height and width after a pooling, for plans.
///
/// # Errors
/// `Ops(Shape)` when the window does not fit.
pub(crate) fn pooled(pool: Pool2dConfig, hw: [usize; 2]) -> Result<[usize; 2]> {
    let unfit =
        || OpsError::shape("max_pool2d", format!("input {hw:?}"), "a map the window fits", "use a larger image");
    Ok(pool.output_hw(hw).ok_or_else(unfit)?)
}

/// An encoder of the catalogue.
pub(crate) struct EncoderEntry {
    pub(crate) name: &'static str,
    pub(crate) description: &'static str,
    /// Least [`EncoderOptions::depth`] it can be cut down to; 5 where it only comes whole.
    min_depth: usize,
    plan: fn(EncoderOptions) -> Box<dyn EncoderPlan>,
}

pub(crate) const ENCODERS: &[EncoderEntry] = &[
    EncoderEntry {
        name: "resnet18",
        description: "ResNet-18, 11.2 M parameters, torchvision's names and ImageNet normalisation",
        min_depth: 1,
        plan: |options| Box::new(ResNetPlan::resnet18(options)),
    },
    EncoderEntry {
        name: "resnet34",
        description: "ResNet-34, 21.3 M parameters, torchvision's names and ImageNet normalisation",
        min_depth: 1,
        plan: |options| Box::new(ResNetPlan::resnet34(options)),
    },
    EncoderEntry {
        name: "resnet50",
        description: "ResNet-50, 23.5 M parameters, torchvision's names and ImageNet normalisation",
        min_depth: 1,
        plan: |options| Box::new(ResNetPlan::resnet50(options)),
    },
    EncoderEntry {
        name: "resnet101",
        description: "ResNet-101, 42.5 M parameters, torchvision's names and ImageNet normalisation",
        min_depth: 1,
        plan: |options| Box::new(ResNetPlan::resnet101(options)),
    },
    EncoderEntry {
        name: "resnet18-deep",
        description: "ResNet-18 with the 64-64-128 stem of CIRKD and SKD, 11.3 M parameters",
        min_depth: 1,
        plan: |options| Box::new(ResNetPlan::resnet18_deep(options)),
    },
    EncoderEntry {
        name: "resnet34-deep",
        description: "ResNet-34 with the 64-64-128 stem of CIRKD and SKD, 21.4 M parameters",
        min_depth: 1,
        plan: |options| Box::new(ResNetPlan::resnet34_deep(options)),
    },
    EncoderEntry {
        name: "resnet50-deep",
        description: "ResNet-50 with the 64-64-128 stem of CIRKD and SKD, 23.6 M parameters",
        min_depth: 1,
        plan: |options| Box::new(ResNetPlan::resnet50_deep(options)),
    },
    EncoderEntry {
        name: "resnet101-deep",
        description: "ResNet-101 with the 64-64-128 stem of CIRKD and SKD, 42.6 M parameters",
        min_depth: 1,
        plan: |options| Box::new(ResNetPlan::resnet101_deep(options)),
    },
    EncoderEntry {
        name: "unet",
        description: "U-Net's contracting path, 18.8 M parameters, biases and no normalisation",
        min_depth: 1,
        plan: |options| Box::new(UNetPlan::new(ConvStyle::Bias, options)),
    },
    EncoderEntry {
        name: "unet-bn",
        description: "U-Net's contracting path, 18.8 M parameters, batch normalisation and no biases",
        min_depth: 1,
        plan: |options| Box::new(UNetPlan::new(ConvStyle::Norm, options)),
    },
    EncoderEntry {
        name: "unet-bn-bias",
        description: "U-Net's contracting path, 18.9 M parameters, biases and batch normalisation",
        min_depth: 1,
        plan: |options| Box::new(UNetPlan::new(ConvStyle::BiasNorm, options)),
    },
    EncoderEntry {
        name: "xception41",
        description: "aligned Xception-41, 24.9 M parameters, separable convolutions, timm's names",
        min_depth: 5,
        plan: |options| Box::new(XceptionPlan::xception41(options)),
    },
    EncoderEntry {
        name: "xception65",
        description: "aligned Xception-65, 37.9 M parameters, separable convolutions, timm's names",
        min_depth: 5,
        plan: |options| Box::new(XceptionPlan::xception65(options)),
    },
    EncoderEntry {
        name: "mobilenetv2",
        description: "MobileNetV2, 2.2 M parameters, inverted residuals, torchvision's names and ImageNet normalisation",
        min_depth: 1,
        plan: |options| Box::new(MobileNetV2Plan::mobilenetv2(options)),
    },
    EncoderEntry {
        name: "vgg16",
        description: "VGG16, 14.7 M parameters, torchvision's names and ImageNet normalisation",
        min_depth: 1,
        plan: |options| Box::new(VggPlan::vgg16(options)),
    },
    EncoderEntry {
        name: "vgg16-bn",
        description: "VGG16 with batch normalisation, 14.7 M parameters, torchvision's names and ImageNet normalisation",
        min_depth: 1,
        plan: |options| Box::new(VggPlan::vgg16_bn(options)),
    },
    EncoderEntry {
        name: "densenet169",
        description: "DenseNet-169, 12.5 M parameters, dilated as SSNet's, torchvision's names and ImageNet normalisation",
        min_depth: 1,
        plan: |options| Box::new(DenseNetPlan::densenet169(options)),
    },
    EncoderEntry {
        name: "mit-b0",
        description: "MiT-b0, 3.3 M parameters, SegFormer's encoder, segmentation_models.pytorch's names",
        min_depth: 2,
        plan: |options| Box::new(MitPlan::b0(options)),
    },
    EncoderEntry {
        name: "mit-b1",
        description: "MiT-b1, 13.2 M parameters, SegFormer's encoder, segmentation_models.pytorch's names",
        min_depth: 2,
        plan: |options| Box::new(MitPlan::b1(options)),
    },
    EncoderEntry {
        name: "mit-b2",
        description: "MiT-b2, 24.2 M parameters, SegFormer's encoder, segmentation_models.pytorch's names",
        min_depth: 2,
        plan: |options| Box::new(MitPlan::b2(options)),
    },
    EncoderEntry {
        name: "mit-b3",
        description: "MiT-b3, 44.1 M parameters, SegFormer's encoder, segmentation_models.pytorch's names",
        min_depth: 2,
        plan: |options| Box::new(MitPlan::b3(options)),
    },
    EncoderEntry {
        name: "mit-b4",
        description: "MiT-b4, 60.8 M parameters, SegFormer's encoder, segmentation_models.pytorch's names",
        min_depth: 2,
        plan: |options| Box::new(MitPlan::b4(options)),
    },
    EncoderEntry {
        name: "mit-b5",
        description: "MiT-b5, 81.4 M parameters, SegFormer's encoder, segmentation_models.pytorch's names",
        min_depth: 2,
        plan: |options| Box::new(MitPlan::b5(options)),
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
/// let plan = plan("resnet34", EncoderOptions { output_stride: 16, ..EncoderOptions::default() }).unwrap();
/// assert_eq!(plan.n_parameters(), 21_284_672);
/// let pyramid: Vec<_> = plan.taps().iter().map(|tap| (tap.channels, tap.stride)).collect();
/// assert_eq!(pyramid, [(64, 2), (64, 4), (128, 8), (256, 16), (512, 16)]);
/// ```
pub fn plan(name: &str, options: EncoderOptions) -> Result<Box<dyn EncoderPlan>> {
    if ![8, 16, 32].contains(&options.output_stride) {
        let hint = "16 is the published setting of DeepLabV3+";
        return Err(ModelError::setting("output_stride", options.output_stride, "8, 16 or 32", hint));
    }
    if !(options.width > 0.0 && options.width <= 4.0) {
        return Err(ModelError::setting("width", options.width, "above 0, at most 4", "1 is the published width"));
    }
    if !(1..=5).contains(&options.depth) {
        return Err(ModelError::setting("depth", options.depth, "1 to 5", "5 is the whole encoder"));
    }
    let entry = ENCODERS.iter().find(|e| e.name == name);
    let unknown = || ModelError::Unknown { what: "encoder", found: name.to_string(), known: names() };
    let entry = entry.ok_or_else(unknown)?;
    if options.depth < entry.min_depth {
        let hint = "choose an encoder that can be cut short, such as a ResNet, or a network that uses all of it";
        return Err(ModelError::setting("encoder", name, "one that can end before its last stage", hint));
    }
    Ok((entry.plan)(options))
}
