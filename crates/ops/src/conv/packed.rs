//! A convolution for inference that packs its weight once.

use std::any::Any;
use std::sync::OnceLock;

use candle_core::Tensor;

use super::pack::PackedWeight;
use super::{Conv2dConfig, fused};
use crate::error::Result;
use crate::kernels::Kernels;

/// An f32 weight as the kernels read it, for each way a convolution may take; which one depends on the map's size.
#[derive(Default)]
pub(super) struct Panels {
    transformed: OnceLock<Vec<f32>>,
    direct: OnceLock<PackedWeight<f32>>,
}

impl Panels {
    /// Of Winograd's way; `None` for elements other than f32, which are packed each time.
    pub(super) fn transformed<T: Kernels>(&self) -> Option<&OnceLock<Vec<T>>> {
        (&self.transformed as &dyn Any).downcast_ref()
    }

    /// Of the direct way.
    pub(super) fn direct<T: Kernels>(&self) -> Option<&OnceLock<PackedWeight<T>>> {
        (&self.direct as &dyn Any).downcast_ref()
    }
}

/// `max(conv(x) + bias + residual, 0)`, or without the maximum, again and again with one weight.
///
/// [`conv2d_fused`](crate::conv2d_fused) that keeps what it packs of the weight: packing is a tenth of a convolution over
/// one image. It takes as much memory as the weight itself (16/9 of it where Winograd's way is taken) from the first call
/// on; the weight must not change meanwhile.
///
/// # Example
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use segdistill_ops::{Conv2dConfig, FusedConv2d};
/// let weight = Tensor::ones((4, 3, 1, 1), DType::F32, &Device::Cpu)?;
/// let conv = FusedConv2d::new(weight, None, Conv2dConfig::default());
/// for _ in 0..2 {
///     let y = conv.forward(&Tensor::ones((1, 3, 5, 7), DType::F32, &Device::Cpu)?, None, true)?;
///     assert_eq!(y.max_all()?.to_scalar::<f32>()?, 3.0);
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct FusedConv2d {
    weight: Tensor,
    bias: Option<Tensor>,
    cfg: Conv2dConfig,
    panels: Panels,
}

impl std::fmt::Debug for FusedConv2d {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FusedConv2d")
            .field("weight", &self.weight.dims())
            .field("cfg", &self.cfg)
            .finish_non_exhaustive()
    }
}

impl FusedConv2d {
    /// Of a weight, whatever graph stands behind it.
    pub fn new(weight: Tensor, bias: Option<Tensor>, cfg: Conv2dConfig) -> Self {
        Self { weight: weight.detach(), bias: bias.map(|bias| bias.detach()), cfg, panels: Panels::default() }
    }

    /// As [`conv2d_fused`](crate::conv2d_fused), the same bits.
    ///
    /// # Shapes
    /// As there
    /// # Gradient
    /// None.
    /// # Errors
    /// As there.
    pub fn forward(&self, x_nchw: &Tensor, residual_nchw: Option<&Tensor>, relu: bool) -> Result<Tensor> {
        fused(x_nchw, &self.weight, self.bias.as_ref(), residual_nchw, relu, self.cfg, Some(&self.panels))
    }
}
