//! The sender: reads data, and sends what the receiver does not have.

use super::wire::{Answer, Finish, Has, Message, Open, Outcome, Ready, read_frame, write_frame};
use super::{
    ALPN, CHUNK_BYTES, DiskStreamError, MAX_CONNECTIONS, OPEN_WITHIN, PATIENCE, WAITING_CHUNKS, has_helper,
    lock,
};
use crate::datapath::buffer::Buffer;
use crate::datapath::chunks::{Chunk, Chunks, Extents};
use crate::datapath::copy::{CopyError, goes_direct, open_source};
use crate::datapath::digests::{Digest, Digests, Sum, ZeroDigests};
use crate::datapath::journal::Stamp;
use crate::datapath::kernel::cached_bytes;
use crate::datapath::pace::Limit;
use crate::datapath::zeros::data_runs;
use godwit_protocol::quic::Identity;
use rustls::{AlertDescription, ClientConfig, ClientConnection, StreamOwned};
use rustls_pki_types::ServerName;
use serde::Serialize;
use std::fs::File;
use std::io::{BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

/// Encrypted bytes that wait for the socket.
const TLS_BUFFER_BYTES: usize = 256 << 10;

/// What to send, and to whom.
#[derive(Clone, Debug)]
pub struct SendOrder {
    /// A regular file.
    pub source: PathBuf,
    /// The receiver's address.
    pub address: SocketAddr,
    /// The name in its certificate.
    pub server_name: String,
    /// The secret it was told.
    pub token: String,
    /// How many connections, 1 to [`MAX_CONNECTIONS`].
    pub connections: usize,
    /// Most bytes a second.
    pub bandwidth_bytes: Option<u64>,
}

/// What was sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct SendReport {
    /// Size of the disk in bytes.
    pub size_bytes: u64,
    /// Bytes that were sent, before encryption.
    pub sent_bytes: u64,
    /// Bytes that the receiver had from an attempt that broke.
    pub resumed_bytes: u64,
    /// Bytes that the receiver took from its older copy.
    pub same_bytes: u64,
}

type Tls = StreamOwned<ClientConnection, TcpStream>;

/// Sends a disk; `progress` is told the bytes of the disk that are done, and all.
///
/// # Errors
/// [`DiskStreamError`]. What arrived is kept by the receiver.
pub fn send(
    identity: &Identity,
    order: &SendOrder,
    progress: &mut (dyn FnMut(u64, u64) + Send),
) -> Result<SendReport, DiskStreamError> {
    let source = open_source(&order.source)?;
    let stamp = Stamp::of(&source).map_err(|error| order.io_error("look at", error))?;
    let connector = Connector::new(identity, order, stamp)?;
    let (mut first, ready) = connector.connect(0)?;
    let has = match ready.has {
        true => read_has(&mut first, stamp.size_bytes)?,
        false => Vec::new(),
    };
    let sending = Sending::new(order, &source, stamp, ready.sum, has, progress)?;
    let outcome = sending.run(&mut first, &connector);
    let outcome = outcome.and_then(|report| match Stamp::of(&source) {
        Ok(after) if after == stamp => Ok(report),
        _ => Err(CopyError::SourceChanged(order.source.clone()).into()),
    });
    finish(&mut first, outcome)
}

/// Tells the receiver how it went, and hears how it went there.
fn finish(
    first: &mut Tls,
    outcome: Result<(SendReport, String), DiskStreamError>,
) -> Result<SendReport, DiskStreamError> {
    match outcome {
        Ok((report, root)) => {
            write_frame(first, &Finish::Whole(root))?;
            match read_frame(first)? {
                Outcome::Published => Ok(report),
                Outcome::Failed(why) => Err(DiskStreamError::Peer(why)),
            }
        }
        Err(error) => {
            // The own error is the one to tell, unless the receiver broke the connection and said why.
            let _ = write_frame(first, &Finish::Failed(godwit_protocol::error::chain(&error)));
            match error {
                DiskStreamError::Broken(_) => match read_frame(first) {
                    Ok(Outcome::Failed(why)) => Err(DiskStreamError::Peer(why)),
                    _ => Err(error),
                },
                error => Err(error),
            }
        }
    }
}

impl SendOrder {
    fn io_error(&self, action: &'static str, source: std::io::Error) -> DiskStreamError {
        CopyError::Io { action, path: self.source.clone(), source }.into()
    }
}

fn read_has(first: &mut Tls, size_bytes: u64) -> Result<Vec<Has>, DiskStreamError> {
    let mut reader = BufReader::with_capacity(64 << 10, first);
    let count = size_bytes.div_ceil(CHUNK_BYTES as u64);
    // Nothing follows the list until we have sent something, so that the reader takes nothing that it should not.
    (0..count).map(|_| Has::read(&mut reader)).collect()
}

