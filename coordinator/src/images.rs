//! Images' bytes on the pool: `<pool>/images/<id>`, whole and checked, or not there. While bytes arrive they are in
//! `<id>.partial`; they get their name when they are on disk and proved to be what the user said. Beside them lies
//! `<id>.blake3`, the digests of their chunks, against which each download and each copy that agents make is checked.

mod check;
pub mod copies;
pub mod damages;
mod download;
mod flights;
mod format;
mod upload;

pub use download::download;
pub use flights::{Flight, Flights};
pub use upload::Upload;

use crate::error::Error;
use crate::fleet::image::{Image, ImageStatus};
use crate::ledger::{Ledger, now};
use godwit_protocol::digests;
use godwit_protocol::id::ImageId;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio::sync::Semaphore;

/// Uploads at the same time; each holds a thread.
const UPLOADS: usize = 8;

/// The folder of images.
pub struct Images {
    folder: PathBuf,
    /// Images on their way to other pools.
    pub flights: Flights,
    uploads: Arc<Semaphore>,
}

impl Images {
    /// Images below `<pool>/images`.
    pub fn new(pool: &Path) -> Self {
        Self {
            folder: pool.join("images"),
            flights: Flights::default(),
            uploads: Arc::new(Semaphore::new(UPLOADS)),
        }
    }

    /// Where an image's bytes are.
    pub fn path(&self, image: ImageId) -> PathBuf {
        self.folder.join(image.to_string())
    }

    fn partial(&self, image: ImageId) -> PathBuf {
        self.folder.join(format!("{image}.partial"))
    }

    /// The digests of its chunks, by which agents know that what they copy is what was uploaded.
    fn digests(&self, image: ImageId) -> PathBuf {
        digests::beside(&self.path(image))
    }

    /// Removes an image's bytes, whole or not; not being there is a success.
    ///
    /// # Errors
    /// [`Error::Pool`].
    pub async fn remove(&self, image: ImageId) -> Result<(), Error> {
        let list = self.digests(image);
        let paths = [self.partial(image), self.path(image), unfinished(&list), list];
        blocking(move || {
            for path in paths {
                match std::fs::remove_file(&path) {
                    Err(error) if error.kind() != ErrorKind::NotFound => {
                        return Err(pool("An image's file could not be removed from the pool.", error));
                    }
                    _ => {}
                }
            }
            Ok(())
        })
        .await
    }

    /// After a start: uploads that an earlier life did not finish are as if they had not begun.
    ///
    /// # Errors
    /// The store, or a file that cannot be removed.
    pub async fn recover(&self, ledger: &Ledger) -> Result<(), Error> {
        let cut = |image: &&Image| image.status == ImageStatus::Saving;
        let cut: Vec<ImageId> =
            ledger.read(|fleet| fleet.images.values().filter(cut).map(|image| image.id).collect());
        for image in cut {
            self.remove(image).await?;
            reset(ledger, image).await?;
            tracing::warn!(%image, "an upload was cut off when the coordinator stopped; the image is queued again");
        }
        let folder = self.folder.clone();
        blocking(move || remove_partials(&folder)).await
    }
}

/// Where a list of digests grows.
fn unfinished(list: &Path) -> PathBuf {
    let mut name = list.as_os_str().to_owned();
    name.push(".partial");
    name.into()
}

/// Sets an image whose upload failed back to before it.
async fn reset(ledger: &Ledger, id: ImageId) -> Result<(), Error> {
    ledger
        .change(|fleet| {
            let image = fleet.images.get(&id).filter(|image| image.status == ImageStatus::Saving);
            let Some(image) = image else { return Ok((vec![], ())) };
            let queued = Image { status: ImageStatus::Queued, updated_at: now(), ..image.clone() };
            Ok((vec![queued.into()], ()))
        })
        .await
}

fn remove_partials(folder: &Path) -> Result<(), Error> {
    let failed = |error| pool("What uploads left on the pool could not be removed.", error);
    let entries = match std::fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed(error)),
    };
    for entry in entries {
        let path = entry.map_err(failed)?.path();
        if path.extension().is_some_and(|extension| extension == "partial") {
            std::fs::remove_file(&path).map_err(failed)?;
        }
    }
    Ok(())
}

fn pool(what: &str, source: std::io::Error) -> Error {
    Error::Pool { what: what.to_owned(), source }
}

/// Runs what may wait for the pool where it holds up nobody.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|_| Err(Error::Unavailable("The coordinator is stopping.".into())))
}
