//! Security groups: the programs on guests' taps that let pass what rules allow, and what each is told.

mod census;
mod collector;
mod entries;
mod requests;
#[cfg(test)]
mod tests;

pub use collector::FilterCollector;
pub use requests::{Question, Requests};

use super::pins::{Content, Earlier, Layout, Pins};
use super::shared::{self, Generation, inserted, layout, map_error, program_mut, removed, take_map};
use super::taps::{TapPrograms, each_present, name_of};
use super::vxlan::{Cost, cost};
use super::{TelemetryError, monotonic_ns};
use aya::maps::lpm_trie::{Key, LpmTrie};
use aya::maps::{HashMap, MapData, MapError, MapType, PerCpuHashMap};
use aya::programs::LinkOrder;
use aya::programs::tc::TcAttachType;
use aya::{Ebpf, EbpfLoader, include_bytes_aligned};
use census::Census;
use entries::{Direction, Wish};
use godwit_ebpf_common::filter::{
    CONNECTIONS_ENTRIES, CONNECTIONS_MAP, COUNTS_MAP, Connection, ConnectionKey, Counts, ENTRIES_MAP,
    Entries, FILTERS_ENTRIES, FILTERS_MAP, FRAGMENTS_ENTRIES, FRAGMENTS_MAP, FROM_PROGRAM, Filter, FilterKey,
    FragmentKey, GENERATION_MAP, MEMBERS_ENTRIES, MEMBERS_MAP, Member, REQUESTS_BYTES, REQUESTS_MAP,
    STRAYS_MAP, Strays, TO_PROGRAM,
};
use godwit_protocol::network::NetworkWanted;
use godwit_protocol::port::tap_name;
use nix::net::if_::if_nametoindex;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The programs, as agent/build.rs built them.
static OBJECT: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/filter"));

/// The program of each side of a tap.
const SIDES: [(&str, TcAttachType); 2] =
    [(FROM_PROGRAM, TcAttachType::Ingress), (TO_PROGRAM, TcAttachType::Egress)];

pub(super) const TAPS: TapPrograms = TapPrograms { prefix: "filter_tap_", sides: SIDES, order: inside };

/// What a guest sends is filtered after its sender was checked, what it gets before it is counted.
fn inside(side: TcAttachType) -> LinkOrder {
    match side {
        TcAttachType::Egress => LinkOrder::first(),
        _ => LinkOrder::last(),
    }
}

/// How long a guest that came from another host may go on with connections that it had, in nanoseconds.
const ARRIVAL_NS: u64 = 300_000_000_000;

/// Most entries of the maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// Connections of all guests of the host; the ones longest unused make place for new ones.
    pub connections: u32,
    /// Addresses of members of security groups, in all networks of the host.
    pub members: u32,
}

impl Default for Room {
    fn default() -> Self {
        Self { connections: CONNECTIONS_ENTRIES, members: MEMBERS_ENTRIES }
    }
}

/// The filter of one host's ports. Dropping it leaves everything attached.
pub struct PortFilter {
    inner: Mutex<Inner>,
}

struct Inner {
    pins: Pins,
    ebpf: Ebpf,
    filters: HashMap<MapData, FilterKey, Filter>,
    members: LpmTrie<MapData, Member, u32>,
    connections: HashMap<MapData, ConnectionKey, Connection>,
    generation: Generation,
    census: Census,
    /// With those that are read along.
    counts: Vec<PerCpuHashMap<MapData, FilterKey, Counts>>,
    strays: PerCpuHashMap<MapData, FilterKey, Strays>,
    /// What taps are to let pass, with their network's number.
    wanted: BTreeMap<String, (u32, Wish)>,
    /// What is in the map of members.
    told: BTreeSet<(Member, u32)>,
    /// The newest number of a state of rules.
    epoch: u32,
    /// Members that had no room; they are refused what their group allows.
    refused: u64,
    /// Ports that had no room, and are not on their network.
    full: u64,
    /// Most connections that are remembered.
    capacity: u32,
}

