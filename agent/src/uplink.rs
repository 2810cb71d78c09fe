//! The connection to the coordinator: hello, heartbeats, reports, and requests with their answers.
//!
//! It keeps nothing that a broken connection could lose: reports are whole, and requests go on in [`Calls`].

use crate::calls::{CallState, Calls};
use crate::events::Events;
use crate::report::Reporter;
use godwit_protocol::VERSION;
use godwit_protocol::error::{ErrorKind, RequestError, chain};
use godwit_protocol::event::{AgentNote, EventBatch};
use godwit_protocol::id::HostId;
use godwit_protocol::operation::Progress;
use godwit_protocol::quic::{COORDINATOR_NAME, ChannelError, Identity, receive, send};
use godwit_protocol::request::{AgentMessage, AgentRequest, Hello, Welcome};
use prometheus::{IntCounter, IntGauge, Registry};
use quinn::{ClientConfig, Connection, Endpoint, RecvStream, SendStream};
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};

/// First wait before another attempt; it doubles up to [`MAX_BACKOFF`].
const MIN_BACKOFF: Duration = Duration::from_millis(100);

/// Longest wait before another attempt.
const MAX_BACKOFF: Duration = Duration::from_secs(5);

/// For the handshake, the hello and the reading of a request.
const PATIENCE: Duration = Duration::from_secs(5);

/// Time between reports at least: changes that come closer are told together.
const REPORT_PAUSE: Duration = Duration::from_millis(100);

/// Time after which the host is read though nothing is known to have changed.
const REPORT_INTERVAL: Duration = Duration::from_secs(10);

/// Time between batches of events at least.
const EVENTS_PAUSE: Duration = Duration::from_millis(100);

/// Time until the host is read again when it could not be.
const REPORT_RETRY: Duration = Duration::from_secs(1);

/// Time between two progress messages of one request.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(250);

