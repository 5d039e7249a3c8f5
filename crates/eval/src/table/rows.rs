//! The rows of each table, their frames, and the way back.

use polars::prelude::{Column, DataFrame, DataType, NamedFrom, Series};
use serde::{Deserialize, Serialize};

use crate::confusion::{Confusion, Scores, nan_as_null};
use crate::error::{EvalError, Result};

/// One model on one split: a row of `results.csv`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ResultRow {
    /// Training method in lower case, as `ce` or `csc+ce`.
    pub method: String,
    /// What the model is in the comparison: `teacher`, `student`, or a word of the caller's.
    pub role: String,
    /// Encoder, as `resnet34`; empty when unknown.
    pub encoder: String,
    /// `train`, `val` or `test`.
    pub split: String,
    /// Seed of the training run.
    pub seed: u64,
    /// Mean IoU over the classes present, as a fraction.
    #[serde(with = "nan_as_null")]
    pub miou: f64,
    /// Share of valid pixels that are right.
    #[serde(with = "nan_as_null")]
    pub pixel_accuracy: f64,
    /// Mean over classes of the share of their pixels that are right.
    #[serde(with = "nan_as_null")]
    pub mean_accuracy: f64,
    /// IoU weighted by the classes' share of pixels.
    #[serde(with = "nan_as_null")]
    pub fw_iou: f64,
    /// Number of classes `miou` averages.
    pub n_classes_present: usize,
    /// Images evaluated.
    pub n_images: usize,
    /// Trainable parameters; `None` for predictions of unknown origin.
    pub params: Option<u64>,
    /// Multiply-accumulates of one image; `None` for predictions of unknown origin.
    pub macs: Option<u64>,
    /// Share of valid pixels to which the student gives the teacher's class, right or wrong; `None` where they were not
    /// compared.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agreement: Option<f64>,
    /// Name of the run among those compared; empty where there is only one.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub run: String,
}

impl ResultRow {
    /// A row of these scores, of a model of unknown size.
    pub fn new(
        method: &str,
        role: &str,
        encoder: &str,
        split: &str,
        seed: u64,
        scores: &Scores,
        n_images: usize,
    ) -> Self {
        Self {
            method: method.to_string(),
            role: role.to_string(),
            encoder: encoder.to_string(),
            split: split.to_string(),
            seed,
            miou: scores.miou,
            pixel_accuracy: scores.pixel_accuracy,
            mean_accuracy: scores.mean_accuracy,
            fw_iou: scores.fw_iou,
            n_classes_present: scores.n_classes_present,
            n_images,
            params: None,
            macs: None,
            agreement: None,
            run: String::new(),
        }
    }

    /// The same row with the model's size.
    pub fn with_size(mut self, params: u64, macs: u64) -> Self {
        (self.params, self.macs) = (Some(params), Some(macs));
        self
    }

    /// The same row as one of the run of this name.
    pub fn with_run(mut self, run: &str) -> Self {
        self.run = run.to_string();
        self
    }
}

/// One class of one model on one split: a row of `per_class.csv`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PerClassRow {
    /// As [`ResultRow::method`].
    pub method: String,
    /// As [`ResultRow::role`].
    pub role: String,
    /// As [`ResultRow::encoder`].
    pub encoder: String,
    /// As [`ResultRow::split`].
    pub split: String,
    /// As [`ResultRow::seed`].
    pub seed: u64,
    /// Class index.
    pub class_idx: usize,
    /// Class name.
    pub class: String,
    /// IoU; `None` when the class is absent from labels and predictions.
    pub iou: Option<f64>,
    /// Share of the class's pixels found; `None` when it is absent from the labels.
    pub accuracy: Option<f64>,
    /// Ground-truth pixels of the class.
    pub n_pixels: u64,
    /// As [`ResultRow::run`].
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub run: String,
}

/// Time of one stage: a row of `timings.csv`, kept apart from results because no two runs agree on it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TimingRow {
    /// As [`ResultRow::method`].
    pub method: String,
    /// As [`ResultRow::role`].
    pub role: String,
    /// As [`ResultRow::seed`].
    pub seed: u64,
    /// What was timed, as `train` or `eval val`.
    pub stage: String,
    /// Wall seconds.
    pub seconds: f64,
    /// Optimizer steps, or images evaluated, within that time.
    pub n_steps: u64,
    /// As [`ResultRow::run`].
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub run: String,
}

