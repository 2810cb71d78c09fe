//! `cargo xtask bench`: Godwit and its peers side by side, alternating, in the same run.
//!
//! A timing is never a test: tests check what is right, this shows what is fast. Every run's result is checked
//! before its time counts.

mod copy;
mod footprint;
mod locality;
mod record;

use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use godwit_tests::lab::LabError;

use crate::command::{self, CommandError};
use crate::setup::{self, SetupError};
use record::{Record, print_table};

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
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Name {
    /// Every family
    All,
    /// Copying a disk image
    Copy,
    /// What the idle daemons cost
    Footprint,
    /// What telling where guests are costs
    Locality,
}

/// Why there are no figures.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BenchError {
    #[error("{what}")]
    Io { what: String, source: std::io::Error },
    #[error("{case}: {tool} did not bring the same bytes; its time does not count, and nor does the run")]
    Wrong { case: String, tool: String },
    #[error("{daemon} does not run; its log ends:\n{log}")]
    NotRunning { daemon: String, log: String },
    #[error(transparent)]
    Lab(#[from] LabError),
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
struct Effort {
    quick: bool,
}

impl Effort {
    /// Runs of each side.
    fn pairs(self) -> usize {
        if self.quick { 3 } else { 5 }
    }
}

/// Installs the peers, builds the release profile, measures, prints.
pub(crate) fn run(arguments: &Arguments) -> Result<(), BenchError> {
    setup::run(&setup::Arguments { bench: true, ..setup::Arguments::default() })?;
    println!("bench: building in the release profile");
    let packages = ["godwit-agent", "godwit-coordinator", "godwit", "godwit-tests"];
    let packages = packages.map(|name| format!("--package={name}"));
    command::run(
        command::cargo()
            .args(["build", "--release", "--bins", "--features=godwit-tests/oracle"])
            .args(packages),
    )?;
    let programs = command::target_folder().join("release");

    let effort = Effort { quick: arguments.quick };
    let mut records = Vec::new();
    let measured = measure(arguments.name, &programs, effort, &mut records);
    // What was measured before a failure is worth keeping.
    if let Some(path) = &arguments.json {
        write(path, &records).map_err(BenchError::io(format!("cannot write {}", path.display())))?;
    }
    measured
}

fn measure(name: Name, programs: &Path, effort: Effort, records: &mut Vec<Record>) -> Result<(), BenchError> {
    if matches!(name, Name::All | Name::Copy) {
        let measured = copy::measure(programs, effort)?;
        print_table(&measured);
        records.extend(measured);
    }
    if matches!(name, Name::All | Name::Footprint) {
        let measured = footprint::measure(programs, effort)?;
        print_table(&measured);
        records.extend(measured);
    }
    if matches!(name, Name::All | Name::Locality) {
        let measured = locality::measure(programs, effort)?;
        print_table(&measured);
        records.extend(measured);
    }
    Ok(())
}

fn write(path: &Path, records: &[Record]) -> std::io::Result<()> {
    let mut file = File::create(path)?;
    for record in records {
        writeln!(file, "{}", record.to_json())?;
    }
    Ok(())
}
