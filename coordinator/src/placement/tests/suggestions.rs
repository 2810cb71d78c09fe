//! What would make room, and how much room there is.

use std::collections::BTreeMap;

use godwit_protocol::id::{HostId, InstanceId};
use godwit_protocol::reservation::Reservation;

use super::hosts::{request, view};
use crate::placement::cell::PagePool;
use crate::placement::described::DescribedFleet;
use crate::placement::simulate::fill;
use crate::placement::suggest::{Change, Movable, changes};
use crate::placement::{Choice, HostState, HostView, Limits, Request, Roster, find};

fn roster(hosts: &[HostView]) -> Roster {
    Roster::new(hosts.iter().map(|host| (host.clone(), Vec::new())), Limits::default())
}

/// The kinds of the changes found, and the first in words.
fn ask(roster: &Roster, request: &Request) -> (Vec<&'static str>, String) {
    let found = changes(roster, request, &Choice::default(), |_| true, vec![], usize::MAX, |_| None);
    (found.iter().map(Change::name).collect(), found.first().map(ToString::to_string).unwrap_or_default())
}

#[test]
fn other_pages_policies_and_cells_are_tried() {
    let mut host = view("a");
    host.cells[1].page_pools.push(PagePool { size_kib: 2048, total: 1024, used: 0, reserved: 0 });
    let roster = roster(&[host]);
    let pages = request(2, 1024, &[("hw:mem_page_size", "1GB")]);
    assert_eq!(ask(&roster, &pages), (vec!["page_size"], "hw:mem_page_size were 2048 (on a)".to_owned()));
    let dedicated = ("hw:cpu_policy", "dedicated");
    let isolate = request(2, 64, &[dedicated, ("hw:cpu_thread_policy", "isolate")]);
    let (kinds, first) = ask(&roster, &isolate);
    assert_eq!(kinds, ["thread_policy", "cpu_policy"]);
    assert_eq!(first, "hw:cpu_thread_policy were prefer, not isolate (on a)");
    let emulator = request(4, 64, &[dedicated, ("hw:emulator_threads_policy", "isolate")]);
    assert_eq!(ask(&roster, &emulator).0, ["emulator_policy", "cells"]);
    let wide = request(8, 64, &[dedicated]);
    assert_eq!(ask(&roster, &wide), (vec!["cells"], "hw:numa_nodes were 2 (on a)".to_owned()));
    assert_eq!(ask(&roster, &request(2, 1 << 30, &[])).0, Vec::<&str>::new(), "nothing helps");
}

#[test]
fn a_host_that_is_disabled_would_do() {
    let mut off = view("a");
    off.state = HostState::Disabled;
    let (kinds, first) = ask(&roster(&[off]), &request(1, 64, &[]));
    assert_eq!((kinds, first.as_str()), (vec!["enable_host"], "host a took instances again"));
}

#[test]
fn the_smallest_instance_that_can_go_is_named_with_a_host_that_takes_it() {
    let hosts = [view("a"), view("b")];
    let mut roster = roster(&hosts);
    let mut held: BTreeMap<InstanceId, (HostId, Reservation, Request)> = BTreeMap::new();
    let place = |roster: &mut Roster, wanted: &Request, on: &str| {
        let placement = find(roster, wanted, &Choice::default(), |host| host.name == on).unwrap();
        let id = InstanceId(uuid::Uuid::from_u128(u128::from(wanted.memory_mib)));
        let reservation = placement.reservation(id);
        roster.hold(placement.host, &reservation);
        (id, (placement.host, reservation, wanted.clone()))
    };
    let pinned = |vcpus, memory| request(vcpus, memory, &[("hw:cpu_policy", "dedicated")]);
    // Each host has two free CPUs in each of its cells; a guest of four in one cell has no place.
    for (memory, on) in [(100, "a"), (90, "a"), (110, "b"), (80, "b")] {
        held.extend([place(&mut roster, &pinned(2, memory), on)]);
        roster.change(hosts[0].id, |_| {});
    }
    let spread = held.values().all(|(_, reservation, _)| reservation.cells.len() == 1);
    assert!(spread);
    let wanted = pinned(4, 64);
    let movable = || {
        held.iter()
            .map(|(id, (host, reservation, _))| Movable { instance: *id, host: *host, reservation })
            .collect()
    };
    let of = |id: InstanceId| {
        held.get(&id)
            .map(|(_, _, needs)| (format!("i{}", needs.memory_mib), needs.clone(), Choice::default()))
    };
    if find(&roster, &wanted, &Choice::default(), |_| true).is_some() {
        panic!("it has a place already");
    }
    let found = changes(&roster, &wanted, &Choice::default(), |_| true, movable(), usize::MAX, of);
    let moved = found.iter().find(|change| change.name() == "move").unwrap().to_string();
    assert_eq!(moved, "instance i80 (00000000-0000-0000-0000-000000000050, 80 MiB) moved from b to a");
    // Where nobody else takes it, it is not named.
    let alone =
        changes(&roster, &wanted, &Choice::default(), |host| host.name == "b", movable(), usize::MAX, of);
    assert!(alone.iter().all(|change| change.name() != "move"));
}

