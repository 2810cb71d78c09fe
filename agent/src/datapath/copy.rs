//! A copy of a disk or image: what is copied, by which method, and when the result may be seen. The destination
//! appears under its name only when it is whole and on stable storage.

use super::reflink::reflink;
use super::ring::{BLOCK_BYTES, CHUNK_BYTES, Chunk, TransferError, transfer};
use crate::storage::dir::partial;
use crate::storage::qcow2::{HEADER_BYTES, Header, HeaderError};
use godwit_protocol::error::{ErrorKind, RequestError};
use godwit_protocol::image::DiskFormat;
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, FcntlArg, OFlag, RenameFlags, fcntl, renameat2};
use nix::unistd::{Whence, lseek};
use serde::{Deserialize, Serialize};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// What to copy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CopyOrder {
    /// A regular file; a symbolic link is refused.
    pub source: PathBuf,
    /// Must not be there.
    pub destination: PathBuf,
    /// How the bytes are to be read when the disk is to grow.
    pub format: DiskFormat,
    /// Size of the disk that a guest is to see, in bytes; none: as the source.
    pub size_bytes: Option<u64>,
}

/// How the bytes came over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Method {
    /// Blocks are shared; nothing was read.
    Reflink,
    /// io_uring past the page cache.
    Direct,
    /// io_uring through the page cache.
    Buffered,
}

impl Method {
    /// Its name in metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Reflink => "reflink",
            Self::Direct => "direct",
            Self::Buffered => "buffered",
        }
    }
}

/// What a copy was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CopyReport {
    /// How.
    pub method: Method,
    /// Size of the source in bytes.
    pub size_bytes: u64,
    /// Data in it, without holes, in bytes; 0 for a reflink.
    pub data_bytes: u64,
}

/// Why a copy was not made. Nothing of it is left then.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    /// The source is not there.
    #[error("{0} is not there")]
    NoSource(PathBuf),
    /// The source is a link, a folder or a device.
    #[error("{0} is not a regular file")]
    NotRegular(PathBuf),
    /// Its size or time of change moved during the copy.
    #[error("{0} changed while it was copied")]
    SourceChanged(PathBuf),
    /// The source is no image of its format.
    #[error("{path} cannot be a disk")]
    Header {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: HeaderError,
    },
    /// The disk is to be smaller than what is on it.
    #[error("a disk of {wanted_bytes} bytes is too small for an image of {have_bytes} bytes")]
    TooSmall {
        /// Asked for.
        wanted_bytes: u64,
        /// Size of the image as a guest sees it.
        have_bytes: u64,
    },
    /// Something has the name already.
    #[error("{0} is there already")]
    DestinationExists(PathBuf),
    /// There is no io_uring.
    #[error("the kernel gives no io_uring (see the sysctl kernel.io_uring_disabled)")]
    NoRing(#[source] io::Error),
    /// `qemu-img` failed.
    #[error("qemu-img cannot grow the disk: {0}")]
    Grow(String),
    /// The file system said no.
    #[error("cannot {action} {path}")]
    Io {
        /// `read`, `write`, …
        action: &'static str,
        /// What.
        path: PathBuf,
        /// What it said.
        #[source]
        source: io::Error,
    },
}

impl From<CopyError> for RequestError {
    fn from(error: CopyError) -> Self {
        let kind = match &error {
            CopyError::NoSource(_) => ErrorKind::NotFound,
            CopyError::NotRegular(_) | CopyError::Header { .. } | CopyError::TooSmall { .. } => {
                ErrorKind::Invalid
            }
            CopyError::SourceChanged(_) | CopyError::DestinationExists(_) => ErrorKind::Conflict,
            CopyError::Io { source, .. } if crate::storage::is_full(source) => ErrorKind::NoSpace,
            CopyError::NoRing(_) | CopyError::Grow(_) | CopyError::Io { .. } => ErrorKind::Internal,
        };
        RequestError::new(kind, crate::hypervisor::chain(&error))
    }
}

fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> CopyError {
    let path = path.to_owned();
    move |source| CopyError::Io { action, path, source }
}

/// Copies; `progress` is told the bytes done and in all, holes included, after each chunk.
///
/// # Errors
/// [`CopyError`].
pub fn copy(order: &CopyOrder, progress: &mut dyn FnMut(u64, u64)) -> Result<CopyReport, CopyError> {
    let source = open_source(&order.source)?;
    let before = source.metadata().map_err(io_error("look at", &order.source))?;
    let grown = plan_growth(order, &source, before.len())?;
    let growing = Growing::create(&order.destination)?;
    let report = copy_bytes(order, &source, &growing, before.len(), progress)?;
    let after = source.metadata().map_err(io_error("look at", &order.source))?;
    let stamp = |metadata: &fs::Metadata| (metadata.len(), metadata.mtime(), metadata.mtime_nsec());
    if stamp(&before) != stamp(&after) {
        return Err(CopyError::SourceChanged(order.source.clone()));
    }
    growing.resize(before.len())?;
    match (grown, order.format) {
        (None, _) => {}
        (Some(size_bytes), DiskFormat::Raw) => growing.resize(size_bytes)?,
        (Some(size_bytes), DiskFormat::Qcow2) => grow_qcow2(&growing.path, size_bytes)?,
    }
    growing.finish(&order.destination)?;
    Ok(report)
}

