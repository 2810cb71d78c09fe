//! The digests of a file's chunks, stored beside it ([`godwit_protocol::digests`] tells how): reading and writing them.

pub use godwit_protocol::digests::{CHUNK_BYTES as DIGEST_CHUNK_BYTES, Digest, Head, Whole, beside, digest};
use std::fs::{File, OpenOptions};
use std::io::{self, BufReader, BufWriter, Seek, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

/// Digests of chunks that are all zeros; the full one is kept, since most holes are long.
#[derive(Debug)]
pub(crate) struct ZeroDigests {
    full: (usize, Digest),
}

impl ZeroDigests {
    pub(crate) fn new(chunk_bytes: usize) -> Self {
        Self { full: (chunk_bytes, Self::compute(chunk_bytes)) }
    }

    pub(crate) fn of(&self, length: usize) -> Digest {
        if length == self.full.0 { self.full.1 } else { Self::compute(length) }
    }

    fn compute(length: usize) -> Digest {
        static ZEROS: [u8; 64 << 10] = [0; 64 << 10];
        let mut hasher = blake3::Hasher::new();
        let mut rest = length;
        while rest > 0 {
            let step = rest.min(ZEROS.len());
            hasher.update(&ZEROS[..step]);
            rest -= step;
        }
        hasher.finalize().into()
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
        let zeros = ZeroDigests::new(1 << 20);
        for length in [1, 4096, 100_000, 1 << 20] {
            assert_eq!(zeros.of(length), digest(&vec![0; length]));
        }
    }
}