/// The rows of every class of one result.
///
/// # Errors
/// `Shape` when the names are not as many as the classes scored.
pub fn per_class_rows(row: &ResultRow, class_names: &[String], scores: &Scores) -> Result<Vec<PerClassRow>> {
    same_number(class_names.len(), scores.iou.len())?;
    Ok((0..scores.iou.len())
        .map(|i| PerClassRow {
            method: row.method.clone(),
            role: row.role.clone(),
            encoder: row.encoder.clone(),
            split: row.split.clone(),
            seed: row.seed,
            class_idx: i,
            class: class_names[i].clone(),
            iou: scores.iou[i],
            accuracy: scores.class_accuracy[i],
            n_pixels: scores.class_pixels[i],
            run: row.run.clone(),
        })
        .collect())
}

fn same_number(n_names: usize, n_classes: usize) -> Result<()> {
    if n_names == n_classes {
        return Ok(());
    }
    Err(EvalError::shape(
        "class names",
        format!("{n_names} names"),
        format!("{n_classes} classes"),
        "pass the names of the class table that was scored",
    ))
}

pub(crate) fn texts<R>(rows: &[R], name: &str, value: impl Fn(&R) -> &str) -> Column {
    Series::new(name.into(), rows.iter().map(value).collect::<Vec<&str>>()).into()
}

pub(crate) fn counts<R>(rows: &[R], name: &str, value: impl Fn(&R) -> u64) -> Column {
    Series::new(name.into(), rows.iter().map(value).collect::<Vec<u64>>()).into()
}

pub(crate) fn counts_or_null<R>(rows: &[R], name: &str, value: impl Fn(&R) -> Option<u64>) -> Column {
    Series::new(name.into(), rows.iter().map(value).collect::<Vec<Option<u64>>>()).into()
}

pub(crate) fn numbers<R>(rows: &[R], name: &str, value: impl Fn(&R) -> Option<f64>) -> Column {
    let finite = |row| value(row).filter(|v: &f64| v.is_finite());
    Series::new(name.into(), rows.iter().map(finite).collect::<Vec<Option<f64>>>()).into()
}

/// A frame of the columns, with the runs as the last one where any row names its run: a single run has no such column.
pub(crate) fn frame<R>(rows: &[R], mut columns: Vec<Column>, run: impl Fn(&R) -> &str) -> Result<DataFrame> {
    if rows.iter().any(|r| !run(r).is_empty()) {
        columns.push(texts(rows, RUN, run));
    }
    Ok(DataFrame::new_infer_height(columns)?)
}

const RUN: &str = "run";
const AGREEMENT: &str = "agreement";

/// The frame of `results.csv`: method, role, encoder, split, seed, miou, pixel_accuracy, mean_accuracy, fw_iou,
/// n_classes_present, n_images, params, macs, agreement where a row has one, and run where a row names one.
pub fn results_frame(rows: &[ResultRow]) -> Result<DataFrame> {
    let mut columns = vec![
        texts(rows, "method", |r| &r.method),
        texts(rows, "role", |r| &r.role),
        texts(rows, "encoder", |r| &r.encoder),
        texts(rows, "split", |r| &r.split),
        counts(rows, "seed", |r| r.seed),
        numbers(rows, "miou", |r| Some(r.miou)),
        numbers(rows, "pixel_accuracy", |r| Some(r.pixel_accuracy)),
        numbers(rows, "mean_accuracy", |r| Some(r.mean_accuracy)),
        numbers(rows, "fw_iou", |r| Some(r.fw_iou)),
        counts(rows, "n_classes_present", |r| r.n_classes_present as u64),
        counts(rows, "n_images", |r| r.n_images as u64),
        counts_or_null(rows, "params", |r| r.params),
        counts_or_null(rows, "macs", |r| r.macs),
    ];
    if rows.iter().any(|r| r.agreement.is_some()) {
        columns.push(numbers(rows, AGREEMENT, |r| r.agreement));
    }
    frame(rows, columns, |r| &r.run)
}

