//! Pairs from a list file: its lines name an image and its label file, mapped onto the data root.

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};

use super::{Pair, Pairs, Place};
use crate::error::{DataError, Result};
use crate::manifest::SplitFiles;

/// Reads the list file `path` of the data set in folder `dir`.
///
/// Blank lines are passed over, a file that is no text is refused whole. A line is a problem when it does not hold two
/// paths that end in the manifest's folders, names an image or a label file again, or names a file that is not there.
pub(super) fn read(path: &Path, dir: &Path, files: &SplitFiles) -> Result<Pairs> {
    let text = String::from_utf8(fs_err::read(path)?).map_err(|e| {
        let good = &e.as_bytes()[..e.utf8_error().valid_up_to()];
        DataError::List {
            list: path.into(),
            line: good.iter().filter(|b| **b == b'\n').count() + 1,
            found: "bytes that are not UTF-8".into(),
            expected: "text, one pair of paths a line".into(),
            hint: "is this the list file, and was it saved as plain text?",
        }
    })?;
    let mut found = Pairs { path: path.into(), n_promised: 0, pairs: Vec::new(), problems: Vec::new() };
    let mut seen: BTreeMap<PathBuf, usize> = BTreeMap::new();
    for (i, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        found.n_promised += 1;
        let place = Place { file: path.into(), line: Some(i + 1) };
        match read_line(line, i + 1, dir, files, &mut seen) {
            Ok([image, label]) => {
                let name = image.file_stem().unwrap_or_default().to_string_lossy().into_owned();
                found.pairs.push(Pair { name, image, label, place });
            }
            Err((what, expected, hint)) => found.problems.push(place.error(what, &expected, hint)),
        }
    }
    Ok(found)
}

fn read_line(
    line: &str,
    number: usize,
    dir: &Path,
    files: &SplitFiles,
    seen: &mut BTreeMap<PathBuf, usize>,
) -> std::result::Result<[PathBuf; 2], (String, String, &'static str)> {
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
    Ok([image, label])
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
