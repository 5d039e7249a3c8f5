//! What a network is asked to be ([`ModelSpec`]) and what it then says of itself ([`ModelInfo`], [`Tap`]).

use serde::{Deserialize, Serialize};

use crate::decoders;
use crate::encoders;
use crate::error::{ModelError, Result};

/// Smallest height and width a network takes, in pixels: the deepest grid still has a pixel at output stride 32.
pub(crate) const MIN_SIDE: usize = 32;
/// Largest height and width, in pixels: beyond it counts of multiply-accumulates could leave 64 bits.
pub(crate) const MAX_SIDE: usize = 65_536;

/// The layout every network has: that of its own publication, or of the one this project follows.
pub(crate) const PAPER: &str = "paper";

/// A network as a configuration file writes it.
///
/// Two networks of equal spec have tensors of equal names and shapes; dropout and output stride change neither.
///
/// # Example
/// ```
/// use segdistill_models::ModelSpec;
/// let spec = ModelSpec { width: 0.25, ..ModelSpec::deeplabv3plus("resnet34", 11) };
/// assert!(spec.validate().is_ok());
/// assert!(ModelSpec { output_stride: 12, ..spec }.validate().is_err());
/// let smp = ModelSpec { layout: "smp".into(), ..ModelSpec::named("deeplabv3plus-resnet34", 19).unwrap() };
/// assert_eq!(segdistill_models::info(&smp).unwrap().n_parameters, 22_442_083);
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelSpec {
    /// Network, such as `deeplabv3plus` or `pspnet`.
    pub name: String,
    /// Encoder, such as `resnet18`, `resnet101-deep` or `xception65`.
    pub encoder: String,
    /// Number of classes, void not counted: at least 2.
    pub n_classes: usize,
    /// Multiplier of every channel count but the image's and the classes', in (0, 4]; other products than those with 1 are
    /// rounded to multiples of 8, at least 8.
    pub width: f64,
    /// Stride of the encoder's last grid, in pixels: 8 or 16. Networks that take every step back again (those with skips
    /// to the finest grid) have the encoder as published and do not read it.
    pub output_stride: usize,
    /// Probability with which dropout zeroes an element, at the places where the network has it, in [0, 1).
    pub dropout: f64,
    /// Channels of the decoder before `width`, 1 to 4096; PSPNet of the smp layout has twice as many before its classifier.
    /// A network whose channels follow from its encoder's does not read it.
    pub decoder_channels: usize,
    /// Which of several published structures: `paper`, which every network has, or another that the network names, such
    /// as `smp` (segmentation_models.pytorch) or `torchvision`.
    #[serde(default = "paper")]
    pub layout: String,
    /// Whether an auxiliary head is trained beside the network's own, where its publication trains one.
    #[serde(default)]
    pub aux: bool,
}

fn paper() -> String {
    PAPER.to_string()
}

impl ModelSpec {
    /// The network `name` on `encoder` in its paper layout: full width, output stride 16, dropout 0.1, no auxiliary head,
    /// 256 decoder channels (SegFormer's are 768 from mit-b2 on).
    pub fn new(name: &str, encoder: &str, n_classes: usize) -> Self {
        Self {
            name: name.to_string(),
            encoder: encoder.to_string(),
            n_classes,
            width: 1.0,
            output_stride: 16,
            dropout: 0.1,
            decoder_channels: decoders::published_channels(name, encoder),
            layout: paper(),
            aux: false,
        }
    }

    /// DeepLabV3+ as published: full width, output stride 16, 256 decoder channels, dropout 0.1.
    pub fn deeplabv3plus(encoder: &str, n_classes: usize) -> Self {
        Self::new("deeplabv3plus", encoder, n_classes)
    }

    /// The network of a name such as `fcn8s-vgg16`: network, hyphen, encoder; else as [`ModelSpec::new`].
    ///
    /// # Errors
    /// `Unknown` when there is no such network or encoder, listing those that exist.
    pub fn named(name: &str, n_classes: usize) -> Result<Self> {
        let (network, encoder) = name.split_once('-').unwrap_or((name, ""));
        known("model", network, decoders::names())?;
        known("encoder", encoder, encoders::names())?;
        Ok(Self::new(network, encoder, n_classes))
    }

