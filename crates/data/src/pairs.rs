//! List files: the lines that pair an image with its label file, mapped onto the data root.

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};

use crate::error::{DataError, Result};
use crate::manifest::{Manifest, SplitFiles};
use crate::sample::Split;

/// One usable line.
#[derive(Clone, Debug)]
pub(crate) struct Pair {
    /// File name without extension.
    pub(crate) name: String,
    pub(crate) image: PathBuf,
    pub(crate) label: PathBuf,
    /// Line in the list file, from 1.
    pub(crate) line: usize,
}

/// A list file as read: usable lines in the order published, and an error for each other line.
pub(crate) struct List {
    pub(crate) path: PathBuf,
    pub(crate) pairs: Vec<Pair>,
    pub(crate) problems: Vec<DataError>,
}

/// Files of a split as the manifest has them.
pub(crate) fn split_files(manifest: &Manifest, split: Split) -> Result<&SplitFiles> {
    manifest.splits.get(&split).and_then(|s| s.files.as_ref()).ok_or_else(|| DataError::Manifest {
        name: manifest.id.clone(),
        why: format!("names no files for split {split}"),
        hint: "ask for a split that the manifest lists",
    })
}

/// Reads the list file of a split in the data set's folder `dir`.
///
/// Blank lines are passed over, a file that is no text is refused whole. A line is a problem when it does not hold two paths that end in the manifest's folders,
/// names an image or a label file again, or names a file that is not there.
pub(crate) fn read_list(manifest: &Manifest, dir: &Path, split: Split) -> Result<List> {
    let files = split_files(manifest, split)?;
    let path = dir.join(&files.list);
    if !path.is_file() {
        return Err(DataError::Absent {
            what: format!("split {split} of {}", manifest.id),
            root: dir.into(),
            why: format!("`{}` is not there", path.display()),
            hint: manifest.obtain.clone(),
        });
    }
    let text = String::from_utf8(fs_err::read(&path)?).map_err(|e| {
        let good = &e.as_bytes()[..e.utf8_error().valid_up_to()];
        DataError::List {
            list: path.clone(),
            line: good.iter().filter(|b| **b == b'\n').count() + 1,
            found: "bytes that are not UTF-8".into(),
            expected: "text, one pair of paths a line".into(),
            hint: "is this the list file, and was it saved as plain text?",
        }
    })?;
    let mut list = List { path, pairs: Vec::new(), problems: Vec::new() };
    let mut seen: BTreeMap<PathBuf, usize> = BTreeMap::new();
    for (i, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        match read_line(line, i + 1, dir, files, &mut seen) {
            Ok(pair) => list.pairs.push(pair),
            Err((found, expected, hint)) => {
                list.problems.push(DataError::List { list: list.path.clone(), line: i + 1, found, expected, hint });
            }
        }
    }
    Ok(list)
}

fn read_line(
    line: &str,
    number: usize,
    dir: &Path,
    files: &SplitFiles,
    seen: &mut BTreeMap<PathBuf, usize>,
) -> std::result::Result<Pair, (String, String, &'static str)> {
    let parts: Vec<&str> = line.split_whitespace().collect();
    let [image, label] = parts[..] else {
        let found = format!("{} paths in `{}`", parts.len(), line.trim());
        return Err((found, "image and label file, separated by a space".into(), "mend the line"));
    };
    let image = map_onto_root(image, dir, &files.images)?;
    let label = map_onto_root(label, dir, &files.labels)?;
    for path in [&image, &label] {
        if let Some(earlier) = seen.insert(path.clone(), number) {
            let found = format!("`{}` again, first on line {earlier}", path.display());
            return Err((found, "each file once".into(), "remove one of the lines"));
        }
        if !path.is_file() {
            let found = format!("`{}`, which is not there", path.display());
            return Err((found, "a file".into(), "is the copy of the data whole?"));
        }
    }
    let name = image.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    Ok(Pair { name, image, label, line: number })
}

/// The file under `dir` that a path of another machine means: its last folders must be `folder`, what stands before
/// them is dropped. Nothing outside `dir` can be reached.
fn map_onto_root(
    foreign: &str,
    dir: &Path,
    folder: &str,
) -> std::result::Result<PathBuf, (String, String, &'static str)> {
    let foreign_path = Path::new(foreign);
    let name = match foreign_path.components().next_back() {
        Some(Component::Normal(name)) => Some(name),
        _ => None,
    };
    match name.map(|name| Path::new(folder).join(name)) {
        Some(relative) if foreign_path.ends_with(&relative) => Ok(dir.join(relative)),
        _ => Err((
            format!("`{foreign}`"),
            format!("a file in a folder `{folder}`"),
            "each line names the image first and its label file second",
        )),
    }
}
