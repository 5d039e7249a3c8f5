//! The command line of segdistill: parses, composes the crates, prints. Loops over batches live in `train`.

#![forbid(unsafe_code)]

mod cli;
mod commands;
mod exit;
mod pipeline;
mod progress;
mod recipe;
mod report_page;
mod run_folder;

use std::process::ExitCode;

use clap::Parser;
use segdistill_ops::alloc::Recycling;

use cli::{Cli, Command};

#[global_allocator]
static ALLOCATOR: Recycling<mimalloc::MiMalloc> = Recycling::new(mimalloc::MiMalloc);

fn main() -> ExitCode {
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("warn")).format_timestamp(None).init();
    // Backward walks the graph recursively: deep networks need more than the main thread's default stack.
    let worker = std::thread::Builder::new().name("xtask".into()).stack_size(64 << 20).spawn(|| run(Cli::parse()));
    let outcome = match worker.map(std::thread::JoinHandle::join) {
        Ok(Ok(outcome)) => outcome,
        Ok(Err(_)) => return ExitCode::FAILURE,
        Err(e) => Err(e.into()),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(exit::code_of(&error))
        }
    }
}

fn run(cli: Cli) -> anyhow::Result<()> {
    match cli.command {
        Command::Reproduce(args) => commands::reproduce::run(&args),
        Command::Train(args) => commands::train::run(&args),
        Command::Eval(args) => commands::eval::run(&args),
        Command::Predict(args) => commands::predict::run(&args),
        Command::Report(args) => commands::report::run(&args),
        Command::Data(args) => commands::data::run(&args),
        Command::Models(args) => commands::models::run(&args),
        Command::Bench(args) => commands::bench::run(&args),
        Command::Tidy => commands::tidy::run(),
        Command::Ci => commands::ci::run(),
    }
}
