//! Resizing: pictures bilinear (by area when shrinking), labels nearest. Both with half-pixel centres.

use crate::error::{DataError, Result};
use crate::sample::{LabelMap, RgbImage};

/// Weights of the source pixels for one target pixel along an axis.
struct Taps {
    first: usize,
    weights: Vec<f32>,
}

/// A triangle of half-width `max(1, from / to)` about the target's centre, cut at the border and normalised.
fn taps(from: usize, to: usize) -> Vec<Taps> {
    let scale = from as f64 / to as f64;
    let reach = scale.max(1.0);
    (0..to)
        .map(|i| {
            let centre = (i as f64 + 0.5) * scale - 0.5;
            let first = (centre - reach).ceil().max(0.0) as usize;
            let last = ((centre + reach).floor() as usize).min(from - 1);
            let raw: Vec<f64> = (first..=last).map(|k| (1.0 - (k as f64 - centre).abs() / reach).max(0.0)).collect();
            let sum: f64 = raw.iter().sum();
            Taps { first, weights: raw.iter().map(|w| (w / sum) as f32).collect() }
        })
        .collect()
}

fn check(what: &str, from: [usize; 2], to: [usize; 2]) -> Result<()> {
    if from.contains(&0) || to.contains(&0) {
        return Err(DataError::Shape {
            what: what.into(),
            found: format!("{from:?} to {to:?}"),
            expected: "heights and widths above 0".into(),
            hint: "give the target as [height, width] in pixels",
        });
    }
    Ok(())
}

/// Resizes a picture to `hw`; a side that shrinks is filtered by a triangle as wide as the shrinking asks for.
///
/// # Errors
/// `Shape` when a side is 0.
/// # Source
/// The triangle filter of Pillow's `BILINEAR` and of `torch.nn.functional.interpolate(antialias=True)`.
pub fn resize_image_bilinear(image: &RgbImage, hw: [usize; 2]) -> Result<RgbImage> {
    check("resizing a picture", image.hw(), hw)?;
    if image.hw() == hw {
        return Ok(image.clone());
    }
    let [height, width] = hw;
    let columns = taps(image.width, width);
    let rows = taps(image.height, height);
    // Across first, each source row once; then down.
    let mut across = vec![0f32; image.height * width * 3];
    for (source, target) in image.rgb.chunks_exact(image.width * 3).zip(across.chunks_exact_mut(width * 3)) {
        for (tap, out) in columns.iter().zip(target.chunks_exact_mut(3)) {
            for (weight, pixel) in tap.weights.iter().zip(source[tap.first * 3..].chunks_exact(3)) {
                for c in 0..3 {
                    out[c] += weight * f32::from(pixel[c]);
                }
            }
        }
    }
    let mut rgb = vec![0u8; height * width * 3];
    let mut sum = vec![0f32; width * 3];
    for (tap, target) in rows.iter().zip(rgb.chunks_exact_mut(width * 3)) {
        sum.fill(0.5);
        for (weight, line) in tap.weights.iter().zip(across[tap.first * width * 3..].chunks_exact(width * 3)) {
            sum.iter_mut().zip(line).for_each(|(s, v)| *s += weight * v);
        }
        target.iter_mut().zip(&sum).for_each(|(t, s)| *t = *s as u8);
    }
    Ok(RgbImage { height, width, rgb })
}

/// Resizes a label map to `hw`, each pixel taking the id of the source pixel its centre falls on.
///
/// # Errors
/// `Shape` when a side is 0.
pub fn resize_labels_nearest(labels: &LabelMap, hw: [usize; 2]) -> Result<LabelMap> {
    check("resizing labels", labels.hw(), hw)?;
    let [height, width] = hw;
    // (i + 1/2) * from / to, rounded down, in whole numbers.
    let columns: Vec<usize> = (0..width).map(|x| (2 * x + 1) * labels.width / (2 * width)).collect();
    let mut ids = Vec::with_capacity(height * width);
    for y in 0..height {
        let row = (2 * y + 1) * labels.height / (2 * height) * labels.width;
        ids.extend(columns.iter().map(|x| labels.ids[row + x]));
    }
    Ok(LabelMap { height, width, ids })
}
