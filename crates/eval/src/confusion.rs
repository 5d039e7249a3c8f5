//! One streaming confusion matrix over a whole split, and the scores it gives.
//!
//! Counting is separate from scoring: images, threads or machines each fill a matrix, matrices are merged by adding
//! whole numbers, and only the total is scored. What does not live here: tensors, files, names of classes.

use serde::{Deserialize, Serialize};

use crate::error::{EvalError, Result};

/// Counts of pixels by (ground truth, prediction) in u64, so that neither the order nor the grouping of images matters.
///
/// # Example
/// ```
/// use segdistill_eval::Confusion;
/// let void = 255;
/// let mut confusion = Confusion::new(2);
/// confusion.add(&[0, 0, 1, void], &[0, 1, 1, 0], void)?;
/// let scores = confusion.scores();
/// assert_eq!(scores.n_pixels, 3);
/// assert_eq!(scores.miou, 0.5); // class 0: 1 of 2, class 1: 1 of 2
/// # Ok::<(), segdistill_eval::EvalError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Confusion {
    n_classes: usize,
    /// Row-major, rows ground truth, columns prediction.
    counts: Vec<u64>,
    /// Valid pixels of each ground-truth class for which no class was predicted.
    abstained: Vec<u64>,
}

/// Scores of one confusion matrix; every score is a fraction, NaN or `None` where it has no pixel to stand on.
///
/// With `t_c` the pixels of class c, `p_c` the valid pixels predicted as c and `h_c` the hits:
/// `iou_c = h_c / (t_c + p_c - h_c)`, `accuracy_c = h_c / t_c`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Scores {
    /// Intersection over union by class; `None` when the class is absent from labels and predictions.
    pub iou: Vec<Option<f64>>,
    /// Share of the class's pixels that were found; `None` when the class is absent from the labels.
    pub class_accuracy: Vec<Option<f64>>,
    /// Ground-truth pixels by class.
    pub class_pixels: Vec<u64>,
    /// Mean of `iou` over the classes present; NaN (null in JSON) when none is.
    #[serde(with = "nan_as_null")]
    pub miou: f64,
    /// Number of classes that occur in labels or predictions, which is the number `miou` averages.
    pub n_classes_present: usize,
    /// `sum_c h_c / sum_c t_c`; NaN without a valid pixel.
    #[serde(with = "nan_as_null")]
    pub pixel_accuracy: f64,
    /// Mean of `class_accuracy` over the classes in the labels; NaN when there is none.
    #[serde(with = "nan_as_null")]
    pub mean_accuracy: f64,
    /// `sum_c t_c iou_c / sum_c t_c`; NaN without a valid pixel.
    #[serde(with = "nan_as_null")]
    pub fw_iou: f64,
    /// Valid pixels counted.
    pub n_pixels: u64,
}

impl Confusion {
    /// An empty matrix of `n_classes` classes.
    pub fn new(n_classes: usize) -> Self {
        Self { n_classes, counts: vec![0; n_classes * n_classes], abstained: vec![0; n_classes] }
    }

    /// Number of classes.
    pub fn n_classes(&self) -> usize {
        self.n_classes
    }

    /// Counts of pixels, row-major, rows ground truth, columns prediction.
    pub fn counts(&self) -> &[u64] {
        &self.counts
    }

    /// Valid pixels of each ground-truth class that [`Confusion::add_abstaining`] found without a predicted class.
    pub fn abstained(&self) -> &[u64] {
        &self.abstained
    }

    /// Counts one label map and its prediction; pixels labelled `void` count nowhere, whatever was predicted there.
    ///
    /// # Shapes
    /// `labels`, `predictions`: flat maps of equal length, in the same order.
    /// # Errors
    /// `Shape` for maps of different length, `Label` and `Prediction` for a value that is no class, `Config` when
    /// `void` is the index of a class. The matrix is unchanged by a call that fails.
    pub fn add(&mut self, labels: &[u8], predictions: &[u8], void: u8) -> Result<()> {
        self.check(labels, predictions, void)?;
        if let Some(index) = predictions.iter().position(|&p| usize::from(p) >= self.n_classes) {
            return Err(EvalError::Prediction { index, value: predictions[index], n_classes: self.n_classes });
        }
        for (&label, &prediction) in labels.iter().zip(predictions) {
            if label != void {
                self.counts[usize::from(label) * self.n_classes + usize::from(prediction)] += 1;
            }
        }
        Ok(())
    }

