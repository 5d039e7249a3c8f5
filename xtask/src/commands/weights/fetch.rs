//! `weights fetch`: named weights from the hub into the cache, checked and pinned.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  cargo xtask weights fetch timm/resnet34
  cargo xtask weights fetch smp-hub/segformer-b2-1024x1024-city-160k --lock recipes/weights.lock
  cargo xtask weights fetch timm/resnet34 --revision main        ask the hub again and pin what it says now
  HF_HUB_OFFLINE=1 cargo xtask weights fetch timm/resnet34       is it here, and whole?

The first fetch of a name trusts what the hub serves and writes commit, sha256 and size into the lock file; later
fetches take exactly that, or fail with code 4. The cache is the one of Python's huggingface_hub.
Environment: HF_HOME, HF_HUB_CACHE, HF_ENDPOINT, HF_TOKEN, HF_TOKEN_PATH, HF_HUB_OFFLINE, HF_HUB_ETAG_TIMEOUT,
HF_HUB_DOWNLOAD_TIMEOUT.")]
pub(crate) struct Fetch {
    /// Names of `weights list`
    #[arg(required = true, value_name = "NAME")]
    pub(crate) names: Vec<String>,
    /// Branch, tag or commit; asks the hub again and pins what it says, whatever the lock file says
    #[arg(long, value_name = "REVISION")]
    pub(crate) revision: Option<String>,
    /// sha256 the file must have, for a single name
    #[arg(long, value_name = "HEX")]
    pub(crate) sha256: Option<String>,
    /// Lock file, kept beside the recipe
    #[arg(long, default_value = crate::hub::lock::DEFAULT, value_name = "FILE")]
    pub(crate) lock: PathBuf,
    /// Seconds to wait for an answer, and for a download that stands still; default: 10
    #[arg(long, value_name = "SECONDS")]
    pub(crate) timeout: Option<String>,
    /// Tries after the first
    #[arg(long, default_value_t = 2, value_name = "N")]
    pub(crate) retries: u32,
    /// Print what was fetched as JSON on stdout
    #[arg(long)]
    pub(crate) json: bool,
}

/// Runs the command.
#[cfg(feature = "hub")]
pub(crate) fn run(args: &Fetch) -> Result<()> {
    use crate::exit::usage;
    use crate::hub::settings::{Patience, Settings, seconds};
    use crate::hub::{HubError, Wanted, fetch};

    if args.sha256.is_some() && args.names.len() > 1 {
        return Err(usage!(
            "--sha256 with {} names, expected one\n  hint: fetch the names one by one",
            args.names.len()
        ));
    }
    let mut settings = Settings::from_env().map_err(HubError::coded)?;
    let timeout = seconds("--timeout", args.timeout.clone()).map_err(HubError::coded)?;
    let patience = settings.patience;
    let [answer, stall] = [patience.answer, patience.stall].map(|from_env| timeout.unwrap_or(from_env));
    settings.patience = Patience::of(answer, stall, args.retries.min(100));

    let (mut done, mut failed) = (Vec::new(), None);
    for name in &args.names {
        let (revision, sha256) = (args.revision.as_deref(), args.sha256.as_deref());
        let wanted = Wanted { name, revision, sha256, pin_anew: revision.is_some() };
        match fetch(&wanted, &args.lock, &settings) {
            Ok(fetched) => {
                if !args.json {
                    println!("{}", line(&fetched, &args.lock));
                }
                done.push(fetched);
            }
            // What came before stays fetched, pinned and printed.
            Err(error) => {
                failed = Some(error.coded());
                break;
            }
        }
    }
    if args.json {
        println!("{}", serde_json::to_string_pretty(&to_json(&done, &args.lock))?);
    }
    failed.map_or(Ok(()), Err)
}

/// Runs the command.
#[cfg(not(feature = "hub"))]
pub(crate) fn run(args: &Fetch) -> Result<()> {
    use crate::hub::{HubError, Wanted, resolve};
    for name in &args.names {
        crate::hub::registry::named(name).map_err(HubError::coded)?;
        resolve(&Wanted { name, ..Wanted::default() }, &args.lock).map_err(HubError::coded)?;
    }
    Ok(())
}

#[cfg(feature = "hub")]
fn line(fetched: &crate::hub::Fetched, lock: &std::path::Path) -> String {
    let (name, pin) = (&fetched.weights.name, &fetched.pin);
    let from = match fetched.origin {
        crate::hub::Origin::Cache => "in the cache",
        crate::hub::Origin::Hub => "downloaded",
    };
    let trust = if fetched.newly_pinned {
        format!("trusted on first use: `{}` now pins it", lock.display())
    } else {
        format!("as `{}` says", lock.display())
    };
    let (path, commit, size) = (fetched.path.display(), &pin.commit, pin.size);
    format!("{name}: {from}, {size} bytes, sha256 {}\n  commit {commit}, {trust}\n  {path}", pin.sha256)
}

#[cfg(feature = "hub")]
fn to_json(done: &[crate::hub::Fetched], lock: &std::path::Path) -> serde_json::Value {
    let one = |fetched: &crate::hub::Fetched| {
        let pin = &fetched.pin;
        serde_json::json!({
            "name": fetched.weights.name,
            "repo": pin.repo,
            "file": pin.file,
            "revision": pin.revision,
            "commit": pin.commit,
            "sha256": pin.sha256,
            "size": pin.size,
            "path": fetched.path,
            "from": fetched.origin,
            "newly_pinned": fetched.newly_pinned,
            "layout": fetched.weights.layout,
            "licence": fetched.weights.licence,
        })
    };
    serde_json::json!({ "lock": lock, "weights": done.iter().map(one).collect::<Vec<_>>() })
}
