//! What the kernel tells of a machine's cells, cores, memory and pages, read from a sysfs tree.
//!
//! The tree may be another machine's: nothing outside the given root is read. Node and CPU numbers may be
//! sparse, CPUs offline, cells without CPUs or without memory, and the NUMA directory missing altogether.

mod cpuinfo;
mod tree;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};

use crate::kernel_numbers::digits;
use cpuinfo::CpuInfo;
use godwit_protocol::host::{Cell, CoreKind, Cpu, PagePool};
use thiserror::Error;
use tree::Tree;

/// The ordinary page size of most machines, in KiB; taken for trees of other machines, which do not tell theirs.
pub const ORDINARY_PAGE_KIB: u64 = 4;

/// Stands for a package, die or core number that the kernel does not tell.
const UNTOLD: i64 = -1;

/// Why a tree is not a machine's.
#[derive(Debug, Error)]
pub enum InventoryError {
    /// A file is there and cannot be read.
    #[error("cannot read {}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file does not hold what the kernel writes there.
    #[error("{} holds {text:?}, which is not {expected}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What it holds, shortened.
        text: String,
        /// What belongs there.
        expected: &'static str,
    },
    /// The tree has no CPU that is online.
    #[error("{} has no CPU that is online: is it the root of a machine's tree, with sys/ and proc/?", root.display())]
    NoCpus {
        /// The root of the tree.
        root: PathBuf,
    },
}

/// Reads the cells of the machine whose `sys/` and `proc/` lie under `root` (`/` for this one).
///
/// `page_kib` is the machine's ordinary page size. Each cell gets its online CPUs, its memory, its pools of pages
/// (the ordinary size included) and the distances to the others; every CPU is shared until
/// [`assign_cpus`] says otherwise. A machine without NUMA is one cell, 0.
pub fn read_cells(root: &Path, page_kib: u64) -> Result<Vec<Cell>, InventoryError> {
    let machine = Machine::read(root)?;
    let nodes = machine.tree.numbered(NODES, "node")?;
    let of_gpus = machine.gpu_nodes()?;
    let mut claimed = BTreeSet::new();
    let mut cells = match nodes.is_subset(&of_gpus) {
        true => {
            claimed.clone_from(&machine.online);
            vec![machine.whole_machine()?]
        }
        false => nodes
            .difference(&of_gpus)
            .map(|&node| machine.node(node, &nodes, &mut claimed))
            .collect::<Result<Vec<_>, _>>()?,
    };
    machine.adopt_strays(&mut cells, &claimed)?;
    forget_equal_capacities(&mut cells);
    for cell in &mut cells {
        cell.distances.retain(|node, _| !of_gpus.contains(node));
        add_ordinary_pages(cell, page_kib.max(1));
        cell.shared_cpus = cell.cpus.iter().map(|cpu| cpu.id).collect();
    }
    Ok(cells)
}

/// Says which CPUs guests share and which may be pinned. Without `shared`, those that are not dedicated are shared.
///
/// CPUs that the machine does not have are left out and returned, for a warning.
pub fn assign_cpus(cells: &mut [Cell], shared: Option<&[u32]>, dedicated: &[u32]) -> BTreeSet<u32> {
    let mut unknown: BTreeSet<u32> = shared.unwrap_or_default().iter().chain(dedicated).copied().collect();
    for cell in cells {
        let cpus: Vec<u32> = cell.cpus.iter().map(|cpu| cpu.id).collect();
        let among =
            |cpus: &[u32], wanted: &[u32]| cpus.iter().copied().filter(|cpu| wanted.contains(cpu)).collect();
        cell.dedicated_cpus = among(&cpus, dedicated);
        cell.shared_cpus = match shared {
            Some(shared) => among(&cpus, shared),
            None => cpus.iter().copied().filter(|cpu| !dedicated.contains(cpu)).collect(),
        };
        for cpu in cpus {
            unknown.remove(&cpu);
        }
    }
    unknown
}

/// The CPU's name as `/proc/cpuinfo` under `root` tells it; empty where it tells none.
pub fn cpu_model(root: &Path) -> Result<String, InventoryError> {
    let cpuinfo = Tree::open(root)?.read("proc/cpuinfo")?.unwrap_or_default();
    let value = |key: &str| {
        let named = |line: &&str| line.split_once(':').is_some_and(|(name, _)| name.trim() == key);
        cpuinfo
            .lines()
            .find(named)
            .and_then(|line| line.split_once(':'))
            .map(|(_, value)| value.trim().to_owned())
    };
    // x86, then other architectures.
    Ok(["model name", "cpu model", "cpu", "Processor"].into_iter().find_map(value).unwrap_or_default())
}

