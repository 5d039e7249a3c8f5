//! The report of one comparison: a self-contained HTML page and the same tables as Markdown.
//!
//! A report is plain data; what it says is computed from its rows, so it cannot claim more than they hold. It serves any
//! number of methods, and also a single row of scores without curves or pictures. The page needs no script, no network
//! and no second file. What does not live here: running anything, reading anything, deciding what is compared.

mod chart;
mod costs;
mod curves;
mod format;
mod gains;
mod html;
mod image;
mod markdown;
mod models;
mod sections;

pub use gains::{Gain, Verdict, gains};
pub use image::{ERROR_RIGHT, ERROR_VOID, ERROR_WRONG, RgbBytes, error_map};

use crate::table::{PerClassRow, ResultRow, TimingRow};

/// One line of one chart.
///
/// Curves that share `panel` are drawn in one chart, whose title and vertical axis it names. A label that is a method of
/// the rows of its run, or starts with one and a space or slash (`csc+ce/seed-1`), takes that model's colour; so does
/// `teacher`.
/// Panels with `IoU` or `accuracy` in their name hold fractions and are drawn in percent.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Curve {
    /// Whose curve it is, as `ce seed 0`.
    pub label: String,
    /// Training steps, increasing.
    pub x: Vec<f64>,
    /// One value a step; those not finite break the line.
    pub y: Vec<f64>,
    /// What is drawn, as `loss: csc` or `val mIoU`.
    pub panel: String,
    /// Run the curve belongs to, as in the rows; empty where there is only one.
    pub run: String,
}

/// One image and everything made of it, in one row of pictures.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GalleryRow {
    /// Name of the image.
    pub name: String,
    /// Split it belongs to.
    pub split: String,
    /// Captions and pictures, as input, teacher, ground truth, each student, its error map.
    pub panels: Vec<(String, RgbBytes)>,
}

/// Everything a report shows. Empty parts are left out of the page; splits that are expected and absent are named.
///
/// # Example
/// ```
/// use segdistill_eval::report::Report;
/// let report = Report { title: "Street scenes".into(), ..Report::default() };
/// assert!(report.to_html().contains("<h1>Street scenes</h1>"));
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Report {
    /// Heading of the page.
    pub title: String,
    /// Sentences below the headline.
    pub summary: Vec<String>,
    /// Results, one row for each run, model, split and seed. Where they name several runs, so does every label.
    pub rows: Vec<ResultRow>,
    /// Splits a reader expects, in order; one without rows is said to be absent. Other splits of the rows follow them.
    pub splits: Vec<String>,
    /// Split on which checkpoints were selected.
    pub selection_split: String,
    /// Method that gains are measured against, within each run.
    pub baseline: String,
    /// Class names by index.
    pub class_names: Vec<String>,
    /// Class colours by index.
    pub class_colors: Vec<[u8; 3]>,
    /// Colour of void pixels in the label pictures, when the legend should name it.
    pub void_color: Option<[u8; 3]>,
    /// Scores of each class.
    pub per_class: Vec<PerClassRow>,
    /// Learning curves.
    pub curves: Vec<Curve>,
    /// Rows of pictures.
    pub gallery: Vec<GalleryRow>,
    /// Time of each stage.
    pub timings: Vec<TimingRow>,
    /// The resolved plan, as TOML.
    pub plan_toml: Option<String>,
    /// Facts of the run: resolution, mode, machine, versions, commit.
    pub environment: Vec<(String, String)>,
    /// Remarks and limits.
    pub notes: Vec<String>,
}

impl Default for Report {
    /// An empty report that expects train, val and test, selects on val and measures gains against `ce`.
    fn default() -> Self {
        Self {
            title: String::new(),
            summary: Vec::new(),
            rows: Vec::new(),
            splits: ["train", "val", "test"].map(String::from).to_vec(),
            selection_split: "val".to_string(),
            baseline: "ce".to_string(),
            class_names: Vec::new(),
            class_colors: Vec::new(),
            void_color: None,
            per_class: Vec::new(),
            curves: Vec::new(),
            gallery: Vec::new(),
            timings: Vec::new(),
            plan_toml: None,
            environment: Vec::new(),
            notes: Vec::new(),
        }
    }
}

impl Report {
    /// The page: one HTML file with its style, charts and pictures inside. The same report gives the same bytes.
    pub fn to_html(&self) -> String {
        html::page(self)
    }

    /// The headline and the tables as Markdown, without charts and pictures.
    pub fn to_markdown(&self) -> String {
        markdown::page(self)
    }
}
