//! What may go wrong with a lab.

use std::io;
use std::path::PathBuf;

/// Why the lab could not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum LabError {
    /// A lab needs namespaces and mounts.
    #[error("a lab needs root")]
    NotRoot,
    /// One lab a machine.
    #[error("a lab runs already (process {process}); wait for its end, or stop it with `kill {process}`")]
    AlreadyRunning {
        /// The process that holds it.
        process: i32,
    },
    /// A program that the lab starts has not been built.
    #[error("{path} is not there; `cargo build` it first")]
    NotBuilt {
        /// Where it should be.
        path: PathBuf,
    },
    /// A host covers the folder that the programs are in.
    #[error("{path} is hidden inside a lab host; keep the checkout elsewhere")]
    Hidden {
        /// Where the programs are.
        path: PathBuf,
    },
    /// Input or output failed.
    #[error("{what}")]
    Io {
        /// What was being done.
        what: String,
        /// What the system said.
        source: io::Error,
    },
    /// A namespace's first process said no, or ended.
    #[error("{host}: {message}")]
    Host {
        /// The host.
        host: String,
        /// What it said.
        message: String,
    },
    /// The host is powered off.
    #[error("{host} is powered off")]
    PoweredOff {
        /// The host.
        host: String,
    },
    /// A command inside a host failed.
    #[error("{host}: `{command}` failed ({status}): {stderr}")]
    Command {
        /// The host.
        host: String,
        /// The command line.
        command: String,
        /// Exit code or signal.
        status: std::process::ExitStatus,
        /// What it said.
        stderr: String,
    },
    /// A program's output is not what the lab expected.
    #[error("{host}: `{command}` answered {output:?}")]
    Answer {
        /// The host.
        host: String,
        /// The command line.
        command: String,
        /// What it wrote.
        output: String,
    },
    /// Something did not happen in time.
    #[error("{host}: {what} did not happen within {seconds} s")]
    Late {
        /// The host.
        host: String,
        /// What was waited for.
        what: String,
        /// For how long.
        seconds: u64,
    },
}

impl LabError {
    pub(super) fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> LabError {
        let what = what.into();
        move |source| LabError::Io { what, source }
    }
}
