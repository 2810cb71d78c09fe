//! Bulk bytes: copies in worker processes ([`worker`], [`copy`]), disks from host to host ([`disk_stream`]), and
//! migration streams over TLS ([`stream`]).
//!
//! A copy goes the cheapest way there is: shared blocks, the file server's own copy, else through [`pass`], by a ring
//! ([`ring`]) or by threads ([`threads`]), whichever a probe of the mounts found better.

mod arena;
mod buffer;
mod choice;
mod chunks;
pub mod command;
pub mod copy;
pub mod digests;
pub mod disk_stream;
#[cfg(fuzzing)]
pub mod fuzzing;
mod image;
mod journal;
mod kernel;
pub mod known;
mod mounts;
mod ordered;
mod pace;
mod pass;
pub mod proof;
mod ring;
mod server_side;
mod stalls;
pub mod stream;
mod threads;
pub mod worker;
mod zeros;

pub use choice::Method;
pub use kernel::IoClass;
pub use ordered::Checksum;
pub use stalls::Stalls;

use std::process::ExitCode;

/// Alignment of offsets, lengths and buffers in direct I/O, in bytes; no common disk wants more.
const BLOCK_BYTES: usize = 4096;

/// What a worker process can be told to do.
#[derive(Clone, Debug, clap::Subcommand)]
pub enum WorkerCommand {
    /// Copy a file for the agent
    Copy(worker::WorkerArgs),
    /// Remove what an abandoned copy left
    Discard(worker::DiscardArgs),
    /// Send a disk to another host for the agent
    Send(disk_stream::worker::WorkerArgs),
    /// Receive a disk from another host for the agent
    Receive(disk_stream::worker::WorkerArgs),
    /// Prove an image that came from another host, and give it its name
    Prove(proof::WorkerArgs),
    /// Do what is asked on stdin in a pool's folder
    #[command(hide = true)]
    Pool,
}

/// Runs a worker's command to its end. It must be the process's only work: no runtime, no other threads.
pub fn run(command: WorkerCommand) -> ExitCode {
    match command {
        WorkerCommand::Copy(args) => worker::run_copy(&args),
        WorkerCommand::Discard(args) => worker::run_discard(&args),
        WorkerCommand::Send(args) => disk_stream::worker::run_send(&args),
        WorkerCommand::Receive(args) => disk_stream::worker::run_receive(&args),
        WorkerCommand::Prove(args) => proof::run(&args),
        WorkerCommand::Pool => crate::storage::run_helper(),
    }
}
