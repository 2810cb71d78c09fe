//! The receiver: says what it has, takes the rest, and gives the disk its name when both sides agree on all of it.

use super::socket::Socket;
use super::wire::{Answer, Finish, Has, Message, Open, Outcome, read_frame, write_frame};
use super::{ALPN, CHUNK_BYTES, DiskStreamError, MAX_CONNECTIONS, OPEN_WITHIN, PATIENCE, lock, prepare};
use crate::datapath::buffer::{Buffer, read};
use crate::datapath::copy::{Growing, io_error, journal, publish, set_direct};
use crate::datapath::digests::{Digests, Sum, Whole, ZeroDigests, digest};
use crate::datapath::journal::{Done, Journal, Subject};
use godwit_protocol::quic::Identity;
use rustls::client::verify_server_name;
use rustls::server::ParsedCertificate;
use rustls::{ServerConfig, ServerConnection, StreamOwned};
use rustls_pki_types::ServerName;
use serde::Serialize;
use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{BufWriter, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver as Queue, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Chunks of a connection that came and wait to be written.
const WRITE_BEHIND: usize = 3;

/// Connections that are being opened at once; who comes while there are so many is sent away.
const MAX_OPENING: usize = 4 * MAX_CONNECTIONS;

/// How often the end of waiting is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// What to receive.
#[derive(Clone, Debug)]
pub struct ReceiveOrder {
    /// The disk's name here. A regular file that has it is the older copy, and is replaced by the whole disk.
    pub destination: PathBuf,
    /// The secret that the sender must know.
    pub token: String,
    /// The name in the sender's certificate; none: any of the same CA.
    pub sender: Option<String>,
    /// How long to wait for a sender.
    pub wait: Duration,
    /// Fails where the destination is there.
    pub no_clobber: bool,
    /// Leaves the digests of the disk's chunks beside it.
    pub digests: bool,
    /// Makes the folder that the disk is to be in when a sender has come.
    pub make_folder: bool,
}

/// What was received.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ReceiveReport {
    /// Size of the disk in bytes.
    pub size_bytes: u64,
    /// Bytes that came and were written.
    pub received_bytes: u64,
    /// Bytes of chunks that an earlier attempt had brought.
    pub resumed_bytes: u64,
    /// Bytes of chunks that were taken from the older copy.
    pub same_bytes: u64,
    /// Digest of the digests, in hexadecimal.
    pub root: String,
}

type Tls = StreamOwned<ServerConnection, Socket>;

/// Waits for senders.
pub struct Receiver {
    listener: TcpListener,
    address: SocketAddr,
    config: Arc<ServerConfig>,
}

/// A connection with the right token, before it is answered.
type Opened = (Tls, Open);

impl Receiver {
    /// Listens on `listen`.
    ///
    /// # Errors
    /// [`DiskStreamError::Identity`], [`DiskStreamError::Socket`].
    pub fn bind(identity: &Identity, listen: SocketAddr) -> Result<Self, DiskStreamError> {
        let failed = |source| DiskStreamError::Socket { action: "listen on", address: listen, source };
        let listener = TcpListener::bind(listen).map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        Ok(Self { listener, address, config: Arc::new(identity.tls_server(ALPN)?) })
    }

