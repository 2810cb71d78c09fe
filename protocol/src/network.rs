//! Networks as a host must build them: the wanted state of one VXLAN network on one host.

use crate::id::{NetworkId, PortId, SecurityGroupId};
use crate::port::{Lease, Mac};
use crate::security::Rule;
use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use std::net::IpAddr;

/// All that one host must know of one network. It is whole, not a delta: the host compares it with the kernel
/// and changes only what differs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkWanted {
    /// Which.
    pub network: NetworkId,
    /// Its number, which names its links: the VXLAN network identifier, 1 to 16777215, or from [`FIRST_PROVIDED`] on
    /// for a network that a provider's link carries.
    pub vni: u32,
    /// What carries it from host to host.
    #[serde(default)]
    pub carrier: Carrier,
    /// MTU of the overlay in bytes.
    pub mtu: u32,
    /// UDP port of VXLAN.
    pub udp_port: u16,
    /// Counts up with each change; the host ignores an older one.
    pub generation: u64,
    /// Ports on this host.
    pub ports: Vec<LocalPort>,
    /// Ports on other hosts.
    pub forwarding: Vec<Forwarding>,
    /// VTEPs of the other hosts that have a port here: where broadcast goes.
    pub flood: Vec<IpAddr>,
    /// Ethernet addresses that may be at any port, by an allowed pair of it: they have no place of their own.
    #[serde(default)]
    pub floating: Vec<Mac>,
    /// IPv6 addresses of routers: the gateways of the subnets.
    #[serde(default)]
    pub routers: Vec<IpAddr>,
    /// What becomes of a packet for an Ethernet address that no port has.
    #[serde(default = "Unknown::drop")]
    pub unknown_unicast: Unknown,
    /// What becomes of a question, by ARP or neighbour discovery, for an IP address that no port has.
    #[serde(default = "Unknown::flood")]
    pub unknown_neighbours: Unknown,
    /// Who belongs to the security groups that rules of [`Self::ports`] name.
    #[serde(default)]
    pub groups: Vec<GroupMembers>,
}

/// The addresses of a security group's members in one network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupMembers {
    /// Which group.
    pub group: SecurityGroupId,
    /// Of its ports, their allowed pairs included; without doubles, in order.
    pub members: Vec<IpNet>,
}

/// The first number of networks that have no VXLAN network identifier.
pub const FIRST_PROVIDED: u32 = 1 << 24;

/// What carries a network from host to host.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Carrier {
    /// VXLAN; broadcast goes as one copy to each host that has a port.
    #[default]
    Vxlan,
    /// VXLAN; broadcast goes as one packet to a group of the underlay, which each host with a port joins.
    VxlanGroup {
        /// The multicast address.
        group: IpAddr,
        /// Hops that a packet to it may take, from 1. The kernel has one figure for all packets of a device: more than
        /// 1 holds for those to single hosts too.
        ttl: u8,
    },
    /// A link of the host, untagged, by the name that `physical_networks` in agent.toml gives it.
    Flat(String),
    /// The same with a tag (IEEE 802.1Q), 1 to 4094.
    Vlan(String, u16),
}

impl Carrier {
    /// Whether the network is an overlay of VXLAN packets.
    pub fn is_vxlan(&self) -> bool {
        matches!(self, Self::Vxlan | Self::VxlanGroup { .. })
    }

    /// Hops that a packet to the network's group may take; none: it has no group.
    pub fn group_ttl(&self) -> Option<u8> {
        match self {
            Self::VxlanGroup { ttl, .. } => Some(*ttl),
            _ => None,
        }
    }
}

/// What a port does with what nobody has told it of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Unknown {
    /// It ends there, and is counted.
    Drop,
    /// It goes to every host with a port in the network.
    Flood,
}

impl Unknown {
    /// The policy for unknown unicast where none is set.
    pub const fn drop() -> Self {
        Self::Drop
    }

    /// The policy for unknown neighbours where none is set: an allowed pair's address has no place that a
    /// coordinator could know.
    pub const fn flood() -> Self {
        Self::Flood
    }
}

/// A port on this host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LocalPort {
    /// Which.
    pub port: PortId,
    /// Its address.
    pub mac: Mac,
    /// Its IP addresses.
    pub addresses: Vec<IpAddr>,
    /// Whether it may send from these only, and no router advertisement or DHCP answer.
    #[serde(default = "secure")]
    pub port_security: bool,
    /// What else it may send from: an Ethernet address with the IP addresses that go with it.
    #[serde(default)]
    pub allowed_pairs: Vec<(Mac, IpNet)>,
    /// What may pass; none: everything.
    #[serde(default)]
    pub rules: Option<Vec<Rule>>,
    /// What it is told when it asks by DHCP.
    #[serde(default)]
    pub leases: Vec<Lease>,
}

const fn secure() -> bool {
    true
}

/// A port on another host, and where that is.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Forwarding {
    /// The port's address.
    pub mac: Mac,
    /// Its IP addresses.
    pub addresses: Vec<IpAddr>,
    /// The other host's VTEP.
    pub vtep: IpAddr,
}

/// What a host has programmed for a network, read back from the kernel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkReported {
    /// The network's number; see [`NetworkWanted::vni`].
    pub vni: u32,
    /// The newest generation that the host was told and keeps; none: it does not know of any.
    #[serde(default)]
    pub generation: Option<u64>,
    /// Forwarding entries of the VXLAN device.
    pub forwarding: Vec<(Mac, IpAddr)>,
    /// Destinations of broadcast.
    pub flood: Vec<IpAddr>,
    /// Hops that a packet to the network's group may take; none: it has no group.
    #[serde(default)]
    pub group_ttl: Option<u8>,
}

/// Name of the network's bridge on a host.
pub fn bridge_name(vni: u32) -> String {
    format!("gwb{vni}")
}

/// Name of the network's VXLAN or VLAN device on a host.
pub fn vxlan_name(vni: u32) -> String {
    format!("gwv{vni}")
}
