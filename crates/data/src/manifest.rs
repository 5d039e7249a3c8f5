//! Manifests: what is known about each data set, read from `datasets/*.toml` (embedded in the program).
//!
//! The file is read in two stages: as written (unknown keys are errors), then checked and turned into [`Manifest`].

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::classes::{Class, ClassTable, VOID};
use crate::error::{DataError, Result};
use crate::sample::{LabelMap, Split};

/// Name and text of each manifest the program knows.
const EMBEDDED: [(&str, &str); 3] = [
    ("camvid", include_str!("../../../datasets/camvid.toml")),
    ("cityscapes", include_str!("../../../datasets/cityscapes.toml")),
    ("street-scenes", include_str!("../../../datasets/street-scenes.toml")),
];

/// Where the samples come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Source {
    /// Pictures and label files.
    Files,
    /// Drawn by this crate from a seed.
    Drawn,
}

/// One split as the manifest describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SplitManifest {
    /// Number of samples.
    pub count: usize,
    /// Whether the publishers keep its labels to themselves: its label files hold void only, so nothing can be scored.
    pub labels_withheld: bool,
    /// Where its files lie; `None` for drawn data.
    pub files: Option<SplitFiles>,
}

/// Where the files of a split lie, relative to the data set's folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SplitFiles {
    /// Folder of the images.
    pub images: String,
    /// Folder of the label files.
    pub labels: String,
    /// How image and label file find each other.
    pub pairing: Pairing,
}

/// How image and label file find each other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Pairing {
    /// A list file, relative to the data set's folder: a line for each pair, image first, label file second.
    List(String),
    /// By name: in each of the two folders one folder a city, the files alike but for the endings of their names.
    Suffixes {
        /// Ending of an image.
        image: String,
        /// Ending of a label file.
        label: String,
    },
}

impl SplitFiles {
    /// Whether anything of the split is in the data set's folder `dir`. A folder of images or of label files alone is a
    /// split with a fault, not an absent one.
    pub(crate) fn are_in(&self, dir: &Path) -> bool {
        match &self.pairing {
            Pairing::List(list) => dir.join(list).is_file(),
            Pairing::Suffixes { .. } => [&self.images, &self.labels].iter().any(|folder| dir.join(folder).is_dir()),
        }
    }

    /// The file or folder that tells of the split.
    pub(crate) fn first_looked_for(&self) -> &str {
        match &self.pairing {
            Pairing::List(list) => list,
            Pairing::Suffixes { .. } => &self.images,
        }
    }
}

