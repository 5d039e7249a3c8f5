//! The sizes of one convolution, checked once.

use candle_core::Tensor;

use super::{Conv2dConfig, OP};
use crate::cpu::check_bias;
use crate::error::{OpsError, Result};
use crate::precision::Precision;

/// Sizes that fit one another: whatever holds a `Geometry` indexes without asking again.
#[derive(Clone, Copy, Debug)]
pub(super) struct Geometry {
    pub(super) n: usize,
    pub(super) c_in: usize,
    pub(super) h: usize,
    pub(super) w: usize,
    pub(super) c_out: usize,
    pub(super) kh: usize,
    pub(super) kw: usize,
    pub(super) oh: usize,
    pub(super) ow: usize,
    pub(super) stride: [usize; 2],
    pub(super) padding: [usize; 2],
    pub(super) dilation: [usize; 2],
    pub(super) groups: usize,
    pub(super) precision: Precision,
}

impl Geometry {
    pub(super) fn new(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, cfg: Conv2dConfig) -> Result<Self> {
        let Conv2dConfig { stride, padding, dilation, groups, precision } = cfg;
        let ([n, c_in, h, w], [c_out, c_group, kh, kw]) = (rank4(OP, x, "x")?, rank4(OP, weight, "weight")?);
        if groups == 0 || stride.contains(&0) || dilation.contains(&0) {
            return Err(OpsError::config(
                format!("{OP}: stride {stride:?}, dilation {dilation:?}, groups {groups}, expected 1 or more"),
                "1 is the plain convolution",
            ));
        }
        if c_in % groups != 0 || c_out % groups != 0 {
            return Err(OpsError::shape(
                OP,
                format!("{c_in} input and {c_out} output channels in {groups} groups"),
                "channel counts that the groups divide",
                "change `groups` or the channels",
            ));
        }
        if c_in == 0 || c_group != c_in / groups {
            return Err(OpsError::shape(
                OP,
                format!("weight {:?} for {c_in} input channels in {groups} groups", weight.dims()),
                format!("weight [{c_out}, {}, {kh}, {kw}]", (c_in / groups).max(1)),
                "the weight's second size is the input channels of one group",
            ));
        }
        if c_out == 0 || h == 0 || w == 0 {
            return Err(OpsError::shape(
                OP,
                format!("x {:?}, weight {:?}", x.dims(), weight.dims()),
                "at least one pixel and one output channel",
                "only the batch may be empty",
            ));
        }
        check_bias(OP, bias, c_out)?;
        let Some([oh, ow]) = cfg.output_hw([h, w], [kh, kw]) else {
            return Err(OpsError::shape(
                OP,
                format!("kernel [{kh}, {kw}] with dilation {dilation:?} on [{h}, {w}] with padding {padding:?}"),
                "a kernel of at least one tap, not larger than the padded input",
                "add padding, or use a larger image or a smaller dilation",
            ));
        };
        // Where there is one output, no step is taken: a stride beyond the input only costs memory.
        let steps = |stride: usize, n_out: usize, padded: usize| if n_out == 1 { stride.min(padded) } else { stride };
        let stride = [steps(stride[0], oh, h + 2 * padding[0]), steps(stride[1], ow, w + 2 * padding[1])];
        Ok(Self { n, c_in, h, w, c_out, kh, kw, oh, ow, stride, padding, dilation, groups, precision })
    }

    /// One input channel a group: no sum over channels.
    pub(super) fn is_depthwise(&self) -> bool {
        self.groups > 1 && self.groups == self.c_in
    }

    /// A convolution with one tap of stride 1 and without padding, of this one's batch and groups.
    pub(super) fn pointwise(&self) -> Self {
        Self { kh: 1, kw: 1, stride: [1, 1], padding: [0, 0], dilation: [1, 1], ..*self }
    }

    pub(super) fn output_shape(&self) -> [usize; 4] {
        [self.n, self.c_out, self.oh, self.ow]
    }

    pub(super) fn input_shape(&self) -> [usize; 4] {
        [self.n, self.c_in, self.h, self.w]
    }

    /// Input channels of a group.
    pub(super) fn c_in_group(&self) -> usize {
        self.c_in / self.groups
    }

    /// Output channels of a group.
    pub(super) fn c_out_group(&self) -> usize {
        self.c_out / self.groups
    }

    /// Kernel taps of a channel.
    pub(super) fn taps(&self) -> usize {
        self.kh * self.kw
    }

    /// Output pixels of an image.
    pub(super) fn pixels(&self) -> usize {
        self.oh * self.ow
    }

    /// The convolution that gives the input's gradient from the output's, with flipped and transposed weights; for
    /// stride 1, and padding that the kernel's reach covers.
    pub(super) fn input_grad(&self) -> Option<Self> {
        if self.stride != [1, 1] {
            return None;
        }
        let reach = [self.dilation[0] * (self.kh - 1), self.dilation[1] * (self.kw - 1)];
        let padding = [reach[0].checked_sub(self.padding[0])?, reach[1].checked_sub(self.padding[1])?];
        let (c_in, h, w, c_out, oh, ow) = (self.c_out, self.oh, self.ow, self.c_in, self.h, self.w);
        Some(Self { c_in, h, w, c_out, oh, ow, padding, ..*self })
    }
}

pub(super) fn rank4(op: &'static str, tensor: &Tensor, name: &str) -> Result<[usize; 4]> {
    <[usize; 4]>::try_from(tensor.dims()).map_err(|_| {
        OpsError::shape(op, format!("{name} {:?}", tensor.dims()), "four dimensions", "maps are [n, c, h, w]")
    })
}
