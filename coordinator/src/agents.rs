//! The QUIC server: one connection a host. Takes heartbeats and reports in, carries requests out.

use crate::app::{App, Shared};
use crate::reconcile;
use crate::renewal;
use godwit_protocol::error::{ErrorKind, RequestError};
use godwit_protocol::event::AgentNote;
use godwit_protocol::host::Heartbeat;
use godwit_protocol::id::HostId;
use godwit_protocol::operation::Progress;
use godwit_protocol::quic::{self, ChannelError, Identity, ends_at};
use godwit_protocol::request::{AgentMessage, AgentReply, AgentRequest, Hello, Welcome};
use godwit_protocol::{VERSION, frame};
use quinn::{Connection, Endpoint, TokioRuntime};
use rustls_pki_types::CertificateDer;
use sha2::{Digest, Sha256};
use std::collections::HashMap;
use std::net::{SocketAddr, UdpSocket};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::time::timeout;

/// A hello must come this fast.
const HELLO: Duration = Duration::from_secs(5);

/// Without a frame of an answer for this long, a request counts as unanswered. Agents send progress on long ones.
const SILENCE: Duration = Duration::from_secs(120);

/// Channels to the hosts.
pub struct Agents {
    channels: Mutex<HashMap<HostId, Channel>>,
    started: Instant,
}

/// A host's channel.
struct Channel {
    connection: Connection,
    /// When the newest certificate ends that the host has, in seconds since 1970.
    ends_at: i64,
}

impl Default for Agents {
    fn default() -> Self {
        Self { channels: Mutex::default(), started: Instant::now() }
    }
}

