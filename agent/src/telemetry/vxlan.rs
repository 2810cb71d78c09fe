//! VXLAN traffic on the underlay link, by network, direction and class.

mod collector;
#[cfg(test)]
mod tests;

pub use collector::VxlanCollector;

use super::TelemetryError;
use super::attachment::Place;
use super::batch;
use super::pins::{Content, Earlier, Layout, Pins};
use super::shared::{self, Capacity, Version, layout, take_map};
use aya::maps::{MapData, MapType, PerCpuArray, PerCpuHashMap};
use aya::programs::ProgramError;
use aya::programs::tc::{SchedClassifier, TcAttachType};
use aya::{Ebpf, include_bytes_aligned};
use godwit_ebpf_common::underlay::{
    CARRY_TRAFFIC_PROGRAM, Class, Direction, EGRESS_PROGRAM, INGRESS_PROGRAM, KNOWN_ONLY_GLOBAL, OTHER_MAP,
    Other, PORT_GLOBAL, STALE_ENTRIES, STALE_MAP, Stale, TRAFFIC_MAP, Traffic, TrafficKey,
};
use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv6Addr};
use std::path::Path;
use std::time::Duration;

/// The programs, as agent/build.rs built them.
pub(super) static OBJECT: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/underlay"));

const TRAFFIC_PIN: &str = "underlay_traffic";
const OTHER_PIN: &str = "underlay_other";
const STALE_PIN: &str = "underlay_stale";

/// How to count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// UDP destination port of VXLAN.
    pub port: u16,
    /// Whether packets for networks that the agent was not told of are strangers rather than counted by network.
    pub known_only: bool,
    /// Most entries of each map.
    pub capacity: Capacity,
}

impl Default for Options {
    /// RFC 7348's port; every network is counted.
    fn default() -> Self {
        Self { port: 4789, known_only: false, capacity: Capacity::default() }
    }
}

/// What was counted of one network, one way, for one class of destinations, since the map was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sample {
    /// VXLAN network identifier.
    pub vni: u32,
    /// Received or sent by this host.
    pub direction: Direction,
    /// Whom the inner destination address is.
    pub class: Class,
    /// The VTEP at the other end, or the group that it goes to.
    pub peer: IpAddr,
    /// Packets on the wire, every segment of an offloaded one counted.
    pub packets: u64,
    /// Their bytes, from the outer Ethernet header on.
    pub bytes: u64,
}

/// What a program itself costs, since this agent loaded it. The kernel counts only while
/// `kernel.bpf_stats_enabled` is set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cost {
    /// Its name.
    pub program: &'static str,
    /// Packets it has seen, as the kernel handed them over.
    pub runs: u64,
    /// Time spent in it, all CPUs together.
    pub time: Duration,
}

/// The program `underlay` on one link. Dropping it leaves everything attached and counting; see
/// [`Self::remove`].
pub struct VxlanTelemetry {
    link: String,
    pins: Pins,
    ebpf: Ebpf,
    traffic: PerCpuHashMap<MapData, TrafficKey, Traffic>,
    /// With those that are read along.
    other: Vec<PerCpuArray<MapData, u64>>,
    stale: Vec<PerCpuHashMap<MapData, u32, Stale>>,
}

impl VxlanTelemetry {
    /// Counts what passes on `link`, with everything pinned under `<bpffs>/godwit`.
    ///
    /// What an agent before has pinned there is adopted: its counts go on, and its programs are replaced
    /// atomically. A map of another layout or size is made anew, and an attachment to another link is moved;
    /// both are logged.
    ///
    /// # Errors
    /// There is no such link or no BPF file system, or the kernel refuses; what was attached before goes on.
    pub fn ensure(link: &str, bpffs: &Path, options: Options) -> Result<Self, TelemetryError> {
        let mut this = Self::open(link, bpffs, options)?;
        this.adopt()?;
        Ok(this)
    }

    /// The same, but that the programs of an agent before go on until [`super::plane::DataPlane::adopt`], when these
    /// know what they need to.
    ///
    /// # Errors
    /// See [`Self::ensure`].
    pub fn open(link: &str, bpffs: &Path, options: Options) -> Result<Self, TelemetryError> {
        Self::open_version(link, bpffs, options, &Version::OURS)
    }

