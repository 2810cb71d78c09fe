//! Whole hosts: which one is chosen, what is counted, and what a refusal says.

use std::collections::BTreeMap;
use std::sync::Arc;

use godwit_protocol::host as report;
use godwit_protocol::id::{HostId, InstanceId};
use godwit_protocol::reservation::{Reservation, ReservedCell};

use super::{cpus, smt_cell};
use crate::placement::cpu_set::CpuSet;
use crate::placement::host_view::Machine;
use crate::placement::search::candidates;
use crate::placement::{Choice, HostState, HostView, Order, Placement, Refusal, Request, Rule, place};

pub(super) fn request(vcpus: u32, memory_mib: u64, specs: &[(&str, &str)]) -> Request {
    let specs = specs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
    Request::from_specs(vcpus, memory_mib, &specs, &BTreeMap::new()).unwrap()
}

/// A host of two cells, each of 4 dedicated CPUs, 2 shared ones and 4 GiB.
pub(super) fn view(name: &str) -> HostView {
    let mut cells = vec![smt_cell(0, "0-3"), smt_cell(1, "4-7")];
    cells[0].shared_cpus = cpus("8-9");
    cells[1].shared_cpus = cpus("10-11");
    HostView {
        id: HostId::random(),
        name: name.to_owned(),
        state: HostState::Up,
        cells,
        floating_vcpus: 0,
        floating_memory_mib: 0,
        disk_free_bytes: Some(1 << 40),
        machine: machine(),
        labels: Arc::default(),
    }
}

fn machine() -> Machine {
    Machine {
        architecture: "x86_64".to_owned(),
        cpu_model: "Some CPU".to_owned(),
        kvm: true,
        underlay_up: true,
        underlay_mtu: 1500,
        underlay_v6: false,
        physical_networks: Default::default(),
    }
}

fn spread() -> Choice {
    Choice::default()
}

fn pack() -> Choice {
    Choice { order: Order::Pack, ..Choice::default() }
}

fn try_place(hosts: &[HostView], request: &Request) -> Result<Placement, Refusal> {
    place(hosts, request, &spread())
}

fn rule(hosts: &[HostView], request: &Request) -> Rule {
    try_place(hosts, request).unwrap_err().hosts[0].shortfall.rule
}

#[test]
fn spread_takes_the_emptiest_host_and_pack_the_fullest() {
    let mut hosts = [view("a"), view("b"), view("c")];
    hosts[0].floating_memory_mib = 512;
    hosts[1].floating_memory_mib = 256;
    hosts[2].floating_memory_mib = 1024;
    let request = request(1, 64, &[]);
    assert_eq!(try_place(&hosts, &request).unwrap().host_name, "b");
    assert_eq!(place(&hosts, &request, &pack()).unwrap().host_name, "c");
    let order = candidates(&hosts, &request, &spread()).into_iter();
    assert_eq!(order.map(|answer| answer.unwrap().host_name).collect::<Vec<_>>(), ["b", "a", "c"]);
}

#[test]
fn ties_go_by_name_whatever_the_order_of_the_hosts() {
    let mut hosts = vec![view("b"), view("c"), view("a")];
    for _ in 0..3 {
        hosts.rotate_left(1);
        assert_eq!(try_place(&hosts, &request(1, 64, &[])).unwrap().host_name, "a");
    }
}

#[test]
fn only_a_host_that_is_up_takes_instances() {
    for (state, expected) in [
        (HostState::Late, Rule::HostLate),
        (HostState::Lost, Rule::HostLost),
        (HostState::Disabled, Rule::HostDisabled),
        (HostState::Draining, Rule::HostDraining),
    ] {
        let mut host = view("a");
        host.state = state;
        assert_eq!(rule(&[host], &request(1, 64, &[])), expected);
    }
}

#[test]
fn disk_must_be_reachable_and_large_enough() {
    let mut host = view("a");
    let mut wanted = request(1, 64, &[]);
    wanted.disk_bytes = (1 << 40) + 1;
    assert_eq!(rule(&[host.clone()], &wanted), Rule::DiskFree);
    wanted.disk_bytes = 1 << 40;
    assert!(try_place(&[host.clone()], &wanted).is_ok());
    host.disk_free_bytes = None;
    assert_eq!(rule(&[host], &wanted), Rule::PoolReachable);
}

