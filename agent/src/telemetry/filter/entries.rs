//! What a port's rules are in the maps.

use godwit_ebpf_common::filter::{EGRESS, Filter, INGRESS, MAX_RULES, MEMBER_BITS, Member, Rule, halves};
use godwit_protocol::id::SecurityGroupId;
use godwit_protocol::network::{LocalPort, NetworkWanted};
use godwit_protocol::security::{self, Family, Remote};
use ipnet::IpNet;
use std::collections::BTreeSet;
use std::net::IpAddr;

/// Which way a packet goes, as its guest sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direction {
    /// To it.
    Ingress,
    /// From it.
    Egress,
}

impl Direction {
    /// Both.
    pub(super) const ALL: [Self; 2] = [Self::Ingress, Self::Egress];

    /// As in the maps' keys.
    pub(super) const fn number(self) -> u32 {
        match self {
            Self::Ingress => INGRESS,
            Self::Egress => EGRESS,
        }
    }
}

/// What is wanted of a port, as its two entries have it.
#[derive(Clone, Debug)]
pub(super) struct Wish {
    vni: u32,
    flags: u32,
    rules: [Vec<Rule>; 2],
}

impl Wish {
    /// Of a port in the network of this number.
    pub(super) fn of(vni: u32, port: &LocalPort) -> Self {
        let mut flags = 0;
        for lease in &port.leases {
            flags |= if lease.address.is_ipv4() { Filter::DHCP_V4 } else { Filter::DHCP_V6 };
        }
        let mut rules = [Vec::new(), Vec::new()];
        if let Some(wanted) = &port.rules {
            flags |= Filter::RULES;
            for rule in wanted {
                let direction = match rule.direction {
                    security::Direction::Ingress => INGRESS,
                    security::Direction::Egress => EGRESS,
                };
                let list = &mut rules[direction as usize];
                let rule = encode(rule);
                // The coordinator refuses more than there is room for; what would be too much is not let pass.
                if list.len() < MAX_RULES && !list.contains(&rule) {
                    list.push(rule);
                }
            }
        }
        Self { vni, flags, rules }
    }

    /// One direction, without its times.
    pub(super) fn filter(&self, direction: Direction) -> Filter {
        let rules = &self.rules[direction.number() as usize];
        let mut all = [Rule::default(); MAX_RULES];
        for (place, rule) in all.iter_mut().zip(rules) {
            *place = *rule;
        }
        Filter {
            arrival_ends_ns: 0,
            vni: self.vni,
            flags: self.flags,
            epoch: 0,
            count: rules.len().min(MAX_RULES) as u32,
            rules: all,
        }
    }

    /// Whether an entry says just that.
    pub(super) fn agrees(&self, found: &Filter, direction: Direction) -> bool {
        let rules = &self.rules[direction.number() as usize];
        let count = found.count as usize;
        (found.vni, found.flags) == (self.vni, self.flags)
            && found.rules.get(..count).is_some_and(|found| found == rules.as_slice())
    }
}

fn encode(rule: &security::Rule) -> Rule {
    let (range, group) = match rule.remote {
        Remote::Any => (None, None),
        Remote::Range(range) => (Some(range), None),
        Remote::Group(group) => (None, Some(group)),
    };
    let (address, mask) = range.map_or(([0; 2], [0; 2]), bits);
    let (first, last) = match (rule.ports, rule.icmp) {
        (Some(ports), _) => ports,
        (None, Some((kind, Some(code)))) => {
            let exact = u16::from(kind) << 8 | u16::from(code);
            (exact, exact)
        }
        (None, Some((kind, None))) => (u16::from(kind) << 8, u16::from(kind) << 8 | 0xff),
        (None, None) => (0, u16::MAX),
    };
    let stateless = if rule.stateful { 0 } else { Rule::STATELESS };
    Rule {
        address,
        mask,
        group: group.map(short).unwrap_or_default(),
        first,
        last,
        protocol: rule.protocol.unwrap_or(0),
        family: match rule.family {
            Family::V4 => 4,
            Family::V6 => 6,
        },
        flags: stateless | if group.is_some() { Rule::GROUP } else { 0 },
        reserved: 0,
    }
}

/// A range as it is compared.
fn bits(range: IpNet) -> ([u64; 2], [u64; 2]) {
    let mask = match range.netmask() {
        IpAddr::V4(mask) => mapped(mask.octets(), 0xff),
        IpAddr::V6(mask) => mask.octets(),
    };
    (halves(&address(range.network())), halves(&mask))
}

/// IPv4 as IPv6 maps it; the bits before it are `first`.
fn mapped(octets: [u8; 4], first: u8) -> [u8; 16] {
    let mut address = [first; 16];
    if first == 0 {
        (address[10], address[11]) = (0xff, 0xff);
    }
    address[12..].copy_from_slice(&octets);
    address
}

fn address(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(address) => mapped(address.octets(), 0),
        IpAddr::V6(address) => address.octets(),
    }
}

fn short(group: SecurityGroupId) -> [u8; 8] {
    let [a, b, c, d, e, f, g, h, ..] = *group.0.as_bytes();
    [a, b, c, d, e, f, g, h]
}

/// The members of a network's groups, with the length of their prefix.
pub(super) fn members(wanted: &NetworkWanted) -> BTreeSet<(Member, u32)> {
    let of_group =
        wanted.groups.iter().flat_map(|group| group.members.iter().map(|range| (group.group, range)));
    let entry = |(group, range): (SecurityGroupId, &IpNet)| {
        let member = Member { vni: wanted.vni, group: short(group), address: address(range.network()) };
        let before = if range.addr().is_ipv4() { MEMBER_BITS + 96 } else { MEMBER_BITS };
        (member, before + u32::from(range.prefix_len()))
    };
    of_group.map(entry).collect()
}
