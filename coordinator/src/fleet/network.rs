//! Networks, subnets, ports.

use super::Time;
use godwit_protocol::id::{HostId, InstanceId, NetworkId, PortId, ProjectId, SecurityGroupId, SubnetId};
use godwit_protocol::port::Mac;
use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use std::net::IpAddr;

/// What carries a network from host to host.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Segment {
    /// VXLAN, by the network's number.
    #[default]
    Vxlan,
    /// A link of each host, untagged.
    Flat {
        /// The name that agent.toml gives the link.
        physical: String,
    },
    /// The same with a tag (IEEE 802.1Q).
    Vlan {
        /// The name that agent.toml gives the link.
        physical: String,
        /// 1 to 4094.
        tag: u16,
    },
}

impl Segment {
    /// The name of the hosts' link, unless it is VXLAN.
    pub fn physical(&self) -> Option<&str> {
        match self {
            Self::Vxlan => None,
            Self::Flat { physical } | Self::Vlan { physical, .. } => Some(physical),
        }
    }
}

/// A network.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Network {
    /// Its id.
    pub id: NetworkId,
    /// Not unique.
    pub name: String,
    /// For people.
    pub description: String,
    /// Owner.
    pub project: ProjectId,
    /// Its number on the hosts, unique: of a VXLAN network the identifier, else one that is larger than those.
    pub vni: u32,
    /// What carries it.
    #[serde(default)]
    pub segment: Segment,
    /// MTU inside, in bytes.
    pub mtu: u32,
    /// Ports may be made by every project.
    pub shared: bool,
    /// Whether traffic may pass.
    pub admin_state_up: bool,
    /// Whether its ports have port security when they do not say.
    #[serde(default = "secure")]
    pub port_security: bool,
    /// Labels.
    #[serde(default)]
    pub tags: Vec<String>,
    /// Counts up with each change of what hosts must know of it.
    pub generation: u64,
    /// Counts up with each change by users.
    pub revision: u64,
    /// When.
    pub created_at: Time,
    /// When.
    pub updated_at: Time,
}

/// A range of addresses in a network.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Subnet {
    /// Its id.
    pub id: SubnetId,
    /// Its network.
    pub network: NetworkId,
    /// Not unique.
    pub name: String,
    /// For people.
    pub description: String,
    /// Owner.
    pub project: ProjectId,
    /// The range, with the host bits zero.
    pub cidr: IpNet,
    /// The gateway, when there is one.
    pub gateway: Option<IpAddr>,
    /// Ranges, both ends included, from which ports get addresses.
    pub pools: Vec<(IpAddr, IpAddr)>,
    /// Name servers.
    pub dns: Vec<IpAddr>,
    /// Routes beside the gateway: destination and next hop.
    pub routes: Vec<(IpNet, IpAddr)>,
    /// Whether guests are to ask for their address.
    pub dhcp: bool,
    /// Labels.
    #[serde(default)]
    pub tags: Vec<String>,
    /// Counts up with each change by users.
    pub revision: u64,
    /// When.
    pub created_at: Time,
    /// When.
    pub updated_at: Time,
}

/// An address of a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FixedIp {
    /// Its subnet.
    pub subnet: SubnetId,
    /// The address.
    pub address: IpAddr,
}

/// An attachment to a network: an instance's, or an external one on a named host.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Port {
    /// Its id.
    pub id: PortId,
    /// Its network.
    pub network: NetworkId,
    /// May be empty.
    pub name: String,
    /// For people.
    pub description: String,
    /// Owner.
    pub project: ProjectId,
    /// Unique in its network.
    pub mac: Mac,
    /// Its addresses.
    pub fixed_ips: Vec<FixedIp>,
    /// Whose NIC it is.
    pub instance: Option<InstanceId>,
    /// What clients call the device, when it is no instance of ours.
    pub device_id: String,
    /// `compute:nova`, or what the user said.
    pub device_owner: String,
    /// The how-many-th NIC it is.
    pub index: u32,
    /// Made for its instance, and deleted with it.
    pub owned_by_instance: bool,
    /// Where it is plugged in.
    pub host: Option<HostId>,
    /// Where it will be, while its instance migrates.
    pub target_host: Option<HostId>,
    /// Whether traffic may pass.
    pub admin_state_up: bool,
    /// Whether it may send from its own addresses and [`Self::allowed_pairs`] only.
    #[serde(default = "secure")]
    pub port_security: bool,
    /// What else it may send from: an Ethernet address with the IP addresses that go with it.
    #[serde(default)]
    pub allowed_pairs: Vec<(Mac, IpNet)>,
    /// The groups whose rules say what may pass; none: it is from before there were groups, and everything may.
    #[serde(default)]
    pub security_groups: Option<Vec<SecurityGroupId>>,
    /// Labels.
    #[serde(default)]
    pub tags: Vec<String>,
    /// Counts up with each change by users.
    pub revision: u64,
    /// When.
    pub created_at: Time,
    /// When.
    pub updated_at: Time,
}

/// Ports of a record from before port security have it.
const fn secure() -> bool {
    true
}
