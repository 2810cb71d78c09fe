//! A disk that comes in: says what of it is here, takes the rest, and gives it its name when both sides agree on all of it.

use super::receive::{Opened, ReceiveOrder, ReceiveReport, Tls};
use super::wire::{Answer, Finish, Has, Message, Open, Ready, read_frame, write_frame};
use super::{CHUNK_BYTES, DiskStreamError, OPEN_WITHIN, WAITING_CHUNKS, has_helper, lock};
use crate::datapath::buffer::{Buffer, read};
use crate::datapath::copy::{Growing, goes_direct, io_error, journal, publish, set_direct};
use crate::datapath::digests::{Digests, Sum, Whole, ZeroDigests, digest};
use crate::datapath::journal::{Done, Journal, Subject};
use crate::datapath::mounts::Mount;
use std::fs::{File, OpenOptions};
use std::io::{self, BufWriter, Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver as Queue, SyncSender, sync_channel};
use std::sync::{Mutex, PoisonError};

/// A chunk on its way from a connection to the disk.
enum Came {
    Data { offset: u64, length: usize, digest: [u8; 32], runs: Vec<(usize, usize)>, bytes: Buffer },
    Same { offset: u64, length: usize, digest: [u8; 32] },
}

/// A disk that comes in.
pub(super) struct Arriving<'a> {
    order: &'a ReceiveOrder,
    size_bytes: u64,
    growing: Growing,
    journal: Journal,
    /// What chunks are known by, and holes.
    zeros: ZeroDigests,
    older: Option<Older>,
    direct: bool,
    /// Writes through the page cache take turns: in the kernel they exclude each other, and who waits there spins.
    turn: Option<Mutex<()>>,
    /// How many connections the sender has.
    connections: usize,
    received_bytes: AtomicU64,
    same_bytes: AtomicU64,
    resumed_bytes: AtomicU64,
    progress: &'a (dyn Fn(u64, u64) + Sync),
}

/// The disk as it was.
struct Older {
    file: File,
    size_bytes: u64,
}

impl<'a> Arriving<'a> {
    /// Claims the disk's name, and finds what an earlier attempt left.
    ///
    /// # Errors
    /// [`DiskStreamError::File`].
    pub(super) fn begin(
        order: &'a ReceiveOrder,
        open: &Open,
        progress: &'a (dyn Fn(u64, u64) + Sync),
    ) -> Result<Self, DiskStreamError> {
        let size_bytes = open.source.size_bytes;
        if order.make_folder
            && let Some(folder) = order.destination.parent()
        {
            std::fs::create_dir_all(folder).map_err(io_error("create", folder))?;
        }
        let growing = Growing::claim(&order.destination, None, !order.no_clobber, 0o600)?;
        let inode = growing.file.metadata().map_err(io_error("look at", &growing.path))?.ino();
        let older = Older::open(order);
        let sum = sum_for(order, older.is_some());
        let subject =
            Subject::new(open.source, inode, "from another host".to_owned(), CHUNK_BYTES, Some(sum));
        let path = journal(&order.destination);
        let journal = match growing.noted(&subject)? {
            Some(journal) => journal,
            None => {
                growing.clear()?;
                Journal::create(&path, &subject).map_err(io_error("write", &path))?
            }
        };
        growing.resize(size_bytes)?;
        // A file system in memory takes the flag too, and writes through the page cache all the same.
        let in_memory = Mount::of(&growing.file).map_err(io_error("look at", &growing.path))?.is_memory();
        let direct = size_bytes >= 16 << 20 && !in_memory && goes_direct(&growing.file);
        Ok(Self {
            older,
            zeros: ZeroDigests::by(sum, CHUNK_BYTES),
            order,
            size_bytes,
            growing,
            journal,
            direct,
            turn: (!direct).then(Mutex::default),
            connections: open.connections,
            received_bytes: AtomicU64::new(0),
            same_bytes: AtomicU64::new(0),
            resumed_bytes: AtomicU64::new(0),
            progress,
        })
    }

    /// Takes all that comes. Whatever stops it, what came stays for the next attempt.
    ///
    /// # Errors
    /// [`DiskStreamError`].
    pub(super) fn run(
        self,
        first: &mut Tls,
        queue: &Queue<Opened>,
    ) -> Result<ReceiveReport, DiskStreamError> {
        let outcome = self.take_all(first, queue).and_then(|()| self.settle(first));
        let report = match outcome {
            Ok(root) => ReceiveReport {
                size_bytes: self.size_bytes,
                received_bytes: self.received_bytes.into_inner(),
                resumed_bytes: self.resumed_bytes.into_inner(),
                same_bytes: self.same_bytes.into_inner(),
                sum: self.zeros.sum,
                root,
            },
            Err(error) => {
                self.growing.keep();
                return Err(error);
            }
        };
        let list = self.order.digests.then_some(&self.journal);
        publish(&self.order.destination, self.growing, list, &Whole::default())?;
        Ok(report)
    }

