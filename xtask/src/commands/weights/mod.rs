//! `weights`: what the program knows of weights made elsewhere: names, downloads, files in and files out.
//!
//! Formats and key maps live in `segdistill_models::weights`, the hub in `crate::hub`; here they are composed.

use anyhow::Result;
use clap::Subcommand;

pub(crate) mod export;
pub(crate) mod fetch;
pub(crate) mod import;
pub(crate) mod inspect;
pub(crate) mod list;
pub(crate) mod source;
pub(crate) mod verify;

/// Weights in and out of the formats people have.
#[derive(Debug, Subcommand)]
pub(crate) enum Weights {
    /// Named weights this program can fetch
    List(list::List),
    /// Download named weights from the hub, checked and pinned
    Fetch(fetch::Fetch),
    /// Format, tensors, shapes and layout of a weight file, without running anything
    Inspect(inspect::Inspect),
    /// Turn a .safetensors or .pth file into a model folder that predict, eval and recipes take
    Import(import::Import),
    /// Write a model in the names of another library, with config.json and a model card
    Export(export::Export),
    /// Evaluate a model on a split and compare with its stated mIoU; exit code 5 when they differ
    Verify(verify::Verify),
}

/// Runs the command.
pub(crate) fn run(args: &Weights) -> Result<()> {
    match args {
        Weights::List(args) => list::run(args),
        Weights::Fetch(args) => fetch::run(args),
        Weights::Inspect(args) => inspect::run(args),
        Weights::Import(args) => import::run(args),
        Weights::Export(args) => export::run(args),
        Weights::Verify(args) => verify::run(args),
    }
}
