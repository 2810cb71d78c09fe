//! An upload: bytes in order, hashed as they are written, then checked, then given their name. The bytes come through
//! a channel of a few pieces, so that memory is bounded; the sender may vanish at any moment, and then nothing stays.

use super::format::{HEADER_BYTES, inspect};
use super::{Images, blocking, check, pool, reset, unfinished};
use crate::app::Shared;
use crate::error::Error;
use crate::fleet::Fleet;
use crate::fleet::image::{Image, ImageStatus};
use crate::ledger::now;
use bytes::Bytes;
use godwit_protocol::digests::{Chunked, Whole};
use godwit_protocol::id::ImageId;
use godwit_protocol::image::DiskFormat;
use md5::{Digest, Md5};
use nix::sys::statvfs::statvfs;
use sha2::Sha512;
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot};

/// Pieces between the connection and the pool, each at most what one read of the connection gives.
const PIECES: usize = 8;

/// What the sender's side says.
enum Piece {
    Bytes(Bytes),
    /// All bytes were sent. Without this, the upload was cut off.
    End,
}

/// The sender's side of an upload that runs.
pub struct Upload {
    pieces: mpsc::Sender<Piece>,
    done: oneshot::Receiver<Result<(), Error>>,
}

/// What was written.
struct Written {
    size_bytes: u64,
    virtual_size_bytes: u64,
    md5: String,
    sha512: String,
    chunks: Chunked,
}

impl Upload {
    /// Begins an upload of `declared_bytes`, when the sender knows how many. The image is `saving` from now on, and
    /// `queued` again if the upload fails.
    ///
    /// # Errors
    /// [`Error::Conflict`] when it is not queued, [`Error::Invalid`] when its format is not set,
    /// [`Error::Exhausted`] when the pool has no room for the declared size.
    pub async fn begin(app: &Shared, id: ImageId, declared_bytes: Option<u64>) -> Result<Self, Error> {
        let permit = app.images.uploads.clone().try_acquire_owned();
        let permit =
            permit.map_err(|_| Error::Unavailable("Too many uploads run; try again soon.".into()))?;
        app.ledger.read(|fleet| startable(fleet, id).map(drop))?;
        let has_images =
            app.ledger.read(|fleet| fleet.images.values().any(|image| image.status == ImageStatus::Active));
        app.images.prepare(declared_bytes, has_images).await?;
        let format = app.ledger.change(|fleet| {
            let (image, format) = startable(fleet, id)?;
            let saving = Image { status: ImageStatus::Saving, updated_at: now(), ..image.clone() };
            Ok::<_, Error>((vec![saving.into()], format))
        });
        let format = format.await?;
        let (pieces, received) = mpsc::channel(PIECES);
        let (tell, done) = oneshot::channel();
        let app = app.clone();
        // A task of its own: it cleans up also when the request's task is dropped with its connection.
        tokio::spawn(async move {
            let result = complete(&app, id, format, declared_bytes, received, permit).await;
            if let Err(error) = &result {
                tracing::info!(image = %id, %error, "an upload failed");
            }
            let _ = tell.send(result);
        });
        Ok(Self { pieces, done })
    }

    /// Sends bytes. False when the other side has ended: [`Self::finish`] then says why.
    pub async fn send(&self, bytes: Bytes) -> bool {
        self.pieces.send(Piece::Bytes(bytes)).await.is_ok()
    }

    /// Says that all bytes were sent, and waits until they are checked and on disk.
    ///
    /// # Errors
    /// Why they were not taken.
    pub async fn finish(self) -> Result<(), Error> {
        let _ = self.pieces.send(Piece::End).await;
        drop(self.pieces);
        self.done.await.unwrap_or_else(|_| Err(Error::Unavailable("The coordinator is stopping.".into())))
    }

    /// Says that the sender broke off, and waits until what was sent is removed.
    pub async fn abandon(self) {
        drop(self.pieces);
        let _ = self.done.await;
    }
}

