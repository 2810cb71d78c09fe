//! The uplink against a small coordinator on loopback, over real QUIC.

use super::*;
use crate::calls::{ProgressSink, Run};
use crate::state::{IdentityPaths, State};
use godwit_protocol::event::AgentNote;
use godwit_protocol::host::{Heartbeat, HypervisorInfo, Inventory, Underlay};
use godwit_protocol::id::InstanceId;
use godwit_protocol::quic::host_name;
use godwit_protocol::request::{AgentReply, HostReport};
use godwit_protocol::reservation::Reservation;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};

const SOON: Duration = Duration::from_secs(20);

/// A CA, and what it says of others.
struct Ca {
    issuer: rcgen::Issuer<'static, rcgen::KeyPair>,
    pem: String,
}

impl Ca {
    fn new() -> Self {
        let mut params = rcgen::CertificateParams::default();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let key = rcgen::KeyPair::generate().unwrap();
        let pem = params.self_signed(&key).unwrap().pem();
        Self { issuer: rcgen::Issuer::new(params, key), pem }
    }

    fn identity(&self, name: String) -> Identity {
        let key = rcgen::KeyPair::generate().unwrap();
        let params = rcgen::CertificateParams::new(vec![name]).unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        Identity::from_pem(&certificate.pem(), &key.serialize_pem(), &self.pem).unwrap()
    }
}

/// One agent's uplink, with calls that the test decides about.
struct Rig {
    host: HostId,
    uplink: Arc<Uplink>,
    reporter: Arc<Reporter>,
    /// What the host holds; a change of it is a change of the report.
    held: Arc<Mutex<Vec<Reservation>>>,
    running: Option<tokio::task::JoinHandle<()>>,
    _dir: tempfile::TempDir,
}

impl Rig {
    fn new(ca: &Ca, coordinator: SocketAddr, run: Run) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let host = HostId::random();
        let paths = IdentityPaths::new(dir.path());
        std::fs::create_dir(&paths.folder).unwrap();
        std::fs::write(paths.host, host.to_string()).unwrap();
        let state = Arc::new(State::open(dir.path()).unwrap());
        let held: Arc<Mutex<Vec<Reservation>>> = Arc::default();
        let reservations = held.clone();
        let collect = Arc::new(move || {
            Ok(HostReport { reservations: reservations.lock().unwrap().clone(), ..empty_report(host) })
        });
        let reporter = Arc::new(Reporter::new(state, collect));
        let registry = Registry::new();
        let calls = Calls::new(run, Arc::new(|_| ()), &registry).unwrap();
        let identity = ca.identity(host_name(host));
        let uplink =
            Uplink::new(coordinator, host, Arc::new(identity), calls, reporter.clone(), &registry).unwrap();
        Self { host, uplink: Arc::new(uplink), reporter, held, running: None, _dir: dir }
    }

    fn start(&mut self) {
        let uplink = self.uplink.clone();
        self.running = Some(tokio::spawn(async move { uplink.run().await }));
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        if let Some(running) = &self.running {
            running.abort();
        }
    }
}

fn empty_report(host: HostId) -> HostReport {
    let inventory = Inventory {
        hostname: "h1".into(),
        agent_version: String::new(),
        kernel: String::new(),
        architecture: String::new(),
        cpu_model: String::new(),
        hypervisor: HypervisorInfo {
            kind: "fake".into(),
            libvirt_version: String::new(),
            version: String::new(),
            kvm: false,
        },
        cells: Vec::new(),
        reserved_memory_bytes: 0,
        physical_networks: vec![],
        links: Vec::new(),
        underlay: Underlay { link: "lo".into(), address: [127, 0, 0, 1].into(), mtu: 1500 },
        migration_address: None,
        pools: Vec::new(),
    };
    HostReport {
        host,
        generation: 0,
        inventory,
        instances: Vec::new(),
        reservations: Vec::new(),
        beside: Vec::new(),
        drifts: Vec::new(),
        networks: Vec::new(),
    }
}

fn reservation() -> Reservation {
    Reservation {
        instance: InstanceId::random(),
        vcpus: 1,
        memory_bytes: 1,
        cells: Vec::new(),
        emulator_cpus: Vec::new(),
        idle_cpus: Vec::new(),
    }
}

fn coordinator(ca: &Ca) -> Endpoint {
    let identity = ca.identity(COORDINATOR_NAME.to_owned());
    Endpoint::server(identity.quic_server().unwrap(), ([127, 0, 0, 1], 0).into()).unwrap()
}

async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    timeout(SOON, future).await.unwrap_or_else(|_| panic!("no {what} within {SOON:?}"))
}

