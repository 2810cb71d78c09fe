//! Disks: a pool is a folder that all hosts of the pool see at the same path.

pub mod dir;
mod gate;
pub mod qcow2;

pub use dir::{InstancePaths, Pool};
pub use gate::Gate;

use crate::hypervisor::chain;
use godwit_protocol::error::{ErrorKind, RequestError};
use std::path::PathBuf;

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

impl From<StorageError> for RequestError {
    fn from(error: StorageError) -> Self {
        let kind = match &error {
            StorageError::Worker(error) => return error.clone(),
            StorageError::Unreachable(_) => ErrorKind::Unavailable,
            StorageError::NotFound(_) => ErrorKind::NotFound,
            StorageError::NoSpace { .. } => ErrorKind::NoSpace,
            StorageError::Invalid(_) => ErrorKind::Invalid,
            StorageError::Unexpected { .. } => ErrorKind::Conflict,
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
