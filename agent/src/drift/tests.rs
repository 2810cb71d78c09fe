//! What counts as a drift, and that it is told once.

use super::*;
use crate::guest_process::tests::{processes, write_guest};
use crate::hypervisor::fake::Fake;
use crate::reservations::Capacity;
use godwit_protocol::host::Cpu;
use godwit_protocol::reservation::ReservedCell;
use prometheus::TextEncoder;

/// Two cells of four CPUs; the first of each is shared.
fn cells() -> Vec<Cell> {
    let cell = |id: u32| Cell {
        id,
        cpus: (id * 4..id * 4 + 4).map(|id| Cpu { id, siblings: vec![id], ..Cpu::default() }).collect(),
        memory_bytes: 8 << 30,
        page_pools: vec![],
        distances: BTreeMap::new(),
        shared_cpus: vec![id * 4],
        dedicated_cpus: (id * 4 + 1..id * 4 + 4).collect(),
    };
    vec![cell(0), cell(1)]
}

/// vCPU 0 on CPU 2, vCPU 1 on CPU 3, memory in cell 0.
fn reservation(instance: InstanceId) -> Reservation {
    Reservation {
        instance,
        vcpus: 2,
        memory_bytes: 1 << 30,
        cells: vec![ReservedCell {
            guest: 0,
            host: 0,
            shared_vcpus: vec![],
            pinning: BTreeMap::from([(0, 2), (1, 3)]),
            memory_bytes: 1 << 30,
            page_size_kib: None,
        }],
        emulator_cpus: vec![],
        idle_cpus: vec![],
    }
}

fn set(cpus: &[u32]) -> BTreeSet<u32> {
    cpus.iter().copied().collect()
}

fn bound(cells: Option<&[u32]>) -> Mapping {
    Mapping { bound: cells.map(set), page_kib: 4, huge: false, pages: BTreeMap::new() }
}

/// Everything where it should be.
fn right() -> (BTreeMap<u32, BTreeSet<u32>>, Seen) {
    let pins = BTreeMap::from([(0, set(&[2])), (1, set(&[3]))]);
    let memory = Some(vec![bound(None), bound(Some(&[0]))]);
    (pins.clone(), Seen { vcpus: pins, emulator: Some(set(&[2, 3])), memory })
}

fn found(told: &BTreeMap<u32, BTreeSet<u32>>, seen: &Seen) -> Vec<(Aspect, String, String)> {
    let reservation = reservation(InstanceId::random());
    let drifts = compare(&reservation, &cells(), MemoryBinding::Strict, told, seen);
    drifts.into_iter().map(|d| (d.aspect, d.wanted, d.found)).collect()
}

#[test]
fn what_is_where_it_was_reserved_is_no_drift() {
    let (told, seen) = right();
    assert_eq!(found(&told, &seen), []);
    // Nor is an emulator that floats over shared CPUs, or one that nothing is known of.
    for emulator in [Some(set(&[0, 4])), Some(set(&[2])), None] {
        assert_eq!(found(&told, &Seen { emulator, ..seen.clone() }), []);
    }
    assert_eq!(found(&BTreeMap::new(), &Seen::default()), []);
}

#[test]
fn each_thing_that_is_elsewhere_is_a_drift_of_its_own() {
    let (told, seen) = right();
    let moved = BTreeMap::from([(0, set(&[2])), (1, set(&[1, 3]))]);
    let text = |text: &str| text.to_owned();
    assert_eq!(found(&moved, &seen), [(Aspect::VcpuPin { vcpu: 1 }, text("CPUs 3"), text("CPUs 1,3"))]);
    assert_eq!(
        found(&told, &Seen { vcpus: moved, ..seen.clone() }),
        [(Aspect::VcpuThread { vcpu: 1 }, text("CPUs 3"), text("CPUs 1,3"))]
    );
    // CPU 1 may be another guest's own.
    assert_eq!(
        found(&told, &Seen { emulator: Some(set(&[0, 1])), ..seen.clone() }),
        [(Aspect::EmulatorThread, text("CPUs 2-3"), text("CPUs 0-1"))]
    );
    for memory in [vec![bound(None)], vec![bound(Some(&[1]))], vec![bound(Some(&[0, 1]))]] {
        let drifts = found(&told, &Seen { memory: Some(memory), ..seen.clone() });
        assert_eq!(drifts.len(), 1);
        assert_eq!(
            (drifts[0].0, drifts[0].1.as_str()),
            (Aspect::Memory { cell: 0 }, "memory bound to cell 0")
        );
    }
}

