//! What a copy is asked for, and what it tells afterwards.

use crate::datapath::choice::Method;
use crate::datapath::kernel::IoClass;
use crate::datapath::ordered::Checksum;
use godwit_protocol::image::DiskFormat;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// What to copy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CopyOrder {
    /// A regular file; a symbolic link is refused.
    pub source: PathBuf,
    /// A new file, or with [`Options::overwrite`] one that is replaced when the copy is whole.
    pub destination: PathBuf,
    /// How the source's bytes are to be read when the disk is to grow or to change its format.
    pub format: DiskFormat,
    /// Size of the disk that a guest is to see, in bytes; none: as the source.
    pub size_bytes: Option<u64>,
    /// All else.
    pub options: Options,
}

/// What may be asked of a copy beside the bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// The destination's format; none: the file's bytes as they are.
    pub to: Option<DiskFormat>,
    /// Demands a way; none: the best is found.
    pub method: Option<Method>,
    /// Reads the copy again, past the page cache, and compares it with what passed.
    pub verify: bool,
    /// Leaves the digests of the copy's chunks beside it (`digests`).
    pub digests: bool,
    /// A list of digests that the source must have; none: the one beside the source, when it is there and fresh.
    pub expect: Option<PathBuf>,
    /// Digests of the whole to make.
    pub checksums: Vec<Checksum>,
    /// Most bytes a second.
    pub bandwidth_bytes: Option<u64>,
    /// Finds the best loop for the mounts anew, with however few bytes, whatever an earlier probe found.
    pub probe: bool,
    /// The process's I/O priority.
    pub io_class: Option<IoClass>,
    /// Uses fewer requests at a time while other work slows the mount down.
    pub polite: bool,
    /// Replaces a regular file at the destination.
    pub overwrite: bool,
    /// Begins anew whatever an earlier attempt left, and leaves nothing to a later one.
    pub no_resume: bool,
    /// Keeps what is done when reading or writing fails, so that the same copy can go on later.
    pub keep_partial: bool,
    /// Access rights of the copy; none: for its owner only.
    pub mode: Option<u32>,
    /// Where is kept what probes found; none: nowhere.
    pub known: Option<PathBuf>,
}

/// How long the parts of a copy took, in milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Phases {
    /// Opening, checking, reading tables.
    pub prepare_ms: u64,
    /// Moving bytes.
    pub transfer_ms: u64,
    /// Bringing them to stable storage.
    pub sync_ms: u64,
    /// Reading them again.
    pub verify_ms: u64,
}

/// What a copy was.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CopyReport {
    /// How.
    pub method: Method,
    /// Why so, for people.
    pub reason: String,
    /// Chunks under way at a time; 0 where the method has none.
    #[serde(default)]
    pub depth: usize,
    /// Whether source and destination went past the page cache.
    #[serde(default)]
    pub direct: (bool, bool),
    /// Size of the source in bytes: its file's, or its disk's when the format changed.
    pub size_bytes: u64,
    /// Data that was read, without holes, in bytes; 0 for a reflink.
    pub data_bytes: u64,
    /// Data that was written, without zeros found on the way, in bytes.
    #[serde(default)]
    pub written_bytes: u64,
    /// Data that an earlier attempt had brought over, in bytes.
    #[serde(default)]
    pub resumed_bytes: u64,
    /// Whether the bytes of the source were compared with digests that were known before.
    #[serde(default)]
    pub checked: bool,
    /// Whether the copy was read again and is right.
    #[serde(default)]
    pub verified: bool,
    /// Digest of the list of digests beside the copy, in hexadecimal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digests_root: Option<String>,
    /// SHA-512 of the disk's bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha512: Option<String>,
    /// MD5 of the disk's bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub md5: Option<String>,
    /// Where the time went.
    #[serde(default)]
    pub phases: Phases,
}
