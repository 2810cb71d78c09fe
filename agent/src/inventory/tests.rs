//! Trees of machines as kernels of many ages write them.

use std::fs;
use std::path::Path;

use tempfile::TempDir;

use super::*;

const CPU: &str = "sys/devices/system/cpu";
const NODE: &str = "sys/devices/system/node";

/// A tree with these files.
fn tree(files: &[(&str, &str)]) -> TempDir {
    let root = tempfile::tempdir().unwrap();
    for (path, text) in files {
        write(root.path(), path, text);
    }
    root
}

fn write(root: &Path, path: &str, text: &str) {
    let path = root.join(path);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, text).unwrap();
}

fn read(root: &TempDir) -> Result<Vec<Cell>, InventoryError> {
    read_cells(root.path(), ORDINARY_PAGE_KIB)
}

fn ids(cell: &Cell) -> Vec<u32> {
    cell.cpus.iter().map(|cpu| cpu.id).collect()
}

#[test]
fn a_machine_without_numa_is_one_cell_with_all_its_memory() {
    let root = tree(&[
        ("sys/devices/system/cpu/online", "0-1\n"),
        ("proc/meminfo", "MemTotal:        4196352 kB\nHugePages_Total:       7\n"),
        ("sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages", "1\n"),
    ]);
    let cells = read(&root).unwrap();
    assert_eq!(cells.len(), 1);
    assert_eq!((cells[0].id, ids(&cells[0])), (0, vec![0, 1]));
    assert_eq!(cells[0].memory_bytes, 4_196_352 * 1024);
    let pools: Vec<_> = cells[0].page_pools.iter().map(|pool| (pool.size_kib, pool.total)).collect();
    assert_eq!(pools, [(4, (4_196_352 - 2048) / 4), (2048, 1)]);
    assert!(cells[0].distances.is_empty());
}

#[test]
fn an_offline_cpu_is_nowhere() {
    let root = tree(&[
        (&format!("{CPU}/online"), "0,2-3\n"),
        (&format!("{CPU}/cpu2/online"), "0\n"),
        (&format!("{CPU}/cpu3/topology/thread_siblings_list"), "1-3\n"),
        (&format!("{NODE}/node0/cpulist"), "0-3\n"),
    ]);
    let cells = read(&root).unwrap();
    assert_eq!(ids(&cells[0]), [0, 3]);
    assert_eq!(cells[0].cpus[1].siblings, [3], "siblings that are offline do not count");
    assert_eq!(cells[0].shared_cpus, [0, 3]);
}

#[test]
fn masks_serve_where_there_are_no_lists() {
    let root = tree(&[
        (&format!("{CPU}/online"), "0-39"),
        (&format!("{CPU}/cpu33/topology/thread_siblings"), "00000002,00000002\n"),
        (&format!("{NODE}/node0/cpumap"), "00000003,00000000\n"),
        (&format!("{NODE}/node7/cpumap"), "000000fc,ffffffff\n"),
    ]);
    let cells = read(&root).unwrap();
    assert_eq!(ids(&cells[0]), [32, 33]);
    assert_eq!(cells[0].cpus[1].siblings, [1, 33]);
    assert_eq!((cells[1].id, cells[1].cpus.len()), (7, 38));
}

#[test]
fn sparse_nodes_keep_their_numbers_and_distances() {
    let root = tree(&[
        (&format!("{CPU}/online"), "0-1"),
        (&format!("{NODE}/node0/cpulist"), "0\n"),
        (&format!("{NODE}/node0/distance"), "10 21 31\n"),
        (&format!("{NODE}/node4/cpulist"), "1\n\0"),
        (&format!("{NODE}/node4/distance"), "21 10 31\n"),
        (&format!("{NODE}/node4/meminfo"), "\nNode 4 MemTotal:   2048 kB\nNode 4 HugePages_Total:  0\n"),
        (&format!("{NODE}/node72/cpulist"), "\n"),
        (&format!("{NODE}/node72/distance"), "31 31 10\n"),
        (&format!("{NODE}/nodes"), "not a node"),
    ]);
    let cells = read(&root).unwrap();
    assert_eq!(cells.iter().map(|cell| cell.id).collect::<Vec<_>>(), [0, 4, 72]);
    assert_eq!(cells[1].distances, BTreeMap::from([(0, 21), (4, 10), (72, 31)]));
    assert_eq!((cells[0].memory_bytes, cells[1].memory_bytes), (0, 2 << 20), "a cell may lack memory");
    assert!(cells[2].cpus.is_empty(), "a cell may lack CPUs");
}

