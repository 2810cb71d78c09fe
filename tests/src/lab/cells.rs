//! A NUMA tree for a host that has fewer cells than a test wants: shown at /sys/devices/system/node, where
//! libvirt and the agent read it. Guests cannot be bound to memory of cells that are not there.

use std::fmt::Write as _;
use std::path::Path;

use super::LabError;
use super::folder::{make, write};

const PAGE_SIZES_KIB: [u64; 2] = [2048, 1_048_576];

/// Writes the tree of `cells` cells with `memory_mib` each. The machine's `cpus` are dealt out in order.
pub(super) fn write_tree(root: &Path, cells: usize, memory_mib: u64, cpus: usize) -> Result<(), LabError> {
    let all = list(0..cells);
    let with_cpus: Vec<usize> = (0..cells).filter(|cell| !share(*cell, cells, cpus).is_empty()).collect();
    make(root)?;
    for (name, value) in
        [("online", &all), ("possible", &all), ("has_memory", &all), ("has_normal_memory", &all)]
    {
        write(&root.join(name), &format!("{value}\n"))?;
    }
    let with_cpus = with_cpus.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
    write(&root.join("has_cpu"), &format!("{with_cpus}\n"))?;
    for cell in 0..cells {
        write_cell(&root.join(format!("node{cell}")), cell, cells, memory_mib, share(cell, cells, cpus))?;
    }
    Ok(())
}

fn write_cell(
    folder: &Path,
    cell: usize,
    cells: usize,
    memory_mib: u64,
    cpus: std::ops::Range<usize>,
) -> Result<(), LabError> {
    make(folder)?;
    let mask = cpus.clone().fold(0u128, |mask, cpu| mask | 1u128.checked_shl(cpu as u32).unwrap_or(0));
    write(&folder.join("cpulist"), &format!("{}\n", list(cpus.clone())))?;
    write(&folder.join("cpumap"), &format!("{mask:x}\n"))?;
    for cpu in cpus {
        let link = folder.join(format!("cpu{cpu}"));
        std::os::unix::fs::symlink(format!("../../cpu/cpu{cpu}"), &link)
            .map_err(LabError::io(format!("cannot create {}", link.display())))?;
    }
    let distances: Vec<&str> = (0..cells).map(|other| if other == cell { "10" } else { "21" }).collect();
    write(&folder.join("distance"), &format!("{}\n", distances.join(" ")))?;
    let total = memory_mib * 1024;
    let mut meminfo = String::new();
    for (name, kib) in [("MemTotal", total), ("MemFree", total / 8 * 7), ("MemUsed", total / 8)] {
        let _ = writeln!(meminfo, "Node {cell} {name}: {kib:>12} kB");
    }
    write(&folder.join("meminfo"), &meminfo)?;
    for size in PAGE_SIZES_KIB {
        let pool = folder.join(format!("hugepages/hugepages-{size}kB"));
        make(&pool)?;
        for name in ["nr_hugepages", "free_hugepages", "surplus_hugepages"] {
            write(&pool.join(name), "0\n")?;
        }
    }
    Ok(())
}

/// The CPUs of a cell.
fn share(cell: usize, cells: usize, cpus: usize) -> std::ops::Range<usize> {
    cell * cpus / cells..(cell + 1) * cpus / cells
}

/// As the kernel lists numbers: "", "3", "0-2".
fn list(range: std::ops::Range<usize>) -> String {
    match range.len() {
        0 => String::new(),
        1 => range.start.to_string(),
        _ => format!("{}-{}", range.start, range.end - 1),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_cpu_is_in_one_cell() {
        for (cells, cpus) in [(1, 2), (2, 2), (2, 5), (4, 2)] {
            let dealt: Vec<usize> = (0..cells).flat_map(|cell| share(cell, cells, cpus)).collect();
            assert_eq!(dealt, (0..cpus).collect::<Vec<_>>());
        }
    }

    #[test]
    fn lists_are_written_as_the_kernel_does() {
        assert_eq!([list(0..0), list(3..4), list(0..3)], ["", "3", "0-2"]);
    }
}
