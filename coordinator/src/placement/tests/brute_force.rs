//! Fits against a checker that knows no better than to try everything.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::{cpus, guest, pinned_cell, smt_cell};
use crate::placement::cell::{Cell, CellUsage, PagePool, apply, release};
use crate::placement::cpu_set::CpuSet;
use crate::placement::explain::{Quantity, Rule};
use crate::placement::fit::{Limits, Order, PlacedCell, fit};
use crate::placement::guest::{CpuPolicy, EmulatorPolicy, Guest, GuestCell, PageSize, ThreadPolicy};

/// Every way to put `vcpus` and `emulator` CPUs on free CPUs, tried one by one.
fn can_pin(host: &Cell, guest: &GuestCell, emulator: usize) -> bool {
    if !guest.pins() {
        return true;
    }
    let free: Vec<u32> = host.dedicated_cpus.iter().filter(|&cpu| !host.pinned_cpus.contains(cpu)).collect();
    let vcpus = guest.dedicated.len() as usize;
    let subsets = |of: &[u32], size: usize| -> Vec<Vec<u32>> {
        let all = (0..1_u32 << of.len()).filter(move |bits| bits.count_ones() as usize == size);
        all.map(|bits| {
            of.iter().enumerate().filter(|(at, _)| bits & (1 << at) != 0).map(|(_, &cpu)| cpu).collect()
        })
        .collect()
    };
    subsets(&free, vcpus).into_iter().any(|pins| {
        let rest: Vec<u32> = free.iter().copied().filter(|cpu| !pins.contains(cpu)).collect();
        subsets(&rest, emulator).into_iter().any(|emulator| pins_are_right(host, guest, &pins, &emulator))
    })
}

/// Whether host CPUs obey the guest cell's policies. Written from the rules' words, on plain lists.
fn pins_are_right(host: &Cell, guest: &GuestCell, pins: &[u32], emulator: &[u32]) -> bool {
    let taken: BTreeSet<u32> = pins.iter().chain(emulator).copied().collect();
    let is_free = |cpu: &u32| host.dedicated_cpus.contains(*cpu) && !host.pinned_cpus.contains(*cpu);
    let distinct = taken.len() == pins.len() + emulator.len() && taken.iter().all(is_free);
    let threads = host.cores.iter().map(CpuSet::len).max().unwrap_or(1);
    let on = |core: &CpuSet, cpus: &[u32]| cpus.iter().filter(|cpu| core.contains(**cpu)).count();
    let free_threads = |core: &CpuSet| core.iter().filter(is_free).count();
    let policy = match guest.thread_policy {
        None | Some(ThreadPolicy::Prefer) => emulator.is_empty() || !pins.is_empty(),
        // Each vCPU beside a free sibling, at most one of them alone on its core; room is counted with the same
        // number of threads on each core.
        Some(ThreadPolicy::Require) => {
            let used: Vec<_> = host.cores.iter().filter(|core| on(core, pins) > 0).collect();
            let lone = used.iter().filter(|core| on(core, pins) == 1).count();
            let cores_with =
                |count: u32| host.cores.iter().filter(|core| free_threads(core) >= count as usize).count();
            let room = (2..=threads)
                .any(|count| cores_with(count) > 0 && cores_with(count) * count as usize >= pins.len());
            room && lone <= 1
                && used.iter().all(|core| free_threads(core) > 1)
                && (emulator.is_empty() || !pins.is_empty())
        }
        // A wholly free core for each vCPU, and nothing else on it.
        Some(ThreadPolicy::Isolate) => {
            let split = threads > 1 && host.dedicated_cpus != host.shared_cpus;
            let alone = |core: &&CpuSet| {
                on(core, pins) == 1 && on(core, emulator) == 0 && free_threads(core) == threads as usize
            };
            let alone = host.cores.iter().filter(|core| on(core, pins) > 0).all(|core| alone(&core));
            !split && alone && !pins.is_empty()
        }
    };
    distinct && policy
}