    /// Where senders connect to.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Receives one disk; `progress` is told the bytes that came, and the disk's size.
    ///
    /// # Errors
    /// [`DiskStreamError`]. What came is kept for the next attempt.
    pub fn receive(
        &self,
        order: &ReceiveOrder,
        progress: &(dyn Fn(u64, u64) + Sync),
    ) -> Result<ReceiveReport, DiskStreamError> {
        let over = AtomicBool::new(false);
        let opening = Mutex::new(HashMap::<SocketAddr, TcpStream>::new());
        let (opened, queue) = sync_channel::<Opened>(MAX_CONNECTIONS);
        std::thread::scope(|scope| {
            let opening = &opening;
            let over = &over;
            scope.spawn(move || {
                while !over.load(Ordering::Acquire) {
                    let Ok((socket, peer)) = self.listener.accept() else {
                        std::thread::sleep(LOOK_EVERY);
                        continue;
                    };
                    let Ok(again) = socket.try_clone() else { continue };
                    if lock(opening).len() >= MAX_OPENING {
                        continue;
                    }
                    lock(opening).insert(peer, again);
                    let opened = opened.clone();
                    scope.spawn(move || {
                        match self.open(socket, peer, order) {
                            // Nobody waits any more: it is over.
                            Ok(stream) => drop(opened.try_send(stream)),
                            Err(error) => {
                                let why = godwit_protocol::error::chain(&error);
                                tracing::warn!(%peer, "a sender was sent away: {why}");
                            }
                        }
                        lock(opening).remove(&peer);
                    });
                }
                // Whoever is still being opened is let go.
                for socket in lock(opening).values() {
                    let _ = socket.shutdown(Shutdown::Both);
                }
            });
            let outcome = self.receive_from(&queue, order, progress);
            over.store(true, Ordering::Release);
            drop(queue);
            outcome
        })
    }

    /// Shakes hands, and looks at the token.
    fn open(
        &self,
        socket: TcpStream,
        peer: SocketAddr,
        order: &ReceiveOrder,
    ) -> Result<Opened, DiskStreamError> {
        let tls = |source| DiskStreamError::Tls { peer, source };
        let failed =
            |source| DiskStreamError::Socket { action: "set up the connection from", address: peer, source };
        socket.set_nonblocking(false).and_then(|()| prepare(&socket, OPEN_WITHIN)).map_err(failed)?;
        let session =
            ServerConnection::new(self.config.clone()).map_err(|error| tls(std::io::Error::other(error)))?;
        let mut stream = StreamOwned::new(session, Socket::new(socket));
        let deadline = Instant::now() + OPEN_WITHIN;
        while stream.conn.is_handshaking() {
            if Instant::now() > deadline {
                return Err(tls(std::io::ErrorKind::TimedOut.into()));
            }
            stream.conn.complete_io(&mut stream.sock).map_err(tls)?;
        }
        if let Some(sender) = &order.sender {
            check_name(&stream, sender)?;
        }
        let open: Open = read_frame(&mut stream)?;
        let refuse = |stream: &mut Tls, why: &str| {
            // It may have gone.
            let _ = write_frame(stream, &Answer::Refused(why.to_owned()));
            stream.conn.send_close_notify();
            let _ = stream.conn.complete_io(&mut stream.sock);
        };
        // Digests, so that how long it takes tells nothing of the token.
        if digest(open.token.as_bytes()) != digest(order.token.as_bytes()) {
            refuse(&mut stream, "no disk is awaited here with this token");
            return Err(DiskStreamError::Refused("a wrong token".to_owned()));
        }
        open.check().inspect_err(|error| refuse(&mut stream, &error.to_string()))?;
        prepare(stream.sock.stream(), PATIENCE).map_err(failed)?;
        Ok((stream, open))
    }

    fn receive_from(
        &self,
        queue: &Queue<Opened>,
        order: &ReceiveOrder,
        progress: &(dyn Fn(u64, u64) + Sync),
    ) -> Result<ReceiveReport, DiskStreamError> {
        let deadline = Instant::now() + order.wait;
        let (mut first, open) = loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match queue.recv_timeout(left) {
                Ok((stream, open)) if open.connection == 0 => break (stream, open),
                // Of a stream that is over.
                Ok((mut stream, _)) => {
                    let _ = write_frame(&mut stream, &Answer::Refused("the stream is over".to_owned()));
                }
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                    return Err(DiskStreamError::Nobody(order.wait));
                }
            }
        };
        let receiving = match Receiving::begin(order, &open, progress) {
            Ok(receiving) => receiving,
            Err(error) => {
                let _ = write_frame(&mut first, &Answer::Refused(godwit_protocol::error::chain(&error)));
                return Err(error);
            }
        };
        let outcome = receiving.run(&mut first, &open, queue);
        let told = match &outcome {
            Ok(_) => Outcome::Published,
            Err(error) => Outcome::Failed(godwit_protocol::error::chain(error)),
        };
        // The disk is there, or not, whether the sender hears of it or not.
        let _ = write_frame(&mut first, &told);
        first.conn.send_close_notify();
        let _ = first.conn.complete_io(&mut first.sock);
        outcome
    }
}

