//! The first process of each of the lab's namespaces, and the way into them. Started by the lab only:
//!
//! - `lab-host create KINDS [--inside PID] [--lock FILE]` makes namespaces and waits for their first process;
//! - `lab-host init` is that first process;
//! - `lab-host enter PID -- PROGRAM …` runs a program inside the namespaces of a process;
//! - `lab-host exec PROGRAM …` becomes PROGRAM, which dies with its parent.
//!
//! And by hand: `lab-host hold HOSTS [--join]` keeps a lab of that many hosts up until it is interrupted.
#![forbid(unsafe_code)]

mod init;
mod namespaces;

use std::process::ExitCode;
use std::time::Instant;

use godwit_tests::lab::{Lab, LabError, LabOptions, shell_command};

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let result = match words.as_slice() {
        ["create", kinds, rest @ ..] => namespaces::create(kinds, rest),
        ["init"] => init::run(),
        ["enter", process, "--", command @ ..] if !command.is_empty() => namespaces::enter(process, command),
        ["exec", command @ ..] if !command.is_empty() => namespaces::exec(command),
        ["hold", hosts, rest @ ..] => hold(hosts, rest.contains(&"--join")).map_err(std::io::Error::other),
        _ => Err(std::io::Error::other("lab-host is started by the lab")),
    };
    result.unwrap_or_else(|error| {
        eprintln!("lab-host: {error}");
        ExitCode::from(125)
    })
}

fn hold(hosts: &str, join: bool) -> Result<ExitCode, LabError> {
    let started = Instant::now();
    let options = LabOptions { hosts: hosts.parse().unwrap_or(1), ..LabOptions::default() };
    let lab = Lab::start(options)?;
    if join {
        lab.join_all().inspect_err(|_| eprintln!("{}", lab.logs()))?;
    }
    println!(
        "the lab is up after {} ms, until Ctrl-C; its files are in {}",
        started.elapsed().as_millis(),
        lab.folder().display()
    );
    for host in lab.hosts().iter().chain([lab.coordinator().host()]) {
        println!("{} {}: {}", host.name(), host.address(), shell_command(host)?);
    }
    loop {
        std::thread::park();
    }
}
