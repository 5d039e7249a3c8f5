//! Every relative link of the README and of the pages in `docs/` leads to a file, folder or heading of the repository.

use std::collections::BTreeMap;

use super::{Finding, Tree};

/// Follows the links of `README.md` and `docs/**/*.md`.
pub(super) fn relative_links(tree: &Tree) -> Vec<Finding> {
    let mut found = Vec::new();
    let is_page = |path: &str| path == "README.md" || (path.starts_with("docs/") && path.ends_with(".md"));
    for page in tree.files.iter().filter(|f| is_page(&f.path)) {
        for (line, target) in links(&page.text) {
            if let Err(what) = resolve(tree, &page.path, &target) {
                let hint = "hint: links are relative to the page that holds them";
                found.push(Finding::new(&page.path, line, format!("link `{target}` {what}"), hint));
            }
        }
    }
    found
}

/// Whether `target`, as written on `page`, leads somewhere in the tree.
fn resolve(tree: &Tree, page: &str, target: &str) -> Result<(), String> {
    let external = ["http://", "https://", "mailto:", "data:"].iter().any(|scheme| target.starts_with(scheme));
    if external || target.is_empty() {
        return Ok(());
    }
    let (path, heading) = target.split_once('#').map_or((target, None), |(p, h)| (p, Some(h)));
    let path = match path {
        "" => page.to_string(),
        path => join(page, path).ok_or("leaves the repository")?,
    };
    let is_folder = path.is_empty() || tree.files.iter().any(|f| f.path.starts_with(&format!("{path}/")));
    match (tree.get(&path), heading) {
        (None, _) if is_folder => Ok(()),
        (None, _) => Err(format!("leads to `{path}`, which is not in the repository")),
        (Some(file), Some(heading)) if file.extension() == "md" => match headings(&file.text).contains(&heading.into())
        {
            true => Ok(()),
            false => Err(format!("names no heading of `{path}`")),
        },
        _ => Ok(()),
    }
}

/// `path` from the folder of `page`, without `.` and `..`; `None` when it leaves the root.
fn join(page: &str, path: &str) -> Option<String> {
    if path.starts_with('/') {
        return None;
    }
    let mut parts: Vec<&str> = page.split('/').collect();
    parts.pop();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()?),
            part => parts.push(part),
        }
    }
    Some(parts.join("/"))
}

/// Lines of a page outside fenced code, with their number.
fn prose(text: &str) -> Vec<(usize, &str)> {
    let mut fence: Option<&str> = None;
    let mut lines = Vec::new();
    for (at, line) in text.lines().enumerate() {
        let trimmed = line.trim_start();
        let mark = ["```", "~~~"].into_iter().find(|mark| trimmed.starts_with(mark));
        match (fence, mark) {
            (Some(open), Some(mark)) if open == mark => fence = None,
            (Some(_), _) => {}
            (None, Some(mark)) => fence = Some(mark),
            (None, None) => lines.push((at + 1, line)),
        }
    }
    lines
}

/// `line` with code spans blanked.
fn without_code(line: &str) -> String {
    let inside = line.split('`').enumerate().map(|(at, part)| if at % 2 == 1 { "" } else { part });
    inside.collect::<Vec<_>>().join("`")
}

/// Link targets of a page with their line: `[text](target)`, `[name]: target`, `src="target"` and `href="target"`.
fn links(text: &str) -> Vec<(usize, String)> {
    let mut all = Vec::new();
    for (at, line) in prose(text) {
        let line = without_code(line);
        for (open, close) in [("](", ')'), ("src=\"", '"'), ("href=\"", '"')] {
            for (start, _) in line.match_indices(open) {
                let rest = &line[start + open.len()..];
                let Some(end) = rest.find(close) else { continue };
                all.push((at, target(&rest[..end])));
            }
        }
        let definition = line.strip_prefix('[').and_then(|l| l.split_once("]: "));
        if let Some((_, rest)) = definition {
            all.push((at, target(rest)));
        }
    }
    all
}

/// A target without its title and angle brackets.
fn target(written: &str) -> String {
    let first = written.split_whitespace().next().unwrap_or_default();
    first.trim_start_matches('<').trim_end_matches('>').to_string()
}

/// Headings of a page as the names a link uses: lower case, punctuation dropped, spaces to hyphens, repeats numbered.
fn headings(text: &str) -> Vec<String> {
    let mut seen: BTreeMap<String, usize> = BTreeMap::new();
    let mut names = Vec::new();
    for (_, line) in prose(text) {
        let title = line.trim_start_matches('#');
        let level = line.len() - title.len();
        if !(1..=6).contains(&level) || !title.starts_with(' ') {
            continue;
        }
        let kept = title.trim().to_lowercase();
        let kept = kept.chars().filter(|c| c.is_alphanumeric() || " -_".contains(*c));
        let name: String = kept.map(|c| if c == ' ' { '-' } else { c }).collect();
        let times = seen.entry(name.clone()).or_default();
        names.push(if *times == 0 { name } else { format!("{name}-{times}") });
        *times += 1;
    }
    names
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::tidy::drawn;

    fn on(page: &str, text: &str) -> Vec<String> {
        let other = "# Adding a loss\n\n## What, and why?\n## Step\n## Step\n```\n# not one\n```\n";
        let mut files = vec![("docs/other.md", other), ("docs/img/a.png", ""), ("crates/ops/src/lib.rs", "")];
        files.push((page, text));
        relative_links(&drawn(&files)).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn links_that_resolve_pass() {
        let text = "[a](docs/other.md) ![p](docs/img/a.png \"title\") [f](crates/ops) [w](https://x.y/z) [h](#top)\n\
                    # Top\n[b](./docs/../docs/other.md#adding-a-loss)\n[c]: <docs/other.md#what-and-why>\n\
                    <img src=\"docs/img/a.png\">\n[s](docs/other.md#step-1)\n";
        assert_eq!(on("README.md", text), Vec::<String>::new());
        assert!(on("docs/page.md", "[a](other.md) [b](../crates/ops/src/lib.rs) [root](..)").is_empty());
    }

    #[test]
    fn links_that_do_not_resolve_are_found_with_their_line() {
        let found = on("README.md", "text\n\n[a](docs/missing.md)\n");
        let expected =
            "README.md:3: link `docs/missing.md` leads to `docs/missing.md`, which is not in the repository; ";
        assert!(found.len() == 1 && found[0].starts_with(expected), "{found:?}");
        for bad in [
            "[a](other.md)",
            "![p](docs/img/b.png)",
            "[a]: missing.md",
            "<a href=\"missing.md\">x</a>",
            "[a](../shared/x)",
            "[a](/etc/x)",
            "[a](docs/other.md#not-one)",
            "[a](#nowhere)",
            "`code` [a](missing.md)",
        ] {
            assert_eq!(on("README.md", bad).len(), 1, "{bad}");
        }
        assert_eq!(on("docs/sub/page.md", "[a](other.md)").len(), 1);
    }

    #[test]
    fn code_and_other_pages_are_left_alone() {
        assert!(on("README.md", "```\n[a](missing.md)\n```\n`[a](missing.md)`\n").is_empty());
        assert!(on("crates/x/README.md", "[a](missing.md)").is_empty());
    }
}