    /// As [`Confusion::add`], for predictors that may answer "no class" with the value `void`.
    ///
    /// Such an answer on a valid pixel is a miss of the labelled class (it stands in its denominator and in `n_pixels`)
    /// and a false alarm of none.
    ///
    /// # Errors
    /// As [`Confusion::add`], but a prediction of `void` is taken.
    /// # Source
    /// The official Cityscapes pixel evaluation: the row sums run over every column.
    pub fn add_abstaining(&mut self, labels: &[u8], predictions: &[u8], void: u8) -> Result<()> {
        self.check(labels, predictions, void)?;
        if let Some(index) = predictions.iter().position(|&p| p != void && usize::from(p) >= self.n_classes) {
            return Err(EvalError::Prediction { index, value: predictions[index], n_classes: self.n_classes });
        }
        for (&label, &prediction) in labels.iter().zip(predictions) {
            if label == void {
                continue;
            }
            if prediction == void {
                self.abstained[usize::from(label)] += 1;
            } else {
                self.counts[usize::from(label) * self.n_classes + usize::from(prediction)] += 1;
            }
        }
        Ok(())
    }

    fn check(&self, labels: &[u8], predictions: &[u8], void: u8) -> Result<()> {
        if usize::from(void) < self.n_classes {
            return Err(EvalError::config(
                format!("void value {void} is also one of the {} classes", self.n_classes),
                "choose a void value that is no class index, as 255",
            ));
        }
        if labels.len() != predictions.len() {
            return Err(EvalError::shape(
                "confusion",
                format!("{} predictions", predictions.len()),
                format!("{} labels", labels.len()),
                "predict at the size of the label map; nothing is resized here",
            ));
        }
        match labels.iter().position(|&l| l != void && usize::from(l) >= self.n_classes) {
            Some(index) => Err(EvalError::Label { index, value: labels[index], n_classes: self.n_classes, void }),
            None => Ok(()),
        }
    }

    /// Adds the counts of another matrix, as of other images, threads or machines.
    ///
    /// # Errors
    /// `Shape` when the numbers of classes differ; the matrix is unchanged then.
    pub fn merge(&mut self, other: &Confusion) -> Result<()> {
        if other.n_classes != self.n_classes {
            return Err(EvalError::shape(
                "merge confusion matrices",
                format!("{} classes", other.n_classes),
                format!("{} classes", self.n_classes),
                "merge matrices of one class table only",
            ));
        }
        self.counts.iter_mut().zip(&other.counts).for_each(|(a, b)| *a += b);
        self.abstained.iter_mut().zip(&other.abstained).for_each(|(a, b)| *a += b);
        Ok(())
    }

    /// A matrix from counts kept elsewhere, as in `confusion.csv`.
    ///
    /// # Shapes
    /// `counts`: `n_classes * n_classes`, row-major, rows ground truth.
    /// # Errors
    /// `Shape` when the number of counts is another.
    pub fn from_counts(n_classes: usize, counts: Vec<u64>) -> Result<Self> {
        if counts.len() != n_classes * n_classes {
            return Err(EvalError::shape(
                "confusion counts",
                format!("{} counts", counts.len()),
                format!("{n_classes} x {n_classes}"),
                "pass one row of counts for each ground-truth class",
            ));
        }
        Ok(Self { n_classes, counts, abstained: vec![0; n_classes] })
    }

    /// Sets the pixels without a predicted class, by ground-truth class.
    ///
    /// # Errors
    /// `Shape` when there is not one count a class.
    pub(crate) fn set_abstained(&mut self, abstained: Vec<u64>) -> Result<()> {
        if abstained.len() != self.n_classes {
            return Err(EvalError::shape(
                "pixels without a predicted class",
                format!("{} counts", abstained.len()),
                format!("{}", self.n_classes),
                "pass one count for each ground-truth class",
            ));
        }
        self.abstained = abstained;
        Ok(())
    }