#[test]
fn memory_is_looked_at_only_where_it_is_bound() {
    let (told, seen) = right();
    let seen = Seen { memory: Some(vec![bound(None)]), ..seen };
    let drifts = compare(&reservation(InstanceId::random()), &cells(), MemoryBinding::None, &told, &seen);
    assert_eq!(drifts, []);
}

#[test]
fn a_drift_is_counted_until_it_is_over_and_a_stranger_is_one() {
    let root = tempfile::tempdir().unwrap();
    let (one, stranger) = (InstanceId::random(), InstanceId::random());
    let reservations = Arc::new(Reservations::open(root.path()).unwrap());
    let capacity = Capacity { cells: cells(), reserved_memory_bytes: 0 };
    reservations.reserve(&capacity, reservation(one)).unwrap();
    let fake = Arc::new(Fake::new(Arc::default()));
    let registry = Registry::new();
    let drifts =
        Drifts::new(fake.clone(), reservations, processes(root.path()), MemoryBinding::Strict, &registry);
    let drifts = drifts.unwrap();
    let count = |kind: &str| {
        let text = TextEncoder::new().encode_to_string(&registry.gather()).unwrap();
        let name = format!("godwit_placement_drifts{{kind=\"{kind}\"}} ");
        text.lines().find_map(|line| line.strip_prefix(&name)?.parse::<u32>().ok()).unwrap()
    };
    fake.run_pinned(one, BTreeMap::from([(0, set(&[2])), (1, set(&[3]))]));
    write_guest(root.path(), one, 100, &[(0, 2, "2"), (1, 1, "1")], "7f00 bind:0 anon=1 N0=1\n");
    assert!(drifts.check_threads(&cells()));
    let listed = drifts.list();
    assert_eq!(listed.len(), 1, "{listed:#?}");
    assert_eq!((listed[0].instance, listed[0].aspect), (one, Aspect::VcpuThread { vcpu: 1 }));
    assert!(!drifts.check_all(&cells()), "nothing is new");
    assert!(!drifts.check_threads(&cells()), "nothing is new");
    assert_eq!((count("vcpu_thread"), count("unreserved")), (1, 0));

    fake.run_pinned(stranger, BTreeMap::new());
    assert!(drifts.check_all(&cells()));
    assert_eq!((count("vcpu_thread"), count("unreserved")), (1, 1));

    write_guest(root.path(), one, 100, &[(0, 2, "2"), (1, 3, "3")], "7f00 default anon=1 N0=1\n");
    fake.crash(stranger);
    assert!(drifts.check_all(&cells()));
    assert_eq!(drifts.list(), []);
    // Memory is looked at when it is asked for, and is remembered until it is looked at again.
    assert!(drifts.check(one, &cells(), true));
    assert!(!drifts.check_all(&cells()));
    assert_eq!(count("memory"), 1);
    fake.set_down(true);
    assert!(!drifts.check_all(&cells()), "what does not answer says nothing new");
    assert_eq!(count("memory"), 1);

    // A process that was not there before is looked at whole, once.
    fake.set_down(false);
    write_guest(root.path(), one, 200, &[(0, 2, "2"), (1, 3, "3")], "7f00 bind:0 anon=1 N0=1\n");
    assert!(drifts.check_threads(&cells()));
    assert_eq!(count("memory"), 0);
    write_guest(root.path(), one, 200, &[(0, 2, "2"), (1, 3, "3")], "7f00 default anon=1 N0=1\n");
    assert!(!drifts.check_threads(&cells()));
}
