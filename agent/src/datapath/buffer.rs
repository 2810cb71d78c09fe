//! Memory that direct I/O takes.

use super::BLOCK_BYTES;
use std::fs::File;
use std::io;
use std::ops::{Deref, DerefMut};
use std::os::unix::fs::FileExt;

/// Bytes that begin at a block's begin in memory, with room for one block of padding behind them.
#[derive(Debug)]
pub(super) struct Buffer {
    memory: Vec<u8>,
    start: usize,
    length: usize,
}

impl Buffer {
    /// Of at least `length` bytes, all zero.
    pub(super) fn new(length: usize) -> Self {
        let length = length.next_multiple_of(BLOCK_BYTES) + BLOCK_BYTES;
        let memory = vec![0; length + BLOCK_BYTES];
        let start = memory.as_ptr().align_offset(BLOCK_BYTES);
        Self { memory, start, length }
    }
}

impl Deref for Buffer {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.memory[self.start..self.start + self.length]
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + self.length]
    }
}

/// Reads `length` bytes at `offset`, both at whole blocks but for the file's end, past the page cache or not.
///
/// # Errors
/// What the file system says; [`io::ErrorKind::UnexpectedEof`].
pub(super) fn read(file: &File, buffer: &mut [u8], offset: u64, length: usize) -> io::Result<()> {
    let padded = length.next_multiple_of(BLOCK_BYTES);
    let mut filled = 0;
    while filled < length {
        match file.read_at(&mut buffer[filled..padded], offset + filled as u64) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(read) => filled += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
