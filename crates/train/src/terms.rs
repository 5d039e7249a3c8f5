//! The terms an objective can have: which loss, on which maps, with which settings, as recipes write them.
//!
//! What a term computes is the business of `segdistill_losses`; how its maps are brought together, of
//! [`StepInputs`](crate::StepInputs); what it owns, of [`Objective`](crate::Objective).

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::{Result, TrainError};

/// One term of the objective (equation 6 of the patent is two of them).
///
/// A recipe writes it as one table, the settings of the loss beside its weight:
/// `{ loss = "kd", weight = 1.0, temperature = 4.0, schedule = "ramp-up" }`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "WrittenTerm")]
pub struct TermConfig {
    /// Which loss, with its settings.
    #[serde(flatten)]
    pub loss: TermKind,
    /// Weight (lambda). A term of weight 0 is not computed, and what it would own is not built.
    pub weight: f64,
    /// How the weight moves over the run.
    pub schedule: ScheduleConfig,
}

/// A term as written, before its settings are told from the rest.
#[derive(Deserialize)]
struct WrittenTerm {
    weight: f64,
    #[serde(default)]
    schedule: ScheduleConfig,
    #[serde(flatten)]
    rest: BTreeMap<String, Value>,
}

impl TryFrom<WrittenTerm> for TermConfig {
    type Error = String;

    fn try_from(written: WrittenTerm) -> std::result::Result<Self, String> {
        let loss = match written.rest.get("loss") {
            Some(Value::String(loss)) => loss.clone(),
            _ => return Err("a term needs `loss`, the name of a loss in quotes".to_string()),
        };
        let rest = Value::Object(written.rest.into_iter().collect());
        let loss = TermKind::deserialize(rest).map_err(|e| format!("term `{loss}`: {e}"))?;
        Ok(Self { loss, weight: written.weight, schedule: written.schedule })
    }
}

/// How a term's weight moves over the run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ScheduleConfig {
    /// The same at every step.
    #[default]
    Constant,
    /// From 0 to the full weight over the first tenth of the run.
    RampUp,
    /// From the full weight linearly to 0 at the end.
    RampDown,
}

/// Which maps of the two networks a term compares.
///
/// Written as one name for both (`tap = "decoder"`) or as two, student first (`tap = ["decoder", "fc7"]`). Names are those
/// of [`segdistill_models::ModelInfo::taps`], and besides `logits`, and `penultimate` for the map the classifier reads.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Taps {
    /// One name for both networks.
    Both(String),
    /// Student's, teacher's.
    Each([String; 2]),
}

impl Taps {
    /// Name of the logits.
    pub const LOGITS: &'static str = "logits";
    /// Name of the last feature map before the classifier, whatever the network calls it.
    pub const PENULTIMATE: &'static str = "penultimate";

    fn both(name: &str) -> Self {
        Self::Both(name.to_string())
    }

    fn logits() -> Self {
        Self::both(Self::LOGITS)
    }

    fn penultimate() -> Self {
        Self::both(Self::PENULTIMATE)
    }

    /// Student's name.
    pub fn student(&self) -> &str {
        match self {
            Self::Both(name) => name,
            Self::Each([student, _]) => student,
        }
    }

    /// Teacher's name.
    pub fn teacher(&self) -> &str {
        match self {
            Self::Both(name) => name,
            Self::Each([_, teacher]) => teacher,
        }
    }
}

/// Normaliser of the pixel-wise divergence.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum KdNormaliser {
    /// Mean over the valid pixels of the batch (Hinton et al., CIRKD).
    #[default]
    MeanPixel,
    /// Sum over the batch of the images' means (SKD's code).
    ImageSum,
}

/// Target of the adaptive cross entropy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AceRule {
    /// The teacher's distribution where its class is the labelled one, the label elsewhere.
    #[default]
    TeacherWhereRight,
    /// A fixed share of the teacher's distribution everywhere.
    Blend,
    /// A share of the teacher's distribution that is its probability of the labelled class.
    Confidence,
}

