//! A case: what is timed, under which name, how much arithmetic it is, and how a peer is told of it.
//!
//! Plain data. [`crate::catalogue`] lists the cases; tensors are made from them by [`crate::workload`] on our side and by
//! `peers/` on the other.

use serde::{Deserialize, Serialize};

/// Cases that belong together in a table, and in a geometric mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Group {
    /// Convolutions of the image: forward, and the gradient of the weight only.
    ConvStem,
    /// Dense convolutions, forward and backward.
    ConvDense,
    /// Depthwise convolutions, forward and backward.
    ConvDepthwise,
    /// Everything between convolutions, forward and backward, and the optimizer.
    Op,
    /// The CSC loss, value and gradient.
    Csc,
    /// Other losses between two networks, value and gradient.
    Loss,
    /// Losses over pairs of pixels, value and gradient.
    Relations,
    /// A whole training step: forward, cross entropy, backward, SGD.
    Train,
    /// A forward pass of one image in evaluation.
    Inference,
}

impl Group {
    /// All groups in the order of the tables.
    pub const ALL: [Group; 9] = [
        Group::ConvStem,
        Group::ConvDense,
        Group::ConvDepthwise,
        Group::Op,
        Group::Csc,
        Group::Loss,
        Group::Relations,
        Group::Train,
        Group::Inference,
    ];

    /// Name in tables and filters.
    pub fn name(self) -> &'static str {
        match self {
            Group::ConvDense => "conv-dense",
            Group::ConvDepthwise => "conv-depthwise",
            Group::ConvStem => "conv-stem",
            Group::Op => "op",
            Group::Csc => "csc",
            Group::Loss => "loss",
            Group::Relations => "relations",
            Group::Train => "train",
            Group::Inference => "inference",
        }
    }

    /// What a row of it measures.
    pub fn title(self) -> &'static str {
        match self {
            Group::ConvDense => "Dense convolutions, forward and both gradients",
            Group::ConvDepthwise => "Depthwise convolutions, forward and both gradients",
            Group::ConvStem => "Convolutions of the image, forward and the weight's gradient",
            Group::Op => "Other operations, forward and backward; the optimizer",
            Group::Csc => "CSC, value and gradient (the peer always computes the letter)",
            Group::Loss => "Other losses, value and gradient",
            Group::Relations => "Relations of pixels, value and gradient",
            Group::Train => "Whole training step: forward, cross entropy, backward, SGD",
            Group::Inference => "Inference, one image",
        }
    }
}

/// Arithmetic of our side.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Precision {
    /// Everything in f32.
    #[default]
    F32,
    /// Products of convolutions in bf16, sums and everything else in f32.
    Bf16,
}

impl Precision {
    /// Name in tables and options.
    pub fn name(self) -> &'static str {
        match self {
            Precision::F32 => "f32",
            Precision::Bf16 => "bf16",
        }
    }
}

/// How the peer runs a case.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Layout {
    /// f32, `[n, c, h, w]` in memory.
    Nchw,
    /// f32, channels last in memory.
    Nhwc,
    /// bf16 autocast, channels last in memory.
    Bf16,
}

impl Layout {
    /// All, in the order of the tables.
    pub const ALL: [Layout; 3] = [Layout::Nchw, Layout::Nhwc, Layout::Bf16];

    /// Name in tables and options.
    pub fn name(self) -> &'static str {
        match self {
            Layout::Nchw => "nchw",
            Layout::Nhwc => "nhwc",
            Layout::Bf16 => "bf16",
        }
    }

    /// Precision it is compared with.
    pub fn precision(self) -> Precision {
        match self {
            Layout::Nchw | Layout::Nhwc => Precision::F32,
            Layout::Bf16 => Precision::Bf16,
        }
    }
}

/// Form of the CSC loss on our side.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Form {
    /// The source's equations, one after the other.
    Letter,
    /// Squared cosines of all pairs, tile by tile.
    Direct,
    /// Gram matrices over class pairs.
    Linear,
}

