//! The hosts in order of preference, and the first of them that fits.

use std::cell::Cell;

use godwit_protocol::id::{HostId, InstanceId};
use godwit_protocol::reservation::{Reservation, ReservedCell};

use super::explain::{HostRefusal, Quantity, Refusal, Rule, Shortfall};
use super::fit::{self, Limits, Order, PlacedCell};
use super::guest::Guest;
use super::host_view::{HostState, HostView, Share};
use super::request::Request;
use super::roster::Roster;
use super::terms::Terms;

const BYTES_PER_MIB: u64 = 1 << 20;

/// Where an instance goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placement {
    /// The host.
    pub host: HostId,
    /// Its name.
    pub host_name: String,
    /// Where each guest cell goes, in the guest's order; empty for an instance that floats.
    pub cells: Vec<PlacedCell>,
    /// vCPUs in all.
    pub vcpus: u32,
    /// Memory in MiB in all.
    pub memory_mib: u64,
}

impl Placement {
    /// What the host is asked to hold for the instance.
    pub fn reservation(&self, instance: InstanceId) -> Reservation {
        let cells = self.cells.iter().map(|cell| ReservedCell {
            guest: cell.guest,
            host: cell.host,
            shared_vcpus: cell.shared_vcpus.iter().collect(),
            pinning: cell.pinning.pins.iter().collect(),
            memory_bytes: cell.memory_mib.saturating_mul(BYTES_PER_MIB),
            page_size_kib: cell.page_size_kib,
        });
        Reservation {
            instance,
            vcpus: self.vcpus,
            memory_bytes: self.memory_mib.saturating_mul(BYTES_PER_MIB),
            cells: cells.collect(),
            emulator_cpus: self.cells.iter().flat_map(|cell| cell.pinning.emulator_cpus.iter()).collect(),
            idle_cpus: self.cells.iter().flat_map(|cell| cell.pinning.idle_cpus.iter()).collect(),
        }
    }
}

/// What decides between hosts, and what else they must meet.
#[derive(Debug, Clone, Default)]
pub struct Choice {
    /// Overcommit.
    pub limits: Limits,
    /// Spread or pack, hosts and cells alike.
    pub order: Order,
    /// Where ties begin; 0 is the first by name.
    pub seed: u64,
    /// What is wanted beside room.
    pub terms: Terms,
}

/// The best host of a roster for a request and the exact place on it, if any takes it. `allowed` tells what only the
/// caller and the clock know of a host.
///
/// With [`Order::Spread`] the host with the most free memory comes first, then the one with the most free CPUs; ties
/// go by name, then by id. A soft group policy comes before both.
pub fn find(
    roster: &Roster,
    request: &Request,
    choice: &Choice,
    allowed: impl Fn(&HostView) -> bool,
) -> Option<Placement> {
    find_within(roster, request, choice, allowed, &Cell::new(usize::MAX))
}

/// As [`find`], with so many looks at hosts at most; those that were made are taken off.
pub(super) fn find_within(
    roster: &Roster,
    request: &Request,
    choice: &Choice,
    allowed: impl Fn(&HostView) -> bool,
    looks: &Cell<usize>,
) -> Option<Placement> {
    let terms = &choice.terms;
    let look = |host: &HostView| {
        looks.set(looks.get().saturating_sub(1));
        place_on(host, request, choice).ok()
    };
    let among = |hosts: &mut dyn Iterator<Item = HostId>| {
        let views = hosts.filter_map(|host| roster.view(host)).filter(|host| allowed(host));
        let ranked = ranked(views, request, choice);
        ranked.into_iter().take_while(|_| looks.get() > 0).find_map(look)
    };
    if let Some(hosts) = terms.only() {
        return among(&mut hosts.into_iter());
    }
    // Hosts without members are all in one round; those with members are few, and looked at one by one.
    let others = terms.round(HostId(uuid::Uuid::nil()));
    terms.rounds().into_iter().find_map(|round| {
        if round == others {
            let found = roster.find(request, choice, |host| match looks.get() {
                // Ends the search with nothing.
                0 => Some(None),
                _ if terms.round(host.id) == round && allowed(host) => look(host).map(Some),
                _ => None,
            });
            return found.flatten();
        }
        among(&mut terms.member_hosts().filter(|host| terms.round(*host) == round))
    })
}

/// As [`find`], on hosts in a list; a refusal tells every host's reason.
pub fn place<'h>(
    hosts: impl IntoIterator<Item = &'h HostView>,
    request: &Request,
    choice: &Choice,
) -> Result<Placement, Refusal> {
    let mut refusals = Vec::new();
    for host in ranked(hosts, request, choice) {
        match place_on(host, request, choice) {
            Ok(placement) => return Ok(placement),
            Err(refusal) => refusals.push(refusal),
        }
    }
    refusals.sort_by(|a, b| (&a.name, a.host).cmp(&(&b.name, b.host)));
    Err(Refusal { hosts: refusals, change: None })
}

/// Every host with its answer, the preferred first: for explanations.
pub fn candidates<'h>(
    hosts: impl IntoIterator<Item = &'h HostView>,
    request: &Request,
    choice: &Choice,
) -> Vec<Result<Placement, HostRefusal>> {
    ranked(hosts, request, choice).into_iter().map(|host| place_on(host, request, choice)).collect()
}

