//! Images, as the hosts see them.

use crate::id::ImageId;
use serde::{Deserialize, Serialize};

/// How the bytes of an image or disk are to be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DiskFormat {
    /// Bytes as they are.
    Raw,
    /// QEMU's copy-on-write format, version 2 or 3.
    Qcow2,
}

impl DiskFormat {
    /// The format's name, as libvirt and image clients spell it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

/// An image to make a disk from: `<pool>/images/<id>`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageSource {
    /// Which.
    pub image: ImageId,
    /// Its format, as the coordinator checked it.
    pub format: DiskFormat,
    /// Size of the file in bytes.
    pub size_bytes: u64,
    /// Size of the disk a guest sees, in bytes.
    pub virtual_size_bytes: u64,
}
