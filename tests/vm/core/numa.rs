//! A guest in a machine with two real cells: its memory is bound, its pages are where they were reserved, and the
//! kernel, the agent's series and the fleet say the same.

use std::time::Duration;

use godwit_tests::vm::{Cell, Vm, Wire};

use crate::fleet::{self, godwit};

/// A huge page, in KiB.
const PAGE_KIB: u64 = 2048;

/// Huge pages that each cell of the VM has.
const PAGES: u64 = 64;

/// Where the host's fleet is.
const ADDRESS: &str = "10.9.0.1";

/// Before its agent starts: huge pages in both cells.
const HUGE_PAGES: &str = "
for cell in 0 1; do
    echo 64 > /sys/devices/system/node/node$cell/hugepages/hugepages-2048kB/nr_hugepages
done
mkdir -p /dev/hugepages
mount -t hugetlbfs hugetlbfs /dev/hugepages
";

/// Free huge pages of each cell.
fn free_pages(vm: &Vm) -> Vec<u64> {
    let files = "/sys/devices/system/node/node[01]/hugepages/hugepages-2048kB/free_hugepages";
    let text = vm.shell(&format!("cat {files}")).expect("there are two cells");
    text.lines().map(|line| line.parse().expect("is a number")).collect()
}

#[test]
fn a_guest_with_two_cells_has_its_pages_and_cpus_where_they_were_reserved() {
    let wire = Wire::new().expect("a wire");
    let vm = fleet::builder("numa")
        .cell(Cell { cpus: 0..=1, memory_mib: 1024 })
        .cell(Cell { cpus: 2..=3, memory_mib: 1024 })
        .distance(0, 1, 31)
        .wire(&wire, &format!("{ADDRESS}/24"))
        .start()
        .expect("starts");
    vm.shell(HUGE_PAGES).expect("there are two cells");
    fleet::start(&vm, ADDRESS, "dedicated_cpus = \"0-3\"");
    vm.shell("truncate -s 1M /tmp/blank").expect("is made");
    godwit(&vm, "image create blank --file /tmp/blank --disk-format raw").expect("is there");
    godwit(
        &vm,
        "flavor create wide --vcpus 2 --memory 128M --disk 0 --property hw:numa_nodes=2 \
         --property hw:cpu_policy=dedicated --property hw:mem_page_size=2048 \
         --property hw:emulator_threads_policy=isolate --property hw:cpu_realtime=yes \
         --property hw:cpu_realtime_mask=^0",
    )
    .expect("is made");
    assert_eq!(free_pages(&vm), [PAGES, PAGES]);
    godwit(&vm, "server create one --flavor wide --image blank --no-network --wait").expect("it runs");

    // 32 pages of each cell are the guest's, by the kernel's count and by the process's own.
    assert_eq!(free_pages(&vm), [PAGES - 32, PAGES - 32]);
    let maps = vm.shell("cat /proc/$(cat /run/libvirt/qemu/instance-*.pid)/numa_maps").expect("it runs");
    let bound: Vec<&str> = maps.lines().filter(|line| line.contains(" huge ")).collect();
    assert_eq!(bound.len(), 2, "{bound:#?}");
    for cell in [0, 1] {
        let mine = bound.iter().find(|line| line.contains(&format!(" bind:{cell} ")));
        let mine = mine.unwrap_or_else(|| panic!("nothing is bound to cell {cell}: {bound:#?}"));
        assert!(mine.contains(&format!(" N{cell}=32 ")), "{mine}");
        assert!(mine.contains(&format!("kernelpagesize_kB={PAGE_KIB}")), "{mine}");
    }

    // Each vCPU may run on one CPU, of the cell that its memory is in; the emulator has the first cell's other one,
    // and the vCPU that runs in real time does.
    let threads = vm
        .shell(
            "cd /proc/$(cat /run/libvirt/qemu/instance-*.pid)/task; for thread in *; do \
             echo \"$(cat $thread/comm):$(sed -n 's/^Cpus_allowed_list:[[:space:]]*//p' $thread/status)\
             :$(chrt -p $thread | tr '\\n' ' ')\"; done",
        )
        .expect("it runs");
    let cpu_of = |name: &str| -> u32 {
        let line = threads.lines().find(|line| line.starts_with(name));
        let cpu = line.and_then(|line| line.split(':').nth(1)?.trim().parse().ok());
        cpu.unwrap_or_else(|| panic!("{name} has not one CPU: {threads}"))
    };
    let cpus = [cpu_of("CPU 0/"), cpu_of("CPU 1/"), cpu_of("qemu-system-x86")];
    let cell = |cpu: u32| if cpu < 2 { 0 } else { 1 };
    assert_ne!(cell(cpus[0]), cell(cpus[1]), "{threads}");
    assert!(cell(cpus[2]) == cell(cpus[0]) && cpus[2] != cpus[0], "{threads}");
    let realtime =
        |name: &str| threads.lines().any(|line| line.starts_with(name) && line.contains("SCHED_FIFO"));
    assert!(realtime("CPU 1/") && !realtime("CPU 0/"), "{threads}");
    let locked = vm
        .shell("sed -n 's/^VmLck:[[:space:]]*\\([0-9]*\\) kB/\\1/p' /proc/$(cat /run/libvirt/qemu/instance-*.pid)/status")
        .expect("it runs");
    assert!(locked.trim().parse::<u64>().is_ok_and(|kib| kib > 0), "{locked:?}");
    let xml = vm.shell("virsh dumpxml $(virsh -q list --name)").expect("libvirt answers");
    assert!(xml.contains("<sibling id='1' value='31'/>"), "the guest sees the distance: {xml}");

    // The fleet and the series agree.
    assert_eq!(godwit(&vm, "host drift").expect("is listed"), serde_json::json!([]));
    let series = fleet::series(&vm).expect("answers");
    // Debian's kernel takes the programs: its verifier is older than that of the machine that this runs on.
    for line in ["godwit_telemetry_up 1", "godwit_neighbour_suppression{by=\"ebpf\"} 1", "godwit_filter_up 1"]
    {
        assert!(series.lines().any(|found| found == line), "{line}: {series}");
    }
    let pages: Vec<&str> =
        series.lines().filter(|line| line.starts_with("godwit_instance_huge_pages{")).collect();
    assert_eq!(pages.len(), 2, "{pages:?}");
    assert!(pages.iter().all(|line| line.ends_with(" 32")), "{pages:?}");

    // What is left is given out once: a guest that wants more of a cell than is free is refused with the reason.
    godwit(
        &vm,
        "flavor create tall --vcpus 1 --memory 96M --disk 0 --property hw:numa_nodes=1 \
         --property hw:mem_page_size=2048",
    )
    .expect("is made");
    let refused = godwit(&vm, "server create two --flavor tall --image blank --no-network --wait");
    let refused = refused.expect_err("48 pages are not free in any cell").to_string();
    assert!(refused.contains("2048"), "{refused}");

    godwit(&vm, "server delete one --wait").expect("is deleted");
    vm.until("the pages' return", Duration::from_secs(30), |vm| Ok(free_pages(vm) == [PAGES, PAGES]))
        .expect("they are free again");
}
