//! Evaluation of a network on a data set: the one evaluator of training, the `eval` command and the report.

use candle_core::{Device, Tensor};
use rayon::prelude::*;

use segdistill_data::{Dataset, RgbImage, Sample, classes::VOID, transform::resize_image_bilinear};
use segdistill_eval::{Confusion, EvalError, predict_labels};

use crate::error::{Result, TrainError};

/// Most images that go through the network together; the result does not depend on it.
const BATCH: usize = 8;
/// Pixels that go through the network together, about, so that memory does not grow with the size of images.
const BATCH_PIXELS: usize = BATCH * 360 * 480;

/// Counts over a split.
#[derive(Clone, Debug)]
pub struct Evaluation {
    /// Pooled over every image.
    pub confusion: Confusion,
    /// Images seen.
    pub n_images: usize,
}

/// One image as evaluated.
#[derive(Debug)]
pub struct ImageResult<'a> {
    /// Position in the data set.
    pub index: usize,
    /// Image and labels at label resolution.
    pub sample: &'a Sample,
    /// Predicted labels, same size as the labels, row-major.
    pub predictions: &'a [u8],
}

/// Images as `[n, 3, h, w]` in [0, 1], each resized to `input_hw` first.
///
/// # Errors
/// `Candle` when the tensor cannot be made.
pub fn image_tensor(images: &[&RgbImage], input_hw: [usize; 2], device: &Device) -> Result<Tensor> {
    let [h, w] = input_hw;
    let mut values = vec![0f32; images.len() * 3 * h * w];
    values.par_chunks_mut((3 * h * w).max(1)).zip(images).try_for_each(|(planes, image)| -> Result<()> {
        let resized = resize_image_bilinear(image, input_hw)?;
        for (c, plane) in planes.chunks_mut(h * w).enumerate() {
            for (value, pixel) in plane.iter_mut().zip(resized.rgb.chunks_exact(3)) {
                *value = f32::from(pixel[c]) / 255.0;
            }
        }
        Ok(())
    })?;
    Ok(Tensor::from_vec(values, (images.len(), 3, h, w), device)?)
}

/// Predicts every image of `dataset` whole, at `input_hw`, scores it at label resolution, and shows each to `each`.
///
/// `logits` maps `[n, 3, h, w]` in [0, 1] to `[n, c, h', w']`; logits are resized bilinearly to the labels before argmax.
///
/// # Errors
/// What reading, the network or the scoring reports; `NonFiniteLogit`; `Config` for a data set without images.
pub fn evaluate(
    logits: &dyn Fn(&Tensor) -> Result<Tensor>,
    dataset: &dyn Dataset,
    input_hw: [usize; 2],
    device: &Device,
    each: &mut dyn FnMut(ImageResult<'_>) -> Result<()>,
) -> Result<Evaluation> {
    if dataset.is_empty() {
        let what = format!("split {} of {} has no image", dataset.split(), dataset.id());
        return Err(TrainError::config(what, "evaluate a split that has images"));
    }
    let mut confusion = Confusion::new(dataset.classes().n_classes());
    let indices: Vec<usize> = (0..dataset.len()).collect();
    let batch = (BATCH_PIXELS / (input_hw[0] * input_hw[1]).max(1)).clamp(1, BATCH);
    for chunk in indices.chunks(batch) {
        let samples: Vec<Sample> =
            chunk.par_iter().map(|&i| dataset.sample(i)).collect::<std::result::Result<_, _>>()?;
        let images: Vec<&RgbImage> = samples.iter().map(|s| &s.image).collect();
        let logits_nchw = logits(&image_tensor(&images, input_hw, device)?)?;
        for (k, (sample, &index)) in samples.iter().zip(chunk).enumerate() {
            let label_hw = [sample.labels.height, sample.labels.width];
            let predicted = predict_labels(&logits_nchw.narrow(0, k, 1)?, label_hw).map_err(|e| match e {
                EvalError::NonFinite { class, value, .. } => {
                    TrainError::NonFiniteLogit { value, class, split: dataset.split().to_string(), step: None }
                }
                other => other.into(),
            })?;
            let predictions = predicted.first().map_or(&[][..], Vec::as_slice);
            confusion.add(&sample.labels.ids, predictions, VOID)?;
            each(ImageResult { index, sample, predictions })?;
        }
    }
    Ok(Evaluation { confusion, n_images: dataset.len() })
}
