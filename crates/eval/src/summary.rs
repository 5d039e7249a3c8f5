//! `summary.json`: everything one evaluation of one stage on one split found.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::confusion::Scores;
use crate::error::{EvalError, Result};
use crate::table::{ResultRow, write_atomic};

/// One evaluation, as kept in `eval/<split>/summary.json` of a stage.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// Stage, as `teacher` or `ce/seed-0`.
    pub stage: String,
    /// Data set.
    pub dataset: String,
    /// Rows and columns of the label maps that were scored.
    pub label_hw: [usize; 2],
    /// How the label maps were predicted, as `whole image, bilinear logits`.
    pub mode: String,
    /// Class names, in the order of `scores.iou`.
    pub class_names: Vec<String>,
    /// The row of the results table.
    pub result: ResultRow,
    /// All scores.
    pub scores: Scores,
}

impl Summary {
    /// Writes the file, whole or not at all.
    ///
    /// # Errors
    /// `Io` naming the file.
    pub fn write(&self, path: &Path) -> Result<()> {
        let mut text = serde_json::to_string_pretty(self).map_err(|e| EvalError::table(path, e.to_string()))?;
        text.push('\n');
        write_atomic(path, text.as_bytes())
    }

    /// Reads the file.
    ///
    /// # Errors
    /// `Io` naming the file, or `Table` with the place of the first fault.
    pub fn read(path: &Path) -> Result<Self> {
        serde_json::from_str(&fs_err::read_to_string(path)?).map_err(|e| EvalError::table(path, e.to_string()))
    }
}
