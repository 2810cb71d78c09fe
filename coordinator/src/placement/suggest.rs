//! What would make a request fit that does not: other pages, policies or cells for it, or one instance less somewhere.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use godwit_protocol::id::{HostId, InstanceId};
use godwit_protocol::reservation::Reservation;

use super::cpu_set::CpuSet;
use super::explain::Rule;
use super::guest::{CpuPolicy, EmulatorPolicy, Guest, GuestCell, PageSize, ThreadPolicy};
use super::host_view::{HostState, HostView};
use super::request::Request;
use super::roster::Roster;
use super::search::{Choice, find_within, place_on};

/// Instances that are tried out as the one to move, at most.
const TRIALS: usize = 20_000;

/// A change after which the request would fit. In the order of their size.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// Other pages.
    PageSize(Option<PageSize>, String),
    /// The thread policy prefer.
    PreferThreads(ThreadPolicy, String),
    /// Emulator threads on the shared CPUs.
    SharedEmulator(String),
    /// Another number of guest cells.
    Cells(usize, String),
    /// One instance moved out of the way, live or not.
    Move {
        /// Which.
        instance: InstanceId,
        /// Its name.
        name: String,
        /// Its memory in MiB.
        memory_mib: u64,
        /// From where, to make room there.
        source: String,
        /// A host that takes it.
        target: String,
    },
    /// A host that takes no instances, enabled.
    Enable(String),
    /// Another zone, or none.
    Zone(String, String),
    /// Floating vCPUs.
    SharedCpus(String),
}

impl Change {
    /// Its kind's stable name.
    pub fn name(&self) -> &'static str {
        match self {
            Self::PageSize(..) => "page_size",
            Self::PreferThreads(..) => "thread_policy",
            Self::SharedEmulator(_) => "emulator_policy",
            Self::Cells(..) => "cells",
            Self::Move { .. } => "move",
            Self::Enable(_) => "enable_host",
            Self::Zone(..) => "availability_zone",
            Self::SharedCpus(_) => "cpu_policy",
        }
    }
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PageSize(None, host) => write!(f, "no page size were asked for (on {host})"),
            Self::PageSize(Some(PageSize::Kib(kib)), host) => {
                write!(f, "hw:mem_page_size were {kib} (on {host})")
            }
            Self::PageSize(Some(_), host) => write!(f, "hw:mem_page_size were any (on {host})"),
            Self::PreferThreads(was, host) => {
                write!(f, "hw:cpu_thread_policy were prefer, not {} (on {host})", was.name())
            }
            Self::SharedEmulator(host) => {
                write!(f, "hw:emulator_threads_policy were share, not isolate (on {host})")
            }
            Self::Cells(count, host) => write!(f, "hw:numa_nodes were {count} (on {host})"),
            Self::Move { instance, name, memory_mib, source, target } => {
                write!(f, "instance {name} ({instance}, {memory_mib} MiB) moved from {source} to {target}")
            }
            Self::Enable(host) => write!(f, "host {host} took instances again"),
            Self::Zone(zone, host) => write!(f, "it might be in the zone {zone} (on {host})"),
            Self::SharedCpus(host) => write!(f, "hw:cpu_policy were shared (on {host})"),
        }
    }
}

/// An instance that could be moved.
#[derive(Debug, Clone)]
pub struct Movable<'a> {
    /// Which.
    pub instance: InstanceId,
    /// Where it is.
    pub host: HostId,
    /// What it holds there.
    pub reservation: &'a Reservation,
}

/// Finds changes after which a request would fit that now does not, the smallest first: one of each kind at most.
///
/// `allowed` says which hosts may be used at all; `looks` is how many looks at hosts all searches together may make, so
/// that what would help may stay unfound in a large fleet. `of` tells an instance's name, needs and terms when it comes to that.
pub fn changes(
    roster: &Roster,
    request: &Request,
    choice: &Choice,
    allowed: impl Fn(&HostView) -> bool,
    mut movable: Vec<Movable<'_>>,
    looks: usize,
    of: impl Fn(InstanceId) -> Option<(String, Request, Choice)>,
) -> Vec<Change> {
    let looks = &Cell::new(looks);
    let find = |request: &Request, choice: &Choice| find_within(roster, request, choice, &allowed, looks);
    let fits = |request: &Request| find(request, choice).map(|placement| placement.host_name);
    let mut changes = Vec::new();
    if let Some(guest) = &request.guest {
        let with = |guest: Guest| Request { guest: Some(guest), ..request.clone() };
        changes.extend(by_guest(roster, guest, |guest| fits(&with(guest))));
    }
    movable.sort_by_key(|movable| (movable.reservation.memory_bytes, movable.instance));
    changes.extend(by_move(roster, request, choice, &allowed, &movable, looks, of));
    let enabled = roster.views().filter(|host| host.state == HostState::Disabled && allowed(host));
    let mut enabled = enabled.take(looks.get()).map(|host| HostView { state: HostState::Up, ..host.clone() });
    changes.extend(
        enabled.find(|host| place_on(host, request, choice).is_ok()).map(|host| Change::Enable(host.name)),
    );
    if choice.terms.zone.is_some() {
        let mut anywhere = choice.clone();
        anywhere.terms.zone = None;
        let placement = find(request, &anywhere);
        let host = placement.and_then(|placement| roster.view(placement.host));
        changes.extend(host.map(|host| Change::Zone(host.labels.zone.clone(), host.name.clone())));
    }
    if request.pins() {
        let floating = Request { guest: request.guest.as_ref().map(floating), ..request.clone() };
        changes.extend(fits(&floating).map(Change::SharedCpus));
    }
    changes
}