fn open_source(path: &Path) -> Result<File, CopyError> {
    // O_NONBLOCK: opening a FIFO would wait for a writer.
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    let file = match OpenOptions::new().read(true).custom_flags(flags).open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(CopyError::NoSource(path.to_owned()));
        }
        Err(error) if error.raw_os_error() == Some(libc::ELOOP) => {
            return Err(CopyError::NotRegular(path.to_owned()));
        }
        Err(error) => return Err(io_error("open", path)(error)),
    };
    match file.metadata().map_err(io_error("look at", path))?.is_file() {
        true => Ok(file),
        false => Err(CopyError::NotRegular(path.to_owned())),
    }
}

/// The size to grow to, where that is more than the source has; the source's head is checked on the way.
fn plan_growth(order: &CopyOrder, source: &File, length: u64) -> Result<Option<u64>, CopyError> {
    let Some(wanted_bytes) = order.size_bytes else { return Ok(None) };
    let have_bytes = match order.format {
        DiskFormat::Raw => length,
        DiskFormat::Qcow2 => {
            let mut head = Vec::with_capacity(HEADER_BYTES);
            let mut reader = source.take(HEADER_BYTES as u64);
            reader.read_to_end(&mut head).map_err(io_error("read", &order.source))?;
            let header = Header::parse(&head)
                .map_err(|source| CopyError::Header { path: order.source.clone(), source })?;
            header.virtual_size_bytes
        }
    };
    if wanted_bytes < have_bytes {
        return Err(CopyError::TooSmall { wanted_bytes, have_bytes });
    }
    Ok((wanted_bytes > have_bytes).then_some(wanted_bytes))
}

fn copy_bytes(
    order: &CopyOrder,
    source: &File,
    growing: &Growing,
    size_bytes: u64,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<CopyReport, CopyError> {
    if reflink(source, &growing.file).map_err(io_error("clone", &order.source))? {
        progress(size_bytes, size_bytes);
        return Ok(CopyReport { method: Method::Reflink, size_bytes, data_bytes: 0 });
    }
    let explain = |error| match error {
        TransferError::Setup(source) => CopyError::NoRing(source),
        TransferError::Read(source) => io_error("read", &order.source)(source),
        TransferError::SourceShrank => CopyError::SourceChanged(order.source.clone()),
        TransferError::Write(source) => io_error("write", &growing.path)(source),
    };
    let direct = set_direct(source, true) && set_direct(&growing.file, true);
    let mut method = if direct { Method::Direct } else { Method::Buffered };
    let mut sent = send(source, growing, size_bytes, method, progress);
    if let Err(TransferError::Read(error) | TransferError::Write(error)) = &sent
        && direct
        && error.raw_os_error() == Some(libc::EINVAL)
    {
        // The flag was taken, but not our alignment.
        method = Method::Buffered;
        sent = send(source, growing, size_bytes, method, progress);
    }
    set_direct(&growing.file, false);
    let data_bytes = sent.map_err(explain)?;
    Ok(CopyReport { method, size_bytes, data_bytes })
}

/// One pass over the source's data; how many bytes that was.
fn send(
    source: &File,
    growing: &Growing,
    size_bytes: u64,
    method: Method,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<u64, TransferError> {
    if method == Method::Buffered {
        set_direct(source, false);
        set_direct(&growing.file, false);
    }
    let chunks = Chunks::new(source, size_bytes);
    let reader = source.try_clone().map_err(TransferError::Read)?;
    let writer = growing.file.try_clone().map_err(TransferError::Write)?;
    let mut data_bytes = 0;
    let holes = std::cell::Cell::new(0);
    let chunks = chunks.map(|piece| {
        piece.map(|(chunk, hole)| {
            holes.set(holes.get() + hole);
            chunk
        })
    });
    transfer(reader, writer, size_bytes, method == Method::Direct, chunks, |length| {
        data_bytes += length;
        progress((data_bytes + holes.get()).min(size_bytes), size_bytes);
    })?;
    Ok(data_bytes)
}

/// Whether the file now bypasses the page cache as wanted.
fn set_direct(file: &File, direct: bool) -> bool {
    let Ok(flags) = fcntl(file, FcntlArg::F_GETFL) else { return false };
    let mut flags = OFlag::from_bits_retain(flags);
    flags.set(OFlag::O_DIRECT, direct);
    fcntl(file, FcntlArg::F_SETFL(flags)).is_ok()
}

/// The data of a file in chunks, each with the length of the hole before it. Found as it goes: a list of all
/// extents of a fragmented terabyte would be large, and its front would be copied late.
struct Chunks<'a> {
    file: &'a File,
    position: u64,
    data_end: u64,
    size_bytes: u64,
}

impl<'a> Chunks<'a> {
    fn new(file: &'a File, size_bytes: u64) -> Self {
        Self { file, position: 0, data_end: 0, size_bytes }
    }

    /// Moves to the next data; the length of the hole before it, none at the end of the file.
    fn find_data(&mut self) -> io::Result<Option<u64>> {
        let block = BLOCK_BYTES as u64;
        let start = match lseek(self.file, self.position as i64, Whence::SeekData) {
            Ok(start) => (start as u64 / block * block).max(self.position),
            Err(Errno::ENXIO) => return Ok(None),
            // The file system keeps no account of holes: all of it is data.
            Err(Errno::EINVAL | Errno::EOPNOTSUPP) => self.position,
            Err(error) => return Err(error.into()),
        };
        if start >= self.size_bytes {
            return Ok(None);
        }
        self.data_end = match lseek(self.file, start as i64, Whence::SeekHole) {
            Ok(end) => (end as u64).next_multiple_of(block).min(self.size_bytes),
            Err(Errno::EINVAL | Errno::EOPNOTSUPP) => self.size_bytes,
            // It was cut off since; the reads will say so.
            Err(Errno::ENXIO) => self.size_bytes,
            Err(error) => return Err(error.into()),
        };
        let hole = start - self.position;
        self.position = start;
        Ok(Some(hole))
    }
}

impl Iterator for Chunks<'_> {
    type Item = io::Result<(Chunk, u64)>;

    fn next(&mut self) -> Option<Self::Item> {
        let mut hole = 0;
        if self.position >= self.data_end {
            match self.find_data() {
                Ok(Some(before)) => hole = before,
                Ok(None) => return None,
                Err(error) => return Some(Err(error)),
            }
        }
        let length = (self.data_end - self.position).min(CHUNK_BYTES as u64) as usize;
        let chunk = Chunk { offset: self.position, length };
        self.position += length as u64;
        Some(Ok((chunk, hole)))
    }
}

