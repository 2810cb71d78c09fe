//! The programs on guests' taps, and what each port may do.

use super::attachment::outside;
use super::batch;
use super::pins::{Content, Pins};
use super::shared::{
    self, ACCOUNT_PIN, Capacity, GENERATION_PIN, Generation, LOST_PIN, Version, inserted, layout, map_error,
    removed, take_map,
};
use super::tables::number;
use super::taps::{TapPrograms, each_present, name_of};
use super::vxlan::{Cost, cost};
use super::{TelemetryError, query};
use aya::maps::lpm_trie::{Key, LpmTrie};
use aya::maps::{HashMap, MapData, MapType, PerCpuArray, PerCpuHashMap};
#[cfg(test)]
use aya::programs::SchedClassifier;
use aya::programs::tc::TcAttachType;
use aya::{Ebpf, include_bytes_aligned};
use godwit_ebpf_common::port::{
    ALLOWED_ADDRESS, ALLOWED_HEAD_BITS, ALLOWED_MAC, ALLOWED_MAC_BITS, ALLOWED_MAP, Allowed, FROM_PROGRAM,
    PORTS_MAP, Port, TO_PROGRAM,
};
use godwit_ebpf_common::tables::{
    ACCOUNT_MAP, Account, AccountKey, CARRY_ACCOUNT_PROGRAM, GENERATION_MAP, LOST_MAP, Lost,
};
use godwit_protocol::network::LocalPort;
use godwit_protocol::port::{Mac, tap_name};
use ipnet::IpNet;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::Path;

/// The programs, as agent/build.rs built them.
pub(super) static OBJECT: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/port"));

const PORTS_PIN: &str = "ports";
const ALLOWED_PIN: &str = "allowed";

/// The program of each side of a tap.
const SIDES: [(&str, TcAttachType); 2] =
    [(FROM_PROGRAM, TcAttachType::Ingress), (TO_PROGRAM, TcAttachType::Egress)];

pub(super) const TAPS: TapPrograms = TapPrograms { prefix: "tap_", sides: SIDES, order: outside };

/// The object `port`, loaded.
pub(super) struct Ports {
    pins: Pins,
    ebpf: Ebpf,
    ports: HashMap<MapData, u32, Port>,
    allowed: LpmTrie<MapData, Allowed, u32>,
    generation: Generation,
    account: PerCpuHashMap<MapData, AccountKey, Account>,
    /// With those that are read along.
    lost: Vec<PerCpuArray<MapData, u64>>,
    /// Wanted ports by their tap.
    wanted: BTreeMap<String, (u32, LocalPort)>,
    /// What is in the map `allowed`.
    rules: BTreeSet<Rule>,
    /// Ports of which something had no room.
    refused: BTreeSet<String>,
}

/// What a port may send from, with prefix and value as in the map.
type Rule = (Allowed, u32, u32);

impl Ports {
    /// Loads the programs. Those that an earlier agent has attached go on until [`Self::adopt`], or until a port's own
    /// are put in their place.
    pub(super) fn open(bpffs: &Path, capacity: &Capacity, version: &Version) -> Result<Self, TelemetryError> {
        let pins = Pins::open(bpffs)?;
        let ports = layout::<u32, Port>(PORTS_MAP, MapType::Hash, capacity.ports, Content::Told);
        pins.make_way(PORTS_PIN, &ports)?;
        let allowed =
            layout::<Key<Allowed>, u32>(ALLOWED_MAP, MapType::LpmTrie, capacity.allowed, Content::Told);
        pins.make_way(ALLOWED_PIN, &allowed)?;
        let mut ebpf = shared::loader(&pins, capacity, version)?
            .map_pin_path(PORTS_MAP, pins.path(PORTS_PIN))
            .map_pin_path(ALLOWED_MAP, pins.path(ALLOWED_PIN))
            .map_max_entries(PORTS_MAP, capacity.ports)
            .map_max_entries(ALLOWED_MAP, capacity.allowed)
            .load(&version.port)
            .map_err(|error| TelemetryError::Object(Box::new(error)))?;
        shared::carry_tables(&pins)?;
        shared::carry_hash::<u32, Port>(&pins, PORTS_PIN, PORTS_MAP)?;
        let mut allowed: LpmTrie<_, Allowed, u32> = take_map(&mut ebpf, ALLOWED_MAP)?;
        for (aside, old) in pins.asides(ALLOWED_PIN, ALLOWED_MAP)? {
            let old: LpmTrie<_, Allowed, u32> = shared::typed(old, ALLOWED_MAP)?;
            for entry in old.iter() {
                let (key, value) = entry.map_err(|source| map_error(ALLOWED_MAP, source))?;
                inserted(ALLOWED_MAP, allowed.insert(&key, value, 0))?;
            }
            pins.remove(&aside)?;
        }
        let mut rules = BTreeSet::new();
        for entry in allowed.iter() {
            let (key, value) = entry.map_err(|source| map_error(ALLOWED_MAP, source))?;
            let data = key.data();
            rules.insert((data, key.prefix_len(), value));
        }
        let ports = take_map(&mut ebpf, PORTS_MAP)?;
        let account = take_map(&mut ebpf, version.name(ACCOUNT_MAP))?;
        let mut lost = vec![take_map(&mut ebpf, version.name(LOST_MAP))?];
        lost.extend(shared::read_along(&pins, LOST_PIN, LOST_MAP)?);
        for (program, _) in SIDES {
            // Both before either is attached: a kernel that refuses one must not be left with the other.
            shared::program_mut(&mut ebpf, program)?;
        }
        let generation = Generation::open(&pins, GENERATION_PIN, GENERATION_MAP)?;
        let (wanted, refused) = (BTreeMap::new(), BTreeSet::new());
        Ok(Self { pins, ebpf, ports, allowed, generation, account, lost, wanted, rules, refused })
    }