/// Changes of the guest alone.
fn by_guest(roster: &Roster, guest: &Guest, fits: impl Fn(Guest) -> Option<String>) -> Vec<Change> {
    let mut changes = Vec::new();
    let each = |change: &dyn Fn(&mut GuestCell)| {
        let mut changed = guest.clone();
        changed.cells.iter_mut().for_each(change);
        changed
    };
    let was = guest.cells.first().and_then(|cell| cell.page_size);
    let sizes = page_sizes(roster).into_iter().map(|kib| Some(PageSize::Kib(kib)));
    let others = sizes.rev().chain([None]).filter(|size| was.is_some() && *size != was);
    let mut by_size = others.filter_map(|size| {
        let host = fits(each(&|cell| cell.page_size = size))?;
        Some(Change::PageSize(size, host))
    });
    changes.extend(by_size.next());
    let policy = guest.cells.first().and_then(|cell| cell.thread_policy);
    if let Some(policy) = policy.filter(|policy| *policy != ThreadPolicy::Prefer) {
        let host = fits(each(&|cell| cell.thread_policy = None));
        changes.extend(host.map(|host| Change::PreferThreads(policy, host)));
    }
    if guest.emulator_policy == Some(EmulatorPolicy::Isolate) {
        let shared = Guest { emulator_policy: Some(EmulatorPolicy::Share), ..guest.clone() };
        changes.extend(fits(shared).map(Change::SharedEmulator));
    }
    let counts = [1, 2, 4, 8].into_iter().filter(|count| *count != guest.cells.len());
    let mut by_count = counts.filter_map(|count| {
        let host = fits(split(guest, count)?)?;
        Some(Change::Cells(count, host))
    });
    changes.extend(by_count.next());
    changes
}

/// The page sizes that the fleet holds.
fn page_sizes(roster: &Roster) -> BTreeSet<u64> {
    let cells = roster.kinds().flat_map(|kind| kind.iter());
    cells.flat_map(|cell| &cell.page_pools).filter(|pool| pool.total > 0).map(|pool| pool.size_kib).collect()
}

/// The same guest in another number of equal cells.
fn split(guest: &Guest, count: usize) -> Option<Guest> {
    let first = guest.cells.first()?;
    let (mut shared, mut dedicated) = (CpuSet::new(), CpuSet::new());
    for cell in &guest.cells {
        shared.extend_from(&cell.shared);
        dedicated.extend_from(&cell.dedicated);
    }
    let vcpus = u64::from(shared.len()) + u64::from(dedicated.len());
    let memory_mib = guest.cells.iter().map(|cell| cell.memory_mib).fold(0, u64::saturating_add);
    let parts = count as u64;
    if vcpus < parts || !vcpus.is_multiple_of(parts) || !memory_mib.is_multiple_of(parts) {
        return None;
    }
    let each = (vcpus / parts) as u32;
    let cells = (0..count as u32).map(|part| {
        let its: CpuSet = (part * each..(part + 1) * each).collect();
        GuestCell {
            shared: shared.intersection(&its),
            dedicated: dedicated.intersection(&its),
            memory_mib: memory_mib / parts,
            ..first.clone()
        }
    });
    Some(Guest { cells: cells.collect(), ..guest.clone() })
}

/// The same guest with all vCPUs floating.
fn floating(guest: &Guest) -> Guest {
    let cells = guest.cells.iter().map(|cell| {
        let mut shared = cell.shared.clone();
        shared.extend_from(&cell.dedicated);
        let policies = (Some(CpuPolicy::Shared), None);
        GuestCell {
            shared,
            dedicated: CpuSet::new(),
            cpu_policy: policies.0,
            thread_policy: policies.1,
            ..cell.clone()
        }
    });
    Guest { cells: cells.collect(), emulator_policy: None, ..guest.clone() }
}

/// The smallest instance whose leaving makes room, and a host that takes it.
fn by_move(
    roster: &Roster,
    request: &Request,
    choice: &Choice,
    allowed: &impl Fn(&HostView) -> bool,
    movable: &[Movable<'_>],
    looks: &Cell<usize>,
    of: impl Fn(InstanceId) -> Option<(String, Request, Choice)>,
) -> Option<Change> {
    // Where room is not what is missing, nobody's leaving helps.
    let short_of_room = |host: &HostView| match place_on(host, request, choice) {
        Err(refusal) => refusal.shortfall.rule > Rule::DiskFree,
        Ok(_) => false,
    };
    let mut full: BTreeMap<HostId, bool> = BTreeMap::new();
    for movable in movable.iter().take(TRIALS) {
        if looks.get() == 0 {
            break;
        }
        looks.set(looks.get() - 1);
        let Some(host) = roster.view(movable.host) else { continue };
        if !*full.entry(host.id).or_insert_with(|| allowed(host) && short_of_room(host)) {
            continue;
        }
        let mut without = host.clone();
        without.take_off(movable.reservation);
        if place_on(&without, request, choice).is_err() {
            continue;
        }
        let Some((name, needs, its)) = of(movable.instance) else { continue };
        let elsewhere = |other: &HostView| other.id != movable.host && allowed(other);
        if let Some(placement) = find_within(roster, &needs, &its, elsewhere, looks) {
            return Some(Change::Move {
                instance: movable.instance,
                name,
                memory_mib: needs.memory_mib,
                source: host.name.clone(),
                target: placement.host_name,
            });
        }
    }
    None
}
