//! The agent with the simulator's hypervisor and network.

use super::*;
use crate::calls::{CallState, Calls};
use crate::config::Config;
use crate::drift::Drifts;
use crate::guest_process::GuestProcesses;
use crate::huge_pages::HugePages;
use crate::hypervisor::MemoryBinding;
use crate::hypervisor::fake::Fake;
use crate::identity::HostIdentity;
use crate::instances::Instances;
use crate::migration::MigrationSettings;
use crate::network::HostNetwork;
use crate::network::fake::FakeNetwork;
use crate::network::keeper::Keeper;
use crate::network::wanted::WantedNetworks;
use crate::reservations::Reservations;
use crate::state::{IdentityPaths, StateError};
use crate::storage::Pool;
use godwit_protocol::host::Underlay;
use godwit_protocol::id::{HostId, MigrationId, NetworkId};
use godwit_protocol::image::DiskFormat;
use godwit_protocol::instance::{ConfigDrive, InstanceState, Tuning};
use godwit_protocol::network::{NetworkWanted, Unknown};
use godwit_protocol::quic::Identity;
use godwit_protocol::reservation::Refusal;
use prometheus::Registry;

/// A certificate that nobody asks for.
fn identity() -> Identity {
    let key = rcgen::KeyPair::generate().unwrap();
    let certificate = rcgen::CertificateParams::default().self_signed(&key).unwrap().pem();
    Identity::from_pem(&certificate, &key.serialize_pem(), &certificate).unwrap()
}

struct Rig {
    calls: Calls,
    fake: Arc<Fake>,
    network: Arc<FakeNetwork>,
}

/// A host that joined, its pool in the same folder.
fn folder() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let paths = IdentityPaths::new(dir.path());
    std::fs::create_dir(&paths.folder).unwrap();
    std::fs::write(paths.host, HostId::random().to_string()).unwrap();
    let pool = dir.path().join("pool");
    std::fs::create_dir_all(pool.join("instances")).unwrap();
    let config = format!(
        "coordinator = \"127.0.0.1:1\"\npool = {pool:?}\nreserved_memory_mib = 0\nmemory_binding = \"none\"\n"
    );
    std::fs::write(dir.path().join("agent.toml"), config).unwrap();
    dir
}

impl Rig {
    fn start(dir: &tempfile::TempDir) -> Self {
        let registry = Registry::new();
        let config = Config::load(dir.path()).unwrap();
        // A call that has answered may still be letting go of the agent before.
        let deadline = std::time::Instant::now() + Duration::from_secs(10);
        let state = loop {
            match State::open(dir.path()) {
                Err(StateError::Locked(_)) if std::time::Instant::now() < deadline => {
                    std::thread::yield_now()
                }
                state => break Arc::new(state.unwrap()),
            }
        };
        let reservations = Arc::new(Reservations::open(dir.path()).unwrap());
        let fake = Arc::new(Fake::new(Arc::default()));
        let underlay = Underlay { link: "eth0".into(), address: [198, 18, 0, 11].into(), mtu: 9000 };
        let network = Arc::new(FakeNetwork::new(underlay, Vec::new()));
        let instances = Instances::new(fake.clone(), reservations.clone(), &registry).unwrap();
        let drifts = Drifts::new(
            fake.clone(),
            reservations.clone(),
            GuestProcesses::default(),
            MemoryBinding::None,
            &registry,
        );
        let huge_pages = HugePages::new(reservations.clone(), GuestProcesses::default(), &registry);
        let migration_listen = ([127, 0, 0, 1], 0).into();
        let wanted = Arc::new(WantedNetworks::open(dir.path()).unwrap());
        let keeper = Keeper::new(network.clone(), wanted, &registry).unwrap();
        let host = Arc::new(Host {
            id: state.host(),
            pool: Pool::new(config.pool.clone(), config.pool_policy.clone(), &registry).unwrap(),
            config,
            migration_listen,
            instances,
            reservations,
            drifts: Arc::new(drifts.unwrap()),
            huge_pages: Arc::new(huge_pages.unwrap()),
            network: network.clone(),
            keeper: Arc::new(keeper),
        });
        let reported = host.clone();
        let reporter = Arc::new(Reporter::new(state.clone(), Arc::new(move || reported.report())));
        let settings = MigrationSettings {
            identity: Arc::new(identity()),
            host: state.host(),
            listen: migration_listen,
            libvirt_uri: "fake:///".into(),
            folder: dir.path().join("migrations"),
        };
        let shown = settings.identity.clone();
        let migrations = Migrations::new(settings, fake.clone(), &registry).unwrap();
        let identity = HostIdentity::new(shown, state.host(), dir.path(), &registry).unwrap();
        let identity = Arc::new(identity);
        let agent = Arc::new(Agent {
            host,
            hypervisor: fake.clone(),
            migrations,
            moves: DiskMoves::default(),
            identity,
            state,
            reporter,
        });
        let hearing = agent.clone();
        let run =
            Arc::new(move |request: &AgentRequest, progress: &ProgressSink| agent.handle(request, progress));
        Self {
            calls: Calls::new(run, Arc::new(move |request| hearing.hear(request)), &registry).unwrap(),
            fake,
            network,
        }
    }

