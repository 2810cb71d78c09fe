//! One pass over a source's data: what every loop shares, whether a ring or threads move the bytes. It hands out
//! chunks, looks at their bytes as they pass, and notes what is done.

use super::BLOCK_BYTES;
use super::buffer::{self, Buffer};
use super::chunks::{Chunk, Chunks, Origin, Part};
use super::digests::{Digest, Digests, ZeroDigests, digest};
use super::image::Image;
use super::journal::{Done, Journal};
use super::ordered::Ordered;
use super::pace::{Courtesy, LONGEST_WAIT, Limit};
use super::zeros::data_runs;
use std::fs::File;
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// What stops a transfer.
#[derive(Debug)]
pub(super) enum TransferError {
    /// The kernel gives no ring, thread or memory.
    Setup(io::Error),
    /// The source.
    Read(io::Error),
    /// The source ended before its size at the start.
    SourceShrank,
    /// The destination.
    Write(io::Error),
    /// The journal or the list of expected digests.
    Journal(io::Error),
    /// The chunk at this offset is not what it should be.
    Digest(u64),
}

/// How the files are read and written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Shape {
    /// The source is read past the page cache.
    pub(super) source_direct: bool,
    /// The destination is written past the page cache.
    pub(super) target_direct: bool,
    /// Most bytes of one request.
    pub(super) request_bytes: usize,
}

impl Shape {
    /// Length of an operation on `length` bytes: whole blocks in direct I/O. What a write puts beyond the disk's end
    /// is cut off at the end of the copy.
    pub(super) fn padded(direct: bool, length: usize) -> usize {
        if direct { length.next_multiple_of(BLOCK_BYTES) } else { length }
    }

    /// How much of `length` bytes counts as done, so that what follows stays aligned.
    pub(super) fn usable(direct: bool, length: usize) -> usize {
        if direct { length - length % BLOCK_BYTES } else { length }
    }
}

/// What is written of a chunk: a range of its bytes, and where it goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) at: usize,
    pub(super) length: usize,
    pub(super) target: u64,
}

/// A range of the disk that was data in the source and turned out to be zeros.
pub(super) type ZeroRange = (u64, u64);

/// What a pass has done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Counts {
    /// Bytes read.
    pub(super) read_bytes: u64,
    /// Bytes written.
    pub(super) written_bytes: u64,
    /// Bytes that an earlier attempt had brought over.
    pub(super) resumed_bytes: u64,
}

/// Takes the bytes done and in all.
pub(super) type Progress<'a> = &'a mut (dyn FnMut(u64, u64) + Send);

struct Walk {
    chunks: Chunks,
    position: u64,
    budget: Option<u64>,
    /// Nothing more is handed out for now: who waits need not.
    ended: bool,
}

struct Tally<'a> {
    counts: Counts,
    done_bytes: u64,
    progress: Progress<'a>,
    zeros: Vec<ZeroRange>,
}

/// What a pass may need beside the bytes; all of it is optional.
#[derive(Default)]
pub(super) struct Extras<'a> {
    /// Decodes what is not in the file as it is.
    pub(super) image: Option<&'a Image>,
    /// Where is noted what is done.
    pub(super) journal: Option<&'a Journal>,
    /// What the digests should be, and the size of the file that they are about.
    pub(super) expected: Option<(&'a Digests, u64)>,
    /// Makes digests of the whole.
    pub(super) ordered: Option<&'a Ordered>,
    /// Bytes a second.
    pub(super) limit: Option<u64>,
    /// Makes room for other work, with at most so many lanes.
    pub(super) courtesy: Option<usize>,
    /// Whether zeros within data are remembered: new images give their room back.
    pub(super) remember_zeros: bool,
    /// Whether the bytes are only looked at.
    pub(super) reads_only: bool,
}

/// Most ranges of zeros that are remembered; what is over only costs room in an image.
const MAX_ZERO_RANGES: usize = 1 << 18;