    fn take_all(&self, first: &mut Tls, queue: &Queue<Opened>) -> Result<(), DiskStreamError> {
        self.tell_what_is_here(first)?;
        let failure = Mutex::new(None);
        let sockets = Mutex::new(vec![first.sock.stream().try_clone().map_err(DiskStreamError::Broken)?]);
        let note = |outcome: Result<(), DiskStreamError>| {
            let Err(error) = outcome else { return };
            lock(&failure).get_or_insert(error);
            // The others have nothing to wait for; the first goes on to be told why.
            for socket in lock(&sockets).iter() {
                let _ = socket.shutdown(Shutdown::Read);
            }
        };
        std::thread::scope(|scope| {
            let note = &note;
            scope.spawn(move || note(self.take_lane(first)));
            let accept = || -> Result<(), DiskStreamError> {
                for _ in 1..self.connections {
                    let (mut stream, _) = queue
                        .recv_timeout(OPEN_WITHIN)
                        .map_err(|_| DiskStreamError::Nonsense("too few connections"))?;
                    write_frame(&mut stream, &self.ready(false))?;
                    let socket = stream.sock.stream().try_clone().map_err(DiskStreamError::Broken)?;
                    lock(&sockets).push(socket);
                    // Who failed before that did not know of it.
                    if lock(&failure).is_some() {
                        break;
                    }
                    scope.spawn(move || note(self.take_lane(&mut stream)));
                }
                Ok(())
            };
            note(accept());
        });
        failure.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
    }

    /// Answers with what is here of each chunk.
    fn tell_what_is_here(&self, first: &mut Tls) -> Result<(), DiskStreamError> {
        let has = self.journal.resumed || self.older.is_some();
        write_frame(first, &self.ready(has))?;
        if !has {
            return Ok(());
        }
        let path = &self.order.destination;
        let list = self.older.as_ref().and_then(|older| Digests::of_file(path, &older.file));
        let mut buffer = Buffer::new(CHUNK_BYTES);
        let mut writer = BufWriter::with_capacity(64 << 10, &mut *first);
        for offset in (0..self.size_bytes).step_by(CHUNK_BYTES) {
            let length = self.length_at(offset);
            let done = self.done(offset, length, &mut buffer)?;
            let older = match &self.older {
                Some(older) if done == Has::Nothing => {
                    older.has(list.as_ref(), offset, length, &mut buffer, &self.zeros)
                }
                _ => done,
            };
            older.write(&mut writer).map_err(DiskStreamError::Broken)?;
        }
        writer.flush().map_err(DiskStreamError::Broken)
    }

    fn ready(&self, has: bool) -> Answer {
        Answer::Ready(Ready { has, sum: self.zeros.sum })
    }

    fn length_at(&self, offset: u64) -> usize {
        (self.size_bytes - offset).min(CHUNK_BYTES as u64) as usize
    }

    /// What an earlier attempt brought of a chunk.
    fn done(&self, offset: u64, length: usize, buffer: &mut Buffer) -> Result<Has, DiskStreamError> {
        if !self.journal.resumed {
            return Ok(Has::Nothing);
        }
        let told = io_error("read the journal of", &self.order.destination);
        let (Done::Copied | Done::Zeros, Some(noted)) = self.journal.look(offset).map_err(told)? else {
            return Ok(Has::Nothing);
        };
        // After another boot only the bytes themselves tell.
        let here = self.journal.same_boot
            || (read(&self.growing.file, buffer, offset, length).is_ok()
                && self.zeros.sum.of(&buffer[..length]) == noted);
        if !here {
            return Ok(Has::Nothing);
        }
        self.resumed_bytes.fetch_add(length as u64, Ordering::Relaxed);
        Ok(Has::Done(noted))
    }

    /// Takes and writes all that comes on a connection.
    fn take_lane(&self, stream: &mut Tls) -> Result<(), DiskStreamError> {
        if has_helper(self.connections, self.direct) {
            return self.take_lane_by_two(stream);
        }
        let (mut spare, mut older) = (None, Buffer::new(CHUNK_BYTES));
        while let Some(came) = self.next(stream, || spare.take())? {
            spare = self.put(came, &mut older)?.or(spare);
        }
        Ok(())
    }

