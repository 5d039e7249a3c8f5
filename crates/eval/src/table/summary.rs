//! Rows of one model under several seeds, summarised.

use polars::prelude::DataFrame;
use serde::{Deserialize, Serialize};

use super::rows::{ResultRow, counts, counts_or_null, frame, numbers, texts};
use crate::error::Result;
use crate::stats::MeanSd;

/// One model on one split over all its seeds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SummaryRow {
    /// As [`ResultRow::method`].
    pub method: String,
    /// As [`ResultRow::role`].
    pub role: String,
    /// As [`ResultRow::encoder`].
    pub encoder: String,
    /// As [`ResultRow::split`].
    pub split: String,
    /// Seeds, in the order of the rows.
    pub seeds: Vec<u64>,
    /// Mean IoU.
    pub miou: MeanSd,
    /// Pixel accuracy.
    pub pixel_accuracy: MeanSd,
    /// Mean class accuracy.
    pub mean_accuracy: MeanSd,
    /// Frequency-weighted IoU.
    pub fw_iou: MeanSd,
    /// Smallest and largest number of classes present among the seeds.
    pub n_classes_present: [usize; 2],
    /// Images evaluated, the largest among the seeds.
    pub n_images: usize,
    /// Trainable parameters, of the first row.
    pub params: Option<u64>,
    /// Multiply-accumulates of one image, of the first row.
    pub macs: Option<u64>,
    /// Agreement with the teacher, of the rows that have it.
    #[serde(default)]
    pub agreement: Option<MeanSd>,
    /// As [`ResultRow::run`].
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub run: String,
}

impl SummaryRow {
    /// Whether both rows are of one model (run, role, method and encoder), on whatever split.
    pub fn same_model(&self, other: &SummaryRow) -> bool {
        (&self.run, &self.role, &self.method, &self.encoder) == (&other.run, &other.role, &other.method, &other.encoder)
    }
}

/// Mean and sample deviation over seeds for each model of each run and each split, in the order of first appearance.
pub fn summarize(rows: &[ResultRow]) -> Vec<SummaryRow> {
    let mut groups: Vec<Vec<&ResultRow>> = Vec::new();
    let same = |a: &ResultRow, b: &ResultRow| {
        (&a.run, &a.role, &a.method, &a.encoder, &a.split) == (&b.run, &b.role, &b.method, &b.encoder, &b.split)
    };
    for row in rows {
        match groups.iter_mut().find(|g| same(g[0], row)) {
            Some(group) => group.push(row),
            None => groups.push(vec![row]),
        }
    }
    groups
        .iter()
        .map(|group| {
            let of = |value: fn(&ResultRow) -> f64| MeanSd::of(group.iter().map(|r| value(r)));
            let present = group.iter().map(|r| r.n_classes_present);
            SummaryRow {
                method: group[0].method.clone(),
                role: group[0].role.clone(),
                encoder: group[0].encoder.clone(),
                split: group[0].split.clone(),
                seeds: group.iter().map(|r| r.seed).collect(),
                miou: of(|r| r.miou),
                pixel_accuracy: of(|r| r.pixel_accuracy),
                mean_accuracy: of(|r| r.mean_accuracy),
                fw_iou: of(|r| r.fw_iou),
                n_classes_present: [present.clone().min().unwrap_or(0), present.max().unwrap_or(0)],
                n_images: group.iter().map(|r| r.n_images).max().unwrap_or(0),
                params: group[0].params,
                macs: group[0].macs,
                agreement: Some(MeanSd::of(group.iter().filter_map(|r| r.agreement))).filter(|m| m.n > 0),
                run: group[0].run.clone(),
            }
        })
        .collect()
}

/// The frame of a summary: method, role, encoder, split, n_seeds, then mean and deviation of each score, the least
/// number of classes present, n_images, params, macs, and run where a row names one.
pub fn summary_frame(rows: &[SummaryRow]) -> Result<DataFrame> {
    let mut columns = vec![
        texts(rows, "method", |r| &r.method),
        texts(rows, "role", |r| &r.role),
        texts(rows, "encoder", |r| &r.encoder),
        texts(rows, "split", |r| &r.split),
        counts(rows, "n_seeds", |r| r.seeds.len() as u64),
    ];
    let scores: [(&str, fn(&SummaryRow) -> MeanSd); 4] = [
        ("miou", |r| r.miou),
        ("pixel_accuracy", |r| r.pixel_accuracy),
        ("mean_accuracy", |r| r.mean_accuracy),
        ("fw_iou", |r| r.fw_iou),
    ];
    for (name, score) in scores {
        columns.push(numbers(rows, &format!("{name}_mean"), |r| Some(score(r).mean)));
        columns.push(numbers(rows, &format!("{name}_sd"), |r| score(r).sd));
    }
    columns.push(counts(rows, "n_classes_present", |r| r.n_classes_present[0] as u64));
    columns.push(counts(rows, "n_images", |r| r.n_images as u64));
    columns.push(counts_or_null(rows, "params", |r| r.params));
    columns.push(counts_or_null(rows, "macs", |r| r.macs));
    frame(rows, columns, |r| &r.run)
}