    /// Scores of everything counted so far.
    pub fn scores(&self) -> Scores {
        let c = self.n_classes;
        let hits: Vec<u64> = (0..c).map(|i| self.counts[i * c + i]).collect();
        let class_pixels: Vec<u64> =
            (0..c).map(|i| self.counts[i * c..(i + 1) * c].iter().sum::<u64>() + self.abstained[i]).collect();
        let predicted: Vec<u64> = (0..c).map(|j| (0..c).map(|i| self.counts[i * c + j]).sum()).collect();
        let n_pixels: u64 = class_pixels.iter().sum();
        let iou: Vec<Option<f64>> = (0..c).map(|i| ratio(hits[i], class_pixels[i] + predicted[i] - hits[i])).collect();
        let class_accuracy: Vec<Option<f64>> = (0..c).map(|i| ratio(hits[i], class_pixels[i])).collect();
        let weighted: f64 = iou.iter().zip(&class_pixels).map(|(iou, &n)| iou.unwrap_or(0.0) * n as f64).sum();
        Scores {
            miou: mean_present(&iou),
            n_classes_present: iou.iter().flatten().count(),
            pixel_accuracy: ratio(hits.iter().sum(), n_pixels).unwrap_or(f64::NAN),
            mean_accuracy: mean_present(&class_accuracy),
            fw_iou: if n_pixels == 0 { f64::NAN } else { weighted / n_pixels as f64 },
            iou,
            class_accuracy,
            class_pixels,
            n_pixels,
        }
    }
}

fn ratio(part: u64, whole: u64) -> Option<f64> {
    (whole > 0).then(|| part as f64 / whole as f64)
}

fn mean_present(values: &[Option<f64>]) -> f64 {
    let present: Vec<f64> = values.iter().flatten().copied().collect();
    if present.is_empty() { f64::NAN } else { present.iter().sum::<f64>() / present.len() as f64 }
}

/// NaN is written as null, since JSON has no NaN, and read back as NaN.
pub(crate) mod nan_as_null {
    use serde::{Deserialize, Deserializer, Serializer};

