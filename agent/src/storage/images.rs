//! Images that come from another pool, once, for all hosts of this one. An image grows as `images/<id>.incoming`, which
//! nobody takes for an image; when all of it is there it is proved by its digests, and gets its name
//! ([`Proof`]).

use super::StorageError;
use super::dir::{PATIENCE, Pool};
use super::folder::{Ask, Told, is_file, remove_file};
use super::moves::used_bytes;
use crate::datapath::copy::{journal, partial};
use crate::datapath::digests::beside;
use crate::datapath::proof::Proof;
use crate::hypervisor::Cancel;
use godwit_protocol::disk::ImageArrival;
use godwit_protocol::id::ImageId;
use godwit_protocol::operation::Progress;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// What a pool has of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Found {
    /// Bytes that it takes; none: it is not there.
    used_bytes: Option<u64>,
    /// Bytes of one that comes.
    incoming_bytes: u64,
}

/// Where an image of the pool is.
fn image_path(pool: &Path, image: ImageId) -> PathBuf {
    pool.join("images").join(image.to_string())
}

/// Where one is that is not proved yet.
fn incoming(image: &Path) -> PathBuf {
    image.with_extension("incoming")
}

impl Pool {
    /// Where an image is until it is proved.
    pub fn incoming(&self, image: ImageId) -> PathBuf {
        incoming(&self.image(image))
    }

    /// Bytes that an image takes; none when it is not there.
    ///
    /// # Errors
    /// [`StorageError::Unreachable`], [`StorageError::Unexpected`], [`StorageError::Io`].
    pub fn find_image(&self, image: ImageId) -> Result<Option<u64>, StorageError> {
        self.look_for(Ask::FindImage(image)).map(|found| found.used_bytes)
    }

    /// The same for an image that comes, for which there must be room.
    ///
    /// # Errors
    /// As [`Self::find_image`], and [`StorageError::NoSpace`].
    pub fn find_or_await(&self, arrival: &ImageArrival) -> Result<Option<u64>, StorageError> {
        let found = self.look_for(Ask::FindImage(arrival.image))?;
        if found.used_bytes.is_none() {
            self.has_room(arrival.used_bytes.saturating_sub(found.incoming_bytes))?;
        }
        Ok(found.used_bytes)
    }

    /// Removes what arrivals left of an image, and, if `whole`, the image itself; tells what is there then.
    ///
    /// # Errors
    /// As [`Self::find_image`].
    pub fn drop_image(&self, image: ImageId, whole: bool) -> Result<Option<u64>, StorageError> {
        self.look_for(Ask::DropImage { image, whole }).map(|found| found.used_bytes)
    }

    fn look_for(&self, ask: Ask) -> Result<Found, StorageError> {
        match self.touch(PATIENCE, ask)? {
            Told::Image(found) => Ok(found),
            _ => Err(StorageError::Unreachable(self.path().to_owned())),
        }
    }

    /// Proves an image that has come, by a worker process, and gives it its name. It has that already: a success.
    ///
    /// # Errors
    /// What the worker says: the image has not come, or is not what was uploaded, and then is gone.
    pub fn settle_image(
        &self,
        arrival: &ImageArrival,
        progress: &mut dyn FnMut(Progress),
        cancel: &Cancel,
    ) -> Result<(), StorageError> {
        if self.find_image(arrival.image)?.is_some() {
            return Ok(());
        }
        let image = self.image(arrival.image);
        let proof = Proof {
            arrived: incoming(&image),
            image,
            size_bytes: arrival.size_bytes,
            sha512: arrival.sha512.clone(),
            md5: arrival.md5.clone(),
        };
        let mut report = |done_bytes, total_bytes| progress(Progress::Copy { done_bytes, total_bytes });
        Ok(proof.run(self.program(), &mut report, cancel)?)
    }
}

pub(super) fn find(pool: &Path, image: ImageId) -> Result<Found, StorageError> {
    let image = image_path(pool, image);
    let there = is_file(&image)?;
    let arrived = incoming(&image);
    Ok(Found {
        used_bytes: there.then(|| used_bytes(&image)).transpose()?,
        incoming_bytes: used_bytes(&arrived)?.max(used_bytes(&partial(&arrived))?),
    })
}

pub(super) fn discard(pool: &Path, image: ImageId, whole: bool) -> Result<Found, StorageError> {
    let path = image_path(pool, image);
    let (arrived, list) = (incoming(&path), beside(&path));
    if whole {
        remove_file(&path)?;
    }
    for path in [journal(&arrived), partial(&arrived), arrived, partial(&list)] {
        remove_file(&path)?;
    }
    // It is written before the image gets its name.
    if !is_file(&path)? {
        remove_file(&list)?;
    }
    find(pool, image)
}