/// That the sender's certificate has that name.
fn check_name(stream: &Tls, sender: &str) -> Result<(), DiskStreamError> {
    let wrong = || DiskStreamError::Refused(format!("the sender is not {sender}"));
    let name = ServerName::try_from(sender).map_err(|_| DiskStreamError::Name(sender.to_owned()))?;
    let leaf = stream.conn.peer_certificates().and_then(|chain| chain.first()).ok_or_else(wrong)?;
    let leaf = ParsedCertificate::try_from(leaf).map_err(|_| wrong())?;
    verify_server_name(&leaf, &name).map_err(|_| wrong())
}

/// A chunk on its way from a connection to the disk.
enum Came {
    Data { offset: u64, length: usize, digest: [u8; 32], runs: Vec<(usize, usize)>, bytes: Buffer },
    Same { offset: u64, length: usize, digest: [u8; 32] },
}

/// A disk that comes in.
struct Receiving<'a> {
    order: &'a ReceiveOrder,
    size_bytes: u64,
    growing: Growing,
    journal: Journal,
    older: Option<Older>,
    direct: bool,
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

impl<'a> Receiving<'a> {
    fn begin(
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
        let subject =
            Subject::new(open.source, inode, "from another host".to_owned(), CHUNK_BYTES, Some(Sum::Blake3));
        let path = journal(&order.destination);
        let journal = match Journal::resume(&path, &subject).map_err(io_error("read", &path))? {
            Some(journal) => journal,
            None => {
                growing.resize(0)?;
                Journal::create(&path, &subject).map_err(io_error("write", &path))?
            }
        };
        growing.resize(size_bytes)?;
        let direct = size_bytes >= 16 << 20
            && set_direct(&growing.file, true)
            && read(&growing.file, &mut Buffer::new(1), 0, 1).is_ok();
        set_direct(&growing.file, direct);
        Ok(Self {
            older: Older::open(order),
            order,
            size_bytes,
            growing,
            journal,
            direct,
            received_bytes: AtomicU64::new(0),
            same_bytes: AtomicU64::new(0),
            resumed_bytes: AtomicU64::new(0),
            progress,
        })
    }