    pub(crate) fn serialize<S: Serializer>(value: &f64, serializer: S) -> Result<S::Ok, S::Error> {
        if value.is_finite() { serializer.serialize_some(value) } else { serializer.serialize_none() }
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
        Ok(Option::<f64>::deserialize(deserializer)?.unwrap_or(f64::NAN))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const VOID: u8 = 255;

    fn counted(n_classes: usize, labels: &[u8], predictions: &[u8]) -> Confusion {
        let mut confusion = Confusion::new(n_classes);
        confusion.add(labels, predictions, VOID).unwrap();
        confusion
    }

    #[test]
    fn a_matrix_worked_by_hand() {
        // Ground truth 0: 3 hit, 1 said 1. Ground truth 1: 2 hit, 1 said 0, 1 said 2. Ground truth 2: absent.
        let confusion = counted(4, &[0, 0, 0, 0, 1, 1, 1, 1, VOID], &[0, 0, 0, 1, 1, 1, 0, 2, 2]);
        assert_eq!(confusion.counts(), [3, 1, 0, 0, 1, 2, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        let scores = confusion.scores();
        // Class 2 is only predicted: union 1, hit 0, so it stands in the mean as 0; class 3 is nowhere and is left out.
        assert_eq!(scores.iou, [Some(3.0 / 5.0), Some(2.0 / 5.0), Some(0.0), None]);
        assert_eq!(scores.n_classes_present, 3);
        assert!((scores.miou - 1.0 / 3.0).abs() < 1e-15);
        assert_eq!(scores.pixel_accuracy, 5.0 / 8.0);
        assert_eq!(scores.class_accuracy, [Some(0.75), Some(0.5), None, None]);
        assert_eq!(scores.mean_accuracy, 0.625);
        assert_eq!(scores.fw_iou, 0.5 * 0.6 + 0.5 * 0.4);
        assert_eq!((scores.n_pixels, scores.class_pixels), (8, vec![4, 4, 0, 0]));
    }

    #[test]
    fn nothing_counted_gives_nan_and_none() {
        for confusion in [Confusion::new(3), counted(3, &[VOID; 5], &[0, 1, 2, 0, 1]), Confusion::new(0)] {
            let scores = confusion.scores();
            assert!(scores.miou.is_nan() && scores.pixel_accuracy.is_nan());
            assert!(scores.mean_accuracy.is_nan() && scores.fw_iou.is_nan());
            assert!(scores.iou.iter().all(Option::is_none));
            assert_eq!((scores.n_classes_present, scores.n_pixels), (0, 0));
            let text = serde_json::to_string(&scores).unwrap();
            assert!(text.contains("\"miou\":null"), "{text}");
            assert!(serde_json::from_str::<Scores>(&text).unwrap().miou.is_nan());
        }
    }

    #[test]
    fn a_prediction_on_a_void_pixel_moves_nothing() {
        let with = counted(3, &[0, 1, VOID, 2], &[0, 1, 0, 1]);
        let other = counted(3, &[0, 1, VOID, 2], &[0, 1, 2, 1]);
        assert_eq!(with, other);
        assert_eq!(with, counted(3, &[0, 1, 2], &[0, 1, 1]));
    }

    #[test]
    fn a_missing_answer_is_a_miss_and_no_false_alarm() {
        let mut confusion = Confusion::new(2);
        confusion.add_abstaining(&[0, 0, 1, VOID], &[0, VOID, 1, VOID], VOID).unwrap();
        let scores = confusion.scores();
        assert_eq!(scores.iou, [Some(0.5), Some(1.0)]);
        assert_eq!((scores.pixel_accuracy, scores.n_pixels), (2.0 / 3.0, 3));
        assert_eq!(confusion.abstained(), [1, 0]);
        // Without such an answer both ways of counting agree.
        let mut plain = Confusion::new(2);
        plain.add_abstaining(&[0, 1, 1, VOID], &[0, 1, 0, 1], VOID).unwrap();
        assert_eq!(plain, counted(2, &[0, 1, 1, VOID], &[0, 1, 0, 1]));
    }

    #[test]
    fn errors_name_place_and_value_and_change_nothing() {
        let mut confusion = counted(3, &[0, 1, 2], &[0, 1, 1]);
        let before = confusion.clone();
        let message = confusion.add(&[0, 1, 3, 0], &[0, 0, 0, 0], VOID).unwrap_err().to_string();
        assert!(message.starts_with("label 3 at pixel 2, expected 0..3 or void 255\n  hint: "), "{message}");
        let message = confusion.add(&[0, 1, 2, VOID], &[0, 0, 0, 7], VOID).unwrap_err().to_string();
        assert!(message.starts_with("prediction 7 at pixel 3, expected 0..3\n  hint: "), "{message}");
        let error = confusion.add_abstaining(&[0, 1], &[VOID, 3], VOID).unwrap_err();
        assert!(matches!(error, EvalError::Prediction { index: 1, value: 3, n_classes: 3 }));
        let message = confusion.add(&[0, 1], &[0], VOID).unwrap_err().to_string();
        assert!(message.contains("found 1 predictions, expected 2 labels"), "{message}");
        assert!(matches!(confusion.add(&[0], &[0], 2), Err(EvalError::Config { .. })));
        assert!(matches!(confusion.merge(&Confusion::new(4)), Err(EvalError::Shape { .. })));
        assert!(matches!(Confusion::from_counts(2, vec![0; 3]), Err(EvalError::Shape { .. })));
        assert_eq!(confusion, before);
    }

    #[test]
    fn counts_past_32_bits_stay_exact() {
        let big = 1u64 << 40;
        let mut confusion = Confusion::from_counts(2, vec![big, 1, 2, big]).unwrap();
        confusion.merge(&confusion.clone()).unwrap();
        assert_eq!(confusion.counts(), [2 * big, 2, 4, 2 * big]);
        assert_eq!(confusion.scores().n_pixels, 4 * big + 6);
    }
}
