//! What of a copy is done, beside its growing file, so that a copy that was killed goes on where it was.
//!
//! The file has a head of one block, JSON filled up with spaces, which says what is copied; then one record for each
//! chunk of the disk. A record is written after the chunk's bytes. That is enough as long as the kernel lives: what a
//! killed process wrote stays in the page cache. After another boot a record counts only when the bytes still have
//! the digest that it holds.

use super::BLOCK_BYTES;
use super::digests::{Digest, Sum};
use serde::{Deserialize, Serialize};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

/// Format of the file; another one is not read. Version 1 said whether records hold digests, and they were BLAKE3's.
const VERSION: u32 = 2;

/// A record with a digest: a byte that says what is done, 7 unused, the digest, unused. It never lies across two pages.
const DIGEST_RECORD_BYTES: u64 = 64;

/// Where in a record its digest is.
const DIGEST_AT: usize = 8;

/// Where the head says that the copy is past its preparation.
const READY_AT: u64 = BLOCK_BYTES as u64 - 1;

/// A file as it was when a copy began.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Stamp {
    device: u64,
    inode: u64,
    pub(super) size_bytes: u64,
    modified_ns: i128,
}

impl Stamp {
    /// Of an open file.
    ///
    /// # Errors
    /// What the file system says.
    pub(super) fn of(file: &File) -> io::Result<Self> {
        let metadata = file.metadata()?;
        let modified_ns = i128::from(metadata.mtime()) * 1_000_000_000 + i128::from(metadata.mtime_nsec());
        Ok(Self { device: metadata.dev(), inode: metadata.ino(), size_bytes: metadata.len(), modified_ns })
    }
}

/// What a journal is about. A journal about anything else is none of ours.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Subject {
    version: u32,
    /// What is copied.
    pub(super) source: Stamp,
    /// The growing file; another one of the same name does not have the bytes.
    pub(super) target_inode: u64,
    /// How the bytes change on the way, as text.
    pub(super) conversion: String,
    /// The grid.
    pub(super) chunk_bytes: usize,
    /// What digests records hold, if any.
    pub(super) digests: Option<Sum>,
}

#[derive(Serialize, Deserialize)]
struct Head {
    subject: Subject,
    boot: String,
}

impl Subject {
    pub(super) fn new(
        source: Stamp,
        target_inode: u64,
        conversion: String,
        chunk_bytes: usize,
        digests: Option<Sum>,
    ) -> Self {
        Self { version: VERSION, source, target_inode, conversion, chunk_bytes, digests }
    }
}

/// What is known of a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Done {
    /// Not copied.
    No,
    /// Copied.
    Copied,
    /// Read, and all zeros: nothing was written.
    Zeros,
}

/// The journal of a running copy.
#[derive(Debug)]
pub(super) struct Journal {
    file: File,
    /// What digests records hold, if any.
    pub(super) digests: Option<Sum>,
    /// The grid.
    pub(super) chunk_bytes: usize,
    /// Whether it was there already, and so may hold something.
    pub(super) resumed: bool,
    /// Whether what it holds is from this boot.
    pub(super) same_boot: bool,
}

impl Journal {
    /// Begins a new one at `path`; whatever was there is gone.
    ///
    /// # Errors
    /// What the file system says.
    pub(super) fn create(path: &Path, subject: &Subject) -> io::Result<Self> {
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(true).mode(0o600).custom_flags(libc::O_NOFOLLOW);
        let file = options.open(path)?;
        let head = serde_json::to_vec(&Head { subject: subject.clone(), boot: boot() })?;
        let mut block = vec![b' '; BLOCK_BYTES];
        match block[..READY_AT as usize].get_mut(..head.len()) {
            Some(place) => place.copy_from_slice(&head),
            None => return Err(io::ErrorKind::InvalidInput.into()),
        }
        file.write_all_at(&block, 0)?;
        Ok(Self::over(file, subject, false, true))
    }

    /// Goes on with one that is about the same copy; none where there is no such journal.
    ///
    /// # Errors
    /// What the file system says.
    pub(super) fn resume(path: &Path, subject: &Subject) -> io::Result<Option<Self>> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK);
        let file = match options.open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let mut block = vec![0; BLOCK_BYTES];
        let Ok(()) = file.read_exact_at(&mut block, 0) else { return Ok(None) };
        let Ok(head) = serde_json::from_slice::<Head>(&block) else { return Ok(None) };
        if head.subject != *subject {
            return Ok(None);
        }
        let same_boot = head.boot == boot();
        // Without digests nothing tells which of the bytes an earlier boot brought to the disk.
        if !same_boot && subject.digests.is_none() {
            return Ok(None);
        }
        Ok(Some(Self::over(file, subject, true, same_boot)))
    }

    fn over(file: File, subject: &Subject, resumed: bool, same_boot: bool) -> Self {
        let (digests, chunk_bytes) = (subject.digests, subject.chunk_bytes);
        Self { file, digests, chunk_bytes, resumed, same_boot }
    }

    /// Notes that what records rely on is there: the tables of a new image.
    ///
    /// # Errors
    /// What the file system says.
    pub(super) fn set_ready(&self) -> io::Result<()> {
        // Behind JSON any space will do.
        self.file.write_all_at(b"\n", READY_AT)
    }

    /// Whether [`Self::set_ready`] was called.
    pub(super) fn is_ready(&self) -> bool {
        let mut byte = [0];
        self.file.read_exact_at(&mut byte, READY_AT).is_ok() && &byte == b"\n"
    }

    fn place(&self, offset: u64) -> u64 {
        let record = if self.digests.is_some() { DIGEST_RECORD_BYTES } else { 1 };
        BLOCK_BYTES as u64 + offset / self.chunk_bytes as u64 * record
    }

    /// Notes that the chunk at `offset` of the disk is done.
    ///
    /// # Errors
    /// What the file system says.
    pub(super) fn record(&self, offset: u64, done: Done, digest: Option<&Digest>) -> io::Result<()> {
        let mut record = [0; DIGEST_AT + size_of::<Digest>()];
        record[0] = match done {
            Done::No => 0,
            Done::Copied => 1,
            Done::Zeros => 2,
        };
        if let Some(digest) = digest {
            record[DIGEST_AT..].copy_from_slice(digest);
        }
        let length = if self.digests.is_some() { record.len() } else { 1 };
        self.file.write_all_at(&record[..length], self.place(offset))
    }

    /// What is known of the chunk at `offset` of the disk, and its digest where records hold one.
    ///
    /// # Errors
    /// What the file system says.
    pub(super) fn look(&self, offset: u64) -> io::Result<(Done, Option<Digest>)> {
        let mut record = [0; DIGEST_AT + size_of::<Digest>()];
        let length = if self.digests.is_some() { record.len() } else { 1 };
        match self.file.read_exact_at(&mut record[..length], self.place(offset)) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok((Done::No, None)),
            answer => answer?,
        }
        let done = match record[0] {
            1 => Done::Copied,
            2 => Done::Zeros,
            _ => Done::No,
        };
        let digest =
            record[DIGEST_AT..].try_into().ok().filter(|_| self.digests.is_some() && done != Done::No);
        Ok((done, digest))
    }
}

