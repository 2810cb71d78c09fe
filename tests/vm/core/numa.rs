//! A guest in a machine with two real cells: its memory is bound, its pages are where they were reserved, and the
//! kernel, the agent's series and the fleet say the same.

use std::time::Duration;

use godwit_tests::vm::{Cell, Vm, VmError, Wire};
use serde_json::Value;

/// A huge page, in KiB.
const PAGE_KIB: u64 = 2048;

/// Huge pages that each cell of the VM has.
const PAGES: u64 = 64;

/// A coordinator, an agent and libvirtd, without systemd, and a fleet of this one host.
const SET_UP: &str = r#"
for cell in 0 1; do
    echo 64 > /sys/devices/system/node/node$cell/hugepages/hugepages-2048kB/nr_hugepages
done
mkdir -p /dev/hugepages /sys/fs/bpf /srv/godwit /run/godwit /var/log/libvirt
mount -t hugetlbfs hugetlbfs /dev/hugepages
mountpoint -q /sys/fs/bpf || mount -t bpf bpf /sys/fs/bpf
# What the package of the system's libvirtd makes, which wants systemd.
grep -q '^kvm:' /etc/group || echo 'kvm:x:994:' >> /etc/group
grep -q '^libvirt-qemu:' /etc/group || echo 'libvirt-qemu:x:64055:' >> /etc/group
echo 'libvirt-qemu:x:64055:994::/var/lib/libvirt:/usr/sbin/nologin' >> /etc/passwd
cat > /etc/libvirt/qemu.conf <<END
stdio_handler = "file"
security_driver = "none"
namespaces = []
cgroup_controllers = []
user = "root"
group = "root"
END
echo 'auth_unix_rw = "none"' > /etc/libvirt/libvirtd.conf
libvirtd > /var/log/libvirtd 2>&1 &
timeout 60 sh -c 'until virsh -q list > /dev/null 2>&1; do sleep 0.2; done'
godwit-coordinator init --dir /etc/godwit --url https://10.9.0.1:8774 --pool /srv/godwit
godwit-coordinator run --dir /etc/godwit > /var/log/coordinator 2>&1 &
until bash -c 'exec 3<>/dev/tcp/10.9.0.1/8774' 2> /dev/null; do sleep 0.2; done
export OS_CLIENT_CONFIG_FILE=/etc/godwit/clouds.yaml
mkdir -p /var/lib/godwit
printf '%s\n' 'virtualization = "tcg"' 'reserved_memory_mib = 64' 'dedicated_cpus = "0-3"' > /var/lib/godwit/agent.toml
godwit-agent join https://10.9.0.1:8774 "$(godwit host token --quiet)"
godwit-agent run > /var/log/agent 2>&1 &
until godwit --json host list | grep -q '"cells": *2'; do sleep 0.5; done
truncate -s 1M /tmp/blank
godwit image create blank --file /tmp/blank --disk-format raw
"#;

fn godwit(vm: &Vm, words: &str) -> Result<Value, VmError> {
    let text = vm.shell(&format!("OS_CLIENT_CONFIG_FILE=/etc/godwit/clouds.yaml godwit --json {words}"))?;
    Ok(serde_json::from_str(&text).unwrap_or_default())
}

/// Free huge pages of each cell.
fn free_pages(vm: &Vm) -> Vec<u64> {
    let files = "/sys/devices/system/node/node[01]/hugepages/hugepages-2048kB/free_hugepages";
    let text = vm.shell(&format!("cat {files}")).expect("there are two cells");
    text.lines().map(|line| line.parse().expect("is a number")).collect()
}

#[test]
fn a_guest_with_two_cells_has_its_pages_and_cpus_where_they_were_reserved() {
    let wire = Wire::new().expect("a wire");
    let vm = Vm::builder("numa")
        .cell(Cell { cpus: 0..=1, memory_mib: 1024 })
        .cell(Cell { cpus: 2..=3, memory_mib: 1024 })
        .distance(0, 1, 31)
        .wire(&wire, "10.9.0.1/24")
        .program("godwit")
        .program("godwit-agent")
        .program("godwit-coordinator")
        .start()
        .expect("starts");
    if let Err(error) = vm.shell(SET_UP) {
        let logs = "tail -n 20 /var/log/libvirtd /var/log/agent /var/log/coordinator || true";
        let logs = vm.shell(logs).unwrap_or_default();
        panic!("{error}\n{logs}");
    }
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
    let series = vm
        .exec(&[
            "bash",
            "-c",
            "exec 3<>/dev/tcp/127.0.0.1/9177; printf 'GET /metrics HTTP/1.0\\r\\n\\r\\n' >&3; cat <&3",
        ])
        .expect("metrics are served");
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