    async fn ask(&self, request: AgentRequest) -> Answer {
        let mut state = self.calls.submit(request);
        let over = state.wait_for(|s| matches!(s, CallState::Finished(_)));
        match tokio::time::timeout(Duration::from_secs(30), over).await.unwrap().unwrap().clone() {
            CallState::Finished(answer) => answer,
            CallState::Running(_) => unreachable!(),
        }
    }

    /// A request to hold what `spec` wants, made from the host's newest report.
    async fn plan(&self, spec: &InstanceSpec) -> AgentRequest {
        let Ok(AgentReply::Report(report)) = self.ask(AgentRequest::Report).await else {
            panic!("no report")
        };
        AgentRequest::Reserve(ReservePlan {
            reservation: spec.reservation.clone(),
            generation: report.generation,
            beside: false,
        })
    }

    async fn refusal(&self, request: AgentRequest) -> ErrorKind {
        self.ask(request).await.unwrap_err().kind
    }
}

fn spec() -> InstanceSpec {
    let instance = InstanceId::random();
    InstanceSpec {
        instance,
        name: "vm".into(),
        reservation: Reservation {
            instance,
            vcpus: 1,
            memory_bytes: 64 << 20,
            cells: Vec::new(),
            emulator_cpus: Vec::new(),
            idle_cpus: Vec::new(),
        },
        topology: None,
        tuning: Tuning::default(),
        disk_format: DiskFormat::Raw,
        ports: Vec::new(),
        config_drive: ConfigDrive::default(),
    }
}

