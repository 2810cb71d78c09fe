//! Of several right answers, which one is taken.

use super::{cpus, guest, pinned_cell, smt_cell};
use crate::placement::cell::{Cell, PagePool};
use crate::placement::cpu_set::CpuSet;
use crate::placement::explain::Rule;
use crate::placement::fit::{Order, PlacedCell, fit};
use crate::placement::guest::{CpuPolicy, Guest, GuestCell, PageSize, ThreadPolicy};

/// Cells of four CPUs each, `distance(a, b)` apart.
fn host(cells: u32, distance: impl Fn(u32, u32) -> u32) -> Vec<Cell> {
    let mut host: Vec<Cell> =
        (0..cells).map(|id| smt_cell(id, &format!("{}-{}", 4 * id, 4 * id + 3))).collect();
    for cell in &mut host {
        let to = |other: u32| (other, if other == cell.id { 10 } else { distance(cell.id, other) });
        cell.distances = (0..cells).map(to).collect();
    }
    host
}

fn cells_of(placed: &[PlacedCell]) -> Vec<u32> {
    let mut cells: Vec<u32> = placed.iter().map(|cell| cell.host).collect();
    cells.sort_unstable();
    cells
}

fn take(host: &[Cell], guest: &Guest) -> Vec<PlacedCell> {
    fit(host, guest, None, Order::Spread).unwrap()
}

#[test]
fn cells_of_one_guest_lie_near_one_another() {
    // Two packages of four cells: near inside, far across.
    let mut host = host(8, |a, b| if a / 4 == b / 4 { 12 } else { 32 });
    for (cell, pinned) in [(0, "0-2"), (1, "4-7"), (2, "8-11")] {
        host[cell].pinned_cpus = cpus(pinned);
    }
    let two = guest(vec![pinned_cell("0-1", 64), pinned_cell("2-3", 64)]);
    // By memory alone it would be the lonely cell of the first package, and one of the second.
    host[3].memory_mib = 1 << 20;
    assert_eq!(cells_of(&take(&host, &two)), [4, 5]);
    for (cell, pinned) in [(5, "20-23"), (6, "24-27"), (7, "28-31")] {
        host[cell].pinned_cpus = cpus(pinned);
    }
    assert_eq!(cells_of(&take(&host, &two)), [3, 4], "where it cannot be helped, it fits nevertheless");
    host[0].pinned_cpus = cpus("0-1");
    assert_eq!(cells_of(&take(&host, &two)), [0, 3]);
}

#[test]
fn a_pinned_guest_lies_at_the_underlays_cell_or_near_it() {
    let mut host = host(4, |a, b| 10 + 5 * a.abs_diff(b));
    host[2].has_underlay = true;
    host[2].memory_used_mib = 512;
    let one = guest(vec![pinned_cell("0-1", 64)]);
    assert_eq!(cells_of(&take(&host, &one)), [2]);
    host[2].pinned_cpus = cpus("8-10");
    assert_eq!(cells_of(&take(&host, &one)), [1], "of equally near ones, the first");
}

#[test]
fn floating_vcpus_go_where_fewest_share_the_cpus() {
    let mut host = host(2, |_, _| 21);
    for cell in &mut host {
        cell.shared_cpus = std::mem::take(&mut cell.dedicated_cpus);
    }
    host[0].has_underlay = true;
    host[0].shared_cpus_used = 1;
    let cell = GuestCell {
        shared: cpus("0-1"),
        dedicated: CpuSet::new(),
        cpu_policy: Some(CpuPolicy::Shared),
        ..pinned_cell("0", 64)
    };
    assert_eq!(cells_of(&take(&host, &guest(vec![cell.clone()]))), [1]);
    host[1].shared_cpus_used = 1;
    assert_eq!(cells_of(&take(&host, &guest(vec![cell]))), [0]);
}

