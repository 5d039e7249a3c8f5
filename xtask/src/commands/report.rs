//! `report`: the page of finished runs, from what they left; nothing is trained or evaluated.

use anyhow::Result;

use crate::cli::Report;
use crate::exit::usage;
use crate::report_page;

/// Runs the command.
pub(crate) fn run(args: &Report) -> Result<()> {
    let out = match (&args.out, args.runs.as_slice()) {
        (Some(out), _) => out.clone(),
        (None, [run]) => run.join("report"),
        (None, _) => return Err(usage!("a report of several runs needs a folder\n  hint: --out DIR")),
    };
    let written = report_page::write(&args.runs, &out)?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&written.rows)?);
    } else {
        println!("{}", written.text);
    }
    eprintln!("report: {}", written.page.display());
    Ok(())
}
