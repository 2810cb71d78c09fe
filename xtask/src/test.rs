//! `cargo xtask test`: everything that must hold, the same here and on a server.
//!
//! Prepares the machine, checks the text, then runs the suites and counts. A suite that runs no test has failed:
//! it says nothing.

mod count;

use std::io::{BufRead as _, BufReader, Write as _};
use std::process::Stdio;
use std::time::Instant;

use crate::command::{self, CommandError};
use crate::setup::{self, SetupError};
use crate::tidy::{self, TidyError};
use count::Count;

/// `cargo xtask test`.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Run this suite only, without the checks of the text
    #[arg(long, value_enum, value_name = "SUITE")]
    only: Option<Suite>,
    /// Also the suite that runs a kernel of its own in QEMU (minutes)
    #[arg(long)]
    vm: bool,
}

/// Why the project does not hold.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TestError {
    #[error("these suites failed: {names}; `cargo xtask test --only SUITE` runs one again")]
    Failed { names: String },
    #[error("the text is not as rustfmt writes it; `cargo fmt --all` mends it")]
    Format { source: CommandError },
    #[error("clippy has something to say; what it printed above says what to do")]
    Lints { source: CommandError },
    #[error("cannot read what the tests print")]
    Read { source: std::io::Error },
    #[error(transparent)]
    Setup(#[from] SetupError),
    #[error(transparent)]
    Tidy(#[from] TidyError),
    #[error(transparent)]
    Command(#[from] CommandError),
}

/// The suites, in the order in which they run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Suite {
    /// Each crate's own tests
    Unit,
    /// A fleet in one process: virtual clock, seeds, faults
    Sim,
    /// Recorded questions answered by the product's own code
    Oracle,
    /// Real hosts of a lab on this machine
    Host,
    /// The unmodified OpenStack clients against a lab
    Clients,
    /// What needs another kernel, in QEMU
    Vm,
}

/// One call of cargo's test runner.
struct Batch {
    /// What to build and run.
    selection: &'static [&'static str],
    /// One test at a time: a machine carries one lab.
    serial: bool,
}

impl Suite {
    fn name(self) -> &'static str {
        match self {
            Suite::Unit => "unit",
            Suite::Sim => "sim",
            Suite::Oracle => "oracle",
            Suite::Host => "host",
            Suite::Clients => "clients",
            Suite::Vm => "vm",
        }
    }

    fn batches(self) -> &'static [Batch] {
        match self {
            Suite::Unit => &[
                Batch { selection: &["--workspace", "--exclude", "godwit-tests"], serial: false },
                Batch { selection: &["-p", "godwit-tests", "--lib"], serial: false },
                Batch {
                    selection: &["--manifest-path", "ebpf/Cargo.toml", "-p", "godwit-ebpf-common"],
                    serial: false,
                },
            ],
            Suite::Sim => &[Batch { selection: &["-p", "godwit-tests", "--test", "sim"], serial: false }],
            Suite::Oracle => &[Batch {
                selection: &["-p", "godwit-tests", "--features", "oracle", "--bin", "oracle"],
                serial: false,
            }],
            Suite::Host => &[Batch { selection: &["-p", "godwit-tests", "--test", "host"], serial: true }],
            Suite::Clients => {
                &[Batch { selection: &["-p", "godwit-tests", "--test", "clients"], serial: true }]
            }
            Suite::Vm => &[Batch { selection: &["-p", "godwit-tests", "--test", "vm"], serial: true }],
        }
    }
}

/// Runs everything, or one suite.
pub(crate) fn run(arguments: &Arguments) -> Result<(), TestError> {
    let started = Instant::now();
    setup::run(&setup::Arguments::default())?;
    let suites: Vec<Suite> = match arguments.only {
        Some(suite) => vec![suite],
        None => {
            check_text()?;
            let all = [Suite::Unit, Suite::Sim, Suite::Oracle, Suite::Host, Suite::Clients, Suite::Vm];
            all.into_iter().filter(|suite| *suite != Suite::Vm || arguments.vm).collect()
        }
    };
    println!("test: building the daemons");
    build_daemons()?;

    let mut total = Count::default();
    let mut failed = Vec::new();
    for suite in suites {
        println!("test: suite {}", suite.name());
        let mut count = Count::default();
        let mut passed = true;
        for batch in suite.batches() {
            passed &= run_batch(batch, &mut count)?;
        }
        if count.run() == 0 {
            println!("test: suite {} ran no test", suite.name());
            passed = false;
        }
        if !passed {
            failed.push(suite.name());
        }
        total += count;
    }
    println!("     Summary [{:>8.3}s] {total}", started.elapsed().as_secs_f64());
    println!("{} tests passed", total.passed);
    if failed.is_empty() { Ok(()) } else { Err(TestError::Failed { names: failed.join(", ") }) }
}

/// Builds what the lab starts, with debugging aids such as crash points.
fn build_daemons() -> Result<(), CommandError> {
    let packages = ["godwit-agent", "godwit-coordinator", "godwit", "godwit-tests"];
    command::run(
        command::cargo().args(["build", "--bins"]).args(packages.map(|name| format!("--package={name}"))),
    )
}

fn check_text() -> Result<(), TestError> {
    tidy::run(&tidy::Arguments::default())?;
    println!("test: formatting");
    for manifest in ["Cargo.toml", "ebpf/Cargo.toml"] {
        command::run(command::cargo().args(["fmt", "--all", "--check", "--manifest-path", manifest]))
            .map_err(|source| TestError::Format { source })?;
    }
    println!("test: lints");
    let lints =
        ["clippy", "--workspace", "--all-targets", "--features", "godwit-tests/oracle", "--quiet", "--"];
    command::run(command::cargo().args(lints).args(["-D", "warnings"]))
        .map_err(|source| TestError::Lints { source })
}

/// Runs one batch, shows what it prints, and adds to `count`; says whether all of it passed.
fn run_batch(batch: &Batch, count: &mut Count) -> Result<bool, TestError> {
    let mut cargo = command::cargo();
    // nextest gives each test a process of its own and says more; cargo's own runner will do where it is absent.
    let nextest = command::succeeds(command::cargo().args(["nextest", "--version"]));
    if nextest {
        cargo.args(["nextest", "run", "--no-fail-fast", "--no-tests=pass"]).args(batch.selection);
        cargo.args(["--status-level", "slow", "--final-status-level", "fail"]);
        if batch.serial {
            cargo.arg("--test-threads=1");
        }
    } else {
        cargo.args(["test", "--no-fail-fast", "--quiet"]).args(batch.selection);
        if batch.serial {
            cargo.args(["--", "--test-threads=1"]);
        }
    }
    // nextest reports on stderr and cargo's runner on stdout; the other one goes where this process's goes.
    let line = if nextest { "cargo nextest" } else { "cargo test" }.to_owned();
    let (reader, mut child) = {
        let (reader, writer) = std::io::pipe().map_err(|source| TestError::Read { source })?;
        if nextest {
            cargo.stderr(writer)
        } else {
            cargo.stdout(writer)
        };
        let child =
            cargo.stdin(Stdio::null()).spawn().map_err(|source| CommandError::Start { line, source })?;
        (reader, child)
    };
    // The command holds the pipe's other end; only without it does the pipe end.
    drop(cargo);
    for line in BufReader::new(reader).split(b'\n') {
        let line = line.map_err(|source| TestError::Read { source })?;
        let _ = std::io::stderr().write_all(&[&line, &b"\n"[..]].concat());
        count.read(&String::from_utf8_lossy(&line));
    }
    Ok(child.wait().map_err(|source| TestError::Read { source })?.success())
}