/// Opens connections of one stream.
struct Connector<'a> {
    order: &'a SendOrder,
    config: Arc<ClientConfig>,
    name: ServerName<'static>,
    connections: usize,
    stamp: Stamp,
}

impl<'a> Connector<'a> {
    fn new(identity: &Identity, order: &'a SendOrder, stamp: Stamp) -> Result<Self, DiskStreamError> {
        let name = ServerName::try_from(order.server_name.clone())
            .map_err(|_| DiskStreamError::Name(order.server_name.clone()))?;
        let connections = order.connections.clamp(1, MAX_CONNECTIONS);
        Ok(Self { order, config: Arc::new(identity.tls_client(ALPN)?), name, connections, stamp })
    }

    /// A connection, and how to go on with it.
    fn connect(&self, connection: usize) -> Result<(Tls, Ready), DiskStreamError> {
        let address = self.order.address;
        let failed = |action| move |source| DiskStreamError::Socket { action, address, source };
        let socket = TcpStream::connect_timeout(&address, OPEN_WITHIN).map_err(failed("connect to"))?;
        super::prepare(&socket, OPEN_WITHIN).map_err(failed("set up the connection to"))?;
        let tls = |source: std::io::Error| match source.get_ref().and_then(|error| error.downcast_ref()) {
            Some(rustls::Error::AlertReceived(AlertDescription::NoApplicationProtocol)) => {
                DiskStreamError::Version(address)
            }
            _ => DiskStreamError::Tls { peer: address, source },
        };
        let session = ClientConnection::new(self.config.clone(), self.name.clone());
        let mut stream =
            StreamOwned::new(session.map_err(|error| tls(std::io::Error::other(error)))?, socket);
        stream.conn.set_buffer_limit(Some(TLS_BUFFER_BYTES));
        while stream.conn.is_handshaking() {
            stream.conn.complete_io(&mut stream.sock).map_err(tls)?;
        }
        let open = Open {
            token: self.order.token.clone(),
            connection,
            connections: self.connections,
            source: self.stamp,
        };
        write_frame(&mut stream, &open)?;
        // The receiver may have to read its older copy first.
        super::prepare(&stream.sock, PATIENCE).map_err(failed("set up the connection to"))?;
        match read_frame(&mut stream)? {
            Answer::Ready(ready) => Ok((stream, ready)),
            Answer::Refused(why) => Err(DiskStreamError::Refused(why)),
        }
    }
}

/// A chunk on its way from the disk to a connection.
struct Loaded {
    message: Message,
    bytes: Option<Buffer>,
}

impl Loaded {
    /// Nothing more comes on this connection.
    const END: Self = Self { message: Message::End, bytes: None };
}

/// What all lanes share.
struct Sending<'a> {
    order: &'a SendOrder,
    source: &'a File,
    /// Whether the source is read past the page cache.
    direct: bool,
    size_bytes: u64,
    chunks: Mutex<Option<Chunks>>,
    sum: Sum,
    has: Vec<Has>,
    known: Option<Digests>,
    limit: Mutex<Option<Limit>>,
    tally: Mutex<Tally<'a>>,
}

struct Tally<'a> {
    report: SendReport,
    position: u64,
    digests: Vec<(u64, Digest)>,
    progress: &'a mut (dyn FnMut(u64, u64) + Send),
}

impl<'a> Sending<'a> {
    fn new(
        order: &'a SendOrder,
        source: &'a File,
        stamp: Stamp,
        sum: Sum,
        has: Vec<Has>,
        progress: &'a mut (dyn FnMut(u64, u64) + Send),
    ) -> Result<Self, DiskStreamError> {
        let size_bytes = stamp.size_bytes;
        let file = source.try_clone().map_err(|error| order.io_error("read", error))?;
        let extents = Extents::File { file, position: 0, size_bytes };
        let warm = cached_bytes(source).is_some_and(|cached| cached >= size_bytes / 4);
        let direct = !warm && goes_direct(source);
        let report = SendReport { size_bytes, ..SendReport::default() };
        Ok(Self {
            order,
            source,
            direct,
            size_bytes,
            chunks: Mutex::new(Some(Chunks::new(extents, None, size_bytes, CHUNK_BYTES))),
            sum,
            has,
            known: Digests::of_file(&order.source, source),
            limit: Mutex::new(order.bandwidth_bytes.map(|bytes| Limit::new(bytes, Instant::now()))),
            tally: Mutex::new(Tally { report, position: 0, digests: Vec::new(), progress }),
        })
    }

