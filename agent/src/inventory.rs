//! What the kernel tells of a machine's cells, cores, memory and pages, read from a sysfs tree.
//!
//! The tree may be another machine's: nothing outside the given root is read. Node and CPU numbers may be
//! sparse, CPUs offline, cells without CPUs or without memory, and the NUMA directory missing altogether.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use godwit_protocol::host::{Cell, Cpu, PagePool};
use thiserror::Error;

/// The ordinary page size of most machines, in KiB; taken for trees of other machines, which do not tell theirs.
pub const ORDINARY_PAGE_KIB: u64 = 4;

/// The highest CPU or node number that is believed: more than any kernel counts.
const MAX_NUMBER: u32 = 65_535;

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
    let tree = Tree { root };
    let online = tree.online_cpus()?;
    if online.is_empty() {
        return Err(InventoryError::NoCpus { root: root.to_owned() });
    }
    let nodes = tree.numbered("sys/devices/system/node", "node")?;
    let mut cells = match nodes.is_empty() {
        true => vec![tree.whole_machine(&online)?],
        false => nodes.iter().map(|&node| tree.node(node, &nodes, &online)).collect::<Result<_, _>>()?,
    };
    adopt_strays(&mut cells, &tree, &online)?;
    for cell in &mut cells {
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
    let cpuinfo = Tree { root }.read("proc/cpuinfo")?.unwrap_or_default();
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

/// A machine's tree; paths are relative to its root.
struct Tree<'r> {
    root: &'r Path,
}

