//! Rules about what a repository of source code carries: no large files, no data, no weights.

use super::{Finding, MAX_FILE_BYTES, Tree};

/// Largest picture outside fixtures, in bytes: a figure of the documentation, no data set image sheet.
const MAX_PICTURE_BYTES: u64 = 512 << 10;

/// Endings of weights and tables, which belong to fixtures, a run folder or a download.
const DATA: [&str; 9] = ["pth", "pt", "ckpt", "safetensors", "onnx", "npy", "npz", "parquet", "pkl"];

/// No file is over 1 MiB.
pub(super) fn file_sizes(tree: &Tree) -> Vec<Finding> {
    let large = tree.files.iter().filter(|f| f.bytes > MAX_FILE_BYTES);
    large
        .map(|f| {
            let what = format!("holds {} bytes, at most {MAX_FILE_BYTES} are allowed", f.bytes);
            Finding::new(&f.path, 1, what, "hint: data and results stay outside the repository; shrink a fixture")
        })
        .collect()
}

/// No weights, tables or large pictures outside fixtures.
pub(super) fn no_data(tree: &Tree) -> Vec<Finding> {
    let mut found = Vec::new();
    for file in tree.files.iter().filter(|f| !f.is_fixture()) {
        let extension = file.extension();
        if DATA.contains(&extension.as_str()) {
            let hint = "hint: keep it out of the repository, or below a folder `fixtures` with the script that made it";
            found.push(Finding::new(&file.path, 1, format!("is data or weights (.{extension})"), hint));
        }
        let picture = ["png", "jpg", "jpeg"].contains(&extension.as_str());
        if picture && file.bytes > MAX_PICTURE_BYTES && file.bytes <= MAX_FILE_BYTES {
            let what = format!("picture of {} bytes, at most {MAX_PICTURE_BYTES} are allowed", file.bytes);
            found.push(Finding::new(
                &file.path,
                1,
                what,
                "hint: shrink the picture; data set images are never committed",
            ));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::tidy::drawn;

    fn of_bytes(rule: fn(&Tree) -> Vec<Finding>, path: &str, bytes: u64) -> usize {
        let mut tree = drawn(&[(path, "")]);
        tree.files[0].bytes = bytes;
        rule(&tree).len()
    }

    #[test]
    fn a_file_holds_at_most_a_mebibyte() {
        assert_eq!(of_bytes(file_sizes, "a.txt", 1 << 20), 0);
        assert_eq!(of_bytes(file_sizes, "a.txt", (1 << 20) + 1), 1);
        assert_eq!(of_bytes(file_sizes, "crates/x/tests/fixtures/a.safetensors", (1 << 20) + 1), 1);
    }

    #[test]
    fn data_and_weights_live_in_fixtures_only() {
        for name in ["a.pth", "b.pt", "c.safetensors", "d.parquet", "e.npz", "F.PTH"] {
            assert_eq!(of_bytes(no_data, name, 10), 1, "{name}");
            assert_eq!(of_bytes(no_data, &format!("crates/x/tests/fixtures/{name}"), 10), 0, "{name}");
        }
        assert_eq!(of_bytes(no_data, "docs/pt.md", 10), 0);
    }

    #[test]
    fn a_picture_is_a_figure_not_a_data_set() {
        assert_eq!(of_bytes(no_data, "docs/report.png", 512 << 10), 0);
        assert_eq!(of_bytes(no_data, "docs/report.png", (512 << 10) + 1), 1);
        // One finding for one file: above the general limit `file_sizes` speaks.
        assert_eq!(of_bytes(no_data, "docs/report.png", 2 << 20), 0);
    }
}
