//! A model of hosts behind the agents' channel: what each holds, and one fault to come.

use crate::image_pools::ImagePools;
use godwit_protocol::disk::DiskAwaited;
use godwit_protocol::error::{ErrorKind, RequestError};
use godwit_protocol::event::AgentNote;
use godwit_protocol::frame;
use godwit_protocol::host::{
    Cell, Cpu, Heartbeat, HypervisorInfo, Inventory, PagePool, PoolReport, Underlay,
};
use godwit_protocol::id::{HostId, InstanceId, MigrationId, NetworkId};
use godwit_protocol::image::DiskFormat;
use godwit_protocol::instance::{InstanceReport, InstanceState};
use godwit_protocol::migration::{MigrationOutcome, TargetReady};
use godwit_protocol::network::NetworkReported;
use godwit_protocol::quic::{self, COORDINATOR_NAME, Identity};
use godwit_protocol::request::{AgentMessage, AgentReply, AgentRequest, Hello, HostReport, Welcome};
use godwit_protocol::reservation::{Refusal, Reservation, ReservePlan};
use quinn::{Connection, Endpoint, SendStream};
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;
use uuid::Uuid;

/// What one host holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Held {
    pub(crate) reservations: BTreeMap<InstanceId, Reservation>,
    /// What is held beside these.
    pub(crate) beside: BTreeMap<InstanceId, Reservation>,
    pub(crate) domains: BTreeMap<InstanceId, InstanceState>,
    pub(crate) networks: BTreeMap<NetworkId, u32>,
    pub(crate) prepared: BTreeSet<MigrationId>,
    /// The first generation of a report with the cells as they are; none: they never changed.
    pub(crate) cells_changed: Option<u64>,
}

/// An instance's disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Disk {
    pub(crate) size_bytes: u64,
    /// The size of the old one that is kept.
    pub(crate) old: Option<u64>,
}

/// How a request goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// It is refused, with no effect.
    Refused,
    /// It has its effect, and is answered with an error.
    Botched,
    /// The channel breaks before the effect.
    CutBefore,
    /// The channel breaks between the effect and the answer.
    CutAfter,
}

/// All hosts and the pool that they share.
#[derive(Debug, Default)]
pub(crate) struct World {
    pub(crate) hosts: BTreeMap<HostId, Held>,
    pub(crate) disks: BTreeMap<InstanceId, Disk>,
    /// Hosts with a pool of their own, and the disks in it.
    pub(crate) apart: BTreeMap<HostId, BTreeMap<InstanceId, Disk>>,
    /// Pools without the coordinator's images.
    pub(crate) images: ImagePools,
    /// Disks that are awaited: from whom, and by whom.
    awaited: BTreeMap<InstanceId, (HostId, HostId)>,
    /// What must never be and was: two hosts with one guest, a disk touched under a guest that runs.
    pub(crate) wrongs: Vec<String>,
    /// Names of the requests so far that change something.
    pub(crate) requests: Vec<&'static str>,
    /// Which of them goes wrong, and how.
    pub(crate) fault: Option<(usize, Fault)>,
    /// The name of a request of which the next goes wrong, with no effect.
    pub(crate) refuse_next: Option<&'static str>,
    /// The name of a request for a disk that takes until it is cancelled, as on a pool that stands still.
    pub(crate) endless: Option<&'static str>,
    /// Whose disks were cancelled.
    pub(crate) cancelled: BTreeSet<InstanceId>,
    /// Hosts that say nothing.
    pub(crate) silent: BTreeSet<HostId>,
    pub(crate) generation: u64,
}

/// How everybody holds it.
pub(crate) type SharedWorld = Arc<Mutex<World>>;

impl World {
    /// What is left anywhere, as text.
    pub(crate) fn leftovers(&self) -> Vec<String> {
        let held = self.hosts.iter().filter(|(_, held)| **held != Held::default());
        let mut left: Vec<String> = held.map(|(host, held)| format!("{host}: {held:?}")).collect();
        left.extend(self.disks.iter().map(|disk| format!("disk {disk:?}")));
        left.extend(self.apart.iter().filter(|(_, pool)| !pool.is_empty()).map(|pool| format!("{pool:?}")));
        left
    }

