//! A file that grows under a name of its own, `NAME.partial`, and is given its name when it is whole. A lock on it
//! keeps a second copy to the same name away; a kill leaves it, with its journal, to the next attempt.

use super::error::{CopyError, io_error};
use crate::crash::{self, Side};
use crate::datapath::digests;
use crate::datapath::journal::{Journal, Subject};
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
use std::ffi::OsStr;
use std::fs::{self, File, Metadata, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Attempts to lock a name that others keep giving away.
const MAX_ATTEMPTS: usize = 16;

/// How long a lock is waited for.
const LOCK_WITHIN: Duration = Duration::from_secs(1);

/// The growing file.
#[derive(Debug)]
pub(in crate::datapath) struct Growing {
    pub(in crate::datapath) file: File,
    pub(in crate::datapath) path: PathBuf,
    destination: PathBuf,
    overwrite: bool,
    /// Whether dropping it leaves it.
    keep: bool,
}

/// The name under which a file grows.
pub fn partial(path: &Path) -> PathBuf {
    path.with_extension(match path.extension() {
        Some(extension) => format!("{}.partial", extension.to_string_lossy()),
        None => "partial".to_owned(),
    })
}

/// The journal of a growing file.
pub fn journal(destination: &Path) -> PathBuf {
    let mut name = partial(destination).into_os_string();
    name.push(".journal");
    name.into()
}

/// The folder that a path lies in.
fn folder(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Removes a file that may be gone already.
pub(super) fn remove(path: &Path) -> Result<(), CopyError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(io_error("remove", path)(error)),
        _ => Ok(()),
    }
}

impl Growing {
    /// Claims the destination. What an earlier attempt left is found in the file.
    ///
    /// # Errors
    /// [`CopyError::NoName`], [`CopyError::DestinationExists`], [`CopyError::DestinationKind`],
    /// [`CopyError::SameFile`], [`CopyError::Busy`], [`CopyError::Io`].
    pub(in crate::datapath) fn claim(
        destination: &Path,
        source: Option<&Metadata>,
        overwrite: bool,
        mode: u32,
    ) -> Result<Self, CopyError> {
        // `a/..` and `a/` name no file; the latter would lose its slash.
        let named = destination.file_name().is_some_and(|name| name != OsStr::new("."))
            && !destination.as_os_str().as_encoded_bytes().ends_with(b"/");
        check_destination(destination, source, overwrite).inspect_err(|_| remove_stale(destination))?;
        if !named {
            return Err(CopyError::NoName(destination.to_owned()));
        }
        let path = partial(destination);
        for _ in 0..MAX_ATTEMPTS {
            let mut options = OpenOptions::new();
            options.read(true).write(true).create(true).truncate(false).mode(mode);
            options.custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK);
            let file = options.open(&path).map_err(io_error("create", &path))?;
            lock(&file, &path, destination)?;
            let ours = file.metadata().map_err(io_error("look at", &path))?;
            // Whoever held the lock may have given the file its name, or removed it, since it was opened.
            let named = fs::symlink_metadata(&path);
            if !named.is_ok_and(|named| (named.dev(), named.ino()) == (ours.dev(), ours.ino())) {
                continue;
            }
            if !ours.is_file() {
                return Err(CopyError::DestinationKind { path, found: kind(&ours) });
            }
            check_destination(destination, source, overwrite)?;
            let destination = destination.to_owned();
            return Ok(Self { file, path, destination, overwrite, keep: false });
        }
        Err(CopyError::Busy(destination.to_owned()))
    }

    /// Sets its size, where it has another: a file server would be asked in any case.
    pub(in crate::datapath) fn resize(&self, size_bytes: u64) -> Result<(), CopyError> {
        let told = io_error("resize", &self.path);
        let sized = self.file.metadata().and_then(|now| match now.len() == size_bytes {
            true => Ok(()),
            false => self.file.set_len(size_bytes),
        });
        sized.map_err(told)
    }

    /// What an earlier attempt has noted of it, if it was about `subject`. A journal that lies beside an empty file is
    /// about another one, though that may have had the same inode.
    pub(in crate::datapath) fn noted(&self, subject: &Subject) -> Result<Option<Journal>, CopyError> {
        let now = self.file.metadata().map_err(io_error("look at", &self.path))?;
        let path = journal(&self.destination);
        match now.len() {
            0 => Ok(None),
            _ => Journal::resume(&path, subject).map_err(io_error("read", &path)),
        }
    }

    /// Empties it. What is noted about its bytes goes first, or the next attempt would believe it.
    pub(in crate::datapath) fn clear(&self) -> Result<(), CopyError> {
        remove(&journal(&self.destination))?;
        self.resize(0)
    }

    /// Leaves the file and its journal to a later attempt.
    pub(in crate::datapath) fn keep(mut self) {
        self.keep = true;
    }

    /// Brings it to stable storage under its own name.
    pub(in crate::datapath) fn sync(&self) -> Result<(), CopyError> {
        self.file.sync_all().map_err(io_error("sync", &self.path))
    }

    /// Gives it its name. What has that name already stays whole until then. It is not on stable storage yet.
    pub(in crate::datapath) fn rename(&mut self) -> Result<(), CopyError> {
        let flags = if self.overwrite { RenameFlags::empty() } else { RenameFlags::RENAME_NOREPLACE };
        match renameat2(AT_FDCWD, &self.path, AT_FDCWD, &self.destination, flags) {
            Err(Errno::EEXIST) => return Err(CopyError::DestinationExists(self.destination.clone())),
            // NFS knows no such rename; the name was free when we began.
            Err(Errno::EINVAL | Errno::ENOSYS) => {
                if !self.overwrite && fs::symlink_metadata(&self.destination).is_ok() {
                    return Err(CopyError::DestinationExists(self.destination.clone()));
                }
                fs::rename(&self.path, &self.destination).map_err(io_error("rename", &self.path))?;
            }
            answer => answer.map_err(|error| io_error("rename", &self.path)(error.into()))?,
        }
        self.keep = true;
        crash::point("copy.rename", Side::After);
        // At once: a kill between the two leaves a journal that is about nothing. Before the rename it would take with it
        // what the next attempt goes on by.
        remove(&journal(&self.destination))
    }

    /// Brings its name to stable storage, and all else that has become of the folder.
    pub(in crate::datapath) fn settle(self) -> Result<(), CopyError> {
        let folder = folder(&self.destination);
        File::open(folder).and_then(|folder| folder.sync_all()).map_err(io_error("sync", folder))
    }
}