    /// Reads on one thread what another writes.
    fn take_lane_by_two(&self, stream: &mut Tls) -> Result<(), DiskStreamError> {
        let (came, ready) = sync_channel::<Came>(WAITING_CHUNKS);
        let (empty, used) = sync_channel::<Buffer>(WAITING_CHUNKS + 2);
        std::thread::scope(|scope| {
            let writer = scope.spawn(move || self.write_all(&ready, &empty));
            let taken = self.take(stream, came, &used);
            let written =
                writer.join().unwrap_or_else(|_| Err(DiskStreamError::Nonsense("a writer that panicked")));
            // What broke the writing is the reason of what the taking saw.
            written.and(taken)
        })
    }

    fn take(
        &self,
        stream: &mut Tls,
        came: SyncSender<Came>,
        used: &Queue<Buffer>,
    ) -> Result<(), DiskStreamError> {
        while let Some(next) = self.next(stream, || used.try_recv().ok())? {
            if came.send(next).is_err() {
                // The writing side tells why.
                break;
            }
        }
        Ok(())
    }

    fn write_all(&self, ready: &Queue<Came>, empty: &SyncSender<Buffer>) -> Result<(), DiskStreamError> {
        let mut older = Buffer::new(CHUNK_BYTES);
        while let Ok(came) = ready.recv() {
            if let Some(bytes) = self.put(came, &mut older)? {
                // With nobody to take it, it goes.
                let _ = empty.try_send(bytes);
            }
        }
        Ok(())
    }

    /// What comes next on a connection, read into what `spare` gives; none at the end.
    fn next(
        &self,
        stream: &mut Tls,
        spare: impl FnOnce() -> Option<Buffer>,
    ) -> Result<Option<Came>, DiskStreamError> {
        Ok(match Message::read(stream, self.size_bytes)? {
            Message::End => None,
            Message::Same { offset, length, digest } => Some(Came::Same { offset, length, digest }),
            Message::Data { offset, length, digest, runs } => {
                let mut bytes = spare().unwrap_or_else(|| Buffer::new(CHUNK_BYTES));
                let mut position = 0;
                for &(at, run) in &runs {
                    bytes[position..at].fill(0);
                    stream.read_exact(&mut bytes[at..at + run]).map_err(DiskStreamError::Broken)?;
                    position = at + run;
                }
                let padded = bytes.len();
                bytes[position..padded].fill(0);
                Some(Came::Data { offset, length, digest, runs, bytes })
            }
        })
    }

    /// Brings what came to the disk, and gives back its buffer. `older`: room for a chunk of the older copy.
    fn put(&self, came: Came, older: &mut Buffer) -> Result<Option<Buffer>, DiskStreamError> {
        let spare = match came {
            Came::Data { offset, length, digest, runs, bytes } => {
                self.keep(offset, &bytes[..], length, digest, &runs)?;
                let sent = runs.iter().map(|(_, length)| *length as u64).sum();
                self.received_bytes.fetch_add(sent, Ordering::Relaxed);
                Some(bytes)
            }
            Came::Same { offset, length, digest } => {
                let Some(from) = &self.older else {
                    return Err(DiskStreamError::Nonsense("a chunk of an older copy that is not here"));
                };
                from.read(older, offset, length).map_err(io_error("read", &self.order.destination))?;
                let mut runs = Vec::new();
                crate::datapath::zeros::data_runs(&older[..length], &mut runs);
                let runs: Vec<_> = runs.into_iter().map(|(start, end)| (start, end - start)).collect();
                self.keep(offset, older, length, digest, &runs)?;
                self.same_bytes.fetch_add(length as u64, Ordering::Relaxed);
                None
            }
        };
        let done = self.received_bytes.load(Ordering::Relaxed) + self.same_bytes.load(Ordering::Relaxed);
        (self.progress)(done.min(self.size_bytes), self.size_bytes);
        Ok(spare)
    }

    /// Checks a chunk, writes it, and notes that it is done.
    fn keep(
        &self,
        offset: u64,
        bytes: &[u8],
        length: usize,
        wanted: [u8; 32],
        runs: &[(usize, usize)],
    ) -> Result<(), DiskStreamError> {
        if self.zeros.sum.of(&bytes[..length]) != wanted {
            return Err(DiskStreamError::Spoiled { path: self.order.destination.clone(), offset });
        }
        let turn = self.turn.as_ref().map(lock);
        for &(at, run) in runs {
            let padded = match self.direct {
                true => run.next_multiple_of(crate::datapath::BLOCK_BYTES),
                false => run,
            };
            self.growing
                .file
                .write_all_at(&bytes[at..at + padded], offset + at as u64)
                .map_err(io_error("write", &self.growing.path))?;
        }
        drop(turn);
        let done = if runs.is_empty() { Done::Zeros } else { Done::Copied };
        let told = io_error("keep the journal of", &self.order.destination);
        Ok(self.journal.record(offset, done, Some(&wanted)).map_err(told)?)
    }

