//! The digests of a file's chunks, stored beside it ([`godwit_protocol::digests`] tells how): reading and writing them.

pub use godwit_protocol::digests::{CHUNK_BYTES as DIGEST_CHUNK_BYTES, Digest, Head, Whole, beside, digest};
use serde::{Deserialize, Serialize};
use std::fs::{File, OpenOptions};
use std::io::{self, BufReader, BufWriter, Seek, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use twox_hash::XxHash3_128;

/// What a chunk is known by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Sum {
    /// BLAKE3: of what is stored, or tells that a chunk need not be sent.
    Blake3,
    /// XXH3 of 128 bits, and zeros behind it: of what is compared once, with what a disk made of it. It takes a fifth of
    /// the time, and guards against no one who means harm, who could as well change the copy when it has been compared.
    Xxh3,
}

impl Sum {
    /// Of bytes.
    pub(crate) fn of(self, bytes: &[u8]) -> Digest {
        match self {
            Self::Blake3 => digest(bytes),
            Self::Xxh3 => {
                let mut sum = Digest::default();
                sum[..16].copy_from_slice(&XxHash3_128::oneshot(bytes).to_be_bytes());
                sum
            }
        }
    }
}

/// Digests of chunks that are all zeros; the full one is kept, since most holes are long.
#[derive(Debug)]
pub(crate) struct ZeroDigests {
    /// Which digests they are.
    pub(crate) sum: Sum,
    full: (usize, Digest),
}

impl ZeroDigests {
    pub(crate) fn new(chunk_bytes: usize) -> Self {
        Self::by(Sum::Blake3, chunk_bytes)
    }

    pub(crate) fn by(sum: Sum, chunk_bytes: usize) -> Self {
        Self { sum, full: (chunk_bytes, sum.of(&vec![0; chunk_bytes])) }
    }

    pub(crate) fn of(&self, length: usize) -> Digest {
        if length == self.full.0 { self.full.1 } else { self.sum.of(&vec![0; length]) }
    }
}

/// Why a list of digests is not used.
#[derive(Debug, thiserror::Error)]
pub enum DigestsError {
    /// It cannot be read.
    #[error("the list of digests cannot be read")]
    Read(#[from] io::Error),
    /// It is none.
    #[error("it is no list of digests, or damaged")]
    Damaged,
    /// It is about a file of another size.
    #[error("it is about a file of {theirs} bytes, not of {ours}")]
    Size {
        /// In the list.
        theirs: u64,
        /// The file's.
        ours: u64,
    },
}

/// An open list of digests, read as it is needed.
#[derive(Debug)]
pub struct Digests {
    /// Its first line.
    pub head: Head,
    file: File,
    first: u64,
}

impl Digests {
    /// Opens a list and checks that it is whole.
    ///
    /// # Errors
    /// [`DigestsError`].
    pub fn open(path: &Path) -> Result<Self, DigestsError> {
        let mut options = OpenOptions::new();
        let file = options.read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path)?;
        let mut list = BufReader::new(&file);
        let head = Head::read(&mut list)?.ok_or(DigestsError::Damaged)?;
        let first = list.stream_position()?;
        Ok(Self { head, file, first })
    }

    /// The list beside `path`, when it is about the file as it is now.
    pub fn of_file(path: &Path, file: &File) -> Option<Self> {
        let digests = Self::open(&beside(path)).ok()?;
        let metadata = file.metadata().ok()?;
        let head = &digests.head;
        let fresh = head.size_bytes == metadata.len() && head.modified_ns == modified_ns(&metadata);
        fresh.then_some(digests)
    }

    /// Of the chunk at `offset`, a multiple of the grid.
    ///
    /// # Errors
    /// What reading says, also behind the end.
    pub fn at(&self, offset: u64) -> io::Result<Digest> {
        let mut digest = [0; size_of::<Digest>()];
        let place = offset / self.head.chunk_bytes as u64 * size_of::<Digest>() as u64;
        self.file.read_exact_at(&mut digest, self.first + place)?;
        Ok(digest)
    }
}

/// Time of change in nanoseconds since 1970.
pub fn modified_ns(metadata: &std::fs::Metadata) -> i128 {
    i128::from(metadata.mtime()) * 1_000_000_000 + i128::from(metadata.mtime_nsec())
}