    /// Hosts on which an instance has vCPUs that run.
    pub(crate) fn runs_on(&self, instance: InstanceId) -> Vec<HostId> {
        let runs = |held: &Held| held.domains.get(&instance) == Some(&InstanceState::Running);
        self.hosts.iter().filter(|(_, held)| runs(held)).map(|(host, _)| *host).collect()
    }

    /// Whether a host gave one CPU to two instances.
    pub(crate) fn has_double_pin(&self) -> bool {
        self.hosts.values().any(|held| {
            let mut seen = BTreeSet::new();
            let all = held.reservations.values().chain(held.beside.values());
            all.flat_map(Reservation::pinned_cpus).any(|cpu| !seen.insert(cpu))
        })
    }

    fn due_fault(&mut self, request: &AgentRequest) -> Option<Fault> {
        let looks = matches!(
            request,
            AgentRequest::Report | AgentRequest::Console { .. } | AgentRequest::InstanceState(_)
        );
        if looks {
            return None;
        }
        self.requests.push(request.name());
        if self.refuse_next == Some(request.name()) {
            self.refuse_next = None;
            return Some(Fault::Refused);
        }
        let number = self.requests.len() - 1;
        match self.fault {
            Some((at, fault)) if at == number => self.fault.take().map(|_| fault),
            _ => None,
        }
    }

    fn report(&mut self, host: HostId) -> HostReport {
        self.generation += 1;
        let held = self.hosts.entry(host).or_default();
        let state = |(instance, state): (&InstanceId, &InstanceState)| InstanceReport {
            instance: *instance,
            state: *state,
        };
        HostReport {
            host,
            generation: self.generation,
            inventory: inventory(host, self.images.of.get(&host).copied()),
            instances: held.domains.iter().map(state).collect(),
            reservations: held.reservations.values().cloned().collect(),
            beside: held.beside.values().cloned().collect(),
            drifts: vec![],
            networks: held.networks.values().map(|vni| reported(*vni)).collect(),
        }
    }

