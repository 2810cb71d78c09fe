//! What the veto promises.

use super::*;
use godwit_protocol::host::{Cpu, PagePool};
use proptest::prelude::*;

const GIB: u64 = 1 << 30;

/// Two cells of four CPUs and 8 GiB each: CPUs 0, 1, 4, 5 shared, 2, 3, 6, 7 dedicated, 1 GiB of 2 MiB pages in
/// cell 0, 1 GiB kept from guests.
fn host() -> Capacity {
    let cell = |id: u32, huge_pages: u64| Cell {
        id,
        cpus: (id * 4..id * 4 + 4)
            .map(|cpu| Cpu {
                id: cpu,
                package: 0,
                die: 0,
                core: i64::from(cpu),
                siblings: vec![cpu],
                ..Cpu::default()
            })
            .collect(),
        memory_bytes: 8 * GIB,
        page_pools: vec![
            PagePool { size_kib: 4, total: 8 * GIB / 4096, taken: 0 },
            PagePool { size_kib: 2048, total: huge_pages, taken: 0 },
        ],
        distances: BTreeMap::new(),
        shared_cpus: vec![id * 4, id * 4 + 1],
        dedicated_cpus: vec![id * 4 + 2, id * 4 + 3],
    };
    Capacity { cells: vec![cell(0, 512), cell(1, 0)], reserved_memory_bytes: GIB }
}

fn floating_guest(vcpus: u32, memory_bytes: u64) -> Reservation {
    Reservation {
        instance: InstanceId::random(),
        vcpus,
        memory_bytes,
        cells: Vec::new(),
        emulator_cpus: Vec::new(),
        idle_cpus: Vec::new(),
    }
}

fn pinned_guest(host: u32, cpus: &[u32], memory_bytes: u64, page_size_kib: Option<u64>) -> Reservation {
    let cell = ReservedCell {
        guest: 0,
        host,
        shared_vcpus: Vec::new(),
        pinning: (0..).zip(cpus.iter().copied()).collect(),
        memory_bytes,
        page_size_kib,
    };
    Reservation { cells: vec![cell], ..floating_guest(cpus.len() as u32, memory_bytes) }
}

fn opened() -> (tempfile::TempDir, Reservations) {
    let dir = tempfile::tempdir().unwrap();
    let reservations = Reservations::open(dir.path()).unwrap();
    (dir, reservations)
}

#[test]
fn a_pinned_cpu_is_pinned_once_and_the_refusal_names_the_holder() {
    let (_dir, reservations) = opened();
    let first = pinned_guest(0, &[2], GIB, None);
    assert!(reservations.reserve(&host(), first.clone()).unwrap());
    let error = reservations.reserve(&host(), pinned_guest(0, &[3, 2], GIB, None)).unwrap_err();
    assert!(
        matches!(error, ReserveError::CpuTaken { cpu: 2, holder } if holder == first.instance),
        "{error}"
    );
    assert_eq!(RequestError::from(error).kind, ErrorKind::Refused);
    assert!(reservations.release(first.instance).unwrap());
    assert!(reservations.reserve(&host(), pinned_guest(0, &[3, 2], GIB, None)).unwrap());
}

#[test]
fn the_same_reservation_again_succeeds_and_another_replaces_it_only_if_it_fits() {
    let (_dir, reservations) = opened();
    let first = pinned_guest(0, &[2], GIB, None);
    assert!(reservations.reserve(&host(), first.clone()).unwrap());
    assert!(!reservations.reserve(&host(), first.clone()).unwrap());
    let moved = Reservation { instance: first.instance, ..pinned_guest(1, &[6, 7], GIB, None) };
    assert!(reservations.reserve(&host(), moved.clone()).unwrap());
    let absurd = Reservation { instance: first.instance, ..pinned_guest(1, &[6], 100 * GIB, None) };
    reservations.reserve(&host(), absurd).unwrap_err();
    assert_eq!(reservations.list(), [moved]);
}

