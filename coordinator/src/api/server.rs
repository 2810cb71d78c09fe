//! The listeners: TLS for users, and without TLS only for loopback and unix sockets.

use crate::api::context::Via;
use axum::Router;
use axum::body::Body;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use std::net::SocketAddr;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tower_service::Service;

/// A TLS handshake must be through this fast.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// A request's head must be there this fast; an idle connection is closed after as long.
const HEAD: Duration = Duration::from_secs(60);
/// Largest head of a request, in bytes.
const MAX_HEAD_BYTES: usize = 64 << 10;
/// Connections of one listener at the same time; more wait in the kernel's queue.
const MAX_CONNECTIONS: usize = 1024;
/// After a signal, requests that run may take this long.
const GRACE: Duration = Duration::from_secs(10);
/// Pause after an accept that failed, for example for want of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Why a listener does not start.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// The address is taken, or not this machine's.
    #[error("cannot listen on {address}")]
    Bind {
        /// As configured.
        address: String,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// Somebody listens on the unix socket.
    #[error("{0} is in use by a running process")]
    InUse(PathBuf),
    /// The setting is no address.
    #[error("{0:?} is no address: ADDR:PORT or unix:/path")]
    Address(String),
}

/// A socket that is listened on without TLS.
enum Plain {
    Tcp(TcpListener),
    Unix(UnixListener),
}

/// All listeners of the process.
#[derive(Default)]
pub struct Server {
    stop: CancellationToken,
    connections: TaskTracker,
    sockets: Vec<PathBuf>,
}

impl Server {
    /// Serves `router` with TLS as `config` says.
    ///
    /// # Errors
    /// [`ListenError`].
    pub async fn serve_tls(
        &self,
        router: Router,
        address: SocketAddr,
        config: rustls::ServerConfig,
    ) -> Result<(), ListenError> {
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let listener = bind(address).await?;
        let limit = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        let (stop, tracker) = (self.stop.clone(), self.connections.clone());
        self.connections.spawn(async move {
            while let Some((stream, permit)) = accept(&stop, &limit, || accept_tcp(&listener)).await {
                let (acceptor, router, stop) = (acceptor.clone(), router.clone(), stop.clone());
                tracker.spawn(async move {
                    if let Ok(Ok(stream)) = timeout(HANDSHAKE, acceptor.accept(stream)).await {
                        converse(stream, router, Via::Tls, stop).await;
                    }
                    drop(permit);
                });
            }
        });
        Ok(())
    }

    /// Serves `router` without TLS on `ADDR:PORT` or `unix:/path`.
    ///
    /// # Errors
    /// [`ListenError`].
    pub async fn serve_plain(&mut self, router: Router, address: &str) -> Result<(), ListenError> {
        let listener = match address.strip_prefix("unix:") {
            Some(path) => {
                let listener = bind_unix(Path::new(path)).await?;
                self.sockets.push(path.into());
                Plain::Unix(listener)
            }
            None => {
                let parsed = address.parse().map_err(|_| ListenError::Address(address.to_owned()))?;
                Plain::Tcp(bind(parsed).await?)
            }
        };
        let limit = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        let (stop, tracker) = (self.stop.clone(), self.connections.clone());
        self.connections.spawn(async move {
            match listener {
                Plain::Tcp(listener) => {
                    while let Some((stream, permit)) = accept(&stop, &limit, || accept_tcp(&listener)).await {
                        tracker.spawn(converse_holding(stream, router.clone(), stop.clone(), permit));
                    }
                }
                Plain::Unix(listener) => {
                    let next = || async { listener.accept().await.map(|(stream, _)| stream) };
                    while let Some((stream, permit)) = accept(&stop, &limit, next).await {
                        tracker.spawn(converse_holding(stream, router.clone(), stop.clone(), permit));
                    }
                }
            }
        });
        Ok(())
    }

    /// Takes no more connections, lets requests that run come to their end for a while, and removes the sockets.
    pub async fn stop(self) {
        self.stop.cancel();
        self.connections.close();
        if timeout(GRACE, self.connections.wait()).await.is_err() {
            tracing::warn!("requests still ran after {GRACE:?}; they are cut off");
        }
        for socket in self.sockets {
            let _ = std::fs::remove_file(socket);
        }
    }
}

