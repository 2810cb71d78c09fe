//! `GET /metrics`: what every module counts, as text. The scrape is the clock.

mod text;

pub use text::Text;

use crate::config::MetricsListen;
use futures_util::stream;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Bytes, Frame, Incoming};
use hyper::header::{ALLOW, CONTENT_TYPE};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{Counter, Gauge, IntGaugeVec, Opts, Registry, TextEncoder};
use std::fs;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::{JoinError, JoinHandle, spawn_blocking};

/// Scrapers that are served at once; more wait.
const MAX_CONNECTIONS: usize = 16;

/// Pieces of a text that wait for the scraper.
const MAX_PIECES: usize = 2;

/// For a scraper to send its request.
const PATIENCE: Duration = Duration::from_secs(5);

/// Why metrics cannot be served.
#[derive(Debug, thiserror::Error)]
#[error("cannot serve metrics on {listen}; set metrics_listen in agent.toml to what is free")]
pub struct ListenError {
    listen: MetricsListen,
    source: io::Error,
}

/// A module that writes its series itself: those that are too many for a registry's types.
pub trait Exposition: Send + Sync {
    /// Adds its series to a scrape, in Prometheus' text format. Their names are no other module's.
    fn write(&self, text: &mut Text<'_>);
}

/// All that a scrape asks.
#[derive(Clone)]
struct Sources {
    registry: Registry,
    texts: Vec<Arc<dyn Exposition>>,
}

impl Sources {
    /// What the registry has. Nothing else can fail as a whole.
    fn gather(&self) -> Result<String, prometheus::Error> {
        TextEncoder::new().encode_to_string(&self.registry.gather())
    }

    /// Sends that, and what modules write. A scraper that is gone takes no more.
    fn send(&self, gathered: &str, pieces: &mpsc::Sender<Bytes>) {
        let mut take = |piece: String| drop(pieces.blocking_send(piece.into()));
        let mut text = Text::new(&mut take);
        text.push(gathered);
        self.texts.iter().for_each(|source| source.write(&mut text));
    }
}

enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

/// The server of `/metrics`.
pub struct Metrics {
    listener: Listener,
    sources: Sources,
}

impl Metrics {
    /// Listens on `listen`; a socket file that nobody serves any more is replaced.
    ///
    /// # Errors
    /// When somebody else has the address or path.
    pub async fn bind(listen: &MetricsListen, registry: Registry) -> Result<Self, ListenError> {
        let listener = match listen {
            MetricsListen::Tcp(address) => TcpListener::bind(address).await.map(Listener::Tcp),
            MetricsListen::Unix(path) => bind_unix(path).map(Listener::Unix),
        };
        let listener = listener.map_err(|source| ListenError { listen: listen.clone(), source })?;
        Ok(Self { listener, sources: Sources { registry, texts: Vec::new() } })
    }

    /// The same, which serves what these write too.
    #[must_use]
    pub fn with(mut self, texts: Vec<Arc<dyn Exposition>>) -> Self {
        self.sources.texts.extend(texts);
        self
    }

