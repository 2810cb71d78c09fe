//! What the connections carry: frames of JSON at the begin and the end, chunks between. Reading is bounded whatever
//! comes.

use super::{CHUNK_BYTES, DiskStreamError, MAX_CONNECTIONS, MAX_DISK_BYTES};
use crate::datapath::BLOCK_BYTES;
use crate::datapath::digests::{Digest, Sum};
use crate::datapath::journal::Stamp;
use godwit_protocol::frame::{self, HEADER_BYTES};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::io::{self, Read, Write};

/// Longest frame of JSON in bytes.
const MAX_FRAME_BYTES: usize = 16 << 10;

/// Most runs of data in one chunk: each is at least a block, with a block of zeros behind it.
const MAX_RUNS: usize = CHUNK_BYTES / BLOCK_BYTES;

/// Kind, number of runs, length, offset, digest.
const CHUNK_HEADER_BYTES: usize = 1 + 2 + 4 + 8 + size_of::<Digest>();

/// First frame of each connection, from the sender.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Open {
    /// The secret that the receiver was told.
    pub(super) token: String,
    /// Which connection of the stream; the first, 0, begins it.
    pub(super) connection: usize,
    /// How many there are.
    pub(super) connections: usize,
    /// The file that is sent.
    pub(super) source: Stamp,
}

impl Open {
    /// That it is about a disk that can be.
    ///
    /// # Errors
    /// [`DiskStreamError::Nonsense`].
    pub(super) fn check(&self) -> Result<(), DiskStreamError> {
        let connections = (1..=MAX_CONNECTIONS).contains(&self.connections);
        if !connections || self.connection >= self.connections {
            return Err(DiskStreamError::Nonsense("a number of connections"));
        }
        if self.source.size_bytes > MAX_DISK_BYTES {
            return Err(DiskStreamError::Nonsense("the size of the disk"));
        }
        Ok(())
    }
}

/// The receiver's answer.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Answer {
    /// Go on.
    Ready(Ready),
    /// No.
    Refused(String),
}

/// How to go on.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) struct Ready {
    /// Whether what the receiver has of each chunk follows; on the first connection only.
    pub(super) has: bool,
    /// What chunks are known by in this stream.
    pub(super) sum: Sum,
}

/// Last frame of the first connection, from the sender.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Finish {
    /// All was sent; the digest of all digests, in hexadecimal.
    Whole(String),
    /// It failed.
    Failed(String),
}

/// Last frame of all, from the receiver.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Outcome {
    /// The disk has its name.
    Published,
    /// It failed.
    Failed(String),
}

/// Writes a frame and sends it off.
pub(super) fn write_frame<T: Serialize>(to: &mut dyn Write, message: &T) -> Result<(), DiskStreamError> {
    let bytes = frame::encode(message)?;
    to.write_all(&bytes).and_then(|()| to.flush()).map_err(DiskStreamError::Broken)
}

/// Reads a frame.
pub(super) fn read_frame<T: DeserializeOwned>(from: &mut dyn Read) -> Result<T, DiskStreamError> {
    let mut header = [0; HEADER_BYTES];
    from.read_exact(&mut header).map_err(DiskStreamError::Broken)?;
    let length = frame::body_length(header)?;
    if length > MAX_FRAME_BYTES {
        return Err(frame::FrameError::TooLong(length).into());
    }
    let mut body = vec![0; length];
    from.read_exact(&mut body).map_err(DiskStreamError::Broken)?;
    Ok(frame::decode(&body)?)
}

/// What a receiver has of a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Has {
    /// Nothing.
    Nothing,
    /// This, in the disk that grows.
    Done(Digest),
    /// This, in an older copy.
    Older(Digest),
}

impl Has {
    /// Writes it.
    pub(super) fn write(self, to: &mut dyn Write) -> io::Result<()> {
        let (kind, digest) = match self {
            Self::Nothing => (0, [0; 32]),
            Self::Done(digest) => (1, digest),
            Self::Older(digest) => (2, digest),
        };
        to.write_all(&[kind])?;
        to.write_all(&digest)
    }

