//! Bringing an instance's disk, or an image, to a host whose pool is another one: what the two hosts are told.

use crate::id::{HostId, ImageId, InstanceId};
use crate::image::DiskFormat;
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;
use uuid::Uuid;

/// To the source: put a mark beside the disk, by which the target finds out whether its pool is the same. Each mark is
/// used once, so that no cache of a file system can know its name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskMark {
    /// Whose disk.
    pub instance: InstanceId,
    /// The mark.
    pub mark: Uuid,
}

/// What an overlay lies on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskBase {
    /// Its format.
    pub format: DiskFormat,
    /// Bytes that it takes.
    pub used_bytes: u64,
}

/// One of the files that a disk is made of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DiskPart {
    /// The disk itself.
    #[default]
    Disk,
    /// What it lies on: the bytes of an image. A host that has the image in its pool takes them from there.
    Base {
        /// Their format.
        format: DiskFormat,
        /// Whose bytes they are.
        image: ImageId,
    },
}

/// To the target: wait for the disk, unless the mark is seen here and so the disk is there already.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskArrival {
    /// Whose disk.
    pub instance: InstanceId,
    /// The mark that the source has put beside it.
    pub mark: Uuid,
    /// The source; its certificate must say the same.
    pub source: HostId,
    /// Which of its files.
    #[serde(default)]
    pub part: DiskPart,
    /// Bytes that this takes on the source.
    pub used_bytes: u64,
}

/// From the target: where the disk is awaited.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskAwaited {
    /// Address for the encrypted connections.
    pub address: SocketAddr,
    /// The target; its certificate says the same.
    pub target: HostId,
    /// Secret that the connections open with, good for this disk.
    pub token: String,
}

/// To the source: send the disk; answers when it is whole on the target, under its name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskDeparture {
    /// Whose disk.
    pub instance: InstanceId,
    /// Which of its files.
    #[serde(default)]
    pub part: DiskPart,
    /// What the target said.
    pub awaited: DiskAwaited,
}

/// To the target: wait for an image, unless it is there; and, when it has come: prove that it is the one that was
/// uploaded, and give it its name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageArrival {
    /// Which.
    pub image: ImageId,
    /// The source; its certificate must say the same.
    pub source: HostId,
    /// Size of the file in bytes.
    pub size_bytes: u64,
    /// Bytes that it takes on the source.
    pub used_bytes: u64,
    /// SHA-512 of the file, hexadecimal; none: it is not known.
    pub sha512: Option<String>,
    /// MD5 of the file, hexadecimal, to be noted beside it.
    pub md5: Option<String>,
}

/// To the source: send the image; answers when all of it is on the target, not yet under its name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageDeparture {
    /// Which.
    pub image: ImageId,
    /// What the target said.
    pub awaited: DiskAwaited,
}
