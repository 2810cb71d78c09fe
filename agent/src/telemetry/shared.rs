//! The maps that the two objects share, and how many entries each map has.

use super::TelemetryError;
use super::pins::{Content, Earlier, Layout, Pins};
use aya::maps::{Array, HashMap, Map, MapData, MapError, MapType, PerCpuArray, PerCpuHashMap};
use aya::programs::{SchedClassifier, TestRun, TestRunOptions};
use aya::{Ebpf, EbpfLoader, Pod};
use godwit_ebpf_common::tables::{
    ACCOUNT_ENTRIES, ACCOUNT_MAP, Account, AccountKey, BLANK_MAP, EVENTS_BYTES, EVENTS_MAP, GATE_ENTRIES,
    GATE_MAP, GENERATION_MAP, GateKey, LOST_MAP, Lost, NEIGHBOURS_ENTRIES, NEIGHBOURS_MAP, NETWORKS_ENTRIES,
    NETWORKS_MAP, Neighbour, NeighbourKey, Network, STATIONS_ENTRIES, STATIONS_MAP, Station, StationKey,
};
use godwit_ebpf_common::{port, underlay};
use std::borrow::Cow;
use std::time::Duration;

/// Most entries of each map. A map that is made anew because its number changed keeps its content.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Capacity {
    /// Networks on this host.
    pub networks: u32,
    /// Ethernet addresses in them, of all hosts.
    pub stations: u32,
    /// IP addresses in them, of all hosts.
    pub neighbours: u32,
    /// Ports of this host.
    pub ports: u32,
    /// Addresses that ports of this host may send from, three for most ports.
    pub allowed: u32,
    /// Ports that are counted.
    pub accounts: u32,
    /// Kinds of traffic that are counted on the underlay: eight a network and peer at most.
    pub traffic: u32,
}

impl Default for Capacity {
    fn default() -> Self {
        Self {
            networks: NETWORKS_ENTRIES,
            stations: STATIONS_ENTRIES,
            neighbours: NEIGHBOURS_ENTRIES,
            ports: port::PORTS_ENTRIES,
            allowed: port::ALLOWED_ENTRIES,
            accounts: ACCOUNT_ENTRIES,
            traffic: underlay::TRAFFIC_ENTRIES,
        }
    }
}

impl Capacity {
    /// The names and numbers, as agent.toml has them.
    pub fn entries(&self) -> [(&'static str, u32); 7] {
        [
            ("networks", self.networks),
            ("stations", self.stations),
            ("neighbours", self.neighbours),
            ("ports", self.ports),
            ("allowed", self.allowed),
            ("accounts", self.accounts),
            ("traffic", self.traffic),
        ]
    }
}

pub(super) const NETWORKS_PIN: &str = "networks";
pub(super) const STATIONS_PIN: &str = "stations";
pub(super) const NEIGHBOURS_PIN: &str = "neighbours";
pub(super) const ACCOUNT_PIN: &str = "account";
pub(super) const EVENTS_PIN: &str = "events";
pub(super) const LOST_PIN: &str = "lost";
pub(super) const GENERATION_PIN: &str = "generation";

/// Each shared map's name and pin.
pub(super) const PINS: [(&str, &str); 9] = [
    (NETWORKS_MAP, NETWORKS_PIN),
    (STATIONS_MAP, STATIONS_PIN),
    (NEIGHBOURS_MAP, NEIGHBOURS_PIN),
    (ACCOUNT_MAP, ACCOUNT_PIN),
    (BLANK_MAP, "blank"),
    (EVENTS_MAP, EVENTS_PIN),
    (GATE_MAP, "event_gate"),
    (LOST_MAP, LOST_PIN),
    (GENERATION_MAP, GENERATION_PIN),
];

/// The layout of a map.
pub(super) const fn layout<K, V>(
    name: &'static str,
    kind: MapType,
    entries: u32,
    content: Content,
) -> Layout {
    assert!(
        name.len() < 16,
        "the kernel keeps fifteen characters of a name, and the last is the layout's number"
    );
    Layout { name, kind, key_bytes: size_of::<K>(), value_bytes: size_of::<V>(), entries, content }
}

/// Which programs are loaded.
pub(super) struct Version {
    /// The object of the ports' programs.
    pub(super) port: Cow<'static, [u8]>,
    /// The object of the underlay's.
    pub(super) underlay: Cow<'static, [u8]>,
    /// Maps that are of another layout there than here, by their names here; only in tests.
    pub(super) renamed: &'static [(&'static str, &'static str)],
}

impl Version {
    /// The ones that this agent was built with.
    pub(super) const OURS: Self = Self {
        port: Cow::Borrowed(super::ports::OBJECT),
        underlay: Cow::Borrowed(super::vxlan::OBJECT),
        renamed: &[],
    };