#[test]
fn a_floating_instance_counts_against_the_whole_host() {
    let mut host = view("a");
    assert_eq!(
        rule(&[host.clone()], &request(5, 64, &[])),
        Rule::VcpusTotal,
        "no instance overcommits itself"
    );
    assert_eq!(rule(&[host.clone()], &request(1, 8193, &[])), Rule::MemoryTotal);
    host.floating_memory_mib = 8000;
    assert_eq!(rule(&[host.clone()], &request(1, 193, &[])), Rule::MemoryFree);
    host.floating_vcpus = 62;
    host.cells[1].shared_cpus_used = 1;
    assert!(try_place(&[host.clone()], &request(1, 64, &[])).is_ok(), "16 vCPUs a CPU");
    assert_eq!(rule(&[host], &request(2, 64, &[])), Rule::VcpusFree);
}

#[test]
fn memory_that_floats_is_not_given_to_cells_again() {
    let mut host = view("a");
    host.floating_memory_mib = 7000;
    let pinned = request(2, 2048, &[("hw:cpu_policy", "dedicated")]);
    assert_eq!(rule(&[host.clone()], &pinned), Rule::MemoryFree, "each cell alone would have it");
    host.floating_memory_mib = 6144;
    assert!(try_place(&[host], &pinned).is_ok());
}

#[test]
fn a_floating_instance_gets_no_huge_pages_and_no_memory_of_cells_without_cpus() {
    let mut host = view("a");
    host.cells[0].page_pools[0].total = 1 << 19;
    host.cells[1].dedicated_cpus = CpuSet::new();
    host.cells[1].shared_cpus = CpuSet::new();
    assert_eq!(rule(&[host.clone()], &request(1, 2049, &[])), Rule::MemoryTotal);
    assert!(try_place(&[host], &request(1, 2048, &[])).is_ok());
}

#[test]
fn a_refusal_explains_every_host() {
    let mut hosts = vec![view("h3"), view("h1"), view("h2")];
    hosts[0].state = HostState::Lost;
    for host in &mut hosts {
        for cell in &mut host.cells {
            let kept = cell.dedicated_cpus.iter().next();
            cell.pinned_cpus = cell.dedicated_cpus.iter().filter(|cpu| Some(*cpu) != kept).collect();
        }
    }
    let refusal = try_place(&hosts, &request(2, 64, &[("hw:cpu_policy", "dedicated")])).unwrap_err();
    let names: Vec<_> = refusal.hosts.iter().map(|host| host.name.as_str()).collect();
    assert_eq!(names, ["h1", "h2", "h3"]);
    let text = refusal.to_string();
    for host in &refusal.hosts {
        assert!(text.contains(&host.to_string()), "{host} in {text}");
    }
    let fleet = Refusal { hosts: vec![refusal.hosts.clone(); 4].concat(), change: None };
    assert_eq!(
        fleet.to_string(),
        "none of 12 hosts can take the instance: host_lost on 4, cpu_dedicated_free on 8; nearest: h2: guest cell \
         0 on cell 0: not enough free dedicated CPUs in the cell (cpu_dedicated_free): needs 2 CPUs, has 1 CPUs"
    );
    let nobody = try_place(&[], &request(1, 64, &[])).unwrap_err();
    assert_eq!(nobody.to_string(), "no host can take the instance: there are no hosts");
}

fn inventory() -> report::Inventory {
    let cell = |id: u32, cpus: [u32; 4]| report::Cell {
        id,
        cpus: cpus
            .iter()
            .map(|&cpu| report::Cpu {
                id: cpu,
                package: 0,
                die: -1,
                core: i64::from(cpu / 2),
                siblings: vec![cpu & !1, cpu | 1],
                l3: Some(cpus[0]),
                ..report::Cpu::default()
            })
            .collect(),
        memory_bytes: 1 << 30,
        page_pools: vec![
            report::PagePool { size_kib: 4, total: 1 << 17, taken: 0 },
            report::PagePool { size_kib: 2048, total: 256, taken: 0 },
        ],
        distances: BTreeMap::new(),
        shared_cpus: cpus.to_vec(),
        dedicated_cpus: cpus.to_vec(),
    };
    report::Inventory {
        hostname: "h1".to_owned(),
        agent_version: String::new(),
        kernel: String::new(),
        architecture: String::new(),
        cpu_model: String::new(),
        hypervisor: report::HypervisorInfo {
            kind: String::new(),
            libvirt_version: String::new(),
            version: String::new(),
            kvm: false,
        },
        cells: vec![cell(0, [0, 1, 2, 3]), cell(4, [4, 5, 6, 7])],
        reserved_memory_bytes: 256 << 20,
        links: Vec::new(),
        underlay: report::Underlay { link: String::new(), address: [127, 0, 0, 1].into(), mtu: 1500 },
        migration_address: None,
        physical_networks: vec![],
        pools: vec![report::PoolReport {
            name: "default".to_owned(),
            path: String::new(),
            total_bytes: 1 << 40,
            free_bytes: 1 << 30,
            reachable: true,
            ..report::PoolReport::default()
        }],
    }
}

