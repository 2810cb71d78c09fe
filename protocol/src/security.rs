//! Security groups as a host must apply them: what may pass at a port.

use crate::id::SecurityGroupId;
use ipnet::IpNet;
use serde::{Deserialize, Serialize};

/// Rules of one port and direction, at most: what the hosts' filter holds.
pub const MAX_RULES: usize = 128;

/// Which way a packet goes, as the guest sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Direction {
    /// To the guest.
    Ingress,
    /// From the guest.
    Egress,
}

/// Of which family a packet is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

/// At which addresses the other end of a connection may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Remote {
    /// Anywhere.
    Any,
    /// In this range.
    Range(IpNet),
    /// At an address of this group's members in the same network.
    Group(SecurityGroupId),
}

/// What may pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Rule {
    /// Which way the connection is opened.
    pub direction: Direction,
    /// Of which family.
    pub family: Family,
    /// IANA's number of the protocol; none: any.
    pub protocol: Option<u8>,
    /// Destination ports of TCP, UDP, UDP-Lite, SCTP and DCCP, both ends included; none: any.
    pub ports: Option<(u16, u16)>,
    /// Type and perhaps code of ICMP and ICMPv6; none: any.
    pub icmp: Option<(u8, Option<u8>)>,
    /// Where the other end is.
    pub remote: Remote,
    /// Whether answers pass too. Without, each direction needs its own rule.
    pub stateful: bool,
}
