//! Godwit's project commands: `cargo xtask setup | demo | test | tidy | bench | fuzz | oracle | vm`.
//!
//! This crate imports none of Godwit's own crates but the lab's library, so that it builds on a machine
//! where `setup` has not yet installed what the daemons need.
#![forbid(unsafe_code)]

mod bench;
mod command;
mod demo;
mod fuzz;
mod oracle;
mod setup;
mod test;
mod tidy;
mod vm;

use std::error::Error;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Godwit's project commands", version)]
struct Arguments {
    #[command(subcommand)]
    command: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Measure Godwit and its peers side by side
    Bench(bench::Arguments),
    /// Show Godwit's main job on three hosts of this machine
    Demo(demo::Arguments),
    /// Feed random bytes to what reads the bytes of strangers
    Fuzz(fuzz::Arguments),
    /// Answer placement and topology questions with Godwit's own code
    Oracle(oracle::Arguments),
    /// Install what building, the demo and the tests need
    Setup(setup::Arguments),
    /// Check and run everything that must hold
    Test(test::Arguments),
    /// Check crate arrows, module docs, file length and forbidden words
    Tidy(tidy::Arguments),
    /// Boot a VM of Debian's own kernel to look around in
    Vm(vm::Arguments),
}

fn main() -> ExitCode {
    let result: Result<(), Box<dyn Error>> = match Arguments::parse().command {
        Task::Bench(arguments) => bench::run(&arguments).map_err(Into::into),
        Task::Demo(arguments) => demo::run(&arguments).map_err(Into::into),
        Task::Fuzz(arguments) => fuzz::run(&arguments).map_err(Into::into),
        Task::Oracle(arguments) => oracle::run(&arguments).map_err(Into::into),
        Task::Setup(arguments) => setup::run(&arguments).map_err(Into::into),
        Task::Test(arguments) => test::run(&arguments).map_err(Into::into),
        Task::Tidy(arguments) => tidy::run(&arguments).map_err(Into::into),
        Task::Vm(arguments) => vm::run(&arguments).map_err(Into::into),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            causes(&*error).for_each(|cause| eprintln!("  because {cause}"));
            ExitCode::FAILURE
        }
    }
}

/// Why an error came about, the nearest cause first.
fn causes<'a>(error: &'a (dyn Error + 'static)) -> impl Iterator<Item = &'a (dyn Error + 'static)> {
    std::iter::successors(error.source(), |&cause| cause.source())
}