impl Tree<'_> {
    /// A file's text; none when it is not there. Some kernels count a closing NUL in.
    fn read(&self, path: &str) -> Result<Option<String>, InventoryError> {
        let path = self.root.join(path);
        match fs::read(&path) {
            Ok(bytes) => Ok(Some(String::from_utf8_lossy(&bytes).trim_end_matches('\0').to_owned())),
            Err(error) if is_absence(&error) => Ok(None),
            Err(source) => Err(InventoryError::Unreadable { path, source }),
        }
    }

    fn malformed(&self, path: &str, text: &str, expected: &'static str) -> InventoryError {
        let text = text.trim().chars().take(80).collect();
        InventoryError::Malformed { path: self.root.join(path), text, expected }
    }

    fn number(&self, path: &str) -> Result<Option<i64>, InventoryError> {
        let Some(text) = self.read(path)? else { return Ok(None) };
        text.trim().parse().map(Some).map_err(|_| self.malformed(path, &text, "a number"))
    }

    /// A set of numbers: from the list file, or from the older mask file, whichever is there.
    fn set(&self, list: &str, mask: &str) -> Result<Option<BTreeSet<u32>>, InventoryError> {
        if let Some(text) = self.read(list)? {
            let set = parse_list(&text).ok_or_else(|| self.malformed(list, &text, "a list such as 0-3,8"))?;
            return Ok(Some(set));
        }
        let Some(text) = self.read(mask)? else { return Ok(None) };
        parse_mask(&text).map(Some).ok_or_else(|| self.malformed(mask, &text, "a mask such as ff,ffffffff"))
    }

    /// The numbers N of the entries `<prefix>N` of a folder; none when the folder is not there.
    fn numbered(&self, folder: &str, prefix: &str) -> Result<BTreeSet<u32>, InventoryError> {
        let path = self.root.join(folder);
        let unreadable = |source| InventoryError::Unreadable { path: path.clone(), source };
        let entries = match fs::read_dir(&path) {
            Ok(entries) => entries,
            Err(error) if is_absence(&error) => return Ok(BTreeSet::new()),
            Err(source) => return Err(unreadable(source)),
        };
        let mut numbers = BTreeSet::new();
        for entry in entries {
            let name = entry.map_err(unreadable)?.file_name();
            let number =
                name.to_str().and_then(|name| name.strip_prefix(prefix)).and_then(|rest| rest.parse().ok());
            numbers.extend(number.filter(|&number: &u32| number <= MAX_NUMBER));
        }
        Ok(numbers)
    }

    fn online_cpus(&self) -> Result<BTreeSet<u32>, InventoryError> {
        const CPUS: &str = "sys/devices/system/cpu";
        let mut online = match self.read(&format!("{CPUS}/online"))? {
            Some(text) => parse_list(&text).ok_or_else(|| {
                self.malformed("sys/devices/system/cpu/online", &text, "a list such as 0-3,8")
            })?,
            None => self.numbered(CPUS, "cpu")?,
        };
        let mut offline = Vec::new();
        for &cpu in &online {
            // The first CPU often has no such file, for it cannot be taken offline.
            if self.number(&format!("{CPUS}/cpu{cpu}/online"))? == Some(0) {
                offline.push(cpu);
            }
        }
        for cpu in offline {
            online.remove(&cpu);
        }
        Ok(online)
    }

    fn cpu(&self, cpu: u32, online: &BTreeSet<u32>) -> Result<Cpu, InventoryError> {
        let file = |name: &str| format!("sys/devices/system/cpu/cpu{cpu}/topology/{name}");
        // The newer name first; both mean the threads of one core.
        let siblings = match self.set(&file("core_cpus_list"), &file("core_cpus"))? {
            Some(siblings) => siblings,
            None => self.set(&file("thread_siblings_list"), &file("thread_siblings"))?.unwrap_or_default(),
        };
        let siblings: BTreeSet<u32> = siblings.intersection(online).copied().chain([cpu]).collect();
        Ok(Cpu {
            id: cpu,
            package: self.number(&file("physical_package_id"))?.unwrap_or(UNTOLD),
            die: self.number(&file("die_id"))?.unwrap_or(UNTOLD),
            core: self.number(&file("core_id"))?.unwrap_or(UNTOLD),
            siblings: siblings.into_iter().collect(),
            l3: self.l3(cpu)?,
        })
    }

    /// The lowest CPU under the same level 3 cache (Documentation/ABI/testing/sysfs-devices-system-cpu).
    fn l3(&self, cpu: u32) -> Result<Option<u32>, InventoryError> {
        let folder = format!("sys/devices/system/cpu/cpu{cpu}/cache");
        for index in self.numbered(&folder, "index")? {
            let file = |name: &str| format!("{folder}/index{index}/{name}");
            if self.number(&file("level"))? == Some(3) {
                let sharers = self.set(&file("shared_cpu_list"), &file("shared_cpu_map"))?;
                return Ok(sharers.and_then(|cpus| cpus.first().copied()));
            }
        }
        Ok(None)
    }

    fn node(&self, node: u32, nodes: &BTreeSet<u32>, online: &BTreeSet<u32>) -> Result<Cell, InventoryError> {
        let file = |name: &str| format!("sys/devices/system/node/node{node}/{name}");
        let cpus = self.set(&file("cpulist"), &file("cpumap"))?.unwrap_or_default();
        let meminfo = self.read(&file("meminfo"))?.unwrap_or_default();
        Ok(Cell {
            id: node,
            cpus: cpus.intersection(online).map(|&cpu| self.cpu(cpu, online)).collect::<Result<_, _>>()?,
            memory_bytes: meminfo_kib(&meminfo, "MemTotal").unwrap_or(0).saturating_mul(1024),
            page_pools: self.huge_pages(&file("hugepages"), &meminfo)?,
            distances: self.distances(&file("distance"), nodes)?,
            shared_cpus: Vec::new(),
            dedicated_cpus: Vec::new(),
        })
    }

    fn whole_machine(&self, online: &BTreeSet<u32>) -> Result<Cell, InventoryError> {
        let meminfo = self.read("proc/meminfo")?.unwrap_or_default();
        Ok(Cell {
            id: 0,
            cpus: online.iter().map(|&cpu| self.cpu(cpu, online)).collect::<Result<_, _>>()?,
            memory_bytes: meminfo_kib(&meminfo, "MemTotal").unwrap_or(0).saturating_mul(1024),
            page_pools: self.huge_pages("sys/kernel/mm/hugepages", &meminfo)?,
            distances: BTreeMap::new(),
            shared_cpus: Vec::new(),
            dedicated_cpus: Vec::new(),
        })
    }

    /// Pools of huge pages: one folder a size; on kernels older than those folders, what meminfo counts.
    fn huge_pages(&self, folder: &str, meminfo: &str) -> Result<Vec<PagePool>, InventoryError> {
        let mut pools = Vec::new();
        for size_kib in self.page_sizes(folder)? {
            let total = self.number(&format!("{folder}/hugepages-{size_kib}kB/nr_hugepages"))?;
            pools.push(PagePool {
                size_kib,
                total: total.and_then(|total| total.try_into().ok()).unwrap_or(0),
            });
        }
        if pools.is_empty() {
            let machine = self.read("proc/meminfo")?.unwrap_or_default();
            let size_kib = meminfo_kib(&machine, "Hugepagesize").filter(|&size_kib| size_kib > 0);
            let total = meminfo_kib(meminfo, "HugePages_Total").filter(|&total| total > 0);
            pools.extend(size_kib.zip(total).map(|(size_kib, total)| PagePool { size_kib, total }));
        }
        Ok(pools)
    }

    fn page_sizes(&self, folder: &str) -> Result<BTreeSet<u64>, InventoryError> {
        let path = self.root.join(folder);
        let unreadable = |source| InventoryError::Unreadable { path: path.clone(), source };
        let entries = match fs::read_dir(&path) {
            Ok(entries) => entries,
            Err(error) if is_absence(&error) => return Ok(BTreeSet::new()),
            Err(source) => return Err(unreadable(source)),
        };
        let mut sizes = BTreeSet::new();
        for entry in entries {
            let name = entry.map_err(unreadable)?.file_name();
            let size = name.to_str().and_then(|name| name.strip_prefix("hugepages-")?.strip_suffix("kB"));
            sizes.extend(size.and_then(|size| size.parse().ok()).filter(|&size: &u64| size > 0));
        }
        Ok(sizes)
    }

    /// Distances stand in the order of the nodes that are there. When their number differs, nodes came or went
    /// while we read: no distance can be told.
    fn distances(&self, path: &str, nodes: &BTreeSet<u32>) -> Result<BTreeMap<u32, u32>, InventoryError> {
        let Some(text) = self.read(path)? else { return Ok(BTreeMap::new()) };
        let distances: Result<Vec<u32>, _> = text.split_whitespace().map(str::parse).collect();
        match distances {
            Ok(distances) if distances.len() == nodes.len() => {
                Ok(nodes.iter().copied().zip(distances).collect())
            }
            Ok(_) => Ok(BTreeMap::new()),
            Err(_) => Err(self.malformed(path, &text, "one distance for each node")),
        }
    }
}