#[test]
fn a_cell_with_a_lone_thread_takes_the_odd_vcpu() {
    let mut host = host(3, |_, _| 21);
    host[1].pinned_cpus = cpus("4");
    let odd = guest(vec![pinned_cell("0-2", 64)]);
    assert_eq!(cells_of(&take(&host, &odd)), [1], "elsewhere a whole core would be broken");
}

#[test]
fn huge_pages_come_from_the_cell_that_has_fewest_left_over() {
    let mut host = host(3, |_, _| 21);
    for (cell, total) in host.iter_mut().zip([512, 40, 256]) {
        cell.page_pools.push(PagePool { size_kib: 2048, total, used: 0, reserved: 0 });
    }
    let cell = GuestCell { page_size: Some(PageSize::Large), ..pinned_cell("0-1", 64) };
    assert_eq!(cells_of(&take(&host, &guest(vec![cell]))), [1]);
}

#[test]
fn vcpus_share_one_cache_where_one_has_room() {
    let mut cell = smt_cell(0, "0-15");
    cell.caches = [cpus("0-7"), cpus("8-15")].into();
    cell.pinned_cpus = cpus("0-1");
    let pins = |cell: &Cell, vcpus: &str, policy| {
        let wanted = GuestCell { thread_policy: policy, ..pinned_cell(vcpus, 64) };
        let placed = take(std::slice::from_ref(cell), &guest(vec![wanted]));
        placed[0].pinning.pins.cpus().collect::<CpuSet>().to_string()
    };
    assert_eq!(pins(&cell, "0-5", None), "2-7", "the cache with the least room that is enough");
    assert_eq!(pins(&cell, "0-7", None), "8-15", "a whole cache, not two halves");
    assert_eq!(pins(&cell, "0-7", Some(ThreadPolicy::Require)), "8-15");
    assert_eq!(pins(&cell, "0-9", None), "2-3,8-15", "the freest cache whole, and the rest");
    cell.shared_cpus = cell.dedicated_cpus.clone();
    assert_eq!(pins(&cell, "0-3", Some(ThreadPolicy::Isolate)), "8,10,12,14");
}

#[test]
fn memory_without_cpus_is_no_place_for_vcpus() {
    let mut host = host(2, |_, _| 21);
    let far = Cell { id: 7, memory_mib: 1 << 20, page_pools: host[0].page_pools.clone(), ..Cell::default() };
    host.push(far);
    let error = fit(&host[2..], &guest(vec![pinned_cell("0", 64)]), None, Order::Spread).unwrap_err();
    assert_eq!(error.shortfall.rule, Rule::CellCpus);
    assert_eq!(cells_of(&take(&host, &guest(vec![pinned_cell("0", 64); 2]))), [0, 1]);
    // Asked for in so many words, as a guest cell without vCPUs, it is taken.
    let bare = GuestCell { cpu_policy: Some(CpuPolicy::Shared), ..pinned_cell("", 4096) };
    host[0].memory_mib = 0;
    host[0].page_pools.clear();
    host[1].page_pools[0].total = 1;
    assert_eq!(cells_of(&take(&host, &guest(vec![bare]))), [7]);
    let error = fit(&host[..1], &guest(vec![pinned_cell("0", 64)]), None, Order::Spread).unwrap_err();
    assert_eq!(error.shortfall.rule, Rule::CellMemoryFree, "a cell without memory holds no guest");
}

#[test]
fn the_worst_case_of_sixteen_cells_is_answered_at_once() {
    let mut host = host(16, |a, b| if a / 4 == b / 4 { 12 } else { 20 + a.abs_diff(b) });
    for cell in &mut host[7..] {
        cell.pinned_cpus = (4 * cell.id..4 * cell.id + 3).collect();
    }
    let wanted = guest(vec![pinned_cell("0-1", 64); 8]);
    let error = fit(&host, &wanted, None, Order::Spread).unwrap_err();
    assert_eq!(error.shortfall.rule, Rule::CellMatching);
    host[15].pinned_cpus = CpuSet::new();
    assert_eq!(cells_of(&take(&host, &wanted)), [0, 1, 2, 3, 4, 5, 6, 15]);
}