/// The rows of a frame as [`results_frame`] makes it; more columns are allowed, and a missing run is empty.
///
/// # Errors
/// `Polars` for a missing column or one of another kind, `Config` for a null where a value must be.
pub fn results_from_frame(frame: &DataFrame) -> Result<Vec<ResultRow>> {
    if frame.height() == 0 {
        return Ok(Vec::new());
    }
    let read = Reader(frame);
    let (method, role, encoder) = (read.texts("method")?, read.texts("role")?, read.texts("encoder")?);
    let (split, seed) = (read.texts("split")?, read.counts("seed")?);
    let (miou, pixel) = (read.numbers("miou")?, read.numbers("pixel_accuracy")?);
    let (mean, fw) = (read.numbers("mean_accuracy")?, read.numbers("fw_iou")?);
    let (present, images) = (read.counts("n_classes_present")?, read.counts("n_images")?);
    let (params, macs, run) = (read.counts_or_null("params")?, read.counts_or_null("macs")?, read.runs()?);
    let agreement = match frame.column(AGREEMENT) {
        Ok(_) => read.numbers(AGREEMENT)?,
        Err(_) => vec![None; frame.height()],
    };
    Ok((0..frame.height())
        .map(|i| ResultRow {
            method: method[i].clone(),
            role: role[i].clone(),
            encoder: encoder[i].clone(),
            split: split[i].clone(),
            seed: seed[i],
            miou: miou[i].unwrap_or(f64::NAN),
            pixel_accuracy: pixel[i].unwrap_or(f64::NAN),
            mean_accuracy: mean[i].unwrap_or(f64::NAN),
            fw_iou: fw[i].unwrap_or(f64::NAN),
            n_classes_present: present[i] as usize,
            n_images: images[i] as usize,
            params: params[i],
            macs: macs[i],
            agreement: agreement[i],
            run: run[i].clone(),
        })
        .collect())
}

/// The frame of `per_class.csv`: method, role, encoder, split, seed, class_idx, class, iou, accuracy, n_pixels, and
/// run where a row names one.
pub fn per_class_frame(rows: &[PerClassRow]) -> Result<DataFrame> {
    let columns = vec![
        texts(rows, "method", |r| &r.method),
        texts(rows, "role", |r| &r.role),
        texts(rows, "encoder", |r| &r.encoder),
        texts(rows, "split", |r| &r.split),
        counts(rows, "seed", |r| r.seed),
        counts(rows, "class_idx", |r| r.class_idx as u64),
        texts(rows, "class", |r| &r.class),
        numbers(rows, "iou", |r| r.iou),
        numbers(rows, "accuracy", |r| r.accuracy),
        counts(rows, "n_pixels", |r| r.n_pixels),
    ];
    frame(rows, columns, |r| &r.run)
}

/// The rows of a frame as [`per_class_frame`] makes it.
///
/// # Errors
/// As [`results_from_frame`].
pub fn per_class_from_frame(frame: &DataFrame) -> Result<Vec<PerClassRow>> {
    if frame.height() == 0 {
        return Ok(Vec::new());
    }
    let read = Reader(frame);
    let (method, role, encoder) = (read.texts("method")?, read.texts("role")?, read.texts("encoder")?);
    let (split, seed) = (read.texts("split")?, read.counts("seed")?);
    let (class_idx, class) = (read.counts("class_idx")?, read.texts("class")?);
    let (iou, accuracy, n_pixels) = (read.numbers("iou")?, read.numbers("accuracy")?, read.counts("n_pixels")?);
    let run = read.runs()?;
    Ok((0..frame.height())
        .map(|i| PerClassRow {
            method: method[i].clone(),
            role: role[i].clone(),
            encoder: encoder[i].clone(),
            split: split[i].clone(),
            seed: seed[i],
            class_idx: class_idx[i] as usize,
            class: class[i].clone(),
            iou: iou[i],
            accuracy: accuracy[i],
            n_pixels: n_pixels[i],
            run: run[i].clone(),
        })
        .collect())
}

/// The frame of `timings.csv`: method, role, seed, stage, seconds, n_steps, and run where a row names one.
pub fn timings_frame(rows: &[TimingRow]) -> Result<DataFrame> {
    let columns = vec![
        texts(rows, "method", |r| &r.method),
        texts(rows, "role", |r| &r.role),
        counts(rows, "seed", |r| r.seed),
        texts(rows, "stage", |r| &r.stage),
        numbers(rows, "seconds", |r| Some(r.seconds)),
        counts(rows, "n_steps", |r| r.n_steps),
    ];
    frame(rows, columns, |r| &r.run)
}

