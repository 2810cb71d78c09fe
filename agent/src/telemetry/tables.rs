//! What the eBPF programs know of each network: exactly what the coordinator has told, no more and no less.

use super::TelemetryError;
use super::pins::Pins;
use super::shared::{
    self, GENERATION_PIN, Generation, NEIGHBOURS_PIN, NETWORKS_PIN, STATIONS_PIN, map_error,
};
use aya::Pod;
use aya::maps::{HashMap, MapData};
use godwit_ebpf_common::tables::{
    GENERATION_MAP, NEIGHBOURS_MAP, NETWORKS_MAP, Neighbour, NeighbourKey, Network, STATIONS_MAP, Station,
    StationKey, mapped,
};
use godwit_protocol::id::PortId;
use godwit_protocol::network::{NetworkWanted, Unknown};
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

/// All that the programs know of one network.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Told {
    pub(super) network: Network,
    pub(super) stations: BTreeMap<[u8; 6], Station>,
    pub(super) neighbours: BTreeMap<[u8; 16], Neighbour>,
}

/// The maps, and what is in them.
pub(super) struct Tables {
    networks: HashMap<MapData, u32, Network>,
    stations: HashMap<MapData, StationKey, Station>,
    neighbours: HashMap<MapData, NeighbourKey, Neighbour>,
    generation: Generation,
    told: BTreeMap<u32, Told>,
    /// Networks of which some entry has no room.
    incomplete: BTreeSet<u32>,
    /// Stations that left with their network, and when: who still sends here for them is told for a while.
    departed: BTreeMap<u32, (u64, BTreeSet<[u8; 6]>)>,
}

/// How long a station that left with its network is remembered.
const DEPARTED_NS: u64 = 60_000_000_000;

/// The number of a port in the account.
pub(super) fn number(port: PortId) -> u64 {
    (port.0.as_u128() >> 64) as u64
}

/// An address as the maps have it.
pub(super) fn address_bytes(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(address) => mapped(address.octets()),
        IpAddr::V6(address) => address.octets(),
    }
}

/// What the programs are to know of a network. `now_ns` is the kernel's monotonic clock.
pub(super) fn told(wanted: &NetworkWanted, before: Option<&Told>, suppress: bool, now_ns: u64) -> Told {
    let mut told = Told::default();
    let flag = |on: bool, flag: u32| if on { flag } else { 0 };
    // On a provider's link there are stations that nobody tells of.
    let is_open = !wanted.carrier.is_vxlan();
    told.network.flags = flag(suppress, Network::SUPPRESS)
        | flag(is_open || wanted.unknown_unicast == Unknown::Flood, Network::FLOOD_UNICAST)
        | flag(!is_open && wanted.unknown_neighbours == Unknown::Drop, Network::DROP_NEIGHBOURS);
    for mac in &wanted.floating {
        told.stations.insert(mac.0, Station { place: Station::FLOATING, ..Station::default() });
    }
    for port in &wanted.ports {
        let station = Station { place: Station::HERE, port: number(port.port), ..Station::default() };
        told.stations.insert(port.mac.0, station);
    }
    // After the ports of this host: one that is to come here still is where it is.
    for entry in &wanted.forwarding {
        let old = before.and_then(|before| before.stations.get(&entry.mac.0));
        let left_ns = match old {
            Some(old) if old.place == Station::HERE => now_ns,
            Some(old) => old.left_ns,
            None => 0,
        };
        let station = Station { place: Station::ELSEWHERE, left_ns, ..Station::default() };
        told.stations.insert(entry.mac.0, station);
    }
    let here = wanted.ports.iter().map(|port| (port.mac, &port.addresses));
    let elsewhere = wanted.forwarding.iter().map(|entry| (entry.mac, &entry.addresses));
    for (mac, addresses) in here.chain(elsewhere) {
        for address in addresses {
            let is_router = wanted.routers.contains(address);
            let flags = if is_router { Neighbour::ROUTER } else { 0 };
            let key = address_bytes(*address);
            let found = told.neighbours.entry(key).or_insert(Neighbour { mac: mac.0, flags, reserved: 0 });
            if found.mac != mac.0 {
                found.flags |= Neighbour::AMBIGUOUS;
            }
        }
    }
    told
}

