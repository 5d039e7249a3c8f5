//! `tidy`: the repository's own rules. Here the tree is read and the rules are run; the rules live in the modules below.
//!
//! Every rule is a function from a [`Tree`] in memory to findings, so that tests draw their own trees.

mod arrows;
mod links;
mod sources;
mod weight;

use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, anyhow, bail};

/// Largest file of the tree, in bytes.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// One file of the tree.
#[derive(Clone, Debug)]
pub(crate) struct SourceFile {
    /// Path from the root, with `/`.
    pub(crate) path: String,
    pub(crate) bytes: u64,
    /// Its text, with replacement characters where it is not UTF-8; empty for a file over the size limit.
    pub(crate) text: String,
}

impl SourceFile {
    /// Name of the file without its folders.
    fn name(&self) -> &str {
        self.path.rsplit('/').next().unwrap_or(&self.path)
    }

    /// What follows the last dot of the name, in lower case.
    fn extension(&self) -> String {
        self.name().rsplit_once('.').map(|(_, e)| e.to_ascii_lowercase()).unwrap_or_default()
    }

    /// Whether it lies below a folder `fixtures`, where tests keep recorded files.
    fn is_fixture(&self) -> bool {
        self.path.split('/').rev().skip(1).any(|folder| folder == "fixtures")
    }
}

/// The files of the repository: those git tracks, and those it would track.
#[derive(Clone, Debug, Default)]
pub(crate) struct Tree {
    /// Sorted by path.
    pub(crate) files: Vec<SourceFile>,
}

impl Tree {
    fn get(&self, path: &str) -> Option<&SourceFile> {
        self.files.binary_search_by(|f| f.path.as_str().cmp(path)).ok().map(|at| &self.files[at])
    }

    fn rust(&self) -> impl Iterator<Item = &SourceFile> {
        self.files.iter().filter(|f| f.extension() == "rs" && !f.is_fixture())
    }
}

/// A rule that does not hold somewhere.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Finding {
    path: String,
    line: usize,
    what: String,
    hint: &'static str,
}

impl Finding {
    fn new(path: &str, line: usize, what: impl Into<String>, hint: &'static str) -> Self {
        Self { path: path.into(), line, what: what.into(), hint }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}; {}", self.path, self.line, self.what, self.hint)
    }
}

/// Reads the tree, prints a line a finding, fails when there is one.
pub(crate) fn run() -> anyhow::Result<()> {
    let tree = read(&workspace_root()?)?;
    let findings = findings(&tree);
    for finding in &findings {
        println!("{finding}");
    }
    match findings.len() {
        0 => println!("tidy: {} files, all rules hold", tree.files.len()),
        1 => bail!("tidy: 1 finding in {} files", tree.files.len()),
        n => bail!("tidy: {n} findings in {} files", tree.files.len()),
    }
    Ok(())
}

/// What every rule finds, sorted by place.
fn findings(tree: &Tree) -> Vec<Finding> {
    let rules = [
        arrows::crate_arrows,
        sources::module_docs,
        sources::unsafe_forbidden,
        sources::void_has_one_owner,
        sources::machine_paths,
        weight::file_sizes,
        weight::no_data,
        links::relative_links,
    ];
    let mut found: Vec<Finding> = rules.iter().flat_map(|rule| rule(tree)).collect();
    found.sort();
    found
}

/// The folder whose `Cargo.toml` has `[workspace]`, from the current folder upwards.
pub(crate) fn workspace_root() -> anyhow::Result<PathBuf> {
    let here = std::env::current_dir().context("cannot tell the current folder")?;
    let is_root = |folder: &&Path| {
        let manifest = fs_err::read_to_string(folder.join("Cargo.toml")).ok();
        manifest.and_then(|text| text.parse::<toml::Table>().ok()).is_some_and(|t| t.contains_key("workspace"))
    };
    here.ancestors().find(is_root).map(Path::to_path_buf).ok_or_else(|| {
        anyhow!("no workspace at or above `{}`\n  hint: run inside the checkout of segdistill", here.display())
    })
}

/// Reads every file of the repository at `root`.
fn read(root: &Path) -> anyhow::Result<Tree> {
    let mut paths = match root.join(".git").exists() {
        true => git_files(root)?,
        false => {
            let mut all = Vec::new();
            walk(root, "", &mut all)?;
            all
        }
    };
    paths.sort();
    paths.dedup();
    let mut files = Vec::with_capacity(paths.len());
    for path in paths {
        let place = root.join(&path);
        // Deleted but still in the index, a submodule, a symbolic link: nothing of ours to read.
        let Ok(metadata) = fs_err::symlink_metadata(&place) else { continue };
        if !metadata.is_file() {
            continue;
        }
        let text = match metadata.len() > MAX_FILE_BYTES {
            true => String::new(),
            false => String::from_utf8_lossy(&fs_err::read(&place)?).into_owned(),
        };
        files.push(SourceFile { path, bytes: metadata.len(), text });
    }
    Ok(Tree { files })
}