    /// Hears that all was sent, and compares.
    fn settle(&self, first: &mut Tls) -> Result<String, DiskStreamError> {
        let theirs = match read_frame(first)? {
            Finish::Whole(root) => root,
            Finish::Failed(why) => return Err(DiskStreamError::Peer(why)),
        };
        let mut hasher = blake3::Hasher::new();
        for offset in (0..self.size_bytes).step_by(CHUNK_BYTES) {
            let told = io_error("read the journal of", &self.order.destination);
            let (_, noted) = self.journal.look(offset).map_err(told)?;
            hasher.update(&noted.unwrap_or_else(|| self.zeros.of(self.length_at(offset))));
        }
        let ours = hasher.finalize().to_hex().to_string();
        if ours != theirs {
            return Err(DiskStreamError::Nonsense(
                "the digest of the whole: some chunks are missing or wrong",
            ));
        }
        set_direct(&self.growing.file, false);
        self.growing.resize(self.size_bytes)?;
        self.growing.sync()?;
        Ok(ours)
    }
}

/// What the chunks are known by. TLS keeps out who means harm; what is left to be found is what memory and disks did to a
/// chunk on its way, and for that XXH3 does. A chunk that is not sent because the older copy has it, or that is checked
/// by its digest later, may be chosen by a guest: there it is BLAKE3.
fn sum_for(order: &ReceiveOrder, has_older: bool) -> Sum {
    if order.digests || has_older { Sum::Blake3 } else { Sum::Xxh3 }
}

impl Older {
    /// The regular file that has the disk's name, if there is one.
    fn open(order: &ReceiveOrder) -> Option<Self> {
        let mut options = OpenOptions::new();
        options.read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK);
        let file = options.open(&order.destination).ok()?;
        let metadata = file.metadata().ok().filter(std::fs::Metadata::is_file)?;
        Some(Self { file, size_bytes: metadata.len() })
    }

    /// Reads a chunk; what lies behind the older copy's end is zeros.
    fn read(&self, buffer: &mut Buffer, offset: u64, length: usize) -> io::Result<()> {
        let there = self.size_bytes.saturating_sub(offset).min(length as u64) as usize;
        buffer[..length].fill(0);
        if there > 0 { read(&self.file, buffer, offset, there) } else { Ok(()) }
    }

    fn has(
        &self,
        list: Option<&Digests>,
        offset: u64,
        length: usize,
        buffer: &mut Buffer,
        zeros: &ZeroDigests,
    ) -> Has {
        let whole = offset + length as u64 <= self.size_bytes && length == CHUNK_BYTES;
        let noted = list.filter(|_| whole).and_then(|list| list.at(offset).ok());
        let here =
            noted.or_else(|| self.read(buffer, offset, length).ok().map(|()| digest(&buffer[..length])));
        match here {
            // A hole costs nothing to have again.
            Some(digest) if digest != zeros.of(length) => Has::Older(digest),
            _ => Has::Nothing,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::datapath::journal::Stamp;
    use std::time::Duration;

    #[test]
    fn a_chunk_that_is_not_what_its_sum_says_is_not_written() {
        let folder = tempfile::tempdir().unwrap();
        let source = folder.path().join("source");
        std::fs::write(&source, vec![0; 2 * CHUNK_BYTES]).unwrap();
        let stamp = Stamp::of(&File::open(&source).unwrap()).unwrap();
        let open = Open { token: String::new(), connection: 0, connections: 1, source: stamp };
        for digests in [false, true] {
            let order = ReceiveOrder {
                destination: folder.path().join("destination"),
                token: String::new(),
                sender: None,
                wait: Duration::ZERO,
                no_clobber: false,
                digests,
                make_folder: false,
            };
            let arriving = Arriving::begin(&order, &open, &|_, _| {}).unwrap();
            let bytes = vec![7; CHUNK_BYTES];
            let runs = [(0, CHUNK_BYTES)];
            let wrong = arriving.zeros.sum.of(&[7; 9]);
            let kept = arriving.keep(CHUNK_BYTES as u64, &bytes, CHUNK_BYTES, wrong, &runs);
            assert!(
                matches!(kept, Err(DiskStreamError::Spoiled { offset, .. }) if offset == CHUNK_BYTES as u64)
            );
            assert_eq!(std::fs::read(&arriving.growing.path).unwrap(), vec![0; 2 * CHUNK_BYTES]);
            assert_eq!(arriving.journal.look(CHUNK_BYTES as u64).unwrap(), (Done::No, None));
            arriving.keep(0, &bytes, CHUNK_BYTES, arriving.zeros.sum.of(&bytes), &runs).unwrap();
            assert_eq!(std::fs::read(&arriving.growing.path).unwrap()[..CHUNK_BYTES], bytes);
        }
    }
}
