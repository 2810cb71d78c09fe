//! Fleets of one kind of host, filled with a mix of flavors, and placements on them.

use std::cell::{Cell as Slot, RefCell};
use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use godwit_coordinator::config::Config;
use godwit_coordinator::fleet::host::{Host, Observed};
use godwit_coordinator::fleet::instance::{Flavor, Instance, InstanceStatus};
use godwit_coordinator::fleet::{Change, Fleet};
use godwit_coordinator::ledger::{Ledger, now};
use godwit_coordinator::operations::StepError;
use godwit_coordinator::operations::place::{Wish, choice, choose, limits, request, why_not};
use godwit_coordinator::placement::find;
use godwit_protocol::host::{Cell, Cpu, HypervisorInfo, Inventory, PagePool, PoolReport, Underlay};
use godwit_protocol::id::{HostId, ImageId, InstanceId, ProjectId, UserId};
use godwit_protocol::image::{DiskFormat, ImageSource};
use godwit_protocol::instance::InstanceState;
use serde_json::{Value, json};
use uuid::Uuid;

use crate::{cases, check};

/// CPUs of a host, whatever its cells.
const CPUS: u32 = 64;
/// Memory of a host, whatever its cells.
const MEMORY_GIB: u64 = 256;
/// Requests under way at once while placements are made durable.
const CLIENTS: usize = 64;

/// How large a fleet is, and how full.
#[derive(Clone, Copy)]
pub(crate) struct Size {
    pub(crate) hosts: u64,
    pub(crate) cells: u32,
    /// Of the CPUs to pin.
    pub(crate) fill_percent: u64,
}

/// A fleet and what is placed on it.
struct Bed {
    fleet: Fleet,
    config: Config,
    flavors: Vec<Flavor>,
    /// Flavors for which there was no room once; they are left out from then on.
    exhausted: Vec<bool>,
    placed: Vec<InstanceId>,
    dice: Dice,
    made: u128,
}

/// Numbers that look random and are the same each time (Marsaglia's xorshift).
struct Dice(u64);

impl Dice {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % bound.max(1) as u64) as usize
    }
}

/// Placements in memory: the choice and the change of the records count.
pub(crate) fn in_memory(size: Size, placements: u64) -> Result<Value, String> {
    let mut bed = Bed::filled(size)?;
    let mut times = Vec::new();
    while (times.len() as u64) < placements {
        let instance = bed.wanted()?;
        let started = Instant::now();
        let chosen = choose(&bed.fleet, &bed.config, &Wish::of(&instance, None, &[]));
        let Some(placed) = bed.settled(instance, chosen)? else { continue };
        let id = placed.id;
        bed.fleet.apply(placed.into());
        times.push(started.elapsed());
        bed.placed.push(id);
        if let Some(gone) = bed.one_to_go() {
            bed.fleet.apply(gone);
        }
    }
    check::fleet(&bed.fleet)?;
    let busy = times.iter().sum::<Duration>();
    Ok(report(&bed, &mut times, busy))
}

/// The same with each placement on disk before it counts; several wait for one commit.
pub(crate) fn durable(size: Size, placements: u64, folder: &Path) -> Result<Value, String> {
    let mut bed = Bed::filled(size)?;
    let ledger = Ledger::open(&folder.join("state.db")).map_err(|error| error.to_string())?;
    let fleet = std::mem::take(&mut bed.fleet);
    ledger.observe(|records| *records = fleet);
    let runtime = tokio::runtime::Builder::new_current_thread().build().map_err(|error| error.to_string())?;
    let bed = RefCell::new(bed);
    let (times, left) = (RefCell::new(Vec::new()), Slot::new(placements));
    let client = || async {
        let config = bed.borrow().config.clone();
        while left.get() > 0 {
            left.set(left.get() - 1);
            let instance = bed.borrow_mut().wanted()?;
            let gone = bed.borrow_mut().one_to_go();
            let started = Instant::now();
            let placed = ledger.change(|fleet| {
                let (host, reservation) = choose(fleet, &config, &Wish::of(&instance, None, &[]))?;
                let placed =
                    Instance { host: Some(host), reservation: Some(reservation), ..instance.clone() };
                let changes = gone.clone().into_iter().chain([placed.into()]).collect();
                Ok::<_, StepError>((changes, instance.id))
            });
            match placed.await {
                Ok(id) => {
                    times.borrow_mut().push(started.elapsed());
                    bed.borrow_mut().placed.push(id);
                }
                Err(StepError::NoRoom(sought)) => {
                    // The explanation is part of what others wait for.
                    why_not(&ledger, &config, &sought).await.map_err(|error| error.to_string())?;
                    bed.borrow_mut().exhaust(&instance);
                    left.set(left.get() + 1);
                }
                Err(error) => return Err(error.to_string()),
            }
        }
        Ok::<_, String>(())
    };
    let started = Instant::now();
    runtime.block_on(async {
        let clients: Vec<_> = (0..CLIENTS).map(|_| client()).collect();
        all(clients).await
    })?;
    let wall = started.elapsed();
    let times = &mut times.borrow_mut();
    let mut bed = bed.into_inner();
    ledger.observe(|records| std::mem::swap(records, &mut bed.fleet));
    check::fleet(&bed.fleet)?;
    Ok(report(&bed, times, wall))
}

