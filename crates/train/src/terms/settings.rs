//! What the settings of terms can be: schedules, maps, normalisers, targets.

use serde::{Deserialize, Serialize};

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

    pub(super) fn both(name: &str) -> Self {
        Self::Both(name.to_string())
    }

    pub(super) fn logits() -> Self {
        Self::both(Self::LOGITS)
    }

    pub(super) fn penultimate() -> Self {
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

/// What moves the discriminator's weights.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CriticOptimizer {
    /// With the student's momentum (SKD).
    #[default]
    Sgd,
    /// Moments that decay by 0.9 and 0.99 (CIRKD's re-implementation).
    Adam,
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