    pub(super) fn open_version(
        link: &str,
        bpffs: &Path,
        options: Options,
        version: &Version,
    ) -> Result<Self, TelemetryError> {
        if nix::net::if_::if_nametoindex(link).is_err() {
            return Err(TelemetryError::NoLink { link: link.to_owned() });
        }
        let pins = Pins::open(bpffs)?;
        let entries = options.capacity.traffic;
        for (pin, layout) in layouts(entries) {
            pins.make_way(pin, &layout)?;
        }
        let known_only = u8::from(options.known_only);
        let mut ebpf = shared::loader(&pins, &options.capacity, version)?
            .map_pin_path(TRAFFIC_MAP, pins.path(TRAFFIC_PIN))
            .map_pin_path(OTHER_MAP, pins.path(OTHER_PIN))
            .map_pin_path(STALE_MAP, pins.path(STALE_PIN))
            .map_max_entries(TRAFFIC_MAP, entries)
            .override_global(PORT_GLOBAL, &options.port, true)
            .override_global(KNOWN_ONLY_GLOBAL, &known_only, true)
            .load(&version.underlay)
            .map_err(|error| TelemetryError::Object(Box::new(error)))?;
        shared::carry_tables(&pins)?;
        let traffic = take_map(&mut ebpf, TRAFFIC_MAP)?;
        let mut other = vec![take_map(&mut ebpf, OTHER_MAP)?];
        other.extend(shared::read_along(&pins, OTHER_PIN, OTHER_MAP)?);
        let mut stale = vec![take_map(&mut ebpf, STALE_MAP)?];
        stale.extend(shared::read_along(&pins, STALE_PIN, STALE_MAP)?);
        for direction in Direction::ALL {
            // Both before either is attached: a kernel that refuses one must not be left with the other.
            let loaded = program_mut(&mut ebpf, direction)?.load();
            loaded.map_err(|source| program_error(direction, "loaded", source))?;
        }
        let mut this = Self { link: link.to_owned(), pins, ebpf, traffic, other, stale };
        if Direction::ALL.iter().all(|direction| !this.pins.path(program_name(*direction)).exists()) {
            // Nobody counts yet.
            this.attach()?;
        }
        Ok(this)
    }

    /// Puts the programs in their places, in that of others where there are some.
    pub(super) fn attach(&mut self) -> Result<(), TelemetryError> {
        for direction in Direction::ALL {
            place(direction, &self.link).ensure(program_mut(&mut self.ebpf, direction)?, &self.pins)?;
        }
        Ok(())
    }

    /// Takes over from an earlier agent: its programs are replaced, and what they have counted in a map of another
    /// layout is added.
    ///
    /// # Errors
    /// The kernel refuses; what the earlier agent has attached goes on.
    pub fn adopt(&mut self) -> Result<(), TelemetryError> {
        self.attach()?;
        let carrier = &*shared::program_mut(&mut self.ebpf, CARRY_TRAFFIC_PROGRAM)?;
        let drain = |layout: &str, old| match layout {
            TRAFFIC_V1 => shared::drain(old, TRAFFIC_MAP, carrier, encode_v1),
            _ => shared::drain(old, TRAFFIC_MAP, carrier, encode),
        };
        shared::carry_counts(&self.pins, TRAFFIC_PIN, TRAFFIC_MAP, &drain)
    }

    /// All counts by network, summed over CPUs, in the order of network, direction, class and peer.
    ///
    /// # Errors
    /// The kernel does not let the map be read.
    pub fn read(&self) -> Result<Vec<Sample>, TelemetryError> {
        let mut samples = Vec::new();
        self.each(|sample| samples.push(sample))?;
        samples.sort_unstable_by_key(|sample| (sample.vni, sample.direction, sample.class, sample.peer));
        Ok(samples)
    }

    /// The same one by one, in no order.
    pub(super) fn each(&self, mut take: impl FnMut(Sample)) -> Result<(), TelemetryError> {
        batch::each_per_cpu(&self.traffic, TRAFFIC_MAP, |key: TrafficKey, values: &[Traffic]| {
            let Some((direction, class)) = key.kind() else { return };
            let packets = values.iter().map(|traffic| traffic.packets).sum();
            let bytes = values.iter().map(|traffic| traffic.bytes).sum();
            let peer = Ipv6Addr::from(key.peer).to_canonical();
            take(Sample { vni: key.vni, direction, class, peer, packets, bytes });
        })
    }

