//! Memory for bytes on their way, in huge pages. A request of direct I/O names its memory page by page: in small pages
//! a megabyte is 256 pieces, more than many disks take at once, in huge pages it is one.

use std::fmt;
use std::io;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::Arc;

/// Size and alignment of a huge page in bytes, on amd64 and on arm64 with pages of 4 KiB.
const HUGE_PAGE_BYTES: usize = 2 << 20;

/// A piece of the memory, all zero at first. It begins at a block's begin when its size is whole blocks.
pub(super) struct Piece {
    start: NonNull<u8>,
    length: usize,
    /// Keeps the memory.
    _mapping: Arc<Mapping>,
}

/// `count` pieces of `bytes` each. The kernel gives ordinary pages where it has no huge ones to spare.
///
/// # Errors
/// No memory.
pub(super) fn pieces(count: usize, bytes: usize) -> io::Result<Vec<Piece>> {
    let length = count.checked_mul(bytes).ok_or(io::ErrorKind::OutOfMemory)?;
    let mapping = Arc::new(Mapping::new(length.max(1).next_multiple_of(HUGE_PAGE_BYTES))?);
    let piece = |index: usize| Piece {
        // SAFETY: index * bytes < count * bytes, which the mapping holds behind its first huge page's begin.
        start: unsafe { mapping.first.add(index * bytes) },
        length: bytes,
        _mapping: mapping.clone(),
    };
    Ok((0..count).map(piece).collect())
}

impl Piece {
    /// Where it begins, for requests to the kernel. It stays there.
    pub(super) fn start(&self) -> NonNull<u8> {
        self.start
    }
}

impl fmt::Debug for Piece {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes in huge pages", self.length)
    }
}

impl Deref for Piece {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: the bytes are mapped and initialised as long as the mapping lives, and no other piece has them.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.length) }
    }
}

impl DerefMut for Piece {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above; and this piece is borrowed alone.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.length) }
    }
}

// SAFETY: a piece is the only one that has its bytes, like a Vec, and the mapping is only unmapped, by whoever is last.
unsafe impl Send for Piece {}

/// Mapped memory.
struct Mapping {
    all: NonNull<libc::c_void>,
    all_bytes: usize,
    /// The first byte at a huge page's begin.
    first: NonNull<u8>,
}

// SAFETY: it is not written to while it is shared; its pieces are.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Of `bytes`, whole huge pages.
    fn new(bytes: usize) -> io::Result<Self> {
        let all_bytes = bytes.checked_add(HUGE_PAGE_BYTES).ok_or(io::ErrorKind::OutOfMemory)?;
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let kind = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: new memory at a place of the kernel's choice; nothing that is mapped already is touched.
        let all = unsafe { libc::mmap(std::ptr::null_mut(), all_bytes, access, kind, -1, 0) };
        if all == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let all = NonNull::new(all).ok_or(io::ErrorKind::OutOfMemory)?;
        let skip = all.cast::<u8>().align_offset(HUGE_PAGE_BYTES);
        // SAFETY: the mapping is a huge page longer than asked for, so that the next huge page's begin lies within.
        let first = unsafe { all.cast::<u8>().add(skip) };
        // SAFETY: the range is our own mapping. It is only a hint: what it says does not matter.
        let _ = unsafe { libc::madvise(first.as_ptr().cast(), bytes, libc::MADV_HUGEPAGE) };
        Ok(Self { all, all_bytes, first })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped by `new` with this length, and no piece is left that leads into it.
        unsafe { libc::munmap(self.all.as_ptr(), self.all_bytes) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_aligned_apart_and_outlive_each_other() {
        for (count, bytes) in [(1, 4096), (3, 256 << 10), (5, 1 << 20), (2, 2 << 20), (0, 4096)] {
            let mut all = pieces(count, bytes).unwrap();
            assert_eq!(all.len(), count);
            for (index, piece) in all.iter_mut().enumerate() {
                assert_eq!(piece.as_ptr().align_offset(4096), 0);
                assert!(piece.len() == bytes && piece.iter().all(|byte| *byte == 0));
                piece.fill(index as u8 + 1);
            }
            while let Some(last) = all.pop() {
                assert!(last.iter().all(|byte| usize::from(*byte) == all.len() + 1));
            }
        }
    }

    #[test]
    fn more_than_there_can_be_is_an_error() {
        assert!(pieces(usize::MAX, 4096).is_err());
        assert!(pieces(1, 1 << 60).is_err());
    }
}