/// Runs futures together on one thread until all are done or one has failed.
async fn all<F: Future<Output = Result<(), String>>>(clients: Vec<F>) -> Result<(), String> {
    let mut clients: Vec<_> = clients.into_iter().map(|client| Some(Box::pin(client))).collect();
    std::future::poll_fn(|context| {
        for client in &mut clients {
            let Some(running) = client else { continue };
            match running.as_mut().poll(context) {
                std::task::Poll::Ready(Ok(())) => *client = None,
                std::task::Poll::Ready(Err(error)) => return std::task::Poll::Ready(Err(error)),
                std::task::Poll::Pending => {}
            }
        }
        if clients.iter().all(Option::is_none) {
            std::task::Poll::Ready(Ok(()))
        } else {
            std::task::Poll::Pending
        }
    })
    .await
}

/// Hosts as they are when filled, and the guests of all flavors that have cells, in the vectors' form.
pub(crate) fn dump(size: Size) -> Result<Value, String> {
    let bed = Bed::filled(size)?;
    let hosts: Vec<Value> = bed.fleet.roster().views().map(|host| cases::host_json(&host.cells)).collect();
    let guests = bed.flavors.iter().filter_map(|flavor| request(&instance(flavor, 0)).ok()?.guest);
    let guests: Vec<Value> = guests.map(|guest| cases::guest_json(&guest)).collect();
    let limits = limits(&bed.config);
    Ok(json!({
        "hosts": hosts,
        "guests": guests,
        "limits": { "cpu_allocation_ratio": limits.cpu_ratio, "ram_allocation_ratio": limits.memory_ratio },
    }))
}

fn report(bed: &Bed, times: &mut [Duration], busy: Duration) -> Value {
    times.sort_unstable();
    let p99 = times.get(times.len() * 99 / 100).or(times.last()).copied().unwrap_or_default();
    json!({
        "placements": times.len(),
        "placements_per_s": times.len() as f64 / busy.as_secs_f64().max(1e-9),
        "p99_us": p99.as_secs_f64() * 1e6,
        "rss_mb": rss_mb(),
        "instances": bed.fleet.instances.len(),
    })
}

/// This process's resident memory (proc_pid_status(5)), in units of 1000 kB.
fn rss_mb() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<f64>().ok());
    kib.unwrap_or(0.0) * 1024.0 / 1e6
}

impl Bed {
    fn filled(size: Size) -> Result<Self, String> {
        if !matches!(size.cells, 1..=16) || !CPUS.is_multiple_of(size.cells) || size.hosts == 0 {
            return Err("hosts have 1, 2, 4, 8 or 16 cells, and there is at least one host".to_owned());
        }
        let config = json!({
            "url": "https://127.0.0.1", "listen": "127.0.0.1:1", "agents_listen": "127.0.0.1:2", "pool": "/",
            // A measurement is shorter than the time after which these hosts would be late.
            "heartbeat_ms": 60_000,
        });
        let config: Config = serde_json::from_value(config).map_err(|error| error.to_string())?;
        let mut fleet = Fleet::default();
        fleet.set_limits(limits(&config));
        let inventory = inventory(size.cells);
        for number in 1..=size.hosts {
            let host = host(number, &inventory);
            fleet.observed.insert(host.id, Observed::at(now()));
            fleet
                .load("hosts", &serde_json::to_string(&host).map_err(|error| error.to_string())?)
                .map_err(|error| error.to_string())?;
        }
        fleet.seat_all();
        let flavors = flavors(size.cells);
        let exhausted = vec![false; flavors.len()];
        let mut bed = Self {
            fleet,
            config,
            flavors,
            exhausted,
            placed: Vec::new(),
            dice: Dice(0x9e37_79b9_7f4a_7c15),
            made: 0,
        };
        bed.fill(size)?;
        Ok(bed)
    }