impl Tables {
    /// The pinned maps, with what is in them.
    pub(super) fn open(pins: &Pins) -> Result<Self, TelemetryError> {
        let networks: HashMap<_, u32, Network> = shared::open(pins, NETWORKS_PIN, NETWORKS_MAP)?;
        let stations: HashMap<_, StationKey, Station> = shared::open(pins, STATIONS_PIN, STATIONS_MAP)?;
        let neighbours: HashMap<_, NeighbourKey, Neighbour> =
            shared::open(pins, NEIGHBOURS_PIN, NEIGHBOURS_MAP)?;
        let all = read(&networks, &stations, &neighbours)?;
        let is_here = |vni: &u32| networks.get(vni, 0).is_ok();
        let (told, gone): (BTreeMap<_, _>, BTreeMap<_, _>) =
            all.into_iter().partition(|(vni, _)| is_here(vni));
        // An agent before this one has seen them go, and goes no more itself.
        let departed = gone.into_iter().map(|(vni, told)| (vni, (0, told.stations.into_keys().collect())));
        let departed = departed.collect();
        let generation = Generation::open(pins, GENERATION_PIN, GENERATION_MAP)?;
        let incomplete = BTreeSet::new();
        Ok(Self { networks, stations, neighbours, generation, told, incomplete, departed })
    }

    /// What was told of a network.
    pub(super) fn get(&self, vni: u32) -> Option<&Told> {
        self.told.get(&vni)
    }

    /// What the kernel has, read anew.
    #[cfg(test)]
    pub(super) fn dump(&self) -> BTreeMap<u32, Told> {
        read(&self.networks, &self.stations, &self.neighbours).expect("the maps can be read")
    }

    /// The number of networks, stations and neighbours, in this order.
    pub(super) fn sizes(&self) -> [usize; 3] {
        let stations = self.told.values().map(|told| told.stations.len()).sum();
        let neighbours = self.told.values().map(|told| told.neighbours.len()).sum();
        [self.told.len(), stations, neighbours]
    }

    /// Networks of which some entry has no room: their unknown unicast is flooded, whatever the policy.
    pub(super) fn incomplete(&self) -> usize {
        self.incomplete.len()
    }

    /// Changes what differs. What is new comes before what is gone, and what moves does so in one step. Says how
    /// many entries had no room.
    pub(super) fn set(&mut self, vni: u32, told: Told) -> Result<u64, TelemetryError> {
        let full = self.write(vni, told);
        self.generation.next()?;
        full
    }

    fn write(&mut self, vni: u32, mut told: Told) -> Result<u64, TelemetryError> {
        let mut old = self.told.get(&vni).cloned().unwrap_or_default();
        if let Some((_, macs)) = self.departed.remove(&vni) {
            // Back again: what is not wanted of them goes with the rest below.
            let left = macs
                .into_iter()
                .map(|mac| (mac, Station { place: Station::ELSEWHERE, left_ns: 1, ..Station::default() }));
            old.stations.extend(left);
        }
        let mut full = 0;
        let mut stations = BTreeMap::new();
        for (mac, station) in std::mem::take(&mut told.stations) {
            let is_there = old.stations.get(&mac) == Some(&station)
                || insert(&mut self.stations, STATIONS_MAP, &StationKey::new(vni, mac), station)?;
            if is_there {
                stations.insert(mac, station);
            } else {
                full += 1;
            }
        }
        let mut neighbours = BTreeMap::new();
        for (address, neighbour) in std::mem::take(&mut told.neighbours) {
            let key = NeighbourKey { vni, address };
            let is_there = old.neighbours.get(&address) == Some(&neighbour)
                || insert(&mut self.neighbours, NEIGHBOURS_MAP, &key, neighbour)?;
            if is_there {
                neighbours.insert(address, neighbour);
            } else {
                full += 1;
            }
        }
        if full > 0 {
            // A station without room must not be cut off.
            told.network.flags |= Network::FLOOD_UNICAST;
            told.network.flags &= !Network::DROP_NEIGHBOURS;
            self.incomplete.insert(vni);
        } else {
            self.incomplete.remove(&vni);
        }
        let is_known = self.told.contains_key(&vni) && old.network == told.network;
        if !is_known && !insert(&mut self.networks, NETWORKS_MAP, &vni, told.network)? {
            full += 1;
        }
        for mac in old.stations.keys().filter(|mac| !stations.contains_key(*mac)) {
            remove(&mut self.stations, STATIONS_MAP, &StationKey::new(vni, *mac))?;
        }
        for address in old.neighbours.keys().filter(|address| !neighbours.contains_key(*address)) {
            remove(&mut self.neighbours, NEIGHBOURS_MAP, &NeighbourKey { vni, address: *address })?;
        }
        self.told.insert(vni, Told { network: told.network, stations, neighbours });
        Ok(full)
    }