/// The image and its format, when it waits for its data.
fn startable(fleet: &Fleet, id: ImageId) -> Result<(&Image, DiskFormat), Error> {
    let image = fleet.images.get(&id).ok_or_else(|| Error::not_found("Image", id))?;
    match (image.status, image.disk_format, &image.container_format) {
        (ImageStatus::Saving, ..) => Err(Error::Conflict(format!("An upload to image {id} runs already."))),
        (ImageStatus::Active, ..) => {
            Err(Error::Conflict(format!("Image {id} has its data; an image never changes. Create another.")))
        }
        (ImageStatus::Queued, Some(format), Some(_)) => Ok((image, format)),
        (ImageStatus::Queued, ..) => Err(Error::Invalid(format!(
            "Image {id} needs disk_format (raw or qcow2) and container_format (bare) before its data."
        ))),
    }
}

impl Images {
    /// The folder is there, and the pool has room for `need` bytes. Where there are images, the folder is not made: a
    /// pool without it is not mounted.
    async fn prepare(&self, need: Option<u64>, has_images: bool) -> Result<(), Error> {
        let folder = self.folder.clone();
        blocking(move || {
            // Not `recursive`: a pool that is not mounted must not be made up.
            let made = match has_images {
                true => folder.metadata().map(drop),
                false => DirBuilder::new().mode(0o755).create(&folder),
            };
            match made {
                Err(error) if error.kind() == ErrorKind::NotFound => {
                    return Err(Error::Unavailable(format!(
                        "The pool {} is not there, or has lost its folder \"images\"; is it mounted?",
                        folder.parent().unwrap_or(&folder).display()
                    )));
                }
                Err(error) if error.kind() != ErrorKind::AlreadyExists => {
                    return Err(pool("The pool's folder of images could not be made.", error));
                }
                _ => {}
            }
            let have = free_bytes(&folder)?;
            match need {
                Some(need) if need > have => Err(full(Some(need), have)),
                _ => Ok(()),
            }
        })
        .await
    }
}

fn free_bytes(folder: &Path) -> Result<u64, Error> {
    let stat =
        statvfs(folder).map_err(|errno| pool("The pool's free space cannot be read.", errno.into()))?;
    Ok(stat.blocks_available() * stat.fragment_size())
}

fn full(need: Option<u64>, have: u64) -> Error {
    let need = need.map_or_else(|| "more".to_owned(), |need| format!("{need} bytes"));
    Error::Exhausted(format!("The pool has no room for the image: it needs {need}, {have} bytes are free."))
}

/// An upload from its first byte to its end, whatever that is.
async fn complete(
    app: &Shared,
    id: ImageId,
    format: DiskFormat,
    declared_bytes: Option<u64>,
    pieces: mpsc::Receiver<Piece>,
    permit: OwnedSemaphorePermit,
) -> Result<(), Error> {
    let result = take(&app.images, id, format, declared_bytes, pieces).await;
    let result = match result {
        Ok(written) => activate(app, id, written).await,
        Err(error) => Err(error),
    };
    if result.is_err() {
        app.images.remove(id).await?;
        reset(&app.ledger, id).await?;
    }
    drop(permit);
    // Whatever failed then, this is why.
    if app.ledger.read(|fleet| fleet.images.contains_key(&id)) { result } else { Err(deleted(id)) }
}

fn deleted(id: ImageId) -> Error {
    Error::Conflict(format!("Image {id} was deleted during its upload."))
}

/// Writes, checks and names the bytes.
async fn take(
    images: &Images,
    id: ImageId,
    format: DiskFormat,
    declared_bytes: Option<u64>,
    pieces: mpsc::Receiver<Piece>,
) -> Result<Written, Error> {
    let (partial, path) = (images.partial(id), images.path(id));
    let target = partial.clone();
    let mut written = blocking(move || write(&target, format, declared_bytes, pieces)).await?;
    if format == DiskFormat::Qcow2 {
        check::check(&partial, written.virtual_size_bytes).await?;
    }
    let (folder, list) = (images.folder.clone(), images.digests(id));
    let whole = Whole { md5: Some(written.md5.clone()), sha512: Some(written.sha512.clone()) };
    let chunks = std::mem::take(&mut written.chunks);
    blocking(move || {
        write_list(&list, &partial, chunks, &whole)
            .map_err(|error| pool("The image's digests could not be written to the pool.", error))?;
        let named = std::fs::rename(&partial, &path).and_then(|()| File::open(&folder)?.sync_all());
        named.map_err(|error| pool("The image could not be given its name on the pool.", error))
    })
    .await?;
    Ok(written)
}