    /// Places until so much of what can be pinned is pinned.
    fn fill(&mut self, size: Size) -> Result<(), String> {
        let wanted = size.hosts * u64::from(CPUS * 3 / 4) * size.fill_percent / 100;
        let choice = choice(&self.config);
        let mut pinned = 0;
        while pinned < wanted {
            let instance = self.wanted()?;
            let request = request(&instance).map_err(|error| error.to_string())?;
            let Some(placement) = find(self.fleet.roster(), &request, &choice, |_| true) else {
                self.exhaust(&instance);
                continue;
            };
            let reservation = placement.reservation(instance.id);
            pinned += reservation.pinned_cpus().count() as u64;
            self.placed.push(instance.id);
            let placed = Instance { host: Some(placement.host), reservation: Some(reservation), ..instance };
            self.fleet.apply(placed.into());
        }
        Ok(())
    }

    /// The next instance to place, of a flavor that there is room for as far as is known.
    fn wanted(&mut self) -> Result<Instance, String> {
        let open: Vec<usize> = (0..self.flavors.len()).filter(|&at| !self.exhausted[at]).collect();
        if open.is_empty() {
            return Err("no flavor has room any more".to_owned());
        }
        let flavor = open[self.dice.below(open.len())];
        self.made += 1;
        Ok(instance(&self.flavors[flavor], self.made))
    }

    fn exhaust(&mut self, instance: &Instance) {
        if let Some(at) = self.flavors.iter().position(|flavor| flavor.id == instance.flavor.id) {
            self.exhausted[at] = true;
        }
    }

    fn settled(
        &mut self,
        instance: Instance,
        chosen: Result<(HostId, godwit_protocol::reservation::Reservation), StepError>,
    ) -> Result<Option<Instance>, String> {
        match chosen {
            Ok((host, reservation)) => {
                Ok(Some(Instance { host: Some(host), reservation: Some(reservation), ..instance }))
            }
            Err(StepError::NoRoom(_)) => {
                self.exhaust(&instance);
                Ok(None)
            }
            Err(error) => Err(error.to_string()),
        }
    }

    /// Some instance leaves for one that comes, so that the fleet stays as full as it is.
    fn one_to_go(&mut self) -> Option<Change> {
        if self.placed.len() < 2 {
            return None;
        }
        let at = self.dice.below(self.placed.len());
        let id = self.placed.swap_remove(at);
        Some(Change::Gone("instances", id.to_string()))
    }
}

/// vCPUs, memory in GiB, extra specs.
type Mix = (u32, u64, Vec<(&'static str, &'static str)>);

fn flavors(cells: u32) -> Vec<Flavor> {
    let mut flavors: Vec<Mix> = vec![
        (1, 2, vec![]),
        (4, 8, vec![]),
        (2, 4, vec![("hw:numa_nodes", "1")]),
        (2, 4, vec![("hw:cpu_policy", "dedicated")]),
        (4, 8, vec![("hw:cpu_policy", "dedicated"), ("hw:cpu_thread_policy", "require")]),
        (3, 4, vec![("hw:cpu_policy", "dedicated"), ("hw:emulator_threads_policy", "isolate")]),
        (2, 4, vec![("hw:cpu_policy", "dedicated"), ("hw:mem_page_size", "2MB")]),
        (4, 4, vec![("hw:cpu_policy", "mixed"), ("hw:cpu_dedicated_mask", "0-1")]),
    ];
    if cells > 1 {
        flavors.push((4, 4, vec![("hw:cpu_policy", "dedicated"), ("hw:numa_nodes", "2")]));
        flavors.push((
            4,
            4,
            vec![("hw:cpu_policy", "dedicated"), ("hw:numa_nodes", "2"), ("hw:mem_page_size", "large")],
        ));
    }
    let flavor = |(at, (vcpus, memory_gib, specs)): (usize, Mix)| Flavor {
        id: at.to_string(),
        name: format!("f{at}"),
        vcpus,
        memory_mib: memory_gib << 10,
        disk_gib: 1,
        public: true,
        extra_specs: specs.into_iter().map(|(key, value)| (key.to_owned(), value.to_owned())).collect(),
        description: None,
    };
    flavors.into_iter().enumerate().map(flavor).collect()
}