    /// What a real agent does, in a model.
    fn act(&mut self, host: HostId, request: &AgentRequest) -> Result<AgentReply, RequestError> {
        use AgentRequest as R;
        let error = |kind, text: &str| Err(RequestError::new(kind, text));
        if let R::Migrate(source) = request {
            return self.migrate(host, source.instance, source.migration);
        }
        self.note_wrongs(host, request);
        let address = SocketAddr::new(vtep(host), 8777);
        if let Some(answer) =
            self.images.act(host, address, request).or_else(|| self.move_disk(host, request))
        {
            return answer;
        }
        let disks = self.apart.get_mut(&host).unwrap_or(&mut self.disks);
        let held = self.hosts.entry(host).or_default();
        match request {
            R::Reserve(ReservePlan { reservation, generation, beside }) => {
                let planned = *generation;
                if let Some(changed) = held.cells_changed.filter(|changed| planned < *changed) {
                    let refusal = Refusal::Stale { planned, changed: Some(changed) };
                    return Err(RequestError::refused("the cells have changed", refusal));
                }
                let own = |r: &&Reservation| r.instance == reservation.instance;
                let (now, next) = (held.reservations.values(), held.beside.values());
                let taken = now.filter(|r| *beside || !own(r)).chain(next.filter(|r| !*beside || !own(r)));
                let taken: BTreeSet<u32> = taken.flat_map(Reservation::pinned_cpus).collect();
                if reservation.pinned_cpus().any(|cpu| taken.contains(&cpu)) {
                    return error(ErrorKind::Refused, "the CPU is taken");
                }
                let table = if *beside { &mut held.beside } else { &mut held.reservations };
                table.insert(reservation.instance, reservation.clone());
            }
            R::Release(instance) => {
                held.reservations.remove(instance);
                held.beside.remove(instance);
            }
            R::Exchange(wanted) => {
                let now = held.reservations.get_mut(&wanted.instance);
                match (now, held.beside.get_mut(&wanted.instance)) {
                    (Some(now), _) if now == wanted => {}
                    (Some(now), Some(beside)) if beside == wanted => std::mem::swap(now, beside),
                    _ => return error(ErrorKind::Conflict, "there is nothing beside"),
                }
            }
            R::ReleaseBeside(instance) => drop(held.beside.remove(instance)),
            R::CreateDisk(disk) => {
                let made = Disk { size_bytes: disk.size_bytes, old: None };
                disks.entry(disk.instance).or_insert(made);
                return Ok(AgentReply::Disk { format: DiskFormat::Qcow2 });
            }
            R::GrowDisk(disk) => {
                let Some(is) = disks.get_mut(&disk.instance) else {
                    return error(ErrorKind::NotFound, "no such disk");
                };
                is.old = is.old.or(Some(is.size_bytes));
                is.size_bytes = is.size_bytes.max(disk.size_bytes);
            }
            R::RestoreDisk(instance) => {
                if let Some(disk) = disks.get_mut(instance) {
                    disk.size_bytes = disk.old.take().unwrap_or(disk.size_bytes);
                }
            }
            R::DropOldDisk(instance) => {
                if let Some(disk) = disks.get_mut(instance) {
                    disk.old = None;
                }
            }
            R::DeleteDisk(instance) | R::LeaveDisk(instance) => drop(disks.remove(instance)),
            R::EnsureNetwork(wanted) => drop(held.networks.insert(wanted.network, wanted.vni)),
            R::RemoveNetwork { vni, .. } => held.networks.retain(|_, number| number != vni),
            R::DefineInstance(spec) => {
                if held.reservations.get(&spec.instance) != Some(&spec.reservation) {
                    return error(ErrorKind::Conflict, "it holds no such reservation");
                }
                held.domains.entry(spec.instance).or_insert(InstanceState::Stopped);
            }
            R::StartInstance(instance) | R::RebootInstance { instance, .. } => {
                match held.domains.get_mut(instance) {
                    Some(state) => *state = InstanceState::Running,
                    None => return error(ErrorKind::NotFound, "no such domain"),
                }
            }
            R::StopInstance { instance, .. } => {
                if let Some(state) = held.domains.get_mut(instance) {
                    *state = InstanceState::Stopped;
                }
            }
            R::PauseInstance { instance, paused } => {
                let next = if *paused { InstanceState::Paused } else { InstanceState::Running };
                held.domains.insert(*instance, next);
            }
            R::RemoveInstance(instance) => drop(held.domains.remove(instance)),
            R::PrepareMigration(target) => {
                held.prepared.insert(target.migration);
                return Ok(AgentReply::TargetReady(Box::new(ready(host))));
            }
            R::DiscardMigration { migration, .. } => drop(held.prepared.remove(migration)),
            R::InstanceState(instance) => {
                return Ok(AgentReply::State(held.domains.get(instance).copied()));
            }
            R::Report => return Ok(AgentReply::Report(Box::new(self.report(host)))),
            R::CancelDisk(instance) => drop(self.cancelled.insert(*instance)),
            R::MarkDisk(_) | R::AwaitDisk(_) | R::SendDisk(_) => {}
            R::FindImage(_)
            | R::AwaitImage(_)
            | R::SendImage(_)
            | R::SettleImage(_)
            | R::DropImage { .. } => {}
            R::CancelMigration(_) | R::Console { .. } | R::Migrate(_) | R::TakeCertificate(_) => {}
        }
        Ok(AgentReply::Done)
    }

    fn pool(&mut self, host: HostId) -> &mut BTreeMap<InstanceId, Disk> {
        self.apart.get_mut(&host).unwrap_or(&mut self.disks)
    }

    /// An instance's disk as a host sees it.
    pub(crate) fn disk(&self, host: HostId, instance: InstanceId) -> Option<Disk> {
        self.apart.get(&host).unwrap_or(&self.disks).get(&instance).copied()
    }

    /// What moves a disk from pool to pool; none for all else.
    fn move_disk(
        &mut self,
        host: HostId,
        request: &AgentRequest,
    ) -> Option<Result<AgentReply, RequestError>> {
        let error = |kind, text: &str| Some(Err(RequestError::new(kind, text)));
        match request {
            AgentRequest::MarkDisk(mark) => match self.pool(host).contains_key(&mark.instance) {
                true => Some(Ok(AgentReply::DiskMarked { used_bytes: 1, base: None })),
                false => error(ErrorKind::NotFound, "no such disk"),
            },
            AgentRequest::AwaitDisk(arrival) => {
                if !self.apart.contains_key(&host) && !self.apart.contains_key(&arrival.source) {
                    return Some(Ok(AgentReply::DiskHere));
                }
                self.awaited.insert(arrival.instance, (arrival.source, host));
                let address = SocketAddr::new(vtep(host), 8777);
                let awaited = DiskAwaited { address, target: host, token: "token".into() };
                Some(Ok(AgentReply::DiskAwaited(awaited)))
            }
            AgentRequest::SendDisk(departure) => {
                let (instance, target) = (departure.instance, departure.awaited.target);
                if self.awaited.remove(&instance) != Some((host, target)) {
                    return error(ErrorKind::Unavailable, "nobody waits for it");
                }
                let Some(disk) = self.pool(host).get(&instance).copied() else {
                    return error(ErrorKind::NotFound, "no such disk");
                };
                self.pool(target).insert(instance, disk);
                Some(Ok(AgentReply::Done))
            }
            _ => None,
        }
    }

