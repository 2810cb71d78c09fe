//! Migration streams: between unix sockets on each host, TLS 1.3 with certificates on both sides between the hosts.
//!
//! They are pumped by tokio on one thread of their own, not by a worker process: docs/decisions says why. Nothing
//! here knows what the bytes mean, and nothing outside of `datapath/` knows how they travel.

use super::kernel::keep_freed_memory;
use godwit_protocol::frame::{self, HEADER_BYTES};
use godwit_protocol::quic::Identity;
use nix::sys::socket::{setsockopt, sockopt};
use prometheus::IntCounter;
use rustls_pki_types::ServerName;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf, copy_bidirectional_with_sizes};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::{Semaphore, watch};
use tokio::time::timeout;
use tokio_rustls::{TlsAcceptor, TlsConnector};

/// Application protocol of the streams.
pub const ALPN: &[u8] = b"godwit-stream/1";

/// How long the beginning of a stream may take: connection, handshake, opening, the socket behind it.
const OPEN_WITHIN: Duration = Duration::from_secs(10);

/// Bytes that wait in one direction of a stream; the pace is the slower side's.
const BUFFER_BYTES: usize = 256 << 10;

/// Streams from other hosts at once; a migration has two.
const MAX_STREAMS: usize = 64;

/// Longest opening or answer in bytes.
const MAX_OPENING_BYTES: usize = 4096;

/// A peer that acknowledges nothing for this long is gone, in milliseconds. TCP's own patience is a quarter of an
/// hour, in which a guest would be neither here nor there.
const PEER_TIMEOUT_MS: u32 = 10_000;

/// What a stream carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Channel {
    /// The source's libvirtd talks to the target's.
    Libvirt,
    /// QEMU's migration stream.
    Memory,
}

/// First frame of a stream, from the source.
#[derive(Debug, Serialize, Deserialize)]
struct Opening {
    token: String,
    channel: Channel,
}

/// The target's answer.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Opened {
    Ready,
    Refused(String),
}

/// The sockets of one migration, named alike on both hosts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sockets {
    /// To libvirtd.
    pub libvirt: PathBuf,
    /// To QEMU.
    pub memory: PathBuf,
}

/// Where a source's streams go.
#[derive(Clone, Debug)]
pub struct Destination {
    /// The target's address.
    pub address: SocketAddr,
    /// The name in its certificate.
    pub server_name: String,
    /// The secret it gave out.
    pub token: String,
}

