//! What there is to copy, in chunks on a fixed grid of the disk, each with the parts of it that hold data. Found as
//! it goes: a list of all extents of a fragmented terabyte would be large, and its front would be copied late.

use super::BLOCK_BYTES;
use super::image::{Found, Image};
use nix::errno::Errno;
use nix::unistd::{Whence, lseek};
use std::fs::File;
use std::io;

const BLOCK: u64 = BLOCK_BYTES as u64;

/// Where a part's bytes come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Origin {
    /// From this offset of the source's file.
    File(u64),
    /// Only the image's own code can read them: compressed.
    Image,
}

/// A part of a chunk that holds data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Part {
    /// Where it begins within its chunk, in bytes.
    pub(super) at: usize,
    /// Its length in bytes.
    pub(super) length: usize,
    /// Where it comes from.
    pub(super) origin: Origin,
    /// Where it goes to in the destination's file.
    pub(super) target: u64,
}

/// A step of the grid with data in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Chunk {
    /// How many chunks with data were before it.
    pub(super) number: u64,
    /// Where it begins on the disk: a multiple of the grid.
    pub(super) offset: u64,
    /// Its length, the grid's but for the last.
    pub(super) length: usize,
    /// Its data in rising order, each at whole blocks but for the disk's end; never empty.
    pub(super) parts: Vec<Part>,
}

/// A run of data on the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Extent {
    pub(super) offset: u64,
    pub(super) length: u64,
    pub(super) origin: Origin,
}

/// The data of a source, extent by extent.
pub(super) enum Extents {
    /// Of a file, as SEEK_DATA tells.
    File { file: File, position: u64, size_bytes: u64 },
    /// Of an image, as its tables tell.
    Image { image: Image, position: u64 },
}

impl Extents {
    fn position(&mut self) -> &mut u64 {
        match self {
            Self::File { position, .. } | Self::Image { position, .. } => position,
        }
    }

    /// The next data from the position on; none at the end.
    ///
    /// # Errors
    /// What the file system or the image says.
    pub(super) fn find(&mut self) -> io::Result<Option<Extent>> {
        let found = match self {
            Self::File { file, position, size_bytes } => find_data(file, *position, *size_bytes)?,
            Self::Image { image, position } => find_mapped(image, *position)?,
        };
        if let Some(extent) = found {
            *self.position() = extent.offset + extent.length;
        }
        Ok(found)
    }
}

/// The next data of a file at or after `position`, rounded out to whole blocks.
pub(super) fn find_data(file: &File, position: u64, size_bytes: u64) -> io::Result<Option<Extent>> {
    if position >= size_bytes {
        return Ok(None);
    }
    let start = match lseek(file, position as i64, Whence::SeekData) {
        Ok(start) => (start as u64 / BLOCK * BLOCK).max(position),
        Err(Errno::ENXIO) => return Ok(None),
        // The file system keeps no account of holes: all of it is data.
        Err(Errno::EINVAL | Errno::EOPNOTSUPP) => position,
        Err(error) => return Err(error.into()),
    };
    if start >= size_bytes {
        return Ok(None);
    }
    let end = match lseek(file, start as i64, Whence::SeekHole) {
        Ok(end) => (end as u64).next_multiple_of(BLOCK).min(size_bytes),
        // No account, or cut off since; then the reads will say so.
        Err(Errno::EINVAL | Errno::EOPNOTSUPP | Errno::ENXIO) => size_bytes,
        Err(error) => return Err(error.into()),
    };
    Ok(Some(Extent { offset: start, length: end - start, origin: Origin::File(start) }))
}

fn find_mapped(image: &Image, mut position: u64) -> io::Result<Option<Extent>> {
    loop {
        let (found, length) = image.look(position)?;
        let origin = match found {
            Found::End => return Ok(None),
            Found::Zeros => {
                position += length;
                continue;
            }
            Found::At(offset) => Origin::File(offset),
            Found::Encoded => Origin::Image,
        };
        return Ok(Some(Extent { offset: position, length, origin }));
    }
}

/// The chunks of a source.
pub(super) struct Chunks {
    extents: Extents,
    target: Option<Image>,
    size_bytes: u64,
    chunk_bytes: u64,
    number: u64,
    pending: Option<Extent>,
}

impl Chunks {
    /// Of a disk of `size_bytes` on a grid of `chunk_bytes`. The data goes where `target` has a place for it, or to
    /// where it is on the disk when there is none.
    pub(super) fn new(extents: Extents, target: Option<Image>, size_bytes: u64, chunk_bytes: usize) -> Self {
        Self { extents, target, size_bytes, chunk_bytes: chunk_bytes as u64, number: 0, pending: None }
    }

    /// The next one with data in it; none after the last.
    ///
    /// # Errors
    /// What the file system or the image says.
    pub(super) fn next(&mut self) -> io::Result<Option<Chunk>> {
        let Some(first) = self.take()? else { return Ok(None) };
        let offset = first.offset / self.chunk_bytes * self.chunk_bytes;
        let end = (offset + self.chunk_bytes).min(self.size_bytes);
        let mut parts = Vec::new();
        let mut next = Some(first);
        while let Some(extent) = next {
            if extent.offset >= end {
                self.pending = Some(extent);
                break;
            }
            let length = extent.length.min(end - extent.offset);
            if length < extent.length {
                self.pending = Some(extent.behind(length));
            }
            self.add(&mut parts, offset, Extent { length, ..extent })?;
            if self.pending.is_some() {
                break;
            }
            next = self.take()?;
        }
        self.number += 1;
        Ok(Some(Chunk { number: self.number - 1, offset, length: (end - offset) as usize, parts }))
    }

    fn take(&mut self) -> io::Result<Option<Extent>> {
        match self.pending.take() {
            Some(extent) => Ok(Some(extent)),
            None => self.extents.find(),
        }
    }

    /// Adds an extent that lies within the chunk at `offset`, in as many parts as the destination wants.
    fn add(&self, parts: &mut Vec<Part>, offset: u64, extent: Extent) -> io::Result<()> {
        let mut rest = extent;
        while rest.length > 0 {
            let (target, length) = match &self.target {
                None => (rest.offset, rest.length),
                Some(image) => match image.look(rest.offset)? {
                    (Found::At(target), length) => (target, length.min(rest.length)),
                    _ => {
                        return Err(io::Error::other("the new image has no room for data that is there now"));
                    }
                },
            };
            let part = Part {
                at: (rest.offset - offset) as usize,
                length: length as usize,
                origin: rest.origin,
                target,
            };
            match parts.last_mut() {
                Some(last) if last.joins(&part) => last.length = part.at + part.length - last.at,
                _ => parts.push(part),
            }
            rest = rest.behind(length);
        }
        Ok(())
    }
}

impl Extent {
    /// What is left behind its first `length` bytes.
    fn behind(self, length: u64) -> Self {
        let origin = match self.origin {
            Origin::File(offset) => Origin::File(offset + length),
            Origin::Image => Origin::Image,
        };
        Self { offset: self.offset + length, length: self.length - length, origin }
    }
}

impl Part {
    /// Whether `next` follows at both ends, so that both can be read and written in one go.
    fn joins(&self, next: &Part) -> bool {
        let length = self.length as u64;
        let reads_on = match (self.origin, next.origin) {
            (Origin::File(here), Origin::File(there)) => here + length == there,
            (Origin::Image, Origin::Image) => true,
            _ => false,
        };
        reads_on && self.target + length == next.target && self.at + self.length == next.at
    }
}
