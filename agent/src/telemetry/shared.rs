//! The maps that the two objects share, and how many entries each map has.

use super::TelemetryError;
use super::pins::{Layout, Pins};
use aya::maps::{HashMap, Map, MapData, MapError, MapType, PerCpuHashMap};
use aya::programs::{SchedClassifier, TestRun, TestRunOptions};
use aya::{Ebpf, EbpfLoader, Pod};
use godwit_ebpf_common::tables::{
    ACCOUNT_ENTRIES, ACCOUNT_MAP, Account, AccountKey, BLANK_MAP, EVENTS_BYTES, EVENTS_MAP, GATE_ENTRIES,
    GATE_MAP, GateKey, LOST_MAP, Lost, NEIGHBOURS_ENTRIES, NEIGHBOURS_MAP, NETWORKS_ENTRIES, NETWORKS_MAP,
    Neighbour, NeighbourKey, Network, STATIONS_ENTRIES, STATIONS_MAP, Station, StationKey,
};
use godwit_ebpf_common::{port, underlay};

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

/// Each shared map's name and pin.
pub(super) const PINS: [(&str, &str); 8] = [
    (NETWORKS_MAP, NETWORKS_PIN),
    (STATIONS_MAP, STATIONS_PIN),
    (NEIGHBOURS_MAP, NEIGHBOURS_PIN),
    (ACCOUNT_MAP, ACCOUNT_PIN),
    (BLANK_MAP, "blank"),
    (EVENTS_MAP, EVENTS_PIN),
    (GATE_MAP, "event_gate"),
    (LOST_MAP, "lost"),
];

pub(super) const fn hash<K, V>(name: &'static str, kind: MapType, entries: u32) -> Layout {
    Layout { name, kind, key_bytes: size_of::<K>(), value_bytes: size_of::<V>(), entries }
}

fn layouts(capacity: &Capacity) -> [Layout; 8] {
    [
        hash::<u32, Network>(NETWORKS_MAP, MapType::Hash, capacity.networks),
        hash::<StationKey, Station>(STATIONS_MAP, MapType::Hash, capacity.stations),
        hash::<NeighbourKey, Neighbour>(NEIGHBOURS_MAP, MapType::Hash, capacity.neighbours),
        hash::<AccountKey, Account>(ACCOUNT_MAP, MapType::PerCpuHash, capacity.accounts),
        hash::<u32, Account>(BLANK_MAP, MapType::PerCpuArray, 1),
        Layout {
            name: EVENTS_MAP,
            kind: MapType::RingBuf,
            key_bytes: 0,
            value_bytes: 0,
            entries: EVENTS_BYTES,
        },
        hash::<GateKey, u64>(GATE_MAP, MapType::LruHash, GATE_ENTRIES),
        hash::<u32, u64>(LOST_MAP, MapType::PerCpuArray, Lost::ALL.len() as u32),
    ]
}

/// A loader whose object shares the pinned maps, once these are of today's layout.
pub(super) fn loader<'a>(pins: &Pins, capacity: &Capacity) -> Result<EbpfLoader<'a>, TelemetryError> {
    let mut loader = EbpfLoader::new();
    for ((name, pin), layout) in PINS.into_iter().zip(layouts(capacity)) {
        pins.make_way(pin, &layout)?;
        loader.map_pin_path(name, pins.path(pin)).map_max_entries(name, layout.entries);
    }
    Ok(loader)
}

/// Copies what the agent itself has written from maps that were set aside. Before any program uses the new ones.
pub(super) fn carry_tables(pins: &Pins) -> Result<(), TelemetryError> {
    carry_hash::<u32, Network>(pins, NETWORKS_PIN, NETWORKS_MAP)?;
    carry_hash::<StationKey, Station>(pins, STATIONS_PIN, STATIONS_MAP)?;
    carry_hash::<NeighbourKey, Neighbour>(pins, NEIGHBOURS_PIN, NEIGHBOURS_MAP)
}

/// Copies a hash map that was set aside. Entries that have no room in a smaller one are left behind, and said.
pub(super) fn carry_hash<K: Pod, V: Pod>(
    pins: &Pins,
    pin: &str,
    name: &'static str,
) -> Result<(), TelemetryError> {
    let Some(aside) = pins.take_aside(pin, name)? else { return Ok(()) };
    let aside: HashMap<_, K, V> = typed(aside, name)?;
    let mut map: HashMap<_, K, V> = open(pins, pin, name)?;
    let mut left = 0_u64;
    for entry in aside.iter() {
        let (key, value) = entry.map_err(|source| map_error(name, source))?;
        left += u64::from(map.insert(key, value, 0).is_err());
    }
    if left > 0 {
        tracing::error!(map = name, left, "the map is now too small for what it held");
    }
    pins.remove_aside(pin)
}

/// What a test run takes for an Ethernet header.
const ETHERNET_BYTES: usize = 14;

/// Adds the counts of a map that was set aside to those of the new one, by a program that does so as packets do.
/// After the new programs are in their places, so that nothing counts in the old map any more.
pub(super) fn carry_counts<K: Pod, V: Pod>(
    pins: &Pins,
    pin: &str,
    name: &'static str,
    carrier: &SchedClassifier,
    encode: fn(&K, &V) -> Vec<u8>,
) -> Result<(), TelemetryError> {
    let Some(aside) = pins.take_aside(pin, name)? else { return Ok(()) };
    let mut aside: PerCpuHashMap<_, K, V> = typed(aside, name)?;
    let entries: Vec<_> = aside.iter().collect::<Result<_, _>>().map_err(|source| map_error(name, source))?;
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
        aside.remove(&key).map_err(|source| map_error(name, source))?;
    }
    pins.remove_aside(pin)
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