/// Why streams cannot be carried.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// The own certificate does not do.
    #[error("TLS cannot be set up with this host's certificate")]
    Tls(#[from] godwit_protocol::quic::ChannelError),
    /// The name is none.
    #[error("'{0}' is no name of a host's certificate")]
    Name(String),
    /// A socket cannot be had.
    #[error("cannot {action} {place}")]
    Socket {
        /// `listen on`, `connect to`, …
        action: &'static str,
        /// Address or path.
        place: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The peer says no.
    #[error("the target refuses the stream: {0}")]
    Refused(String),
    /// The peer does not speak as it should.
    #[error("the stream's opening does not read")]
    Frame(#[from] frame::FrameError),
    /// It took too long.
    #[error("the peer does not answer")]
    Timeout,
}

fn socket_error<'a>(
    action: &'static str,
    place: impl ToString + 'a,
) -> impl FnOnce(io::Error) -> StreamError + 'a {
    move |source| StreamError::Socket { action, place: place.to_string(), source }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Ends its streams when it is dropped.
#[derive(Debug)]
pub struct Session {
    _alive: watch::Sender<()>,
    failure: Arc<Mutex<Option<String>>>,
}

impl Session {
    /// Why the first stream of this session that failed did so.
    pub fn failure(&self) -> Option<String> {
        lock(&self.failure).clone()
    }
}

/// What a target waits for.
#[derive(Clone)]
struct Awaited {
    sockets: Sockets,
    alive: watch::Receiver<()>,
}

type AwaitedByToken = Arc<Mutex<HashMap<String, Awaited>>>;

/// Bytes that streams carried, before encryption.
#[derive(Clone, Debug)]
pub struct Carried {
    /// To other hosts.
    pub sent: IntCounter,
    /// From other hosts.
    pub received: IntCounter,
}

/// Carries the streams of all migrations of this host.
pub struct Streams {
    runtime: Option<Runtime>,
    connector: TlsConnector,
    address: SocketAddr,
    awaited: AwaitedByToken,
    carried: Carried,
}

impl Drop for Streams {
    fn drop(&mut self) {
        // An ordinary drop would wait, which an async thread must not.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl Streams {
    /// Listens on `listen` for the streams of sources, and counts what they carry in `carried`.
    ///
    /// # Errors
    /// [`StreamError::Tls`], [`StreamError::Socket`] when the address is taken or not this host's.
    pub fn start(identity: &Identity, listen: SocketAddr, carried: Carried) -> Result<Self, StreamError> {
        let acceptor = TlsAcceptor::from(Arc::new(identity.tls_server(ALPN)?));
        let connector = TlsConnector::from(Arc::new(identity.tls_client(ALPN)?));
        keep_freed_memory();
        let runtime = Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("streams")
            .enable_io()
            .enable_time()
            .build()
            .map_err(socket_error("start a thread to listen on", listen))?;
        let listener =
            runtime.block_on(TcpListener::bind(listen)).map_err(socket_error("listen on", listen))?;
        let address = listener.local_addr().map_err(socket_error("listen on", listen))?;
        let awaited = AwaitedByToken::default();
        runtime.spawn(accept_all(listener, acceptor, awaited.clone(), carried.clone()));
        Ok(Self { runtime: Some(runtime), connector, address, awaited, carried })
    }

    /// Where sources connect to.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// On a target: lets streams with `token` through to `sockets`, until the session is dropped.
    pub fn await_streams(&self, token: String, sockets: Sockets) -> Session {
        let (alive, watched) = watch::channel(());
        let mut awaited = lock(&self.awaited);
        awaited.retain(|_, awaited| awaited.alive.has_changed().is_ok());
        awaited.insert(token, Awaited { sockets, alive: watched });
        Session { _alive: alive, failure: Arc::default() }
    }

    /// On a source: listens on `sockets` and carries what connects there to `destination`, until the session is
    /// dropped.
    ///
    /// # Errors
    /// [`StreamError::Name`], [`StreamError::Socket`].
    pub fn send_streams(&self, sockets: &Sockets, destination: Destination) -> Result<Session, StreamError> {
        let name = ServerName::try_from(destination.server_name.clone())
            .map_err(|_| StreamError::Name(destination.server_name.clone()))?;
        let (alive, watched) = watch::channel(());
        let session = Session { _alive: alive, failure: Arc::default() };
        let Some(runtime) = &self.runtime else { return Ok(session) };
        let route = Arc::new(Route {
            connector: self.connector.clone(),
            name,
            destination,
            failure: session.failure.clone(),
            carried: self.carried.clone(),
        });
        let _context = runtime.enter();
        let listeners = [(Channel::Libvirt, &sockets.libvirt), (Channel::Memory, &sockets.memory)]
            .map(|(channel, path)| listen_unix(path).map(|listener| (channel, listener)));
        for listener in listeners {
            let (channel, listener) = listener?;
            runtime.spawn(send_all(listener, channel, route.clone(), watched.clone()));
        }
        Ok(session)
    }
}

fn listen_unix(path: &Path) -> Result<UnixListener, StreamError> {
    let place = path.display();
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(socket_error("replace", place)(error)),
        _ => UnixListener::bind(path).map_err(socket_error("listen on", place)),
    }
}

/// Completes when the session is dropped.
async fn ended(mut alive: watch::Receiver<()>) {
    while alive.changed().await.is_ok() {}
}

async fn accept_all(listener: TcpListener, acceptor: TlsAcceptor, awaited: AwaitedByToken, carried: Carried) {
    let room = Arc::new(Semaphore::new(MAX_STREAMS));
    loop {
        let Ok(permit) = room.clone().acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, peer)) => {
                let (acceptor, awaited, carried) = (acceptor.clone(), awaited.clone(), carried.clone());
                tokio::spawn(async move {
                    if let Err(error) = accept_one(stream, acceptor, &awaited, carried).await {
                        tracing::warn!(%peer, "a stream was not accepted: {}", godwit_protocol::error::chain(&error));
                    }
                    drop(permit);
                });
            }
            // Out of descriptors or memory: the listener itself is sound.
            Err(error) => {
                tracing::warn!("a stream was not accepted: {error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn accept_one(
    stream: TcpStream,
    acceptor: TlsAcceptor,
    awaited: &AwaitedByToken,
    carried: Carried,
) -> Result<(), StreamError> {
    let opening = async {
        prepare_tcp(&stream)?;
        let mut stream =
            acceptor.accept(stream).await.map_err(socket_error("agree on TLS with", "a source"))?;
        let opening: Opening = receive(&mut stream).await?;
        let awaited = lock(awaited).get(&opening.token).cloned();
        // The session of a known token may be over.
        let Some(awaited) = awaited.filter(|awaited| awaited.alive.has_changed().is_ok()) else {
            let reason = "no migration waits here for this token".to_owned();
            send(&mut stream, &Opened::Refused(reason.clone())).await?;
            return Err(StreamError::Refused(reason));
        };
        let path = match opening.channel {
            Channel::Libvirt => &awaited.sockets.libvirt,
            Channel::Memory => &awaited.sockets.memory,
        };
        match UnixStream::connect(path).await {
            Ok(local) => {
                send(&mut stream, &Opened::Ready).await?;
                Ok((stream, local, awaited.alive))
            }
            Err(error) => {
                let reason = format!("nothing listens on {}: {error}", path.display());
                send(&mut stream, &Opened::Refused(reason)).await?;
                Err(socket_error("connect to", path.display())(error))
            }
        }
    };
    let (stream, local, alive) = timeout(OPEN_WITHIN, opening).await.map_err(|_| StreamError::Timeout)??;
    let local = Counted { stream: local, carried };
    pump(stream, local, alive).await.map_err(socket_error("go on between", "a source and this host"))
}

/// What all streams of a source have in common.
struct Route {
    connector: TlsConnector,
    name: ServerName<'static>,
    destination: Destination,
    failure: Arc<Mutex<Option<String>>>,
    carried: Carried,
}

async fn send_all(listener: UnixListener, channel: Channel, route: Arc<Route>, alive: watch::Receiver<()>) {
    loop {
        let local = tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((local, _)) => local,
                Err(_) => return,
            },
            () = ended(alive.clone()) => return,
        };
        let (route, alive) = (route.clone(), alive.clone());
        tokio::spawn(async move {
            match timeout(OPEN_WITHIN, route.open(channel)).await.unwrap_or(Err(StreamError::Timeout)) {
                Ok(stream) => {
                    let local = Counted { stream: local, carried: route.carried.clone() };
                    if let Err(error) = pump(stream, local, alive).await {
                        route.fail(channel, &format!("the stream broke: {error}"));
                    }
                }
                Err(error) => {
                    route.fail(channel, &format!("no stream: {}", godwit_protocol::error::chain(&error)));
                }
            }
        });
    }
}