impl PortFilter {
    /// Loads the programs. Where an agent before has attached its own, they are exchanged, without a packet in
    /// between, and connections go on.
    ///
    /// # Errors
    /// There is no BPF file system, or the kernel refuses.
    pub fn open(bpffs: &Path, room: Room) -> Result<Self, TelemetryError> {
        let pins = Pins::open(bpffs)?;
        let maps = maps(room);
        let mut loader = EbpfLoader::new();
        for (name, pin, layout) in &maps {
            pins.make_way(pin, layout)?;
            loader.map_pin_path(name, pins.path(pin));
        }
        loader.map_max_entries(CONNECTIONS_MAP, room.connections).map_max_entries(MEMBERS_MAP, room.members);
        let mut ebpf = loader.load(OBJECT).map_err(|error| TelemetryError::Object(Box::new(error)))?;
        // Rules and members are written anew.
        pins.remove_asides(FILTERS_PIN)?;
        pins.remove_asides(MEMBERS_PIN)?;
        let filters: HashMap<_, FilterKey, Filter> = take_map(&mut ebpf, FILTERS_MAP)?;
        let members: LpmTrie<_, Member, u32> = take_map(&mut ebpf, MEMBERS_MAP)?;
        let connections: HashMap<_, ConnectionKey, Connection> = take_map(&mut ebpf, CONNECTIONS_MAP)?;
        let mut census = Census::open(&pins)?;
        census.begin(connections.keys().filter_map(Result::ok).count() as u64)?;
        let mut counts = vec![take_map(&mut ebpf, COUNTS_MAP)?];
        counts.extend(shared::read_along(&pins, COUNTS_PIN, COUNTS_MAP)?);
        let strays = take_map(&mut ebpf, STRAYS_MAP)?;
        let read = |error| map_error(MEMBERS_MAP, error);
        let told = members.keys().map(|key| key.map(|key| (key.data(), key.prefix_len())).map_err(read));
        let told = told.collect::<Result<_, _>>()?;
        let epoch = filters.iter().filter_map(Result::ok).map(|(_, filter)| filter.epoch).max().unwrap_or(0);
        for (name, _) in SIDES {
            // Both before either is attached: a kernel that refuses one must not be left with the other.
            program_mut(&mut ebpf, name)?;
        }
        let generation = Generation::open(&pins, GENERATION_PIN, GENERATION_MAP)?;
        let inner = Inner {
            pins,
            ebpf,
            filters,
            members,
            connections,
            generation,
            census,
            counts,
            strays,
            wanted: BTreeMap::new(),
            told,
            epoch,
            refused: 0,
            full: 0,
            capacity: room.connections,
        };
        Ok(Self { inner: Mutex::new(inner) })
    }