    /// Puts these programs in the place of those that an earlier agent has attached, without a packet in between, and
    /// adds what those have counted. When all that they need to know is told.
    pub(super) fn adopt(&mut self) -> Result<(), TelemetryError> {
        TAPS.exchange(&mut self.ebpf, &self.pins)
    }

    /// Adds what programs of another layout have counted, once none of them is in its place any more.
    pub(super) fn carry(&mut self) -> Result<(), TelemetryError> {
        let carrier = &*shared::program_mut(&mut self.ebpf, CARRY_ACCOUNT_PROGRAM)?;
        let drain = |_: &str, old| shared::drain(old, ACCOUNT_MAP, carrier, encode);
        shared::carry_counts(&self.pins, ACCOUNT_PIN, ACCOUNT_MAP, &drain)
    }

    /// That these are the ports of a network on this host.
    pub(super) fn want(&mut self, vni: u32, ports: &[LocalPort]) {
        self.wanted.retain(|_, (other, _)| *other != vni);
        self.wanted.extend(ports.iter().map(|port| (tap_name(port.port), (vni, port.clone()))));
    }

    /// Sets up the taps of a network that are there. A port that cannot be set up does not keep others from it; the
    /// first reason is told.
    pub(super) fn set_up_network(&mut self, vni: u32) -> Result<(), TelemetryError> {
        let own = self.wanted.iter().filter(|(_, (of, _))| *of == vni);
        let own: Vec<_> = own.map(|(tap, wish)| (tap.clone(), wish.clone())).collect();
        each_present(own, |tap, index, (vni, port)| self.set_up(tap, index, *vni, port))
    }

    /// The taps of all wanted ports.
    pub(super) fn taps(&self) -> Vec<(String, ())> {
        self.wanted.keys().map(|tap| (tap.clone(), ())).collect()
    }

    /// Sets up a tap that is there, if it is wanted.
    pub(super) fn set_up_tap(&mut self, tap: &str, index: u32) -> Result<(), TelemetryError> {
        match self.wanted.get(tap).cloned() {
            Some((vni, port)) => self.set_up(tap, index, vni, &port),
            None => Ok(()),
        }
    }

    fn set_up(&mut self, tap: &str, index: u32, vni: u32, port: &LocalPort) -> Result<(), TelemetryError> {
        let rules = rules(index, port);
        let mut full = false;
        for rule in &rules {
            if !self.rules.contains(rule) {
                let (key, value) = entry(rule);
                let is_there = inserted(ALLOWED_MAP, self.allowed.insert(&key, value, 0))?;
                full |= !is_there;
                if is_there {
                    self.rules.insert(*rule);
                }
            }
        }
        let value = settings(vni, port);
        if self.ports.get(&index, 0).ok() != Some(value) {
            full |= !inserted(PORTS_MAP, self.ports.insert(index, value, 0))?;
            self.generation.next()?;
        }
        let first = Allowed { link: index, mac: [0; 6], family: 0, address: [0; 16] };
        let own = self.rules.range((first, 0, 0)..).take_while(|rule| rule.0.link == index);
        let stale: Vec<Rule> = own.filter(|rule| !rules.contains(rule)).copied().collect();
        for rule in stale {
            removed(ALLOWED_MAP, self.allowed.remove(&entry(&rule).0))?;
            self.rules.remove(&rule);
        }
        if full && self.refused.insert(tap.to_owned()) {
            tracing::error!(tap, "a port has no room in the maps: raise `capacity` in agent.toml");
        } else if !full {
            self.refused.remove(tap);
        }
        TAPS.attach(&mut self.ebpf, &self.pins, tap)
    }