fn host_view<'r>(inventory: &report::Inventory, held: impl IntoIterator<Item = &'r Reservation>) -> HostView {
    HostView::new(HostId::random(), HostState::Up, inventory, held)
}

#[test]
fn a_report_and_its_reservations_make_the_view() {
    let view = host_view(&inventory(), []);
    assert_eq!(*view.cells[0].cores, [cpus("0-1"), cpus("2-3")]);
    assert_eq!(view.cells[0].page_pools[0].free(), (1 << 17) - 256 * 256, "the host keeps its own memory");
    assert_eq!(view.cells[1].page_pools[0].free(), 1 << 17);
    assert_eq!(view.disk_free_bytes, Some(1 << 30));
    let mut unreachable = inventory();
    unreachable.pools[0].reachable = false;
    assert_eq!(host_view(&unreachable, []).disk_free_bytes, None);
}

#[test]
fn what_is_placed_is_held_until_nothing_fits() {
    let inventory = inventory();
    for (specs, most) in [
        (&[("hw:cpu_policy", "dedicated")][..], 4),
        (&[("hw:cpu_policy", "dedicated"), ("hw:cpu_thread_policy", "isolate")], 2),
        (&[("hw:cpu_policy", "dedicated"), ("hw:emulator_threads_policy", "isolate")], 2),
        (&[("hw:cpu_policy", "dedicated"), ("hw:numa_nodes", "2")], 4),
        (&[("hw:mem_page_size", "2048")], 16),
        (&[], 12),
    ] {
        let request = request(2, 64, specs);
        let mut held: Vec<Reservation> = Vec::new();
        let refusal = loop {
            match try_place(&[host_view(&inventory, &held)], &request) {
                Ok(placement) => held.push(placement.reservation(InstanceId::random())),
                Err(refusal) => break refusal,
            }
            assert!(held.len() <= 64, "{specs:?} never ends");
        };
        assert_eq!(held.len(), most, "{specs:?}: {refusal}");
        let mut pinned = CpuSet::new();
        for cpu in held.iter().flat_map(Reservation::pinned_cpus) {
            assert!(pinned.insert(cpu), "{specs:?}: CPU {cpu} is held twice");
        }
    }
}

#[test]
fn an_inventory_that_lies_gives_a_sound_view() {
    let mut inventory = inventory();
    let cell = &mut inventory.cells[0];
    cell.dedicated_cpus = vec![0, 0, 1, 99, u32::MAX];
    cell.shared_cpus = vec![77];
    cell.cpus[2].siblings = vec![0, 2, 3];
    cell.page_pools[0].size_kib = 0;
    cell.page_pools[1].total = u64::MAX;
    inventory.reserved_memory_bytes = u64::MAX;
    let view = host_view(&inventory, []);
    assert_eq!((&view.cells[0].dedicated_cpus, &view.cells[0].shared_cpus), (&cpus("0-1"), &CpuSet::new()));
    assert_eq!(*view.cells[0].cores, [cpus("0-1"), cpus("2-3")]);
    assert!(try_place(&[view], &request(1, 1, &[("hw:cpu_policy", "dedicated")])).is_ok());
}

#[test]
fn what_is_held_on_a_cell_that_vanished_still_counts() {
    let reservation = Reservation {
        instance: InstanceId::random(),
        vcpus: 2,
        memory_bytes: 128 << 20,
        cells: vec![ReservedCell {
            guest: 0,
            host: 9,
            shared_vcpus: vec![0],
            pinning: BTreeMap::from([(1, 4)]),
            memory_bytes: 128 << 20,
            page_size_kib: None,
        }],
        emulator_cpus: Vec::new(),
        idle_cpus: vec![5],
    };
    let view = host_view(&inventory(), [&reservation]);
    assert_eq!((view.floating_vcpus, view.floating_memory_mib), (2, 128));
    assert_eq!(view.cells[1].pinned_cpus, cpus("4-5"), "its CPUs are not free");
}