    /// The name that [`ModelSpec::named`] reads: network, hyphen, encoder.
    pub fn full_name(&self) -> String {
        format!("{}-{}", self.name, self.encoder)
    }

    /// Checks every field.
    ///
    /// # Errors
    /// `Unknown` for a name that does not exist, listing those that do; `Setting` for a value outside its range.
    pub fn validate(&self) -> Result<()> {
        known("model", &self.name, decoders::names())?;
        known("encoder", &self.encoder, encoders::names())?;
        let network = decoders::entry(&self.name)?;
        network.check_layout(&self.layout)?;
        if self.aux && (!network.aux || self.layout == "smp") {
            let hint = "its publication trains none; set aux to false";
            return Err(ModelError::setting("aux", self.aux, "false for this network and layout", hint));
        }
        // Labels are bytes and 255 is void, so 255 classes (0..=254) are the most a label map can name.
        if !(2..=255).contains(&self.n_classes) {
            let hint = "count the classes without void";
            return Err(ModelError::setting("n_classes", self.n_classes, "2 to 255", hint));
        }
        check_width(self.width)?;
        if network.dilated && ![8, 16].contains(&self.output_stride) {
            let hint = "16 is the published setting, 8 costs two to three times as much";
            return Err(ModelError::setting("output_stride", self.output_stride, "8 or 16", hint));
        }
        if !(self.dropout >= 0.0 && self.dropout < 1.0) {
            let hint = "0 switches dropout off";
            return Err(ModelError::setting("dropout", self.dropout, "at least 0, below 1", hint));
        }
        let channels = self.decoder_channels;
        if !(1..=4096).contains(&channels) {
            let hint = "256 is the published number; make the whole network smaller with width";
            return Err(ModelError::setting("decoder_channels", channels, "1 to 4096", hint));
        }
        Ok(())
    }
}

fn known(what: &'static str, found: &str, known: Vec<&'static str>) -> Result<()> {
    match known.contains(&found) {
        true => Ok(()),
        false => Err(ModelError::Unknown { what, found: found.to_string(), known }),
    }
}

/// Checks a multiplier of channel counts.
pub(crate) fn check_width(width: f64) -> Result<()> {
    // Written so that NaN fails too.
    match width > 0.0 && width <= 4.0 {
        true => Ok(()),
        false => Err(ModelError::setting("width", width, "above 0, at most 4", "1 is the published width")),
    }
}

/// `base * width`, rounded to the nearest multiple of 8, at least 8; `base` itself for a width of 1.
pub(crate) fn scaled(base: usize, width: f64) -> usize {
    if width == 1.0 {
        return base;
    }
    ((base as f64 * width / 8.0).round() as usize).max(1) * 8
}

/// A feature map a network hands out by name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Tap {
    /// Key in [`SegOutput::features`](crate::SegOutput).
    pub name: &'static str,
    /// Channels.
    pub channels: usize,
    /// Stride of its grid against the image, in pixels.
    pub stride: usize,
}