    /// Takes all that comes. Whatever stops it, what came stays for the next attempt.
    fn run(
        self,
        first: &mut Tls,
        open: &Open,
        queue: &Queue<Opened>,
    ) -> Result<ReceiveReport, DiskStreamError> {
        let outcome = self.take_all(first, open, queue).and_then(|()| self.settle(first));
        let report = match outcome {
            Ok(root) => ReceiveReport {
                size_bytes: self.size_bytes,
                received_bytes: self.received_bytes.into_inner(),
                resumed_bytes: self.resumed_bytes.into_inner(),
                same_bytes: self.same_bytes.into_inner(),
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

    fn take_all(&self, first: &mut Tls, open: &Open, queue: &Queue<Opened>) -> Result<(), DiskStreamError> {
        let zeros = ZeroDigests::new(CHUNK_BYTES);
        self.tell_what_is_here(first, &zeros)?;
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
            let accept = || -> Result<(), DiskStreamError> {
                for _ in 1..open.connections {
                    let (mut stream, _) = queue
                        .recv_timeout(OPEN_WITHIN)
                        .map_err(|_| DiskStreamError::Nonsense("too few connections"))?;
                    write_frame(&mut stream, &Answer::Ready { has: false })?;
                    let socket = stream.sock.stream().try_clone().map_err(DiskStreamError::Broken)?;
                    lock(&sockets).push(socket);
                    scope.spawn(move || note(self.take_lane(&mut stream)));
                }
                Ok(())
            };
            match accept() {
                Ok(()) => note(self.take_lane(first)),
                error => note(error),
            }
        });
        failure.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
    }

    /// Answers with what is here of each chunk.
    fn tell_what_is_here(&self, first: &mut Tls, zeros: &ZeroDigests) -> Result<(), DiskStreamError> {
        let has = self.journal.resumed || self.older.is_some();
        write_frame(first, &Answer::Ready { has })?;
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
                    older.has(list.as_ref(), offset, length, &mut buffer, zeros)
                }
                _ => done,
            };
            older.write(&mut writer).map_err(DiskStreamError::Broken)?;
        }
        writer.flush().map_err(DiskStreamError::Broken)
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
                && digest(&buffer[..length]) == noted);
        if !here {
            return Ok(Has::Nothing);
        }
        self.resumed_bytes.fetch_add(length as u64, Ordering::Relaxed);
        Ok(Has::Done(noted))
    }

    /// Reads on one thread what another writes.
    fn take_lane(&self, stream: &mut Tls) -> Result<(), DiskStreamError> {
        let (came, ready) = sync_channel::<Came>(WRITE_BEHIND);
        let (empty, used) = sync_channel::<Buffer>(WRITE_BEHIND + 2);
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
        loop {
            let next = match Message::read(stream, self.size_bytes)? {
                Message::End => return Ok(()),
                Message::Same { offset, length, digest } => Came::Same { offset, length, digest },
                Message::Data { offset, length, digest, runs } => {
                    let mut bytes = used.try_recv().unwrap_or_else(|_| Buffer::new(CHUNK_BYTES));
                    let mut position = 0;
                    for &(at, run) in &runs {
                        bytes[position..at].fill(0);
                        stream.read_exact(&mut bytes[at..at + run]).map_err(DiskStreamError::Broken)?;
                        position = at + run;
                    }
                    let padded = bytes.len();
                    bytes[position..padded].fill(0);
                    Came::Data { offset, length, digest, runs, bytes }
                }
            };
            if came.send(next).is_err() {
                // The writing side tells why.
                return Ok(());
            }
        }
    }

    fn write_all(&self, ready: &Queue<Came>, empty: &SyncSender<Buffer>) -> Result<(), DiskStreamError> {
        let mut older = Buffer::new(CHUNK_BYTES);
        while let Ok(came) = ready.recv() {
            match came {
                Came::Data { offset, length, digest, runs, bytes } => {
                    self.keep(offset, &bytes[..], length, digest, &runs)?;
                    let sent = runs.iter().map(|(_, length)| *length as u64).sum();
                    self.received_bytes.fetch_add(sent, Ordering::Relaxed);
                    // With nobody to take it, it goes.
                    let _ = empty.try_send(bytes);
                }
                Came::Same { offset, length, digest } => {
                    let Some(from) = &self.older else {
                        return Err(DiskStreamError::Nonsense("a chunk of an older copy that is not here"));
                    };
                    from.read(&mut older, offset, length)
                        .map_err(io_error("read", &self.order.destination))?;
                    let mut runs = Vec::new();
                    crate::datapath::zeros::data_runs(&older[..length], &mut runs);
                    let runs: Vec<_> = runs.into_iter().map(|(start, end)| (start, end - start)).collect();
                    self.keep(offset, &older, length, digest, &runs)?;
                    self.same_bytes.fetch_add(length as u64, Ordering::Relaxed);
                }
            }
            let done = self.received_bytes.load(Ordering::Relaxed) + self.same_bytes.load(Ordering::Relaxed);
            (self.progress)(done.min(self.size_bytes), self.size_bytes);
        }
        Ok(())
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
        if digest(&bytes[..length]) != wanted {
            return Err(DiskStreamError::Digest { path: self.order.destination.clone(), offset });
        }
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
        let zeros = ZeroDigests::new(CHUNK_BYTES);
        let mut hasher = blake3::Hasher::new();
        for offset in (0..self.size_bytes).step_by(CHUNK_BYTES) {
            let told = io_error("read the journal of", &self.order.destination);
            let (_, noted) = self.journal.look(offset).map_err(told)?;
            hasher.update(&noted.unwrap_or_else(|| zeros.of(self.length_at(offset))));
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
    fn read(&self, buffer: &mut Buffer, offset: u64, length: usize) -> std::io::Result<()> {
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
