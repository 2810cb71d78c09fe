//! Images.

use super::Time;
use godwit_protocol::id::{ImageId, ProjectId};
use godwit_protocol::image::DiskFormat;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Where an image is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ImageStatus {
    /// Described, no bytes yet.
    Queued,
    /// Bytes arrive.
    Saving,
    /// Whole and checked.
    Active,
}

/// Who sees an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Visibility {
    /// Every project.
    Public,
    /// Every project, but not in their lists.
    Community,
    /// Those it is shared with.
    Shared,
    /// Its own project.
    Private,
}

/// An image; its bytes are `<pool>/images/<id>`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Image {
    /// Its id.
    pub id: ImageId,
    /// Not unique; may be missing.
    pub name: Option<String>,
    /// Owner.
    pub project: ProjectId,
    /// Where it is in its life.
    pub status: ImageStatus,
    /// Who sees it.
    pub visibility: Visibility,
    /// May not be deleted.
    pub protected: bool,
    /// Left out of ordinary lists.
    pub hidden: bool,
    /// As the user said and the upload proved.
    pub disk_format: Option<DiskFormat>,
    /// `bare`.
    pub container_format: Option<String>,
    /// Size of the file in bytes.
    pub size_bytes: Option<u64>,
    /// Size of the disk inside, in bytes.
    pub virtual_size_bytes: Option<u64>,
    /// MD5 of the file, hexadecimal.
    pub md5: Option<String>,
    /// SHA-512 of the file, hexadecimal.
    pub sha512: Option<String>,
    /// Smallest flavor disk, GiB.
    pub min_disk_gib: u64,
    /// Smallest flavor memory, MiB.
    pub min_memory_mib: u64,
    /// Labels.
    pub tags: Vec<String>,
    /// The user's own properties, `hw_…` among them.
    pub properties: BTreeMap<String, String>,
    /// When.
    pub created_at: Time,
    /// When.
    pub updated_at: Time,
}
