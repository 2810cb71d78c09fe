//! What may go wrong with a VM.

use std::io;
use std::path::PathBuf;

use crate::guest_image::GuestImageError;

/// Why a VM did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// The root image is made of files with many owners.
    #[error("a VM's image is built by root")]
    NotRoot,
    /// A program that the VM needs has not been built.
    #[error("{path} is not there; `cargo build` it first")]
    NotBuilt {
        /// Where it should be.
        path: PathBuf,
    },
    /// A part of the image, or the tool that makes it, is missing or failed.
    #[error(transparent)]
    Image(#[from] GuestImageError),
    /// Input or output failed.
    #[error("{what}")]
    Io {
        /// What was being done.
        what: String,
        /// What the system said.
        source: io::Error,
    },
    /// QEMU did not start, or ended by itself.
    #[error("{vm}: QEMU ended: {message}")]
    Qemu {
        /// The VM.
        vm: String,
        /// What QEMU and the console said last.
        message: String,
    },
    /// The VM is off, or went off while something ran in it.
    #[error("{vm} is powered off")]
    PoweredOff {
        /// The VM.
        vm: String,
    },
    /// A command could not be started inside.
    #[error("{vm}: cannot start `{command}`: {message}")]
    NotStarted {
        /// The VM.
        vm: String,
        /// The command line.
        command: String,
        /// What the VM's system said.
        message: String,
    },
    /// A command inside failed.
    #[error("{vm}: `{command}` failed ({status}): {stderr}")]
    Command {
        /// The VM.
        vm: String,
        /// The command line.
        command: String,
        /// "exit code 1" or "signal 9".
        status: String,
        /// What it said.
        stderr: String,
    },
    /// Something did not happen in time.
    #[error("{vm}: {what} did not happen within {seconds} s")]
    Late {
        /// The VM.
        vm: String,
        /// What was waited for.
        what: String,
        /// For how long.
        seconds: u64,
    },
}

impl VmError {
    pub(super) fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> VmError {
        let what = what.into();
        move |source| VmError::Io { what, source }
    }
}
