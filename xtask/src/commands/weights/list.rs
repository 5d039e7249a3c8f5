//! `weights list`: the table of named weights.

use anyhow::Result;
use clap::Args;
use serde_json::json;

use crate::hub::registry::{self, NamedWeights, Role};

#[derive(Debug, Args)]
#[command(after_help = "Example:\n  cargo xtask weights list --json")]
pub(crate) struct List {
    /// Print as JSON on stdout
    #[arg(long)]
    pub(crate) json: bool,
}

/// Runs the command.
pub(crate) fn run(args: &List) -> Result<()> {
    let all = registry::all();
    if args.json {
        println!("{}", serde_json::to_string_pretty(&json!({ "weights": all }))?);
        return Ok(());
    }
    for line in lines(all) {
        println!("{line}");
    }
    Ok(())
}

/// A line each: name, what it fills, classes, stated mIoU, licence.
fn lines(all: &[NamedWeights]) -> Vec<String> {
    let fills = |w: &NamedWeights| match w.role {
        Role::Encoder => format!("encoder {}", w.network),
        Role::Segmenter => w.network.clone(),
    };
    let longest = |text: &dyn Fn(&NamedWeights) -> usize| all.iter().map(text).max().unwrap_or(0);
    let (names, filled) = (longest(&|w| w.name.len()), longest(&|w| fills(w).len()));
    let row = |name: &str, fills: &str, classes: &str, miou: &str, licence: &str| {
        format!("{name:<names$}  {fills:<filled$}  {classes:<11}  {miou:>5}  {licence}")
    };
    let mut lines = vec![row("name", "fills", "classes", "mIoU", "licence")];
    for w in all {
        let miou = w.miou.map_or_else(|| "-".into(), |m| format!("{m:.3}"));
        lines.push(row(&w.name, &fills(w), &w.classes, &miou, &w.licence));
    }
    lines.push("mIoU: as published, on val; `weights verify` measures it. Every field: --json.".into());
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_has_its_line() {
        let lines = lines(registry::all());
        assert_eq!(lines.len(), registry::all().len() + 2);
        let line = lines.iter().find(|l| l.starts_with("timm/xception65.tf_in1k ")).unwrap();
        assert!(
            line.contains("encoder xception65") && line.contains("imagenet-1k") && line.ends_with("Apache-2.0"),
            "{line}"
        );
        assert!(lines.iter().any(|l| l.contains("segformer-mit-b2") && l.contains("0.810")));
    }
}
