//! Batches: samples of one size as tensors.

use candle_core::{Device, Tensor};

use crate::error::{DataError, Result};
use crate::sample::Sample;

/// Samples as tensors.
#[derive(Clone, Debug)]
pub struct Batch {
    /// `[n, 3, h, w]` f32, RGB in [0, 1]; each network normalises for itself.
    pub images_nchw: Tensor,
    /// `[n, h, w]` u8, class ids and [`VOID`](crate::classes::VOID).
    pub labels_nhw: Tensor,
    /// Names, one a sample.
    pub names: Vec<String>,
}

/// Joins samples of one size into a batch on `device`.
///
/// # Shapes
/// `images_nchw` `[n, 3, h, w]`, `labels_nhw` `[n, h, w]`.
/// # Errors
/// `Config` without samples; `Shape` naming the first sample of another size; `PairSize`.
pub fn collate(samples: &[Sample], device: &Device) -> Result<Batch> {
    let Some(first) = samples.first() else {
        return Err(DataError::config("a batch of no samples", "pass at least one sample"));
    };
    let [h, w] = first.image.hw();
    let mut images = Vec::with_capacity(samples.len() * 3 * h * w);
    let mut labels = Vec::with_capacity(samples.len() * h * w);
    for sample in samples {
        sample.check_sizes()?;
        if sample.image.hw() != [h, w] {
            return Err(DataError::Shape {
                what: format!("joining `{}` and `{}` into a batch", first.name, sample.name),
                found: format!("{:?}", sample.image.hw()),
                expected: format!("{:?} (height, width)", [h, w]),
                hint: "crop or resize the samples to one size",
            });
        }
        for c in 0..3 {
            images.extend(sample.image.rgb.chunks_exact(3).map(|pixel| f32::from(pixel[c]) / 255.0));
        }
        labels.extend_from_slice(&sample.labels.ids);
    }
    Ok(Batch {
        images_nchw: Tensor::from_vec(images, (samples.len(), 3, h, w), device)?,
        labels_nhw: Tensor::from_vec(labels, (samples.len(), h, w), device)?,
        names: samples.iter().map(|s| s.name.clone()).collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sample::{LabelMap, RgbImage};

    fn sample(height: usize, width: usize) -> Sample {
        let rgb = (0..height * width * 3).map(|i| (i * 7 % 256) as u8).collect();
        let ids = (0..height * width).map(|i| (i % 11) as u8).collect();
        let name = format!("{height}x{width}");
        Sample { image: RgbImage { height, width, rgb }, labels: LabelMap { height, width, ids }, name }
    }

    #[test]
    fn pixels_land_where_they_belong() {
        let one = sample(2, 3);
        let mut two = one.clone();
        two.image.rgb.reverse();
        let batch = collate(&[one.clone(), two.clone()], &Device::Cpu).unwrap();
        assert_eq!((batch.images_nchw.dims(), batch.labels_nhw.dims()), (&[2, 3, 2, 3][..], &[2, 2, 3][..]));
        let images = batch.images_nchw.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        for (n, s) in [one, two].iter().enumerate() {
            for (c, y, x) in (0..18).map(|i| (i / 6, i / 3 % 2, i % 3)) {
                assert_eq!(images[((n * 3 + c) * 2 + y) * 3 + x], f32::from(s.image.at(y, x)[c]) / 255.0);
            }
        }
    }

    #[test]
    fn another_size_is_named() {
        let error = collate(&[sample(2, 3), sample(3, 2)], &Device::Cpu).unwrap_err().to_string();
        assert!(error.contains("`2x3`") && error.contains("`3x2`") && error.contains("[3, 2]"), "{error}");
        assert!(collate(&[], &Device::Cpu).is_err());
    }
}