fn ranked<'h>(
    hosts: impl IntoIterator<Item = &'h HostView>,
    request: &Request,
    choice: &Choice,
) -> Vec<&'h HostView> {
    let pinned = request.pins();
    let mut ranked: Vec<_> = hosts
        .into_iter()
        .map(|host| {
            let rank = rank(host, pinned);
            let rank = if choice.order == Order::Spread { !rank } else { rank };
            ((choice.terms.round(host.id), rank), host)
        })
        .collect();
    ranked.sort_unstable_by(|(a_rank, a), (b_rank, b)| {
        a_rank.cmp(b_rank).then_with(|| (&a.name, a.id).cmp(&(&b.name, b.id)))
    });
    ranked.into_iter().map(|(_, host)| host).collect()
}

/// The more room, the larger: free memory first, then free CPUs, those that float or those to pin.
pub(super) fn rank(host: &HostView, pinned: bool) -> u64 {
    const CPU_BITS: u32 = 24;
    let free = |share: Share| i128::from(share.total) - i128::from(share.used);
    // Overcommitted hosts have less than nothing free: the middle of the range is zero.
    let clip = |free: i128, bits: u32| {
        let half = 1_i128 << (bits - 1);
        (free.clamp(-half, half - 1) + half) as u64
    };
    let cpus = match pinned {
        true => host.cells.iter().map(|cell| i128::from(cell.free_cpu_count())).sum(),
        false => free(host.vcpus()),
    };
    clip(free(host.memory()), u64::BITS - CPU_BITS) << CPU_BITS | clip(cpus, CPU_BITS)
}

/// Places a request on one host, or says why not.
pub fn place_on(host: &HostView, request: &Request, choice: &Choice) -> Result<Placement, HostRefusal> {
    let refuse = |shortfall, cells| HostRefusal { host: host.id, name: host.name.clone(), shortfall, cells };
    check_host(host, request, &choice.terms).map_err(|shortfall| refuse(shortfall, None))?;
    let limits = &choice.limits;
    let cells = match &request.guest {
        Some(guest) => fit::fit(&host.cells, guest, Some(limits), choice.order)
            .map_err(|error| refuse(error.shortfall, error.cells))?,
        None => Vec::new(),
    };
    check_whole(host, request, &cells, limits).map_err(|shortfall| refuse(shortfall, None))?;
    Ok(Placement {
        host: host.id,
        host_name: host.name.clone(),
        cells,
        vcpus: request.vcpus,
        memory_mib: request.memory_mib,
    })
}

fn check_host(host: &HostView, request: &Request, terms: &Terms) -> Result<(), Shortfall> {
    let state = |rule| Err(Shortfall::new(rule, Quantity::State(HostState::Up), Quantity::State(host.state)));
    match host.state {
        HostState::Up => {}
        HostState::Late => return state(Rule::HostLate),
        HostState::Lost => return state(Rule::HostLost),
        HostState::Disabled => return state(Rule::HostDisabled),
        HostState::Draining => return state(Rule::HostDraining),
    }
    terms.check(host)?;
    let need = Quantity::DiskBytes(request.disk_bytes);
    match host.disk_free_bytes {
        None => Err(Shortfall::new(Rule::PoolReachable, need, Quantity::DiskBytes(0))),
        Some(free) if free < request.disk_bytes => {
            Err(Shortfall::new(Rule::DiskFree, need, Quantity::DiskBytes(free)))
        }
        Some(_) => Ok(()),
    }
}

/// Checks the host as a whole. Cells do not know what floats over them, so this holds for every instance.
fn check_whole(
    host: &HostView,
    request: &Request,
    cells: &[PlacedCell],
    limits: &Limits,
) -> Result<(), Shortfall> {
    let (vcpus, memory_mib) = match &request.guest {
        Some(guest) => whole_needs(host, guest, cells),
        None => (u64::from(request.vcpus), request.memory_mib),
    };
    let share = host.vcpus();
    if vcpus > share.total {
        return Err(Shortfall::new(Rule::VcpusTotal, Quantity::Vcpus(vcpus), Quantity::Cpus(share.total)));
    }
    let capacity = Limits::capacity(share.total, limits.cpu_ratio);
    if vcpus > 0 && share.used.saturating_add(vcpus) > capacity {
        let have = Quantity::Vcpus(capacity.saturating_sub(share.used));
        return Err(Shortfall::new(Rule::VcpusFree, Quantity::Vcpus(vcpus), have));
    }
    let (share, need) = (host.memory(), Quantity::MemoryMib(memory_mib));
    if memory_mib > share.total {
        return Err(Shortfall::new(Rule::MemoryTotal, need, Quantity::MemoryMib(share.total)));
    }
    let capacity = Limits::capacity(share.total, limits.memory_ratio);
    if memory_mib > 0 && share.used.saturating_add(memory_mib) > capacity {
        let have = Quantity::MemoryMib(capacity.saturating_sub(share.used));
        return Err(Shortfall::new(Rule::MemoryFree, need, have));
    }
    Ok(())
}

/// Floating vCPUs, and memory in MiB on pages of the smallest size, that a guest with cells takes of the whole host.
fn whole_needs(host: &HostView, guest: &Guest, cells: &[PlacedCell]) -> (u64, u64) {
    let vcpus = guest.cells.iter().map(|cell| u64::from(cell.shared.len())).sum();
    let on_smallest = |placed: &&PlacedCell| {
        let Some(size_kib) = placed.page_size_kib else { return true };
        let cell = host.cells.iter().find(|cell| cell.id == placed.host);
        cell.and_then(|cell| cell.smallest_pool()).is_some_and(|pool| pool.size_kib == size_kib)
    };
    let memory =
        cells.iter().filter(on_smallest).fold(0_u64, |sum, cell| sum.saturating_add(cell.memory_mib));
    (vcpus, memory)
}