    /// Looks for what no host may be asked.
    fn note_wrongs(&mut self, host: HostId, request: &AgentRequest) {
        use AgentRequest as R;
        let (instance, elsewhere_only) = match request {
            R::StartInstance(instance) => (*instance, true),
            R::GrowDisk(disk) => (disk.instance, false),
            R::RestoreDisk(instance) => (*instance, false),
            _ => return,
        };
        let running = self.runs_on(instance);
        if running.iter().any(|on| !elsewhere_only || *on != host) {
            self.wrongs.push(format!("{} on {host} while {instance} runs on {running:?}", request.name()));
        }
    }

    fn migrate(
        &mut self,
        source: HostId,
        instance: InstanceId,
        migration: MigrationId,
    ) -> Result<AgentReply, RequestError> {
        let missing = |text: &str| Err(RequestError::new(ErrorKind::NotFound, text));
        let Some(target) = self.hosts.iter().find(|(_, h)| h.prepared.contains(&migration)).map(|(h, _)| *h)
        else {
            return Err(RequestError::new(ErrorKind::Internal, "no target waits for it"));
        };
        let Some(state) = self.hosts.get_mut(&source).and_then(|held| held.domains.remove(&instance)) else {
            return missing("no such domain");
        };
        self.hosts.entry(target).or_default().domains.insert(instance, state);
        Ok(AgentReply::Migrated(MigrationOutcome { total_ms: 1, ..Default::default() }))
    }
}

/// Two cells of two CPUs and 4 GiB.
fn inventory(host: HostId, mark: Option<Uuid>) -> Inventory {
    let cpu = |id| Cpu { id, package: 0, die: 0, core: i64::from(id), siblings: vec![id], ..Cpu::default() };
    let cell = |id: u32| Cell {
        id,
        cpus: vec![cpu(2 * id), cpu(2 * id + 1)],
        memory_bytes: 4 << 30,
        page_pools: vec![PagePool { size_kib: 4, total: 1 << 20, taken: 0 }],
        distances: BTreeMap::new(),
        shared_cpus: vec![2 * id, 2 * id + 1],
        dedicated_cpus: vec![2 * id, 2 * id + 1],
    };
    Inventory {
        hostname: format!("model-{}", host.short()),
        agent_version: "model".into(),
        kernel: "model".into(),
        architecture: "x86_64".into(),
        cpu_model: String::new(),
        hypervisor: HypervisorInfo {
            kind: "QEMU".into(),
            libvirt_version: "11.3.0".into(),
            version: "10.0.2".into(),
            kvm: false,
        },
        cells: vec![cell(0), cell(1)],
        reserved_memory_bytes: 0,
        links: vec![],
        underlay: Underlay { link: "eth0".into(), address: vtep(host), mtu: 1500 },
        migration_address: None,
        physical_networks: vec![],
        pools: vec![PoolReport {
            name: "default".into(),
            path: "/srv/godwit".into(),
            total_bytes: 1 << 40,
            free_bytes: 1 << 40,
            reachable: true,
            mark,
            ..PoolReport::default()
        }],
    }
}

fn vtep(host: HostId) -> IpAddr {
    let [.., a, b] = *host.0.as_bytes();
    IpAddr::V4(Ipv4Addr::new(198, 18, a, b))
}

fn reported(vni: u32) -> NetworkReported {
    NetworkReported { vni, generation: None, forwarding: vec![], flood: vec![], group_ttl: None }
}

fn ready(host: HostId) -> TargetReady {
    TargetReady {
        address: SocketAddr::new(vtep(host), 8776),
        server_name: quic::host_name(host),
        domain_xml: "<domain/>".into(),
        stream_token: "token".into(),
    }
}

