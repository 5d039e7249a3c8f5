//! Pictures for people: overlay sheets, and the files they and label maps are written to and read from.

use crate::classes::{ClassTable, VOID};
use crate::error::{DataError, Result};
use crate::sample::{LabelMap, RgbImage, Sample};

pub use crate::codec::{MAX_DECODE_BYTES, MAX_SIDE, read_image, read_labels, write_label_png, write_png};

/// Pixels between the cells of a sheet.
const GAP: usize = 4;
/// Colour between the cells.
const PAPER: [u8; 3] = [255, 255, 255];

/// The picture with the class colours laid over it; `alpha` 0 shows the picture, 1 the colours. Void stays as it is.
///
/// # Errors
/// `Shape` when the sizes differ.
pub fn overlay(image: &RgbImage, labels: &LabelMap, table: &ClassTable, alpha: f64) -> Result<RgbImage> {
    if image.hw() != labels.hw() {
        return Err(DataError::Shape {
            what: "laying labels over a picture".into(),
            found: format!("labels {:?}", labels.hw()),
            expected: format!("{:?} (height, width)", image.hw()),
            hint: "resize one of them first",
        });
    }
    let mut out = table.colorize(labels);
    for ((pixel, under), id) in out.rgb.chunks_exact_mut(3).zip(image.rgb.chunks_exact(3)).zip(&labels.ids) {
        let alpha = if *id == VOID { 0.0 } else { alpha };
        for c in 0..3 {
            pixel[c] = (f64::from(pixel[c]) * alpha + f64::from(under[c]) * (1.0 - alpha)).round() as u8;
        }
    }
    Ok(out)
}

/// A sheet of samples, `per_row` side by side, each as input | labels | overlay.
///
/// # Errors
/// `Config` without samples or with `per_row` 0; `PairSize` when a sample's sizes differ.
pub fn sheet(samples: &[Sample], table: &ClassTable, per_row: usize) -> Result<RgbImage> {
    if samples.is_empty() || per_row == 0 {
        let what = format!("a sheet of {} samples, {per_row} a row", samples.len());
        return Err(DataError::config(what, "both are at least 1"));
    }
    let mut cells = Vec::with_capacity(samples.len() * 3);
    for sample in samples {
        sample.check_sizes()?;
        let laid = overlay(&sample.image, &sample.labels, table, 0.55)?;
        cells.extend([sample.image.clone(), table.colorize(&sample.labels), laid]);
    }
    Ok(grid(&cells, per_row.min(samples.len()) * 3))
}

/// Pictures in rows of `per_row`, each in the upper left of a cell as large as the largest.
///
/// # Panics
/// When `per_row` is 0.
pub fn grid(cells: &[RgbImage], per_row: usize) -> RgbImage {
    let cell_h = cells.iter().map(|c| c.height).max().unwrap_or(0);
    let cell_w = cells.iter().map(|c| c.width).max().unwrap_or(0);
    let n_rows = cells.len().div_ceil(per_row);
    let (height, width) = (n_rows * (cell_h + GAP) + GAP, per_row * (cell_w + GAP) + GAP);
    let mut out = RgbImage::filled(height, width, PAPER);
    for (i, cell) in cells.iter().enumerate() {
        let (top, left) = (GAP + i / per_row * (cell_h + GAP), GAP + i % per_row * (cell_w + GAP));
        for (row, line) in cell.rgb.chunks_exact((cell.width * 3).max(1)).enumerate() {
            let start = ((top + row) * width + left) * 3;
            out.rgb[start..start + line.len()].copy_from_slice(line);
        }
    }
    out
}