/// The cell of each network device under `root` that has a device behind it; none where the kernel tells none.
pub fn link_cells(root: &Path) -> Result<BTreeMap<String, Option<u32>>, InventoryError> {
    const LINKS: &str = "sys/class/net";
    let tree = Tree::open(root)?;
    let mut cells = BTreeMap::new();
    for name in tree.names(LINKS)? {
        if tree.has_folder(&format!("{LINKS}/{name}/device"))? {
            let node = tree.number(&format!("{LINKS}/{name}/device/numa_node"))?;
            cells.insert(name, node.and_then(|node| node.try_into().ok()));
        }
    }
    Ok(cells)
}

/// What is read of one machine.
struct Machine<'r> {
    tree: Tree<'r>,
    online: BTreeSet<u32>,
    /// Read only where sysfs tells of no CPU what it is.
    cpuinfo: Option<CpuInfo>,
    /// The kinds of cores with their CPUs; empty where all are of one.
    kinds: BTreeMap<CoreKind, BTreeSet<u32>>,
}

const CPUS: &str = "sys/devices/system/cpu";
const NODES: &str = "sys/devices/system/node";

impl<'r> Machine<'r> {
    fn read(root: &'r Path) -> Result<Self, InventoryError> {
        let tree = Tree::open(root)?;
        let numbered = tree.numbered(CPUS, "cpu")?;
        let mut described = BTreeSet::new();
        for &cpu in &numbered {
            if tree.has_folder(&format!("{CPUS}/cpu{cpu}/topology"))? {
                described.insert(cpu);
            }
        }
        let cpuinfo = match described.is_empty() {
            true => Some(CpuInfo::parse(&tree.read("proc/cpuinfo")?.unwrap_or_default())),
            false => None,
        };
        let mut online = match (tree.list(&format!("{CPUS}/online"))?, &cpuinfo) {
            (Some(online), _) => online,
            // Kernels older than the list do not describe a CPU that is offline.
            (None, None) => described,
            (None, Some(_)) if !numbered.is_empty() => numbered,
            (None, Some(cpuinfo)) => cpuinfo.cpus.keys().copied().collect(),
        };
        for cpu in online.clone() {
            // The first CPU often has no such file, for it cannot be taken offline.
            if tree.number(&format!("{CPUS}/cpu{cpu}/online"))? == Some(0) {
                online.remove(&cpu);
            }
        }
        if online.is_empty() {
            return Err(InventoryError::NoCpus { root: root.to_owned() });
        }
        let kinds = core_kinds(&tree)?;
        Ok(Self { tree, online, cpuinfo, kinds })
    }

    fn cpu(&self, cpu: u32) -> Result<Cpu, InventoryError> {
        let tree = &self.tree;
        let file = |name: &str| format!("{CPUS}/cpu{cpu}/topology/{name}");
        // The newer name first; both mean the threads of one core.
        let siblings = match tree.set(&file("core_cpus_list"), &file("core_cpus"))? {
            Some(siblings) => Some(siblings),
            None => tree.set(&file("thread_siblings_list"), &file("thread_siblings"))?,
        };
        let cpuinfo = self.cpuinfo.as_ref();
        let siblings = siblings.or(cpuinfo.map(|info| info.siblings(cpu))).unwrap_or_default();
        let told = cpuinfo.and_then(|info| info.cpus.get(&cpu));
        let number = |name: &str, told: Option<i64>| -> Result<i64, InventoryError> {
            Ok(tree.number(&file(name))?.map(known).or(told).unwrap_or(UNTOLD))
        };
        Ok(Cpu {
            id: cpu,
            package: number("physical_package_id", told.map(|told| told.package))?,
            die: number("die_id", None)?,
            core: number("core_id", told.map(|told| told.core))?,
            siblings: siblings
                .intersection(&self.online)
                .copied()
                .chain([cpu])
                .collect::<BTreeSet<_>>()
                .into_iter()
                .collect(),
            cluster: self.first_of(tree.set(&file("cluster_cpus_list"), &file("cluster_cpus"))?),
            l3: self.first_of(self.last_level_sharers(cpu)?),
            kind: self.kinds.iter().find(|(_, cpus)| cpus.contains(&cpu)).map(|(kind, _)| *kind),
            capacity: tree
                .number(&format!("{CPUS}/cpu{cpu}/cpu_capacity"))?
                .and_then(|c| c.try_into().ok())
                .unwrap_or(0),
        })
    }