    /// Forgets a network. `now_ns` is the kernel's monotonic clock.
    pub(super) fn remove(&mut self, vni: u32, now_ns: u64) -> Result<(), TelemetryError> {
        let removed = self.erase(vni, now_ns);
        self.generation.next()?;
        removed
    }

    fn erase(&mut self, vni: u32, now_ns: u64) -> Result<(), TelemetryError> {
        let Some(old) = self.told.remove(&vni) else { return Ok(()) };
        self.incomplete.remove(&vni);
        // First: of a network that is not here nothing is unknown, and nothing is dropped.
        remove(&mut self.networks, NETWORKS_MAP, &vni)?;
        let mut departed = BTreeSet::new();
        for (mac, station) in old.stations {
            let key = StationKey::new(vni, mac);
            let left = Station { place: Station::ELSEWHERE, left_ns: now_ns, ..Station::default() };
            // One that was elsewhere already has left when it did.
            let left = if station.left_ns == 0 { left } else { station };
            if (station.place == Station::HERE || station.left_ns != 0)
                && insert(&mut self.stations, STATIONS_MAP, &key, left)?
            {
                departed.insert(mac);
            } else {
                remove(&mut self.stations, STATIONS_MAP, &key)?;
            }
        }
        for address in old.neighbours.keys() {
            remove(&mut self.neighbours, NEIGHBOURS_MAP, &NeighbourKey { vni, address: *address })?;
        }
        if !departed.is_empty() {
            self.departed.insert(vni, (now_ns, departed));
        }
        Ok(())
    }

    /// Forgets stations that left with their network a while ago. Says of which networks.
    pub(super) fn forget_departed(&mut self, now_ns: u64) -> Result<Vec<u32>, TelemetryError> {
        let is_over = |at: &u64| now_ns.saturating_sub(*at) >= DEPARTED_NS;
        let over: Vec<u32> =
            self.departed.iter().filter(|(_, (at, _))| is_over(at)).map(|(vni, _)| *vni).collect();
        for vni in &over {
            let (_, macs) = self.departed.remove(vni).unwrap_or_default();
            for mac in macs {
                remove(&mut self.stations, STATIONS_MAP, &StationKey::new(*vni, mac))?;
            }
        }
        if !over.is_empty() {
            self.generation.next()?;
        }
        Ok(over)
    }
}

fn read(
    networks: &HashMap<MapData, u32, Network>,
    stations: &HashMap<MapData, StationKey, Station>,
    neighbours: &HashMap<MapData, NeighbourKey, Neighbour>,
) -> Result<BTreeMap<u32, Told>, TelemetryError> {
    let mut told: BTreeMap<u32, Told> = BTreeMap::new();
    for entry in networks.iter() {
        let (vni, network) = entry.map_err(|source| map_error(NETWORKS_MAP, source))?;
        told.entry(vni).or_default().network = network;
    }
    for entry in stations.iter() {
        let (key, station) = entry.map_err(|source| map_error(STATIONS_MAP, source))?;
        told.entry(key.vni).or_default().stations.insert(key.mac, station);
    }
    for entry in neighbours.iter() {
        let (key, neighbour) = entry.map_err(|source| map_error(NEIGHBOURS_MAP, source))?;
        told.entry(key.vni).or_default().neighbours.insert(key.address, neighbour);
    }
    Ok(told)
}

fn insert<K: Pod, V: Pod>(
    map: &mut HashMap<MapData, K, V>,
    name: &'static str,
    key: &K,
    value: V,
) -> Result<bool, TelemetryError> {
    shared::inserted(name, map.insert(key, value, 0))
}

fn remove<K: Pod, V: Pod>(
    map: &mut HashMap<MapData, K, V>,
    name: &'static str,
    key: &K,
) -> Result<(), TelemetryError> {
    shared::removed(name, map.remove(key))
}