    /// Removes what belongs to taps that are not there, or that are no wanted port's any more.
    pub(super) fn forget_gone(&mut self) -> Result<(), TelemetryError> {
        TAPS.forget_gone(&self.pins)?;
        let is_there = |index| name_of(index).is_some();
        let gone: BTreeSet<u32> =
            self.ports.keys().filter_map(Result::ok).filter(|index| !is_there(*index)).collect();
        for index in gone {
            removed(PORTS_MAP, self.ports.remove(&index))?;
            self.generation.next()?;
        }
        let stale: Vec<Rule> = self.rules.iter().filter(|rule| !is_there(rule.0.link)).copied().collect();
        for rule in stale {
            removed(ALLOWED_MAP, self.allowed.remove(&entry(&rule).0))?;
            self.rules.remove(&rule);
        }
        let wanted = &self.wanted;
        self.refused.retain(|tap| wanted.contains_key(tap));
        Ok(())
    }

    /// All accounts, summed over CPUs.
    pub(super) fn read(&self) -> Result<BTreeMap<AccountKey, Account>, TelemetryError> {
        let mut read = BTreeMap::new();
        batch::each_per_cpu(&self.account, ACCOUNT_MAP, |key: AccountKey, values: &[Account]| {
            let mut sum = Account::ZERO;
            values.iter().for_each(|value| sum.add(value));
            read.insert(key, sum);
        })?;
        Ok(read)
    }

    /// What could not be written, for each kind.
    pub(super) fn read_lost(&self) -> Result<[(Lost, u64); Lost::ALL.len()], TelemetryError> {
        let mut counts = Lost::ALL.map(|lost| (lost, 0));
        for (lost, count) in &mut counts {
            *count = shared::sum(&self.lost, *lost as u32, LOST_MAP)?;
        }
        Ok(counts)
    }

    /// What each program costs; all zero unless the kernel was told to count it.
    pub(super) fn read_cost(&self) -> Result<[Cost; 2], TelemetryError> {
        let [from, to] = SIDES.map(|(program, _)| cost(&self.ebpf, program));
        Ok([from?, to?])
    }

    /// Ports that are set up, and the addresses that they may send from.
    pub(super) fn sizes(&self) -> [usize; 2] {
        [self.ports.keys().filter_map(Result::ok).count(), self.rules.len()]
    }

    /// Ports of which something had no room.
    pub(super) fn refused(&self) -> usize {
        self.refused.len()
    }

    /// Taps that are there and have both programs, and those that lack one.
    pub(super) fn attached(&self) -> (usize, usize) {
        let number = |program| Some(self.ebpf.program(program)?.info().ok()?.id());
        let programs = SIDES.map(|(program, side)| (side, number(program)));
        let has = |link, side, program| query::has(link, side, program).unwrap_or(false);
        let has_both = |link: &u32| {
            programs.iter().all(|(side, id)| id.is_some_and(|program| has(*link, *side, program)))
        };
        let there = self.wanted.keys().filter_map(|tap| nix::net::if_::if_nametoindex(tap.as_str()).ok());
        let (on, off): (Vec<_>, Vec<_>) = there.partition(has_both);
        (on.len(), off.len())
    }

    /// Forgets the counts of a network that has left this host.
    pub(super) fn forget(&mut self, vni: u32) -> Result<(), TelemetryError> {
        let mut keys = Vec::new();
        batch::each_per_cpu(&self.account, ACCOUNT_MAP, |key: AccountKey, _: &[Account]| {
            if key.vni == vni {
                keys.push(key);
            }
        })?;
        keys.iter().try_for_each(|key| removed(ACCOUNT_MAP, self.account.remove(key)))
    }

    #[cfg(test)]
    pub(super) fn program_mut(&mut self, name: &'static str) -> &mut SchedClassifier {
        shared::program_mut(&mut self.ebpf, name).expect("the object has it")
    }

    /// Writes a port for a link that is no tap, as tests have it.
    #[cfg(test)]
    pub(super) fn set_port(&mut self, index: u32, vni: u32, port: &LocalPort) {
        for rule in rules(index, port) {
            let (key, value) = entry(&rule);
            self.allowed.insert(&key, value, 0).expect("there is room");
            self.rules.insert(rule);
        }
        self.ports.insert(index, settings(vni, port), 0).expect("there is room");
        self.generation.next().expect("there is one");
    }
}

