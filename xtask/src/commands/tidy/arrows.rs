//! Crate arrows: which crate of the workspace may know which, read from the manifests.

use super::{Finding, SourceFile, Tree};

/// Package, and the packages of this workspace it may depend on, in any kind of dependency.
const ARROWS: [(&str, &[&str]); 8] = [
    (OPS, &[]),
    (DATA, &[OPS]),
    (MODELS, &[OPS]),
    (LOSSES, &[OPS]),
    (EVAL, &[OPS]),
    (TRAIN, &[OPS, DATA, MODELS, LOSSES, EVAL]),
    ("xtask", &[OPS, DATA, MODELS, LOSSES, EVAL, TRAIN, BENCHES]),
    (BENCHES, &[OPS, DATA, MODELS, LOSSES, EVAL, TRAIN]),
];
const OPS: &str = "segdistill-ops";
const DATA: &str = "segdistill-data";
const MODELS: &str = "segdistill-models";
const LOSSES: &str = "segdistill-losses";
const EVAL: &str = "segdistill-eval";
const TRAIN: &str = "segdistill-train";
const BENCHES: &str = "segdistill-benches";

const HINT: &str = "hint: arrows go xtask -> train -> {data, models, losses, eval} -> ops";

/// Every dependency of a workspace package on another goes along an arrow of [`ARROWS`].
pub(super) fn crate_arrows(tree: &Tree) -> Vec<Finding> {
    let mut found = Vec::new();
    let shared = tree.get("Cargo.toml").and_then(|f| f.text.parse::<toml::Table>().ok());
    let shared = shared.as_ref().and_then(|t| t.get("workspace")?.get("dependencies")?.as_table());
    for file in tree.files.iter().filter(|f| f.name() == "Cargo.toml" && !f.is_fixture()) {
        let table = match file.text.parse::<toml::Table>() {
            Ok(table) => table,
            Err(e) => {
                let line = e.span().map_or(1, |s| 1 + file.text[..s.start].matches('\n').count());
                found.push(Finding::new(
                    &file.path,
                    line,
                    format!("not TOML: {}", e.message()),
                    "hint: mend the manifest",
                ));
                continue;
            }
        };
        let Some(package) = table.get("package").and_then(|p| p.get("name")?.as_str()) else { continue };
        let Some((_, allowed)) = ARROWS.iter().find(|(name, _)| *name == package) else {
            let hint = "hint: say what it may know in `tidy/arrows.rs` and in the architecture page";
            found.push(Finding::new(&file.path, 1, format!("package `{package}` has no arrows"), hint));
            continue;
        };
        for (section, key, value) in dependencies(&table) {
            let known = package_of(key, value, shared);
            if ours(&known) && !allowed.contains(&known.as_str()) {
                let what = format!("`{package}` depends on `{known}` in [{section}]");
                found.push(Finding::new(&file.path, line_of(file, &section, key), what, HINT));
            }
        }
    }
    found
}

/// Whether a package name is one of this workspace.
fn ours(package: &str) -> bool {
    package.starts_with("segdistill") || ARROWS.iter().any(|(name, _)| *name == package)
}

/// Every dependency of a manifest as (section, key, value), those of targets included.
fn dependencies(table: &toml::Table) -> Vec<(String, &str, &toml::Value)> {
    const KINDS: [&str; 3] = ["dependencies", "dev-dependencies", "build-dependencies"];
    let mut all = Vec::new();
    for kind in KINDS {
        push(&mut all, kind.to_string(), table.get(kind));
    }
    for (target, tables) in table.get("target").and_then(toml::Value::as_table).into_iter().flatten() {
        for kind in KINDS {
            push(&mut all, format!("target.{target}.{kind}"), tables.get(kind));
        }
    }
    all
}

fn push<'a>(all: &mut Vec<(String, &'a str, &'a toml::Value)>, section: String, table: Option<&'a toml::Value>) {
    for (key, value) in table.and_then(toml::Value::as_table).into_iter().flatten() {
        all.push((section.clone(), key, value));
    }
}

/// The package behind a dependency's key: renames are looked through, here and in the workspace's table.
fn package_of(key: &str, value: &toml::Value, shared: Option<&toml::Table>) -> String {
    let renamed = |value: &toml::Value| value.get("package").and_then(toml::Value::as_str).map(str::to_string);
    let inherited = value.get("workspace").and_then(toml::Value::as_bool) == Some(true);
    let from_shared = || shared.filter(|_| inherited)?.get(key).and_then(renamed);
    renamed(value).or_else(from_shared).unwrap_or_else(|| key.to_string())
}

