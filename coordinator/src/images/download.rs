//! A download: bytes leave only when they were proved to be those that were uploaded. Each chunk is compared with the
//! list beside the image before any of it is sent; without a list the last piece is held back until the digest of the
//! whole is the one in the record. A client whose image is damaged sees its connection end early, and never a whole
//! image that is wrong.

use super::{blocking, damages};
use crate::app::Shared;
use crate::error::Error;
use crate::fleet::image::Image;
use bytes::Bytes;
use futures_util::Stream;
use futures_util::stream;
use godwit_protocol::digests::{CHUNK_BYTES, Digest, Head, digest};
use sha2::{Digest as _, Sha512};
use std::fs::{File, OpenOptions};
use std::io::{self, BufReader, ErrorKind, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// What an image's bytes are compared with.
enum Known {
    /// The digest of the next chunk comes next.
    Chunks(BufReader<File>),
    /// The digest of the whole, in hexadecimal; none in records that have none.
    Whole(Box<Sha512>, Option<String>),
}

/// An image on its way to a client.
pub(super) struct Download {
    file: File,
    known: Known,
    size_bytes: u64,
    /// Where the next chunk begins.
    at: u64,
}

/// Why the next chunk is not sent.
#[derive(Debug, thiserror::Error)]
pub(super) enum Broken {
    /// It is not what was uploaded.
    #[error("the image's data is not what was uploaded: {0}")]
    Damaged(String),
    /// It does not read.
    #[error("the image's data does not read")]
    Read(#[from] io::Error),
}

/// Opens an active image's bytes. The first chunk is checked by then.
///
/// # Errors
/// [`Error::Pool`] when they are not there or damaged.
pub async fn download(
    app: &Shared,
    image: &Image,
) -> Result<impl Stream<Item = io::Result<Bytes>> + Send + use<>, Error> {
    let (path, list) = (app.images.path(image.id), app.images.digests(image.id));
    let (id, size_bytes, sha512) = (image.id, image.size_bytes.unwrap_or_default(), image.sha512.clone());
    let opened = blocking(move || {
        let open = || {
            let mut download = Download::open(&path, &list, size_bytes, sha512)?;
            let first = download.next()?;
            Ok((download, first))
        };
        Ok(open())
    });
    let (download, first) = match opened.await? {
        Ok(opened) => opened,
        Err(broken) => return Err(damages::refuse(app, id, broken).await),
    };
    if download.is_whole() {
        damages::clear(app, id).await;
    }
    let app = app.clone();
    let rest = stream::try_unfold(download, move |mut download| {
        let app = app.clone();
        async move {
            // A chunk at a time: no thread is held while the client takes its time.
            let next = tokio::task::spawn_blocking(move || download.next().map(|chunk| (chunk, download)));
            match next.await.map_err(io::Error::other)? {
                Ok((None, _)) => Ok(None),
                Ok((Some(chunk), download)) => {
                    // Nobody need ask for what comes after the last byte.
                    if download.is_whole() {
                        damages::clear(&app, id).await;
                    }
                    Ok(Some((chunk, download)))
                }
                Err(broken) => {
                    damages::note(&app, id, &broken).await;
                    Err(io::Error::new(ErrorKind::InvalidData, broken))
                }
            }
        }
    });
    Ok(futures_util::StreamExt::chain(stream::iter(first.map(Ok)), rest))
}

impl Download {
    fn open(path: &Path, list: &Path, size_bytes: u64, sha512: Option<String>) -> Result<Self, Broken> {
        let open = |path: &Path| {
            let mut options = OpenOptions::new();
            options.read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path)
        };
        let file = open(path)?;
        let is_bytes = file.metadata()?.len();
        if is_bytes != size_bytes {
            return Err(Broken::Damaged(format!("it has {is_bytes} bytes of {size_bytes}")));
        }
        let known = match open(list) {
            Ok(list) => Known::Chunks(open_list(list, size_bytes)?),
            // An upload of an earlier version left none.
            Err(error) if error.kind() == ErrorKind::NotFound => Known::Whole(Box::default(), sha512),
            Err(error) => return Err(error.into()),
        };
        Ok(Self { file, known, size_bytes, at: 0 })
    }

    /// Whether all of it was proved.
    fn is_whole(&self) -> bool {
        self.at == self.size_bytes
    }

    /// The next bytes, proved; none at the end.
    fn next(&mut self) -> Result<Option<Bytes>, Broken> {
        let length = (self.size_bytes - self.at).min(CHUNK_BYTES as u64);
        if length == 0 {
            return Ok(None);
        }
        let mut chunk = vec![0; length as usize];
        self.file.read_exact(&mut chunk)?;
        let begin = self.at;
        self.at += length;
        match &mut self.known {
            Known::Chunks(list) => {
                let mut wanted = Digest::default();
                list.read_exact(&mut wanted)?;
                if digest(&chunk) != wanted {
                    return Err(Broken::Damaged(format!(
                        "the {length} bytes from byte {begin} on do not have the digest that they were uploaded with"
                    )));
                }
            }
            Known::Whole(hasher, wanted) => {
                hasher.update(&chunk);
                if self.at == self.size_bytes
                    && let Some(wanted) = wanted
                    && hex::encode(hasher.finalize_reset()) != *wanted
                {
                    return Err(Broken::Damaged("the whole does not have its sha512".to_owned()));
                }
            }
        }
        Ok(Some(chunk.into()))
    }
}

/// A list that is whole, about `size_bytes`, at its first digest.
fn open_list(list: File, size_bytes: u64) -> Result<BufReader<File>, Broken> {
    let mut list = BufReader::new(list);
    let head = Head::read(&mut list)?.filter(|head| head.size_bytes == size_bytes);
    head.ok_or_else(|| Broken::Damaged("the list of its digests is damaged".to_owned()))?;
    Ok(list)
}
