//! Reading a copy again and comparing it with the digests of what passed.

use super::error::{CopyError, io_error};
use crate::datapath::buffer::{Buffer, read};
use crate::datapath::chunks::find_data;
use crate::datapath::digests::{Digest, ZeroDigests, digest};
use crate::datapath::image::Image;
use crate::datapath::journal::Journal;
use std::fs::File;
use std::io;
use std::path::Path;

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

/// Compares a whole copy of `size_bytes` with `journal`. `image`: the copy is one, and its disk is compared.
/// `alive` is told the offset of each chunk.
///
/// # Errors
/// [`CopyError::Verify`] for the first chunk that differs, [`CopyError::Io`].
pub(super) fn verify(
    (copy, path): (&File, &Path),
    image: Option<&Image>,
    (journal, size_bytes, chunk_bytes): (&Journal, u64, usize),
    alive: &mut (dyn FnMut(u64, u64) + Send),
) -> Result<(), CopyError> {
    let zeros = ZeroDigests::new(chunk_bytes);
    let mut buffer = Buffer::new(chunk_bytes);
    let mut data_from = 0;
    for offset in (0..size_bytes).step_by(chunk_bytes) {
        alive(offset, size_bytes);
        let length = (size_bytes - offset).min(chunk_bytes as u64) as usize;
        let wanted = noted(journal, &zeros, offset, length).map_err(io_error("read the journal of", path))?;
        if image.is_none() && data_from < offset + length as u64 {
            let found = find_data(copy, offset.max(data_from), size_bytes).map_err(io_error("read", path))?;
            data_from = found.map_or(size_bytes, |extent| extent.offset);
        }
        let hole = image.is_none() && data_from >= offset + length as u64;
        let found = if hole {
            zeros.of(length)
        } else {
            match image {
                Some(image) => image.read(&mut buffer[..length], offset),
                None => read(copy, &mut buffer, offset, length),
            }
            .map_err(io_error("read", path))?;
            digest(&buffer[..length])
        };
        if found != wanted {
            return Err(CopyError::Verify { path: path.to_owned(), offset });
        }
        // Data may go on behind this chunk.
        data_from = if hole { data_from } else { offset + length as u64 };
    }
    Ok(())
}