#[test]
fn huge_pages_are_not_ordinary_memory_as_well() {
    let pool = |size: u32| format!("{NODE}/node0/hugepages/hugepages-{size}kB/nr_hugepages");
    let root = tree(&[
        (&format!("{CPU}/online"), "0"),
        (&format!("{NODE}/node0/cpulist"), "0\n"),
        (&format!("{NODE}/node0/meminfo"), "Node 0 MemTotal:  4194304 kB\n"),
        (&pool(64), "0\n"),
        (&pool(2048), "512\n"),
        (&format!("{NODE}/node0/hugepages/hugepages-2048kB/free_hugepages"), "500\n"),
        (&pool(1_048_576), "9\n"),
    ]);
    let cells = read(&root).unwrap();
    let pools: Vec<_> = cells[0].page_pools.iter().map(|pool| (pool.size_kib, pool.total)).collect();
    // More huge pages than memory: nothing is left, and nothing wraps round.
    assert_eq!(pools, [(4, 0), (64, 0), (2048, 512), (1_048_576, 9)]);
    assert_eq!(cells[0].page_pools.iter().map(|pool| pool.taken).collect::<Vec<_>>(), [0, 0, 12, 0]);
}

#[test]
fn kinds_of_cores_and_what_they_can_do_are_told_where_they_differ() {
    let capacity = |cpu: u32| format!("{CPU}/cpu{cpu}/cpu_capacity");
    let kinds = |root: &TempDir| {
        let cells = read(root).unwrap();
        cells[0].cpus.iter().map(|cpu| (cpu.kind, cpu.capacity)).collect::<Vec<_>>()
    };
    let intel = tree(&[
        (&format!("{CPU}/online"), "0-2\n"),
        ("sys/devices/cpu_core/cpus", "0-1\n"),
        ("sys/devices/cpu_atom/cpus", "2\n"),
        ("sys/devices/cpu_atom/type", "10\n"),
    ]);
    assert_eq!(
        kinds(&intel),
        [(Some(CoreKind::Core), 0), (Some(CoreKind::Core), 0), (Some(CoreKind::Atom), 0)]
    );
    let arm = tree(&[(&format!("{CPU}/online"), "0-1\n"), (&capacity(0), "446\n"), (&capacity(1), "1024\n")]);
    assert_eq!(kinds(&arm), [(None, 446), (None, 1024)]);
    let even =
        tree(&[(&format!("{CPU}/online"), "0-1\n"), (&capacity(0), "1024\n"), (&capacity(1), "1024\n")]);
    assert_eq!(kinds(&even), [(None, 0), (None, 0)]);
    let nonsense =
        tree(&[(&format!("{CPU}/online"), "0\n"), ("sys/devices/cpu_core/cpus", "4294967295-9\n")]);
    assert!(read(&nonsense).unwrap_err().to_string().contains("cpu_core/cpus"));
}

#[test]
fn an_old_kernel_counts_its_huge_pages_in_meminfo() {
    let root = tree(&[
        (&format!("{CPU}/cpu0/topology/core_id"), "0\n"),
        (&format!("{CPU}/cpu1/topology/core_id"), "1\n"),
        (&format!("{NODE}/node0/cpulist"), "0-1\n"),
        (&format!("{NODE}/node0/meminfo"), "Node 0 MemTotal: 8192 kB\nNode 0 HugePages_Total:     2\n"),
        ("proc/meminfo", "Hugepagesize:     2048 kB\n"),
    ]);
    let cells = read(&root).unwrap();
    let pools: Vec<_> = cells[0].page_pools.iter().map(|pool| (pool.size_kib, pool.total)).collect();
    assert_eq!(pools, [(4, 1024), (2048, 2)]);
}

#[test]
fn a_cpu_that_no_node_claims_is_not_lost() {
    let root = tree(&[(&format!("{CPU}/online"), "0-2"), (&format!("{NODE}/node3/cpulist"), "0-1\n")]);
    assert_eq!(ids(&read(&root).unwrap()[0]), [0, 1, 2]);
}