    /// Sends all, and the digest of all digests.
    fn run(
        &self,
        first: &mut Tls,
        connector: &Connector<'_>,
    ) -> Result<(SendReport, String), DiskStreamError> {
        let failure = Mutex::new(None);
        let note = |outcome: Result<(), DiskStreamError>| {
            if let Err(error) = outcome {
                lock(&self.chunks).take();
                lock(&failure).get_or_insert(error);
            }
        };
        std::thread::scope(|scope| {
            let note = &note;
            for connection in 1..connector.connections {
                scope.spawn(move || {
                    let lane = connector.connect(connection);
                    note(lane.and_then(|(mut lane, _)| self.run_lane(&mut lane)));
                });
            }
            note(self.run_lane(first));
        });
        if let Some(error) = failure.into_inner().unwrap_or_else(PoisonError::into_inner) {
            return Err(error);
        }
        let mut tally = lock(&self.tally);
        (tally.progress)(self.size_bytes, self.size_bytes);
        tally.digests.sort_unstable_by_key(|(offset, _)| *offset);
        Ok((tally.report, root_of(self.sum, self.size_bytes, &tally.digests)))
    }

    /// Sends what is left, and ends the connection's part of it, also after a failure: the receiver is told of that on
    /// the first connection, and not by a connection that breaks.
    fn run_lane(&self, stream: &mut Tls) -> Result<(), DiskStreamError> {
        match has_helper(self.order.connections, self.direct) {
            true => self.run_lane_of_two(stream),
            false => self.run_lane_alone(stream),
        }
    }

    fn run_lane_alone(&self, stream: &mut Tls) -> Result<(), DiskStreamError> {
        let mut spare = None;
        let outcome = loop {
            match self.next(|| spare.take()) {
                Ok(Some(loaded)) => spare = send_one(stream, loaded)?.or(spare),
                Ok(None) => break Ok(()),
                Err(error) => break Err(error),
            }
        };
        let ended = send_one(stream, Loaded::END);
        outcome.and(ended.map(drop))
    }

    /// Reads on one thread what another sends.
    fn run_lane_of_two(&self, stream: &mut Tls) -> Result<(), DiskStreamError> {
        let (loaded, ready) = sync_channel::<Loaded>(WAITING_CHUNKS);
        let (empty, used) = sync_channel::<Buffer>(WAITING_CHUNKS + 2);
        std::thread::scope(|scope| {
            let reader = scope.spawn(move || self.load_all(&loaded, &used));
            let sent = send_all(stream, &ready, &empty);
            drop((ready, empty));
            let read =
                reader.join().unwrap_or_else(|_| Err(DiskStreamError::Nonsense("a reader that panicked")));
            // What broke the reading is the reason of what the sending saw.
            read.and(sent)
        })
    }

    fn load_all(&self, loaded: &SyncSender<Loaded>, used: &Receiver<Buffer>) -> Result<(), DiskStreamError> {
        let outcome = loop {
            match self.next(|| used.try_recv().ok()) {
                Ok(Some(next)) => {
                    if loaded.send(next).is_err() {
                        // The sending side tells why.
                        return Ok(());
                    }
                }
                Ok(None) => break Ok(()),
                Err(error) => break Err(error),
            }
        };
        let _ = loaded.send(Loaded::END);
        outcome
    }

    /// The next chunk that the receiver does not have, read into what `spare` gives; none at the end.
    fn next(&self, mut spare: impl FnMut() -> Option<Buffer>) -> Result<Option<Loaded>, DiskStreamError> {
        loop {
            let wait = lock(&self.limit).as_ref().map(|limit| limit.wait(Instant::now()));
            std::thread::sleep(wait.unwrap_or_default());
            let chunk = match &mut *lock(&self.chunks) {
                Some(chunks) => chunks.next().map_err(|error| self.order.io_error("read", error))?,
                None => None,
            };
            let Some(chunk) = chunk else { return Ok(None) };
            if let Some(next) = self.load(&chunk, &mut spare)? {
                return Ok(Some(next));
            }
        }
    }