fn memory_is_there(host: &Cell, guest: &GuestCell) -> bool {
    let kib = guest.memory_mib * 1024;
    let holds =
        |pool: &PagePool, pages: u64| kib.is_multiple_of(pool.size_kib) && kib <= pages * pool.size_kib;
    let free = |pool: &PagePool| pool.total - pool.used - pool.reserved;
    let smallest = host.page_pools.iter().map(|pool| pool.size_kib).min();
    let mut pools = host.page_pools.iter();
    match (guest.page_size, smallest) {
        (None, None) if guest.pins() => guest.memory_mib + host.memory_used_mib <= host.memory_mib,
        (None, None) => guest.memory_mib <= host.memory_mib,
        (None, smallest) => pools.any(|pool| {
            let pages = if guest.pins() { free(pool) } else { pool.total };
            Some(pool.size_kib) == smallest && holds(pool, pages)
        }),
        (Some(size), smallest) => pools.any(|pool| {
            let asked = match size {
                PageSize::Small => Some(pool.size_kib) == smallest,
                PageSize::Large => Some(pool.size_kib) != smallest,
                PageSize::Any => true,
                PageSize::Kib(kib) => pool.size_kib == kib,
            };
            asked && holds(pool, free(pool))
        }),
    }
}

fn cell_fits(host: &Cell, guest: &GuestCell, emulator: usize, limits: Option<&Limits>) -> bool {
    let floating = guest.shared.len();
    let within = limits.is_none_or(|limits| {
        let vcpus = f64::from(host.shared_cpus_used + floating);
        let memory = (host.memory_used_mib + guest.memory_mib) as f64;
        vcpus <= f64::from(host.shared_cpus.len()) * limits.cpu_ratio
            && memory <= host.memory_mib as f64 * limits.memory_ratio
    });
    let floats =
        guest.cpu_policy == Some(CpuPolicy::Dedicated) || (floating <= host.shared_cpus.len() && within);
    memory_is_there(host, guest) && floats && can_pin(host, guest, emulator)
}

/// Every assignment of guest cells to host cells, tried one by one.
fn can_fit(hosts: &[Cell], guest: &Guest, limits: Option<&Limits>, done: &mut Vec<usize>) -> bool {
    let next = done.len();
    let Some(cell) = guest.cells.get(next) else { return true };
    (0..hosts.len()).any(|host| {
        if done.contains(&host) || !cell_fits(&hosts[host], cell, guest.emulator_cpus(next) as usize, limits)
        {
            return false;
        }
        done.push(host);
        let fits = can_fit(hosts, guest, limits, done);
        done.pop();
        fits
    })
}

fn check_answer(hosts: &[Cell], guest: &Guest, limits: Option<&Limits>, placed: &[PlacedCell]) {
    let used: BTreeSet<u32> = placed.iter().map(|cell| cell.host).collect();
    assert_eq!((used.len(), placed.len()), (guest.cells.len(), guest.cells.len()), "one host cell each");
    for (index, (cell, placed)) in guest.cells.iter().zip(placed).enumerate() {
        assert_eq!(placed.guest as usize, index);
        let host = hosts.iter().find(|host| host.id == placed.host).unwrap();
        let emulator: Vec<u32> = placed.pinning.emulator_cpus.iter().collect();
        let wanted = if cell.pins() { guest.emulator_cpus(index) as usize } else { 0 };
        assert_eq!(emulator.len(), wanted);
        assert!(cell_fits(host, cell, wanted, limits), "{host:?} {cell:?}");
        let vcpus: Vec<u32> = placed.pinning.pins.vcpus().collect();
        assert_eq!(vcpus, cell.dedicated.iter().collect::<Vec<_>>(), "each dedicated vCPU is pinned");
        if cell.pins() {
            let pins: Vec<u32> = placed.pinning.pins.cpus().collect();
            assert!(pins_are_right(host, cell, &pins, &emulator), "{host:?} {cell:?} {:?}", placed.pinning);
        }
        let pool = host.page_pools.iter().find(|pool| Some(pool.size_kib) == placed.page_size_kib);
        assert_eq!(pool.is_some(), cell.page_size.is_some());
        if let Some(pool) = pool {
            assert!(cell.memory_mib * 1024 <= pool.free() * pool.size_kib);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100_000, ..ProptestConfig::default() })]

    #[test]
    fn every_fit_is_right_and_none_is_missed(
        hosts in host(),
        guest in guests(),
        limits in prop::option::of(limits()),
        order in prop::sample::select(vec![Order::Spread, Order::Pack]),
    ) {
        match fit(&hosts, &guest, limits.as_ref(), order) {
            Ok(placed) => {
                check_answer(&hosts, &guest, limits.as_ref(), &placed);
                prop_assert_eq!(fit(&hosts, &guest, limits.as_ref(), order), Ok(placed.clone()), "same question, same answer");
                // What a fit takes can be taken, and given back.
                let usage: Vec<CellUsage> = placed.iter().map(|cell| usage(&guest, cell)).collect();
                let after = apply(&hosts, &usage).unwrap();
                prop_assert_eq!(release(&after, &usage).unwrap(), hosts);
            }
            Err(error) => {
                let found = can_fit(&hosts, &guest, limits.as_ref(), &mut Vec::new());
                prop_assert!(!found, "missed: {error}");
            }
        }
    }
}