    /// The group that a set of CPUs is, by its lowest CPU that is online.
    fn first_of(&self, cpus: Option<BTreeSet<u32>>) -> Option<u32> {
        cpus?.intersection(&self.online).next().copied()
    }

    /// CPUs that share this one's third-level cache.
    fn last_level_sharers(&self, cpu: u32) -> Result<Option<BTreeSet<u32>>, InventoryError> {
        let folder = format!("{CPUS}/cpu{cpu}/cache");
        for index in self.tree.numbered(&folder, "index")? {
            let file = |name: &str| format!("{folder}/index{index}/{name}");
            if self.tree.number(&file("level"))? == Some(3) {
                return self.tree.set(&file("shared_cpu_list"), &file("shared_cpu_map"));
            }
        }
        Ok(None)
    }

    /// Nodes whose memory is on a GPU of NVIDIA, as the driver tells.
    fn gpu_nodes(&self) -> Result<BTreeSet<u32>, InventoryError> {
        const GPUS: &str = "proc/driver/nvidia/gpus";
        let mut nodes = BTreeSet::new();
        for gpu in self.tree.names(GPUS)? {
            let status = self.tree.read(&format!("{GPUS}/{gpu}/numa_status"))?.unwrap_or_default();
            let told = status.lines().find_map(|line| line.split_once("Node:"));
            nodes.extend(told.and_then(|(_, node)| digits::<u32>(node.trim())));
        }
        Ok(nodes)
    }

    /// The cells in order; `claimed` says which CPUs lower cells have, for a CPU is in one cell only.
    fn node(
        &self,
        node: u32,
        nodes: &BTreeSet<u32>,
        claimed: &mut BTreeSet<u32>,
    ) -> Result<Cell, InventoryError> {
        let tree = &self.tree;
        let file = |name: &str| format!("{NODES}/node{node}/{name}");
        let cpus = tree.set(&file("cpulist"), &file("cpumap"))?.unwrap_or_default();
        let cpus: Vec<u32> =
            cpus.intersection(&self.online).copied().filter(|&cpu| claimed.insert(cpu)).collect();
        let mut meminfo = tree.read(&file("meminfo"))?.unwrap_or_default();
        if nodes.len() == 1 && meminfo_kib(&meminfo, "MemTotal").is_none() {
            meminfo = tree.read("proc/meminfo")?.unwrap_or_default();
        }
        Ok(Cell {
            id: node,
            cpus: cpus.into_iter().map(|cpu| self.cpu(cpu)).collect::<Result<_, _>>()?,
            memory_bytes: meminfo_kib(&meminfo, "MemTotal").unwrap_or(0).saturating_mul(1024),
            page_pools: self.huge_pages(&file("hugepages"), &meminfo)?,
            distances: self.distances(&file("distance"), nodes)?,
            shared_cpus: Vec::new(),
            dedicated_cpus: Vec::new(),
        })
    }

    fn whole_machine(&self) -> Result<Cell, InventoryError> {
        let meminfo = self.tree.read("proc/meminfo")?.unwrap_or_default();
        Ok(Cell {
            id: 0,
            cpus: self.online.iter().map(|&cpu| self.cpu(cpu)).collect::<Result<_, _>>()?,
            memory_bytes: meminfo_kib(&meminfo, "MemTotal").unwrap_or(0).saturating_mul(1024),
            page_pools: self.huge_pages("sys/kernel/mm/hugepages", &meminfo)?,
            distances: BTreeMap::new(),
            shared_cpus: Vec::new(),
            dedicated_cpus: Vec::new(),
        })
    }

    /// Gives online CPUs that no node claims to the first cell: they run guests as well as any.
    fn adopt_strays(&self, cells: &mut [Cell], claimed: &BTreeSet<u32>) -> Result<(), InventoryError> {
        let Some(first) = cells.first_mut() else { return Ok(()) };
        for &cpu in self.online.difference(claimed) {
            first.cpus.push(self.cpu(cpu)?);
        }
        first.cpus.sort_by_key(|cpu| cpu.id);
        Ok(())
    }