#[test]
fn only_online_dedicated_cpus_of_the_right_cell_are_pinned() {
    let (_dir, reservations) = opened();
    let refused = |r| reservations.reserve(&host(), r).unwrap_err();
    assert!(matches!(refused(pinned_guest(0, &[0], GIB, None)), ReserveError::NotDedicated(0)));
    assert!(matches!(refused(pinned_guest(0, &[6], GIB, None)), ReserveError::NoCpu { cpu: 6, cell: 0 }));
    assert!(matches!(refused(pinned_guest(9, &[2], GIB, None)), ReserveError::NoCell(9)));
    let mut emulator = pinned_guest(0, &[2], GIB, None);
    emulator.emulator_cpus = vec![1];
    assert!(matches!(refused(emulator), ReserveError::NotDedicated(1)));
    let mut idle = pinned_guest(0, &[2], GIB, None);
    idle.idle_cpus = vec![99];
    assert!(matches!(refused(idle), ReserveError::NoCpuAnywhere(99)));
}

#[test]
fn a_sibling_that_must_stay_idle_is_kept_from_others() {
    let (_dir, reservations) = opened();
    let mut alone = pinned_guest(0, &[2], GIB, None);
    alone.idle_cpus = vec![3];
    reservations.reserve(&host(), alone).unwrap();
    let error = reservations.reserve(&host(), pinned_guest(0, &[3], GIB, None)).unwrap_err();
    assert!(matches!(error, ReserveError::CpuTaken { cpu: 3, .. }), "{error}");
}

#[test]
fn huge_pages_are_counted_by_pool_and_rounded_up() {
    let (_dir, reservations) = opened();
    reservations.reserve(&host(), pinned_guest(0, &[2], GIB - 1, Some(2048))).unwrap();
    let error = reservations.reserve(&host(), pinned_guest(0, &[3], 1, Some(2048))).unwrap_err();
    assert!(matches!(error, ReserveError::Pages { cell: 0, size_kib: 2048, need: 1, have: 0 }), "{error}");
    let error = reservations.reserve(&host(), pinned_guest(1, &[6], GIB, Some(1 << 20))).unwrap_err();
    assert!(matches!(error, ReserveError::NoPageSize { cell: 1, .. }), "{error}");
}

#[test]
fn ordinary_memory_leaves_out_huge_pages_and_what_the_host_keeps() {
    let (_dir, reservations) = opened();
    // Cell 0: 8 GiB, less 1 GiB of huge pages, less 1 GiB kept.
    let error = reservations.reserve(&host(), pinned_guest(0, &[2], 6 * GIB + 1, None)).unwrap_err();
    assert!(matches!(error, ReserveError::Memory { need, have, .. } if need == have + 1), "{error}");
    reservations.reserve(&host(), pinned_guest(0, &[2], 6 * GIB, Some(4))).unwrap();
    // Floating guests take what is left anywhere.
    let error = reservations.reserve(&host(), floating_guest(1, 8 * GIB + 1)).unwrap_err();
    assert!(error.to_string().contains("this host"), "{error}");
    reservations.reserve(&host(), floating_guest(1, 8 * GIB)).unwrap();
    reservations.reserve(&host(), floating_guest(1, 1)).unwrap_err();
    reservations.reserve(&host(), pinned_guest(1, &[6], 1, None)).unwrap_err();
}

#[test]
fn floating_vcpus_are_bounded_and_need_shared_cpus() {
    let (_dir, reservations) = opened();
    reservations.reserve(&host(), floating_guest(4 * 64, GIB)).unwrap();
    let error = reservations.reserve(&host(), floating_guest(1, GIB)).unwrap_err();
    assert!(matches!(error, ReserveError::SharedCpus { need: 257, have: 256, .. }), "{error}");
    let mut all_dedicated = host();
    all_dedicated.cells[1].shared_cpus.clear();
    let mut bound = pinned_guest(1, &[], GIB, None);
    bound.vcpus = 1;
    bound.cells[0].shared_vcpus = vec![0];
    let error = reservations.reserve(&all_dedicated, bound).unwrap_err();
    assert!(matches!(error, ReserveError::SharedCpus { need: 1, have: 0, .. }), "{error}");
}