/// Locks the world; a panic elsewhere has ended the test already.
pub(crate) fn lock(world: &SharedWorld) -> MutexGuard<'_, World> {
    world.lock().unwrap()
}

/// An agent's life: connects, again and again, and answers from the model.
pub(crate) async fn serve(host: HostId, identity: Identity, coordinator: SocketAddr, world: SharedWorld) {
    let mut endpoint = Endpoint::client(SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
    endpoint.set_default_client_config(identity.quic_client().unwrap());
    loop {
        if let Ok(connecting) = endpoint.connect(coordinator, COORDINATOR_NAME)
            && let Ok(connection) = connecting.await
        {
            let _ = converse(host, &connection, &world).await;
            connection.close(0_u32.into(), b"");
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn converse(
    host: HostId,
    connection: &Connection,
    world: &SharedWorld,
) -> Result<(), quic::ChannelError> {
    let (mut send, mut receive) = connection.open_bi().await?;
    quic::send(&mut send, &Hello { versions: vec![godwit_protocol::VERSION], host }).await?;
    let welcome: Welcome = quic::receive(&mut receive).await?;
    assert!(matches!(welcome, Welcome::Accepted { .. }), "{welcome:?}");
    let mut beat = tokio::time::interval(Duration::from_millis(50));
    let mut reported = String::new();
    let mut hanging = Vec::new();
    loop {
        tokio::select! {
            _ = beat.tick() => {
                if lock(world).silent.contains(&host) {
                    continue;
                }
                let (held, report) = {
                    let mut world = lock(world);
                    let told = format!("{:?} {:?}", world.hosts.get(&host), world.images.of.get(&host));
                    (told, world.report(host))
                };
                let heartbeat = Heartbeat { host, generation: 0, inventory_digest: 0 };
                let _ = connection.send_datagram(frame_body(&heartbeat).into());
                if held != reported {
                    let mut stream = connection.open_uni().await?;
                    quic::send(&mut stream, &AgentNote::Report(Box::new(report))).await?;
                    let _ = stream.finish();
                    reported = held;
                }
            }
            stream = connection.accept_bi() => {
                let (mut send, mut receive) = stream?;
                let request: AgentRequest = quic::receive(&mut receive).await?;
                if let Some(instance) = endless(&request, world) {
                    tokio::spawn(answer_when_cancelled(instance, send, world.clone()));
                    continue;
                }
                if lock(world).images.hangs(host, &request) {
                    // Its stream stays open.
                    hanging.push((send, receive));
                    continue;
                }
                let Some(answer) = answer(host, &request, world) else { return Ok(()) };
                quic::send(&mut send, &AgentMessage::Finished(answer)).await?;
                let _ = send.finish();
            }
        }
    }
}

fn frame_body(heartbeat: &Heartbeat) -> Vec<u8> {
    frame::encode(heartbeat).unwrap().split_off(frame::HEADER_BYTES)
}

/// Whose disk it is that a request will not end to make.
fn endless(request: &AgentRequest, world: &SharedWorld) -> Option<InstanceId> {
    let mut world = lock(world);
    let instance = match request {
        AgentRequest::CreateDisk(disk) => disk.instance,
        AgentRequest::GrowDisk(disk) => disk.instance,
        _ => return None,
    };
    let endless = world.endless == Some(request.name());
    endless.then(|| world.requests.push(request.name()))?;
    Some(instance)
}

async fn answer_when_cancelled(instance: InstanceId, mut send: SendStream, world: SharedWorld) {
    while !lock(&world).cancelled.contains(&instance) {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let answer = Err(RequestError::new(ErrorKind::Cancelled, "cancelled"));
    let _ = quic::send(&mut send, &AgentMessage::Finished(answer)).await;
    let _ = send.finish();
}

/// The model's answer; none: the channel breaks.
fn answer(
    host: HostId,
    request: &AgentRequest,
    world: &SharedWorld,
) -> Option<Result<AgentReply, RequestError>> {
    let mut world = lock(world);
    let failed = || Some(Err(RequestError::new(ErrorKind::Internal, "a fault of the test's making")));
    match world.due_fault(request) {
        None => Some(world.act(host, request)),
        Some(Fault::Refused) => failed(),
        Some(Fault::Botched) => {
            let _ = world.act(host, request);
            failed()
        }
        Some(Fault::CutBefore) => None,
        Some(Fault::CutAfter) => {
            let _ = world.act(host, request);
            None
        }
    }
}
