//! `cargo xtask vm`: a VM of Debian's own kernel to look around in, the one that the suite `vm` uses.

use std::io::{BufRead as _, Write as _};
use std::time::{Duration, Instant};

use godwit_tests::vm::{Cell, Vm, VmError};

use crate::command::{self, CommandError};
use crate::setup::{self, SetupError};

/// `cargo xtask vm`.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// CPUs of each cell
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=64))]
    cpus: u32,
    /// Memory of each cell
    #[arg(long, default_value_t = 1024, value_name = "MIB", value_parser = clap::value_parser!(u64).range(256..=65536))]
    memory: u64,
    /// NUMA cells
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=8))]
    cells: u32,
    /// One more disk of so many MiB: /dev/vdc, then /dev/vdd, …
    #[arg(long = "disk", value_name = "MIB", value_parser = clap::value_parser!(u64).range(1..=1_048_576))]
    disks: Vec<u64>,
    /// A command to run in it, instead of those read from stdin
    #[arg(last = true)]
    command: Vec<String>,
}

/// Why there is no VM, or why its command failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum VmTaskError {
    #[error(transparent)]
    Setup(#[from] SetupError),
    #[error(transparent)]
    Command(#[from] CommandError),
    #[error(transparent)]
    Vm(#[from] VmError),
    #[error("the command ended with {0}")]
    Ended(String),
    #[error("cannot read commands")]
    Read(#[from] std::io::Error),
}

/// A person looks around as long as they like.
const DEADLINE: Duration = Duration::from_secs(7 * 24 * 3600);

/// Boots, runs the command or those from stdin, and ends the VM.
pub(crate) fn run(arguments: &Arguments) -> Result<(), VmTaskError> {
    setup::run(&setup::Arguments::default())?;
    let build = ["build", "--quiet", "-p", "godwit-agent", "-p", "godwit-tests", "--bins"];
    command::run(command::cargo().args(build))?;
    let started = Instant::now();
    let mut builder = Vm::builder("vm").program("godwit-agent").deadline(DEADLINE);
    if arguments.cells == 1 {
        builder = builder.cpus(arguments.cpus).memory_mib(arguments.memory);
    } else {
        for cell in 0..arguments.cells {
            let first = cell * arguments.cpus;
            let cpus = first..=first + arguments.cpus - 1;
            builder = builder.cell(Cell { cpus, memory_mib: arguments.memory });
        }
    }
    for mebibytes in &arguments.disks {
        builder = builder.disk(mebibytes << 20);
    }
    let vm = builder.start()?;
    if !arguments.command.is_empty() {
        let words: Vec<&str> = arguments.command.iter().map(String::as_str).collect();
        let output = vm.spawn(&words)?.wait(DEADLINE)?;
        print!("{}", output.stdout);
        eprint!("{}", output.stderr);
        return if output.success() { Ok(()) } else { Err(VmTaskError::Ended(output.status())) };
    }
    let kernel = vm.exec(&["uname", "-r"])?;
    println!("a VM of kernel {} is up after {} ms.", kernel.trim(), started.elapsed().as_millis());
    println!(
        "Each line is a script of its own for its shell; end it with Ctrl-D. Programs of ours are in /job."
    );
    prompt()?;
    for line in std::io::stdin().lock().lines() {
        let output = vm.spawn(&["bash", "-c", &line?])?.wait(DEADLINE)?;
        print!("{}", output.stdout);
        eprint!("{}", output.stderr);
        if !output.success() {
            eprintln!("({})", output.status());
        }
        prompt()?;
    }
    println!();
    Ok(())
}

fn prompt() -> std::io::Result<()> {
    print!("vm# ");
    std::io::stdout().flush()
}
