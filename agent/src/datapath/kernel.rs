//! Calls of the kernel that no safe wrapper has. Beside the memory of buffers ([`super::arena`]) and its
//! use by the ring, the only unsafe code of the data path.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// Linux's `_IOW(0x94, 9, int)`.
const FICLONE: libc::c_ulong = 0x4004_9409;

/// cachestat(2), since Linux 6.5; the number is the same on all architectures.
const CACHESTAT: libc::c_long = 451;

/// `IOPRIO_WHO_PROCESS` of ioprio_set(2).
const WHO_PROCESS: libc::c_int = 1;

/// Where the class begins in an I/O priority (ioprio_set(2)).
const CLASS_SHIFT: u32 = 13;

/// An I/O scheduling class; only disks with a scheduler that knows classes (BFQ, mq-deadline) care.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum IoClass {
    /// As every other process, at the lowest of its eight levels.
    Low,
    /// Only when nobody else wants the disk.
    Idle,
}

impl IoClass {
    /// Its name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Low => "low",
            Self::Idle => "idle",
        }
    }
}

/// Makes the empty `destination` a clone of `source` (ioctl_ficlonerange(2)); false where the file system or the pair
/// of them cannot.
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

/// Bytes of the file that lie in the page cache; none where the kernel cannot tell.
pub(super) fn cached_bytes(file: &File) -> Option<u64> {
    /// From the file's begin to its end.
    #[repr(C)]
    struct Range {
        offset: u64,
        length: u64,
    }
    /// `struct cachestat`: pages that are cached, dirty, in writeback, evicted, recently evicted.
    #[repr(C)]
    #[derive(Default)]
    struct Pages {
        counts: [u64; 5],
    }
    let range = Range { offset: 0, length: 0 };
    let mut pages = Pages::default();
    // SAFETY: the descriptor is open, and both pointers are to structures of the kernel's layout that live longer
    // than the call.
    let answer = unsafe { libc::syscall(CACHESTAT, file.as_raw_fd(), &raw const range, &raw mut pages, 0) };
    (answer == 0).then(|| pages.counts[0] * 4096)
}

/// Gives this process and the threads it starts from now on an I/O priority.
///
/// # Errors
/// What the kernel says.
pub(super) fn set_io_class(class: IoClass) -> io::Result<()> {
    let priority = match class {
        IoClass::Low => 2 << CLASS_SHIFT | 7,
        IoClass::Idle => 3 << CLASS_SHIFT,
    };
    // SAFETY: the call takes three numbers and no memory.
    let answer = unsafe { libc::syscall(libc::SYS_ioprio_set, WHO_PROCESS, 0, priority) };
    if answer == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// What the allocator keeps at hand, in bytes.
const KEEP_BYTES: libc::c_int = 8 << 20;

/// Lets the allocator keep freed memory at hand, up to 8 MiB an arena. rustls allocates and frees a few hundred KiB for
/// each of our writes; by default that memory goes back to the kernel each time, and comes anew with a fault for every page.
pub(super) fn keep_freed_memory() {
    #[cfg(target_env = "gnu")]
    // SAFETY: the calls take two numbers each, and may be made at any time from any thread (mallopt(3)). Setting the
    // one switches the other's own adjustment off, so both are set.
    let _ = unsafe {
        libc::mallopt(libc::M_TRIM_THRESHOLD, KEEP_BYTES);
        libc::mallopt(libc::M_MMAP_THRESHOLD, KEEP_BYTES / 2)
    };
}