/// The kernel's name for the time since it was started.
fn boot() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn subject(digests: Option<Sum>) -> (tempfile::TempDir, Subject) {
        let folder = tempfile::tempdir().unwrap();
        let stamp = Stamp::of(&File::open(folder.path()).unwrap()).unwrap();
        (folder, Subject::new(stamp, 7, "raw".into(), 1 << 20, digests))
    }

    #[test]
    fn what_was_recorded_is_known_to_the_next_one() {
        for digests in [None, Some(Sum::Blake3), Some(Sum::Xxh3)] {
            let (folder, subject) = subject(digests);
            let path = folder.path().join("journal");
            let journal = Journal::create(&path, &subject).unwrap();
            journal.record(5 << 20, Done::Copied, digests.map(|_| &[9; 32])).unwrap();
            journal.record(70 << 20, Done::Zeros, digests.map(|_| &[8; 32])).unwrap();
            let next = Journal::resume(&path, &subject).unwrap().unwrap();
            assert!(next.same_boot && next.resumed);
            assert_eq!(next.look(5 << 20).unwrap(), (Done::Copied, digests.map(|_| [9; 32])));
            assert_eq!(next.look(70 << 20).unwrap(), (Done::Zeros, digests.map(|_| [8; 32])));
            for offset in [0, 6 << 20, 1 << 40] {
                assert_eq!(next.look(offset).unwrap(), (Done::No, None));
            }
        }
    }

    #[test]
    fn a_journal_about_another_copy_or_of_no_sense_is_not_taken() {
        let (folder, subject) = subject(Some(Sum::Blake3));
        let path = folder.path().join("journal");
        assert!(Journal::resume(&path, &subject).unwrap().is_none());
        Journal::create(&path, &subject).unwrap();
        for other in [
            Subject { target_inode: 8, ..subject.clone() },
            Subject { conversion: "qcow2".into(), ..subject.clone() },
            Subject { digests: None, ..subject.clone() },
            Subject { digests: Some(Sum::Xxh3), ..subject.clone() },
            Subject { version: VERSION + 1, ..subject.clone() },
        ] {
            assert!(Journal::resume(&path, &other).unwrap().is_none(), "{other:?}");
        }
        for text in [b"".to_vec(), b"{}".to_vec(), vec![0xff; BLOCK_BYTES]] {
            std::fs::write(&path, text).unwrap();
            assert!(Journal::resume(&path, &subject).unwrap().is_none());
        }
    }

    /// Its records must not be taken for sums of another kind.
    #[test]
    fn a_journal_of_an_older_version_is_not_taken() {
        for (digests, now, then) in [
            (Some(Sum::Blake3), r#""digests":"blake3""#, r#""digests":true"#),
            (Some(Sum::Xxh3), r#""digests":"xxh3""#, r#""digests":true"#),
            (None, r#""digests":null"#, r#""digests":false"#),
        ] {
            let (folder, subject) = subject(digests);
            let path = folder.path().join("journal");
            Journal::create(&path, &subject).unwrap();
            let text = String::from_utf8(std::fs::read(&path).unwrap()).unwrap();
            assert!(text.contains(now), "{text}");
            for version in [1, VERSION] {
                let old =
                    text.replace(r#""version":2"#, &format!(r#""version":{version}"#)).replace(now, then);
                std::fs::write(&path, format!("{old:4096}")).unwrap();
                assert!(Journal::resume(&path, &subject).unwrap().is_none(), "{old}");
            }
        }
    }

    #[test]
    fn another_boots_journal_counts_only_with_digests() {
        for digests in [None, Some(Sum::Blake3), Some(Sum::Xxh3)] {
            let (folder, subject) = subject(digests);
            let path = folder.path().join("journal");
            Journal::create(&path, &subject).unwrap();
            let text = String::from_utf8(std::fs::read(&path).unwrap()).unwrap();
            std::fs::write(&path, text.replace(&boot(), "00000000-0000-0000-0000-000000000000")).unwrap();
            let resumed = Journal::resume(&path, &subject).unwrap();
            assert_eq!(resumed.is_some_and(|journal| !journal.same_boot), digests.is_some());
        }
    }
}