/// A loss of a student's map, of a teacher's map of equal shape, and of labels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LossKind {
    /// Divergence of class distributions, pixel by pixel.
    PixelKl,
    /// Divergence of distributions over positions, channel by channel.
    ChannelKl,
    /// Correlations within pixels and within classes.
    Dist,
    /// Cross entropy over hard pixels.
    Ohem,
    /// Soft Dice loss.
    Dice,
    /// Lovasz-softmax.
    Lovasz,
    /// Each class against the rest.
    BinaryCrossEntropy,
    /// Squared distance of features.
    FeatureMse,
    /// Attention maps.
    AttentionTransfer,
    /// Variation within classes.
    Ifvd,
}

impl LossKind {
    /// Those of logits.
    pub const OF_LOGITS: [LossKind; 7] = [
        LossKind::PixelKl,
        LossKind::ChannelKl,
        LossKind::Dist,
        LossKind::Ohem,
        LossKind::Dice,
        LossKind::Lovasz,
        LossKind::BinaryCrossEntropy,
    ];
    /// Those of features.
    pub const OF_FEATURES: [LossKind; 3] = [LossKind::FeatureMse, LossKind::AttentionTransfer, LossKind::Ifvd];

    /// Name in tables and filters.
    pub fn name(self) -> &'static str {
        match self {
            LossKind::PixelKl => "pixel-kl",
            LossKind::ChannelKl => "channel-kl",
            LossKind::Dist => "dist",
            LossKind::Ohem => "ohem",
            LossKind::Dice => "dice",
            LossKind::Lovasz => "lovasz",
            LossKind::BinaryCrossEntropy => "binary-cross-entropy",
            LossKind::FeatureMse => "feature-mse",
            LossKind::AttentionTransfer => "attention-transfer",
            LossKind::Ifvd => "ifvd",
        }
    }

    /// Largest relative distance of f32 from f64: where a sort or a threshold decides, a pixel may fall on the other side.
    pub(crate) fn tolerance(self) -> f64 {
        match self {
            LossKind::Ohem | LossKind::Lovasz => 1e-3,
            _ => 1e-5,
        }
    }
}

/// A loss over pairs of pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Relation {
    /// Pair-wise similarities of all pixels of an image. The peer, too, sums over pairs of channels: matrices over pairs
    /// of pixels would take it 4 GiB each.
    PairSimilarity,
    /// Similarities over all pairs of images of a batch. The peer loops over the pairs, as the public code does.
    CirkdMiniBatch,
    /// Similarities to the slots of a memory.
    MemoryContrast,
}