    /// Puts these programs in the place of those that an earlier agent has pinned. To be called when the earlier
    /// agent's networks are wanted again: new programs let nothing pass at a port that has no rules.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn adopt(&self) -> Result<(), TelemetryError> {
        let mut inner = self.lock();
        let Inner { pins, ebpf, census, .. } = &mut *inner;
        // Before, so that what is open goes on, and once more after it for what was opened meanwhile.
        carry_connections(pins, census, false)?;
        TAPS.exchange(ebpf, pins)?;
        carry_connections(pins, census, true)
    }

    /// Brings the ports of a network to what is wanted of them.
    ///
    /// # Errors
    /// The kernel refuses; the next call goes on from there.
    pub fn ensure(&self, wanted: &NetworkWanted) -> Result<(), TelemetryError> {
        let inner = &mut *self.lock();
        let ports =
            wanted.ports.iter().map(|port| (tap_name(port.port), (wanted.vni, Wish::of(wanted.vni, port))));
        inner.wanted.retain(|_, (vni, _)| *vni != wanted.vni);
        inner.wanted.extend(ports);
        // Who belongs to a group comes before the rules that name it, and goes after.
        let members = entries::members(wanted);
        inner.tell(&members)?;
        // Of this network only: a move must not wait for a look at a thousand taps.
        let outcome = inner.set_up_network(wanted.vni);
        inner.forget_members(wanted.vni, &members)?;
        outcome
    }

    /// Looks at a network's taps again, because some of them have come.
    ///
    /// # Errors
    /// The kernel refuses; the others are as wanted.
    pub fn set_up(&self, vni: u32) -> Result<(), TelemetryError> {
        self.lock().set_up_network(vni)
    }

    /// Forgets a network.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn remove(&self, vni: u32) -> Result<(), TelemetryError> {
        let inner = &mut *self.lock();
        inner.wanted.retain(|_, (other, _)| *other != vni);
        inner.forget_members(vni, &BTreeSet::new())?;
        inner.forget_gone()
    }

    /// What each program costs; all zero unless the kernel was told to count it.
    ///
    /// # Errors
    /// The kernel does not tell.
    pub fn read_cost(&self) -> Result<[Cost; 2], TelemetryError> {
        let inner = self.lock();
        let [from, to] = SIDES.map(|(program, _)| cost(&inner.ebpf, program));
        Ok([from?, to?])
    }

    /// Looks at the taps that are there: attaches what is missing, forgets what is gone.
    pub fn refresh(&self) {
        // Tap by tap: a move waits for one of them, not for a thousand.
        let taps: Vec<(String, ())> = self.lock().wanted.keys().map(|tap| (tap.clone(), ())).collect();
        let set_up = each_present(taps, |tap, index, ()| self.lock().set_up_tap(tap, index));
        if let Err(error) = set_up.and(self.lock().forget_gone()) {
            tracing::error!("a port is not filtered as wanted: {}", godwit_protocol::error::chain(&error));
        }
    }

    /// Writes a port for a link that is no tap, as tests have it.
    #[cfg(test)]
    fn set_port(&self, index: u32, vni: u32, port: &godwit_protocol::network::LocalPort) {
        let inner = &mut *self.lock();
        inner.epoch += 1;
        inner.write(index, &Wish::of(vni, port), inner.epoch).expect("there is room");
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn tell(&mut self, members: &BTreeSet<(Member, u32)>) -> Result<(), TelemetryError> {
        let new: Vec<_> = members.difference(&self.told).copied().collect();
        for (member, bits) in &new {
            match self.members.insert(&Key::new(*bits, *member), 1, 0) {
                Ok(()) => drop(self.told.insert((*member, *bits))),
                Err(MapError::SyscallError(error)) if error.io_error.raw_os_error() == Some(libc::ENOSPC) => {
                    self.refused += 1;
                    tracing::error!(
                        "a member of a security group has no room: raise `members` in agent.toml"
                    );
                }
                Err(error) => return Err(map_error(MEMBERS_MAP, error)),
            }
        }
        Ok(())
    }

    fn forget_members(&mut self, vni: u32, members: &BTreeSet<(Member, u32)>) -> Result<(), TelemetryError> {
        let stale: Vec<(Member, u32)> = self
            .told
            .iter()
            .filter(|entry| entry.0.vni == vni && !members.contains(entry))
            .copied()
            .collect();
        if stale.is_empty() {
            return Ok(());
        }
        for (member, bits) in stale {
            removed(MEMBERS_MAP, self.members.remove(&Key::new(bits, member)))?;
            self.told.remove(&(member, bits));
        }
        self.generation.next()?;
        // Connections that a member opened are looked at again.
        self.epoch += 1;
        let taps: Vec<(String, Wish)> = self
            .wanted
            .iter()
            .filter(|(_, (v, _))| *v == vni)
            .map(|(tap, (_, w))| (tap.clone(), w.clone()))
            .collect();
        for (tap, wish) in taps {
            if let Ok(index) = if_nametoindex(tap.as_str()) {
                self.write(index, &wish, self.epoch)?;
            }
        }
        Ok(())
    }

    fn set_up_network(&mut self, vni: u32) -> Result<(), TelemetryError> {
        let own = self.wanted.iter().filter(|(_, (of, _))| *of == vni);
        let own: Vec<_> = own.map(|(tap, wish)| (tap.clone(), wish.clone())).collect();
        each_present(own, |tap, index, (_, wish)| self.set_up(tap, index, wish))
    }

    fn set_up_tap(&mut self, tap: &str, index: u32) -> Result<(), TelemetryError> {
        match self.wanted.get(tap).cloned() {
            Some((_, wish)) => self.set_up(tap, index, &wish),
            None => Ok(()),
        }
    }

    fn set_up(&mut self, tap: &str, index: u32, wish: &Wish) -> Result<(), TelemetryError> {
        let is_same = |direction: Direction| {
            let found = self.filters.get(&FilterKey { link: index, direction: direction.number() }, 0);
            found.is_ok_and(|found| wish.agrees(&found, direction))
        };
        if !Direction::ALL.into_iter().all(is_same) {
            self.epoch += 1;
            self.write(index, wish, self.epoch)?;
        }
        TAPS.attach(&mut self.ebpf, &self.pins, tap)
    }

    /// Writes both directions of a port. A port that is new here has just arrived.
    fn write(&mut self, index: u32, wish: &Wish, epoch: u32) -> Result<(), TelemetryError> {
        let key = |direction: Direction| FilterKey { link: index, direction: direction.number() };
        let known = self.filters.get(&key(Direction::Ingress), 0).ok();
        let arrival_ends_ns =
            known.map_or_else(|| monotonic_ns() + ARRIVAL_NS, |known| known.arrival_ends_ns);
        for direction in Direction::ALL {
            let filter = Filter { arrival_ends_ns, epoch, ..wish.filter(direction) };
            if !inserted(FILTERS_MAP, self.filters.insert(key(direction), filter, 0))? {
                self.full += 1;
                return Err(TelemetryError::Full { map: FILTERS_MAP });
            }
            self.generation.next()?;
        }
        Ok(())
    }

    /// Removes what belongs to taps that are not there any more.
    fn forget_gone(&mut self) -> Result<(), TelemetryError> {
        TAPS.forget_gone(&self.pins)?;
        let is_gone = |key: &FilterKey| name_of(key.link).is_none();
        let filters: Vec<FilterKey> = self.filters.keys().filter_map(Result::ok).filter(is_gone).collect();
        if filters.is_empty() {
            return Ok(());
        }
        for key in &filters {
            removed(FILTERS_MAP, self.filters.remove(key))?;
            self.generation.next()?;
        }
        for counts in &mut self.counts {
            let gone: Vec<FilterKey> = counts.keys().filter_map(Result::ok).filter(is_gone).collect();
            for key in gone {
                removed(COUNTS_MAP, counts.remove(&key))?;
            }
        }
        let gone: Vec<FilterKey> = self.strays.keys().filter_map(Result::ok).filter(is_gone).collect();
        for key in gone {
            removed(STRAYS_MAP, self.strays.remove(&key))?;
        }
        // A link's number is not given again soon; still, what its guest had opened is not another's.
        let links: BTreeSet<u32> = filters.iter().map(|key| key.link).collect();
        let stale: Vec<ConnectionKey> =
            self.connections.keys().filter_map(Result::ok).filter(|key| links.contains(&key.link)).collect();
        let mut forgotten = 0;
        for key in stale {
            let outcome = self.connections.remove(&key);
            forgotten += u64::from(outcome.is_ok());
            removed(CONNECTIONS_MAP, outcome)?;
        }
        self.census.add(Entries::Forgotten, forgotten)
    }
}

