//! Rules about what stands in a file: module docs, unsafe code, the one owner of void, paths of a machine.

use super::{Finding, Tree};

/// The one file that writes void as a number.
const VOID_OWNER: &str = "crates/data/src/classes.rs";

/// Crates that may hold unsafe code, each block small and with a safe twin.
const UNSAFE_ALLOWED: [&str; 1] = ["crates/ops/src/lib.rs"];

/// Every Rust file opens with `//!`.
pub(super) fn module_docs(tree: &Tree) -> Vec<Finding> {
    let hint = "hint: open the file with `//!`: what lives here, and what does not";
    let mut found = Vec::new();
    for file in tree.rust() {
        let first = file.text.lines().enumerate().find(|(_, line)| !line.trim().is_empty());
        match first {
            Some((_, line)) if line.starts_with("//!") => {}
            Some((at, _)) => found.push(Finding::new(&file.path, at + 1, "does not open with module docs", hint)),
            None => found.push(Finding::new(&file.path, 1, "is empty", hint)),
        }
    }
    found
}

/// Every crate root but those of [`UNSAFE_ALLOWED`] forbids unsafe code.
pub(super) fn unsafe_forbidden(tree: &Tree) -> Vec<Finding> {
    let is_root = |path: &str| path.ends_with("src/lib.rs") || path.ends_with("src/main.rs");
    let attribute = "#![forbid(unsafe_code)]";
    let roots = tree.rust().filter(|f| is_root(&f.path) && !UNSAFE_ALLOWED.contains(&f.path.as_str()));
    roots
        .filter(|f| !f.text.lines().any(|line| line.trim() == attribute))
        .map(|f| {
            let hint = "hint: write `#![forbid(unsafe_code)]` below the module docs; only `ops` holds unsafe code";
            Finding::new(&f.path, 1, "crate root does not forbid unsafe code", hint)
        })
        .collect()
}

/// Only [`VOID_OWNER`], tests and examples write void as the number 255; prose in a string may name it.
pub(super) fn void_has_one_owner(tree: &Tree) -> Vec<Finding> {
    let mut found = Vec::new();
    // Tests and examples stand outside: they pass the value in, as a caller does.
    let is_caller = |path: &str| path.split('/').any(|p| ["tests", "tests.rs", "benches", "examples"].contains(&p));
    for file in tree.rust().filter(|f| f.path != VOID_OWNER && !is_caller(&f.path)) {
        for (at, line) in code_lines(&file.text) {
            let names_void = line.to_ascii_lowercase().contains("void");
            if names_void && has_number(&without_strings(line), "255") {
                let hint = "hint: use `data::classes::VOID`, or take the value as an argument";
                found.push(Finding::new(&file.path, at, "writes void as a number", hint));
            }
        }
    }
    found
}

/// Lines of code with their number: comments and modules of unit tests left out.
fn code_lines(text: &str) -> Vec<(usize, &str)> {
    let mut lines = Vec::new();
    let mut after_cfg_test = false;
    let mut test_end: Option<String> = None;
    for (at, line) in text.lines().enumerate() {
        if let Some(end) = &test_end {
            if line == end {
                test_end = None;
            }
            continue;
        }
        let trimmed = line.trim_start();
        if after_cfg_test && trimmed.starts_with("mod ") && trimmed.ends_with('{') {
            test_end = Some(format!("{}}}", &line[..line.len() - trimmed.len()]));
        } else if !trimmed.starts_with("//") {
            lines.push((at + 1, line.split(" // ").next().unwrap_or(line)));
        }
        after_cfg_test = trimmed == "#[cfg(test)]";
    }
    lines
}

/// `line` without its string literals.
fn without_strings(line: &str) -> String {
    let unescaped = line.replace("\\\"", "");
    unescaped.split('"').step_by(2).collect::<Vec<_>>().join("\"\"")
}