/// What is known about a data set.
///
/// # Example
/// ```
/// use segdistill_data::{Manifest, Split};
/// let camvid = Manifest::named("camvid")?;
/// assert_eq!(camvid.classes.n_classes(), 11);
/// assert_eq!(camvid.splits[&Split::Val].count, 101);
/// # Ok::<(), segdistill_data::DataError>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Manifest {
    /// Short name, used on the command line and in files.
    pub id: String,
    /// Name for people.
    pub title: String,
    /// Files or drawn.
    pub source: Source,
    /// Licence of the data.
    pub licence: String,
    /// How to obtain it.
    pub obtain: String,
    /// Names the data set's folder may have under a data root.
    pub folders: Vec<String>,
    /// Height and width of every picture (of drawn data: unless asked otherwise).
    pub image_hw: [usize; 2],
    /// Mean of train in [0, 1], where known.
    pub train_rgb_mean: Option<[f64; 3]>,
    /// Standard deviation of train in [0, 1], where known.
    pub train_rgb_std: Option<[f64; 3]>,
    /// Classes by id.
    pub classes: ClassTable,
    /// Pixels of each class in train, where known for all.
    pub train_pixels: Option<Vec<u64>>,
    /// Void pixels in train, where known.
    pub train_void_pixels: Option<u64>,
    /// Splits.
    pub splits: BTreeMap<Split, SplitManifest>,
    /// Id of each value a label file may hold; `None` for values outside the table.
    label_ids: Vec<Option<u8>>,
    /// Value in label files of each class.
    class_labels: Vec<u8>,
    /// Value in label files that is written for void.
    void_label: u8,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    id: String,
    title: String,
    source: Source,
    licence: String,
    obtain: String,
    #[serde(default)]
    folders: Vec<String>,
    image_hw: [usize; 2],
    train_rgb_mean: Option<[f64; 3]>,
    train_rgb_std: Option<[f64; 3]>,
    classes: Vec<WrittenClass>,
    void: WrittenVoid,
    splits: BTreeMap<Split, WrittenSplit>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenClass {
    name: String,
    label: u8,
    color: [u8; 3],
    train_pixels: Option<u64>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenVoid {
    labels: Vec<u8>,
    color: [u8; 3],
    train_pixels: Option<u64>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenSplit {
    count: usize,
    #[serde(default)]
    labels_withheld: bool,
    list: Option<String>,
    images: Option<String>,
    labels: Option<String>,
    image_suffix: Option<String>,
    label_suffix: Option<String>,
}

impl WrittenSplit {
    /// The files of the split; `None` when its keys do not fit `source` or each other.
    fn files(self, source: Source) -> Option<Option<SplitFiles>> {
        let suffixes = match (self.image_suffix, self.label_suffix) {
            (None, None) => None,
            (Some(image), Some(label)) => Some(Pairing::Suffixes { image, label }),
            _ => return None,
        };
        let pairing = match (self.list, suffixes) {
            (None, None) => None,
            (Some(list), None) => Some(Pairing::List(list)),
            (None, suffixes) => suffixes,
            (Some(_), Some(_)) => return None,
        };
        match (source, self.images, self.labels, pairing) {
            (Source::Drawn, None, None, None) => Some(None),
            (Source::Files, Some(images), Some(labels), Some(pairing)) => {
                Some(Some(SplitFiles { images, labels, pairing }))
            }
            _ => None,
        }
    }
}

impl Manifest {
    /// Names of the data sets the program knows.
    pub fn known() -> Vec<&'static str> {
        EMBEDDED.iter().map(|(name, _)| *name).collect()
    }

    /// The manifest called `id`.
    ///
    /// # Errors
    /// `Unknown`, listing the known names.
    pub fn named(id: &str) -> Result<Self> {
        let (name, text) = EMBEDDED
            .iter()
            .find(|(name, _)| *name == id)
            .ok_or_else(|| DataError::Unknown { found: id.into(), known: Self::known().join(", ") })?;
        Self::parse(name, text)
    }

    /// Reads a manifest from the text of a TOML file; `name` appears in errors.
    ///
    /// # Errors
    /// `Manifest` on unknown or missing keys, doubled labels or class names, and folders that leave the data root.
    pub fn parse(name: &str, text: &str) -> Result<Self> {
        let fail = |why: String, hint| DataError::Manifest { name: name.into(), why, hint };
        let written: Written = toml::from_str(text)
            .map_err(|e| fail(e.to_string().trim_end().to_string(), "the keys are those of datasets/camvid.toml"))?;

        if written.classes.is_empty() || written.classes.len() > usize::from(VOID) {
            return Err(fail(format!("{} classes", written.classes.len()), "give 1 to 255 classes"));
        }
        if written.image_hw.contains(&0) {
            return Err(fail(format!("image_hw = {:?}", written.image_hw), "give height and width in pixels"));
        }
        let mut label_ids = vec![None; 256];
        let labels = written.classes.iter().enumerate().map(|(id, class)| (class.label, id as u8));
        for (label, id) in labels.chain(written.void.labels.iter().map(|label| (*label, VOID))) {
            if label_ids[usize::from(label)].replace(id).is_some() {
                return Err(fail(
                    format!("label {label} is given twice"),
                    "a label value belongs to one class or to void",
                ));
            }
        }
        for (i, class) in written.classes.iter().enumerate() {
            if written.classes[..i].iter().any(|other| other.name == class.name) {
                return Err(fail(format!("class `{}` is given twice", class.name), "class names are unique"));
            }
        }
        let void_label = written.void.labels.first().copied().unwrap_or(VOID);
        let class_labels = written.classes.iter().map(|class| class.label).collect();
        let mut splits = BTreeMap::new();
        for (split, s) in written.splits {
            let (count, labels_withheld) = (s.count, s.labels_withheld);
            let files = s.files(written.source).ok_or_else(|| {
                fail(
                    format!("splits.{split} does not fit its source"),
                    "source \"files\" needs images and labels, and list or image_suffix and label_suffix; source \"drawn\" has none of them",
                )
            })?;
            if let Some(Pairing::Suffixes { image, label }) = files.as_ref().map(|f| &f.pairing)
                && let Some(bad) = [image, label].into_iter().find(|suffix| suffix.is_empty() || suffix.contains('/'))
            {
                return Err(fail(format!("splits.{split} names the ending `{bad}`"), "such as `_labelIds.png`"));
            }
            for path in files.iter().flat_map(|f| [f.first_looked_for(), &f.images, &f.labels]) {
                if !stays_inside(path) {
                    return Err(fail(format!("splits.{split} names `{path}`"), "paths are relative and without `..`"));
                }
            }
            splits.insert(split, SplitManifest { count, labels_withheld, files });
        }
        if let Some(folder) = written.folders.iter().find(|f| !stays_inside(f)) {
            return Err(fail(format!("folders names `{folder}`"), "paths are relative and without `..`"));
        }
        let train_pixels = written.classes.iter().map(|c| c.train_pixels).collect();
        let classes = written.classes.into_iter().map(|c| Class { name: c.name, color: c.color }).collect();
        Ok(Self {
            classes: ClassTable { name: written.id.clone(), classes, void_color: written.void.color },
            id: written.id,
            title: written.title,
            source: written.source,
            licence: written.licence,
            obtain: written.obtain,
            folders: written.folders,
            image_hw: written.image_hw,
            train_rgb_mean: written.train_rgb_mean,
            train_rgb_std: written.train_rgb_std,
            train_pixels,
            train_void_pixels: written.void.train_pixels,
            splits,
            label_ids,
            class_labels,
            void_label,
        })
    }

    /// Id of a value in a label file: a class, [`VOID`], or `None` outside the table.
    pub fn id_of_label(&self, label: u8) -> Option<u8> {
        self.label_ids[usize::from(label)]
    }

    /// The values a label file may hold, as a phrase for messages: `0..=10 or void 11`.
    pub fn labels_expected(&self) -> String {
        let of = |void: bool| {
            let mut runs: Vec<(usize, usize)> = Vec::new();
            for (label, id) in self.label_ids.iter().enumerate() {
                if id.is_none_or(|id| (id == VOID) != void) {
                    continue;
                }
                match runs.last_mut() {
                    Some(run) if run.1 + 1 == label => run.1 = label,
                    _ => runs.push((label, label)),
                }
            }
            let phrase = |(a, b): &(usize, usize)| if a == b { a.to_string() } else { format!("{a}..={b}") };
            runs.iter().map(phrase).collect::<Vec<_>>().join(", ")
        };
        let void = of(true);
        if void.is_empty() { of(false) } else { format!("{} or void {void}", of(false)) }
    }

    /// Turns the values of a label file into ids: classes as in the table, void as [`VOID`].
    ///
    /// # Errors
    /// `LabelValue` naming the first value outside the table; `path` is the file the values come from.
    pub fn ids_from_labels(&self, mut raw: LabelMap, path: &Path) -> Result<LabelMap> {
        for (i, value) in raw.ids.iter_mut().enumerate() {
            *value = self.label_ids[usize::from(*value)].ok_or_else(|| DataError::LabelValue {
                path: path.into(),
                row: i / raw.width,
                column: i % raw.width,
                found: *value,
                expected: self.labels_expected(),
                hint: "is this a label file of this data set, with class ids and not colours?",
            })?;
        }
        Ok(raw)
    }

    /// Turns ids into the values of a label file, void into the first value that means it.
    ///
    /// # Panics
    /// For an id that is neither a class nor [`VOID`].
    pub fn labels_from_ids(&self, mut map: LabelMap) -> LabelMap {
        for id in &mut map.ids {
            *id = if *id == VOID { self.void_label } else { self.class_labels[usize::from(*id)] };
        }
        map
    }

    /// Whether a class has another value in label files than its id.
    pub fn labels_differ_from_ids(&self) -> bool {
        self.class_labels.iter().enumerate().any(|(id, label)| usize::from(*label) != id)
    }

    /// Ending of label files, where images and label files are paired by name.
    pub fn label_suffix(&self) -> Option<&str> {
        self.splits.values().filter_map(|s| s.files.as_ref()).find_map(|files| match &files.pairing {
            Pairing::Suffixes { label, .. } => Some(label.as_str()),
            Pairing::List(_) => None,
        })
    }

    /// The data set's folder: `root` itself or a folder in it, whichever holds anything of a split.
    ///
    /// # Errors
    /// `Absent` when neither does, saying where it looked.
    pub fn locate(&self, root: &Path) -> Result<PathBuf> {
        let files: Vec<&SplitFiles> = self.splits.values().filter_map(|s| s.files.as_ref()).collect();
        let candidates: Vec<PathBuf> =
            std::iter::once(root.to_path_buf()).chain(self.folders.iter().map(|f| root.join(f))).collect();
        candidates.iter().find(|dir| files.iter().any(|files| files.are_in(dir))).cloned().ok_or_else(|| {
            let looked_for: Vec<&str> = files.iter().map(|files| files.first_looked_for()).collect();
            DataError::Absent {
                what: self.id.clone(),
                root: root.into(),
                why: format!("no {} there or in its folder {}", looked_for.join(", "), self.folders.join(" or ")),
                hint: self.obtain.clone(),
            }
        })
    }

    /// The error of a split without a pair; `path` is its list file or its folder of images.
    pub(crate) fn empty(&self, split: Split, path: PathBuf) -> DataError {
        match self.splits.get(&split).and_then(|s| s.files.as_ref()).map(|files| &files.pairing) {
            Some(Pairing::Suffixes { image, .. }) => DataError::Pair {
                path,
                found: "no image".into(),
                expected: format!("folders with files that end in `{image}`"),
                hint: "one folder a city, as unpacked; symbolic links in it are passed over",
            },
            _ => DataError::List {
                list: path,
                line: 1,
                found: "no pair".into(),
                expected: "at least one".into(),
                hint: "the list file is empty; obtain it again",
            },
        }
    }
}

/// Whether a path from a file is relative and goes down only.
fn stays_inside(path: &str) -> bool {
    let mut parts = Path::new(path).components().peekable();
    parts.peek().is_some() && parts.all(|part| matches!(part, std::path::Component::Normal(_)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn camvid_text() -> &'static str {
        EMBEDDED[0].1
    }

    #[test]
    fn every_embedded_manifest_reads_and_carries_its_name() {
        for id in Manifest::known() {
            let manifest = Manifest::named(id).unwrap();
            assert_eq!(manifest.id, id);
            assert_eq!(manifest.splits.len(), 3);
        }
        // The drawn scenes speak CamVid's classes, so that a network can move from one to the other.
        let [camvid, drawn] = ["camvid", "street-scenes"].map(|id| Manifest::named(id).unwrap());
        assert_eq!(camvid.classes.classes, drawn.classes.classes);
        for manifest in [camvid, drawn] {
            assert_eq!(manifest.labels_expected(), "0..=10 or void 11");
            assert_eq!([11, 12, 10].map(|label| manifest.id_of_label(label)), [Some(VOID), None, Some(10)]);
            assert!(!manifest.labels_differ_from_ids());
        }
    }

    #[test]
    fn cityscapes_remaps_every_label_id_as_its_benchmark() {
        let m = Manifest::named("cityscapes").unwrap();
        // Train id of label ids 0 to 33, written out once more: cityscapesScripts, `helpers/labels.py`.
        let v = VOID;
        let train_ids: [u8; 34] = [
            v, v, v, v, v, v, v, 0, 1, v, v, 2, 3, 4, v, v, v, 5, v, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, v, v, 16, 17,
            18,
        ];
        for label in 0..=u8::MAX {
            let expected = match label {
                0..34 => Some(train_ids[usize::from(label)]),
                VOID => Some(VOID),
                _ => None,
            };
            assert_eq!(m.id_of_label(label), expected, "label {label}");
        }
        assert_eq!(m.classes.n_classes(), 19);
        assert_eq!(m.classes.index_of("bicycle"), Some(18));
        let ids = LabelMap { height: 4, width: 5, ids: (0..19).chain([VOID]).collect() };
        let written = m.labels_from_ids(ids.clone());
        assert_eq!((written.ids[0], written.ids[18], written.ids[19]), (7, 33, 0));
        assert_eq!(m.ids_from_labels(written, Path::new("x.png")).unwrap(), ids);
        assert!(m.labels_differ_from_ids());
        assert_eq!(
            m.labels_expected(),
            "7..=8, 11..=13, 17, 19..=28, 31..=33 or void 0..=6, 9..=10, 14..=16, 18, 29..=30, 255"
        );
        assert_eq!(Split::ALL.map(|split| m.splits[&split].labels_withheld), [false, false, true]);
    }

    #[test]
    fn facts_of_camvid_add_up() {
        let m = Manifest::named("camvid").unwrap();
        let total: u64 = m.train_pixels.as_ref().unwrap().iter().sum::<u64>() + m.train_void_pixels.unwrap();
        let [h, w] = m.image_hw;
        // METHODS rounds void to 3.95 % of all; the counts themselves must fill every pixel of train.
        assert_eq!(total, (m.splits[&Split::Train].count * h * w) as u64);
    }

    #[test]
    fn mistakes_are_named() {
        let cases: [(&str, &str, &str); 8] = [
            ("image_hw =", "imagehw =", "imagehw"),
            ("label = 10,", "label = 9,", "label 9 is given twice"),
            ("labels = [11]", "labels = [11, 3]", "label 3 is given twice"),
            ("name = \"Fence\"", "name = \"Car\"", "class `Car` is given twice"),
            ("list = \"val.txt\"\n", "", "splits.val"),
            ("images = \"val\"", "images = \"../val\"", "`../val`"),
            ("list = \"val.txt\"", "image_suffix = \"_x.png\"", "splits.val"),
            ("list = \"val.txt\"", "image_suffix = \"/x.png\"\nlabel_suffix = \"_y.png\"", "ending `/x.png`"),
        ];
        for (from, to, named) in cases {
            let text = camvid_text().replacen(from, to, 1);
            assert_ne!(text, camvid_text(), "{from}");
            let error = Manifest::parse("x.toml", &text).unwrap_err().to_string();
            assert!(error.contains(named) && error.contains("x.toml") && error.contains("hint:"), "{error}");
        }
        let error = Manifest::named("kitti").unwrap_err().to_string();
        assert!(error.contains("`kitti`") && error.contains("camvid, cityscapes, street-scenes"), "{error}");
    }
}