async fn bind(address: SocketAddr) -> Result<TcpListener, ListenError> {
    let listener = TcpListener::bind(address).await;
    listener.map_err(|source| ListenError::Bind { address: address.to_string(), source })
}

/// A unix socket left by a process that was killed is replaced; one that somebody listens on is not.
async fn bind_unix(path: &Path) -> Result<UnixListener, ListenError> {
    if std::fs::symlink_metadata(path).is_ok_and(|meta| meta.file_type().is_socket()) {
        if UnixStream::connect(path).await.is_ok() {
            return Err(ListenError::InUse(path.to_owned()));
        }
        let _ = std::fs::remove_file(path);
    }
    UnixListener::bind(path)
        .map_err(|source| ListenError::Bind { address: format!("unix:{}", path.display()), source })
}

async fn accept_tcp(listener: &TcpListener) -> std::io::Result<TcpStream> {
    let (stream, _) = listener.accept().await?;
    // Answers are small and written whole; waiting for more to send would only delay them.
    let _ = stream.set_nodelay(true);
    Ok(stream)
}

/// The next connection with its place among those allowed; none when the server stops.
async fn accept<S, F: Future<Output = std::io::Result<S>>>(
    stop: &CancellationToken,
    limit: &Arc<Semaphore>,
    next: impl Fn() -> F,
) -> Option<(S, OwnedSemaphorePermit)> {
    let connection = async {
        let permit = limit.clone().acquire_owned().await.ok()?;
        loop {
            match next().await {
                Ok(stream) => return Some((stream, permit)),
                Err(error) => {
                    tracing::warn!(%error, "a connection could not be accepted");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    };
    tokio::select! {
        connection = connection => connection,
        () = stop.cancelled() => None,
    }
}

async fn converse_holding(
    stream: impl AsyncRead + AsyncWrite + Unpin,
    router: Router,
    stop: CancellationToken,
    permit: OwnedSemaphorePermit,
) {
    converse(stream, router, Via::Plain, stop).await;
    drop(permit);
}

/// A connection's life.
async fn converse(
    stream: impl AsyncRead + AsyncWrite + Unpin,
    router: Router,
    via: Via,
    stop: CancellationToken,
) {
    let service = service_fn(move |mut request: hyper::Request<Incoming>| {
        request.extensions_mut().insert(via);
        router.clone().call(request.map(Body::new))
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD)
        .max_buf_size(MAX_HEAD_BYTES)
        .serve_connection(TokioIo::new(stream), service);
    let mut connection = pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = stop.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "a connection broke");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::routing::get;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    async fn get_over(path: &Path) -> String {
        let mut stream = UnixStream::connect(path).await.unwrap();
        stream.write_all(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").await.unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).await.unwrap();
        text
    }

    #[tokio::test]
    async fn a_unix_socket_left_behind_is_replaced_but_a_live_one_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("api.sock");
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        let address = format!("unix:{}", path.display());
        let router = Router::new().route("/", get(|| async { "here" }));
        let mut server = Server::default();
        server.serve_plain(router.clone(), &address).await.unwrap();
        assert!(get_over(&path).await.ends_with("here"));
        let second = Server::default().serve_plain(router, &address).await;
        assert!(matches!(second, Err(ListenError::InUse(_))));
        server.stop().await;
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn a_request_that_runs_when_the_server_stops_is_still_answered() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("api.sock");
        let begun = Arc::new(tokio::sync::Notify::new());
        let release = Arc::new(tokio::sync::Notify::new());
        let (in_begun, in_release) = (begun.clone(), release.clone());
        let handler = move || async move {
            in_begun.notify_one();
            in_release.notified().await;
            "done"
        };
        let mut server = Server::default();
        let router = Router::new().route("/", get(handler));
        server.serve_plain(router, &format!("unix:{}", path.display())).await.unwrap();
        let asked = path.clone();
        let request = tokio::spawn(async move { get_over(&asked).await });
        begun.notified().await;
        let stop = tokio::spawn(server.stop());
        release.notify_one();
        assert!(request.await.unwrap().ends_with("done"));
        stop.await.unwrap();
    }

    #[tokio::test]
    async fn what_is_no_address_is_refused() {
        let listen = Server::default().serve_plain(Router::new(), "somewhere").await;
        assert!(matches!(listen, Err(ListenError::Address(_))));
    }
}
