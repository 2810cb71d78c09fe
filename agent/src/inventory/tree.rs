//! A machine's tree, read without ever leaving it: links in it are followed as if its root were `/`.

use super::InventoryError;
use crate::kernel_numbers::{MAX_NUMBER, digits, parse_list, parse_mask};
use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, open, openat2};
use nix::sys::stat::Mode;
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

/// The longest file that is read, in bytes. `/proc/cpuinfo` of a machine with 8192 CPUs is the longest by far.
const MAX_FILE: u64 = 64 << 20;

/// A machine's tree; paths are relative to its root.
pub(super) struct Tree<'r> {
    root: &'r Path,
    folder: OwnedFd,
}

impl<'r> Tree<'r> {
    pub(super) fn open(root: &'r Path) -> Result<Self, InventoryError> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let folder = open(root, flags, Mode::empty())
            .map_err(|errno| InventoryError::Unreadable { path: root.to_owned(), source: errno.into() })?;
        Ok(Self { root, folder })
    }

    /// None when it is not there.
    fn enter(&self, path: &str, flags: OFlag) -> Result<Option<OwnedFd>, InventoryError> {
        // Without O_NONBLOCK a pipe in somebody's tree would be waited for.
        let how = OpenHow::new()
            .flags(flags | OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC)
            .resolve(ResolveFlag::RESOLVE_IN_ROOT);
        match openat2(&self.folder, path, how) {
            Ok(file) => Ok(Some(file)),
            Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ENODEV) => Ok(None),
            Err(errno) => Err(self.unreadable(path, errno.into())),
        }
    }

    fn unreadable(&self, path: &str, source: io::Error) -> InventoryError {
        InventoryError::Unreadable { path: self.path(path), source }
    }

    /// The whole path of a file of the tree, for messages.
    pub(super) fn path(&self, path: &str) -> PathBuf {
        self.root.join(path)
    }

    /// Whether a folder is there.
    pub(super) fn has_folder(&self, path: &str) -> Result<bool, InventoryError> {
        Ok(self.enter(path, OFlag::O_DIRECTORY)?.is_some())
    }

    /// A file's text; none when it is not there. Some kernels count a closing NUL in.
    pub(super) fn read(&self, path: &str) -> Result<Option<String>, InventoryError> {
        let Some(file) = self.enter(path, OFlag::empty())? else { return Ok(None) };
        let mut bytes = Vec::new();
        match File::from(file).take(MAX_FILE).read_to_end(&mut bytes) {
            Ok(_) => Ok(Some(String::from_utf8_lossy(&bytes).trim_end_matches('\0').to_owned())),
            // What the kernel refuses to fill: an offline CPU's file.
            Err(error) if matches!(error.raw_os_error(), Some(nix::libc::ENODEV | nix::libc::EINVAL)) => {
                Ok(None)
            }
            Err(error) => Err(self.unreadable(path, error)),
        }
    }

    /// That a file does not hold what belongs there.
    pub(super) fn malformed(&self, path: &str, text: &str, expected: &'static str) -> InventoryError {
        let text = text.trim().chars().take(80).collect();
        InventoryError::Malformed { path: self.path(path), text, expected }
    }

    /// A file that holds one number.
    pub(super) fn number(&self, path: &str) -> Result<Option<i64>, InventoryError> {
        let Some(text) = self.read(path)? else { return Ok(None) };
        text.trim().parse().map(Some).map_err(|_| self.malformed(path, &text, "a number"))
    }

    /// A list such as `0-3,8`; none when the file is not there.
    pub(super) fn list(&self, path: &str) -> Result<Option<BTreeSet<u32>>, InventoryError> {
        let Some(text) = self.read(path)? else { return Ok(None) };
        parse_list(&text).map(Some).ok_or_else(|| self.malformed(path, &text, "a list such as 0-3,8"))
    }

    /// A set of numbers: from the list file, or from the older mask file, whichever is there.
    pub(super) fn set(&self, list: &str, mask: &str) -> Result<Option<BTreeSet<u32>>, InventoryError> {
        if let Some(set) = self.list(list)? {
            return Ok(Some(set));
        }
        let Some(text) = self.read(mask)? else { return Ok(None) };
        parse_mask(&text).map(Some).ok_or_else(|| self.malformed(mask, &text, "a mask such as ff,ffffffff"))
    }

    /// The names in a folder, in order; none when the folder is not there.
    pub(super) fn names(&self, folder: &str) -> Result<BTreeSet<String>, InventoryError> {
        let Some(file) = self.enter(folder, OFlag::O_DIRECTORY)? else { return Ok(BTreeSet::new()) };
        let unreadable = |source| self.unreadable(folder, source);
        let mut names = BTreeSet::new();
        for entry in fs::read_dir(format!("/proc/self/fd/{}", file.as_raw_fd())).map_err(unreadable)? {
            names.extend(entry.map_err(unreadable)?.file_name().into_string());
        }
        Ok(names)
    }

    /// The numbers N of the entries `<prefix>N` of a folder; none when the folder is not there.
    pub(super) fn numbered(&self, folder: &str, prefix: &str) -> Result<BTreeSet<u32>, InventoryError> {
        let names = self.names(folder)?;
        let number = |name: &String| digits(name.strip_prefix(prefix)?);
        Ok(names.iter().filter_map(number).filter(|&number| number <= MAX_NUMBER).collect())
    }
}