/// Takes the next agent and tells it to go on.
async fn accept(endpoint: &Endpoint, host: HostId) -> Connection {
    let connection = soon("connection", async { endpoint.accept().await.unwrap().await.unwrap() }).await;
    let (mut to, mut from) = soon("hello", connection.accept_bi()).await.unwrap();
    let hello: Hello = receive(&mut from).await.unwrap();
    assert_eq!((hello.host, hello.versions), (host, vec![VERSION]));
    send(&mut to, &Welcome::Accepted { version: VERSION, heartbeat_ms: 20 }).await.unwrap();
    connection
}

async fn report(connection: &Connection) -> HostReport {
    let mut from = soon("report", connection.accept_uni()).await.unwrap();
    match soon("report's frame", receive(&mut from)).await.unwrap() {
        AgentNote::Report(report) => *report,
        other => panic!("{other:?} is no report"),
    }
}

async fn ask(connection: &Connection, request: &AgentRequest) -> RecvStream {
    let (mut to, from) = connection.open_bi().await.unwrap();
    send(&mut to, request).await.unwrap();
    from
}

async fn message(from: &mut RecvStream) -> AgentMessage {
    soon("message", receive(from)).await.unwrap()
}

fn done() -> Run {
    Arc::new(|_: &AgentRequest, _: &ProgressSink| Ok(AgentReply::Done))
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_says_hello_reports_whole_and_beats_with_the_reports_generation() {
    let ca = Ca::new();
    let endpoint = coordinator(&ca);
    let mut rig = Rig::new(&ca, endpoint.local_addr().unwrap(), done());
    rig.start();
    let connection = accept(&endpoint, rig.host).await;
    let first = report(&connection).await;
    assert_eq!((first.host, first.generation), (rig.host, 1));
    let beat = async {
        loop {
            let datagram = connection.read_datagram().await.unwrap();
            let beat: Heartbeat = serde_json::from_slice(&datagram).unwrap();
            if beat.generation == first.generation {
                return beat;
            }
        }
    };
    let beat = soon("heartbeat with the report's generation", beat).await;
    assert_eq!(beat.host, rig.host);
    assert_eq!(beat.inventory_digest, crate::report::digest(&first.inventory));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_is_reported_with_a_higher_generation_and_no_change_is_not() {
    let ca = Ca::new();
    let endpoint = coordinator(&ca);
    let mut rig = Rig::new(&ca, endpoint.local_addr().unwrap(), done());
    rig.start();
    let connection = accept(&endpoint, rig.host).await;
    report(&connection).await;
    // Nothing differs: the next report that comes is the one with the reservation.
    rig.reporter.mark_changed();
    sleep(REPORT_PAUSE * 3).await;
    rig.held.lock().unwrap().push(reservation());
    rig.reporter.mark_changed();
    let second = report(&connection).await;
    assert_eq!((second.generation, second.reservations.len()), (2, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_break_the_agent_comes_back_and_reports_what_it_missed_to_tell() {
    let ca = Ca::new();
    let endpoint = coordinator(&ca);
    let mut rig = Rig::new(&ca, endpoint.local_addr().unwrap(), done());
    rig.start();
    let connection = accept(&endpoint, rig.host).await;
    let first = report(&connection).await;
    connection.close(1_u32.into(), b"a test");
    rig.held.lock().unwrap().push(reservation());
    rig.reporter.mark_changed();
    let connection = accept(&endpoint, rig.host).await;
    let second = report(&connection).await;
    assert!(second.generation > first.generation);
    assert_eq!(second.reservations.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_starts_before_the_coordinator_finds_it_later() {
    let ca = Ca::new();
    let free = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let address = free.local_addr().unwrap();
    drop(free);
    let mut rig = Rig::new(&ca, address, done());
    rig.start();
    sleep(MIN_BACKOFF * 3).await;
    let identity = ca.identity(COORDINATOR_NAME.to_owned());
    let endpoint = Endpoint::server(identity.quic_server().unwrap(), address).unwrap();
    accept(&endpoint, rig.host).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_hears_of_a_killed_coordinator_from_the_next_one_without_waiting_for_silence() {
    let ca = Ca::new();
    let identity = Arc::new(ca.identity(COORDINATOR_NAME.to_owned()));
    let listen = move |socket: std::net::UdpSocket| {
        let server = Some(identity.quic_server().unwrap());
        Endpoint::new(identity.quic_endpoint(), server, socket, Arc::new(quinn::TokioRuntime)).unwrap()
    };
    let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let address = socket.local_addr().unwrap();
    let rig = Rig::new(&ca, address, done());
    let (uplink, host) = (rig.uplink.clone(), rig.host);
    let attempt = tokio::spawn(async move { uplink.connect().await });
    // A runtime of its own, because what ends with it says no goodbye.
    let killed = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let first = listen.clone();
    let life = killed.spawn(async move {
        let endpoint = first(socket);
        let connection = accept(&endpoint, host).await;
        (endpoint, connection)
    });
    let life = life.await.unwrap();
    tokio::task::spawn_blocking(move || killed.shutdown_timeout(SOON)).await.unwrap();
    drop(life);
    let _next = listen(std::net::UdpSocket::bind(address).unwrap());
    let Err(error) = soon("end", attempt).await.unwrap();
    // Whatever was under way on it when it came.
    assert!(chain(&error).contains("reset by peer"), "{error:?}");
}

/// A copy that tells one progress and then waits until the test lets it go.
fn held_copy() -> (Run, std::sync::mpsc::Sender<()>, Arc<AtomicU32>) {
    let (gate, opened) = std::sync::mpsc::channel();
    let opened = Mutex::new(opened);
    let runs = Arc::new(AtomicU32::new(0));
    let counted = runs.clone();
    let run: Run = Arc::new(move |_, progress| {
        counted.fetch_add(1, Ordering::SeqCst);
        progress.send(Progress::Copy { done_bytes: 1, total_bytes: 4 });
        opened.lock().unwrap().recv().unwrap();
        Ok(AgentReply::Done)
    });
    (run, gate, runs)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_tells_its_progress_and_then_its_end() {
    let ca = Ca::new();
    let endpoint = coordinator(&ca);
    let (run, gate, _) = held_copy();
    let mut rig = Rig::new(&ca, endpoint.local_addr().unwrap(), run);
    rig.start();
    let connection = accept(&endpoint, rig.host).await;
    let mut from = ask(&connection, &AgentRequest::DeleteDisk(InstanceId::random())).await;
    let progress = Progress::Copy { done_bytes: 1, total_bytes: 4 };
    assert_eq!(message(&mut from).await, AgentMessage::Progress(progress));
    gate.send(()).unwrap();
    assert_eq!(message(&mut from).await, AgentMessage::Finished(Ok(AgentReply::Done)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_outlives_its_connection_and_asking_again_joins_it() {
    let ca = Ca::new();
    let endpoint = coordinator(&ca);
    let (run, gate, runs) = held_copy();
    let mut rig = Rig::new(&ca, endpoint.local_addr().unwrap(), run);
    rig.start();
    let request = AgentRequest::DeleteDisk(InstanceId::random());
    let connection = accept(&endpoint, rig.host).await;
    let mut from = ask(&connection, &request).await;
    message(&mut from).await;
    connection.close(1_u32.into(), b"a test");
    let connection = accept(&endpoint, rig.host).await;
    let mut from = ask(&connection, &request).await;
    assert!(matches!(message(&mut from).await, AgentMessage::Progress(_)));
    gate.send(()).unwrap();
    assert_eq!(message(&mut from).await, AgentMessage::Finished(Ok(AgentReply::Done)));
    assert_eq!(runs.load(Ordering::SeqCst), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_of_a_later_version_is_answered_as_invalid() {
    let ca = Ca::new();
    let endpoint = coordinator(&ca);
    let mut rig = Rig::new(&ca, endpoint.local_addr().unwrap(), done());
    rig.start();
    let connection = accept(&endpoint, rig.host).await;
    let (mut to, mut from) = connection.open_bi().await.unwrap();
    send(&mut to, &serde_json::json!({"fly": 1})).await.unwrap();
    match message(&mut from).await {
        AgentMessage::Finished(Err(error)) => assert_eq!(error.kind, ErrorKind::Invalid),
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_coordinator_of_another_ca_gets_no_hello() {
    let ca = Ca::new();
    let endpoint = coordinator(&Ca::new());
    let mut rig = Rig::new(&ca, endpoint.local_addr().unwrap(), done());
    rig.start();
    let refused = soon("attempt", async { endpoint.accept().await.unwrap().await });
    assert!(refused.await.is_err());
    assert_eq!(rig.uplink.connected.get(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rejected_agent_says_why_and_tries_again_later() {
    let ca = Ca::new();
    let endpoint = coordinator(&ca);
    let rig = Rig::new(&ca, endpoint.local_addr().unwrap(), done());
    let uplink = rig.uplink.clone();
    let attempt = tokio::spawn(async move { uplink.connect().await });
    let connection = endpoint.accept().await.unwrap().await.unwrap();
    let (mut to, mut from) = connection.accept_bi().await.unwrap();
    let _: Hello = receive(&mut from).await.unwrap();
    send(&mut to, &Welcome::Rejected { reason: "unknown host".into() }).await.unwrap();
    let Err(error) = soon("end", attempt).await.unwrap();
    assert!(matches!(&error, UplinkError::Rejected(reason) if reason == "unknown host"), "{error}");
}