#[test]
fn a_reservation_that_contradicts_itself_is_invalid_and_not_refused() {
    let (_dir, reservations) = opened();
    let good = pinned_guest(0, &[2, 3], GIB, None);
    let cases: [fn(&mut Reservation); 7] = [
        |r| r.vcpus = 0,
        |r| r.vcpus = 3,
        |r| r.memory_bytes += 1,
        |r| r.cells[0].shared_vcpus = vec![1],
        |r| r.cells[0].page_size_kib = Some(0),
        |r| r.emulator_cpus = vec![2],
        |r| r.cells.push(r.cells[0].clone()),
    ];
    for (number, spoil) in cases.iter().enumerate() {
        let mut wrong = good.clone();
        spoil(&mut wrong);
        let error = RequestError::from(reservations.reserve(&host(), wrong).unwrap_err());
        assert_eq!(error.kind, ErrorKind::Invalid, "case {number}: {error}");
    }
}

#[test]
fn reservations_survive_a_restart_and_a_damaged_file_is_not_taken_for_an_empty_one() {
    let (dir, reservations) = opened();
    let guest = pinned_guest(0, &[2], GIB, None);
    reservations.reserve(&host(), guest.clone()).unwrap();
    drop(reservations);
    assert_eq!(Reservations::open(dir.path()).unwrap().list(), [guest]);
    std::fs::write(dir.path().join("reservations.json"), "[{").unwrap();
    assert!(matches!(Reservations::open(dir.path()), Err(StateError::Malformed { .. })));
}

#[test]
fn a_reservation_that_cannot_be_kept_is_not_held() {
    let (dir, reservations) = opened();
    std::fs::create_dir(dir.path().join("reservations.json")).unwrap();
    let error = reservations.reserve(&host(), floating_guest(1, GIB)).unwrap_err();
    assert!(matches!(error, ReserveError::Keep(_)), "{error}");
    assert_eq!(reservations.list(), []);
}

fn any_reservation() -> impl Strategy<Value = Reservation> {
    let cell = (
        0_u32..3,
        proptest::collection::vec(0_u32..9, 0..3),
        0_u32..3,
        1..4_u64,
        prop_oneof![Just(None), Just(Some(4)), Just(Some(2048))],
    );
    (
        0_u128..6,
        proptest::collection::vec(cell, 0..3),
        proptest::collection::vec(0_u32..9, 0..2),
        proptest::collection::vec(0_u32..9, 0..2),
    )
        .prop_map(|(instance, cells, emulator_cpus, idle_cpus)| {
            let mut vcpu = 0..;
            let cells: Vec<ReservedCell> = (0..)
                .zip(cells)
                .map(|(guest, (host, pins, shared, memory, page_size_kib))| ReservedCell {
                    guest,
                    host,
                    pinning: pins.into_iter().map(|cpu| (vcpu.next().unwrap(), cpu)).collect(),
                    shared_vcpus: vcpu.by_ref().take(shared as usize).collect(),
                    memory_bytes: memory * GIB / 2,
                    page_size_kib,
                })
                .collect();
            let memory = cells.iter().map(|c| c.memory_bytes).sum::<u64>();
            Reservation {
                instance: InstanceId(uuid::Uuid::from_u128(instance)),
                vcpus: vcpu.next().unwrap().max(1),
                memory_bytes: memory.max(GIB),
                cells,
                emulator_cpus,
                idle_cpus,
            }
        })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn whatever_is_asked_no_cpu_is_pinned_twice_and_no_byte_is_promised_twice(
        asked in proptest::collection::vec((any::<bool>(), any_reservation()), 1..24),
    ) {
        let host = host();
        let mut table: BTreeMap<InstanceId, Reservation> = BTreeMap::new();
        for (release, wanted) in asked {
            if release {
                table.remove(&wanted.instance);
                continue;
            }
            let others = table.values().filter(|r| r.instance != wanted.instance);
            if check(&host, &others.collect::<Vec<_>>(), &wanted).is_ok() {
                table.insert(wanted.instance, wanted);
            }
            let mut pinned: Vec<u32> = table.values().flat_map(Reservation::pinned_cpus).collect();
            let total = pinned.len();
            pinned.sort_unstable();
            pinned.dedup();
            prop_assert_eq!(pinned.len(), total);
            let huge: u64 = table
                .values()
                .flat_map(|r| &r.cells)
                .filter(|c| c.page_size_kib == Some(2048))
                .map(|c| c.memory_bytes)
                .sum();
            let all: u64 = table.values().map(|r| r.memory_bytes).sum();
            prop_assert!(huge <= GIB);
            prop_assert!(all - huge <= 14 * GIB);
        }
    }
}

