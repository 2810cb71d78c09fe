//! Networks as a host must build them: the wanted state of one VXLAN network on one host.

use crate::id::{NetworkId, PortId};
use crate::port::Mac;
use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use std::net::IpAddr;

/// All that one host must know of one network. It is whole, not a delta: the host compares it with the kernel
/// and changes only what differs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkWanted {
    /// Which.
    pub network: NetworkId,
    /// VXLAN network identifier, 1 to 16777215.
    pub vni: u32,
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
    /// VXLAN network identifier.
    pub vni: u32,
    /// Forwarding entries of the VXLAN device.
    pub forwarding: Vec<(Mac, IpAddr)>,
    /// Destinations of broadcast.
    pub flood: Vec<IpAddr>,
}

/// Name of the network's bridge on a host.
pub fn bridge_name(vni: u32) -> String {
    format!("gwb{vni}")
}

/// Name of the network's VXLAN device on a host.
pub fn vxlan_name(vni: u32) -> String {
    format!("gwv{vni}")
}
