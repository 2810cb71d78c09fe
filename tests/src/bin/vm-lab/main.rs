//! The two ends of a VM of the tests. Started by the library `vm` only:
//!
//! - `vm-lab keep FOLDER SECONDS` runs QEMU for a test, and ends it and removes its folder when the test is gone,
//!   however that ended, or when its time is up;
//! - `vm-lab exec PROGRAM …` becomes PROGRAM, which dies with its parent;
//! - `vm-lab hold` starts a VM and waits for its own end;
//! - `vm-lab init` is the first process inside, `vm-lab serve` runs commands for the test there.
#![forbid(unsafe_code)]

mod init;
mod keep;
mod serve;

use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};

use godwit_tests::vm::Vm;
use nix::sys::prctl;
use nix::sys::signal::Signal;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let result = match words.as_slice() {
        ["keep", folder, seconds] => keep::run(folder.as_ref(), seconds),
        ["exec", program, rest @ ..] => exec(program, rest),
        ["hold"] => hold(),
        ["init"] => init::run(),
        ["serve"] => serve::run(),
        _ => Err(std::io::Error::other("vm-lab is started by the tests")),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("vm-lab: {error}");
            ExitCode::FAILURE
        }
    }
}

fn hold() -> std::io::Result<()> {
    let _vm = Vm::builder("held").start().map_err(std::io::Error::other)?;
    println!("a VM is on");
    loop {
        std::thread::park();
    }
}

fn exec(program: &str, arguments: &[&str]) -> std::io::Result<()> {
    prctl::set_pdeathsig(Signal::SIGKILL)?;
    let error = Command::new(program).args(arguments).exec();
    Err(std::io::Error::new(error.kind(), format!("cannot start {program}: {error}")))
}