/// Key and value as `carry_account` takes them.
fn encode(key: &AccountKey, account: &Account) -> Vec<u8> {
    let mut bytes = [&key.port.to_ne_bytes()[..], &key.vni.to_ne_bytes(), &[0; 4]].concat();
    let parts: [&[u64]; 7] = [
        &account.from_packets,
        &account.from_bytes,
        &account.to_packets,
        &account.to_bytes,
        &account.neighbours[0],
        &account.neighbours[1],
        &account.drops,
    ];
    bytes.extend(parts.into_iter().flatten().flat_map(|count| count.to_ne_bytes()));
    bytes
}

fn settings(vni: u32, port: &LocalPort) -> Port {
    let v4 = port.addresses.iter().find_map(|address| match address {
        IpAddr::V4(address) => Some(address.octets()),
        IpAddr::V6(_) => None,
    });
    let v6 = port.addresses.iter().find_map(|address| match address {
        IpAddr::V6(address) => Some(address.octets()),
        IpAddr::V4(_) => None,
    });
    Port {
        id: number(port.port),
        vni,
        flags: if port.port_security { Port::SECURE } else { 0 },
        mac: port.mac.0,
        ipv4: v4.unwrap_or_default(),
        ipv6: v6.unwrap_or_else(|| link_local(port.mac)),
        ..Port::default()
    }
}

/// All that a secure port may send from; nothing for one that may send from everything.
fn rules(link: u32, port: &LocalPort) -> BTreeSet<Rule> {
    let mut rules = BTreeSet::new();
    if !port.port_security {
        return rules;
    }
    let own = port.addresses.iter().map(|address| (port.mac, IpNet::from(*address)));
    let pairs = port.allowed_pairs.iter().copied();
    let senders: Vec<(Mac, IpNet)> = own.chain(pairs).collect();
    for mac in senders.iter().map(|(mac, _)| *mac).chain([port.mac]) {
        let alone = Allowed { link, mac: mac.0, family: 0, address: [0; 16] };
        rules.insert((alone, ALLOWED_MAC_BITS, ALLOWED_MAC));
        let local = Allowed { family: 6, address: link_local(mac), ..alone };
        rules.insert((local, ALLOWED_HEAD_BITS + 128, ALLOWED_ADDRESS));
    }
    for (mac, prefix) in senders {
        let (family, address) = match prefix.network() {
            IpAddr::V4(network) => {
                let mut address = [0; 16];
                address[..4].copy_from_slice(&network.octets());
                (4, address)
            }
            IpAddr::V6(network) => (6, network.octets()),
        };
        let bits = ALLOWED_HEAD_BITS + u32::from(prefix.prefix_len());
        rules.insert((Allowed { link, mac: mac.0, family, address }, bits, ALLOWED_ADDRESS));
    }
    rules
}

fn entry(rule: &Rule) -> (Key<Allowed>, u32) {
    let (allowed, bits, value) = *rule;
    (Key::new(bits, allowed), value)
}

/// The link-local address that follows from an Ethernet address (RFC 4291, appendix A).
fn link_local(mac: Mac) -> [u8; 16] {
    let [a, b, c, d, e, f] = mac.0;
    [0xfe, 0x80, 0, 0, 0, 0, 0, 0, a ^ 2, b, c, 0xff, 0xfe, d, e, f]
}

#[cfg(test)]
mod tests {
    use super::*;
    use godwit_protocol::id::PortId;

    fn port() -> LocalPort {
        LocalPort {
            rules: None,
            leases: vec![],
            port: PortId::random(),
            mac: Mac([0xfa, 0x16, 0x3e, 0, 0, 1]),
            addresses: vec![[10, 0, 0, 1].into()],
            port_security: true,
            allowed_pairs: vec![],
        }
    }

    #[test]
    fn a_pair_of_all_of_ipv6_says_nothing_about_ipv4() {
        let pair = (Mac([0xfa, 0x16, 0x3e, 0, 0, 1]), "::/0".parse().unwrap());
        let rules = rules(7, &LocalPort { allowed_pairs: vec![pair], ..port() });
        let all = rules.iter().find(|(_, bits, _)| *bits == ALLOWED_HEAD_BITS).unwrap();
        assert_eq!(all.0.family, 6);
        assert!(rules.iter().filter(|(allowed, ..)| allowed.family == 4).all(|(_, bits, _)| *bits == 128));
    }

    #[test]
    fn a_port_without_security_has_no_rules() {
        assert_eq!(rules(7, &LocalPort { port_security: false, ..port() }).len(), 0);
        assert_eq!(rules(7, &port()).len(), 3, "its Ethernet address, its link-local and its own address");
    }
}
