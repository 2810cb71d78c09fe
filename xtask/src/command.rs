//! Starting other programs, with errors that name them.

use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Output};

/// A program that could not be started, or that failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CommandError {
    /// The program is not there, or may not be executed.
    #[error("cannot start `{line}`")]
    Start {
        /// The command line.
        line: String,
        /// What the system said.
        source: io::Error,
    },
    /// The program ended with a failure; what it had to say it has said on stderr.
    #[error("`{line}` failed ({status})")]
    Failed {
        /// The command line.
        line: String,
        /// Exit code or signal.
        status: ExitStatus,
    },
}

/// Runs `command` with this process's own output; an exit code other than 0 is an error.
pub(crate) fn run(command: &mut Command) -> Result<(), CommandError> {
    let status = command.status().map_err(|source| CommandError::Start { line: line(command), source })?;
    check(command, status)
}

/// Runs `command` and returns what it wrote to stdout; stderr goes where this process's goes.
pub(crate) fn capture(command: &mut Command) -> Result<String, CommandError> {
    let output = command
        .stderr(std::process::Stdio::inherit())
        .output()
        .map_err(|source| CommandError::Start { line: line(command), source })?;
    check(command, output.status)?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Runs `command` in silence; says whether it succeeded. A missing program is a plain `false`.
pub(crate) fn succeeds(command: &mut Command) -> bool {
    matches!(command.output(), Ok(Output { status, .. }) if status.success())
}

fn check(command: &Command, status: ExitStatus) -> Result<(), CommandError> {
    if status.success() { Ok(()) } else { Err(CommandError::Failed { line: line(command), status }) }
}

fn line(command: &Command) -> String {
    let mut line = command.get_program().to_string_lossy().into_owned();
    for argument in command.get_args() {
        line.push(' ');
        line.push_str(&argument.to_string_lossy());
    }
    line
}

/// The workspace's folder.
pub(crate) fn workspace() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new("/"))
}

/// Cargo's target folder: the one this program was built into.
pub(crate) fn target_folder() -> PathBuf {
    std::env::current_exe()
        .ok()
        .and_then(|program| program.parent()?.parent().map(Path::to_path_buf))
        .unwrap_or_else(|| workspace().join("target"))
}

/// The cargo that started this program, with an environment as if a person had started it.
///
/// Cargo tells this program of the package it is, and build scripts of others, ring's among them, run again when
/// those variables change: each turn from `cargo build` to `cargo xtask` and back would compile half the
/// dependencies anew.
pub(crate) fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(workspace());
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        if PACKAGE_VARIABLES.iter().any(|prefix| text.starts_with(prefix)) {
            command.env_remove(name);
        }
    }
    command
}

/// Beginnings of what cargo sets for a program that it runs (The Cargo Book, environment variables).
const PACKAGE_VARIABLES: [&str; 6] =
    ["CARGO_PKG_", "CARGO_MANIFEST_", "CARGO_CRATE_NAME", "CARGO_BIN_", "CARGO_PRIMARY_PACKAGE", "OUT_DIR"];