    /// Reads one.
    pub(super) fn read(from: &mut dyn Read) -> Result<Self, DiskStreamError> {
        let mut bytes = [0; 1 + size_of::<Digest>()];
        from.read_exact(&mut bytes).map_err(DiskStreamError::Broken)?;
        let [kind, digest @ ..] = bytes;
        match kind {
            0 => Ok(Self::Nothing),
            1 => Ok(Self::Done(digest)),
            2 => Ok(Self::Older(digest)),
            _ => Err(DiskStreamError::Nonsense("a list of chunks")),
        }
    }
}

/// What is said of a chunk; the bytes of its runs follow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Message {
    /// Its data in runs, as begin and length within the chunk; between them are zeros.
    Data { offset: u64, length: usize, digest: Digest, runs: Vec<(usize, usize)> },
    /// It is what the receiver's older copy has.
    Same { offset: u64, length: usize, digest: Digest },
    /// No more chunks on this connection.
    End,
}

impl Message {
    /// Its bytes.
    pub(super) fn encode(&self) -> Vec<u8> {
        let none: &[(usize, usize)] = &[];
        let (kind, offset, length, digest, runs) = match self {
            Self::End => (0_u8, 0, 0, &[0; 32], none),
            Self::Data { offset, length, digest, runs } => (1, *offset, *length, digest, &runs[..]),
            Self::Same { offset, length, digest } => (2, *offset, *length, digest, none),
        };
        let mut bytes = Vec::with_capacity(CHUNK_HEADER_BYTES + runs.len() * 8);
        bytes.push(kind);
        bytes.extend((runs.len() as u16).to_be_bytes());
        bytes.extend((length as u32).to_be_bytes());
        bytes.extend(offset.to_be_bytes());
        bytes.extend(digest);
        for (at, length) in runs {
            bytes.extend((*at as u32).to_be_bytes());
            bytes.extend((*length as u32).to_be_bytes());
        }
        bytes
    }

    /// Reads one about a disk of `size_bytes`.
    ///
    /// # Errors
    /// [`DiskStreamError::Broken`]; [`DiskStreamError::Nonsense`] for what lies outside of the disk or its chunk.
    pub(super) fn read(from: &mut dyn Read, size_bytes: u64) -> Result<Self, DiskStreamError> {
        let mut header = [0; CHUNK_HEADER_BYTES];
        from.read_exact(&mut header).map_err(DiskStreamError::Broken)?;
        let [kind, r0, r1, l0, l1, l2, l3, rest @ ..] = header;
        let count = usize::from(u16::from_be_bytes([r0, r1]));
        let length = u32::from_be_bytes([l0, l1, l2, l3]) as usize;
        let (offset, digest) = rest.split_at(size_of::<u64>());
        let offset = offset.try_into().map_or(u64::MAX, u64::from_be_bytes);
        let digest: Digest = digest.try_into().unwrap_or_default();
        if kind == 0 {
            return Ok(Self::End);
        }
        let wanted = size_bytes.checked_sub(offset).map_or(0, |rest| rest.min(CHUNK_BYTES as u64)) as usize;
        if length == 0 || length != wanted || !offset.is_multiple_of(CHUNK_BYTES as u64) {
            return Err(DiskStreamError::Nonsense("a chunk that is not on the grid"));
        }
        match kind {
            2 if count == 0 => Ok(Self::Same { offset, length, digest }),
            1 if count <= MAX_RUNS => {
                let mut runs = Vec::with_capacity(count);
                let mut position = 0;
                for _ in 0..count {
                    let mut run = [0; 8];
                    from.read_exact(&mut run).map_err(DiskStreamError::Broken)?;
                    let [a0, a1, a2, a3, n0, n1, n2, n3] = run;
                    let at = u32::from_be_bytes([a0, a1, a2, a3]) as usize;
                    let run = u32::from_be_bytes([n0, n1, n2, n3]) as usize;
                    let end = at.checked_add(run).filter(|end| *end <= length);
                    let whole = at.is_multiple_of(BLOCK_BYTES)
                        && (run.is_multiple_of(BLOCK_BYTES) || at + run == length);
                    let Some(end) = end.filter(|_| run > 0 && at >= position && whole) else {
                        return Err(DiskStreamError::Nonsense("a run outside of its chunk"));
                    };
                    runs.push((at, run));
                    position = end;
                }
                Ok(Self::Data { offset, length, digest, runs })
            }
            _ => Err(DiskStreamError::Nonsense("a message of no known kind")),
        }
    }
}

