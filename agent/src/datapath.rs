//! Bulk bytes: copies through io_uring in worker processes ([`worker`], [`copy`]), and migration streams over TLS
//! ([`stream`]).

pub mod copy;
mod reflink;
mod ring;
pub mod stream;
pub mod worker;

use std::process::ExitCode;

/// What a worker process can be told to do.
#[derive(Clone, Debug, clap::Subcommand)]
pub enum WorkerCommand {
    /// Copy a file: by reflink where the file system can, else its data extents through io_uring.
    Copy(worker::CopyArgs),
}

/// Runs a worker's command to its end. It must be the process's only work: no runtime, no other threads.
pub fn run(command: WorkerCommand) -> ExitCode {
    match command {
        WorkerCommand::Copy(args) => worker::run_copy(&args),
    }
}