    /// Packets that could not be counted by network, for each reason.
    ///
    /// # Errors
    /// The kernel does not let the map be read.
    pub fn read_other(&self) -> Result<[(Other, u64); Other::ALL.len()], TelemetryError> {
        let mut counts = Other::ALL.map(|other| (other, 0));
        for (other, count) in &mut counts {
            *count = shared::sum(&self.other, *other as u32, OTHER_MAP)?;
        }
        Ok(counts)
    }

    /// Packets that came for stations which have left this host, by network: how many, and the longest time after
    /// the agent was told of the leaving.
    ///
    /// # Errors
    /// The kernel does not let the map be read.
    pub fn read_stale(&self) -> Result<BTreeMap<u32, (u64, Duration)>, TelemetryError> {
        let mut read: BTreeMap<u32, (u64, Duration)> = BTreeMap::new();
        for map in &self.stale {
            batch::each_per_cpu(map, STALE_MAP, |vni: u32, values: &[Stale]| {
                let (packets, longest) = read.entry(vni).or_default();
                *packets += values.iter().map(|stale| stale.packets).sum::<u64>();
                let found = values.iter().map(|stale| stale.longest_ns).max().unwrap_or(0);
                *longest = (*longest).max(Duration::from_nanos(found));
            })?;
        }
        Ok(read)
    }

    /// What each program costs; all zero unless the kernel was told to count it.
    ///
    /// # Errors
    /// The kernel does not tell.
    pub fn read_cost(&self) -> Result<[Cost; 2], TelemetryError> {
        let [rx, tx] = Direction::ALL.map(|direction| cost(&self.ebpf, program_name(direction)));
        Ok([rx?, tx?])
    }

    /// Whether the program of a direction is on the link still. It is not if the link was removed, even if one
    /// of the same name was made since.
    ///
    /// # Errors
    /// The kernel does not tell.
    pub fn is_attached(&self, direction: Direction) -> Result<bool, TelemetryError> {
        let name = program_name(direction);
        let program = self.ebpf.program(name).ok_or(TelemetryError::Incomplete { name })?;
        let info = program.info().map_err(|source| program_error(direction, "inspected", source))?;
        place(direction, &self.link).holds(&info)
    }

    /// Takes the programs off the link and their counts out of the kernel.
    ///
    /// # Errors
    /// A pinned file cannot be removed; then it still holds on to what it stands for.
    pub fn remove(self) -> Result<(), TelemetryError> {
        for direction in Direction::ALL {
            self.pins.remove(program_name(direction))?;
        }
        for pin in [TRAFFIC_PIN, OTHER_PIN, STALE_PIN].into_iter().chain(shared::PINS.map(|(_, pin)| pin)) {
            self.pins.remove_all(pin)?;
        }
        self.pins.remove_folder()
    }

    #[cfg(test)]
    pub(super) fn program_mut(&mut self, direction: Direction) -> &mut SchedClassifier {
        program_mut(&mut self.ebpf, direction).expect("the object has both programs")
    }
}

/// The layout before peers were told apart: a key of network, direction and class.
const TRAFFIC_V1: &str = "TRAFFIC_V1";

