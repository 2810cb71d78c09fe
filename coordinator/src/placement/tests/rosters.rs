//! The roster finds what a look at each host finds.

use proptest::prelude::*;

use godwit_protocol::id::{HostId, InstanceId};
use godwit_protocol::reservation::Reservation;

use super::cpus;
use super::hosts::{request, view};
use crate::placement::cell::PagePool;
use crate::placement::{Choice, HostState, HostView, Limits, Order, Placement, Request, Roster, find, place};

/// A host that differs from others in all that a roster goes by.
fn host(index: usize, dice: [u8; 8]) -> HostView {
    let mut host = view(&format!("h{:02}", index % 7));
    host.id = HostId(uuid::Uuid::from_u128(index as u128 + 1));
    let [state, floating, pinned, huge, pages, disk, cells, small] = dice;
    if state % 8 == 0 {
        host.state = HostState::Disabled;
    }
    host.floating_memory_mib = u64::from(floating % 16) * 512;
    host.floating_vcpus = u64::from(floating / 16) * 4;
    host.cells[0].pinned_cpus = (0..4_u32).filter(|cpu| pinned & (1 << cpu) != 0).collect();
    host.cells[1].pinned_cpus = (4..8_u32).filter(|cpu| pinned & (1 << cpu) != 0).collect();
    for (cell, total) in host.cells.iter_mut().zip([huge % 3, huge / 3 % 3]) {
        let total = u64::from(total) * 256;
        let used = u64::from(pages % 2) * total / 2;
        cell.page_pools.push(PagePool { size_kib: 2048, total, used, reserved: 0 });
        cell.page_pools[0].used = u64::from(small % 4) << 18;
    }
    host.disk_free_bytes = (disk % 8 != 0).then_some(u64::from(disk) << 30);
    if cells % 3 == 0 {
        host.cells.pop();
    }
    host
}

fn roster(hosts: &[HostView], limits: Limits) -> Roster {
    // What is counted in already stays: the roster takes views as they are when nothing is held.
    let mut roster = Roster::new(hosts.iter().map(|host| (host.clone(), Vec::new())), limits);
    for host in hosts {
        roster.change(host.id, |view| *view = host.clone());
    }
    roster
}

fn requests() -> Vec<Request> {
    let mut disk = request(1, 64, &[]);
    disk.disk_bytes = 100 << 30;
    vec![
        request(1, 512, &[]),
        request(8, 4096, &[]),
        disk,
        request(2, 512, &[("hw:cpu_policy", "dedicated")]),
        request(4, 1024, &[("hw:cpu_policy", "dedicated"), ("hw:numa_nodes", "2")]),
        request(3, 512, &[("hw:cpu_policy", "dedicated"), ("hw:emulator_threads_policy", "isolate")]),
        request(2, 512, &[("hw:cpu_policy", "dedicated"), ("hw:cpu_thread_policy", "require")]),
        request(2, 512, &[("hw:mem_page_size", "2048")]),
        request(2, 1024, &[("hw:mem_page_size", "large"), ("hw:numa_nodes", "2")]),
        request(2, 512, &[("hw:cpu_policy", "mixed"), ("hw:cpu_dedicated_mask", "0")]),
        request(4, 2048, &[("hw:numa_nodes", "2")]),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3_000, ..ProptestConfig::default() })]

    #[test]
    fn a_roster_finds_the_host_that_a_look_at_each_finds(
        dice in proptest::collection::vec(any::<[u8; 8]>(), 0..24),
        pick in 0..11_usize,
        pack in any::<bool>(),
        ratio in prop::sample::select(vec![1.0, 2.0, 16.0]),
        other_limits in any::<bool>(),
    ) {
        let hosts: Vec<HostView> = dice.iter().enumerate().map(|(at, dice)| host(at, *dice)).collect();
        let request = &requests()[pick];
        let limits = Limits { cpu_ratio: ratio, memory_ratio: 1.0 };
        let order = if pack { Order::Pack } else { Order::Spread };
        let choice = Choice { limits, order, ..Choice::default() };
        let known = if other_limits { Limits { cpu_ratio: 1.0, memory_ratio: 0.5 } } else { limits };
        let found = find(&roster(&hosts, known), request, &choice, |_| true);
        prop_assert_eq!(found, place(&hosts, request, &choice).ok());
    }

    #[test]
    fn what_is_held_and_let_go_leaves_no_trace(
        order in Just((0..13_usize).collect::<Vec<_>>()).prop_shuffle(),
        twice in prop::option::of(0..12_usize),
    ) {
        let hosts = [view("a"), view("b"), view("c")];
        let empty = roster(&hosts, Limits::default());
        let mut full = empty.clone();
        let wanted = request(2, 256, &[("hw:cpu_policy", "dedicated")]);
        let mut held: Vec<(HostId, Reservation)> = Vec::new();
        while let Some(placement) = find(&full, &wanted, &Choice::default(), |_| true) {
            let reservation = placement.reservation(InstanceId::random());
            full.hold(placement.host, &reservation);
            held.push((placement.host, reservation));
        }
        prop_assert_eq!(held.len(), 12, "three hosts of four pairs each");
        // CPUs that two hold, as after a host's records were lost, are free when both have let go.
        if let Some(twice) = twice {
            let (host, reservation) = held[twice].clone();
            full.hold(host, &reservation);
            held.push((host, reservation));
        }
        for last in order.into_iter().take(held.len()) {
            let last = last.min(held.len() - 1);
            let (host, gone) = held.swap_remove(last);
            let rest = held.iter().filter(|(other, _)| *other == host).map(|(_, reservation)| reservation);
            full.release(host, &gone, || rest);
            let room = find(&full, &wanted, &Choice::default(), |_| true).is_some();
            prop_assert!(room || held.len() == 12);
        }
        prop_assert!(full.views().eq(empty.views()));
    }
}