/// Removes what a copy left that was killed when it had its name already, its journal and a list that had not, so that
/// it is gone also when the next one is refused. A copy under way has its growing file beside them.
fn remove_stale(destination: &Path) {
    let gone = fs::symlink_metadata(partial(destination))
        .is_err_and(|error| error.kind() == io::ErrorKind::NotFound);
    if gone {
        // The refusal is the one to tell.
        let _ = remove(&journal(destination));
        let _ = remove(&partial(&digests::beside(destination)));
    }
}

/// Locks a growing file. The ring of a process that was killed goes a moment after it, and its lock with it; until then
/// its last writes may still come.
fn lock(file: &File, path: &Path, destination: &Path) -> Result<(), CopyError> {
    let deadline = Instant::now() + LOCK_WITHIN;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(()),
            Err(TryLockError::WouldBlock) if Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(5));
            }
            Err(TryLockError::WouldBlock) => return Err(CopyError::Busy(destination.to_owned())),
            Err(TryLockError::Error(error)) => return Err(io_error("lock", path)(error)),
        }
    }
}

impl Drop for Growing {
    fn drop(&mut self) {
        if !self.keep {
            // The copy's own error is the one to tell.
            let _ = remove(&journal(&self.destination));
            let _ = remove(&self.path);
        }
    }
}

fn check_destination(
    destination: &Path,
    source: Option<&Metadata>,
    overwrite: bool,
) -> Result<(), CopyError> {
    let there = match fs::symlink_metadata(destination) {
        Ok(there) => there,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(io_error("look at", destination)(error)),
    };
    if !overwrite {
        return Err(CopyError::DestinationExists(destination.to_owned()));
    }
    if source.is_some_and(|source| (there.dev(), there.ino()) == (source.dev(), source.ino())) {
        return Err(CopyError::SameFile(destination.to_owned()));
    }
    match there.is_file() {
        true => Ok(()),
        false => Err(CopyError::DestinationKind { path: destination.to_owned(), found: kind(&there) }),
    }
}

fn kind(metadata: &Metadata) -> &'static str {
    let kind = metadata.file_type();
    match () {
        () if kind.is_symlink() => "a symbolic link",
        () if kind.is_dir() => "a folder",
        () if kind.is_block_device() || kind.is_char_device() => "a device",
        () => "a special file",
    }
}
