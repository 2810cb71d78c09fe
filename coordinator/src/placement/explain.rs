//! Why a host, or every host, cannot take an instance: the first rule that fails, need against have.

use std::fmt;
use std::sync::Arc;

use godwit_protocol::id::HostId;
use thiserror::Error;

use super::guest::PageSize;
use super::host_view::HostState;

/// The rules a host must meet, in the order of their checks. The names are stable: users, logs and tests refer
/// to them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Rule {
    /// The host takes no new instances.
    HostDisabled,
    /// The host is being emptied.
    HostDraining,
    /// The host has been silent too long.
    HostLost,
    /// The host is late with its heartbeat.
    HostLate,
    /// The host is in the availability zone asked for.
    AvailabilityZone,
    /// The metadata of the host's aggregates is as the flavor wants it.
    AggregateMetadata,
    /// The host's aggregates take this project.
    AggregateProject,
    /// The host has the instances that this one must be beside.
    SameHost,
    /// The host has none of the instances that this one must be apart from.
    DifferentHost,
    /// The host has the other members of the group.
    GroupAffinity,
    /// The host has room for one more member of the group.
    GroupAntiAffinity,
    /// The host's architecture is the one asked for.
    Architecture,
    /// The host's processor is the one that the running guest has.
    CpuModel,
    /// The host's underlay is up.
    NetworkReachable,
    /// The networks' frames fit into the host's underlay, or into its link of a physical network.
    NetworkMtu,
    /// The host has the physical networks that carry the networks.
    PhysicalNetwork,
    /// The host reaches a pool for the disk.
    PoolReachable,
    /// Free space in the pool.
    DiskFree,
    /// The host has as many shared CPUs as the instance has floating vCPUs.
    VcpusTotal,
    /// Floating vCPUs within the host's overcommit.
    VcpusFree,
    /// The host has as much ordinary memory as the instance.
    MemoryTotal,
    /// Ordinary memory within the host's overcommit.
    MemoryFree,
    /// The host has as many cells as the guest.
    CellCount,
    /// The cell has CPUs, or the guest cell has no vCPUs.
    CellCpus,
    /// The cell has pages of a size that is asked for.
    PageSizeSupported,
    /// The guest cell's memory is a whole number of pages.
    PageAlignment,
    /// Free pages in the cell.
    PagesFree,
    /// The cell has as much memory as the guest cell.
    CellMemoryTotal,
    /// Free memory in the cell.
    CellMemoryFree,
    /// The cell has as many dedicated CPUs as are wanted.
    CpuDedicatedTotal,
    /// The cell has as many shared CPUs as the guest cell has floating vCPUs.
    CpuSharedTotal,
    /// Free dedicated CPUs in the cell.
    CpuDedicatedFree,
    /// The cell's cores have more than one thread (policy require).
    CpuThreadsPresent,
    /// Free siblings (policy require).
    CpuSiblingsFree,
    /// The cell's cores have one thread, or one common set of CPUs (policy isolate).
    CpuIsolateSplitSets,
    /// Wholly free cores (policy isolate).
    CpuCoresFree,
    /// Free CPUs for the emulator beside the pinned vCPUs.
    EmulatorCpusFree,
    /// Floating vCPUs within the cell's overcommit.
    CpuSharedFree,
    /// Memory within the cell's overcommit.
    CellMemoryOvercommit,
    /// Each guest cell fits somewhere, and all fit at once.
    CellMatching,
}

