//! Images' bytes on the pool: `<pool>/images/<id>`, whole and checked, or not there.

use godwit_protocol::id::ImageId;
use std::path::{Path, PathBuf};

/// The folder of images.
pub struct Images {
    folder: PathBuf,
}

impl Images {
    /// Images below `<pool>/images`; nothing is touched before the first upload, as the pool may be mounted later.
    pub fn new(pool: &Path) -> Self {
        Self { folder: pool.join("images") }
    }

    /// Where an image's bytes are.
    pub fn path(&self, image: ImageId) -> PathBuf {
        self.folder.join(image.to_string())
    }
}