/// The maps of this object alone, by their pins.
fn layouts(traffic: u32) -> [(&'static str, Layout); 3] {
    use Content::Counted;
    let others = Other::ALL.len() as u32;
    [
        (
            TRAFFIC_PIN,
            layout::<TrafficKey, Traffic>(
                TRAFFIC_MAP,
                MapType::PerCpuHash,
                traffic,
                Counted(const { &[Earlier::new::<[u8; 8], Traffic>(TRAFFIC_V1)] }),
            ),
        ),
        (
            OTHER_PIN,
            layout::<u32, u64>(
                OTHER_MAP,
                MapType::PerCpuArray,
                others,
                Counted(const { &[Earlier::new::<u32, u64>("OTHER_V1")] }),
            ),
        ),
        (STALE_PIN, layout::<u32, Stale>(STALE_MAP, MapType::PerCpuHash, STALE_ENTRIES, Counted(&[]))),
    ]
}

/// A key and value of the first layout as `carry_traffic` takes them: nobody knows with whom it was.
fn encode_v1(key: &[u8; 8], traffic: &Traffic) -> Vec<u8> {
    let [vni @ .., direction, class, _, _] = *key;
    let peer = Ipv6Addr::UNSPECIFIED.octets();
    encode(&TrafficKey { vni: u32::from_ne_bytes(vni), direction, class, reserved: 0, peer }, traffic)
}

/// What a program costs.
pub(super) fn cost(ebpf: &Ebpf, program: &'static str) -> Result<Cost, TelemetryError> {
    let loaded = ebpf.program(program).ok_or(TelemetryError::Incomplete { name: program })?;
    let info = loaded.info().map_err(|source| TelemetryError::Program {
        program,
        action: "inspected",
        source: Box::new(source),
    })?;
    Ok(Cost { program, runs: info.run_count(), time: info.run_time() })
}

/// Key and value as `carry_traffic` takes them.
fn encode(key: &TrafficKey, traffic: &Traffic) -> Vec<u8> {
    let [vni_0, vni_1, vni_2, vni_3] = key.vni.to_ne_bytes();
    let head = [vni_0, vni_1, vni_2, vni_3, key.direction, key.class, 0, 0];
    [&head[..], &key.peer, &traffic.packets.to_ne_bytes(), &traffic.bytes.to_ne_bytes()].concat()
}

fn place(direction: Direction, link: &str) -> Place<'_> {
    let program = program_name(direction);
    Place { program, link, side: side(direction), pin: program }
}

fn program_name(direction: Direction) -> &'static str {
    match direction {
        Direction::Rx => INGRESS_PROGRAM,
        Direction::Tx => EGRESS_PROGRAM,
    }
}

fn side(direction: Direction) -> TcAttachType {
    match direction {
        Direction::Rx => TcAttachType::Ingress,
        Direction::Tx => TcAttachType::Egress,
    }
}

fn program_mut(ebpf: &mut Ebpf, direction: Direction) -> Result<&mut SchedClassifier, TelemetryError> {
    let name = program_name(direction);
    let program = ebpf.program_mut(name).ok_or(TelemetryError::Incomplete { name })?;
    program.try_into().map_err(|source| program_error(direction, "used", source))
}

fn program_error(direction: Direction, action: &'static str, source: ProgramError) -> TelemetryError {
    TelemetryError::Program { program: program_name(direction), action, source: Box::new(source) }
}

/// Forgets the counts of a network that has left this host, so that the maps keep to those that are here. That
/// nothing counts at all is a success.
pub(super) fn forget_traffic(bpffs: &Path, vni: u32) -> Result<(), TelemetryError> {
    let pins = Pins::open(bpffs)?;
    if !pins.path(TRAFFIC_PIN).exists() {
        return Ok(());
    }
    let mut traffic: PerCpuHashMap<_, TrafficKey, Traffic> = shared::open(&pins, TRAFFIC_PIN, TRAFFIC_MAP)?;
    let mut keys = Vec::new();
    batch::each_per_cpu(&traffic, TRAFFIC_MAP, |key: TrafficKey, _: &[Traffic]| {
        if key.vni == vni {
            keys.push(key);
        }
    })?;
    keys.iter().try_for_each(|key| shared::removed(TRAFFIC_MAP, traffic.remove(key)))
}

/// Forgets how stale packets of a network were, likewise.
pub(super) fn forget_stale(bpffs: &Path, vni: u32) -> Result<(), TelemetryError> {
    let pins = Pins::open(bpffs)?;
    if !pins.path(STALE_PIN).exists() {
        return Ok(());
    }
    let stale: PerCpuHashMap<_, u32, Stale> = shared::open(&pins, STALE_PIN, STALE_MAP)?;
    let before = shared::read_along(&pins, STALE_PIN, STALE_MAP)?;
    for mut stale in before.into_iter().chain([stale]) {
        shared::removed(STALE_MAP, stale.remove(&vni))?;
    }
    Ok(())
}
