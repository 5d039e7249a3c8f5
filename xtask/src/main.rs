//! The command line of segdistill: parses, composes the crates, prints. Loops over batches live in `train`.

#![forbid(unsafe_code)]

mod cli;
mod commands;
mod exit;
mod hub;
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
    let level = env_logger::Env::default().default_filter_or("warn");
    let logger = env_logger::Builder::from_env(level).format_timestamp(None).build();
    log::set_max_level(logger.filter());
    log::set_boxed_logger(Box::new(hub::guard::Guard(logger)))
        .expect("no logger was set before the first line of main");
    end_quietly_on_a_closed_pipe();
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

/// `println!` panics when its reader has gone, as with `| head`: that is no defect, and the shell's code for it is 141.
fn end_quietly_on_a_closed_pipe() {
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        if info.payload().downcast_ref::<String>().is_some_and(|text| text.starts_with("failed printing to stdout")) {
            std::process::exit(141);
        }
        report(info);
    }));
}

fn run(cli: Cli) -> anyhow::Result<()> {
    match cli.command {
        Command::Reproduce(args) => commands::reproduce::run(&args),
        Command::Sweep(args) => commands::sweep::run(&args),
        Command::Train(args) => commands::train::run(&args),
        Command::Eval(args) => commands::eval::run(&args),
        Command::Predict(args) => commands::predict::run(&args),
        Command::Report(args) => commands::report::run(&args),
        Command::Data(args) => commands::data::run(&args),
        Command::Models(args) => commands::models::run(&args),
        Command::Weights(args) => commands::weights::run(&args),
        Command::Bench(args) => commands::bench::run(&args),
        Command::Tidy => commands::tidy::run(),
        Command::Ci => commands::ci::run(),
    }
}