/// Thread policy isolate takes the emulator's core whole as well; what [`fit`] promises are the CPUs alone.
fn usage(guest: &Guest, placed: &PlacedCell) -> CellUsage {
    let cell = &guest.cells[placed.guest as usize];
    let mut pinned: CpuSet = placed.pinning.pins.cpus().collect();
    pinned.extend_from(&placed.pinning.idle_cpus);
    CellUsage {
        host_cell: placed.host,
        shared_vcpus: placed.shared_vcpus.len(),
        memory_mib: placed.memory_mib,
        page_size_kib: placed.page_size_kib,
        pinned,
        emulator_cpus: placed.pinning.emulator_cpus.clone(),
        cpu_policy: cell.cpu_policy,
        thread_policy: None,
    }
}

fn limits() -> impl Strategy<Value = Limits> {
    let ratio = || prop::sample::select(vec![0.5, 1.0, 1.5, 16.0]);
    (ratio(), ratio()).prop_map(|(cpu_ratio, memory_ratio)| Limits { cpu_ratio, memory_ratio })
}

fn host() -> impl Strategy<Value = Vec<Cell>> {
    (1..=4_u32, any::<bool>()).prop_flat_map(|(threads, common)| {
        let cells = proptest::collection::vec(host_cell(threads, common), 1..4);
        (cells, prop::option::of(0..4_usize), any::<[u8; 9]>()).prop_map(|(mut cells, underlay, far)| {
            for (at, cell) in cells.iter_mut().enumerate() {
                cell.id = 7 * at as u32 + 2;
                cell.has_underlay = underlay == Some(at);
                let distance =
                    |to: usize| if to == at { 10 } else { 11 + u32::from(far[3 * at + to] % 3) * 10 };
                let distances = (0..3).map(|to| (7 * to as u32 + 2, distance(to)));
                cell.distances = distances.collect();
            }
            cells
        })
    })
}

prop_compose! {
    fn host_cell(threads: u32, common: bool)(
        cores in 1..=(8 / threads).min(3),
        dedicated_bits in any::<u8>(),
        pinned_bits in prop_oneof![Just(0_u8), any::<u8>()],
        shared_cpus_used in 0..6_u32,
        memory_used_mib in 0..1200_u64,
        pools in proptest::collection::vec((0..=2_u64, 0..=2_u64, any::<bool>()), 0..=2),
        cores_per_cache in 1..=3_u32,
    ) -> Cell {
        let all = CpuSet::first_n(cores * threads);
        let chosen = |bits: u8| all.iter().filter(|cpu| bits & (1 << cpu) != 0).collect::<CpuSet>();
        let dedicated_cpus = if common { all.clone() } else { chosen(dedicated_bits) };
        let shared_cpus = if common { all.clone() } else { all.difference(&dedicated_cpus) };
        let page_pools = pools.iter().zip([4_u64, 2048]).map(|(&(total, used, reserved), size_kib)| {
            let unit = 256 * 1024 / size_kib;
            let used = used.min(total) * unit;
            let total = total * unit;
            PagePool { size_kib, total, used, reserved: if reserved { (total - used) / 2 } else { 0 } }
        });
        Cell {
            id: 0,
            memory_mib: 1024,
            memory_used_mib,
            pinned_cpus: chosen(pinned_bits).intersection(&dedicated_cpus),
            dedicated_cpus,
            shared_cpus,
            shared_cpus_used,
            cores: (0..cores).map(|core| (core * threads..(core + 1) * threads).collect()).collect(),
            caches: (0..cores)
                .step_by(cores_per_cache as usize)
                .map(|first| (first * threads..cores.min(first + cores_per_cache) * threads).collect())
                .collect(),
            page_pools: page_pools.collect(),
            ..Cell::default()
        }
    }
}

