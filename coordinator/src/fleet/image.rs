//! Images.

use super::Time;
use godwit_protocol::id::{HostId, ImageId, ProjectId};
use godwit_protocol::image::DiskFormat;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use uuid::Uuid;

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

/// That an image's bytes on the pool are not those that were uploaded, as a download has found.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Damage {
    /// Which image.
    pub image: ImageId,
    /// In what way, for people.
    pub how: String,
    /// When it was found.
    pub found_at: Time,
}

/// An image's bytes in another pool than the coordinator's, whole or on their way: noted before the first comes, and
/// until the last is gone, so that they go with the image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageCopy {
    /// Which image.
    pub image: ImageId,
    /// The host that was told to bring it into its pool.
    pub host: HostId,
    /// The pool's mark, if it has one: each host that shows it has the copy.
    pub pool: Option<Uuid>,
    /// Whether all of it is there, under its name.
    pub whole: bool,
}

impl ImageCopy {
    /// Its key: an image is in a pool once.
    pub fn map_key(&self) -> String {
        let pool = self.pool.unwrap_or(self.host.0);
        format!("{}:{pool}", self.image)
    }
}