impl Route {
    /// The first failure is kept: the others follow from it.
    fn fail(&self, channel: Channel, text: &str) {
        let address = self.destination.address;
        tracing::warn!(%address, ?channel, "{text}");
        lock(&self.failure).get_or_insert_with(|| format!("on the way to {address}, {text}"));
    }

    async fn open(
        &self,
        channel: Channel,
    ) -> Result<tokio_rustls::client::TlsStream<TcpStream>, StreamError> {
        let address = self.destination.address;
        let stream = TcpStream::connect(address).await.map_err(socket_error("connect to", address))?;
        prepare_tcp(&stream)?;
        let connected = self.connector.connect(self.name.clone(), stream).await;
        let mut stream = connected.map_err(socket_error("agree on TLS with", address))?;
        send(&mut stream, &Opening { token: self.destination.token.clone(), channel }).await?;
        match receive(&mut stream).await? {
            Opened::Ready => Ok(stream),
            Opened::Refused(reason) => Err(StreamError::Refused(reason)),
        }
    }
}

/// Small messages at once, and a dead peer noticed.
fn prepare_tcp(stream: &TcpStream) -> Result<(), StreamError> {
    let set = || -> io::Result<()> {
        stream.set_nodelay(true)?;
        setsockopt(stream, sockopt::TcpUserTimeout, &PEER_TIMEOUT_MS)?;
        setsockopt(stream, sockopt::KeepAlive, &true)?;
        setsockopt(stream, sockopt::TcpKeepIdle, &4)?;
        setsockopt(stream, sockopt::TcpKeepInterval, &2)?;
        setsockopt(stream, sockopt::TcpKeepCount, &3)?;
        Ok(())
    };
    set().map_err(socket_error("set up", "a TCP connection"))
}

/// Carries bytes both ways until both sides have ended, one breaks, or the session is over.
async fn pump<S>(mut stream: S, mut local: Counted, alive: watch::Receiver<()>) -> io::Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    tokio::select! {
        carried = copy_bidirectional_with_sizes(&mut stream, &mut local, BUFFER_BYTES, BUFFER_BYTES) => {
            carried.map(drop)
        }
        () = ended(alive) => Ok(()),
    }
}

/// This host's end of a stream: what is read from it is sent to the peer.
struct Counted {
    stream: UnixStream,
    carried: Carried,
}

impl AsyncRead for Counted {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let answer = Pin::new(&mut self.stream).poll_read(context, buffer);
        self.carried.sent.inc_by((buffer.filled().len() - before) as u64);
        answer
    }
}

impl AsyncWrite for Counted {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let answer = Pin::new(&mut self.stream).poll_write(context, bytes);
        if let Poll::Ready(Ok(written)) = answer {
            self.carried.received.inc_by(written as u64);
        }
        answer
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

async fn send<S: AsyncWrite + Unpin>(stream: &mut S, message: &impl Serialize) -> Result<(), StreamError> {
    let frame = frame::encode(message)?;
    let write = async {
        stream.write_all(&frame).await?;
        stream.flush().await
    };
    write.await.map_err(socket_error("write to", "the peer"))
}

async fn receive<S: AsyncRead + Unpin, T: DeserializeOwned>(stream: &mut S) -> Result<T, StreamError> {
    let mut header = [0; HEADER_BYTES];
    stream.read_exact(&mut header).await.map_err(socket_error("read from", "the peer"))?;
    let length = frame::body_length(header)?;
    if length > MAX_OPENING_BYTES {
        return Err(frame::FrameError::TooLong(length).into());
    }
    let mut body = vec![0; length];
    stream.read_exact(&mut body).await.map_err(socket_error("read from", "the peer"))?;
    Ok(frame::decode(&body)?)
}

#[cfg(test)]
pub(crate) mod tests;