impl Rule {
    /// The rule's stable name.
    pub fn name(self) -> &'static str {
        self.texts().0
    }

    fn texts(self) -> (&'static str, &'static str) {
        match self {
            Self::HostDisabled => ("host_disabled", "the host takes no new instances"),
            Self::HostDraining => ("host_draining", "the host is being emptied"),
            Self::HostLost => ("host_lost", "the host is lost"),
            Self::HostLate => ("host_late", "the host is late with its heartbeat"),
            Self::AvailabilityZone => ("availability_zone", "the host is in another zone"),
            Self::AggregateMetadata => {
                ("aggregate_metadata", "the host's aggregates do not say what the flavor wants")
            }
            Self::AggregateProject => ("aggregate_project", "the host's aggregate is kept to other projects"),
            Self::SameHost => ("same_host", "not the host of the instances to be beside"),
            Self::DifferentHost => ("different_host", "the host of an instance to be apart from"),
            Self::GroupAffinity => ("group_affinity", "the group's members are on another host"),
            Self::GroupAntiAffinity => ("group_anti_affinity", "the host has members of the group"),
            Self::Architecture => ("architecture", "another architecture"),
            Self::CpuModel => ("cpu_model", "the running guest needs the processor it has"),
            Self::NetworkReachable => ("network_reachable", "the host's underlay is down"),
            Self::NetworkMtu => ("network_mtu", "the networks' frames do not fit into the host's link"),
            Self::PhysicalNetwork => ("physical_network", "the host lacks a network's physical network"),
            Self::PoolReachable => ("pool_reachable", "the host does not reach its pool"),
            Self::DiskFree => ("disk_free", "not enough free space in the pool"),
            Self::VcpusTotal => ("vcpus_total", "more floating vCPUs than the host has shared CPUs"),
            Self::VcpusFree => ("vcpus_free", "not enough room for floating vCPUs"),
            Self::MemoryTotal => ("memory_total", "more memory than the host has"),
            Self::MemoryFree => ("memory_free", "not enough free memory"),
            Self::CellCount => ("cell_count", "fewer cells than the guest has"),
            Self::CellCpus => ("cell_cpus", "the cell has memory only"),
            Self::PageSizeSupported => ("page_size_supported", "no pages of the size asked for"),
            Self::PageAlignment => ("page_alignment", "the memory is no whole number of pages"),
            Self::PagesFree => ("pages_free", "not enough free pages"),
            Self::CellMemoryTotal => ("cell_memory_total", "more memory than the cell has"),
            Self::CellMemoryFree => ("cell_memory_free", "not enough free memory in the cell"),
            Self::CpuDedicatedTotal => ("cpu_dedicated_total", "more dedicated CPUs than the cell has"),
            Self::CpuSharedTotal => ("cpu_shared_total", "more floating vCPUs than the cell has shared CPUs"),
            Self::CpuDedicatedFree => ("cpu_dedicated_free", "not enough free dedicated CPUs in the cell"),
            Self::CpuThreadsPresent => {
                ("cpu_threads_present", "thread policy require, but the cell's cores have one thread")
            }
            Self::CpuSiblingsFree => ("cpu_siblings_free", "not enough free sibling threads in the cell"),
            Self::CpuIsolateSplitSets => (
                "cpu_isolate_split_sets",
                "thread policy isolate needs cores of one thread, or one common set of shared and dedicated CPUs",
            ),
            Self::CpuCoresFree => ("cpu_cores_free", "not enough wholly free cores in the cell"),
            Self::EmulatorCpusFree => ("emulator_cpus_free", "no free CPU in the cell for the emulator"),
            Self::CpuSharedFree => ("cpu_shared_free", "not enough room for floating vCPUs in the cell"),
            Self::CellMemoryOvercommit => ("cell_memory_overcommit", "not enough memory in the cell"),
            Self::CellMatching => ("cell_matching", "each guest cell fits somewhere, but not all at once"),
        }
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// An amount needed or had.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Quantity {
    /// A host's state.
    State(HostState),
    /// Host cells.
    Cells(u64),
    /// Host CPUs.
    Cpus(u64),
    /// Floating vCPUs.
    Vcpus(u64),
    /// Host CPUs that have a free sibling.
    SiblingCpus(u64),
    /// Wholly free cores.
    Cores(u64),
    /// Threads in a core.
    Threads(u64),
    /// Memory in MiB.
    MemoryMib(u64),
    /// Pages of one size in KiB.
    Pages {
        /// How many.
        count: u64,
        /// Of what size.
        size_kib: u64,
    },
    /// A page size wanted.
    PageSize(PageSize),
    /// Pools of that size there are.
    Pools(u64),
    /// Disk space in bytes.
    DiskBytes(u64),
    /// Members of a group.
    Members(u64),
    /// What is no amount: a zone, a value, a processor.
    Text(Arc<str>),
}