const FILTERS_PIN: &str = "filters";
const MEMBERS_PIN: &str = "members";
const CONNECTIONS_PIN: &str = "connections";
const GENERATION_PIN: &str = "filter_generation";
const COUNTS_PIN: &str = "filter_counts";
const ENTRIES_PIN: &str = "filter_entries";
const STRAYS_PIN: &str = "filter_strays";

/// Each map's name, pin and layout.
fn maps(room: Room) -> [(&'static str, &'static str, Layout); 9] {
    use Content::{Counted, Passing, Told};
    let requests = Layout {
        key_bytes: 0,
        value_bytes: 0,
        ..layout::<u32, u32>(REQUESTS_MAP, MapType::RingBuf, REQUESTS_BYTES, Passing)
    };
    // The kernel had no room for the number at the end of the counts' first name.
    let counted = Counted(const { &[Earlier::new::<FilterKey, Counts>("FILTER_COUNTS_V")] });
    [
        layout::<FilterKey, Filter>(FILTERS_MAP, MapType::Hash, FILTERS_ENTRIES, Told),
        layout::<Key<Member>, u32>(MEMBERS_MAP, MapType::LpmTrie, room.members, Told),
        layout::<ConnectionKey, Connection>(CONNECTIONS_MAP, MapType::LruHash, room.connections, Told),
        layout::<FragmentKey, u64>(FRAGMENTS_MAP, MapType::LruHash, FRAGMENTS_ENTRIES, Passing),
        layout::<FilterKey, Counts>(COUNTS_MAP, MapType::PerCpuHash, FILTERS_ENTRIES, counted),
        layout::<FilterKey, Strays>(STRAYS_MAP, MapType::PerCpuHash, FILTERS_ENTRIES, Counted(&[])),
        layout::<u32, u64>(ENTRIES_MAP, MapType::PerCpuArray, Entries::KINDS, Passing),
        layout::<u32, u64>(GENERATION_MAP, MapType::Array, 1, Passing),
        requests,
    ]
    .map(|layout| (layout.name, pin(layout.name), layout))
}

fn pin(map: &str) -> &'static str {
    match map {
        FILTERS_MAP => FILTERS_PIN,
        MEMBERS_MAP => MEMBERS_PIN,
        CONNECTIONS_MAP => CONNECTIONS_PIN,
        COUNTS_MAP => COUNTS_PIN,
        STRAYS_MAP => STRAYS_PIN,
        GENERATION_MAP => GENERATION_PIN,
        ENTRIES_MAP => ENTRIES_PIN,
        REQUESTS_MAP => requests::PIN,
        _ => "fragments",
    }
}

/// Copies connections from tables that were set aside because they had another size, but for those that are known
/// already. What has no room is forgotten, as the table does by itself.
fn carry_connections(pins: &Pins, census: &mut Census, last: bool) -> Result<(), TelemetryError> {
    for (aside, old) in pins.asides(CONNECTIONS_PIN, CONNECTIONS_MAP)? {
        let old: HashMap<_, ConnectionKey, Connection> = shared::typed(old, CONNECTIONS_MAP)?;
        let mut connections: HashMap<_, ConnectionKey, Connection> =
            shared::open(pins, CONNECTIONS_PIN, CONNECTIONS_MAP)?;
        let (mut all, mut carried) = (0, 0);
        for (key, connection) in old.iter().filter_map(Result::ok) {
            all += 1;
            // If not, it is there already, and newer.
            carried += u64::from(connections.insert(key, connection, BPF_NOEXIST).is_ok());
        }
        census.add(Entries::Carried, carried)?;
        if last {
            census.add(Entries::Forgotten, all)?;
            pins.remove(&aside)?;
        }
    }
    Ok(())
}

/// The kernel's flag: only what is not there yet.
const BPF_NOEXIST: u64 = 1;
