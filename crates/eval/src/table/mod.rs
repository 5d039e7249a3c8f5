//! Tables of results: rows as plain structs, polars frames of them, and files of these frames.
//!
//! A table is built from rows, written as CSV, Parquet and JSON, and read back into the same rows. No table holds the
//! time of day or a duration but the one of timings, so two runs of the same seed write the same bytes. A missing number
//! (a class that is absent, a model of unknown size) is null in every format. What does not live here: pages, charts.

mod files;
mod rows;
mod summary;

pub use files::{
    read_csv, read_json, read_parquet, read_table, write_all, write_atomic, write_csv, write_json, write_parquet,
};
pub use rows::{
    PerClassRow, ResultRow, TimingRow, confusion_frame, confusion_from_frame, per_class_frame, per_class_from_frame,
    per_class_rows, results_frame, results_from_frame, timings_frame, timings_from_frame,
};
pub use summary::{SummaryRow, summarize, summary_frame};