impl fmt::Display for Quantity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::State(state) => f.write_str(state.name()),
            Self::Cells(count) => write!(f, "{count} cells"),
            Self::Cpus(count) => write!(f, "{count} CPUs"),
            Self::Vcpus(count) => write!(f, "{count} vCPUs"),
            Self::SiblingCpus(count) => write!(f, "{count} sibling CPUs"),
            Self::Cores(count) => write!(f, "{count} cores"),
            Self::Threads(count) => write!(f, "{count} threads a core"),
            Self::MemoryMib(mib) => write!(f, "{mib} MiB"),
            Self::Pages { count, size_kib } => write!(f, "{count} pages of {size_kib} KiB"),
            Self::PageSize(PageSize::Small) => f.write_str("small pages"),
            Self::PageSize(PageSize::Large) => f.write_str("large pages"),
            Self::PageSize(PageSize::Any) => f.write_str("pages of any size"),
            Self::PageSize(PageSize::Kib(kib)) => write!(f, "pages of {kib} KiB"),
            Self::Pools(count) => write!(f, "{count} such pools"),
            Self::Members(count) => write!(f, "{count} group members"),
            Self::Text(text) => f.write_str(text),
            Self::DiskBytes(bytes) => write!(f, "{} MiB of disk", bytes.div_ceil(1 << 20)),
        }
    }
}

/// A rule that fails, need against have.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{} ({rule}): needs {need}, has {have}", rule.texts().1)]
pub struct Shortfall {
    /// The rule.
    pub rule: Rule,
    /// What the request needs.
    pub need: Quantity,
    /// What the host has.
    pub have: Quantity,
}

impl Shortfall {
    pub(super) fn new(rule: Rule, need: Quantity, have: Quantity) -> Self {
        Self { rule, need, have }
    }
}

/// Which guest cell fails, and on which host cell it came nearest to fitting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CellPair {
    /// The guest's cell, counted from 0.
    pub guest: u32,
    /// The host's cell.
    pub host: u32,
}

/// Why a guest with cells does not fit into a host's cells.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{shortfall}")]
pub struct FitError {
    /// The rule that fails.
    pub shortfall: Shortfall,
    /// Where it fails, when it fails for one guest cell.
    pub cells: Option<CellPair>,
}

impl From<Shortfall> for FitError {
    fn from(shortfall: Shortfall) -> Self {
        Self { shortfall, cells: None }
    }
}

/// Why one host cannot take the instance.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{name}: {}{shortfall}", place(*.cells))]
pub struct HostRefusal {
    /// The host.
    pub host: HostId,
    /// Its name.
    pub name: String,
    /// The first rule that fails, need against have.
    pub shortfall: Shortfall,
    /// Where it fails, when it fails for one guest cell.
    pub cells: Option<CellPair>,
}

fn place(cells: Option<CellPair>) -> String {
    cells.map_or_else(String::new, |pair| format!("guest cell {} on cell {}: ", pair.guest, pair.host))
}

/// Up to so many hosts a refusal's text names each.
const NAMED_HOSTS: usize = 8;

/// Why no host can take the instance: every host with its reason, in the order the hosts were given.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub struct Refusal {
    /// One entry a host.
    pub hosts: Vec<HostRefusal>,
    /// The smallest change that would make room, when it was looked for and found.
    pub change: Option<String>,
}

impl fmt::Display for Refusal {
    /// For a fault message: every host with its rule, need against have. A large fleet is summed up instead: how
    /// many hosts failed which rule, and the nearest miss in full.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut rules: Vec<Rule> = self.hosts.iter().map(|refusal| refusal.shortfall.rule).collect();
        rules.sort_unstable();
        let Some(nearest) = self.hosts.iter().max_by_key(|refusal| refusal.shortfall.rule) else {
            return f.write_str("no host can take the instance: there are no hosts");
        };
        write!(f, "none of {} hosts can take the instance: ", self.hosts.len())?;
        if self.hosts.len() <= NAMED_HOSTS {
            let reasons: Vec<String> = self.hosts.iter().map(ToString::to_string).collect();
            f.write_str(&reasons.join("; "))?;
            return self.write_change(f);
        }
        for (index, same) in rules.chunk_by(|a, b| a == b).enumerate() {
            let separator = if index == 0 { "" } else { ", " };
            write!(f, "{separator}{} on {}", same[0], same.len())?;
        }
        write!(f, "; nearest: {nearest}")?;
        self.write_change(f)
    }
}

impl Refusal {
    fn write_change(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.change.as_ref().map_or(Ok(()), |change| write!(f, ". It would fit if {change}"))
    }
}