/// Nodes of the pair-wise term.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Nodes {
    /// Local patches, each the largest value of a channel (SKD's code).
    #[default]
    Max,
    /// Local patches, each the mean.
    Average,
    /// Every pixel.
    Pixels,
}

/// Normaliser of the pair-wise term.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PairForm {
    /// As the paper prints it, gradient through the unit length.
    Paper,
    /// As its code has it: unit length with an epsilon, left out of the gradient.
    #[default]
    Code,
}

/// Game between student and discriminator.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CriticForm {
    /// Wasserstein with gradient penalty (SKD).
    #[default]
    WganGp,
    /// Hinge, without penalty (CIRKD's re-implementation).
    Hinge,
}

/// Losses a term can take, each with its settings; left out, they are those of the source.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "loss", rename_all = "kebab-case", deny_unknown_fields)]
pub enum TermKind {
    /// Cross entropy against the labels, at label resolution.
    Ce {
        /// Share of the target spread over all classes, in [0, 1).
        #[serde(default)]
        label_smoothing: f64,
    },
    /// Cross entropy of the auxiliary head against the labels, at label resolution.
    Aux {},
    /// Cross entropy over the hardest pixels, at label resolution.
    Ohem {
        /// Pixels are hard whose probability of the labelled class is below it.
        #[serde(default = "defaults::ohem_threshold")]
        threshold: f64,
        /// Least number of pixels of the batch that are kept.
        #[serde(default = "defaults::ohem_min_kept")]
        min_kept: usize,
    },
    /// Soft Dice loss, at label resolution.
    Dice {},
    /// Lovasz-softmax, at label resolution.
    Lovasz {
        /// Mean over images instead of one set of pixels.
        #[serde(default)]
        per_image: bool,
    },
    /// Binary cross entropy of each class against the rest, at label resolution.
    Bce {},
    /// Channel and spatial correlation against the teacher, at the decoder's resolution.
    Csc {},
    /// Adaptive cross entropy: the target lies between label and teacher, at label resolution.
    Ace {
        /// How much of the teacher a pixel's target takes.
        #[serde(default)]
        target: AceRule,
        /// Share of the teacher under `blend`, in [0, 1].
        #[serde(default = "defaults::half")]
        share: f64,
        /// Temperature of the teacher's distribution.
        #[serde(default = "defaults::one")]
        temperature: f64,
    },
    /// Pixel-wise divergence of class distributions.
    Kd {
        /// Temperature of both distributions.
        #[serde(default = "defaults::one")]
        temperature: f64,
        /// What the sum is divided by.
        #[serde(default)]
        normaliser: KdNormaliser,
    },
    /// Divergence of channels as distributions over positions (CWD).
    Cwd {
        /// Maps compared.
        #[serde(default = "Taps::logits")]
        tap: Taps,
        /// Temperature of both distributions.
        #[serde(default = "defaults::four")]
        temperature: f64,
    },
    /// Correlation of class distributions, by pixels and by classes (DIST).
    Dist {
        /// Weight of the correlation over the classes of a pixel.
        #[serde(default = "defaults::one")]
        inter: f64,
        /// Weight of the correlation over the pixels of a class.
        #[serde(default = "defaults::one")]
        intra: f64,
        /// Temperature of both distributions.
        #[serde(default = "defaults::one")]
        temperature: f64,
    },
    /// Attention transfer (AT).
    At {
        /// Maps compared.
        #[serde(default = "Taps::penultimate")]
        tap: Taps,
    },
    /// Squared distance of features (FitNet), through a trained 1x1 convolution.
    Fitnet {
        /// Maps compared.
        #[serde(default = "Taps::penultimate")]
        tap: Taps,
    },
    /// Generation of the teacher's features from the student's, masked (MGD).
    Mgd {
        /// Maps compared.
        #[serde(default = "Taps::penultimate")]
        tap: Taps,
        /// Share of positions masked, in [0, 1).
        #[serde(default = "defaults::mgd_masked")]
        masked: f64,
        /// Whether the generator has Af-DCD's second path.
        #[serde(default)]
        enhanced: bool,
    },
    /// Contrast of patches and channel groups of the generated features (Af-DCD); an `mgd` term of the same maps, masked
    /// and enhanced alike, shares the generator.
    AfDcd {
        /// Maps compared.
        #[serde(default = "Taps::penultimate")]
        tap: Taps,
        /// Share of positions masked, in [0, 1).
        #[serde(default = "defaults::mgd_masked")]
        masked: f64,
        /// Whether the generator has a second path.
        #[serde(default)]
        enhanced: bool,
        /// Side of the maximum pooling of both maps before, in positions; 1 pools nothing.
        #[serde(default = "defaults::af_dcd_pooling")]
        pooling: usize,
        /// Side of a patch, in positions.
        #[serde(default = "defaults::af_dcd_patch")]
        patch: usize,
        /// Groups of channels.
        #[serde(default = "defaults::af_dcd_groups")]
        groups: usize,
        /// Temperature of the distances.
        #[serde(default = "defaults::af_dcd_temperature")]
        temperature: f64,
    },
    /// Variation within classes (IFVD).
    Ifvd {
        /// Maps compared.
        #[serde(default = "Taps::penultimate")]
        tap: Taps,
    },
    /// Similarity of pairs of nodes (SKD).
    PairWise {
        /// Maps compared.
        #[serde(default = "Taps::penultimate")]
        tap: Taps,
        /// What a node is.
        #[serde(default)]
        nodes: Nodes,
        /// Side of a patch as a share of the map's side, in (0, 1].
        #[serde(default = "defaults::half")]
        patch: f64,
        /// The paper's normaliser and gradient, or the code's.
        #[serde(default)]
        form: PairForm,
    },
    /// Mini-batch pixel-to-pixel similarity (CIRKD).
    CirkdMiniBatch {
        /// Maps compared.
        #[serde(default = "Taps::penultimate")]
        tap: Taps,
        /// Temperature of the similarities.
        #[serde(default = "defaults::tenth")]
        temperature: f64,
        /// Side of the average pooling before, in positions; 1 pools nothing.
        #[serde(default = "defaults::no_pooling")]
        pooling: usize,
    },
    /// Similarity to remembered pixels (CIRKD), through a trained projection head.
    CirkdPixel {
        /// Maps compared.
        #[serde(default = "Taps::penultimate")]
        tap: Taps,
        /// Temperature of the similarities.
        #[serde(default = "defaults::tenth")]
        temperature: f64,
        /// Slots of each class's queue.
        #[serde(default = "defaults::cirkd_pixel_slots")]
        slots: usize,
        /// Slots compared with in a step, over all classes.
        #[serde(default = "defaults::cirkd_pixel_contrast")]
        contrast: usize,
        /// Most pixels of a class that an image adds.
        #[serde(default = "defaults::cirkd_pixels_an_image")]
        pixels_an_image: usize,
    },
    /// Similarity to remembered regions (CIRKD), through the same projection head.
    CirkdRegion {
        /// Maps compared.
        #[serde(default = "Taps::penultimate")]
        tap: Taps,
        /// Temperature of the similarities.
        #[serde(default = "defaults::tenth")]
        temperature: f64,
        /// Slots of each class's queue.
        #[serde(default = "defaults::cirkd_region_slots")]
        slots: usize,
        /// Slots compared with in a step, over all classes.
        #[serde(default = "defaults::cirkd_region_contrast")]
        contrast: usize,
    },
    /// Holistic term (SKD): a discriminator tells the networks' logits apart.
    Holistic {
        /// The game.
        #[serde(default)]
        form: CriticForm,
        /// Whether the discriminator sees the image too.
        #[serde(default)]
        condition: bool,
        /// Weight of the discriminator's own loss.
        #[serde(default = "defaults::tenth")]
        critic_weight: f64,
        /// Weight of the gradient penalty within it.
        #[serde(default = "defaults::ten")]
        penalty: f64,
        /// Peak learning rate of the discriminator; it decays as the student's, without warm-up.
        #[serde(default = "defaults::critic_lr")]
        lr: f64,
        /// Multiplier of the discriminator's channels.
        #[serde(default = "defaults::one")]
        width: f64,
    },
}

