//! `metrics.csv` (one row a step) and `val.csv` (one row an evaluation) of a stage.

use std::io::Write;
use std::path::{Path, PathBuf};

use segdistill_eval::table::write_atomic;

use crate::error::{Result, TrainError};
use crate::stage::{StepRecord, ValRecord};

/// Appends rows; a resumed stage first drops the rows its checkpoint does not cover.
#[derive(Debug)]
pub(crate) struct MetricsLog {
    metrics: fs_err::File,
    val: fs_err::File,
    has_critic: bool,
}

const METRICS: &str = "metrics.csv";
const VAL: &str = "val.csv";
const VAL_HEADER: &str = "step,miou,pixel_accuracy,mean_accuracy,fw_iou";

fn header(terms: &[String], has_critic: bool) -> String {
    let columns: String = terms.iter().map(|t| format!("loss_{t},weight_{t},")).collect();
    let critic = if has_critic { "critic," } else { "" };
    format!("step,loss,{columns}{critic}lr,grad_norm,images_per_second")
}

impl MetricsLog {
    /// Opens both files of `dir`, keeping the rows of steps up to `done`.
    pub(crate) fn open(dir: &Path, terms: &[String], has_critic: bool, done: u64) -> Result<Self> {
        Ok(Self {
            metrics: keep(&dir.join(METRICS), &header(terms, has_critic), done)?,
            val: keep(&dir.join(VAL), VAL_HEADER, done)?,
            has_critic,
        })
    }

    pub(crate) fn step(&mut self, r: &StepRecord) -> Result<()> {
        let terms: String = r
            .terms
            .iter()
            .map(|t| match t.value {
                Some(v) => format!("{v},{},", t.weight),
                None => format!(",{},", t.weight),
            })
            .collect();
        let critic = match (self.has_critic, r.critic) {
            (false, _) => String::new(),
            (true, None) => ",".to_string(),
            (true, Some(loss)) => format!("{loss},"),
        };
        let StepRecord { step, loss, lr, grad_norm, images_per_second, .. } = r;
        writeln!(self.metrics, "{step},{loss},{terms}{critic}{lr},{grad_norm},{images_per_second}")?;
        Ok(())
    }

    pub(crate) fn val(&mut self, r: &ValRecord) -> Result<()> {
        let s = &r.scores;
        writeln!(self.val, "{},{},{},{},{}", r.step, s.miou, s.pixel_accuracy, s.mean_accuracy, s.fw_iou)?;
        Ok(())
    }

    /// Puts every row on disk, before a checkpoint that counts on them.
    pub(crate) fn sync(&mut self) -> Result<()> {
        self.metrics.sync_data()?;
        self.val.sync_data()?;
        Ok(())
    }
}

/// Opens `path` for appending, with the header and the rows whose step is at most `done`.
fn keep(path: &Path, header: &str, done: u64) -> Result<fs_err::File> {
    let mut kept = format!("{header}\n");
    if done > 0 {
        let text = fs_err::read_to_string(path)?;
        let mut lines = text.lines();
        if lines.next() != Some(header) {
            return Err(TrainError::Checkpoint {
                path: path.to_path_buf(),
                why: "its columns are those of another objective".into(),
                hint: "resume with the objective the run was started with",
            });
        }
        for line in lines {
            let step = line.split(',').next().and_then(|s| s.parse::<u64>().ok());
            if step.is_some_and(|s| s <= done) {
                kept.push_str(line);
                kept.push('\n');
            }
        }
    }
    write_atomic(path, kept.as_bytes())?;
    Ok(fs_err::OpenOptions::new().append(true).open(path)?)
}

/// Columns of a CSV of numbers: (name, values); an empty field is NaN.
type Columns = Vec<(String, Vec<f64>)>;

fn read_columns(path: PathBuf) -> Result<Columns> {
    let text = fs_err::read_to_string(&path)?;
    let bad = |line: usize| TrainError::Checkpoint {
        path: path.clone(),
        why: format!("line {line} is not a row of numbers"),
        hint: "the file is written by the training loop; train the stage again",
    };
    let mut lines = text.lines();
    let mut columns: Columns = lines.next().unwrap_or("").split(',').map(|n| (n.to_string(), Vec::new())).collect();
    for (i, line) in lines.enumerate() {
        let fields: Vec<&str> = line.split(',').collect();
        if fields.len() != columns.len() {
            return Err(bad(i + 2));
        }
        for ((_, values), field) in columns.iter_mut().zip(fields) {
            values.push(if field.is_empty() { f64::NAN } else { field.parse().map_err(|_| bad(i + 2))? });
        }
    }
    Ok(columns)
}

/// Columns of the stage folder's `metrics.csv`.
///
/// # Errors
/// `Io` when it is absent, `Checkpoint` when a line is broken.
pub fn read_metrics(stage_dir: &Path) -> Result<Columns> {
    read_columns(stage_dir.join(METRICS))
}

/// Columns of the stage folder's `val.csv`.
///
/// # Errors
/// As [`read_metrics`].
pub fn read_validation(stage_dir: &Path) -> Result<Columns> {
    read_columns(stage_dir.join(VAL))
}
