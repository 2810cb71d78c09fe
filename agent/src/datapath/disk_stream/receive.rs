//! The receiver's door: lets senders in that show the right certificate and token, and gives the first of them its disk.

use super::arriving::Arriving;
use super::socket::Socket;
use super::wire::{Answer, Open, Outcome, read_frame, write_frame};
use super::{ALPN, DiskStreamError, MAX_CONNECTIONS, OPEN_WITHIN, PATIENCE, lock, prepare};
use crate::datapath::digests::{Sum, digest};
use godwit_protocol::quic::Identity;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustls::client::verify_server_name;
use rustls::server::ParsedCertificate;
use rustls::{ServerConfig, ServerConnection, StreamOwned};
use rustls_pki_types::ServerName;
use serde::Serialize;
use std::collections::HashMap;
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver as Queue, RecvTimeoutError, sync_channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Connections that are being opened at once; who comes while there are so many is sent away.
const MAX_OPENING: usize = 4 * MAX_CONNECTIONS;

/// How long after a connection that could not be taken the next one is tried.
const ACCEPT_AGAIN: Duration = Duration::from_millis(20);

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
    /// What the chunks were known by.
    pub sum: Sum,
    /// BLAKE3 digest of the sums, in hexadecimal; that of `NAME.blake3` where they are BLAKE3's.
    pub root: String,
}

pub(super) type Tls = StreamOwned<ServerConnection, Socket>;

/// Waits for senders.
pub struct Receiver {
    listener: TcpListener,
    address: SocketAddr,
    config: Arc<ServerConfig>,
}

/// A connection with the right token, before it is answered.
pub(super) type Opened = (Tls, Open);

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
        // Dropping the one ends the waiting on the other.
        let (until, over) = UnixStream::pair().map_err(|source| self.cannot_listen(source))?;
        let opening = Mutex::new(HashMap::<SocketAddr, TcpStream>::new());
        let (opened, queue) = sync_channel::<Opened>(MAX_CONNECTIONS);
        std::thread::scope(|scope| {
            let opening = &opening;
            scope.spawn(move || {
                while self.wait_for_peer(&over) {
                    let Ok((socket, peer)) = self.listener.accept() else {
                        // It is gone again, or this process has no descriptor left for it.
                        std::thread::sleep(ACCEPT_AGAIN);
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
            drop((until, queue));
            outcome
        })
    }

    /// Waits until somebody connects; false when it is over.
    fn wait_for_peer(&self, over: &UnixStream) -> bool {
        let mut awaited = [
            PollFd::new(self.listener.as_fd(), PollFlags::POLLIN),
            PollFd::new(over.as_fd(), PollFlags::POLLIN),
        ];
        match poll(&mut awaited, PollTimeout::NONE) {
            Ok(_) => !awaited[1].any().unwrap_or(true),
            Err(error) => error == Errno::EINTR,
        }
    }

    fn cannot_listen(&self, source: std::io::Error) -> DiskStreamError {
        DiskStreamError::Socket { action: "listen on", address: self.address, source }
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
        let arriving = match Arriving::begin(order, &open, progress) {
            Ok(arriving) => arriving,
            Err(error) => {
                let _ = write_frame(&mut first, &Answer::Refused(godwit_protocol::error::chain(&error)));
                return Err(error);
            }
        };
        let outcome = arriving.run(&mut first, queue);
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