fn guests() -> impl Strategy<Value = Guest> {
    let policy = prop::option::of(prop::sample::select(vec![
        CpuPolicy::Shared,
        CpuPolicy::Dedicated,
        CpuPolicy::Dedicated,
        CpuPolicy::Mixed,
    ]));
    let threads = prop::option::of(prop::sample::select(vec![
        ThreadPolicy::Prefer,
        ThreadPolicy::Require,
        ThreadPolicy::Isolate,
    ]));
    let pages = prop_oneof![
        3 => Just(None),
        1 => prop::sample::select(vec![PageSize::Small, PageSize::Large, PageSize::Any, PageSize::Kib(2048)])
            .prop_map(Some),
    ];
    let cells = proptest::collection::vec((0..=3_u32, 0..=2_u32, 1..=4_u64), 1..=3);
    let emulator =
        prop::option::of(prop::sample::select(vec![EmulatorPolicy::Share, EmulatorPolicy::Isolate]));
    (policy, threads, pages, cells, emulator, 1..=2_u32).prop_map(
        |(cpu_policy, thread_policy, page_size, cells, emulator_policy, isolated_emulator_cpus)| {
            let cell = |(dedicated, shared, memory): (u32, u32, u64)| {
                let (dedicated, shared) = match cpu_policy {
                    Some(CpuPolicy::Dedicated) => (dedicated + shared, 0),
                    Some(CpuPolicy::Mixed) => (dedicated, shared),
                    _ => (0, dedicated + shared),
                };
                GuestCell {
                    shared: (100..100 + shared).collect(),
                    dedicated: (0..dedicated).collect(),
                    memory_mib: memory * 127 + memory % 2,
                    page_size,
                    cpu_policy,
                    thread_policy,
                }
            };
            Guest { cells: cells.into_iter().map(cell).collect(), emulator_policy, isolated_emulator_cpus }
        },
    )
}

#[test]
fn eight_guest_cells_for_seven_of_sixteen_are_refused_at_once() {
    // By permutations this takes five hundred million tries before the answer is known.
    let mut hosts: Vec<Cell> = (0..16).map(|id| smt_cell(id, "0-3")).collect();
    for host in &mut hosts[7..] {
        host.pinned_cpus = cpus("0-2");
    }
    let wanted = guest(vec![pinned_cell("0-1", 64); 8]);
    let error = fit(&hosts, &wanted, None, Order::Spread).unwrap_err();
    assert_eq!(error.shortfall.rule, Rule::CellMatching);
    assert_eq!((error.shortfall.need, error.shortfall.have), (Quantity::Cells(8), Quantity::Cells(7)));
    hosts[15].pinned_cpus = CpuSet::new();
    assert!(fit(&hosts, &wanted, None, Order::Spread).is_ok());
}

#[test]
fn a_guest_cell_gives_way_to_one_that_fits_nowhere_else() {
    let mut hosts = vec![smt_cell(0, "0-7"), smt_cell(1, "8-11")];
    hosts[1].memory_mib = 4096;
    let wanted = guest(vec![pinned_cell("0-1", 64), pinned_cell("2-7", 64)]);
    let placed = fit(&hosts, &wanted, None, Order::Spread).unwrap();
    assert_eq!(placed.iter().map(|cell| cell.host).collect::<Vec<_>>(), [1, 0]);
}

