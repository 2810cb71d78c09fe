//! The running agent: its parts put together, until a signal.

use crate::agent::Agent;
use crate::calls::Calls;
use crate::config::{Config, MIGRATION_PORT};
use crate::drift::{self, Drifts};
use crate::events::Events;
use crate::guest_process::GuestProcesses;
use crate::host::{Host, configured_cells};
use crate::huge_pages::HugePages;
use crate::hypervisor::Hypervisor;
use crate::hypervisor::libvirt::Libvirt;
use crate::identity::{self, HostIdentity, IdentityError};
use crate::instances::Instances;
use crate::locality::Locality;
use crate::metrics::{Exposition, ListenError, Metrics, Process};
use crate::migration::{MigrationSettings, Migrations};
use crate::moves::DiskMoves;
use crate::network::HostNetwork;
use crate::network::dhcp::{DhcpError, Responder};
use crate::network::filtered::Filtered;
use crate::network::keeper::Keeper;
use crate::network::netlink::Netlink;
use crate::network::overlay::Overlay;
use crate::network::wanted::WantedNetworks;
use crate::report::Reporter;
use crate::reservations::Reservations;
use crate::state::{State, StateError};
use crate::storage::{Pool, PoolChange};
use crate::telemetry;
use crate::telemetry::filter::{FilterCollector, PortFilter, Requests};
use crate::telemetry::plane::{DataPlane, EventReader, PlaneCollector};
use crate::telemetry::vxlan::{Options, VxlanCollector, VxlanTelemetry};
use crate::uplink::{Uplink, UplinkError};
use godwit_protocol::error::{RequestError, chain};
use godwit_protocol::event::EventKind;
use godwit_protocol::quic::Identity;
use prometheus::{IntGauge, IntGaugeVec, Opts, Registry};
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};

/// Threads that must never block: two, for what they do is little.
const ASYNC_THREADS: usize = 2;

/// Threads for calls that block. More than these hang only when libvirt does.
const MAX_BLOCKING_THREADS: usize = 128;

/// Sockets of migrations: the same path on all hosts.
const MIGRATIONS_FOLDER: &str = "/run/godwit/migrations";