/// The rows of a frame as [`timings_frame`] makes it.
///
/// # Errors
/// As [`results_from_frame`].
pub fn timings_from_frame(frame: &DataFrame) -> Result<Vec<TimingRow>> {
    if frame.height() == 0 {
        return Ok(Vec::new());
    }
    let read = Reader(frame);
    let (method, role, seed) = (read.texts("method")?, read.texts("role")?, read.counts("seed")?);
    let (stage, seconds, n_steps) = (read.texts("stage")?, read.numbers("seconds")?, read.counts("n_steps")?);
    let run = read.runs()?;
    Ok((0..frame.height())
        .map(|i| TimingRow {
            method: method[i].clone(),
            role: role[i].clone(),
            seed: seed[i],
            stage: stage[i].clone(),
            seconds: seconds[i].unwrap_or(f64::NAN),
            n_steps: n_steps[i],
            run: run[i].clone(),
        })
        .collect())
}

const GROUND_TRUTH: &str = "ground_truth";
const NO_CLASS: &str = "no class predicted";

/// The frame of `confusion.csv`: a row for each ground-truth class (column `ground_truth` holds its name) and a column
/// for each predicted class; pixels without a predicted class stand in a last column where there are any.
///
/// # Errors
/// `Shape` when the names are not as many as the classes, `Polars` when two classes share a name.
pub fn confusion_frame(confusion: &Confusion, class_names: &[String]) -> Result<DataFrame> {
    let c = confusion.n_classes();
    same_number(class_names.len(), c)?;
    let mut columns = vec![texts(class_names, GROUND_TRUTH, |name| name)];
    for (j, name) in class_names.iter().enumerate() {
        let column: Vec<u64> = (0..c).map(|i| confusion.counts()[i * c + j]).collect();
        columns.push(Series::new(name.as_str().into(), column).into());
    }
    if confusion.abstained().iter().any(|&n| n > 0) {
        columns.push(Series::new(NO_CLASS.into(), confusion.abstained().to_vec()).into());
    }
    Ok(DataFrame::new_infer_height(columns)?)
}

/// The matrix and the class names of a frame as [`confusion_frame`] makes it.
///
/// # Errors
/// As [`results_from_frame`].
pub fn confusion_from_frame(frame: &DataFrame) -> Result<(Confusion, Vec<String>)> {
    let read = Reader(frame);
    let names = read.texts(GROUND_TRUTH)?;
    let c = names.len();
    let mut matrix = vec![0; c * c];
    for (j, name) in names.iter().enumerate() {
        for (i, count) in read.counts(name)?.into_iter().enumerate() {
            matrix[i * c + j] = count;
        }
    }
    let mut confusion = Confusion::from_counts(c, matrix)?;
    if frame.column(NO_CLASS).is_ok() {
        confusion.set_abstained(read.counts(NO_CLASS)?)?;
    }
    Ok((confusion, names))
}

/// Columns of a frame as vectors, whatever number type the file format gave them.
struct Reader<'a>(&'a DataFrame);

impl Reader<'_> {
    fn column(&self, name: &str, kind: &DataType) -> Result<Column> {
        Ok(self.0.column(name)?.strict_cast(kind)?)
    }

    fn texts(&self, name: &str) -> Result<Vec<String>> {
        // An empty text and a missing one are the same bytes in CSV.
        let column = self.column(name, &DataType::String)?;
        Ok(column.str()?.iter().map(|v| v.unwrap_or_default().to_string()).collect())
    }

    /// The names of the runs; all empty where the frame has no such column.
    fn runs(&self) -> Result<Vec<String>> {
        match self.0.column(RUN) {
            Ok(_) => self.texts(RUN),
            Err(_) => Ok(vec![String::new(); self.0.height()]),
        }
    }

    fn counts_or_null(&self, name: &str) -> Result<Vec<Option<u64>>> {
        Ok(self.column(name, &DataType::UInt64)?.u64()?.iter().collect())
    }

    fn counts(&self, name: &str) -> Result<Vec<u64>> {
        let values = self.counts_or_null(name)?;
        values
            .iter()
            .enumerate()
            .map(|(i, value)| {
                value.ok_or_else(|| {
                    EvalError::config(
                        format!("column `{name}` is empty at row {i}"),
                        "every row needs a whole number here",
                    )
                })
            })
            .collect()
    }

    fn numbers(&self, name: &str) -> Result<Vec<Option<f64>>> {
        Ok(self.column(name, &DataType::Float64)?.f64()?.iter().collect())
    }
}