#[test]
fn a_seed_says_where_ties_begin_and_nothing_else() {
    let mut hosts: Vec<HostView> = (0..5).map(|at| view(&format!("h{at}"))).collect();
    let ask = |hosts: &[HostView], seed| {
        let choice = Choice { seed, ..Choice::default() };
        find(&roster(hosts, choice.limits), &request(1, 64, &[]), &choice, |_| true).unwrap().host_name
    };
    assert_eq!([0, 3, 5, 9, u64::MAX].map(|seed| ask(&hosts, seed)), ["h0", "h3", "h0", "h4", "h0"]);
    hosts[3].state = HostState::Disabled;
    assert_eq!(ask(&hosts, 3), "h4", "the next after it");
    hosts[1].floating_memory_mib = 1;
    for host in [0, 2, 4] {
        hosts[host].floating_memory_mib = 2;
    }
    assert_eq!(ask(&hosts, 2), "h1", "no tie, no seed");
}

#[test]
fn hosts_come_change_and_go() {
    let mut roster = Roster::new([], Limits::default());
    let ask = |roster: &Roster| {
        find(roster, &request(1, 64, &[]), &Choice::default(), |_| true)
            .map(|placement: Placement| placement.host_name)
    };
    assert_eq!((roster.len(), ask(&roster)), (0, None));
    let (a, mut b) = (view("a"), view("b"));
    roster.put(b.clone(), []);
    roster.put(a.clone(), []);
    assert_eq!((roster.len(), ask(&roster)), (2, Some("a".to_owned())));
    b.name = "0".to_owned();
    roster.put(b.clone(), []);
    assert_eq!((roster.len(), ask(&roster)), (2, Some("0".to_owned())), "renamed, not doubled");
    roster.change(b.id, |view| view.state = HostState::Disabled);
    assert_eq!(ask(&roster), Some("a".to_owned()));
    roster.remove(a.id);
    roster.remove(a.id);
    assert_eq!((roster.len(), ask(&roster)), (1, None));
    let mut wide = a;
    wide.cells[0].dedicated_cpus = cpus("0-63");
    roster.put(wide, []);
    assert!(
        find(&roster, &request(40, 64, &[("hw:cpu_policy", "dedicated")]), &Choice::default(), |_| true)
            .is_some()
    );
}