/// Line of a dependency: the first that begins with its key after its section's header, or names both.
fn line_of(file: &SourceFile, section: &str, key: &str) -> usize {
    let begins = |line: &str| {
        let rest = line.trim_start().trim_start_matches('"').strip_prefix(key);
        rest.is_some_and(|r| r.starts_with([' ', '.', '=', '"', '\t']))
    };
    let mut inside = false;
    for (at, line) in file.text.lines().enumerate() {
        let trimmed = line.trim();
        if trimmed.starts_with('[') {
            inside = trimmed.trim_start_matches('[').starts_with(section);
            if trimmed.contains(&format!("{section}.{key}")) {
                return at + 1;
            }
        } else if inside && begins(line) {
            return at + 1;
        }
    }
    1
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::tidy::drawn;

    fn manifest(package: &str, rest: &str) -> String {
        format!("[package]\nname = \"{package}\"\n\n{rest}")
    }

    fn check(package: &str, rest: &str) -> Vec<String> {
        let root = "[workspace]\n[workspace.dependencies]\nquiet = { path = \"crates/train\", package = \"segdistill-train\" }\n";
        let tree = drawn(&[("Cargo.toml", root), ("crates/x/Cargo.toml", &manifest(package, rest))]);
        crate_arrows(&tree).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn downward_arrows_hold() {
        assert!(check("segdistill-ops", "[dependencies]\ncandle-core = \"1\"\n").is_empty());
        assert!(check("segdistill-losses", "[dependencies]\nsegdistill-ops.workspace = true\n").is_empty());
        assert!(check("segdistill-train", "[dependencies]\nsegdistill-eval = { path = \"../eval\" }\n").is_empty());
        assert!(
            check("xtask", "[dependencies]\nsegdistill-train.workspace = true\nsegdistill-ops.workspace = true")
                .is_empty()
        );
        assert!(check("segdistill-benches", "[dev-dependencies]\nsegdistill-train.workspace = true").is_empty());
    }

    #[test]
    fn sideways_and_upward_arrows_are_found_with_their_line() {
        let line = check("segdistill-models", "[dependencies]\nserde = \"1\"\nsegdistill-losses.workspace = true\n");
        let expected = "crates/x/Cargo.toml:6: `segdistill-models` depends on `segdistill-losses` in [dependencies]; ";
        assert!(line.len() == 1 && line[0].starts_with(expected), "{line:?}");
        assert_eq!(check("segdistill-ops", "[dependencies]\nsegdistill-data = { path = \"../data\" }\n").len(), 1);
        assert_eq!(check("segdistill-train", "[dependencies]\nxtask = { path = \"../../xtask\" }\n").len(), 1);
        assert_eq!(check("segdistill-eval", "[dependencies]\nsegdistill-train.workspace = true\n").len(), 1);
    }

    #[test]
    fn dev_build_and_target_dependencies_count_too() {
        assert_eq!(check("segdistill-ops", "[dev-dependencies]\nsegdistill-models.workspace = true\n").len(), 1);
        assert_eq!(check("segdistill-data", "[build-dependencies.segdistill-eval]\npath = \"../eval\"\n").len(), 1);
        let target =
            check("segdistill-data", "[target.'cfg(unix)'.dev-dependencies]\nsegdistill-eval.workspace = true\n");
        assert!(target[0].contains("[target.cfg(unix).dev-dependencies]"), "{target:?}");
        let table = check("segdistill-data", "[dependencies.segdistill-eval]\npath = \"../eval\"\n");
        assert!(table[0].starts_with("crates/x/Cargo.toml:4: "), "{table:?}");
    }

    #[test]
    fn a_renamed_dependency_is_looked_through() {
        assert_eq!(
            check("segdistill-ops", "[dependencies]\nlow = { path = \"../d\", package = \"segdistill-data\" }\n").len(),
            1
        );
        let shared = check("segdistill-eval", "[dependencies]\nquiet.workspace = true\n");
        assert!(shared.len() == 1 && shared[0].contains("depends on `segdistill-train`"), "{shared:?}");
        assert!(check("segdistill-ops", "[dependencies]\nquiet = \"1\"\n").is_empty());
    }

    #[test]
    fn an_unknown_package_and_a_broken_manifest_are_found() {
        assert!(check("segdistill-extra", "")[0].contains("package `segdistill-extra` has no arrows"));
        let broken = drawn(&[("crates/x/Cargo.toml", "[package]\nname = \n")]);
        assert!(crate_arrows(&broken)[0].to_string().starts_with("crates/x/Cargo.toml:2: not TOML"));
    }
}
