//! Volumes, as the hosts see them.

use crate::id::VolumeId;
use crate::image::DiskFormat;
use serde::{Deserialize, Serialize};

/// A volume's file: `<pool>/volumes/<id>`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeSource {
    /// Which.
    pub volume: VolumeId,
    /// Its format.
    pub format: DiskFormat,
}
