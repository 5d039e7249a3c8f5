//! Why weights do not fit: every difference at once, listed up to a bound and counted beyond it.

use std::path::PathBuf;

use segdistill_ops::ShapeDifference;

/// Differences of each kind that a message lists; the others are counted.
const MAX_LISTED: usize = 12;

/// Why the weights of a file do not fit.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Misfit {
    /// File.
    pub path: PathBuf,
    /// Network or encoder.
    pub model: String,
    /// Layout the names were read by.
    pub layout: String,
    /// Tensors the network needs and the file lacks: name there and here.
    pub missing: Vec<(String, String)>,
    /// Tensors of the file that the network does not know.
    pub unexpected: Vec<String>,
    /// Tensors of another shape, by their name there.
    pub shapes: Vec<ShapeDifference>,
    /// Tensors that are no floats, by their name there.
    pub dtypes: Vec<String>,
    /// Tensors that hold NaN or infinity, by their name there.
    pub non_finite: Vec<String>,
    /// Classes of the file and of the network, where the classifier differs.
    pub classes: Option<(usize, usize)>,
}

impl Misfit {
    pub(super) fn n_tensors(&self) -> usize {
        self.missing.len() + self.unexpected.len() + self.shapes.len() + self.dtypes.len() + self.non_finite.len()
    }

    /// How many tensors differ in each way, in words.
    pub fn counts(&self) -> String {
        let counts = [
            (self.missing.len(), "missing"),
            (self.unexpected.len(), "unexpected"),
            (self.shapes.len(), "of another shape"),
            (self.dtypes.len(), "of another type"),
            (self.non_finite.len(), "not finite"),
        ];
        let counts: Vec<String> =
            counts.iter().filter(|(n, _)| *n > 0).map(|(n, what)| format!("{n} {what}")).collect();
        counts.join(", ")
    }
}

impl std::fmt::Display for Misfit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { path, model, layout, .. } = self;
        write!(f, "`{}` does not fit {model} in layout {layout}: {}", path.display(), self.counts())?;
        let mut list = |what: &str, lines: Vec<String>| -> std::fmt::Result {
            for line in lines.iter().take(MAX_LISTED) {
                write!(f, "\n  {what:<11} {line}")?;
            }
            match lines.len().saturating_sub(MAX_LISTED) {
                0 => Ok(()),
                more => write!(f, "\n  {what:<11} ... and {more} more"),
            }
        };
        let shape = |d: &ShapeDifference| format!("{}: found {:?}, expected {:?}", d.name, d.found, d.expected);
        list("shape", self.shapes.iter().map(shape).collect())?;
        list("type", self.dtypes.clone())?;
        list("missing", self.missing.iter().map(|(there, here)| format!("{there} (here {here})")).collect())?;
        list("unexpected", self.unexpected.clone())?;
        list("not finite", self.non_finite.clone())?;
        match self.classes {
            Some((found, expected)) => write!(
                f,
                "\n  hint: the file has {found} classes, the network {expected}; ask for a new classifier, or for {found} classes"
            ),
            None => {
                write!(f, "\n  hint: another network, encoder or layout may fit: `weights inspect` lists the names")
            }
        }
    }
}
