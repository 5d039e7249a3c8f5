//! Why weights do not fit: every difference at once, listed up to a bound and counted beyond it.

use std::path::PathBuf;

use segdistill_ops::ShapeDifference;

use super::file::WeightFile;

/// Differences of each kind that a message lists; the others are counted. No network here has more tensors.
const MAX_LISTED: usize = 3000;

/// Why the weights of a file do not fit.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
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
    #[serde(serialize_with = "shapes")]
    pub shapes: Vec<ShapeDifference>,
    /// Tensors that are no floats, by their name there.
    pub dtypes: Vec<String>,
    /// Tensors that hold NaN or infinity, by their name there.
    pub non_finite: Vec<String>,
    /// Classes of the file and of the network, where the classifier differs.
    pub classes: Option<(usize, usize)>,
    /// What the file is, where its tensors show why it cannot fit.
    pub cause: Option<String>,
    /// Dictionaries that lie beside the tensors in a checkpoint and were not looked into.
    pub beside: Vec<String>,
}

fn shapes<S: serde::Serializer>(all: &[ShapeDifference], serializer: S) -> Result<S::Ok, S::Error> {
    #[derive(serde::Serialize)]
    struct Written<'a> {
        name: &'a str,
        found: &'a [usize],
        expected: &'a [usize],
    }
    serializer.collect_seq(all.iter().map(|d| Written { name: &d.name, found: &d.found, expected: &d.expected }))
}

impl Misfit {
    pub(super) fn n_tensors(&self) -> usize {
        self.missing.len() + self.unexpected.len() + self.shapes.len() + self.dtypes.len() + self.non_finite.len()
    }

    /// Looks for the one reason behind the differences.
    pub(super) fn explain(&mut self, file: &WeightFile) {
        let is_dictionary = |other: &String| Some(other.strip_suffix(" (a dictionary)")?.to_string());
        self.beside = file.others().iter().filter_map(is_dictionary).collect();
        // The first convolution alone reads three channels.
        let images = self.shapes.iter().find_map(|d| match (d.found.as_slice(), d.expected.as_slice()) {
            ([a, found, ..], [b, 3, ..]) if a == b && d.found.len() == 4 && d.found[2..] == d.expected[2..] => {
                Some(*found).filter(|found| *found != 3)
            }
            _ => None,
        });
        let has = |part: &str| self.unexpected.iter().any(|name| name.contains(part));
        let without_norm =
            self.missing.iter().any(|(there, here)| here.starts_with("decoder.") && there.ends_with("running_mean"));
        let binary = self.shapes.iter().any(|d| {
            let classifier = d.name.contains("segmentation_head") || d.name.contains("classifier");
            classifier && d.found.first() == Some(&1)
        });
        self.cause = if let Some(n) = images {
            Some(format!("the file takes images of {n} channels, this program takes RGB"))
        } else if binary {
            Some("the file gives one logit for two classes; networks here give one a class".to_string())
        } else if has(".attention1.") || has(".attention2.") {
            Some("the file has attention in its decoder, as `decoder_attention_type` builds it".to_string())
        } else if without_norm
            && !self.unexpected.is_empty()
            && self.unexpected.iter().all(|name| name.ends_with(".bias"))
        {
            Some("the file has a decoder without normalisation, as `decoder_use_norm=False` builds it".to_string())
        } else {
            None
        };
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
        match (self.classes, &self.cause) {
            (_, Some(cause)) => write!(f, "\n  hint: {cause}"),
            (Some((found, expected)), _) => write!(
                f,
                "\n  hint: the file has {found} classes, the network {expected}; ask for a new classifier, or for {found} classes"
            ),
            _ if !self.non_finite.is_empty() => {
                write!(f, "\n  hint: the training that wrote it diverged; take an earlier checkpoint")
            }
            _ if !self.beside.is_empty() => {
                let keys: Vec<String> = self.beside.iter().map(|key| format!("`{key}`")).collect();
                let (all, first) = (keys.join(", "), &self.beside[0]);
                write!(f, "\n  hint: beside these tensors lies a dictionary {all}: --key {first} looks into it")
            }
            _ => write!(f, "\n  hint: another network, encoder or layout may fit: `weights inspect` lists the names"),
        }
    }
}
