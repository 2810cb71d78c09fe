//! FICLONE: a copy that shares its blocks (ioctl_ficlonerange(2)). The only unsafe code of the data path.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// Linux's `_IOW(0x94, 9, int)`.
const FICLONE: libc::c_ulong = 0x4004_9409;

/// Makes the empty `destination` a clone of `source`; false where the file system or the pair of them cannot.
///
/// # Errors
/// What else the kernel says, a full disk for example.
pub(super) fn reflink(source: &File, destination: &File) -> io::Result<bool> {
    // SAFETY: both descriptors are open for the length of the call, and FICLONE takes its argument by value: the
    // kernel reads and writes no memory of ours.
    let answer = unsafe { libc::ioctl(destination.as_raw_fd(), FICLONE as _, source.as_raw_fd()) };
    if answer == 0 {
        return Ok(true);
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::EOPNOTSUPP | libc::EXDEV | libc::EINVAL | libc::ENOTTY | libc::ENOSYS) => Ok(false),
        _ => Err(error),
    }
}