    /// Serves for ever.
    pub async fn serve(self) {
        let permits = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        loop {
            // Never closed.
            let Ok(permit) = permits.clone().acquire_owned().await else { return };
            let sources = self.sources.clone();
            let accepted = match &self.listener {
                Listener::Tcp(listener) => listener.accept().await.map(|(stream, _)| {
                    tokio::spawn(async move { drop((serve_one(stream, sources).await, permit)) })
                }),
                Listener::Unix(listener) => listener.accept().await.map(|(stream, _)| {
                    tokio::spawn(async move { drop((serve_one(stream, sources).await, permit)) })
                }),
            };
            if let Err(error) = accepted {
                tracing::warn!("no scraper accepted: {error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

fn bind_unix(path: &Path) -> io::Result<UnixListener> {
    let left_behind = fs::symlink_metadata(path).is_ok_and(|m| m.file_type().is_socket())
        && std::os::unix::net::UnixStream::connect(path)
            .is_err_and(|e| e.kind() == io::ErrorKind::ConnectionRefused);
    if left_behind {
        fs::remove_file(path)?;
    }
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    UnixListener::bind(path)
}

async fn serve_one(stream: impl AsyncRead + AsyncWrite + Unpin, sources: Sources) {
    let service = service_fn(move |request| answer(request, sources.clone()));
    let served = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(PATIENCE)
        .serve_connection(TokioIo::new(stream), service)
        .await;
    if let Err(error) = served {
        tracing::debug!("a scraper was not served: {error}");
    }
}

/// The error is that of a module that has panicked: the answer is cut off, for the scraper to see that it is not whole.
type Body = UnsyncBoxBody<Bytes, JoinError>;

async fn answer(request: Request<Incoming>, sources: Sources) -> Result<Response<Body>, hyper::http::Error> {
    let respond = |status, body| {
        Response::builder()
            .status(status)
            .header(CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")
            .header(ALLOW, "GET")
            .body(body)
    };
    let plain = |status, text: String| {
        respond(status, Full::new(Bytes::from(text)).map_err(|never| match never {}).boxed_unsync())
    };
    if request.uri().path() != "/metrics" {
        return plain(StatusCode::NOT_FOUND, "there is only /metrics here\n".to_owned());
    }
    if request.method() != Method::GET {
        return plain(StatusCode::METHOD_NOT_ALLOWED, "only GET\n".to_owned());
    }
    // Collectors read kernel maps: not for a thread that heartbeats need.
    let of_registry = sources.clone();
    match spawn_blocking(move || of_registry.gather()).await {
        Ok(Ok(gathered)) => respond(StatusCode::OK, sending(sources, gathered)),
        Ok(Err(error)) => plain(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
        Err(error) => plain(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
    }
}

/// The text, as it is being written.
fn sending(sources: Sources, gathered: String) -> Body {
    let (sender, pieces) = mpsc::channel(MAX_PIECES);
    let writing = spawn_blocking(move || sources.send(&gathered, &sender));
    type Writing = Option<JoinHandle<()>>;
    let next = async |(mut pieces, writing): (mpsc::Receiver<Bytes>, Writing)| match pieces.recv().await {
        Some(piece) => Some((Ok(Frame::data(piece)), (pieces, writing))),
        None => writing?.await.err().map(|error| (Err(error), (pieces, None))),
    };
    StreamBody::new(stream::unfold((pieces, Some(writing)), next)).boxed_unsync()
}

/// What the agent itself is and costs.
pub struct Process {
    info: IntGaugeVec,
    memory: Gauge,
    cpu: Counter,
}

impl Process {
    /// Metrics of this process, an agent of `host`.
    ///
    /// # Errors
    /// Never, for these names are right.
    pub fn new(host: &str) -> Result<Self, prometheus::Error> {
        let info = IntGaugeVec::new(
            Opts::new("godwit_agent_info", "Always 1; the labels say which agent this is."),
            &["version", "host"],
        )?;
        info.with_label_values(&[env!("CARGO_PKG_VERSION"), host]).set(1);
        Ok(Self {
            info,
            memory: Gauge::new("process_resident_memory_bytes", "Resident memory of the agent, in bytes.")?,
            cpu: Counter::new("process_cpu_seconds_total", "CPU time of the agent, in seconds.")?,
        })
    }
}

impl Collector for Process {
    fn desc(&self) -> Vec<&Desc> {
        [self.info.desc(), self.memory.desc(), self.cpu.desc()].concat()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        if let Some(bytes) = resident_bytes() {
            self.memory.set(bytes);
        }
        if let Some(seconds) = cpu_seconds() {
            self.cpu.inc_by((seconds - self.cpu.get()).max(0.0));
        }
        [self.info.collect(), self.memory.collect(), self.cpu.collect()].concat()
    }
}

/// The second field of /proc/self/statm is in pages.
fn resident_bytes() -> Option<f64> {
    let statm = fs::read_to_string("/proc/self/statm").ok()?;
    let pages: f64 = statm.split(' ').nth(1)?.parse().ok()?;
    let page = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE).ok()??;
    Some(pages * page as f64)
}

fn cpu_seconds() -> Option<f64> {
    let usage = nix::sys::resource::getrusage(nix::sys::resource::UsageWho::RUSAGE_SELF).ok()?;
    let seconds = |t: nix::sys::time::TimeVal| t.tv_sec() as f64 + t.tv_usec() as f64 / 1e6;
    Some(seconds(usage.user_time()) + seconds(usage.system_time()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    async fn ask(mut stream: impl AsyncRead + AsyncWrite + Unpin, request: &str) -> String {
        stream
            .write_all(format!("{request} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").as_bytes())
            .await
            .unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).await.unwrap();
        text
    }

    fn registry() -> Registry {
        let registry = Registry::new();
        registry.register(Box::new(Process::new("h-1").unwrap())).unwrap();
        registry
    }

    #[tokio::test]
    async fn a_scrape_over_a_unix_socket_tells_what_the_agent_is_and_costs() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run/metrics.sock");
        // What an agent that was killed leaves behind is no obstacle.
        for _ in 0..2 {
            let metrics = Metrics::bind(&MetricsListen::Unix(path.clone()), registry()).await.unwrap();
            let serving = tokio::spawn(metrics.serve());
            let text = ask(tokio::net::UnixStream::connect(&path).await.unwrap(), "GET /metrics").await;
            assert!(text.starts_with("HTTP/1.1 200"), "{text}");
            let value = |name: &str| -> f64 {
                let line = text.lines().find(|l| l.starts_with(name)).unwrap();
                line.rsplit(' ').next().unwrap().parse().unwrap()
            };
            assert!(value("process_resident_memory_bytes") > 1e6);
            assert!(value("process_cpu_seconds_total") > 0.0);
            assert!(text.contains(r#"godwit_agent_info{host="h-1",version=""#), "{text}");
            serving.abort();
            let _ = serving.await;
        }
    }

    #[tokio::test]
    async fn only_get_and_only_metrics_is_served() {
        let any = MetricsListen::Tcp(([127, 0, 0, 1], 0).into());
        let metrics = Metrics::bind(&any, registry()).await.unwrap();
        let Listener::Tcp(listener) = &metrics.listener else { unreachable!() };
        let address = listener.local_addr().unwrap();
        let serving = tokio::spawn(metrics.serve());
        let stream = || tokio::net::TcpStream::connect(address);
        assert!(ask(stream().await.unwrap(), "GET /").await.starts_with("HTTP/1.1 404"));
        assert!(ask(stream().await.unwrap(), "POST /metrics").await.starts_with("HTTP/1.1 405"));
        serving.abort();
    }

    #[tokio::test]
    async fn a_socket_that_somebody_serves_is_not_taken() {
        let dir = tempfile::tempdir().unwrap();
        let listen = MetricsListen::Unix(dir.path().join("metrics.sock"));
        let _first = Metrics::bind(&listen, registry()).await.unwrap();
        let error = Metrics::bind(&listen, registry()).await.err().unwrap();
        assert!(error.to_string().contains("metrics.sock"), "{error}");
    }
}
