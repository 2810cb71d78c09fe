//! Why a copy was not made.

use crate::datapath::choice::Method;
use crate::datapath::digests::DigestsError;
use crate::storage::qcow2::HeaderError;
use godwit_protocol::error::{ErrorKind, RequestError};
use std::io;
use std::path::{Path, PathBuf};

/// Why a copy was not made. Nothing of it has the destination's name then.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    /// The source is not there.
    #[error("{0:?} is not there")]
    NoSource(PathBuf),
    /// The source is a link, a folder or a device.
    #[error("{0:?} is not a regular file")]
    NotRegular(PathBuf),
    /// Its size or time of change moved during the copy.
    #[error("{0:?} changed while it was copied")]
    SourceChanged(PathBuf),
    /// The source is no image of its format.
    #[error("{path:?} cannot be a disk")]
    Header {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: HeaderError,
    },
    /// The disk is to be smaller than what is on it.
    #[error("a disk of {wanted_bytes} bytes is too small for an image of {have_bytes} bytes")]
    TooSmall {
        /// Asked for.
        wanted_bytes: u64,
        /// Size of the image as a guest sees it.
        have_bytes: u64,
    },
    /// Two wishes that exclude one another.
    #[error("{0}")]
    Contradiction(&'static str),
    /// The way that was demanded does not lead there.
    #[error("{} cannot copy {path:?}: {why}", method.as_str())]
    Method {
        /// What was demanded.
        method: Method,
        /// The source.
        path: PathBuf,
        /// Why not.
        why: &'static str,
    },
    /// Something has the name already.
    #[error("{0:?} is there already")]
    DestinationExists(PathBuf),
    /// What has the name is nothing that can be replaced.
    #[error("the destination {path:?} is {found}; only a regular file can be replaced")]
    DestinationKind {
        /// Which.
        path: PathBuf,
        /// What it is.
        found: &'static str,
    },
    /// The path has no last part that could name a file.
    #[error("{0:?} does not name a file")]
    NoName(PathBuf),
    /// The source itself.
    #[error("{0:?} would be copied to itself")]
    SameFile(PathBuf),
    /// Another process is at it.
    #[error("another copy to {0:?} is under way")]
    Busy(PathBuf),
    /// The source's bytes are not those that are known.
    #[error("{path:?} is damaged: the chunk at byte {offset} does not have the digest that it should have")]
    Damaged {
        /// The source.
        path: PathBuf,
        /// Where the chunk begins.
        offset: u64,
    },
    /// The copy reads otherwise than it was written.
    #[error(
        "the copy is wrong: the chunk at byte {offset} does not read as it was written; check the disk of {path:?}"
    )]
    Verify {
        /// The destination.
        path: PathBuf,
        /// Where the chunk begins.
        offset: u64,
    },
    /// The list of digests that was named.
    #[error("{path:?} cannot be used")]
    Expect {
        /// The list.
        path: PathBuf,
        /// Why.
        #[source]
        source: DigestsError,
    },
    /// There is no io_uring.
    #[error("the kernel gives no io_uring (see the sysctl kernel.io_uring_disabled)")]
    NoRing(#[source] io::Error),
    /// `qemu-img` failed.
    #[error("qemu-img cannot grow the disk: {0}")]
    Grow(String),
    /// The file system said no.
    #[error("cannot {action} {path:?}")]
    Io {
        /// `read`, `write`, …
        action: &'static str,
        /// What.
        path: PathBuf,
        /// What it said.
        #[source]
        source: io::Error,
    },
}

impl CopyError {
    /// Whether the same copy may go on later from what is done.
    pub(super) fn may_go_on(&self) -> bool {
        matches!(self, Self::Io { source, .. } if !crate::storage::is_full(source))
    }

    /// The exit status of a command that failed so.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Damaged { .. } | Self::Verify { .. } => 3,
            Self::Io { source, .. } if crate::storage::is_full(source) => 4,
            Self::Busy(_) => 5,
            _ => 1,
        }
    }
}

impl From<CopyError> for RequestError {
    fn from(error: CopyError) -> Self {
        use CopyError as E;
        let kind = match &error {
            E::NoSource(_) => ErrorKind::NotFound,
            E::NotRegular(_)
            | E::Header { .. }
            | E::TooSmall { .. }
            | E::Contradiction(_)
            | E::Method { .. }
            | E::NoName(_)
            | E::SameFile(_)
            | E::DestinationKind { .. } => ErrorKind::Invalid,
            E::SourceChanged(_) | E::DestinationExists(_) | E::Busy(_) => ErrorKind::Conflict,
            E::Io { source, .. } if crate::storage::is_full(source) => ErrorKind::NoSpace,
            E::Damaged { .. } => ErrorKind::Damaged,
            E::Verify { .. } | E::Expect { .. } | E::NoRing(_) | E::Grow(_) | E::Io { .. } => {
                ErrorKind::Internal
            }
        };
        RequestError::new(kind, godwit_protocol::error::chain(&error))
    }
}

/// What the file system said of doing `action` to `path`.
pub(in crate::datapath) fn io_error(
    action: &'static str,
    path: &Path,
) -> impl FnOnce(io::Error) -> CopyError {
    let path = path.to_owned();
    move |source| CopyError::Io { action, path, source }
}