/// Tracked files and those that would be: what git does not ignore.
fn git_files(root: &Path) -> anyhow::Result<Vec<String>> {
    let args = ["ls-files", "-z", "--cached", "--others", "--exclude-standard"];
    let hint = "hint: `git` must be installed and trust this folder";
    let out = Command::new("git")
        .arg("-C")
        .arg(root)
        .args(args)
        .output()
        .with_context(|| format!("cannot run `git {}`\n  {hint}", args.join(" ")))?;
    if !out.status.success() {
        let said = String::from_utf8_lossy(&out.stderr);
        bail!("`git {}` failed: {}\n  {hint}", args.join(" "), said.trim());
    }
    let names = out.stdout.split(|b| *b == 0).filter(|name| !name.is_empty());
    Ok(names.map(|name| String::from_utf8_lossy(name).into_owned()).collect())
}

/// Every file below `root/prefix`, without what builds and runs leave behind: for an unpacked source archive.
fn walk(root: &Path, prefix: &str, out: &mut Vec<String>) -> anyhow::Result<()> {
    for entry in fs_err::read_dir(root.join(prefix))? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let path = if prefix.is_empty() { name.clone() } else { format!("{prefix}/{name}") };
        let kind = entry.file_type()?;
        if kind.is_dir() {
            let left_behind = [".git", "__pycache__"].contains(&name.as_str())
                || (prefix.is_empty() && ["target", "runs"].contains(&name.as_str()));
            if !left_behind {
                walk(root, &path, out)?;
            }
        } else if kind.is_file() {
            out.push(path);
        }
    }
    Ok(())
}

/// A tree of (path, text) for tests.
#[cfg(test)]
fn drawn(files: &[(&str, &str)]) -> Tree {
    let mut files: Vec<SourceFile> = files
        .iter()
        .map(|(path, text)| SourceFile { path: (*path).into(), bytes: text.len() as u64, text: (*text).into() })
        .collect();
    files.sort_by(|a, b| a.path.cmp(&b.path));
    Tree { files }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_repository_is_tidy() {
        let tree = read(&workspace_root().unwrap()).unwrap();
        assert!(tree.get("xtask/src/main.rs").is_some() && tree.get("crates/ops/Cargo.toml").is_some());
        assert!(tree.files.iter().all(|f| !f.path.starts_with("target/") && !f.path.starts_with(".git/")));
        let lines: Vec<String> = findings(&tree).iter().map(ToString::to_string).collect();
        assert!(lines.is_empty(), "\n{}", lines.join("\n"));
    }

    #[test]
    fn findings_say_place_what_and_hint_and_come_sorted() {
        let tree = drawn(&[("crates/ops/src/b.rs", "fn b() {}\n"), ("crates/ops/src/a.rs", "\n\nfn a() {}\n")]);
        let lines: Vec<String> = findings(&tree).iter().map(ToString::to_string).collect();
        assert_eq!(lines.len(), 2, "{lines:?}");
        assert!(lines[0].starts_with("crates/ops/src/a.rs:3: ") && lines[0].contains("; "), "{lines:?}");
        assert!(lines[1].starts_with("crates/ops/src/b.rs:1: "), "{lines:?}");
    }

    #[test]
    fn a_tree_without_git_is_walked() {
        let folder = tempfile::tempdir().unwrap();
        for path in ["Cargo.toml", "src/lib.rs", "target/left.rs", "crates/target/kept.rs", ".ci/run", ".git/x"] {
            let place = folder.path().join(path);
            fs_err::create_dir_all(place.parent().unwrap()).unwrap();
            fs_err::write(place, "//! x\n").unwrap();
        }
        let mut names = Vec::new();
        walk(folder.path(), "", &mut names).unwrap();
        names.sort();
        assert_eq!(names, [".ci/run", "Cargo.toml", "crates/target/kept.rs", "src/lib.rs"]);
    }

    #[test]
    fn fixtures_are_below_a_folder_of_that_name() {
        let at = |path: &str| drawn(&[(path, "")]).files[0].is_fixture();
        assert!(at("crates/ops/tests/fixtures/conv.safetensors") && at("fixtures/a/b.png"));
        assert!(!at("crates/ops/tests/fixtures") && !at("docs/fixtures.png"));
    }
}