/// What a case computes. As JSON it is all that a peer is told.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "kebab-case")]
pub enum Work {
    /// Convolution and its gradients.
    Conv {
        /// `[n, c, h, w]`
        input: [usize; 4],
        /// `[c_out, c_in / groups, k, k]`
        weight: [usize; 4],
        /// Step of the output grid.
        stride: usize,
        /// Zeros on each side.
        padding: usize,
        /// Distance of the taps.
        dilation: usize,
        /// Channel groups.
        groups: usize,
        /// Whether a bias is added and gets a gradient.
        bias: bool,
        /// Whether the input is the image batch, which needs no gradient.
        image: bool,
    },
    /// Batch normalisation in training, with what follows it in the network.
    BatchNorm {
        /// `[n, c, h, w]`
        input: [usize; 4],
        /// Whether a skip is added.
        residual: bool,
        /// Whether a rectifier comes last.
        relu: bool,
    },
    /// Rectifier.
    Relu {
        /// `[n, c, h, w]`
        input: [usize; 4],
    },
    /// 3x3 maximum, stride 2, padding 1.
    MaxPool {
        /// `[n, c, h, w]`
        input: [usize; 4],
    },
    /// Bilinear resize.
    Resize {
        /// `[n, c, h, w]`
        input: [usize; 4],
        /// Height and width of the output.
        to: [usize; 2],
        /// Whether corners are aligned, as inside the decoder, or pixel centres, as for the logits.
        align_corners: bool,
    },
    /// Cross entropy with void pixels.
    CrossEntropy {
        /// Logits `[n, c, h, w]`
        input: [usize; 4],
    },
    /// One step of SGD with momentum and decay over all parameters of a network.
    Sgd {
        /// Encoder of the network.
        encoder: String,
        /// Classes.
        classes: usize,
    },
    /// CSC on copies of a smaller map's pixels, so that the value at every size is known.
    Csc {
        /// Ours; the peer computes the letter.
        form: Form,
        /// Classes.
        classes: usize,
        /// Height and width.
        hw: [usize; 2],
        /// Pixels of the map that is copied.
        source: usize,
    },
    /// A loss between the maps of a student and a teacher, no pixel void.
    Loss {
        /// Which.
        loss: LossKind,
        /// Either map, `[n, c, h, w]`
        input: [usize; 4],
    },
    /// A relation on copies of a smaller map's pixels, so that the value is known.
    Relation {
        /// Which.
        loss: Relation,
        /// Features `[n, d, h, w]` of the student.
        input: [usize; 4],
        /// Channels of the teacher.
        teacher_channels: usize,
        /// Slots of the memory; 0 without one.
        slots: usize,
        /// Pixels of the map that is copied.
        source: usize,
    },
    /// Training step of DeepLabV3+.
    Train {
        /// Encoder.
        encoder: String,
        /// Image batch.
        input: [usize; 4],
        /// Classes.
        classes: usize,
    },
    /// Inference of DeepLabV3+.
    Inference {
        /// Encoder.
        encoder: String,
        /// Image batch.
        input: [usize; 4],
        /// Classes.
        classes: usize,
    },
}

impl Work {
    /// Sizes, for a list.
    pub fn describe(&self) -> String {
        let dims = |d: &[usize]| d.iter().map(usize::to_string).collect::<Vec<_>>().join("x");
        match self {
            Work::Conv { input, weight, stride, dilation, groups, .. } => {
                let mut text = format!("{} * {}", dims(input), dims(weight));
                for (word, value) in [("stride", stride), ("dilation", dilation), ("groups", groups)] {
                    if *value != 1 {
                        text += &format!(" {word} {value}");
                    }
                }
                text
            }
            Work::BatchNorm { input, residual, relu } => {
                let more = |word, yes: bool| if yes { word } else { "" };
                format!("{}{}{}", dims(input), more(" + skip", *residual), more(" + relu", *relu))
            }
            Work::Relu { input }
            | Work::MaxPool { input }
            | Work::CrossEntropy { input }
            | Work::Loss { input, .. } => dims(input),
            Work::Resize { input, to, .. } => format!("{} to {}", dims(input), dims(to)),
            Work::Sgd { encoder, .. } => format!("all parameters of {encoder}"),
            Work::Csc { classes, hw, .. } => format!("{classes} classes, {} = {} pixels", dims(hw), hw[0] * hw[1]),
            Work::Relation { input, teacher_channels, slots, .. } => {
                let memory = if *slots > 0 { format!(", {slots} slots") } else { String::new() };
                format!("{}, teacher {teacher_channels} channels{memory}", dims(input))
            }
            Work::Train { input, .. } | Work::Inference { input, .. } => dims(input),
        }
    }
}

/// One row of the benchmark.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Case {
    /// `network/layer`.
    pub name: String,
    /// Where it belongs.
    pub group: Group,
    /// What it computes.
    pub work: Work,
    /// Floating point operations of the convolutions in it, two a multiply-add; 0 where memory is what counts.
    pub flop: u64,
    /// How often such a layer occurs in the network.
    pub repeats: usize,
    /// Layouts in which the peer runs it; none where the peer has no such thing or would not fit.
    pub layouts: Vec<Layout>,
    /// Memory both sides need at once, in MiB, where it is much.
    pub needs_mib: u64,
}

impl Case {
    /// Whether its peak memory is a result, so that it gets processes of its own on both sides.
    pub fn alone(&self) -> bool {
        matches!(self.group, Group::Csc | Group::Loss | Group::Relations | Group::Train | Group::Inference)
    }
}
