//! A network that cannot be trained: the teacher.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};
use segdistill_ops::{Mode, ParamStore};

use crate::error::Result;
use crate::segmenter::{SegOutput, Segmenter, build};
use crate::spec::{ModelInfo, ModelSpec};

/// A network over plain tensors: no variable, no graph, no gradient, always [`Mode::Eval`].
///
/// Batch normalisation is folded into the convolutions when it is built, and ReLU and residual sum are part of them, so
/// that it runs faster than [`build`]'s network; both give the same to rounding (1e-5 of the largest value in f32,
/// 1e-12 in f64, logits and features alike).
///
/// Products are f32 (or f64), whatever precision the weights were trained with: scores, predictions and a teacher's
/// targets do not depend on it.
pub struct Frozen {
    model: Box<dyn Segmenter>,
}

impl Frozen {
    /// The network of `spec` with exactly the weights `tensors`, copied and converted to `dtype` on `device`.
    ///
    /// # Errors
    /// `Ops(Mismatch)` with every missing, unexpected, misshapen, mistyped and non-finite tensor at once; else as [`build`].
    pub fn new(spec: &ModelSpec, tensors: BTreeMap<String, Tensor>, dtype: DType, device: &Device) -> Result<Self> {
        // Tensors of a live store share their memory with it; the frozen store copies them, so that training the one
        // does not move the other.
        let store = ParamStore::frozen(tensors, dtype, device)?;
        let model = build(spec, &store)?;
        store.finish()?;
        Ok(Self { model })
    }

    /// Logits and features of a batch; shapes and errors as [`Segmenter::forward`].
    ///
    /// # Gradient
    /// None, not even to the images.
    pub fn forward(&self, images_nchw: &Tensor) -> Result<SegOutput> {
        self.model.forward(&images_nchw.detach(), Mode::Eval)
    }

    /// As [`Frozen::forward`] for images that are normalised already.
    pub fn forward_normalised(&self, images_nchw: &Tensor) -> Result<SegOutput> {
        self.model.forward_normalised(&images_nchw.detach(), Mode::Eval)
    }

    /// What the network says of itself.
    pub fn info(&self) -> &ModelInfo {
        self.model.info()
    }
}

impl std::fmt::Debug for Frozen {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Frozen").field("info", self.info()).finish_non_exhaustive()
    }
}