#[test]
fn a_tree_that_is_no_machines_is_an_error_that_names_it() {
    let root = tree(&[("proc/meminfo", "MemTotal: 1 kB")]);
    assert!(matches!(read(&root), Err(InventoryError::NoCpus { .. })));
    for (path, text) in [
        ("online", "0-"),
        ("online", "3-1"),
        ("online", "0-4294967295"),
        ("cpu0/topology/core_id", "one"),
        ("cpu0/topology/core_cpus_list", "0;1"),
        ("cpu0/topology/core_cpus", "xyz"),
    ] {
        let root = tree(&[(&format!("{CPU}/online"), "0")]);
        write(root.path(), &format!("{CPU}/{path}"), text);
        let error = read(&root).unwrap_err().to_string();
        assert!(error.contains(path) && error.contains(text), "{error}");
    }
}

#[test]
fn cpus_get_their_roles_and_unknown_ones_are_told() {
    let root = tree(&[
        (&format!("{CPU}/online"), "0-3"),
        (&format!("{NODE}/node0/cpulist"), "0-1"),
        (&format!("{NODE}/node1/cpulist"), "2-3"),
    ]);
    let mut cells = read(&root).unwrap();
    assert_eq!(assign_cpus(&mut cells, None, &[1, 2, 9]), BTreeSet::from([9]));
    assert_eq!((&cells[0].shared_cpus[..], &cells[0].dedicated_cpus[..]), (&[0][..], &[1][..]));
    assert_eq!((&cells[1].shared_cpus[..], &cells[1].dedicated_cpus[..]), (&[3][..], &[2][..]));
    assert_eq!(assign_cpus(&mut cells, Some(&[0, 1]), &[0, 1]), BTreeSet::new());
    assert_eq!((&cells[0].shared_cpus[..], &cells[0].dedicated_cpus[..]), (&[0, 1][..], &[0, 1][..]));
    assert!(cells[1].shared_cpus.is_empty());
}

#[test]
fn a_kernel_that_describes_no_cpu_is_read_through_cpuinfo() {
    let cpu = |id, core| format!("processor : {id}\nphysical id : 1\ncore id : {core}\n\n");
    let root = tree(&[
        ("proc/cpuinfo", &[cpu(0, 4), cpu(1, 4), cpu(2, 5)].concat()),
        ("proc/meminfo", "MemTotal: 2048 kB\n"),
        (&format!("{NODE}/node0/cpumap"), "7\n"),
    ]);
    let cells = read(&root).unwrap();
    assert_eq!(ids(&cells[0]), [0, 1, 2]);
    assert_eq!((cells[0].cpus[0].package, cells[0].cpus[0].core), (1, 4));
    assert_eq!(cells[0].cpus[0].siblings, [0, 1]);
    assert_eq!(cells[0].memory_bytes, 2 << 20, "the only cell has all of the machine's memory");
}

#[test]
fn a_cpu_that_an_old_kernel_does_not_describe_is_offline() {
    let root = tree(&[
        (&format!("{CPU}/cpu0/topology/core_id"), "0"),
        (&format!("{CPU}/cpu1/online"), "0"),
        (&format!("{CPU}/cpu2/topology/physical_package_id"), "4294967295\n"),
        (&format!("{CPU}/cpu3/cache/index0/level"), "1"),
        (&format!("{CPU}/cpufreq/boost"), "1"),
        (&format!("{CPU}/cpu+4/topology/core_id"), "0"),
    ]);
    let cells = read(&root).unwrap();
    assert_eq!(ids(&cells[0]), [0, 2]);
    assert_eq!(cells[0].cpus[1].package, UNTOLD);
}

#[test]
fn clusters_and_caches_are_groups_of_what_is_online() {
    let root = tree(&[
        (&format!("{CPU}/online"), "1-3"),
        (&format!("{CPU}/cpu1/topology/cluster_cpus_list"), "0-1"),
        (&format!("{CPU}/cpu1/cache/index2/level"), "2"),
        (&format!("{CPU}/cpu1/cache/index2/shared_cpu_list"), "1"),
        (&format!("{CPU}/cpu1/cache/index3/level"), "3"),
        (&format!("{CPU}/cpu1/cache/index3/shared_cpu_map"), "f"),
        (&format!("{CPU}/cpu3/cache/index3/level"), "3"),
        (&format!("{CPU}/cpu3/cache/index3/shared_cpu_list"), "0-3"),
    ]);
    let cells = read(&root).unwrap();
    let groups: Vec<_> = cells[0].cpus.iter().map(|cpu| (cpu.cluster, cpu.l3)).collect();
    assert_eq!(groups, [(Some(1), Some(1)), (None, None), (None, Some(1))]);
}