/// A pass. Loops share it.
pub(super) struct Pass<'a> {
    /// Read from.
    pub(super) source: &'a File,
    /// Written to.
    pub(super) target: &'a File,
    size_bytes: u64,
    extras: Extras<'a>,
    /// Where the journal holds digests.
    zero_digests: Option<ZeroDigests>,
    walk: Mutex<Walk>,
    tally: Mutex<Tally<'a>>,
    limit: Mutex<Option<Limit>>,
    courtesy: Option<Mutex<Courtesy>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<'a> Pass<'a> {
    /// Over `chunks` of a source of `size_bytes`, of which progress is told.
    pub(super) fn new(
        (source, target): (&'a File, &'a File),
        (chunks, size_bytes, chunk_bytes): (Chunks, u64, usize),
        extras: Extras<'a>,
        progress: Progress<'a>,
    ) -> Self {
        let limit = extras.limit.map(|bytes| Limit::new(bytes, Instant::now()));
        let courtesy = extras.courtesy.map(|most| Mutex::new(Courtesy::new(most)));
        let tally = Tally { counts: Counts::default(), done_bytes: 0, progress, zeros: Vec::new() };
        let sum = extras.journal.and_then(|journal| journal.digests);
        Self {
            source,
            target,
            size_bytes,
            zero_digests: sum.map(|sum| ZeroDigests::by(sum, chunk_bytes)),
            extras,
            walk: Mutex::new(Walk { chunks, position: 0, budget: None, ended: false }),
            tally: Mutex::new(tally),
            limit: Mutex::new(limit),
            courtesy,
        }
    }

    /// Lets only so many more bytes be handed out; none: all.
    pub(super) fn allow(&self, budget: Option<u64>) {
        let mut walk = lock(&self.walk);
        (walk.budget, walk.ended) = (budget, false);
    }

    /// What was done so far.
    pub(super) fn counts(&self) -> Counts {
        lock(&self.tally).counts
    }

    /// Where data turned out to be zeros.
    pub(super) fn zeros(&self) -> Vec<ZeroRange> {
        std::mem::take(&mut lock(&self.tally).zeros)
    }

    /// Whether a short read at the file's end is zeros: an image's last cluster may not be written out.
    pub(super) fn short_is_zeros(&self) -> bool {
        self.extras.image.is_some()
    }

    /// Size of the largest part of a disk that is at work at once, in bytes.
    pub(super) fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// How long lane `lane` should wait before it takes a chunk. Who waits is still alive, and says so.
    pub(super) fn wait(&self, lane: usize) -> Duration {
        if lock(&self.walk).ended {
            return Duration::ZERO;
        }
        let limited = lock(&self.limit).as_ref().map_or(Duration::ZERO, |limit| limit.wait(Instant::now()));
        let polite = match &self.courtesy {
            Some(courtesy) if lane >= lock(courtesy).lanes() => Duration::from_millis(20),
            _ => Duration::ZERO,
        };
        let wait = limited.max(polite).min(LONGEST_WAIT);
        if !wait.is_zero() {
            self.tell(0);
        }
        wait
    }

    /// The next chunk that is not done; none at the end or when the budget is used up.
    pub(super) fn next(&self) -> Result<Option<Chunk>, TransferError> {
        loop {
            let mut walk = lock(&self.walk);
            let chunk = match walk.budget {
                Some(0) => None,
                _ => walk.chunks.next().map_err(TransferError::Read)?,
            };
            let Some(chunk) = chunk else {
                walk.ended = true;
                return Ok(None);
            };
            let length = chunk.parts.iter().map(|part| part.length as u64).sum::<u64>();
            walk.budget = walk.budget.map(|budget| budget.saturating_sub(length));
            let hole = chunk.offset.saturating_sub(walk.position);
            walk.position = chunk.offset + chunk.length as u64;
            drop(walk);
            if self.is_done(&chunk)? {
                lock(&self.tally).counts.resumed_bytes += length;
                self.tell(hole + chunk.length as u64);
                continue;
            }
            if let Some(limit) = &mut *lock(&self.limit) {
                limit.take(length, Instant::now());
            }
            self.tell(hole);
            return Ok(Some(chunk));
        }
    }

    fn is_done(&self, chunk: &Chunk) -> Result<bool, TransferError> {
        let Some(journal) = self.extras.journal.filter(|journal| journal.resumed) else { return Ok(false) };
        let (done, digest) = journal.look(chunk.offset).map_err(TransferError::Journal)?;
        if done == Done::No || journal.same_boot {
            return Ok(done != Done::No);
        }
        // Another boot's record: the page cache it spoke of is gone.
        let (Some(noted), Some(sum)) = (digest, journal.digests) else { return Ok(false) };
        let mut bytes = Buffer::new(chunk.length);
        let read = buffer::read(self.target, &mut bytes, chunk.offset, chunk.length);
        Ok(read.is_ok() && sum.of(&bytes[..chunk.length]) == noted)
    }

    /// Looks at a chunk's bytes, of which its parts were read, and says what is to be written. `bytes` is a buffer
    /// whose first `chunk.length` bytes are the chunk; it goes on to a whole block.
    pub(super) fn inspect(
        &self,
        chunk: &Chunk,
        bytes: &mut [u8],
        runs: &mut Vec<Run>,
    ) -> Result<Verdict, TransferError> {
        let whole =
            self.zero_digests.is_some() || self.extras.expected.is_some() || self.extras.ordered.is_some();
        if whole {
            fill_gaps(chunk, bytes);
        }
        // What is padded to a whole block must not carry over from the chunk before.
        let padded = chunk.length.next_multiple_of(BLOCK_BYTES).min(bytes.len());
        bytes[chunk.length..padded].fill(0);
        self.check(chunk, &bytes[..chunk.length])?;
        let mut verdict = Verdict::default();
        self.find_runs(chunk, bytes, runs);
        verdict.digest = self.zero_digests.as_ref().map(|zeros| match runs.is_empty() {
            true => zeros.of(chunk.length),
            false => zeros.sum.of(&bytes[..chunk.length]),
        });
        verdict.zeros = runs.is_empty();
        if self.extras.reads_only {
            runs.clear();
        }
        if let Some(ordered) = self.extras.ordered {
            ordered.pass(chunk.number, chunk.offset, &bytes[..chunk.length]);
        }
        Ok(verdict)
    }

    fn find_runs(&self, chunk: &Chunk, bytes: &[u8], runs: &mut Vec<Run>) {
        runs.clear();
        let mut ranges = Vec::new();
        for part in &chunk.parts {
            data_runs(&bytes[part.at..part.at + part.length], &mut ranges);
            let mut position = part.at;
            for &(start, end) in &ranges {
                self.note_zeros(chunk, position, part.at + start);
                position = part.at + end;
                runs.push(Run {
                    at: part.at + start,
                    length: end - start,
                    target: part.target + start as u64,
                });
            }
            self.note_zeros(chunk, position, part.at + part.length);
        }
    }

    fn note_zeros(&self, chunk: &Chunk, start: usize, end: usize) {
        if !self.extras.remember_zeros || start >= end {
            return;
        }
        let range = (chunk.offset + start as u64, chunk.offset + end as u64);
        let zeros = &mut lock(&self.tally).zeros;
        let room = zeros.len() < MAX_ZERO_RANGES;
        match zeros.last_mut() {
            Some(last) if last.1 == range.0 => last.1 = range.1,
            _ if room => zeros.push(range),
            _ => {}
        }
    }

    /// Compares with the digest that is known. The disk may be larger than the file that it is about.
    fn check(&self, chunk: &Chunk, bytes: &[u8]) -> Result<(), TransferError> {
        let Some((expected, file_bytes)) = self.extras.expected else { return Ok(()) };
        let grid = expected.head.chunk_bytes;
        for (step, piece) in bytes.chunks(grid).enumerate() {
            let offset = chunk.offset + (step * grid) as u64;
            let length = file_bytes.saturating_sub(offset).min(piece.len() as u64) as usize;
            if length > 0 && expected.at(offset).map_err(TransferError::Journal)? != digest(&piece[..length])
            {
                return Err(TransferError::Digest(offset));
            }
        }
        Ok(())
    }

    /// A chunk was written.
    pub(super) fn done(
        &self,
        chunk: &Chunk,
        verdict: &Verdict,
        runs: &[Run],
        took: Duration,
    ) -> Result<(), TransferError> {
        if let Some(journal) = self.extras.journal {
            let done = if verdict.zeros { Done::Zeros } else { Done::Copied };
            journal.record(chunk.offset, done, verdict.digest.as_ref()).map_err(TransferError::Journal)?;
        }
        if let Some(courtesy) = &self.courtesy {
            lock(courtesy).observe(took);
        }
        let mut tally = lock(&self.tally);
        tally.counts.read_bytes += chunk.parts.iter().map(|part| part.length as u64).sum::<u64>();
        tally.counts.written_bytes += runs.iter().map(|run| run.length as u64).sum::<u64>();
        drop(tally);
        self.tell(chunk.length as u64);
        Ok(())
    }

    fn tell(&self, bytes: u64) {
        let mut tally = lock(&self.tally);
        tally.done_bytes = (tally.done_bytes + bytes).min(self.size_bytes);
        let done = tally.done_bytes;
        (tally.progress)(done, self.size_bytes);
    }

    /// Reads a part that only the image's own code can.
    pub(super) fn decode(&self, chunk: &Chunk, part: &Part, bytes: &mut [u8]) -> Result<(), TransferError> {
        debug_assert_eq!(part.origin, Origin::Image);
        match self.extras.image {
            Some(image) => image
                .read(&mut bytes[part.at..part.at + part.length], chunk.offset + part.at as u64)
                .map_err(TransferError::Read),
            None => Err(TransferError::Read(io::ErrorKind::Unsupported.into())),
        }
    }

    /// Lets those go who wait for their turn: the pass has failed.
    pub(super) fn stop(&self) {
        if let Some(ordered) = self.extras.ordered {
            ordered.stop();
        }
        let mut walk = lock(&self.walk);
        (walk.budget, walk.ended) = (Some(0), true);
    }
}

/// What became of a chunk's bytes.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Verdict {
    digest: Option<Digest>,
    zeros: bool,
}

/// Zeros where a chunk has no data.
fn fill_gaps(chunk: &Chunk, bytes: &mut [u8]) {
    let mut position = 0;
    for part in &chunk.parts {
        bytes[position..part.at].fill(0);
        position = part.at + part.length;
    }
    bytes[position..chunk.length].fill(0);
}