/// Writes a list to `path`, which must not be there, and brings it to stable storage. `each` tells the digest of each
/// chunk, in order; the answer is the root.
///
/// # Errors
/// What writing and `each` say.
pub fn write(
    path: &Path,
    about: &std::fs::Metadata,
    whole: &Whole,
    mut each: impl FnMut(u64) -> io::Result<Digest>,
) -> io::Result<String> {
    let (size_bytes, grid) = (about.len(), DIGEST_CHUNK_BYTES);
    let mut options = OpenOptions::new();
    options.write(true).read(true).create_new(true).mode(0o644).custom_flags(libc::O_NOFOLLOW);
    let file = options.open(path)?;
    let mut head = Head::new(size_bytes, modified_ns(about), whole);
    let mut writer = BufWriter::new(&file);
    writer.write_all(&head.line()?)?;
    let mut hasher = blake3::Hasher::new();
    for offset in (0..size_bytes).step_by(grid) {
        let digest = each(offset)?;
        hasher.update(&digest);
        writer.write_all(&digest)?;
    }
    writer.flush()?;
    head.set_root(&hasher.finalize());
    file.write_all_at(&head.line()?, 0)?;
    file.sync_all()?;
    Ok(head.root)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;

    fn list(folder: &Path) -> PathBuf {
        let file = folder.join("file");
        std::fs::write(&file, vec![7; (2 << 20) + 5]).unwrap();
        let whole = Whole { md5: Some("ab".into()), sha512: None };
        let each = |offset| Ok(digest(&vec![7; if offset == 2 << 20 { 5 } else { 1 << 20 }]));
        write(&beside(&file), &file.metadata().unwrap(), &whole, each).unwrap();
        beside(&file)
    }

    #[test]
    fn a_list_reads_as_it_was_written() {
        let folder = tempfile::tempdir().unwrap();
        let digests = Digests::open(&list(folder.path())).unwrap();
        assert_eq!(digests.head.size_bytes, (2 << 20) + 5);
        assert_eq!(digests.head.md5.as_deref(), Some("ab"));
        assert_eq!(digests.at(1 << 20).unwrap(), digest(&vec![7; 1 << 20]));
        assert_eq!(digests.at(2 << 20).unwrap(), digest(&[7; 5]));
        assert!(digests.at(3 << 20).is_err());
    }

    #[test]
    fn a_list_about_what_the_file_was_is_stale() {
        let folder = tempfile::tempdir().unwrap();
        list(folder.path());
        let path = folder.path().join("file");
        assert!(Digests::of_file(&path, &File::open(&path).unwrap()).is_some());
        std::fs::write(&path, vec![8; (2 << 20) + 5]).unwrap();
        assert!(Digests::of_file(&path, &File::open(&path).unwrap()).is_none());
    }

    #[test]
    fn a_damaged_list_is_not_believed() {
        let folder = tempfile::tempdir().unwrap();
        let path = list(folder.path());
        let good = std::fs::read(&path).unwrap();
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 0x20;
            std::fs::write(&path, &bad).unwrap();
            let Ok(digests) = Digests::open(&path) else { continue };
            // What the root does not cover is what nobody checks chunks by.
            assert_eq!(digests.at(0).unwrap(), digest(&vec![7; 1 << 20]), "byte {at}");
        }
        for length in [0, 1, good.len() - 1] {
            std::fs::write(&path, &good[..length]).unwrap();
            assert!(matches!(Digests::open(&path), Err(DigestsError::Damaged)));
        }
    }

    #[test]
    fn zeros_have_the_digest_that_they_would_be_given() {
        for sum in [Sum::Blake3, Sum::Xxh3] {
            let zeros = ZeroDigests::by(sum, 1 << 20);
            for length in [1, 4096, 100_000, 1 << 20] {
                assert_eq!(zeros.of(length), sum.of(&vec![0; length]));
                assert_ne!(zeros.of(length), zeros.of(length - 1));
            }
        }
    }

    #[test]
    fn a_flipped_bit_changes_each_sum() {
        for sum in [Sum::Blake3, Sum::Xxh3] {
            let mut bytes: Vec<u8> = (0..8192_u32).map(|at| ((at * 31) >> 3) as u8).collect();
            let good = sum.of(&bytes);
            // Prime, so that each bit of a byte and each place in a lane has its turn.
            for bit in (0..bytes.len() * 8).step_by(61) {
                bytes[bit / 8] ^= 1 << (bit % 8);
                assert_ne!(sum.of(&bytes), good, "{sum:?}, bit {bit}");
                bytes[bit / 8] ^= 1 << (bit % 8);
            }
        }
    }

    /// What the specification and `xxhsum -H2` give, so that a journal means the same to each version.
    #[test]
    fn sums_are_those_that_others_make() {
        assert_eq!(hex::encode(&Sum::Xxh3.of(b"")[..16]), "99aa06d3014798d86001c324468d497f");
        assert_eq!(Sum::Blake3.of(b""), *blake3::hash(b"").as_bytes());
        assert_eq!(Sum::Xxh3.of(b"")[16..], [0; 16]);
    }
}