#[test]
fn a_cpu_that_two_nodes_claim_is_in_the_first_only() {
    let root = tree(&[
        (&format!("{CPU}/online"), "0-2"),
        (&format!("{NODE}/node1/cpulist"), "0-1"),
        (&format!("{NODE}/node5/cpulist"), "1-2"),
    ]);
    let cells = read(&root).unwrap();
    assert_eq!((ids(&cells[0]), ids(&cells[1])), (vec![0, 1], vec![2]));
}

#[test]
fn memory_on_a_gpu_is_no_cell() {
    let root = tree(&[
        (&format!("{CPU}/online"), "0-1"),
        (&format!("{NODE}/node0/cpulist"), "0-1"),
        (&format!("{NODE}/node0/distance"), "10 80\n"),
        (&format!("{NODE}/node255/cpulist"), "\n"),
        (&format!("{NODE}/node255/distance"), "80 10\n"),
        ("proc/driver/nvidia/gpus/0004:04:00.0/numa_status", "Node:   \t 255\nNUMA memory status: online\n"),
    ]);
    let cells = read(&root).unwrap();
    assert_eq!(cells.len(), 1);
    assert_eq!(cells[0].distances, BTreeMap::from([(0, 10)]));
}

#[test]
fn links_tell_the_cell_of_their_device() {
    let root = tree(&[
        (&format!("{CPU}/online"), "0"),
        ("sys/devices/pci0/numa_node", "1\n"),
        ("sys/devices/pci1/numa_node", "-1\n"),
    ]);
    for (link, device) in [("eth0", "pci0"), ("eth1", "pci1"), ("lo", "none")] {
        let folder = root.path().join("sys/class/net").join(link);
        fs::create_dir_all(&folder).unwrap();
        std::os::unix::fs::symlink(format!("../../../devices/{device}"), folder.join("device")).unwrap();
    }
    let cells = link_cells(root.path()).unwrap();
    assert_eq!(cells, BTreeMap::from([("eth0".to_owned(), Some(1)), ("eth1".to_owned(), None)]));
}

#[test]
fn nothing_outside_of_the_tree_is_read() {
    let outside = tree(&[("secret", "0-9\n")]);
    let root = tree(&[(&format!("{CPU}/cpu0/online"), "1"), ("inside", "0\n")]);
    let online = root.path().join(CPU).join("online");
    for target in [outside.path().join("secret"), "../../../../../../../../../../etc/hostname".into()] {
        std::os::unix::fs::symlink(&target, &online).unwrap();
        assert_eq!(ids(&read(&root).unwrap()[0]), [0], "{} was followed", target.display());
        fs::remove_file(&online).unwrap();
    }
    std::os::unix::fs::symlink("/inside", &online).unwrap();
    assert_eq!(ids(&read(&root).unwrap()[0]), [0]);
    fs::remove_file(&online).unwrap();
    // What is no file is neither waited for nor taken for one.
    nix::unistd::mkfifo(&online, nix::sys::stat::Mode::S_IRWXU).unwrap();
    assert!(read(&root).is_err());
    fs::remove_file(&online).unwrap();
    fs::create_dir(&online).unwrap();
    assert!(read(&root).unwrap_err().to_string().contains("online"));
    assert!(matches!(read_cells(Path::new("/nowhere"), 4), Err(InventoryError::Unreadable { .. })));
}

#[test]
fn this_machine_can_be_read() {
    let cells = read_cells(Path::new("/"), ORDINARY_PAGE_KIB).unwrap();
    let cpus: usize = cells.iter().map(|cell| cell.cpus.len()).sum();
    assert!(cpus >= std::thread::available_parallelism().unwrap().get());
    assert!(cells.iter().any(|cell| cell.memory_bytes > 0));
}

#[test]
fn the_cpu_is_named_where_the_kernel_names_it() {
    let root = tree(&[("proc/cpuinfo", "processor\t: 0\nmodel name\t: A Fine CPU @ 3.0GHz\n")]);
    assert_eq!(cpu_model(root.path()).unwrap(), "A Fine CPU @ 3.0GHz");
    assert_eq!(cpu_model(tree(&[]).path()).unwrap(), "");
}