    pub(super) fn name(&self, name: &'static str) -> &'static str {
        self.renamed.iter().find(|(ours, _)| *ours == name).map_or(name, |(_, theirs)| theirs)
    }

    fn layouts(&self, capacity: &Capacity) -> [Layout; 9] {
        use Content::{Counted, Passing, Told};
        let events = Layout {
            key_bytes: 0,
            value_bytes: 0,
            ..layout::<u32, u32>(EVENTS_MAP, MapType::RingBuf, EVENTS_BYTES, Passing)
        };
        let mut layouts = [
            layout::<u32, Network>(NETWORKS_MAP, MapType::Hash, capacity.networks, Told),
            layout::<StationKey, Station>(STATIONS_MAP, MapType::Hash, capacity.stations, Told),
            layout::<NeighbourKey, Neighbour>(NEIGHBOURS_MAP, MapType::Hash, capacity.neighbours, Told),
            layout::<AccountKey, Account>(ACCOUNT_MAP, MapType::PerCpuHash, capacity.accounts, Counted(&[])),
            layout::<u32, Account>(BLANK_MAP, MapType::PerCpuArray, 1, Passing),
            events,
            layout::<GateKey, u64>(GATE_MAP, MapType::LruHash, GATE_ENTRIES, Passing),
            layout::<u32, u64>(LOST_MAP, MapType::PerCpuArray, Lost::ALL.len() as u32, Counted(&[])),
            layout::<u32, u64>(GENERATION_MAP, MapType::Array, 1, Passing),
        ];
        const OURS: &[Earlier] =
            &[Earlier::new::<AccountKey, Account>(ACCOUNT_MAP), Earlier::new::<u32, u64>(LOST_MAP)];
        for layout in &mut layouts {
            let theirs = self.name(layout.name);
            if theirs != layout.name && layout.content == Counted(&[]) {
                layout.content = Counted(OURS);
            }
            layout.name = theirs;
        }
        layouts
    }
}

/// A loader whose object shares the pinned maps, once these are of today's layout.
pub(super) fn loader<'a>(
    pins: &Pins,
    capacity: &Capacity,
    version: &Version,
) -> Result<EbpfLoader<'a>, TelemetryError> {
    let mut loader = EbpfLoader::new();
    for ((_, pin), layout) in PINS.into_iter().zip(version.layouts(capacity)) {
        pins.make_way(pin, &layout)?;
        loader.map_pin_path(layout.name, pins.path(pin)).map_max_entries(layout.name, layout.entries);
    }
    Ok(loader)
}

/// Tells programs that what they found is not to be gone by any more.
pub(super) struct Generation {
    map: Array<MapData, u64>,
    name: &'static str,
}

impl Generation {
    /// The pinned map of this name.
    pub(super) fn open(pins: &Pins, pin: &str, name: &'static str) -> Result<Self, TelemetryError> {
        let mut generation = Self { map: open(pins, pin, name)?, name };
        generation.next()?;
        Ok(generation)
    }

    /// After each change of what the programs look up, whether it failed midway or not. The time will do: no two changes
    /// are in the same nanosecond.
    pub(super) fn next(&mut self) -> Result<(), TelemetryError> {
        self.map.set(0, super::monotonic_ns(), 0).map_err(|source| map_error(self.name, source))
    }
}

/// Copies what the agent itself has written from maps that were set aside. Before any program uses the new ones.
pub(super) fn carry_tables(pins: &Pins) -> Result<(), TelemetryError> {
    carry_hash::<u32, Network>(pins, NETWORKS_PIN, NETWORKS_MAP)?;
    carry_hash::<StationKey, Station>(pins, STATIONS_PIN, STATIONS_MAP)?;
    carry_hash::<NeighbourKey, Neighbour>(pins, NEIGHBOURS_PIN, NEIGHBOURS_MAP)
}

/// Copies hash maps that were set aside. Entries that have no room in a smaller one are left behind, and said.
pub(super) fn carry_hash<K: Pod, V: Pod>(
    pins: &Pins,
    pin: &str,
    name: &'static str,
) -> Result<(), TelemetryError> {
    for (aside, old) in pins.asides(pin, name)? {
        let old: HashMap<_, K, V> = typed(old, name)?;
        let mut map: HashMap<_, K, V> = open(pins, pin, name)?;
        let mut left = 0_u64;
        for entry in old.iter() {
            let (key, value) = entry.map_err(|source| map_error(name, source))?;
            left += u64::from(map.insert(key, value, 0).is_err());
        }
        if left > 0 {
            tracing::error!(map = name, left, "the map is now too small for what it held");
        }
        pins.remove(&aside)?;
    }
    Ok(())
}

/// What a test run takes for an Ethernet header.
const ETHERNET_BYTES: usize = 14;

/// After this a program that ran on another CPU when it was exchanged has ended: it takes microseconds, and nothing
/// interrupts it for longer than the kernel's own work.
const UNDER_WAY: Duration = Duration::from_millis(20);

/// Takes the counts out of a map of an earlier layout, whose keys and values are these.
pub(super) type Drain<'a> = &'a dyn Fn(&str, MapData) -> Result<(), TelemetryError>;

