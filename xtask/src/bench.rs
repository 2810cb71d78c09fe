//! `cargo xtask bench`: Godwit and its peers side by side, alternating, in the same run.
//!
//! A timing is never a test: tests check what is right, this shows what is fast. Every run's result is checked
//! before its time counts.

mod copy;
mod footprint;
mod locality;
mod overlay;
mod place;
mod record;
mod report;
mod scratch;
mod stream;

use std::path::{Path, PathBuf};

use godwit_tests::lab::LabError;
use godwit_tests::vm::VmError;
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike as _;

use crate::command::{self, CommandError};
use crate::setup::{self, SetupError};
use report::Report;

/// `cargo xtask bench`.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// What to measure
    #[arg(value_enum)]
    name: Name,
    /// Three pairs instead of five, and smaller cases
    #[arg(long)]
    quick: bool,
    /// Write one JSON object a line to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Copy in this folder instead, such as nfs42-xfs=/mnt/share; may be repeated
    #[arg(long, value_name = "NAME=FOLDER", value_parser = parse_place)]
    at: Vec<(String, PathBuf)>,
    /// Size of the disks that are copied [default: 2048, 512 with --quick; on NFS 128, 32 with --quick]
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u64).range(16..=1_048_576))]
    disk_mib: Option<u64>,
    /// Of copy, stream and overlay only the cases whose names begin so, such as `ext4-` or `nfs42`; `*` is any text, as in
    /// `*cold-full`; may be repeated
    #[arg(long, value_name = "TEXT")]
    only: Vec<String>,
    /// Take programs from this folder, and neither install peers nor build: for machines that are not built on
    #[arg(long, value_name = "FOLDER")]
    programs: Option<PathBuf>,
}