/// Gives online CPUs that no node claims to the first cell: they run guests as well as any.
fn adopt_strays(cells: &mut [Cell], tree: &Tree<'_>, online: &BTreeSet<u32>) -> Result<(), InventoryError> {
    let mut strays = online.clone();
    for cell in cells.iter() {
        for cpu in &cell.cpus {
            strays.remove(&cpu.id);
        }
    }
    if let Some(first) = cells.first_mut() {
        for cpu in strays {
            first.cpus.push(tree.cpu(cpu, online)?);
        }
    }
    Ok(())
}

/// Memory that is in no huge page is in ordinary ones.
fn add_ordinary_pages(cell: &mut Cell, page_kib: u64) {
    let huge = |pool: &PagePool| pool.total.saturating_mul(pool.size_kib);
    let huge_kib = cell.page_pools.iter().map(huge).fold(0, u64::saturating_add);
    let total = (cell.memory_bytes / 1024).saturating_sub(huge_kib) / page_kib;
    cell.page_pools.retain(|pool| pool.size_kib != page_kib);
    cell.page_pools.insert(0, PagePool { size_kib: page_kib, total });
}

/// A file that a kernel does not have, and one that it refuses to fill (`EINVAL`, `ENODEV`: an offline CPU's).
fn is_absence(error: &io::Error) -> bool {
    const ENODEV: i32 = 19;
    const EINVAL: i32 = 22;
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
        || matches!(error.raw_os_error(), Some(ENODEV | EINVAL))
}

/// `0-3,8`, as the kernel writes it; empty for the empty set.
fn parse_list(text: &str) -> Option<BTreeSet<u32>> {
    let mut set = BTreeSet::new();
    for item in text.trim().split(',').map(str::trim).filter(|item| !item.is_empty()) {
        let (first, last) = item.split_once('-').unwrap_or((item, item));
        let (first, last): (u32, u32) = (first.parse().ok()?, last.parse().ok()?);
        if first > last || last > MAX_NUMBER {
            return None;
        }
        set.extend(first..=last);
    }
    Some(set)
}

/// `000000ff,ffffffff`, as the kernel writes it: the rightmost word holds the numbers from 0 to 31.
fn parse_mask(text: &str) -> Option<BTreeSet<u32>> {
    let mut set = BTreeSet::new();
    for (index, word) in text.trim().rsplit(',').enumerate() {
        let bits = u32::from_str_radix(word.trim(), 16).ok()?;
        let base = u32::try_from(index).ok()?.checked_mul(32).filter(|&base| base <= MAX_NUMBER)?;
        set.extend((0..32).filter(|bit| bits & (1 << bit) != 0).map(|bit| base + bit));
    }
    Some(set)
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
