//! The list of a file's digests, stored beside it as `NAME.blake3`: the coordinator makes one of each upload, agents make
//! and check them when they copy.
//!
//! The first line is JSON: `{"godwit_digests":1,"chunk_bytes":1048576,"size_bytes":…,"modified_ns":…,"root":"…"}`,
//! with `sha512` and `md5` of the whole where they were asked for. After its newline come the BLAKE3 digests of the
//! chunks, 32 bytes each, in order; the last chunk ends with the file, and a hole counts as the zeros it reads as.
//! `root` is the BLAKE3 digest of all of them, so that a damaged list is not believed.

use serde::{Deserialize, Serialize};
use std::io::{self, BufRead, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

/// Ending of the files.
pub const ENDING: &str = "blake3";

/// The grid of digests, in bytes.
pub const CHUNK_BYTES: usize = 1 << 20;

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

/// Digests of a whole file beside those of its chunks, in hexadecimal.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Whole {
    /// SHA-512.
    pub sha512: Option<String>,
    /// MD5.
    pub md5: Option<String>,
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

impl Head {
    /// Of a file of `size_bytes`, changed at `modified_ns`. The root is still unknown: zeros, as long as it will be.
    pub fn new(size_bytes: u64, modified_ns: i128, whole: &Whole) -> Self {
        Self {
            godwit_digests: 1,
            chunk_bytes: CHUNK_BYTES,
            size_bytes,
            modified_ns,
            root: "0".repeat(2 * size_of::<Digest>()),
            sha512: whole.sha512.clone(),
            md5: whole.md5.clone(),
        }
    }

    /// Reads a list, proves that it is whole, and leaves it at its first digest; none: it is damaged, or no list.
    ///
    /// # Errors
    /// What reading says.
    pub fn read(list: &mut (impl BufRead + Seek)) -> io::Result<Option<Self>> {
        let mut line = Vec::new();
        list.by_ref().take(MAX_HEAD_BYTES).read_until(b'\n', &mut line)?;
        let Some(head) = serde_json::from_slice(&line).ok().filter(Self::is_known) else { return Ok(None) };
        let first = line.len() as u64;
        let mut digests = blake3::Hasher::new();
        digests.update_reader(&mut *list)?;
        let count = head.size_bytes.div_ceil(head.chunk_bytes as u64);
        let whole = line.ends_with(b"\n")
            && digests.count() == count.saturating_mul(size_of::<Digest>() as u64)
            && digests.finalize().to_hex().as_str() == head.root;
        list.seek(SeekFrom::Start(first))?;
        Ok(whole.then_some(head))
    }

    /// Whether it is of this version, on this grid.
    pub fn is_known(&self) -> bool {
        self.godwit_digests == 1 && self.chunk_bytes == CHUNK_BYTES
    }

    /// Sets the root.
    pub fn set_root(&mut self, root: &blake3::Hash) {
        self.root = root.to_hex().to_string();
    }

    /// The first line, with its newline; as long before its root is known as after.
    ///
    /// # Errors
    /// None in practice: there is nothing in it that JSON cannot say.
    pub fn line(&self) -> serde_json::Result<Vec<u8>> {
        let mut line = serde_json::to_vec(self)?;
        line.push(b'\n');
        Ok(line)
    }
}

/// Makes the digests of bytes that come in pieces of any length.
#[derive(Clone, Debug, Default)]
pub struct Chunked {
    digests: Vec<Digest>,
    chunk: blake3::Hasher,
    filled: usize,
}

impl Chunked {
    /// Takes the next bytes.
    pub fn update(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let (now, rest) = bytes.split_at(bytes.len().min(CHUNK_BYTES - self.filled));
            self.chunk.update(now);
            self.filled += now.len();
            if self.filled == CHUNK_BYTES {
                self.close();
            }
            bytes = rest;
        }
    }

    fn close(&mut self) {
        self.digests.push(self.chunk.finalize().into());
        self.chunk.reset();
        self.filled = 0;
    }

    /// The whole list, about a file of `size_bytes` that was changed at `modified_ns`.
    ///
    /// # Errors
    /// As [`Head::line`].
    pub fn finish(
        mut self,
        size_bytes: u64,
        modified_ns: i128,
        whole: &Whole,
    ) -> serde_json::Result<Vec<u8>> {
        if self.filled > 0 {
            self.close();
        }
        let digests = self.digests.concat();
        let mut head = Head::new(size_bytes, modified_ns, whole);
        head.set_root(&blake3::hash(&digests));
        let mut list = head.line()?;
        list.extend_from_slice(&digests);
        Ok(list)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_of_any_length_have_the_digests_of_their_chunks() {
        let bytes: Vec<u8> = (0..(2 * CHUNK_BYTES + 5)).map(|index| (index / 7) as u8).collect();
        let whole = Whole { md5: Some("ab".into()), sha512: None };
        let list = |step: usize| {
            let mut chunked = Chunked::default();
            bytes.chunks(step).for_each(|piece| chunked.update(piece));
            chunked.finish(bytes.len() as u64, 7, &whole).unwrap()
        };
        let one = list(bytes.len());
        for step in [1 << 20, 999_983, 4096] {
            assert_eq!(list(step), one);
        }
        let end = one.iter().position(|&byte| byte == b'\n').unwrap() + 1;
        let head: Head = serde_json::from_slice(&one[..end]).unwrap();
        assert!(head.is_known() && head.line().unwrap() == one[..end]);
        assert_eq!(one[end..], bytes.chunks(CHUNK_BYTES).map(digest).collect::<Vec<_>>().concat());
        assert_eq!(head.root, blake3::hash(&one[end..]).to_hex().to_string());
    }

    #[test]
    fn of_nothing_there_is_a_list_of_none() {
        let list = Chunked::default().finish(0, 0, &Whole::default()).unwrap();
        assert!(list.ends_with(b"\n"));
    }
}