/// Time after which the same progress is told again: a request that tells nothing at all looks dead.
const PROGRESS_REPEAT: Duration = Duration::from_secs(15);

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum UplinkError {
    /// No socket.
    #[error("cannot open a UDP socket")]
    Socket(#[source] io::Error),
    /// The address cannot be connected to.
    #[error("cannot connect to {0}")]
    Address(SocketAddr, #[source] quinn::ConnectError),
    /// Nobody answers.
    #[error("no answer from {0}")]
    Silent(SocketAddr),
    /// The connection failed or broke.
    #[error("the connection to {0} ended")]
    Ended(SocketAddr, #[source] quinn::ConnectionError),
    /// The channel failed.
    #[error(transparent)]
    Channel(#[from] ChannelError),
    /// The coordinator does not want this agent.
    #[error("the coordinator rejects this host: {0}")]
    Rejected(String),
    /// Metrics of these names are there already.
    #[error("metrics cannot be registered")]
    Metrics(#[from] prometheus::Error),
}

/// One agent's connection, made again whenever it breaks.
pub struct Uplink {
    coordinator: SocketAddr,
    host: HostId,
    identity: Arc<Identity>,
    /// How connections that show a certificate that ends then are made.
    client: Mutex<(i64, ClientConfig)>,
    endpoint: Endpoint,
    calls: Calls,
    reporter: Arc<Reporter>,
    events: Option<Arc<Events>>,
    connected: IntGauge,
    connections: IntCounter,
}

impl Uplink {
    /// Prepares a connection from `host`, which `identity` proves, to `coordinator`.
    ///
    /// # Errors
    /// [`UplinkError::Socket`], [`UplinkError::Channel`] when TLS does not take the identity,
    /// [`UplinkError::Metrics`].
    pub fn new(
        coordinator: SocketAddr,
        host: HostId,
        identity: Arc<Identity>,
        calls: Calls,
        reporter: Arc<Reporter>,
        registry: &Registry,
    ) -> Result<Self, UplinkError> {
        let any: SocketAddr =
            if coordinator.is_ipv4() { ([0, 0, 0, 0], 0).into() } else { ([0_u16; 8], 0).into() };
        let endpoint = Endpoint::client(any).map_err(UplinkError::Socket)?;
        let client = Mutex::new((identity.ends_at(), identity.quic_client()?));
        let connected = IntGauge::new("godwit_agent_connected", "Whether the coordinator has accepted us.")?;
        let connections =
            IntCounter::new("godwit_agent_connections_total", "Connections that it has accepted.")?;
        registry.register(Box::new(connected.clone()))?;
        registry.register(Box::new(connections.clone()))?;
        Ok(Self {
            coordinator,
            host,
            identity,
            client,
            endpoint,
            calls,
            reporter,
            events: None,
            connected,
            connections,
        })
    }

    /// Keeps the connection up, for ever.
    pub async fn run(&self) {
        let mut backoff = MIN_BACKOFF;
        let mut quiet = false;
        loop {
            let accepted = self.connections.get();
            let Err(error) = self.connect().await;
            self.connected.set(0);
            if self.connections.get() > accepted {
                (backoff, quiet) = (MIN_BACKOFF, false);
            }
            // Said once for each outage; the metric tells the rest.
            match quiet {
                false => tracing::warn!(coordinator = %self.coordinator, "not connected: {}", chain(&error)),
                true => tracing::debug!(coordinator = %self.coordinator, "not connected: {}", chain(&error)),
            }
            quiet = true;
            if matches!(error, UplinkError::Rejected(_)) {
                backoff = MAX_BACKOFF;
            }
            sleep(backoff.mul_f64(jitter())).await;
            backoff = (backoff * 2).min(MAX_BACKOFF);
        }
    }

    /// The same, which also tells what `events` holds.
    #[must_use]
    pub fn with_events(self, events: Arc<Events>) -> Self {
        Self { events: Some(events), ..self }
    }

    /// Says goodbye, so that the coordinator need not wait for silence.
    pub async fn close(&self) {
        self.endpoint.close(0_u32.into(), b"the agent stops");
        let _ = timeout(Duration::from_secs(1), self.endpoint.wait_idle()).await;
    }

    /// One configuration for all connections that show the same certificate: it holds the tickets that resume a session,
    /// and these tell the coordinator of the certificate that the session began with.
    fn client(&self) -> Result<ClientConfig, ChannelError> {
        let mut client = self.client.lock().unwrap_or_else(PoisonError::into_inner);
        let ends_at = self.identity.ends_at();
        if client.0 != ends_at {
            *client = (ends_at, self.identity.quic_client()?);
        }
        Ok(client.1.clone())
    }

    async fn connect(&self) -> Result<std::convert::Infallible, UplinkError> {
        let to = self.coordinator;
        let connecting = self
            .endpoint
            .connect_with(self.client()?, to, COORDINATOR_NAME)
            .map_err(|e| UplinkError::Address(to, e))?;
        let connection = timeout(PATIENCE, connecting)
            .await
            .map_err(|_| UplinkError::Silent(to))?
            .map_err(|e| UplinkError::Ended(to, e))?;
        let heartbeat_every =
            timeout(PATIENCE, self.hello(&connection)).await.map_err(|_| UplinkError::Silent(to))??;
        self.connections.inc();
        self.connected.set(1);
        tracing::info!(coordinator = %to, "connected");
        tokio::select! {
            reason = connection.closed() => Err(UplinkError::Ended(to, reason)),
            error = self.heartbeats(&connection, heartbeat_every) => Err(UplinkError::Ended(to, error)),
            error = self.reports(&connection) => Err(error.into()),
            error = self.tell_events(&connection) => Err(error.into()),
            error = self.requests(&connection) => Err(UplinkError::Ended(to, error)),
        }
    }

    async fn hello(&self, connection: &Connection) -> Result<Duration, UplinkError> {
        let ended = |e| UplinkError::Ended(self.coordinator, e);
        let (mut to, mut from) = connection.open_bi().await.map_err(ended)?;
        send(&mut to, &Hello { versions: vec![VERSION], host: self.host }).await?;
        let welcome = match receive(&mut from).await {
            // The reason why the coordinator closed says more than that the stream broke.
            Err(ChannelError::Read(_)) if connection.close_reason().is_some() => {
                return Err(ended(connection.closed().await));
            }
            other => other?,
        };
        match welcome {
            Welcome::Accepted { version: VERSION, heartbeat_ms } => {
                Ok(Duration::from_millis(heartbeat_ms.clamp(10, 60_000)))
            }
            Welcome::Accepted { version, .. } => {
                Err(UplinkError::Rejected(format!("it wants version {version} of the channel")))
            }
            Welcome::Rejected { reason } => Err(UplinkError::Rejected(reason)),
        }
    }

    async fn heartbeats(&self, connection: &Connection, every: Duration) -> quinn::ConnectionError {
        let mut ticks = interval(every);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            let Ok(datagram) = serde_json::to_vec(&self.reporter.heartbeat()) else { continue };
            match connection.send_datagram(datagram.into()) {
                Err(quinn::SendDatagramError::ConnectionLost(error)) => return error,
                Err(error) => tracing::debug!("no heartbeat sent: {error}"),
                Ok(()) => {}
            }
        }
    }

    async fn reports(&self, connection: &Connection) -> ChannelError {
        let mut always = true;
        let mut failing = false;
        loop {
            match self.reporter.next(always).await {
                Ok(report) => {
                    failing = false;
                    if let Some(report) = report
                        && let Err(error) = tell(connection, &AgentNote::Report(Box::new(report))).await
                    {
                        return error;
                    }
                    always = false;
                }
                Err(error) => {
                    if !std::mem::replace(&mut failing, true) {
                        tracing::error!("the host cannot be reported: {error}");
                    }
                    sleep(REPORT_RETRY).await;
                    continue;
                }
            }
            sleep(REPORT_PAUSE).await;
            let _ = timeout(REPORT_INTERVAL, self.reporter.wait_changed()).await;
        }
    }

    /// Tells events in batches, each until the coordinator has it.
    async fn tell_events(&self, connection: &Connection) -> ChannelError {
        let Some(events) = &self.events else { return std::future::pending().await };
        loop {
            let batch = events.next().await;
            if let Err(error) = tell_batch(connection, batch.clone()).await {
                return error;
            }
            events.taken(&batch);
            sleep(EVENTS_PAUSE).await;
        }
    }

    async fn requests(&self, connection: &Connection) -> quinn::ConnectionError {
        // Dropped with the connection: what is lost is the telling, not the doing.
        let mut answering = JoinSet::new();
        loop {
            tokio::select! {
                stream = connection.accept_bi() => match stream {
                    Ok((to, from)) => {
                        answering.spawn(answer(self.calls.clone(), to, from));
                    }
                    Err(error) => return error,
                },
                Some(_) = answering.join_next() => {}
            }
        }
    }
}

/// Says it on a stream of its own.
async fn tell(connection: &Connection, note: &AgentNote) -> Result<SendStream, ChannelError> {
    let mut to = connection.open_uni().await?;
    send(&mut to, note).await?;
    // Only fails when it is finished already.
    let _ = to.finish();
    Ok(to)
}

/// Returns when the coordinator's end has all of it.
async fn tell_batch(connection: &Connection, batch: EventBatch) -> Result<(), ChannelError> {
    match tell(connection, &AgentNote::Events(batch)).await?.stopped().await {
        Ok(_) => Ok(()),
        Err(_) => Err(connection.closed().await.into()),
    }
}

async fn answer(calls: Calls, mut to: SendStream, mut from: RecvStream) {
    if let Err(error) = relay(calls, &mut to, &mut from).await {
        tracing::debug!("an answer was not told: {}", chain(&error));
    }
    let _ = to.finish();
}

/// Reads one request, does it, and tells its progress and its end.
async fn relay(calls: Calls, to: &mut SendStream, from: &mut RecvStream) -> Result<(), ChannelError> {
    let finished = |answer| AgentMessage::Finished(answer);
    let request: AgentRequest = match timeout(PATIENCE, receive(from)).await {
        Ok(Err(ChannelError::Frame(error))) => {
            let text = format!("the request is not understood: {}", chain(&error));
            return send(to, &finished(Err(RequestError::new(ErrorKind::Invalid, text)))).await;
        }
        Ok(other) => other?,
        // A stream that says nothing is not worth a task.
        Err(_) => return Ok(()),
    };
    let mut call = calls.submit(request);
    let mut told: Option<(Progress, Instant)> = None;
    loop {
        let now = call.borrow_and_update().clone();
        match now {
            CallState::Finished(answer) => return send(to, &finished(answer)).await,
            CallState::Running(Some(newest))
                if told.is_none_or(|(last, at)| last != newest || at.elapsed() >= PROGRESS_REPEAT) =>
            {
                send(to, &AgentMessage::Progress(newest)).await?;
                told = Some((newest, Instant::now()));
            }
            CallState::Running(_) => {}
        }
        let over = call.wait_for(|state| matches!(state, CallState::Finished(_)));
        let lost = matches!(timeout(PROGRESS_INTERVAL, over).await, Ok(Err(_)));
        if lost {
            let error = RequestError::new(ErrorKind::Internal, "the request was lost");
            return send(to, &finished(Err(error))).await;
        }
    }
}

/// A factor from 0.5 to 1, so that hosts that lost the coordinator together do not come back together.
fn jitter() -> f64 {
    let random = uuid::Uuid::new_v4().as_u128() as u32;
    0.5 + f64::from(random) / f64::from(u32::MAX) / 2.0
}

#[cfg(test)]
mod tests;
