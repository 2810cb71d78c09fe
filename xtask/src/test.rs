//! `cargo xtask test`: everything that must hold, the same here and on a server.
//!
//! Prepares the machine, checks the text, then runs the suites and counts. A suite that runs no test has failed:
//! it says nothing.

mod count;

use std::io::{BufRead as _, BufReader, Write as _};
use std::process::Stdio;
use std::time::Instant;

use serde::Deserialize;

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
    /// All of the suite that runs another kernel in QEMU (minutes), not its core only
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
    #[error("cargo metadata does not parse")]
    Metadata { source: serde_json::Error },
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

    /// What cargo is to build and run of it. The packages are always all, because cargo builds what they depend on
    /// with other features, and so anew, for each other choice.
    fn targets(self) -> Result<Vec<String>, TestError> {
        match self {
            Suite::Unit => unit_targets(),
            Suite::Oracle => Ok(vec!["--bin=oracle".to_owned()]),
            _ => Ok(vec![format!("--test={}", self.name())]),
        }
    }

    /// Whether its tests run one at a time: a machine carries one lab.
    fn is_serial(self) -> bool {
        matches!(self, Suite::Host | Suite::Clients | Suite::Vm)
    }
}

/// All libraries, and the programs and tests of all crates but that of the other suites.
fn unit_targets() -> Result<Vec<String>, TestError> {
    let metadata = command::capture(command::cargo().args(["metadata", "--no-deps", "--format-version=1"]))?;
    let metadata: Metadata =
        serde_json::from_str(&metadata).map_err(|source| TestError::Metadata { source })?;
    let packages = metadata.packages.iter().filter(|package| package.name != "godwit-tests");
    let targets = packages.flat_map(|package| &package.targets).flat_map(|target| {
        let kinds = target.kind.iter().filter(|kind| ["bin", "test"].contains(&kind.as_str()));
        kinds.map(|kind| format!("--{kind}={}", target.name))
    });
    Ok(["--lib".to_owned()].into_iter().chain(targets).collect())
}

/// What `cargo metadata` says of the tests that lie beside a crate.
#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Package>,
}

#[derive(Deserialize)]
struct Package {
    name: String,
    targets: Vec<Target>,
}

#[derive(Deserialize)]
struct Target {
    name: String,
    kind: Vec<String>,
}

/// Where in the suite `vm` the tests are that run every time.
const VM_CORE: &str = "core::";

/// Every package, with what is optional in it.
const EVERYTHING: [&str; 3] = ["--workspace", "--features", "godwit-tests/oracle"];

/// Runs everything, or one suite.
pub(crate) fn run(arguments: &Arguments) -> Result<(), TestError> {
    let started = Instant::now();
    setup::run(&setup::Arguments::default())?;
    let suites: Vec<Suite> = match arguments.only {
        Some(suite) => vec![suite],
        None => {
            check_text()?;
            vec![Suite::Unit, Suite::Sim, Suite::Oracle, Suite::Host, Suite::Clients, Suite::Vm]
        }
    };
    println!("test: building");
    build()?;

    let mut total = Count::default();
    let mut failed = Vec::new();
    for suite in suites {
        println!("test: suite {}", suite.name());
        let mut count = Count::default();
        let whole = arguments.vm || arguments.only.is_some();
        let filter = if suite == Suite::Vm && !whole { Some(VM_CORE) } else { None };
        let mut passed = run_tests(&EVERYTHING, &suite.targets()?, filter, suite.is_serial(), &mut count)?;
        if suite == Suite::Unit {
            // A workspace of its own, whose programs no test runner can run; what they share it can.
            let ebpf = ["--manifest-path", "ebpf/Cargo.toml", "-p", "godwit-ebpf-common"];
            passed &= run_tests(&ebpf, &[], None, false, &mut count)?;
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

/// Builds what the lab starts, with debugging aids such as crash points, and the tests with it.
fn build() -> Result<(), CommandError> {
    command::run(command::cargo().arg("build").args(EVERYTHING).arg("--all-targets"))
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

/// Runs the tests of a selection, those whose names hold `filter`, shows what they print, and adds to `count`; says whether all passed.
fn run_tests(
    packages: &[&str],
    targets: &[String],
    filter: Option<&str>,
    serial: bool,
    count: &mut Count,
) -> Result<bool, TestError> {
    let mut cargo = command::cargo();
    // nextest gives each test a process of its own and says more; cargo's own runner will do where it is absent.
    let nextest = command::succeeds(command::cargo().args(["nextest", "--version"]));
    if nextest {
        cargo.args(["nextest", "run", "--no-fail-fast", "--no-tests=pass"]).args(packages).args(targets);
        cargo.args(["--status-level", "slow", "--final-status-level", "fail"]).args(filter);
        if serial {
            cargo.arg("--test-threads=1");
        }
    } else {
        cargo.args(["test", "--no-fail-fast", "--quiet"]).args(packages).args(targets).arg("--").args(filter);
        if serial {
            cargo.arg("--test-threads=1");
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
