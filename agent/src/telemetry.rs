//! What the data plane does, counted in the kernel: loads the eBPF programs, keeps them attached, and reads
//! their maps when somebody asks. The scrape is the clock; nothing here polls.
//!
//! Maps and attachments are pinned under `<bpffs>/godwit`. They outlive the agent, and the next agent adopts
//! them: counters go on, and the programs are exchanged without a packet in between.

mod attachment;
mod batch;
pub mod filter;
mod pins;
pub mod plane;
mod ports;
mod query;
mod series;
mod shared;
mod tables;
pub(crate) mod taps;
pub mod vxlan;

pub use shared::Capacity;

use aya::programs::ProgramError;
use nix::time::{ClockId, clock_gettime};
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::Duration;

/// Why telemetry is not there.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TelemetryError {
    /// The kernel cannot attach the programs. It is not asked to load them: an older verifier takes minutes over some.
    #[error("the eBPF programs need Linux 6.6 or newer, and this is {release}")]
    OldKernel {
        /// As `uname -r` says it.
        release: String,
    },
    /// There is no BPF file system where one is expected.
    #[error("{path} is no BPF file system: mount one with `mount -t bpf bpf {path}`")]
    NoBpffs {
        /// The folder.
        path: PathBuf,
    },
    /// A pinned file or its folder cannot be made, read or removed.
    #[error("cannot use {path}")]
    Pin {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The link to watch is not there.
    #[error(
        "there is no link {link}: set `underlay_link` in agent.toml to the link that VXLAN packets leave by"
    )]
    NoLink {
        /// Its name.
        link: String,
    },
    /// The kernel refuses the object, its maps or its types.
    #[error("the kernel does not take the object of the eBPF programs")]
    Object(#[source] Box<aya::EbpfError>),
    /// The kernel refuses a program, or what is to be done with it.
    #[error(
        "the eBPF program {program} cannot be {action}; it needs Linux 6.6 or newer and the right to use BPF"
    )]
    Program {
        /// Its name.
        program: &'static str,
        /// Loaded, attached, …
        action: &'static str,
        /// Why.
        source: Box<ProgramError>,
    },
    /// The attachment of a program cannot be taken over or pinned.
    #[error("the attachment of the eBPF program {program} cannot be {action}")]
    Attachment {
        /// The program's name.
        program: &'static str,
        /// Adopted, pinned, …
        action: &'static str,
        /// Why.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A map cannot be read.
    #[error("the eBPF map {map} cannot be read")]
    Map {
        /// Its name.
        map: &'static str,
        /// Why.
        source: Box<aya::maps::MapError>,
    },
    /// A map has no room for what a port needs.
    #[error("the eBPF map {map} is full: this host has more ports than it has room for")]
    Full {
        /// Its name.
        map: &'static str,
    },
    /// The object lacks a map or program that this agent was built for.
    #[error("the eBPF object has no {name}: it was built from other sources than the agent")]
    Incomplete {
        /// Which.
        name: &'static str,
    },
}

/// The clock that programs read.
fn monotonic_ns() -> u64 {
    // It cannot fail: every kernel has this clock.
    clock_gettime(ClockId::CLOCK_MONOTONIC)
        .map_or(0, |now| now.tv_sec() as u64 * 1_000_000_000 + now.tv_nsec() as u64)
}

/// How long the kernel measures what programs cost, and the time from one beginning of that to the next. It looks at the clock
/// twice a run, which can take longer than the program.
const MEASURE: Duration = Duration::from_secs(1);
const MEASURE_EVERY: Duration = Duration::from_secs(30);

/// The kernel measures what programs cost while this is there.
pub struct Measuring(#[expect(dead_code, reason = "its end is what counts")] OwnedFd);

/// Has the kernel measure what programs cost.
///
/// # Errors
/// The kernel refuses.
pub fn measure_programs() -> io::Result<Measuring> {
    aya::sys::enable_stats(aya::sys::Stats::RunTime).map(Measuring).map_err(|error| error.io_error)
}

/// Has the kernel measure what programs cost, now and then.
pub async fn sample_programs() {
    let mut beginnings = tokio::time::interval(MEASURE_EVERY);
    loop {
        beginnings.tick().await;
        match measure_programs() {
            Ok(measuring) => {
                tokio::time::sleep(MEASURE).await;
                drop(measuring);
            }
            Err(error) => return tracing::warn!("the programs' own cost is not measured: {error}"),
        }
    }
}