fn parse_place(text: &str) -> Result<(String, PathBuf), String> {
    match text.split_once('=') {
        Some((name, folder)) if !name.is_empty() && !folder.is_empty() => {
            Ok((name.to_owned(), folder.into()))
        }
        _ => Err("NAME=FOLDER, such as nfs42-xfs=/mnt/share".to_owned()),
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Name {
    /// Every family
    All,
    /// Copying a disk image
    Copy,
    /// A disk from one host to another
    Stream,
    /// What the idle daemons cost
    Footprint,
    /// What telling where guests are costs
    Locality,
    /// What crosses the underlay, and what the programs of the overlay cost
    Overlay,
    /// Finding the host and the exact place on it
    Place,
}

/// Why there are no figures.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BenchError {
    #[error("{what}")]
    Io { what: String, source: std::io::Error },
    #[error("{case}: {tool} did not bring the right result; its time does not count, and nor does the run")]
    Wrong { case: String, tool: String },
    #[error("no case's name begins with {only}; `*` before it finds it anywhere")]
    NoCase { only: String },
    #[error("{line} did not end within {seconds} s")]
    TooLong { line: String, seconds: &'static str },
    #[error("{daemon} does not run; its log ends:\n{log}")]
    NotRunning { daemon: String, log: String },
    #[error(transparent)]
    Lab(#[from] LabError),
    #[error(transparent)]
    Vm(#[from] VmError),
    #[error(transparent)]
    Setup(#[from] SetupError),
    #[error(transparent)]
    Command(#[from] CommandError),
}

impl BenchError {
    fn io(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> BenchError {
        let what = what.into();
        move |source| BenchError::Io { what, source }
    }
}

/// How thorough a run is.
#[derive(Debug, Clone, Copy)]
struct Effort<'a> {
    quick: bool,
    /// What names begin with, `*` for any text; none: all cases.
    only: &'a [String],
}

impl Effort<'_> {
    /// Whether a case is asked for.
    fn wants(self, case: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|pattern| begins_with(case, pattern))
    }

    /// Runs of each side.
    fn pairs(self) -> usize {
        if self.quick { 3 } else { 5 }
    }
}

/// Whether a name begins with a pattern, in which `*` stands for any text.
fn begins_with(name: &str, pattern: &str) -> bool {
    let mut parts = pattern.split('*');
    let rest = name.strip_prefix(parts.next().unwrap_or_default());
    parts
        .try_fold(rest, |rest, part| Some(rest?.split_once(part).map(|(_, after)| after)))
        .flatten()
        .is_some()
}

/// Installs the peers, builds the release profile, measures, prints.
pub(crate) fn run(arguments: &Arguments) -> Result<(), BenchError> {
    let programs = match &arguments.programs {
        // Labs start them from elsewhere.
        Some(folder) => {
            folder.canonicalize().map_err(BenchError::io(format!("cannot look at {}", folder.display())))?
        }
        None => build(arguments.name)?,
    };
    let effort = Effort { quick: arguments.quick, only: &arguments.only };
    let mut report = Report::open(arguments.json.as_deref())?;
    for family in FAMILIES.into_iter().filter(|family| [*family, Name::All].contains(&arguments.name)) {
        let measured = measure(family, arguments, &programs, effort, &mut report);
        // What was measured before a failure is worth seeing.
        report.print_rest();
        measured?;
    }
    match report.is_empty() {
        true => Err(BenchError::NoCase { only: arguments.only.join(" or ") }),
        false => Ok(()),
    }
}

/// All families, in their order.
const FAMILIES: [Name; 6] =
    [Name::Copy, Name::Place, Name::Stream, Name::Footprint, Name::Locality, Name::Overlay];

/// Installs the peers and builds; the folder of the programs.
fn build(name: Name) -> Result<PathBuf, BenchError> {
    setup::run(&setup::Arguments { bench: true, ..setup::Arguments::default() })?;
    println!("bench: building in the release profile");
    let packages = ["godwit-agent", "godwit-coordinator", "godwit", "godwit-tests"];
    let packages = packages.map(|name| format!("--package={name}"));
    command::run(
        command::cargo()
            .args(["build", "--release", "--bins", "--features=godwit-tests/oracle"])
            .args(packages),
    )?;
    if matches!(name, Name::All | Name::Copy) {
        // VMs are kept by a program beside this one.
        let keeper = ["build", "--quiet", "--package=godwit-tests", "--bin=vm-lab"];
        command::run(command::cargo().args(keeper))?;
    }
    Ok(command::target_folder().join("release"))
}

fn measure(
    family: Name,
    arguments: &Arguments,
    programs: &Path,
    effort: Effort<'_>,
    report: &mut Report,
) -> Result<(), BenchError> {
    match family {
        Name::All => Ok(()),
        Name::Copy => copy::measure(programs, effort, &arguments.at, arguments.disk_mib, report),
        Name::Stream => stream::measure(programs, effort, report),
        Name::Footprint => report.add(footprint::measure(programs, effort)?),
        Name::Locality => report.add(locality::measure(programs, effort)?),
        Name::Overlay => overlay::measure(programs, effort, report),
        Name::Place => place::measure(programs, effort, report),
    }
}

/// User and system time of all children that have ended, in seconds.
fn children_cpu_s() -> Result<f64, BenchError> {
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN)
        .map_err(|error| BenchError::io("cannot read the children's CPU time")(error.into()))?;
    Ok((usage.user_time().num_microseconds() + usage.system_time().num_microseconds()) as f64 / 1e6)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_taken_by_its_begin_and_by_what_stands_for_any_text() {
        for (name, pattern, taken) in [
            ("ext4-cold-full", "ext4-", true),
            ("nfs42-ext4-cold-full", "ext4-", false),
            ("nfs42-ext4-cold-full", "nfs42", true),
            ("nfs42-ext4-cold-full", "*ext4-", true),
            ("ext4-cold-full", "*cold-full", true),
            ("ext4-cold-full", "ext4*full", true),
            ("ext4-cold-sparse", "ext4*full", false),
            ("ext4-cold-full", "*full*ext4", false),
            ("ext4-cold-full", "*", true),
            ("ext4-cold-full", "", true),
        ] {
            assert_eq!(begins_with(name, pattern), taken, "{name} by {pattern}");
        }
    }
}
