//! qcow2 images: which guest bytes lie where in the file. The tables are read and written by `imago`; the bytes
//! themselves go through our own loops. The only file that names `imago`.

use crate::storage::qcow2::{HEADER_BYTES, Header, HeaderError, check_extensions, check_tables};
use imago::file::File as Storage;
use imago::qcow2::{Qcow2, Qcow2CreateBuilder};
use imago::{
    DenyImplicitOpenGate, FormatAccess, FormatCreateBuilder, FormatDriverBuilder, Mapping, StorageOpenOptions,
};
use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

/// Where a run of guest bytes is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// At this offset of the image's file.
    At(u64),
    /// Nowhere: zeros.
    Zeros,
    /// Compressed; [`Image::read`] decodes it.
    Encoded,
    /// Behind the disk's end.
    End,
}

/// An open qcow2 image that leads to no other file. Clones are the same image.
#[derive(Clone)]
pub(super) struct Image {
    access: Arc<FormatAccess<Storage>>,
    cluster_bytes: u64,
}

impl fmt::Debug for Image {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a qcow2 image of {} bytes", self.size_bytes())
    }
}

/// Why an image cannot be used.
#[derive(Debug, thiserror::Error)]
pub(super) enum ImageError {
    /// Its head.
    #[error(transparent)]
    Header(#[from] HeaderError),
    /// Its tables.
    #[error("its tables do not read")]
    Tables(#[source] io::Error),
}

/// Reads the head of a file that claims to be qcow2, and refuses what leads elsewhere.
///
/// # Errors
/// [`ImageError`].
pub(super) fn read_header(file: &File) -> Result<Header, ImageError> {
    Ok(Header::parse(&read_start(file, HEADER_BYTES).map_err(ImageError::Tables)?)?)
}

/// The first bytes of a file, or all that it has.
fn read_start(file: &File, length: usize) -> io::Result<Vec<u8>> {
    let mut start = vec![0; length];
    let mut filled = 0;
    while filled < start.len() {
        match file.read_at(&mut start[filled..], filled as u64)? {
            0 => break,
            length => filled += length,
        }
    }
    start.truncate(filled);
    Ok(start)
}

/// Whether a file begins as qcow2 does.
pub(super) fn is_qcow2(file: &File) -> bool {
    let mut magic = [0; 4];
    file.read_exact_at(&mut magic, 0).is_ok() && &magic == b"QFI\xfb"
}

impl Image {
    /// The unit in which a new image gives room, in bytes.
    pub(super) const CLUSTER_BYTES: u64 = 64 << 10;

    /// Whether its data lies at whole blocks of direct I/O.
    pub(super) fn has_whole_blocks(&self) -> bool {
        self.cluster_bytes.is_multiple_of(super::BLOCK_BYTES as u64)
    }

    /// Opens an image for reading. A backing file, an external data file, encryption and unknown features are
    /// refused; nothing but `file` is ever opened.
    ///
    /// # Errors
    /// [`ImageError`].
    pub(super) fn open(file: &File) -> Result<Self, ImageError> {
        let head = read_start(file, HEADER_BYTES).map_err(ImageError::Tables)?;
        let header = Header::parse(&head)?;
        check_tables(&head, file.metadata().map_err(ImageError::Tables)?.len())?;
        if header.version == 3 {
            check_extensions(&read_start(file, header.cluster_bytes as usize).map_err(ImageError::Tables)?)?;
        }
        let mut image = Self::open_as(file, false).map_err(ImageError::Tables)?;
        image.cluster_bytes = header.cluster_bytes;
        Ok(image)
    }

    /// Opens an image that [`Self::create`] made.
    ///
    /// # Errors
    /// What the file system or the tables say.
    pub(super) fn reopen(file: &File) -> io::Result<Self> {
        Self::open_as(file, true)
    }

    fn open_as(file: &File, writable: bool) -> io::Result<Self> {
        let builder = Qcow2::<Storage>::builder(storage(file, writable)?).backing(None).write(writable);
        let image = builder.open(DenyImplicitOpenGate::default())?;
        Ok(Self { access: Arc::new(FormatAccess::new(image)), cluster_bytes: Self::CLUSTER_BYTES })
    }

    /// Makes `file`, which must be empty, an image of `size_bytes` in clusters of 64 KiB with no data yet.
    ///
    /// # Errors
    /// What the file system says.
    pub(super) fn create(file: &File, size_bytes: u64) -> io::Result<Self> {
        let builder = Qcow2CreateBuilder::<Storage>::new(storage(file, true)?).size(size_bytes);
        let image = builder.create_open(DenyImplicitOpenGate::default(), |storage| {
            Ok(Qcow2::<Storage>::builder(storage).backing(None).write(true))
        })?;
        Ok(Self { access: Arc::new(FormatAccess::new(image)), cluster_bytes: Self::CLUSTER_BYTES })
    }

    /// Size of the disk that a guest sees, in bytes.
    pub(super) fn size_bytes(&self) -> u64 {
        self.access.size()
    }

    /// What is at `offset` of the disk, and how many bytes from there on are alike: at least one but at the end.
    ///
    /// # Errors
    /// What the file system or the tables say.
    pub(super) fn look(&self, offset: u64) -> io::Result<(Found, u64)> {
        let rest = self.size_bytes().saturating_sub(offset);
        if rest == 0 {
            return Ok((Found::End, 0));
        }
        let (mapping, length) = self.access.get_mapping(offset, rest)?;
        let found = match mapping {
            Mapping::Raw { offset, .. } => Found::At(offset),
            Mapping::Zero { .. } => Found::Zeros,
            Mapping::Special { .. } => Found::Encoded,
            Mapping::Eof { .. } => Found::End,
            _ => return Err(io::Error::other("the image holds something that is not known here")),
        };
        if length == 0 && found != Found::End {
            return Err(io::Error::other("the image's tables lead nowhere"));
        }
        Ok((found, length.min(rest)))
    }

    /// Makes room in the file for the data of a range; whole clusters.
    ///
    /// # Errors
    /// What the file system says.
    pub(super) fn allocate(&self, offset: u64, length: u64) -> io::Result<()> {
        let end = (offset + length).min(self.size_bytes());
        let mut position = offset;
        while position < end {
            let (_, _, mapped) = self.access.ensure_data_mapping(position, end - position, true)?;
            position += mapped.max(1);
        }
        Ok(())
    }

    /// Gives the place of a range back: zeros from now on.
    ///
    /// # Errors
    /// What the file system says.
    pub(super) fn discard(&mut self, offset: u64, length: u64) -> io::Result<()> {
        let length = length.min(self.size_bytes().saturating_sub(offset));
        let alone = Arc::get_mut(&mut self.access);
        alone.ok_or(io::ErrorKind::ResourceBusy)?.discard_to_zero(offset, length)
    }

    /// Writes the tables to the file.
    ///
    /// # Errors
    /// What the file system says.
    pub(super) fn flush(&self) -> io::Result<()> {
        self.access.flush()
    }

    /// Reads guest bytes, decoded; for parts of which [`Self::look`] says [`Found::Encoded`].
    ///
    /// # Errors
    /// What the file system or the coding says.
    pub(super) fn read(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.access.read(buffer, offset)
    }
}

/// The file opened once more: what is read and written here goes through the page cache, whatever the loops do.
fn storage(file: &File, writable: bool) -> io::Result<Storage> {
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let again = File::options().read(true).write(writable).open(path)?;
    Storage::from_open_file(again, StorageOpenOptions::new().write(writable))
}