/// Reads what a sender could send until it ends or is wrong.
#[cfg(any(test, fuzzing))]
fn read_all(mut bytes: &[u8], size_bytes: u64) -> Result<usize, DiskStreamError> {
    let mut count = 0;
    loop {
        match Message::read(&mut bytes, size_bytes)? {
            Message::End => return Ok(count),
            Message::Data { runs, .. } => {
                let length: usize = runs.iter().map(|(_, length)| length).sum();
                bytes = bytes.get(length..).ok_or(DiskStreamError::Nonsense("too few bytes"))?;
            }
            Message::Same { .. } => {}
        }
        count += 1;
    }
}

/// Takes bytes for each thing that a peer may send.
#[cfg(any(test, fuzzing))]
pub(in crate::datapath) fn read_as_stream(bytes: &[u8]) {
    const SIZE_BYTES: u64 = (5 << 20) + 777;
    let _ = read_all(bytes, SIZE_BYTES);
    let _ = Has::read(&mut &bytes[..]);
    if let Ok(open) = read_frame::<Open>(&mut &bytes[..]) {
        let _ = open.check();
    }
    let _ = read_frame::<Answer>(&mut &bytes[..]);
    let _ = read_frame::<Finish>(&mut &bytes[..]);
    let _ = read_frame::<Outcome>(&mut &bytes[..]);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SIZE: u64 = (5 << 20) + 777;

    #[test]
    fn messages_read_as_they_were_written() {
        for message in [
            Message::Data {
                offset: 1 << 20,
                length: 1 << 20,
                digest: [3; 32],
                runs: vec![(0, 4096), (8192, 40_960)],
            },
            Message::Data { offset: 5 << 20, length: 777, digest: [4; 32], runs: vec![(0, 777)] },
            Message::Data { offset: 0, length: 1 << 20, digest: [4; 32], runs: vec![] },
            Message::Same { offset: 0, length: 1 << 20, digest: [5; 32] },
            Message::End,
        ] {
            assert_eq!(Message::read(&mut &message.encode()[..], SIZE).unwrap(), message);
        }
    }

    #[test]
    fn what_lies_outside_of_the_disk_or_its_chunk_is_refused() {
        let data = |offset, length, runs: &[(usize, usize)]| {
            let message = Message::Data { offset, length, digest: [0; 32], runs: runs.to_vec() };
            Message::read(&mut &message.encode()[..], SIZE)
        };
        for (offset, length, runs) in [
            (4096, 1 << 20, &[(0, 4096)][..]),
            (6 << 20, 1 << 20, &[]),
            (5 << 20, 1 << 20, &[]),
            (0, 0, &[]),
            (0, 1 << 20, &[(1 << 20, 4096)]),
            (0, 1 << 20, &[(4096, 8192), (8192, 4096)]),
            (0, 1 << 20, &[(100, 4096)]),
            (0, 1 << 20, &[(0, 100)]),
            (0, 1 << 20, &[(0, 0)]),
            (u64::MAX, 1 << 20, &[]),
        ] {
            assert!(
                matches!(data(offset, length, runs), Err(DiskStreamError::Nonsense(_))),
                "{offset} {runs:?}"
            );
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_reader_panic(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            read_as_stream(&bytes);
        }
    }
}
