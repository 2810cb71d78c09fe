//! Reading a copy again and comparing it with the digests of what passed, those that its journal holds.

use super::error::{CopyError, io_error};
use crate::datapath::arena::pieces;
use crate::datapath::buffer::read;
use crate::datapath::chunks::find_data;
use crate::datapath::digests::{Digest, Sum, ZeroDigests};
use crate::datapath::image::Image;
use crate::datapath::journal::Journal;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

/// The digest that the journal holds for the chunk at `offset`; of a hole, the one of its zeros.
pub(super) fn noted(
    journal: &Journal,
    zeros: &ZeroDigests,
    offset: u64,
    length: usize,
) -> io::Result<Digest> {
    let (_, digest) = journal.look(offset)?;
    Ok(digest.unwrap_or_else(|| zeros.of(length)))
}

/// Chunks that are read at once: the disk reads while digests are made.
const THREADS: usize = 4;

/// Compares a whole copy of `size_bytes` with `journal`. `image`: the copy is one, and its disk is compared.
/// `alive` is told the offset of each chunk.
///
/// # Errors
/// [`CopyError::Verify`] for a chunk that differs, [`CopyError::Io`].
pub(super) fn verify(
    (copy, path): (&File, &Path),
    image: Option<&Image>,
    (journal, sum, size_bytes): (&Journal, Sum, u64),
    alive: &mut (dyn FnMut(u64, u64) + Send),
) -> Result<(), CopyError> {
    let chunk_bytes = journal.chunk_bytes;
    let mut buffers = pieces(THREADS, chunk_bytes).map_err(io_error("get memory to read", path))?;
    let verifying = Verifying {
        copy,
        path,
        image,
        journal,
        size_bytes,
        zeros: ZeroDigests::by(sum, chunk_bytes),
        walk: Mutex::new(Walk { position: 0, data: 0..0, alive }),
    };
    std::thread::scope(|scope| {
        let verifying = &verifying;
        let mut threads = Vec::new();
        for buffer in &mut buffers {
            threads.push(scope.spawn(move || verifying.run(buffer).inspect_err(|_| verifying.stop())));
        }
        let ended = threads.into_iter().map(|thread| {
            thread.join().unwrap_or_else(|_| Err(io_error("verify", path)(io::Error::other("a panic"))))
        });
        // All are waited for; the first failure is told.
        ended.fold(Ok(()), Result::and)
    })
}

struct Verifying<'a> {
    copy: &'a File,
    path: &'a Path,
    image: Option<&'a Image>,
    journal: &'a Journal,
    size_bytes: u64,
    zeros: ZeroDigests,
    walk: Mutex<Walk<'a>>,
}

struct Walk<'a> {
    /// Where the next chunk begins.
    position: u64,
    /// The data that was found last: there is none between it and what was before it. It is kept, since looking for the end
    /// of long data costs as much as it is long.
    data: Range<u64>,
    alive: &'a mut (dyn FnMut(u64, u64) + Send),
}

impl Verifying<'_> {
    fn run(&self, buffer: &mut [u8]) -> Result<(), CopyError> {
        while let Some((offset, length, hole)) = self.next()? {
            let told = io_error("read the journal of", self.path);
            let wanted = noted(self.journal, &self.zeros, offset, length).map_err(told)?;
            let found = if hole {
                self.zeros.of(length)
            } else {
                match self.image {
                    Some(image) => image.read(&mut buffer[..length], offset),
                    None => read(self.copy, buffer, offset, length),
                }
                .map_err(io_error("read", self.path))?;
                self.zeros.sum.of(&buffer[..length])
            };
            if found != wanted {
                return Err(CopyError::Verify { path: self.path.to_owned(), offset });
            }
        }
        Ok(())
    }

    /// The next chunk's begin and length, and whether it is a hole.
    fn next(&self) -> Result<Option<(u64, usize, bool)>, CopyError> {
        let mut walk = self.walk.lock().unwrap_or_else(PoisonError::into_inner);
        let offset = walk.position;
        if offset >= self.size_bytes {
            return Ok(None);
        }
        (walk.alive)(offset, self.size_bytes);
        let length = (self.size_bytes - offset).min(self.journal.chunk_bytes as u64) as usize;
        let end = offset + length as u64;
        if self.image.is_none() && walk.data.end <= offset {
            let found = find_data(self.copy, offset, self.size_bytes);
            let found = found.map_err(io_error("read", self.path))?;
            walk.data = found.map_or(u64::MAX..u64::MAX, |data| data.offset..data.offset + data.length);
        }
        let hole = self.image.is_none() && walk.data.start >= end;
        walk.position = end;
        Ok(Some((offset, length, hole)))
    }

    /// Nothing more is handed out.
    fn stop(&self) {
        self.walk.lock().unwrap_or_else(PoisonError::into_inner).position = u64::MAX;
    }
}