/// Settings of the sources, where a recipe leaves them out.
mod defaults {
    macro_rules! defaults {
        ($($name:ident: $kind:ty = $value:expr;)*) => { $(pub(super) fn $name() -> $kind { $value })* };
    }
    defaults! {
        one: f64 = 1.0;
        half: f64 = 0.5;
        tenth: f64 = 0.1;
        four: f64 = 4.0;
        ten: f64 = 10.0;
        ohem_threshold: f64 = 0.7;
        ohem_min_kept: usize = 100_000;
        mgd_masked: f64 = 0.75;
        af_dcd_pooling: usize = 4;
        af_dcd_patch: usize = 4;
        af_dcd_groups: usize = 16;
        af_dcd_temperature: f64 = 0.07;
        no_pooling: usize = 1;
        cirkd_pixel_slots: usize = 20_000;
        cirkd_pixel_contrast: usize = 4096;
        cirkd_pixels_an_image: usize = 16;
        cirkd_region_slots: usize = 2000;
        cirkd_region_contrast: usize = 1024;
        critic_lr: f64 = 4e-4;
    }
}

impl TermKind {
    /// Name of every loss, those without a teacher first.
    pub const NAMES: [&'static str; 21] = [
        "ce",
        "aux",
        "ohem",
        "dice",
        "lovasz",
        "bce",
        "csc",
        "ace",
        "kd",
        "cwd",
        "dist",
        "at",
        "fitnet",
        "mgd",
        "af-dcd",
        "ifvd",
        "pair-wise",
        "cirkd-mini-batch",
        "cirkd-pixel",
        "cirkd-region",
        "holistic",
    ];

