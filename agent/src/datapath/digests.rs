//! The digests of a file's chunks, stored beside it as `NAME.blake3`.
//!
//! The first line is JSON: `{"godwit_digests":1,"chunk_bytes":1048576,"size_bytes":…,"modified_ns":…,"root":"…"}`,
//! with `sha512` and `md5` of the whole where they were asked for. After its newline come the BLAKE3 digests of the
//! chunks, 32 bytes each, in order; the last chunk ends with the file, and a hole counts as the zeros it reads as.
//! `root` is the BLAKE3 digest of all of them, so that a damaged list is not believed.

use serde::{Deserialize, Serialize};
use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Ending of the files.
pub const ENDING: &str = "blake3";

/// The grid of digests, in bytes.
pub const DIGEST_CHUNK_BYTES: usize = 1 << 20;

/// Longest first line in bytes.
const MAX_HEAD_BYTES: u64 = 4096;

/// BLAKE3 of a chunk.
pub type Digest = [u8; 32];

/// Where the digests of a file are.
pub fn beside(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".");
    name.push(ENDING);
    name.into()
}

/// BLAKE3 of bytes.
pub fn digest(bytes: &[u8]) -> Digest {
    blake3::hash(bytes).into()
}

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

/// What the first line says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Head {
    godwit_digests: u32,
    /// The grid in bytes.
    pub chunk_bytes: usize,
    /// Size of the file in bytes.
    pub size_bytes: u64,
    /// Its time of change when it was published, in nanoseconds since 1970: another one, and the digests are of
    /// something that is gone.
    pub modified_ns: i128,
    /// Digest of the digests, in hexadecimal.
    pub root: String,
    /// Of the whole file, in hexadecimal.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub sha512: Option<String>,
    /// Of the whole file, in hexadecimal.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub md5: Option<String>,
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
        let mut line = Vec::new();
        let mut reader = BufReader::new((&file).take(MAX_HEAD_BYTES));
        reader.read_until(b'\n', &mut line)?;
        let head: Head = serde_json::from_slice(&line).map_err(|_| DigestsError::Damaged)?;
        let grid = head.chunk_bytes;
        if head.godwit_digests != 1 || !line.ends_with(b"\n") || grid != DIGEST_CHUNK_BYTES {
            return Err(DigestsError::Damaged);
        }
        let first = line.len() as u64;
        let count = head.size_bytes.div_ceil(grid as u64);
        if file.metadata()?.len() != first + count * size_of::<Digest>() as u64 {
            return Err(DigestsError::Damaged);
        }
        let mut hasher = blake3::Hasher::new();
        let mut rest = &file;
        rest.seek(SeekFrom::Start(first))?;
        hasher.update_reader(rest)?;
        if hasher.finalize().to_hex().as_str() != head.root {
            return Err(DigestsError::Damaged);
        }
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

/// Digests of a whole file beside those of its chunks, in hexadecimal.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Whole {
    /// SHA-512.
    pub sha512: Option<String>,
    /// MD5.
    pub md5: Option<String>,
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
    let mut head = Head {
        godwit_digests: 1,
        chunk_bytes: grid,
        size_bytes,
        modified_ns: modified_ns(about),
        root: "0".repeat(2 * size_of::<Digest>()),
        sha512: whole.sha512.clone(),
        md5: whole.md5.clone(),
    };
    let line = |head: &Head| serde_json::to_vec(head).map(|line| [&line[..], b"\n"].concat());
    let mut writer = BufWriter::new(&file);
    writer.write_all(&line(&head)?)?;
    let mut hasher = blake3::Hasher::new();
    for offset in (0..size_bytes).step_by(grid) {
        let digest = each(offset)?;
        hasher.update(&digest);
        writer.write_all(&digest)?;
    }
    writer.flush()?;
    head.root = hasher.finalize().to_hex().to_string();
    file.write_all_at(&line(&head)?, 0)?;
    file.sync_all()?;
    Ok(head.root)
}

#[cfg(test)]
mod tests {
    use super::*;

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
