//! Disks: a pool is a folder that all hosts of the pool see at the same path.

mod base;
pub mod dir;
mod folder;
mod gate;
mod grow;
mod helper;
mod images;
mod lease;
pub mod mount;
mod moves;
mod pool_mark;
pub mod qcow2;
mod watch;

pub use base::Base;
pub use dir::{Disks, InstancePaths, Pool, PoolPolicy};
pub use gate::Gate;
pub use helper::run as run_helper;
pub use mount::{Outage, Share};
pub use moves::Seen;
pub use watch::PoolChange;

use godwit_protocol::error::{ErrorKind, RequestError, chain};
use godwit_protocol::id::HostId;
use std::path::{Path, PathBuf};

/// Why a pool did not do it.
#[derive(Debug, thiserror::Error)]
pub enum StorageError {
    /// The mount does not answer.
    #[error("the pool {0} does not answer; check its mount")]
    Unreachable(PathBuf),
    /// There is no such image or instance on the pool.
    #[error("{0} is not there")]
    NotFound(PathBuf),
    /// The pool is full.
    #[error("the pool {pool} is full: {need_bytes} bytes are needed, {have_bytes} are free")]
    NoSpace {
        /// Which.
        pool: PathBuf,
        /// Wanted.
        need_bytes: u64,
        /// Free for root.
        have_bytes: u64,
    },
    /// The image or the request cannot be used.
    #[error("{0}")]
    Invalid(String),
    /// A file is not what it should be, a symbolic link for example.
    #[error("{path} is {found}, not {wanted}; it is left alone")]
    Unexpected {
        /// Which.
        path: PathBuf,
        /// What it is.
        found: &'static str,
        /// What it should be.
        wanted: &'static str,
    },
    /// Another host has the disk.
    #[error("{path} is held for writing by host {host}; it must stop the instance or give it up first")]
    Held {
        /// Which disk.
        path: PathBuf,
        /// Who has it.
        host: HostId,
    },
    /// Something else is mounted where a share should be.
    #[error("{found} is mounted at {path}, not {wanted}; unmount it, or correct [nfs] in agent.toml")]
    WrongMount {
        /// Where.
        path: PathBuf,
        /// What is there.
        found: String,
        /// What should be.
        wanted: String,
    },
    /// mount(8) or umount(8) failed.
    #[error("cannot mount {share}: {said}")]
    Mount {
        /// Which.
        share: String,
        /// What was said.
        said: String,
    },
    /// No overlay is made where the file system has reflinks.
    #[error("{REFLINKS}")]
    Reflinks,
    /// A worker process refused or failed, in its own words.
    #[error(transparent)]
    Worker(#[from] RequestError),
    /// The file system said no.
    #[error("cannot {action} {path}")]
    Io {
        /// `read`, `remove`, …
        action: &'static str,
        /// What.
        path: PathBuf,
        /// What it said.
        #[source]
        source: std::io::Error,
    },
}

/// What [`StorageError::Reflinks`] says, by which it is known after it came from a helper.
const REFLINKS: &str = "the pool has reflinks, which are better than an overlay";

impl StorageError {
    fn says_reflinks(&self) -> bool {
        match self {
            StorageError::Reflinks => true,
            StorageError::Worker(error) => error.kind == ErrorKind::Conflict && error.message == REFLINKS,
            _ => false,
        }
    }
}

fn io_error(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> StorageError {
    let path = path.to_owned();
    move |source| StorageError::Io { action, path, source }
}

impl From<StorageError> for RequestError {
    fn from(error: StorageError) -> Self {
        let kind = match &error {
            StorageError::Worker(error) => return error.clone(),
            StorageError::Unreachable(_) | StorageError::Mount { .. } => ErrorKind::Unavailable,
            StorageError::NotFound(_) => ErrorKind::NotFound,
            StorageError::NoSpace { .. } => ErrorKind::NoSpace,
            StorageError::Invalid(_) => ErrorKind::Invalid,
            StorageError::Unexpected { .. }
            | StorageError::Held { .. }
            | StorageError::WrongMount { .. }
            | StorageError::Reflinks => ErrorKind::Conflict,
            StorageError::Io { source, .. } if is_full(source) => ErrorKind::NoSpace,
            StorageError::Io { .. } => ErrorKind::Internal,
        };
        RequestError::new(kind, chain(&error))
    }
}

/// Whether the file system has no room left, or the quota.
pub(crate) fn is_full(error: &std::io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT))
}