/// Whether `number` stands in `line` as a number of its own, with or without a type suffix.
fn has_number(line: &str, number: &str) -> bool {
    line.match_indices(number).any(|(at, _)| {
        let before = line[..at].chars().next_back();
        let after = line[at + number.len()..].chars().next();
        let inside = |c: char| c.is_ascii_digit() || c == '.';
        !before.is_some_and(|c| inside(c) || c.is_ascii_alphabetic() || c == '_')
            && !after.is_some_and(|c| inside(c) && c != '.')
            && !line[at + number.len()..].trim_start_matches('.').starts_with(|c: char| c.is_ascii_digit())
    })
}

/// No file names a folder of somebody's machine.
pub(super) fn machine_paths(tree: &Tree) -> Vec<Finding> {
    let hint = "hint: write it relative to the repository root, or take it as an argument";
    let mut found = Vec::new();
    for file in &tree.files {
        for (at, line) in file.text.lines().enumerate() {
            if let Some(path) = machine_path(line) {
                found.push(Finding::new(&file.path, at + 1, format!("names the machine path `{path}`"), hint));
            }
        }
    }
    found
}

/// The first path of a machine in `line`: a home folder with its owner's name, the administrator's or a build
/// machine's folder, a profile of Windows. The patterns are put together here so that this file passes its own rule.
fn machine_path(line: &str) -> Option<&str> {
    // Folder, and whether a name must follow for it to be somebody's.
    const FOLDERS: [(&str, bool); 4] = [("home", true), ("Users", true), ("root", false), ("work", false)];
    let is_name = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    for (at, _) in line.match_indices('/') {
        // Inside a longer path, a word or an address it is no root: `docs/home/x`, `https://host/Users/x`.
        let before = &line[..at];
        let inside = before.chars().next_back().is_some_and(|c| is_name(c) || "/~}".contains(c));
        if inside && !before.ends_with("file://") {
            continue;
        }
        for (folder, named) in FOLDERS {
            let Some(rest) = line[at + 1..].strip_prefix(folder).and_then(|r| r.strip_prefix('/')) else { continue };
            let name = rest.find(|c| !is_name(c)).unwrap_or(rest.len());
            if !named || (name > 0 && rest[name..].starts_with('/')) {
                return Some(&line[at..at + folder.len() + 2 + name]);
            }
        }
    }
    for (at, _) in line.match_indices(":\\") {
        let Some(drive) = line[..at].chars().next_back().filter(char::is_ascii_alphabetic) else { continue };
        let rest = line[at + 2..].trim_start_matches('\\');
        if rest.get(..5).is_some_and(|r| r.eq_ignore_ascii_case("users")) {
            let end = line.len() - rest.len() + 5;
            return Some(&line[at - drive.len_utf8()..end]);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::tidy::drawn;

    fn lines(rule: fn(&Tree) -> Vec<Finding>, path: &str, text: &str) -> Vec<usize> {
        rule(&drawn(&[(path, text)])).iter().map(|f| f.line).collect()
    }

    #[test]
    fn rust_files_open_with_module_docs() {
        assert!(lines(module_docs, "crates/ops/src/a.rs", "\n//! A.\nfn a() {}\n").is_empty());
        assert_eq!(lines(module_docs, "crates/ops/src/a.rs", "use x;\n//! A.\n"), [1]);
        assert_eq!(lines(module_docs, "crates/ops/src/a.rs", "\n// A.\n"), [2]);
        assert_eq!(lines(module_docs, "crates/ops/src/a.rs", "\n\n"), [1]);
        assert!(lines(module_docs, "crates/ops/tests/fixtures/a.rs", "use x;\n").is_empty());
        assert!(lines(module_docs, "docs/a.md", "text\n").is_empty());
    }

    #[test]
    fn crate_roots_forbid_unsafe_code() {
        let good = "//! A.\n\n#![forbid(unsafe_code)]\n";
        for path in ["crates/eval/src/lib.rs", "xtask/src/main.rs", "benches/src/lib.rs"] {
            assert!(lines(unsafe_forbidden, path, good).is_empty(), "{path}");
            assert_eq!(lines(unsafe_forbidden, path, "//! A.\n// #![forbid(unsafe_code)]\n"), [1], "{path}");
        }
        assert!(lines(unsafe_forbidden, "crates/ops/src/lib.rs", "//! A.\n").is_empty());
        assert!(lines(unsafe_forbidden, "crates/eval/src/table.rs", "//! A.\n").is_empty());
    }

    #[test]
    fn void_is_written_as_a_number_by_its_owner_only() {
        let path = "crates/train/src/a.rs";
        for bad in ["const VOID: u8 = 255;", "if void == 255u8 {", "f(&labels, 255, \"void\")", "let void=255_u8;"] {
            assert_eq!(lines(void_has_one_owner, path, &format!("//! A.\n{bad}\n")), [2], "{bad}");
            assert!(lines(void_has_one_owner, VOID_OWNER, bad).is_empty());
            assert!(lines(void_has_one_owner, "crates/eval/tests/a.rs", bad).is_empty());
            assert!(lines(void_has_one_owner, "crates/eval/examples/a.rs", bad).is_empty());
        }
        for good in [
            "let white = 255; ",
            "x / 255.0 // not void",
            "/// void is 255",
            "avoid(1255)",
            "avoid(2550)",
            "void: \"as \\\"255\"",
        ] {
            assert!(lines(void_has_one_owner, path, good).is_empty(), "{good}");
        }
    }

    #[test]
    fn void_in_unit_tests_is_left_out_but_not_after_them() {
        let text = "//! A.\n#[cfg(test)]\nmod tests {\n    fn a() {\n        f(255, void);\n    }\n}\nf(255, void);\n";
        assert_eq!(lines(void_has_one_owner, "crates/eval/src/a.rs", text), [8]);
        let text = "//! A.\n#[cfg(test)]\nuse x;\nf(255, void);\n";
        assert_eq!(lines(void_has_one_owner, "crates/eval/src/a.rs", text), [4]);
    }

    #[test]
    fn paths_of_a_machine_are_found() {
        let [home, users, root, work] = ["home", "Users", "root", "work"];
        for (line, expected) in [
            (format!("see /{home}/ann/x"), format!("/{home}/ann")),
            (format!("\"/{users}/Ann.B/x\""), format!("/{users}/Ann.B")),
            (format!("file:///{root}/x"), format!("/{root}/x")),
            (format!("=/{root}/.cargo"), format!("/{root}/.cargo")),
            (format!("(/{work}/main)"), format!("/{work}/main")),
            (format!("C:\\{users}\\ann"), format!("C:\\{users}")),
            (format!("\"d:\\\\{users}\\\\ann\""), format!("d:\\\\{users}")),
        ] {
            assert_eq!(machine_path(&line).unwrap_or(""), expected, "{line}");
        }
        for line in [
            format!("docs/{home}/ann/x"),
            format!("https://host/{users}/ann/x"),
            format!("/{home}/NAME").replace("NAME", ""),
            format!("{{}}/{root}/x"),
            format!("the folder /{root}"),
            format!("~/{work}/x"),
            "/SegNet/CamVid/train/0001TP_006690.png".to_string(),
            "http://localhost:\\".to_string(),
        ] {
            assert_eq!(machine_path(&line), None, "{line}");
        }
    }

    #[test]
    fn a_machine_path_is_found_in_any_kind_of_file() {
        let text = format!("a\nb = \"/{}/ann/data\"\n", "home");
        for path in ["datasets/x.toml", "docs/a.md", "crates/x/tests/fixtures/make_a.py", ".ci/run"] {
            assert_eq!(lines(machine_paths, path, &text), [2], "{path}");
        }
    }
}