/// Why the agent does not run.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// Its folder.
    #[error(transparent)]
    State(#[from] StateError),
    /// Its identity.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// Its connection.
    #[error(transparent)]
    Uplink(#[from] UplinkError),
    /// Its metrics' address.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// Its metrics' names.
    #[error("metrics cannot be registered")]
    Metrics(#[from] prometheus::Error),
    /// The kernel's network interface.
    #[error(transparent)]
    Network(#[from] crate::network::NetworkError),
    /// What the kernel tells of it.
    #[error(transparent)]
    Host(#[from] RequestError),
    /// What tells guests their addresses.
    #[error(transparent)]
    Dhcp(#[from] DhcpError),
    /// Threads, sockets or signals.
    #[error("the agent cannot start")]
    Io(#[from] io::Error),
}

/// Runs the agent of `config` until SIGTERM or SIGINT. What it set up on the host stays.
///
/// # Errors
/// Each of [`RunError`], before anything runs.
pub fn run(config: Config) -> Result<(), RunError> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(ASYNC_THREADS)
        .max_blocking_threads(MAX_BLOCKING_THREADS)
        .enable_all()
        .build()?;
    let outcome = runtime.block_on(serve(config));
    // Calls that hang must not keep the process: what they do is safe to end.
    runtime.shutdown_timeout(Duration::from_millis(500));
    outcome
}

async fn serve(config: Config) -> Result<(), RunError> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let state = Arc::new(State::open(&config.dir)?);
    let shown = Arc::new(identity::read(&config.dir)?);
    let registry = Registry::new();
    registry.register(Box::new(Process::new(&state.host().to_string())?))?;
    let identity = Arc::new(HostIdentity::new(shown.clone(), state.host(), &config.dir, &registry)?);
    let metrics = Metrics::bind(&config.metrics_listen, registry.clone()).await?;
    let network = Netlink::open(&config.underlay)?.with_physical(config.physical_networks.clone());
    let underlay = network.underlay()?;
    let events = Arc::new(Events::new(state.host(), &registry)?);
    let mut texts: Vec<Arc<dyn Exposition>> = Vec::new();
    let (plane, counting) = start_data_plane(&underlay.link, &config, &registry, &events)?;
    texts.extend(
        plane.iter().map(|plane| Arc::new(PlaneCollector::new(plane.clone())) as Arc<dyn Exposition>),
    );
    let network = if plane.is_some() { network } else { network.standing_in() };
    let network = Overlay::new(network, plane.clone());
    let (coordinator, host) = (config.coordinator, state.host());
    let wanted = Arc::new(WantedNetworks::open(&config.dir)?);
    let filter = start_filter(&config, &registry, wanted.clone())?;
    let network = Arc::new(Filtered::new(network, filter.clone()));
    let keeper = Arc::new(Keeper::new(network.clone(), wanted, &registry)?);
    let restored = keeper.clone();
    let counting =
        tokio::task::spawn_blocking(move || restore(&restored, plane, counting, filter.as_deref()))
            .await
            .map_err(io::Error::other)?;
    if let Some(counting) = counting {
        texts.push(Arc::new(VxlanCollector::new(Arc::new(counting))));
    }
    let metrics = metrics.with(texts);
    let (calls, reporter) =
        assemble(config, state, (shown.clone(), identity), (network, keeper.clone()), &events, &registry)?;
    let uplink = Uplink::new(coordinator, host, shown, calls, reporter, &registry)?.with_events(events);
    tracing::info!(%host, %coordinator, "the agent runs");
    tokio::select! {
        () = uplink.run() => {}
        () = metrics.serve() => {}
        () = keep_networks(keeper) => {}
        _ = terminate.recv() => tracing::info!("SIGTERM: the agent stops, guests go on"),
        _ = interrupt.recv() => tracing::info!("SIGINT: the agent stops, guests go on"),
    }
    uplink.close().await;
    Ok(())
}

/// Counts the underlay's packets, and sets up the ports' programs. A host whose kernel does not let us is still a
/// host: then the kernel's own means answer for known neighbours, and a metric says so.
fn start_data_plane(
    link: &str,
    config: &Config,
    registry: &Registry,
    events: &Arc<Events>,
) -> Result<(Option<Arc<DataPlane>>, Option<VxlanTelemetry>), RunError> {
    let up = IntGauge::new("godwit_telemetry_up", "Whether the underlay's packets are counted.")?;
    registry.register(Box::new(up.clone()))?;
    let answering = IntGaugeVec::new(
        Opts::new(
            "godwit_neighbour_suppression",
            "What answers questions for known addresses at their ports.",
        ),
        &["by"],
    )?;
    registry.register(Box::new(answering.clone()))?;
    if config.program_stats {
        tokio::spawn(telemetry::sample_programs());
    }
    let bpffs = &config.bpffs;
    let options = Options { known_only: true, capacity: config.capacity, ..Options::default() };
    let counting = VxlanTelemetry::open(link, bpffs, options)
        .inspect_err(|error| tracing::error!("packets are not counted: {}", chain(error)))
        .ok();
    up.set(counting.is_some().into());
    let opened =
        DataPlane::open(bpffs, config.capacity).and_then(|plane| Ok((plane, EventReader::open(bpffs)?)));
    let plane = match opened {
        Ok((plane, reader)) => {
            let plane = Arc::new(plane);
            forward_events(reader, events.clone())?;
            Some(plane)
        }
        Err(error) => {
            tracing::error!("ports have no programs, nor security: {}", chain(&error));
            None
        }
    };
    answering.with_label_values(&["ebpf"]).set(plane.is_some().into());
    answering.with_label_values(&["kernel"]).set(plane.is_none().into());
    Ok((plane, counting))
}

/// A thread that takes events out of the kernel's ring, for as long as the agent runs.
fn forward_events(mut reader: EventReader, events: Arc<Events>) -> io::Result<()> {
    let forward = move || loop {
        events.push(reader.wait(Duration::from_secs(3600)));
    };
    std::thread::Builder::new().name("events".into()).spawn(forward).map(drop)
}

/// Loads the filter of guests' ports, and answers those that ask for their address. A host whose kernel takes no such
/// program is still a host, for networks without security groups.
fn start_filter(
    config: &Config,
    registry: &Registry,
    wanted: Arc<WantedNetworks>,
) -> Result<Option<Arc<PortFilter>>, RunError> {
    let up = IntGauge::new("godwit_filter_up", "Whether ports can have security groups and DHCP.")?;
    registry.register(Box::new(up.clone()))?;
    let opened = PortFilter::open(&config.bpffs, config.filter_room)
        .and_then(|filter| Ok((Arc::new(filter), Requests::open(&config.bpffs)?)));
    match opened {
        Ok((filter, requests)) => {
            registry.register(Box::new(FilterCollector::new(filter.clone())?))?;
            Responder::new(wanted, registry)?.start(requests)?;
            up.set(1);
            Ok(Some(filter))
        }
        Err(error) => {
            tracing::error!("ports have no security groups and no DHCP: {}", chain(&error));
            Ok(None)
        }
    }
}

/// Brings networks to what was wanted last, and then exchanges the programs that an earlier agent has attached: by
/// then the new ones know their networks and rules.
fn restore(
    keeper: &Keeper,
    plane: Option<Arc<DataPlane>>,
    mut counting: Option<VxlanTelemetry>,
    filter: Option<&PortFilter>,
) -> Option<VxlanTelemetry> {
    keeper.restore();
    let adopted = match (plane, &mut counting) {
        (Some(plane), counting) => plane.adopt(counting.as_mut()),
        (None, Some(counting)) => counting.adopt(),
        (None, None) => Ok(()),
    };
    for outcome in [adopted, filter.map_or(Ok(()), PortFilter::adopt)] {
        if let Err(error) = outcome {
            tracing::error!("programs of an earlier agent stay: {}", chain(&error));
        }
    }
    counting
}

/// Looks at the networks whenever links come or go, and every few seconds.
async fn keep_networks(keeper: Arc<Keeper>) {
    loop {
        let checked = keeper.clone();
        if let Err(error) = crate::network::watch::links(Arc::new(move || checked.check())).await {
            tracing::error!("the kernel does not tell of new links: {error}");
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}

/// Puts the parts together: what takes requests, and what reports.
fn assemble(
    config: Config,
    state: Arc<State>,
    (shown, identity): (Arc<Identity>, Arc<HostIdentity>),
    (network, keeper): (Arc<dyn HostNetwork>, Arc<Keeper>),
    events: &Arc<Events>,
    registry: &Registry,
) -> Result<(Calls, Arc<Reporter>), RunError> {
    let reservations = Arc::new(Reservations::open(&config.dir)?);
    reservations.register(registry)?;
    let (_, missing) = configured_cells(&config)?;
    if !missing.is_empty() {
        tracing::warn!(cpus = ?missing, "agent.toml names CPUs that are not online here; they are left out");
    }
    let hypervisor: Arc<dyn Hypervisor> =
        Arc::new(Libvirt::new(&config.libvirt, config.virtualization, config.dir.clone()));
    let pool = Pool::new(config.pool.clone(), config.pool_policy.clone(), registry)?
        .with_known(config.dir.join("copy.json"));
    let instances = Instances::new(hypervisor.clone(), reservations.clone(), registry)?;
    let address = network.underlay()?.address;
    let migration_listen =
        config.migration_listen.unwrap_or_else(|| SocketAddr::new(address, MIGRATION_PORT));
    let settings = MigrationSettings {
        identity: shown,
        host: state.host(),
        listen: migration_listen,
        libvirt_uri: config.libvirt.clone(),
        folder: MIGRATIONS_FOLDER.into(),
    };
    let migrations = Migrations::new(settings, hypervisor.clone(), registry)?;
    let id = state.host();
    let processes = GuestProcesses::default();
    let drifts = Arc::new(Drifts::new(
        hypervisor.clone(),
        reservations.clone(),
        processes.clone(),
        config.memory_binding,
        registry,
    )?);
    let huge_pages = Arc::new(HugePages::new(reservations.clone(), processes.clone(), registry)?);
    let host = Arc::new(Host {
        id,
        config,
        instances,
        reservations: reservations.clone(),
        drifts: drifts.clone(),
        huge_pages,
        network,
        keeper,
        pool,
        migration_listen,
    });
    let reported = host.clone();
    let reporter = Arc::new(Reporter::new(state.clone(), Arc::new(move || reported.report())));
    let seen = reporter.clone();
    registry.register(Box::new(Locality::new(reservations, processes, Arc::new(move || seen.cells()))?))?;
    tokio::spawn(watch_drifts(host.clone(), reporter.clone()));
    watch_pool(&host.pool, reporter.clone(), events.clone())?;
    let told = reporter.clone();
    hypervisor.subscribe(Arc::new(move |_| told.mark_changed()));
    let moves = DiskMoves::default();
    let agent =
        Arc::new(Agent { host, hypervisor, migrations, moves, identity, state, reporter: reporter.clone() });
    let hearing = agent.clone();
    let calls = Calls::new(
        Arc::new(move |request, progress| agent.handle(request, progress)),
        Arc::new(move |request| hearing.hear(request)),
        registry,
    )?;
    Ok((calls, reporter))
}

/// Looks at the pool each second, and tells when its server stands still, answers again, or anything else changes.
fn watch_pool(pool: &Pool, reporter: Arc<Reporter>, events: Arc<Events>) -> io::Result<()> {
    let path = pool.path().to_owned();
    pool.watch(Arc::new(move |change| {
        let kind = match change {
            PoolChange::Stalled => Some(EventKind::PoolStalled),
            PoolChange::Back => Some(EventKind::PoolBack),
            PoolChange::Other => None,
        };
        if let Some(kind) = kind {
            events.push_pool(kind, &path);
        }
        reporter.mark_changed();
    }))
}

/// Looks from time to time whether guests are where they were reserved, and reports when that changes.
async fn watch_drifts(host: Arc<Host>, reporter: Arc<Reporter>) {
    let mut looks = tokio::time::interval(drift::LOOK_EVERY);
    looks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    for look in 0_u32.. {
        looks.tick().await;
        let (host, cells) = (host.clone(), reporter.cells());
        if cells.is_empty() {
            continue;
        }
        let check = move || {
            let elsewhere = match look % drift::ASK_EVERY {
                0 => host.drifts.check_all(&cells),
                _ => host.drifts.check_threads(&cells),
            };
            let now = host.capacity().map(|capacity| capacity.cells);
            now.is_ok_and(|now| host.huge_pages.look(&now, &cells)) || elsewhere
        };
        let changed = tokio::task::spawn_blocking(check).await;
        if changed.unwrap_or(false) {
            reporter.mark_changed();
        }
    }
}