    /// A chunk as it goes out; none when the receiver has it.
    fn load(
        &self,
        chunk: &Chunk,
        spare: &mut impl FnMut() -> Option<Buffer>,
    ) -> Result<Option<Loaded>, DiskStreamError> {
        let (offset, length) = (chunk.offset, chunk.length);
        let has = self.has.get((offset / CHUNK_BYTES as u64) as usize).copied().unwrap_or(Has::Nothing);
        if let Has::Done(digest) = has {
            self.note(chunk, digest, |report| &mut report.resumed_bytes);
            return Ok(None);
        }
        let broken = |error| self.order.io_error("read", error);
        let known = self.known.as_ref().map(|known| known.at(offset)).transpose().map_err(broken)?;
        if let (Has::Older(theirs), Some(ours)) = (has, known)
            && theirs == ours
        {
            self.note(chunk, ours, |report| &mut report.same_bytes);
            return Ok(Some(Loaded { message: Message::Same { offset, length, digest: ours }, bytes: None }));
        }
        let mut bytes = spare().unwrap_or_else(|| Buffer::new(CHUNK_BYTES));
        let mut position = 0;
        for part in &chunk.parts {
            bytes[position..part.at].fill(0);
            position = part.at + part.length;
        }
        bytes[position..length].fill(0);
        self.read_parts(chunk, &mut bytes)?;
        let digest = self.sum.of(&bytes[..length]);
        let is_known = |known| match self.sum {
            Sum::Blake3 => known == digest,
            Sum::Xxh3 => known == Sum::Blake3.of(&bytes[..length]),
        };
        if known.is_some_and(|known| !is_known(known)) {
            return Err(DiskStreamError::Digest { path: self.order.source.clone(), offset });
        }
        if has == Has::Older(digest) {
            self.note(chunk, digest, |report| &mut report.same_bytes);
            return Ok(Some(Loaded { message: Message::Same { offset, length, digest }, bytes: None }));
        }
        let mut runs = Vec::new();
        data_runs(&bytes[..length], &mut runs);
        let runs: Vec<_> = runs.into_iter().map(|(start, end)| (start, end - start)).collect();
        let data = runs.iter().map(|(_, length)| *length as u64).sum::<u64>();
        if let Some(limit) = &mut *lock(&self.limit) {
            limit.take(data, Instant::now());
        }
        self.note(chunk, digest, |report| &mut report.sent_bytes);
        // Zeros within data were counted as sent, and are not.
        lock(&self.tally).report.sent_bytes -= length as u64 - data;
        Ok(Some(Loaded { message: Message::Data { offset, length, digest, runs }, bytes: Some(bytes) }))
    }

    fn read_parts(&self, chunk: &Chunk, bytes: &mut Buffer) -> Result<(), DiskStreamError> {
        use std::os::unix::fs::FileExt;
        for part in &chunk.parts {
            let end = (part.at + part.length).next_multiple_of(crate::datapath::BLOCK_BYTES);
            let mut filled = part.at;
            while filled < part.at + part.length {
                match self.source.read_at(&mut bytes[filled..end], chunk.offset + filled as u64) {
                    Ok(0) => return Err(CopyError::SourceChanged(self.order.source.clone()).into()),
                    Ok(read) => filled += read,
                    Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                    Err(error) => return Err(self.order.io_error("read", error)),
                }
            }
        }
        Ok(())
    }

    fn note(&self, chunk: &Chunk, digest: Digest, count: impl Fn(&mut SendReport) -> &mut u64) {
        let mut tally = lock(&self.tally);
        let tally = &mut *tally;
        *count(&mut tally.report) += chunk.length as u64;
        tally.digests.push((chunk.offset, digest));
        tally.position = tally.position.max(chunk.offset);
        (tally.progress)(tally.position, self.size_bytes);
    }
}

fn send_all(
    stream: &mut Tls,
    ready: &Receiver<Loaded>,
    empty: &SyncSender<Buffer>,
) -> Result<(), DiskStreamError> {
    while let Ok(loaded) = ready.recv() {
        if let Some(bytes) = send_one(stream, loaded)? {
            // With nobody to take it, it goes.
            let _ = empty.try_send(bytes);
        }
    }
    Ok(())
}

/// Sends a message, and gives back the buffer of what was sent.
fn send_one(stream: &mut Tls, Loaded { message, bytes }: Loaded) -> Result<Option<Buffer>, DiskStreamError> {
    let broken = DiskStreamError::Broken;
    stream.write_all(&message.encode()).map_err(broken)?;
    if let (Message::Data { runs, .. }, Some(bytes)) = (&message, &bytes) {
        for (at, length) in runs {
            stream.write_all(&bytes[*at..at + length]).map_err(broken)?;
        }
    }
    if message == Message::End {
        stream.flush().map_err(broken)?;
    }
    Ok(bytes)
}

/// Digest of the digests of a disk's chunks; those that are not in `digests`, which are in order, are zeros.
fn root_of(sum: Sum, size_bytes: u64, digests: &[(u64, Digest)]) -> String {
    let zeros = ZeroDigests::by(sum, CHUNK_BYTES);
    let mut hasher = blake3::Hasher::new();
    let mut known = digests.iter().peekable();
    for offset in (0..size_bytes).step_by(CHUNK_BYTES) {
        let length = (size_bytes - offset).min(CHUNK_BYTES as u64) as usize;
        match known.next_if(|(at, _)| *at == offset) {
            Some((_, digest)) => hasher.update(digest),
            None => hasher.update(&zeros.of(length)),
        };
    }
    hasher.finalize().to_hex().to_string()
}