/// A file that grows under a name of its own and vanishes unless it is finished.
struct Growing {
    file: File,
    path: PathBuf,
    finished: bool,
}

impl Growing {
    fn create(destination: &Path) -> Result<Self, CopyError> {
        if fs::symlink_metadata(destination).is_ok() {
            return Err(CopyError::DestinationExists(destination.to_owned()));
        }
        let path = partial(destination);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(io_error("remove", &path)(error));
            }
            _ => {}
        }
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(true).mode(0o600).custom_flags(libc::O_NOFOLLOW);
        let file = options.open(&path).map_err(io_error("create", &path))?;
        Ok(Self { file, path, finished: false })
    }

    fn resize(&self, size_bytes: u64) -> Result<(), CopyError> {
        self.file.set_len(size_bytes).map_err(io_error("resize", &self.path))
    }

    fn finish(mut self, destination: &Path) -> Result<(), CopyError> {
        self.file.sync_all().map_err(io_error("sync", &self.path))?;
        match renameat2(AT_FDCWD, &self.path, AT_FDCWD, destination, RenameFlags::RENAME_NOREPLACE) {
            Err(Errno::EEXIST) => return Err(CopyError::DestinationExists(destination.to_owned())),
            // NFS knows no such rename; the name was free when we began.
            Err(Errno::EINVAL | Errno::ENOSYS) => {
                fs::rename(&self.path, destination).map_err(io_error("rename", &self.path))?;
            }
            answer => answer.map_err(|error| io_error("rename", &self.path)(error.into()))?,
        }
        self.finished = true;
        let folder = destination.parent().filter(|folder| !folder.as_os_str().is_empty());
        let folder = folder.unwrap_or(Path::new("."));
        File::open(folder).and_then(|folder| folder.sync_all()).map_err(io_error("sync", folder))
    }
}

impl Drop for Growing {
    fn drop(&mut self) {
        if !self.finished {
            // An error is on its way already; what stays is removed by the next attempt.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// What runs `qemu-img` on a file that a user made: it dies with us, and gets at most 30 s of CPU and 2 GiB of
/// address space.
const CONFINED: [&str; 6] =
    ["setpriv", "--pdeathsig=KILL", "prlimit", "--cpu=30", "--as=2147483648", "qemu-img"];

fn grow_qcow2(path: &Path, size_bytes: u64) -> Result<(), CopyError> {
    let output = Command::new(CONFINED[0])
        .args(&CONFINED[1..])
        .args(["resize", "-q", "-f", "qcow2"])
        .arg(path)
        .arg(size_bytes.to_string())
        .stdin(Stdio::null())
        .output()
        .map_err(|error| CopyError::Grow(format!("it does not start, install qemu-utils: {error}")))?;
    if output.status.success() {
        return Ok(());
    }
    Err(CopyError::Grow(String::from_utf8_lossy(&output.stderr).trim().to_owned()))
}

#[cfg(test)]
mod tests;