/// Why the server does not start.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The certificates.
    #[error("the agents' channel cannot use its certificate")]
    Identity(#[from] ChannelError),
    /// The address.
    #[error("cannot listen for agents on {address} (UDP)")]
    Listen {
        /// From coordinator.toml's `agents_listen`.
        address: SocketAddr,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
}

impl Agents {
    /// Asks a host for something.
    ///
    /// # Errors
    /// What the agent says, or [`ErrorKind::Unavailable`] when it is not connected or goes away meanwhile.
    pub async fn call(&self, host: HostId, request: AgentRequest) -> Result<AgentReply, RequestError> {
        self.call_with(host, request, |_| {}).await
    }

    /// Like [`Self::call`], with the progress that the agent tells.
    ///
    /// # Errors
    /// As [`Self::call`].
    pub async fn call_with(
        &self,
        host: HostId,
        request: AgentRequest,
        mut on_progress: impl FnMut(Progress),
    ) -> Result<AgentReply, RequestError> {
        let connection = self.channels().get(&host).map(|channel| channel.connection.clone());
        let connection = connection.ok_or_else(|| unavailable("its agent is not connected"))?;
        let (mut send, mut receive) =
            connection.open_bi().await.map_err(|_| unavailable("its agent went away"))?;
        quic::send(&mut send, &request).await.map_err(|_| unavailable("its agent went away"))?;
        let _ = send.finish();
        loop {
            match timeout(SILENCE, quic::receive(&mut receive)).await {
                Ok(Ok(AgentMessage::Progress(progress))) => on_progress(progress),
                Ok(Ok(AgentMessage::Finished(result))) => return result,
                Ok(Err(ChannelError::Frame(error))) => {
                    return Err(RequestError::new(
                        ErrorKind::Internal,
                        format!("its agent's answer: {error}"),
                    ));
                }
                Ok(Err(_)) => return Err(unavailable("its agent went away before it answered")),
                Err(_) => return Err(unavailable("its agent has said nothing for two minutes")),
            }
        }
    }

    /// For how long hosts have been able to find this process.
    pub fn age(&self) -> Duration {
        self.started.elapsed()
    }

    /// Whether a host's channel is open.
    pub fn is_connected(&self, host: HostId) -> bool {
        self.channels().contains_key(&host)
    }

    /// How many channels are open.
    pub fn connected(&self) -> usize {
        self.channels().len()
    }

    /// Closes a host's channel, for good when its record is gone.
    pub fn disconnect(&self, host: HostId) {
        if let Some(channel) = self.channels().remove(&host) {
            channel.connection.close(2_u32.into(), b"removed");
        }
    }

    /// Hosts whose certificates end before `time` (seconds since 1970), with what they showed.
    pub fn ending_before(&self, time: i64) -> Vec<(HostId, CertificateDer<'static>)> {
        let channels = self.channels();
        let ending = channels.iter().filter(|(_, channel)| channel.ends_at < time);
        ending.filter_map(|(host, channel)| Some((*host, certificate(&channel.connection)?))).collect()
    }

    /// That a host has a certificate that ends at `time`, in seconds since 1970.
    pub fn renewed(&self, host: HostId, time: i64) {
        if let Some(channel) = self.channels().get_mut(&host) {
            channel.ends_at = time;
        }
    }

    fn channels(&self) -> std::sync::MutexGuard<'_, HashMap<HostId, Channel>> {
        self.channels.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn unavailable(message: &str) -> RequestError {
    RequestError::new(ErrorKind::Unavailable, message)
}

/// Serves agents until the process ends, at the address that is returned: with port 0 in the configuration the kernel
/// chooses.
///
/// # Errors
/// [`ServeError`].
pub fn serve(app: &Shared, identity: &Identity) -> Result<SocketAddr, ServeError> {
    let address = app.config.agents_listen;
    let server = identity.quic_server()?;
    let (endpoint, bound) = UdpSocket::bind(address)
        .and_then(|socket| {
            Endpoint::new(identity.quic_endpoint(), Some(server), socket, Arc::new(TokioRuntime))
        })
        .and_then(|endpoint| endpoint.local_addr().map(|bound| (endpoint, bound)))
        .map_err(|source| ServeError::Listen { address, source })?;
    let app = app.clone();
    tokio::spawn(async move {
        while let Some(incoming) = endpoint.accept().await {
            let app = app.clone();
            tokio::spawn(async move {
                let peer = incoming.remote_address();
                match incoming.await {
                    Ok(connection) => {
                        if let Err(error) = converse(&app, connection).await {
                            tracing::info!(%peer, %error, "an agent's channel ended");
                        }
                    }
                    Err(error) => tracing::warn!(%peer, %error, "a connection for agents is refused"),
                }
            });
        }
    });
    Ok(bound)
}

/// A connection's life: hello, then signs of life and reports until it breaks.
async fn converse(app: &Shared, connection: Connection) -> Result<(), ChannelError> {
    let (mut send, mut receive) = connection.accept_bi().await?;
    let Ok(hello) = timeout(HELLO, quic::receive::<Hello>(&mut receive)).await else {
        connection.close(1_u32.into(), b"no hello");
        return Ok(());
    };
    let hello = hello?;
    let host = hello.host;
    let shown = certificate(&connection);
    if let Err(reason) = admit(app, &hello, shown.as_ref()) {
        tracing::warn!(%host, reason, "an agent is rejected");
        quic::send(&mut send, &Welcome::Rejected { reason: reason.into() }).await?;
        let _ = send.finish();
        let _ = timeout(HELLO, send.stopped()).await;
        connection.close(1_u32.into(), reason.as_bytes());
        return Ok(());
    }
    quic::send(&mut send, &Welcome::Accepted { version: VERSION, heartbeat_ms: app.config.heartbeat_ms })
        .await?;
    let _ = send.finish();
    let id = connection.stable_id();
    let ends_at = shown.as_ref().and_then(ends_at).unwrap_or(0);
    let channel = Channel { connection: connection.clone(), ends_at };
    if let Some(old) = app.agents.channels().insert(host, channel) {
        old.connection.close(0_u32.into(), b"replaced by a newer connection");
    }
    reconcile::seen(app, host, true);
    tracing::info!(%host, "an agent is connected");
    if let Some(shown) = shown.filter(|_| renewal::is_due(ends_at)) {
        let app = app.clone();
        tokio::spawn(async move { renewal::renew_host(&app, host, &shown).await });
    }
    let result = listen(app, host, &connection).await;
    let mut channels = app.agents.channels();
    if channels.get(&host).is_some_and(|channel| channel.connection.stable_id() == id) {
        channels.remove(&host);
        drop(channels);
        reconcile::gone(app, host);
    }
    result
}

/// The certificate must be the host's own, and the host must be known and speak our version.
fn admit(app: &App, hello: &Hello, shown: Option<&CertificateDer<'_>>) -> Result<(), &'static str> {
    let leaf = shown.ok_or("it shows no certificate")?;
    let digest = key_digest(leaf).ok_or("its certificate does not read")?;
    let known = app.ledger.read(|fleet| fleet.hosts.get(&hello.host).map(|h| h.key_digest.clone()));
    let known = known.ok_or("no such host: it was removed, or never joined; join it with a new token")?;
    if known != digest {
        return Err("its certificate belongs to another host");
    }
    if !hello.versions.contains(&VERSION) {
        return Err("it speaks no version of the channel that this coordinator knows");
    }
    Ok(())
}

/// What the other end has shown.
fn certificate(connection: &Connection) -> Option<CertificateDer<'static>> {
    let chain = connection.peer_identity()?.downcast::<Vec<CertificateDer<'static>>>().ok()?;
    chain.into_iter().next()
}

/// SHA-256 of a certificate's public key, hexadecimal.
pub fn key_digest(certificate: &CertificateDer<'_>) -> Option<String> {
    let (_, parsed) = x509_parser::parse_x509_certificate(certificate).ok()?;
    Some(hex::encode(Sha256::digest(parsed.public_key().raw)))
}

async fn listen(app: &Shared, host: HostId, connection: &Connection) -> Result<(), ChannelError> {
    loop {
        tokio::select! {
            datagram = connection.read_datagram() => {
                if let Ok(beat) = frame::decode::<Heartbeat>(&datagram?) && beat.host == host {
                    reconcile::heartbeat(app, &beat);
                }
            }
            stream = connection.accept_uni() => {
                let mut stream = stream?;
                match quic::receive(&mut stream).await? {
                    AgentNote::Report(report) if report.host == host => reconcile::report(app, *report).await,
                    AgentNote::Events(batch) if batch.host == host => app.events.take(batch),
                    AgentNote::Report(_) | AgentNote::Events(_) => {}
                }
            }
        }
    }
}