fn instance(flavor: &Flavor, number: u128) -> Instance {
    let id = InstanceId(Uuid::from_u128(0xb << 120 | number.wrapping_mul(0x9e37_79b9_7f4a_7c15)));
    Instance {
        security_groups: Vec::new(),
        id,
        name: format!("server-{number}"),
        description: None,
        project: ProjectId(Uuid::nil()),
        user: UserId(Uuid::nil()),
        flavor: flavor.clone().into(),
        image: ImageSource {
            image: ImageId(Uuid::nil()),
            format: DiskFormat::Qcow2,
            size_bytes: 1 << 24,
            virtual_size_bytes: 1 << 30,
        },
        image_properties: BTreeMap::new(),
        disk_bytes: 1 << 30,
        disk_format: Some(DiskFormat::Qcow2),
        topology: None,
        nics: vec![],
        key: None,
        metadata: BTreeMap::new(),
        user_data: None,
        wanted_host: None,
        wanted_zone: None,
        hints: Default::default(),
        refused_by: vec![],
        status: InstanceStatus::Active,
        task: None,
        fault: None,
        host: None,
        reservation: None,
        power: Some(InstanceState::Running),
        delete_wanted: false,
        created_at: now(),
        updated_at: now(),
        launched_at: None,
    }
}

fn host(number: u64, inventory: &Inventory) -> Host {
    let name = format!("h{number:05}");
    Host {
        id: HostId(Uuid::from_u128(0xa << 120 | u128::from(number))),
        number,
        name: name.clone(),
        enabled: true,
        disabled_reason: None,
        drain: None,
        inventory: Some(Inventory { hostname: name, ..inventory.clone() }),
        joined_at: now(),
        key_digest: String::new(),
    }
}

/// A host of two threads a core, a quarter of its CPUs shared, a quarter of its memory in pages of 2 MiB.
fn inventory(cells: u32) -> Inventory {
    let per_cell = CPUS / cells;
    let memory_kib = MEMORY_GIB * (1 << 20) / u64::from(cells);
    let cell = |id: u32| {
        let first = id * per_cell;
        let cpu = |cpu: u32| Cpu {
            id: cpu,
            package: i64::from(id / 4),
            die: 0,
            core: i64::from(cpu / 2),
            siblings: vec![cpu & !1, cpu | 1],
            ..Cpu::default()
        };
        let far = |to: u32| {
            if to == id {
                10
            } else if to / 4 == id / 4 {
                12
            } else {
                32
            }
        };
        Cell {
            id,
            cpus: (first..first + per_cell).map(cpu).collect(),
            memory_bytes: memory_kib * 1024,
            page_pools: vec![
                PagePool { size_kib: 4, total: memory_kib / 4 * 3 / 4, taken: 0 },
                PagePool { size_kib: 2048, total: memory_kib / 4 / 2048, taken: 0 },
            ],
            distances: (0..cells).map(|to| (to, far(to))).collect(),
            shared_cpus: (first..first + per_cell / 4).collect(),
            dedicated_cpus: (first + per_cell / 4..first + per_cell).collect(),
        }
    };
    Inventory {
        physical_networks: Vec::new(),
        hostname: String::new(),
        agent_version: String::new(),
        kernel: String::new(),
        architecture: "x86_64".to_owned(),
        cpu_model: "One model".to_owned(),
        hypervisor: HypervisorInfo {
            kind: "QEMU".to_owned(),
            libvirt_version: String::new(),
            version: String::new(),
            kvm: true,
        },
        cells: (0..cells).map(cell).collect(),
        reserved_memory_bytes: 4 << 30,
        links: Vec::new(),
        underlay: Underlay { link: "eth0".to_owned(), address: [127, 0, 0, 1].into(), mtu: 9000 },
        migration_address: None,
        pools: vec![PoolReport {
            name: "pool".to_owned(),
            path: "/".to_owned(),
            total_bytes: 1 << 50,
            free_bytes: 1 << 49,
            reachable: true,
            ..Default::default()
        }],
    }
}