#[test]
fn pins_leave_whole_cores_to_others() {
    let mut host = smt_cell(0, "0-7");
    host.pinned_cpus = cpus("2");
    let pins = |vcpus: &str| {
        let placed = fit(&[host.clone()], &guest(vec![pinned_cell(vcpus, 64)]), None, Order::Spread).unwrap();
        placed[0].pinning.pins.cpus().collect::<CpuSet>().to_string()
    };
    assert_eq!(pins("0"), "3", "a lone thread is taken before a core is broken");
    assert_eq!(pins("0-1"), "0-1");
    assert_eq!(pins("0-2"), "0-1,3");
}

#[test]
fn with_policy_require_no_vcpu_sits_alone_where_that_can_be_helped() {
    let mut host = smt_cell(0, "0-7");
    host.cores = [cpus("0-3"), cpus("4-7")].into();
    host.pinned_cpus = cpus("0,4");
    let mut cell = pinned_cell("0-3", 64);
    cell.thread_policy = Some(ThreadPolicy::Require);
    let placed = fit(&[host], &guest(vec![cell]), None, Order::Spread).unwrap();
    let pins: CpuSet = placed[0].pinning.pins.cpus().collect();
    assert_eq!(pins, cpus("1-2,5-6"), "two and two, not three and one");
}

#[test]
fn a_shortfall_names_the_nearest_cell_and_both_amounts() {
    let mut hosts = vec![smt_cell(3, "0-3"), smt_cell(9, "4-7")];
    hosts[0].pinned_cpus = cpus("0-2");
    hosts[1].page_pools[0].used = 1 << 20;
    let error = fit(&hosts, &guest(vec![pinned_cell("0-1", 64)]), None, Order::Spread).unwrap_err();
    assert_eq!(error.shortfall.rule, Rule::CpuDedicatedFree, "it got further on cell 3 than on cell 9");
    assert_eq!((error.shortfall.need, error.shortfall.have), (Quantity::Cpus(2), Quantity::Cpus(1)));
    assert_eq!(error.cells.map(|pair| (pair.guest, pair.host)), Some((0, 3)));
}

#[test]
fn absurd_cells_are_no_fit_and_no_panic() {
    let mut wide = smt_cell(0, "0-3");
    wide.shared_cpus_used = u32::MAX;
    wide.memory_used_mib = u64::MAX;
    wide.page_pools = vec![
        PagePool { size_kib: 0, total: u64::MAX, used: 0, reserved: 0 },
        PagePool { size_kib: u64::MAX, total: u64::MAX, used: u64::MAX, reserved: u64::MAX },
    ];
    for page_size in [None, Some(PageSize::Any), Some(PageSize::Kib(0)), Some(PageSize::Large)] {
        let mut cell = pinned_cell("0", u64::MAX);
        cell.page_size = page_size;
        let wanted = Guest {
            emulator_policy: Some(EmulatorPolicy::Isolate),
            isolated_emulator_cpus: u32::MAX,
            ..guest(vec![cell])
        };
        let limits = Limits { cpu_ratio: f64::NAN, memory_ratio: f64::INFINITY };
        assert!(fit(&[wide.clone()], &wanted, Some(&limits), Order::Pack).is_err());
    }
    assert!(fit(&[], &guest(vec![]), None, Order::Spread).unwrap().is_empty());
}

#[test]
fn usage_that_does_not_match_changes_nothing() {
    let hosts = vec![smt_cell(0, "0-3")];
    let pin = |text: &str| CellUsage {
        host_cell: 0,
        shared_vcpus: 0,
        memory_mib: 64,
        page_size_kib: None,
        pinned: cpus(text),
        emulator_cpus: CpuSet::new(),
        cpu_policy: Some(CpuPolicy::Dedicated),
        thread_policy: Some(ThreadPolicy::Isolate),
    };
    let after = apply(&hosts, &[pin("0")]).unwrap();
    assert_eq!(after[0].pinned_cpus, cpus("0-1"), "isolate takes the core whole");
    assert!(apply(&after, &[pin("2"), pin("1")]).is_err(), "in use");
    assert!(release(&after, &[pin("0"), pin("2")]).is_err(), "not in use");
    assert_eq!(release(&after, &[pin("0")]).unwrap(), hosts);
}