/// Adds the counts of maps that were set aside to those of the new one. After the new programs are in their places, so
/// that nothing counts in the old maps any more.
pub(super) fn carry_counts(
    pins: &Pins,
    pin: &str,
    name: &'static str,
    drain: Drain<'_>,
) -> Result<(), TelemetryError> {
    let asides = pins.asides(pin, name)?;
    if !asides.is_empty() {
        std::thread::sleep(UNDER_WAY);
    }
    for (aside, old) in asides {
        let layout = old.info().map_err(|source| map_error(name, source))?;
        drain(layout.name_as_str().unwrap_or_default(), old)?;
        pins.remove(&aside)?;
    }
    Ok(())
}

/// Adds the counts of one map by a program that does so as packets do.
pub(super) fn drain<K: Pod, V: Pod>(
    old: MapData,
    name: &'static str,
    carrier: &SchedClassifier,
    encode: fn(&K, &V) -> Vec<u8>,
) -> Result<(), TelemetryError> {
    let mut old: PerCpuHashMap<_, K, V> = typed(old, name)?;
    let entries: Vec<_> = old.iter().collect::<Result<_, _>>().map_err(|source| map_error(name, source))?;
    for (key, values) in entries {
        for value in values.iter() {
            let packet = [vec![0; ETHERNET_BYTES], encode(&key, value)].concat();
            let run = carrier.test_run(TestRunOptions { data_in: Some(&packet), ..TestRunOptions::new() });
            run.map_err(|source| TelemetryError::Program {
                program: "carry",
                action: "run",
                source: Box::new(source),
            })?;
        }
        // At once, so that an agent that is killed here does not add it again.
        old.remove(&key).map_err(|source| map_error(name, source))?;
    }
    Ok(())
}

/// Maps that were set aside and are read along with the one in their place: nothing is written to them any more.
pub(super) fn read_along<M>(pins: &Pins, pin: &str, name: &'static str) -> Result<Vec<M>, TelemetryError>
where
    M: TryFrom<Map, Error = MapError>,
{
    pins.asides(pin, name)?.into_iter().map(|(_, map)| typed(map, name)).collect()
}

/// One number of an array and of those that are read along with it, over all CPUs.
pub(super) fn sum(
    arrays: &[PerCpuArray<MapData, u64>],
    index: u32,
    name: &'static str,
) -> Result<u64, TelemetryError> {
    let in_one = |array: &PerCpuArray<MapData, u64>| match array.get(&index, 0) {
        Ok(values) => Ok(values.iter().sum::<u64>()),
        // An earlier layout has fewer.
        Err(MapError::OutOfBounds { .. }) => Ok(0),
        Err(source) => Err(map_error(name, source)),
    };
    arrays.iter().map(in_one).sum()
}

/// A pinned map of a known type.
pub(super) fn open<M>(pins: &Pins, pin: &str, name: &'static str) -> Result<M, TelemetryError>
where
    M: TryFrom<Map, Error = MapError>,
{
    let map = MapData::from_pin(pins.path(pin)).map_err(|source| map_error(name, source))?;
    typed(map, name)
}

pub(super) fn typed<M>(map: MapData, name: &'static str) -> Result<M, TelemetryError>
where
    M: TryFrom<Map, Error = MapError>,
{
    let map = Map::from_map_data(map).map_err(|source| map_error(name, source))?;
    M::try_from(map).map_err(|source| map_error(name, source))
}

pub(super) fn take_map<M>(ebpf: &mut Ebpf, name: &'static str) -> Result<M, TelemetryError>
where
    M: TryFrom<Map, Error = MapError>,
{
    let map = ebpf.take_map(name).ok_or(TelemetryError::Incomplete { name })?;
    M::try_from(map).map_err(|source| map_error(name, source))
}

pub(super) fn map_error(map: &'static str, source: MapError) -> TelemetryError {
    TelemetryError::Map { map, source: Box::new(source) }
}

/// A loaded program by its name; loading one that is loaded already is a success.
pub(super) fn program_mut<'a>(
    ebpf: &'a mut Ebpf,
    name: &'static str,
) -> Result<&'a mut SchedClassifier, TelemetryError> {
    let failed =
        |source| TelemetryError::Program { program: name, action: "loaded", source: Box::new(source) };
    let program = ebpf.program_mut(name).ok_or(TelemetryError::Incomplete { name })?;
    let program: &mut SchedClassifier = program.try_into().map_err(failed)?;
    if program.fd().is_err() {
        program.load().map_err(failed)?;
    }
    Ok(program)
}

/// Takes not being there for having been removed.
pub(super) fn removed(map: &'static str, result: Result<(), MapError>) -> Result<(), TelemetryError> {
    match result {
        Err(MapError::KeyNotFound) => Ok(()),
        Err(MapError::SyscallError(error)) if error.io_error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
        result => result.map_err(|source| map_error(map, source)),
    }
}

/// `false`: the map has no room.
pub(super) fn inserted(map: &'static str, result: Result<(), MapError>) -> Result<bool, TelemetryError> {
    const FULL: [i32; 3] = [libc::E2BIG, libc::ENOSPC, libc::ENOMEM];
    match result {
        Err(MapError::SyscallError(error))
            if error.io_error.raw_os_error().is_some_and(|number| FULL.contains(&number)) =>
        {
            Ok(false)
        }
        result => result.map(|()| true).map_err(|source| map_error(map, source)),
    }
}