    /// Weight of the auxiliary loss in PSPNet's paper, and in those that took it over.
    pub const AUX_WEIGHT: f64 = 0.4;

    /// Cross entropy without label smoothing.
    pub fn ce() -> Self {
        Self::Ce { label_smoothing: 0.0 }
    }

    /// The loss called `name`, with the settings of its source.
    ///
    /// # Errors
    /// `Config` listing the known names.
    pub fn named(name: &str) -> Result<Self> {
        Self::deserialize(serde_json::json!({ "loss": name }))
            .map_err(|e| TrainError::config(format!("loss `{name}`: {e}"), "docs/losses.md lists every loss"))
    }

    /// Name in recipes.
    pub fn loss(&self) -> &'static str {
        match self {
            Self::Ce { .. } => "ce",
            Self::Aux {} => "aux",
            Self::Ohem { .. } => "ohem",
            Self::Dice {} => "dice",
            Self::Lovasz { .. } => "lovasz",
            Self::Bce {} => "bce",
            Self::Csc {} => "csc",
            Self::Ace { .. } => "ace",
            Self::Kd { .. } => "kd",
            Self::Cwd { .. } => "cwd",
            Self::Dist { .. } => "dist",
            Self::At { .. } => "at",
            Self::Fitnet { .. } => "fitnet",
            Self::Mgd { .. } => "mgd",
            Self::AfDcd { .. } => "af-dcd",
            Self::Ifvd { .. } => "ifvd",
            Self::PairWise { .. } => "pair-wise",
            Self::CirkdMiniBatch { .. } => "cirkd-mini-batch",
            Self::CirkdPixel { .. } => "cirkd-pixel",
            Self::CirkdRegion { .. } => "cirkd-region",
            Self::Holistic { .. } => "holistic",
        }
    }

    /// Name in metrics and reports: the loss, and its maps where they are not the usual ones.
    pub fn name(&self) -> String {
        let usual = Self::named(self.loss()).ok().and_then(|kind| kind.taps().cloned());
        match self.taps().filter(|taps| usual.as_ref() != Some(taps)) {
            Some(taps) if taps.student() == taps.teacher() => format!("{}-{}", self.loss(), taps.student()),
            Some(taps) => format!("{}-{}-{}", self.loss(), taps.student(), taps.teacher()),
            None => self.loss().to_string(),
        }
    }

    /// Maps it compares, where it can choose.
    pub fn taps(&self) -> Option<&Taps> {
        match self {
            Self::Cwd { tap, .. }
            | Self::At { tap }
            | Self::Fitnet { tap }
            | Self::Mgd { tap, .. }
            | Self::AfDcd { tap, .. }
            | Self::Ifvd { tap }
            | Self::PairWise { tap, .. }
            | Self::CirkdMiniBatch { tap, .. }
            | Self::CirkdPixel { tap, .. }
            | Self::CirkdRegion { tap, .. } => Some(tap),
            _ => None,
        }
    }

    /// Whether the term compares with a teacher.
    pub fn needs_teacher(&self) -> bool {
        !matches!(
            self,
            Self::Ce { .. } | Self::Aux {} | Self::Ohem { .. } | Self::Dice {} | Self::Lovasz { .. } | Self::Bce {}
        )
    }

    /// Checks what can be checked without a network; the losses check the rest of their settings when they are built.
    ///
    /// # Errors
    /// `Config` naming the first setting outside its range.
    pub(crate) fn validate(&self) -> Result<()> {
        let name = self.name();
        let check = |ok: bool, what: String, hint: &'static str| match ok {
            true => Ok(()),
            false => Err(TrainError::config(format!("term `{name}`: {what}"), hint)),
        };
        let positive = |key: &str, value: f64| {
            check(value > 0.0 && value.is_finite(), format!("{key} = {value}"), "use a positive number")
        };
        let at_least_0 = |key: &str, value: f64| {
            check(value >= 0.0 && value.is_finite(), format!("{key} = {value}"), "use 0 or more")
        };
        let share = |key: &str, value: f64| {
            check((0.0..=1.0).contains(&value), format!("{key} = {value}"), "use a share from 0 to 1")
        };
        let below_1 = |key: &str, value: f64| {
            check((0.0..1.0).contains(&value), format!("{key} = {value}"), "use a share of at least 0 and below 1")
        };
        let some = |key: &str, value: usize| check(value > 0, format!("{key} = 0"), "use at least 1");
        match self {
            Self::Ce { label_smoothing } => below_1("label_smoothing", *label_smoothing),
            Self::Ohem { threshold, .. } => share("threshold", *threshold),
            Self::Ace { share: s, temperature, .. } => {
                share("share", *s)?;
                positive("temperature", *temperature)
            }
            Self::Kd { temperature, .. } | Self::Cwd { temperature, .. } => positive("temperature", *temperature),
            Self::Dist { inter, intra, temperature } => {
                at_least_0("inter", *inter)?;
                at_least_0("intra", *intra)?;
                positive("temperature", *temperature)
            }
            Self::Mgd { masked, .. } => below_1("masked", *masked),
            Self::AfDcd { masked, pooling, patch, groups, temperature, .. } => {
                below_1("masked", *masked)?;
                some("pooling", *pooling)?;
                some("patch", *patch)?;
                some("groups", *groups)?;
                positive("temperature", *temperature)
            }
            Self::PairWise { patch, .. } => {
                positive("patch", *patch)?;
                share("patch", *patch)
            }
            Self::CirkdMiniBatch { temperature, pooling, .. } => {
                positive("temperature", *temperature)?;
                some("pooling", *pooling)
            }
            Self::CirkdPixel { temperature, slots, contrast, pixels_an_image, .. } => {
                positive("temperature", *temperature)?;
                some("slots", *slots)?;
                some("contrast", *contrast)?;
                some("pixels_an_image", *pixels_an_image)
            }
            Self::CirkdRegion { temperature, slots, contrast, .. } => {
                positive("temperature", *temperature)?;
                some("slots", *slots)?;
                some("contrast", *contrast)
            }
            Self::Holistic { critic_weight, penalty, lr, width, .. } => {
                positive("critic_weight", *critic_weight)?;
                at_least_0("penalty", *penalty)?;
                positive("lr", *lr)?;
                positive("width", *width)
            }
            Self::Aux {}
            | Self::Dice {}
            | Self::Lovasz { .. }
            | Self::Bce {}
            | Self::Csc {}
            | Self::At { .. }
            | Self::Fitnet { .. }
            | Self::Ifvd { .. } => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn term(text: &str) -> std::result::Result<TermConfig, String> {
        serde_json::from_str(text).map_err(|e| e.to_string())
    }

    #[test]
    fn a_term_is_one_table() {
        let kd = term(r#"{ "loss": "kd", "weight": 2.0, "temperature": 4.0, "schedule": "ramp-down" }"#).unwrap();
        assert_eq!(kd.loss, TermKind::Kd { temperature: 4.0, normaliser: KdNormaliser::MeanPixel });
        assert_eq!((kd.weight, kd.schedule), (2.0, ScheduleConfig::RampDown));
        let json = serde_json::to_string(&kd).unwrap();
        assert_eq!(term(&json).unwrap(), kd);
    }

    #[test]
    fn what_is_no_setting_is_refused_with_the_settings_there_are() {
        let error = term(r#"{ "loss": "kd", "weight": 1.0, "temprature": 4.0 }"#).unwrap_err();
        assert!(
            error.contains("term `kd`") && error.contains("temprature") && error.contains("temperature"),
            "{error}"
        );
        let error = term(r#"{ "loss": "csc", "weight": 1.0, "temperature": 4.0 }"#).unwrap_err();
        assert!(error.contains("term `csc`") && error.contains("temperature"), "{error}");
        let error = term(r#"{ "loss": "kdd", "weight": 1.0 }"#).unwrap_err();
        assert!(error.contains("kdd") && error.contains("cirkd-pixel"), "{error}");
        assert!(term(r#"{ "weight": 1.0 }"#).unwrap_err().contains("`loss`"));
        assert!(term(r#"{ "loss": "ce" }"#).unwrap_err().contains("weight"));
    }

    #[test]
    fn names_tell_unusual_maps() {
        let name = |text| term(text).unwrap().loss.name();
        assert_eq!(name(r#"{ "loss": "cwd", "weight": 1.0 }"#), "cwd");
        assert_eq!(name(r#"{ "loss": "cwd", "weight": 1.0, "tap": "decoder" }"#), "cwd-decoder");
        assert_eq!(name(r#"{ "loss": "at", "weight": 1.0, "tap": ["high", "fc7"] }"#), "at-high-fc7");
    }

    #[test]
    fn settings_outside_their_range_are_named() {
        let refused = |kind: TermKind| kind.validate().unwrap_err().to_string();
        let text = refused(TermKind::Kd { temperature: 0.0, normaliser: KdNormaliser::MeanPixel });
        assert!(text.contains("term `kd`: temperature = 0"), "{text}");
        assert!(refused(TermKind::Ce { label_smoothing: 1.0 }).contains("label_smoothing = 1"));
        for name in TermKind::NAMES {
            let kind = TermKind::named(name).unwrap();
            kind.validate().unwrap();
            assert_eq!(kind.loss(), name);
        }
    }
}