    /// Pools of huge pages: one folder a size; on kernels older than those folders, what meminfo counts.
    fn huge_pages(&self, folder: &str, meminfo: &str) -> Result<Vec<PagePool>, InventoryError> {
        let size = |name: &String| digits(name.strip_prefix("hugepages-")?.strip_suffix("kB")?);
        let sizes: BTreeSet<u64> = self.tree.names(folder)?.iter().filter_map(size).collect();
        let mut pools = Vec::new();
        for size_kib in sizes.into_iter().filter(|&size_kib| size_kib > 0) {
            let total = self.tree.number(&format!("{folder}/hugepages-{size_kib}kB/nr_hugepages"))?;
            let free = self.tree.number(&format!("{folder}/hugepages-{size_kib}kB/free_hugepages"))?;
            let count = |number: Option<i64>| number.and_then(|number| u64::try_from(number).ok());
            let total = count(total).unwrap_or(0);
            let taken = total.saturating_sub(count(free).unwrap_or(total));
            pools.push(PagePool { size_kib, total, taken });
        }
        if pools.is_empty() {
            let machine = self.tree.read("proc/meminfo")?.unwrap_or_default();
            let size_kib = meminfo_kib(&machine, "Hugepagesize").filter(|&size_kib| size_kib > 0);
            let total = meminfo_kib(meminfo, "HugePages_Total").filter(|&total| total > 0);
            pools.extend(size_kib.zip(total).map(|(size_kib, total)| PagePool { size_kib, total, taken: 0 }));
        }
        Ok(pools)
    }

    /// Distances stand in the order of the nodes that are there. When their number differs, nodes came or went
    /// while we read: no distance can be told.
    fn distances(&self, path: &str, nodes: &BTreeSet<u32>) -> Result<BTreeMap<u32, u32>, InventoryError> {
        let Some(text) = self.tree.read(path)? else { return Ok(BTreeMap::new()) };
        let distances: Option<Vec<u32>> = text.split_whitespace().map(digits).collect();
        match distances {
            Some(distances) if distances.len() == nodes.len() => {
                Ok(nodes.iter().copied().zip(distances).collect())
            }
            Some(_) => Ok(BTreeMap::new()),
            None => Err(self.tree.malformed(path, &text, "one distance for each node")),
        }
    }
}

/// The kinds of cores of a hybrid machine: its kernel counts events of each by a device of its own, `cpu_core` and
/// `cpu_atom`, where others have one, `cpu`.
fn core_kinds(tree: &Tree<'_>) -> Result<BTreeMap<CoreKind, BTreeSet<u32>>, InventoryError> {
    let mut kinds = BTreeMap::new();
    for kind in CoreKind::ALL {
        if let Some(cpus) = tree.list(&format!("sys/devices/cpu_{}/cpus", kind.name()))? {
            kinds.insert(kind, cpus);
        }
    }
    Ok(kinds)
}

/// Leaves capacities out where they tell nothing.
fn forget_equal_capacities(cells: &mut [Cell]) {
    let cpus = || cells.iter().flat_map(|cell| &cell.cpus);
    let first = cpus().next().map(|cpu| cpu.capacity);
    if cpus().all(|cpu| Some(cpu.capacity) == first) {
        cells.iter_mut().flat_map(|cell| &mut cell.cpus).for_each(|cpu| cpu.capacity = 0);
    }
}

/// A number that the kernel knows; -1, which some write without a sign, stands for one that it does not.
fn known(number: i64) -> i64 {
    if number < 0 || number == i64::from(u32::MAX) { UNTOLD } else { number }
}

/// Memory that is in no huge page is in ordinary ones.
fn add_ordinary_pages(cell: &mut Cell, page_kib: u64) {
    let huge = |pool: &PagePool| pool.total.saturating_mul(pool.size_kib);
    let huge_kib = cell.page_pools.iter().map(huge).fold(0, u64::saturating_add);
    let total = (cell.memory_bytes / 1024).saturating_sub(huge_kib) / page_kib;
    cell.page_pools.retain(|pool| pool.size_kib != page_kib);
    cell.page_pools.insert(0, PagePool { size_kib: page_kib, total, taken: 0 });
}

/// A value of a meminfo file: `MemTotal:  123 kB`, in a node's own file after `Node 0 `.
fn meminfo_kib(meminfo: &str, key: &str) -> Option<u64> {
    meminfo.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        let named = name.split_whitespace().next_back() == Some(key);
        named.then(|| value.split_whitespace().next()?.parse().ok()).flatten()
    })
}

#[cfg(test)]
mod tests;