/// Writes the digests of the file `about` to `list`, whole or not at all.
fn write_list(list: &Path, about: &Path, chunks: Chunked, whole: &Whole) -> std::io::Result<()> {
    let metadata = about.metadata()?;
    let modified_ns = i128::from(metadata.mtime()) * 1_000_000_000 + i128::from(metadata.mtime_nsec());
    let bytes = chunks.finish(metadata.len(), modified_ns, whole)?;
    let growing = unfinished(list);
    let mut options = OpenOptions::new();
    let mut file = options.write(true).create(true).truncate(true).mode(0o644).open(&growing)?;
    file.write_all(&bytes)?;
    file.sync_all()?;
    std::fs::rename(&growing, list)
}

/// The image is there. Not when it was deleted meanwhile.
async fn activate(app: &Shared, id: ImageId, written: Written) -> Result<(), Error> {
    app.ledger
        .change(|fleet| {
            let image = fleet.images.get(&id).filter(|image| image.status == ImageStatus::Saving);
            let image = image.ok_or_else(|| deleted(id))?;
            let active = Image {
                status: ImageStatus::Active,
                size_bytes: Some(written.size_bytes),
                virtual_size_bytes: Some(written.virtual_size_bytes),
                md5: Some(written.md5),
                sha512: Some(written.sha512),
                updated_at: now(),
                ..image.clone()
            };
            Ok((vec![active.into()], ()))
        })
        .await
}

/// Writes pieces until the end, with all digests in the same pass, and looks at the header.
fn write(
    path: &Path,
    format: DiskFormat,
    declared_bytes: Option<u64>,
    mut pieces: mpsc::Receiver<Piece>,
) -> Result<Written, Error> {
    let failed = |error: std::io::Error, size: u64| match error.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => {
            let have = path.parent().map_or(Ok(0), free_bytes).unwrap_or(0);
            full(declared_bytes.map(|declared| declared.saturating_sub(size)), have)
        }
        _ => pool("The image could not be written to the pool.", error),
    };
    // Hosts read it as root, some through a share that maps root to somebody: readable for all.
    let mut options = OpenOptions::new();
    let mut file =
        options.write(true).create(true).truncate(true).mode(0o644).open(path).map_err(|e| failed(e, 0))?;
    let (mut md5, mut sha512, mut chunks) = (Md5::new(), Sha512::new(), Chunked::default());
    let mut head = Vec::new();
    let mut size = 0_u64;
    loop {
        match pieces.blocking_recv() {
            Some(Piece::Bytes(bytes)) => {
                let next = size + bytes.len() as u64;
                if declared_bytes.is_some_and(|declared| next > declared) {
                    return Err(wrong_size(declared_bytes, "more"));
                }
                head.extend_from_slice(&bytes[..bytes.len().min(HEADER_BYTES - head.len())]);
                md5.update(&bytes);
                sha512.update(&bytes);
                chunks.update(&bytes);
                file.write_all(&bytes).map_err(|error| failed(error, size))?;
                size = next;
            }
            Some(Piece::End) => break,
            None => {
                return Err(Error::Invalid(format!(
                    "The upload was cut off after {size} bytes; nothing of it was kept. Upload the image again."
                )));
            }
        }
    }
    if declared_bytes.is_some_and(|declared| size < declared) {
        return Err(wrong_size(declared_bytes, &format!("only {size}")));
    }
    let virtual_size_bytes = inspect(&head, size, format).map_err(|why| check::refused(&why))?;
    file.sync_all().map_err(|error| failed(error, size))?;
    Ok(Written {
        size_bytes: size,
        virtual_size_bytes,
        md5: hex::encode(md5.finalize()),
        sha512: hex::encode(sha512.finalize()),
        chunks,
    })
}

fn wrong_size(declared: Option<u64>, came: &str) -> Error {
    let declared = declared.unwrap_or_default();
    Error::Invalid(format!(
        "The upload was declared to be {declared} bytes, but {came} came. Nothing of it was kept."
    ))
}
