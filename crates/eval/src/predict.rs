//! From logits on the network's grid to a label map at label resolution.
//!
//! The upsampled logits of all classes are never held at full resolution: each output row is interpolated class by
//! class and only the best class so far is kept. What does not live here: networks, windows, scales, files.

use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;

use crate::error::{EvalError, Result};

/// Class of every pixel: bilinear upsampling of the logits to the size of the label map, then argmax over the classes.
///
/// `label(y, x) = argmax_c sum_{ij} w_ij(y, x) z_c(i, j)` with half-pixel centres (`align_corners` false) and weights in
/// f64 rounded to f32. A tie goes to the lowest class. At equal sizes this is the plain argmax, bit for bit.
///
/// # Shapes
/// - `logits_nchw`: `[n, c, h, w]`, any float type, any device; `label_hw`: rows and columns of the result
/// - returns n row-major maps of `label_hw[0] * label_hw[1]` class indices
/// # Errors
/// `NonFinite` for a NaN or infinite logit, `Config` for no class or more than 255, or for an empty size.
/// # Example
/// ```
/// use candle_core::{Device, Tensor};
/// // Two classes on a 1x2 grid: class 1 wins on the right.
/// let logits = Tensor::new(&[[[[1f32, 0.0]], [[0.0, 1.0]]]], &Device::Cpu)?;
/// let maps = segdistill_eval::predict_labels(&logits, [1, 4])?;
/// assert_eq!(maps, [[0, 0, 1, 1]]);
/// # Ok::<(), segdistill_eval::EvalError>(())
/// ```
pub fn predict_labels(logits_nchw: &Tensor, label_hw: [usize; 2]) -> Result<Vec<Vec<u8>>> {
    let (n, c, h, w) = logits_nchw.dims4()?;
    if c == 0 || c > usize::from(u8::MAX) {
        return Err(EvalError::config(
            format!("{c} class channels of logits {:?}", logits_nchw.dims()),
            "a label map of bytes holds 1 to 255 classes",
        ));
    }
    if h * w == 0 || label_hw[0] * label_hw[1] == 0 {
        return Err(EvalError::config(
            format!("logits of {h}x{w} for labels of {}x{}", label_hw[0], label_hw[1]),
            "sizes are at least 1x1",
        ));
    }
    (0..n)
        .map(|image| {
            let logits_chw = logits_nchw.get(image)?.to_dtype(DType::F32)?.to_device(&Device::Cpu)?;
            let logits_chw = logits_chw.flatten_all()?.to_vec1::<f32>()?;
            if let Some(k) = logits_chw.iter().position(|z| !z.is_finite()) {
                let (class, row, column) = (k / (h * w), k / w % h, k % w);
                return Err(EvalError::NonFinite { image, class, row, column, value: logits_chw[k] });
            }
            Ok(argmax_upsampled(&logits_chw, [c, h, w], label_hw))
        })
        .collect()
}

/// Two neighbours along one axis and the weight of the second.
struct Tap {
    low: usize,
    high: usize,
    weight: f32,
}

fn taps(n_in: usize, n_out: usize) -> Vec<Tap> {
    let scale = n_in as f64 / n_out as f64;
    (0..n_out)
        .map(|i| {
            let position = ((i as f64 + 0.5) * scale - 0.5).max(0.0);
            let low = (position as usize).min(n_in - 1);
            Tap { low, high: (low + 1).min(n_in - 1), weight: (position - low as f64) as f32 }
        })
        .collect()
}

fn argmax_upsampled(logits_chw: &[f32], [c, h, w]: [usize; 3], [out_h, out_w]: [usize; 2]) -> Vec<u8> {
    let (rows, columns) = (taps(h, out_h), taps(w, out_w));
    let mut labels = vec![0u8; out_h * out_w];
    labels.par_chunks_mut(out_w).zip(&rows).for_each_init(
        || (vec![0f32; w], vec![0f32; out_w]),
        |(mixed, best), (labels, row)| {
            best.fill(f32::NEG_INFINITY);
            for class in 0..c {
                let plane = &logits_chw[class * h * w..(class + 1) * h * w];
                let (low, high) = (&plane[row.low * w..][..w], &plane[row.high * w..][..w]);
                for ((m, &a), &b) in mixed.iter_mut().zip(low).zip(high) {
                    *m = a + row.weight * (b - a);
                }
                for ((best, label), tap) in best.iter_mut().zip(labels.iter_mut()).zip(&columns) {
                    let (a, b) = (mixed[tap.low], mixed[tap.high]);
                    let z = a + tap.weight * (b - a);
                    // Strictly greater: a tie stays with the lower class.
                    if z > *best {
                        *best = z;
                        *label = class as u8;
                    }
                }
            }
        },
    );
    labels
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ties_go_to_the_lowest_class() {
        let logits = Tensor::zeros((2, 5, 3, 4), DType::F32, &Device::Cpu).unwrap();
        assert_eq!(predict_labels(&logits, [7, 9]).unwrap(), vec![vec![0u8; 63]; 2]);
        // Classes 1 and 2 are equal and above class 0 everywhere.
        let planes: Vec<f32> = [[0.0f32; 6], [0.3; 6], [0.3; 6]].concat();
        let logits = Tensor::from_vec(planes, (1, 3, 2, 3), &Device::Cpu).unwrap();
        assert_eq!(predict_labels(&logits, [5, 11]).unwrap(), vec![vec![1u8; 55]]);
    }

    #[test]
    fn a_bad_logit_is_named() {
        let mut values = vec![0.5f32; 2 * 3 * 4 * 5];
        values[3 * 4 * 5 + 2 * 20 + 5 + 2] = f32::NAN;
        let logits = Tensor::from_vec(values, (2, 3, 4, 5), &Device::Cpu).unwrap();
        let message = predict_labels(&logits, [4, 5]).unwrap_err().to_string();
        assert!(message.starts_with("logit NaN of class 2 at row 1, column 2 of image 1\n  hint: "), "{message}");
        let logits = Tensor::zeros((1, 256, 1, 1), DType::F32, &Device::Cpu).unwrap();
        assert!(matches!(predict_labels(&logits, [1, 1]), Err(EvalError::Config { .. })));
        let logits = Tensor::zeros((1, 2, 1, 1), DType::F32, &Device::Cpu).unwrap();
        assert!(matches!(predict_labels(&logits, [0, 3]), Err(EvalError::Config { .. })));
    }
}