#[test]
fn of_two_places_of_one_instance_both_are_held_until_one_is_let_go_over_restarts() {
    let (dir, reservations) = opened();
    let old = pinned_guest(0, &[2], GIB, None);
    let new = Reservation { instance: old.instance, ..pinned_guest(0, &[3], 2 * GIB, None) };
    let early = reservations.reserve_beside(&host(), new.clone()).unwrap_err();
    assert!(matches!(early, ReserveError::Malformed(_)), "{early}");
    reservations.reserve(&host(), old.clone()).unwrap();
    let overlap = Reservation { instance: old.instance, ..pinned_guest(0, &[2, 3], GIB, None) };
    let taken = reservations.reserve_beside(&host(), overlap).unwrap_err();
    assert!(matches!(taken, ReserveError::CpuTaken { cpu: 2, holder } if holder == old.instance), "{taken}");
    assert!(reservations.reserve_beside(&host(), new.clone()).unwrap());
    assert!(!reservations.reserve_beside(&host(), new.clone()).unwrap(), "a second time changes nothing");
    let other = |cpus: &[u32], bytes| reservations.reserve(&host(), pinned_guest(0, cpus, bytes, None));
    assert!(matches!(other(&[2], GIB), Err(ReserveError::CpuTaken { cpu: 2, .. })));
    assert!(matches!(other(&[3], GIB), Err(ReserveError::CpuTaken { cpu: 3, .. })));

    for (now, beside) in [(&old, &new), (&new, &old), (&new, &old), (&old, &new)] {
        reservations.exchange(now).unwrap();
        let again = Reservations::open(dir.path()).unwrap();
        for table in [&reservations, &again] {
            assert_eq!(table.get(old.instance).as_ref(), Some(now));
            assert_eq!(table.beside(old.instance).as_ref(), Some(beside));
            assert_eq!((table.list(), table.list_beside()), (vec![now.clone()], vec![beside.clone()]));
        }
    }
    let third = Reservation { vcpus: 2, ..new.clone() };
    assert!(matches!(reservations.exchange(&third), Err(ReserveError::NotBeside(_))));
    assert!(reservations.release_beside(old.instance).unwrap());
    assert!(!reservations.release_beside(old.instance).unwrap());
    assert!(matches!(reservations.exchange(&new), Err(ReserveError::NotBeside(_))));
    assert_eq!(reservations.list(), std::slice::from_ref(&old));
    reservations.reserve_beside(&host(), new).unwrap();
    assert!(reservations.release(old.instance).unwrap(), "all of it goes");
    assert_eq!(Reservations::open(dir.path()).unwrap().list(), []);
    assert_eq!(reservations.list_beside(), []);
}
