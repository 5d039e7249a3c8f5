//! Pairs from a tree: two folders with one folder a city each, image and label file of one name before their endings.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::{Pair, Pairs, Place};
use crate::error::{DataError, Result};

/// Folder and name of a file, the ending taken off.
type Key = (String, String);

/// Pairs the files of two folders `[images, labels]`, of which one at least is there, by the endings of their names.
///
/// Pairs are sorted by name. Hidden files, symbolic links and files with other endings are passed over. An image without
/// its label file, a label file without its image and a name in two folders are problems.
pub(super) fn read(folders: [&Path; 2], suffixes: [&str; 2]) -> Result<Pairs> {
    if let Some(missing) = folders.iter().find(|folder| !folder.is_dir()) {
        return Err(DataError::Pair {
            path: missing.to_path_buf(),
            found: "no such folder".into(),
            expected: "images and label files, each in a folder of their own".into(),
            hint: "images and labels are two archives: unpack both into one folder",
        });
    }
    let [images, mut labels] = [files_below(folders[0], suffixes[0])?, files_below(folders[1], suffixes[1])?];
    let mut found =
        Pairs { path: folders[0].into(), n_promised: images.len(), pairs: Vec::new(), problems: Vec::new() };
    let whole = "is the copy of the data whole?";
    for (key, image) in images {
        let place = Place { file: image.clone(), line: None };
        match labels.remove(&key) {
            Some(label) => found.pairs.push(Pair { name: key.1, image, label, place }),
            None => {
                let label = folders[1].join(&key.0).join(key.1 + suffixes[1]);
                let missing = format!("no label file `{}`", label.display());
                found.problems.push(place.error(missing, "a label file for each image", whole));
            }
        }
    }
    for ((city, name), label) in labels {
        let image = folders[0].join(city).join(name + suffixes[0]);
        let missing = format!("no image `{}`", image.display());
        found.problems.push(Place { file: label, line: None }.error(missing, "an image for each label file", whole));
    }
    found.pairs.sort_by(|a, b| (&a.name, &a.image).cmp(&(&b.name, &b.image)));
    for (a, b) in found.pairs.iter().zip(found.pairs.iter().skip(1)).filter(|(a, b)| a.name == b.name) {
        let twin = format!("`{}` again, first in `{}`", b.name, a.image.display());
        found.problems.push(b.place.error(twin, "each name once", "remove one of the two pairs"));
    }
    Ok(found)
}

/// The files that end in `suffix` in the folders of `folder`.
fn files_below(folder: &Path, suffix: &str) -> Result<BTreeMap<Key, PathBuf>> {
    let mut files = BTreeMap::new();
    for city in seen(folder)?.into_iter().filter(|entry| entry.is_dir) {
        for file in seen(&city.path)?.into_iter().filter(|entry| !entry.is_dir) {
            if let Some(name) = file.name.strip_suffix(suffix).filter(|name| !name.is_empty()) {
                files.insert((city.name.clone(), name.to_string()), file.path);
            }
        }
    }
    Ok(files)
}

/// A file or folder.
struct Entry {
    name: String,
    path: PathBuf,
    is_dir: bool,
}

/// Files and folders in `folder` that are neither hidden nor links, in no order.
fn seen(folder: &Path) -> Result<Vec<Entry>> {
    let mut entries = Vec::new();
    for entry in fs_err::read_dir(folder)? {
        let entry = entry?;
        let kind = entry.file_type()?;
        // A name that is no text ends in none of the endings either.
        let Ok(name) = entry.file_name().into_string() else { continue };
        if (kind.is_dir() || kind.is_file()) && !name.starts_with('.') {
            entries.push(Entry { name, path: entry.path(), is_dir: kind.is_dir() });
        }
    }
    Ok(entries)
}
