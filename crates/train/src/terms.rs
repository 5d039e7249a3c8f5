//! The terms an objective can have: which loss, on which maps, with which settings, as recipes write them.
//!
//! What a term computes is the business of `segdistill_losses`; how its maps are brought together, of
//! [`StepInputs`](crate::StepInputs); what it owns, of [`Objective`](crate::Objective).

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::{Result, TrainError};

mod settings;

pub use settings::{AceRule, CriticForm, CriticOptimizer, KdNormaliser, Nodes, PairForm, ScheduleConfig, Taps};

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
        /// Share of the teacher under `blend`, in [0, 1]; 0.5 where left out.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        share: Option<f64>,
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
        /// Side of a patch as a share of the map's side, in (0, 1]; 0.5 where neither side is given.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        patch: Option<f64>,
        /// Side of a patch in positions, instead of a share.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        positions: Option<usize>,
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
        /// Weight of the gradient penalty within it, under `wgan-gp`; 10 where left out.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        penalty: Option<f64>,
        /// What moves the discriminator's weights.
        #[serde(default)]
        optimizer: CriticOptimizer,
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
        tenth: f64 = 0.1;
        four: f64 = 4.0;
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
            Self::Ace { target, share: s, temperature } => {
                let unused = s.is_some() && *target != AceRule::Blend;
                check(
                    !unused,
                    "`share` without target = \"blend\"".into(),
                    "take `share` out: the target does not use it",
                )?;
                share("share", s.unwrap_or_default())?;
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
            Self::PairWise { nodes, patch, positions, .. } => {
                let sides = usize::from(patch.is_some()) + usize::from(positions.is_some());
                let most = usize::from(*nodes != Nodes::Pixels);
                check(
                    sides <= most,
                    format!("{sides} sides of a patch"),
                    "give `patch` or `positions`; pixels take neither",
                )?;
                positive("patch", patch.unwrap_or(1.0))?;
                share("patch", patch.unwrap_or(1.0))?;
                some("positions", positions.unwrap_or(1))
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
            Self::Holistic { form, critic_weight, penalty, lr, width, .. } => {
                positive("critic_weight", *critic_weight)?;
                let unused = penalty.is_some() && *form != CriticForm::WganGp;
                check(
                    !unused,
                    "`penalty` without form = \"wgan-gp\"".into(),
                    "take `penalty` out: the form does not use it",
                )?;
                at_least_0("penalty", penalty.unwrap_or_default())?;
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
mod tests;
