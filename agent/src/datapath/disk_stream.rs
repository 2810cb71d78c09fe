//! A disk from one host to another, for hosts without a shared pool: over TCP with TLS 1.3 and certificates on both
//! sides, on several connections, data only, each chunk with its sum. What the receiver has already, from an attempt
//! that broke or as an older copy of the disk, is not sent again.
//!
//! The sender opens each connection with one frame and a secret that the receiver was told. On the first, the receiver
//! answers with the sums of what it has, and which sums they are. Then chunks come on all connections in any order, and at
//! last, on the first, the digest of all sums, which both must agree on before the disk gets its name.

mod arriving;
pub mod command;
mod receive;
mod send;
mod socket;
mod wire;
pub mod worker;

pub use receive::{ReceiveOrder, ReceiveReport, Receiver};
pub use send::{SendOrder, SendReport, send};
#[cfg(fuzzing)]
pub(super) use wire::read_as_stream;

use super::copy::CopyError;
use godwit_protocol::frame::FrameError;
use godwit_protocol::quic::ChannelError;
use std::io;
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Application protocol of the connections.
pub const ALPN: &[u8] = b"godwit-disk/2";

/// TCP port of receivers where none is named.
pub const PORT: u16 = 8777;

/// Connections where nothing else is said.
pub const CONNECTIONS: usize = 4;

/// Most connections of one stream.
pub const MAX_CONNECTIONS: usize = 16;

/// The grid of chunks and of their digests, in bytes.
const CHUNK_BYTES: usize = super::digests::DIGEST_CHUNK_BYTES;

/// Largest disk in bytes: the digests of its chunks are 2 GiB.
const MAX_DISK_BYTES: u64 = 64 << 40;

/// A peer that is silent for this long in mid-stream is gone. A disk that hangs may take a while.
const PATIENCE: Duration = Duration::from_secs(60);

/// How long the beginning of a connection may take.
const OPEN_WITHIN: Duration = Duration::from_secs(10);

/// Chunks that wait between the two threads of a connection. Few, so that their memory is still in the CPU's cache when it
/// is used again.
const WAITING_CHUNKS: usize = 1;

/// Whether an end has two threads for its connection, one for the disk and one for the network: where a disk is waited for
/// and nothing else could go on meanwhile. Else a chunk stays with one thread, in its CPU's cache.
fn has_helper(connections: usize, waits_for_disk: bool) -> bool {
    connections <= 1 && waits_for_disk
}

/// A thread that panicked ends the stream; what it held is still read.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Why a disk did not arrive. What did is kept for the next attempt.
#[derive(Debug, thiserror::Error)]
pub enum DiskStreamError {
    /// The own certificate does not do.
    #[error("TLS cannot be set up with this host's certificate")]
    Identity(#[from] ChannelError),
    /// TLS itself.
    #[error("TLS with {peer} failed")]
    Tls {
        /// With whom.
        peer: SocketAddr,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A peer that speaks TLS and not this protocol.
    #[error(
        "the agent at {0} is of another version, whose disk streams differ: update the older one of the two"
    )]
    Version(SocketAddr),
    /// A name that no certificate can have.
    #[error("'{0}' is no name of a host's certificate")]
    Name(String),
    /// A socket.
    #[error("cannot {action} {address}")]
    Socket {
        /// `connect to`, `listen on`, …
        action: &'static str,
        /// Where.
        address: SocketAddr,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The connection broke.
    #[error("the connection broke")]
    Broken(#[source] io::Error),
    /// A message that does not read.
    #[error("the peer does not speak as it should")]
    Frame(#[from] FrameError),
    /// A chunk that cannot be.
    #[error("the peer sends what cannot be: {0}")]
    Nonsense(&'static str),
    /// The peer says no.
    #[error("the peer refuses the disk: {0}")]
    Refused(String),
    /// The peer failed.
    #[error("the peer failed: {0}")]
    Peer(String),
    /// Nobody came.
    #[error("no sender with the right token came within {} s", .0.as_secs())]
    Nobody(Duration),
    /// A chunk did not come as it was read.
    #[error("the chunk at byte {offset} of {path:?} is not what its sender read")]
    Spoiled {
        /// Which disk.
        path: PathBuf,
        /// Where the chunk begins.
        offset: u64,
    },
    /// A chunk of the source is not what its list of digests says.
    #[error("the chunk at byte {offset} of {path:?} does not have the digest that it should have")]
    Digest {
        /// Which disk.
        path: PathBuf,
        /// Where the chunk begins.
        offset: u64,
    },
    /// A file, at either end.
    #[error(transparent)]
    File(#[from] CopyError),
}

/// Small messages at once, big buffers, and a silent peer noticed.
fn prepare(socket: &TcpStream, patience: Duration) -> io::Result<()> {
    socket.set_nodelay(true)?;
    socket.set_read_timeout(Some(patience))?;
    socket.set_write_timeout(Some(patience))
}