/// What a network says of itself.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ModelInfo {
    /// What it was built from.
    pub spec: ModelSpec,
    /// Trained elements, running statistics left out.
    pub n_parameters: usize,
    /// Stride of the encoder's last grid, in pixels.
    pub output_stride: usize,
    /// Stride of the logits, in pixels.
    pub logits_stride: usize,
    /// How the published network brings its logits to the image's size: bilinearly with corners aligned, or by pixel
    /// centres (false). Training and evaluation here go by pixel centres; weights trained elsewhere expect this.
    pub align_corners: bool,
    /// Feature maps it hands out, from the image on.
    pub taps: Vec<Tap>,
    /// Mean that is subtracted from RGB in [0, 1].
    pub mean: [f64; 3],
    /// Standard deviation that it is then divided by.
    pub std: [f64; 3],
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn channels_scale_to_multiples_of_eight() {
        let at = |width| [32, 48, 64, 256, 728, 1536].map(|base| scaled(base, width));
        assert_eq!(at(1.0), [32, 48, 64, 256, 728, 1536]);
        assert_eq!(at(0.25), [8, 16, 16, 64, 184, 384]);
        assert_eq!(at(1e-9), [8; 6]);
        assert_eq!(at(4.0), [128, 192, 256, 1024, 2912, 6144]);
        assert_eq!([scaled(100, 1.0), scaled(100, 0.5)], [100, 48]);
    }

    #[test]
    fn every_field_is_checked_and_named() {
        let good = ModelSpec::deeplabv3plus("resnet18", 11);
        assert!(good.validate().is_ok());
        let bad = [
            ("encoder", ModelSpec { encoder: "resnet50x".into(), ..good.clone() }),
            ("model", ModelSpec { name: "pspnets".into(), ..good.clone() }),
            ("layout", ModelSpec { layout: "smb".into(), ..good.clone() }),
            ("aux", ModelSpec { aux: true, ..good.clone() }),
            ("n_classes", ModelSpec { n_classes: 1, ..good.clone() }),
            ("n_classes", ModelSpec { n_classes: 256, ..good.clone() }),
            ("width", ModelSpec { width: 0.0, ..good.clone() }),
            ("width", ModelSpec { width: 4.01, ..good.clone() }),
            ("width", ModelSpec { width: f64::NAN, ..good.clone() }),
            ("output_stride", ModelSpec { output_stride: 32, ..good.clone() }),
            ("dropout", ModelSpec { dropout: 1.0, ..good.clone() }),
            ("dropout", ModelSpec { dropout: -0.1, ..good.clone() }),
            ("dropout", ModelSpec { dropout: f64::NAN, ..good.clone() }),
            ("decoder_channels", ModelSpec { decoder_channels: 0, ..good.clone() }),
            ("decoder_channels", ModelSpec { decoder_channels: 8192, ..good }),
        ];
        for (field, spec) in bad {
            let text = spec.validate().unwrap_err().to_string();
            assert!(text.contains(field) && text.contains("hint: "), "{text}");
        }
    }

    #[test]
    fn an_unknown_encoder_lists_the_known_ones() {
        let text = ModelSpec::deeplabv3plus("resnet-34", 11).validate().unwrap_err().to_string();
        assert!(text.starts_with("unknown encoder `resnet-34`, known: resnet18, resnet34, "), "{text}");
    }

    #[test]
    fn a_spec_survives_serde_and_unknown_keys_do_not() {
        let spec = ModelSpec { width: 0.375, ..ModelSpec::deeplabv3plus("xception65", 19) };
        let text = serde_json::to_string(&spec).unwrap();
        assert_eq!(serde_json::from_str::<ModelSpec>(&text).unwrap(), spec);
        let error = serde_json::from_str::<ModelSpec>(&text.replace("width", "widht")).unwrap_err().to_string();
        assert!(error.contains("widht"), "{error}");
    }

    #[test]
    fn a_spec_of_before_layouts_still_reads() {
        let spec = ModelSpec::deeplabv3plus("resnet34", 11);
        let old = r#"{"name":"deeplabv3plus","encoder":"resnet34","n_classes":11,"width":1.0,"output_stride":16,
            "dropout":0.1,"decoder_channels":256}"#;
        assert_eq!(serde_json::from_str::<ModelSpec>(old).unwrap(), spec);
    }

    #[test]
    fn a_name_is_network_and_encoder() {
        let spec = ModelSpec::named("deeplabv3plus-resnet18-deep", 11).unwrap();
        assert_eq!((spec.name.as_str(), spec.encoder.as_str()), ("deeplabv3plus", "resnet18-deep"));
        assert_eq!(spec.full_name(), "deeplabv3plus-resnet18-deep");
        for (name, what) in [("fcn9s-vgg16", "unknown model `fcn9s`"), ("deeplabv3plus", "unknown encoder ``")] {
            let text = ModelSpec::named(name, 11).unwrap_err().to_string();
            assert!(text.starts_with(what), "{text}");
        }
    }
}
