//! A host as it describes itself: cells, cores, memory, pages, links, hypervisor.

use crate::id::HostId;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::IpAddr;
use uuid::Uuid;

/// Everything that placement and people need to know of a host. It changes rarely; its digest travels with
/// each heartbeat.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Inventory {
    /// The host's name, unique in the fleet.
    pub hostname: String,
    /// Version of the agent.
    pub agent_version: String,
    /// Kernel release, as `uname -r` prints it.
    pub kernel: String,
    /// `x86_64`, …
    pub architecture: String,
    /// CPU model name, empty when the kernel tells none.
    pub cpu_model: String,
    /// What runs the guests.
    pub hypervisor: HypervisorInfo,
    /// NUMA cells, by id.
    pub cells: Vec<Cell>,
    /// Memory kept from guests, in bytes, taken from the first cell that has it.
    pub reserved_memory_bytes: u64,
    /// Network devices of the host itself (no taps, no overlay devices).
    pub links: Vec<Link>,
    /// Where VXLAN packets leave.
    pub underlay: Underlay,
    /// Address and TCP port where migration streams from other hosts are accepted.
    pub migration_address: Option<std::net::SocketAddr>,
    /// The storage the host reaches.
    pub pools: Vec<PoolReport>,
    /// Links that flat and VLAN networks may use.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub physical_networks: Vec<PhysicalNetwork>,
}

/// A link that flat and VLAN networks may use.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PhysicalNetwork {
    /// Its name in the API.
    pub name: String,
    /// The host's link.
    pub link: String,
    /// The link's MTU in bytes.
    pub mtu: u32,
}

/// The hypervisor under libvirt.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HypervisorInfo {
    /// `QEMU`.
    pub kind: String,
    /// libvirt's version, `11.3.0`.
    pub libvirt_version: String,
    /// QEMU's version, `10.0.2`.
    pub version: String,
    /// Whether KVM was proven to work here; else guests are emulated (TCG).
    pub kvm: bool,
}

/// A NUMA cell.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cell {
    /// The kernel's number; numbers may be sparse.
    pub id: u32,
    /// Online CPUs of the cell.
    pub cpus: Vec<Cpu>,
    /// The cell's memory in bytes, huge pages included.
    pub memory_bytes: u64,
    /// Page pools by page size, the ordinary page size included.
    pub page_pools: Vec<PagePool>,
    /// ACPI SLIT distances to the cells; none when the kernel tells none.
    pub distances: BTreeMap<u32, u32>,
    /// CPUs that guests' floating vCPUs share.
    pub shared_cpus: Vec<u32>,
    /// CPUs that may be pinned one to one.
    pub dedicated_cpus: Vec<u32>,
}

/// An online CPU (a hardware thread).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cpu {
    /// The kernel's number.
    pub id: u32,
    /// Physical package.
    pub package: i64,
    /// Die inside the package.
    pub die: i64,
    /// Core number, unique only inside a package.
    pub core: i64,
    /// Hardware threads of the same core, this one included.
    pub siblings: Vec<u32>,
    /// The cluster of cores it is in, by its lowest CPU; none when the kernel tells none.
    #[serde(default)]
    pub cluster: Option<u32>,
    /// The third-level cache it shares, by the lowest CPU that does; none when it has none.
    #[serde(default)]
    pub l3: Option<u32>,
    /// What kind of core it is of, on a host with several.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kind: Option<CoreKind>,
    /// What it can do beside the fastest CPU, which has 1024; 0 where the kernel does not tell, or all are alike.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub capacity: u16,
}

fn is_zero(number: &u16) -> bool {
    *number == 0
}

/// Kinds of cores of a hybrid processor, as the kernel calls them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CoreKind {
    /// For performance.
    Core,
    /// For efficiency.
    Atom,
    /// For more efficiency, outside of the cores' die.
    Lowpower,
}

impl CoreKind {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Core, Self::Atom, Self::Lowpower];

    /// The kernel's name, behind `cpu_`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Core => "core",
            Self::Atom => "atom",
            Self::Lowpower => "lowpower",
        }
    }
}

/// Pages of one size in a cell.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PagePool {
    /// Page size in KiB.
    pub size_kib: u64,
    /// Pages there are.
    pub total: u64,
    /// Huge pages that others than the host's guests hold.
    #[serde(default)]
    pub taken: u64,
}

/// A network device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Link {
    /// `eth0`.
    pub name: String,
    /// Hardware address, lower case with colons; empty when it has none.
    pub mac: String,
    /// In bytes.
    pub mtu: u32,
    /// Whether it is administratively up and has a carrier.
    pub up: bool,
    /// Addresses on it.
    pub addresses: Vec<IpAddr>,
    /// The NUMA cell of its device.
    pub cell: Option<u32>,
}

/// Where the host's VXLAN packets leave.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Underlay {
    /// The link.
    pub link: String,
    /// The host's VTEP address.
    pub address: IpAddr,
    /// The link's MTU in bytes; an IPv4 overlay may use 50 less.
    pub mtu: u32,
}

/// A pool as the host sees it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PoolReport {
    /// Its name.
    pub name: String,
    /// Where it is mounted.
    pub path: String,
    /// `dir`: a folder that an administrator provides; `nfs`: a share that the agent mounts.
    pub kind: String,
    /// The share, `server:/export`.
    pub source: Option<String>,
    /// In bytes.
    pub total_bytes: u64,
    /// In bytes, for root; left out of the inventory's digest.
    pub free_bytes: u64,
    /// Files that it can hold; 0 where the file system makes inodes as it goes.
    pub total_inodes: u64,
    /// Files that it can still hold; left out of the inventory's digest.
    pub free_inodes: u64,
    /// Whether the folder answered within its deadline.
    pub reachable: bool,
    /// The mark of the pool, the same on each host that has it; none where there can be none.
    pub mark: Option<Uuid>,
}

/// Tiny sign of life, sent as a datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Heartbeat {
    /// Who.
    pub host: HostId,
    /// The generation of its newest report.
    pub generation: u64,
    /// Digest of its inventory, without volatile figures.
    pub inventory_digest: u64,
}