fn wanted(generation: u64) -> NetworkWanted {
    NetworkWanted {
        groups: vec![],
        network: NetworkId(uuid::Uuid::from_u128(1)),
        vni: 1001,
        carrier: Default::default(),
        mtu: 1450,
        udp_port: 4789,
        generation,
        ports: Vec::new(),
        forwarding: Vec::new(),
        flood: vec![[198, 18, 0, 12].into()],
        floating: Vec::new(),
        routers: Vec::new(),
        unknown_unicast: Unknown::Drop,
        unknown_neighbours: Unknown::Flood,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_plan_for_a_host_that_was_another_is_refused_with_the_reason_and_a_repetition_is_not() {
    let dir = folder();
    let rig = Rig::start(&dir);
    let (one, two) = (spec(), spec());
    let blind = ReservePlan { reservation: one.reservation.clone(), generation: 0, beside: false };
    rig.ask(AgentRequest::Reserve(blind.clone())).await.unwrap();
    let planned = rig.plan(&one).await;
    let AgentRequest::Reserve(ReservePlan { generation, .. }) = planned else { unreachable!() };
    let older =
        ReservePlan { reservation: two.reservation.clone(), generation: generation - 1, beside: false };
    let error = rig.ask(AgentRequest::Reserve(older)).await.unwrap_err();
    let wanted = Refusal::Stale { planned: generation - 1, changed: Some(generation) };
    assert_eq!((error.kind, error.refusal.as_deref()), (ErrorKind::Refused, Some(&wanted)));
    // What is held already is held, whatever the plan was made from.
    rig.ask(AgentRequest::Reserve(blind)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_defined_or_started_that_holds_nothing_here() {
    let dir = folder();
    let rig = Rig::start(&dir);
    let spec = spec();
    assert_eq!(rig.refusal(AgentRequest::DefineInstance(Box::new(spec.clone()))).await, ErrorKind::Conflict);
    assert_eq!(rig.refusal(AgentRequest::StartInstance(spec.instance)).await, ErrorKind::Conflict);
    rig.ask(rig.plan(&spec).await).await.unwrap();
    let mut larger = spec.clone();
    larger.reservation.memory_bytes *= 2;
    assert_eq!(rig.refusal(AgentRequest::DefineInstance(Box::new(larger))).await, ErrorKind::Conflict);
}

#[tokio::test(flavor = "multi_thread")]
async fn each_request_of_a_life_may_come_twice_and_answers_the_same() {
    let dir = folder();
    let rig = Rig::start(&dir);
    let spec = spec();
    let instance = spec.instance;
    let life = [
        rig.plan(&spec).await,
        AgentRequest::EnsureNetwork(wanted(1)),
        AgentRequest::DefineInstance(Box::new(spec)),
        AgentRequest::StartInstance(instance),
        AgentRequest::PauseInstance { instance, paused: true },
        AgentRequest::PauseInstance { instance, paused: false },
        AgentRequest::StopInstance { instance, grace_ms: 0 },
        AgentRequest::RemoveInstance(instance),
        AgentRequest::DeleteDisk(instance),
        AgentRequest::Release(instance),
        AgentRequest::RemoveNetwork { network: wanted(1).network, vni: 1001, generation: 2 },
        AgentRequest::DiscardMigration { migration: MigrationId::random(), instance },
    ];
    for request in life {
        for time in ["once", "twice"] {
            let answer = rig.ask(request.clone()).await;
            assert_eq!(answer, Ok(AgentReply::Done), "{} {time}", request.name());
        }
    }
    assert_eq!(rig.ask(AgentRequest::InstanceState(instance)).await, Ok(AgentReply::State(None)));
    assert!(!dir.path().join("pool/instances").join(instance.to_string()).exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_report_tells_what_runs_what_is_held_and_what_the_overlay_is() {
    let dir = folder();
    let rig = Rig::start(&dir);
    let spec = spec();
    rig.ask(rig.plan(&spec).await).await.unwrap();
    rig.ask(AgentRequest::EnsureNetwork(wanted(1))).await.unwrap();
    rig.ask(AgentRequest::DefineInstance(Box::new(spec.clone()))).await.unwrap();
    rig.ask(AgentRequest::StartInstance(spec.instance)).await.unwrap();
    let Ok(AgentReply::Report(first)) = rig.ask(AgentRequest::Report).await else { panic!("no report") };
    assert_eq!(first.instances.len(), 1);
    assert_eq!(first.instances[0].state, InstanceState::Running);
    assert_eq!(first.reservations, [spec.reservation]);
    assert_eq!(first.networks[0].flood, wanted(1).flood);
    assert!(!first.inventory.cells.is_empty());
    let Ok(AgentReply::Report(second)) = rig.ask(AgentRequest::Report).await else { panic!("no report") };
    assert!(second.generation > first.generation);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_late_order_for_a_network_does_nothing_even_after_a_restart() {
    let dir = folder();
    let rig = Rig::start(&dir);
    rig.ask(AgentRequest::EnsureNetwork(wanted(5))).await.unwrap();
    let remove =
        |generation| AgentRequest::RemoveNetwork { network: wanted(1).network, vni: 1001, generation };
    rig.ask(remove(4)).await.unwrap();
    assert_eq!(rig.network.observe().unwrap().len(), 1);
    rig.ask(remove(6)).await.unwrap();
    assert_eq!(rig.network.observe().unwrap(), []);
    drop(rig);
    let rig = Rig::start(&dir);
    rig.ask(AgentRequest::EnsureNetwork(wanted(5))).await.unwrap();
    assert_eq!(rig.network.observe().unwrap(), []);
}

#[tokio::test(flavor = "multi_thread")]
async fn with_the_hypervisor_down_what_needs_it_is_unavailable_and_the_rest_works() {
    let dir = folder();
    let rig = Rig::start(&dir);
    let spec = spec();
    rig.fake.set_down(true);
    let plan = ReservePlan { reservation: spec.reservation.clone(), generation: 0, beside: false };
    rig.ask(AgentRequest::Reserve(plan)).await.unwrap();
    rig.ask(AgentRequest::EnsureNetwork(wanted(1))).await.unwrap();
    let define = AgentRequest::DefineInstance(Box::new(spec));
    assert_eq!(rig.refusal(define.clone()).await, ErrorKind::Unavailable);
    assert_eq!(rig.refusal(AgentRequest::Report).await, ErrorKind::Unavailable);
    rig.fake.set_down(false);
    rig.ask(define).await.unwrap();
}