#[test]
fn a_fleet_is_filled_until_nothing_fits_any_more() {
    let roster = roster(&[view("a"), view("b")]);
    let wanted = request(3, 64, &[("hw:cpu_policy", "dedicated")]);
    let full = fill(roster.clone(), &wanted, &Choice::default(), 100, |_| true);
    assert_eq!((full.placed, full.by_host["a"], full.by_host["b"]), (4, 2, 2), "one in each cell");
    assert_eq!(full.stopped_by.unwrap().hosts.len(), 2);
    let some = fill(roster.clone(), &wanted, &Choice::default(), 3, |_| true);
    assert_eq!((some.placed, some.stopped_by), (3, None));
    assert_eq!(fill(roster, &wanted, &Choice::default(), 100, |host| host.name == "b").placed, 2);
}

fn described(text: &str) -> Result<Roster, String> {
    let fleet: DescribedFleet = serde_json::from_str(text).map_err(|error| error.to_string())?;
    fleet.roster(Limits::default()).map_err(|error| error.to_string())
}

#[test]
fn a_described_fleet_is_as_it_is_described() {
    let roster = described(
        r#"{"hosts": [
            {"name": "big", "count": 3, "cells": 2, "cores_per_cell": 8, "threads_per_core": 2,
             "memory_gib_per_cell": 64, "huge_pages_per_cell": {"2048": 1024}, "dedicated_cpus": "4-31",
             "shared_cpus": "0-3"},
            {"name": "small", "cores_per_cell": 4, "memory_gib_per_cell": 8}
        ]}"#,
    )
    .unwrap();
    let names: Vec<&str> = roster.views().map(|host| host.name.as_str()).collect();
    assert_eq!(names, ["big-00001", "big-00002", "big-00003", "small"]);
    let pinned = request(12, 1024, &[("hw:cpu_policy", "dedicated")]);
    assert_eq!(fill(roster.clone(), &pinned, &Choice::default(), 100, |_| true).placed, 6);
    let huge = request(1, 2048, &[("hw:mem_page_size", "2MB")]);
    let full = fill(roster, &huge, &Choice::default(), 100, |_| true);
    assert_eq!(full.placed, 3, "the other cells have pages, and no CPUs to share");
}

#[test]
fn a_description_that_no_host_meets_is_refused_by_its_key() {
    for (host, part) in [
        (r#"{"name": "a"}"#, "cells"),
        (r#"{"name": "a", "cores_per_cell": 18446744073709551615, "threads_per_core": 2}"#, "cells"),
        (r#"{"name": "a", "cores_per_cell": 1}"#, "memory_gib_per_cell"),
        (
            r#"{"name": "a", "cores_per_cell": 1, "memory_gib_per_cell": 1, "huge_pages_per_cell": {"2048": 513}}"#,
            "huge_pages",
        ),
        (
            r#"{"name": "a", "cores_per_cell": 1, "memory_gib_per_cell": 1, "shared_cpus": "x"}"#,
            "shared_cpus",
        ),
        (r#"{"name": "a", "count": 0, "cores_per_cell": 1, "memory_gib_per_cell": 1}"#, "0 hosts"),
        (r#"{"name": "a", "count": 100001}"#, "100001 hosts"),
        (r#"{"name": "a", "colour": 1}"#, "colour"),
    ] {
        let error = described(&format!(r#"{{"hosts": [{host}]}}"#)).unwrap_err();
        assert!(error.contains(part), "{error}");
    }
}
