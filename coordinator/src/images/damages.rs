//! Images whose bytes on the pool are not those that were uploaded, as downloads have found them: told to operators, and
//! kept until the image is deleted or the coordinator ends.

use super::download::Broken;
use crate::error::Error;
use godwit_protocol::error::chain;
use godwit_protocol::id::ImageId;
use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

/// Told of each image that is found damaged, and in what way.
pub(crate) type OnDamage = Box<dyn Fn(ImageId, &str) + Send + Sync>;

/// What is known to be damaged. Clones are the same list.
#[derive(Clone, Default)]
pub struct Damages {
    found: Arc<Mutex<BTreeMap<ImageId, String>>>,
    on_damage: Arc<OnceLock<OnDamage>>,
}

impl Damages {
    fn found(&self) -> MutexGuard<'_, BTreeMap<ImageId, String>> {
        self.found.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells `on_damage` of each image that is found damaged from now on. Only the first such call counts.
    pub fn on_damage(&self, on_damage: OnDamage) {
        let _ = self.on_damage.set(on_damage);
    }

    /// Every image that was found damaged, and in what way.
    pub fn list(&self) -> BTreeMap<ImageId, String> {
        self.found().clone()
    }

    /// An image that is gone is damaged no more.
    pub(super) fn forget(&self, image: ImageId) {
        self.found().remove(&image);
    }

    /// Tells the log why a download ended early, and operators of an image that is damaged.
    pub(super) fn note(&self, image: ImageId, broken: &Broken) {
        tracing::error!(%image, "a download was ended: {}", chain(broken));
        let Broken::Damaged(how) = broken else { return };
        self.found().insert(image, how.clone());
        if let Some(on_damage) = self.on_damage.get() {
            on_damage(image, how);
        }
    }

    /// The same, before the first byte was sent: what the user is told.
    pub(super) fn refuse(&self, image: ImageId, broken: Broken) -> Error {
        self.note(image, &broken);
        let what = match &broken {
            Broken::Damaged(_) => {
                format!("The data of image {image} is damaged on the pool. Upload it again as another image.")
            }
            Broken::Read(_) => format!("The data of image {image} could not be read from the pool."),
        };
        Error::Pool { what, source: io::Error::other(broken) }
    }
}
