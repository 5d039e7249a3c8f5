//! Scores, tables and reports for semantic segmentation.
//!
//! Label maps go in, honest numbers come out: one [`Confusion`] matrix in u64 over a whole split gives the [`Scores`];
//! [`predict_labels`] turns logits into label maps; [`table`] keeps results as polars frames in CSV, Parquet and JSON;
//! [`report`] writes one self-contained HTML page, and Markdown, about any number of models.
//!
//! What does not live here: data sets, networks, training. This crate scores label images made by anything.
//!
//! # Example
//! Scoring the predictions of another program, and writing the table and the page:
//! ```
//! use std::path::Path;
//!
//! use segdistill_eval::report::Report;
//! use segdistill_eval::table::{ResultRow, per_class_rows, read_table, results_frame, results_from_frame, write_all, write_atomic};
//! use segdistill_eval::{Confusion, Result};
//!
//! fn score(out: &Path) -> Result<()> {
//!     let (void, class_names) = (255, vec!["road".to_string(), "car".to_string()]);
//!     // One (labels, predictions) pair an image, as bytes; read them with whatever made them.
//!     let images = [([0u8, 0, 1, void], [0u8, 1, 1, 0]), ([0, 0, 0, 1], [0, 0, 0, 1])];
//!     let mut confusion = Confusion::new(class_names.len());
//!     for (labels, predictions) in &images {
//!         confusion.add(labels, predictions, void)?;
//!     }
//!     let scores = confusion.scores();
//!     assert_eq!(scores.iou, [Some(0.8), Some(2.0 / 3.0)]);
//!
//!     let row = ResultRow::new("their-net", "predictions", "", "val", 0, &scores, images.len());
//!     let [csv, _, _] = write_all(&results_frame(&[row.clone()])?, &out.join("results"))?;
//!     assert_eq!(results_from_frame(&read_table(&csv)?)?, [row.clone()]);
//!
//!     let report = Report {
//!         title: "Their network on our street".into(),
//!         splits: vec!["val".into()],
//!         per_class: per_class_rows(&row, &class_names, &scores)?,
//!         rows: vec![row],
//!         class_names,
//!         ..Report::default()
//!     };
//!     write_atomic(&out.join("index.html"), report.to_html().as_bytes())?;
//!     write_atomic(&out.join("report.md"), report.to_markdown().as_bytes())
//! }
//! # let folder = tempfile::tempdir().unwrap();
//! # score(folder.path()).unwrap();
//! # assert!(std::fs::read_to_string(folder.path().join("index.html")).unwrap().contains("their-net reaches 73.33 % mIoU on val"));
//! ```

#![forbid(unsafe_code)]

mod confusion;
mod error;
mod predict;
pub mod report;
pub mod stats;
mod summary;
pub mod table;

pub use confusion::{Confusion, Scores};
pub use error::{EvalError, Result};
pub use predict::predict_labels;
pub use summary::Summary;
