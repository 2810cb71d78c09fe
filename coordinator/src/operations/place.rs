//! From the fleet to placement's view of it: which host takes an instance, given all that is held and on its way.

use crate::config::Config;
use crate::error::Error;
use crate::fleet::instance::{Instance, InstanceStatus, NicRequest};
use crate::fleet::network::Segment;
use crate::fleet::{Fleet, Time};
use crate::ledger::{Ledger, now};
use crate::liveness::Liveness;
use crate::operations::StepError;
use crate::placement::search::place_on;
use crate::placement::suggest::{self, Change, Movable};
use crate::placement::{
    Choice, GroupTerms, HostRefusal, HostState, HostView, Limits, Processor, Refusal, Request, Terms, find,
    place,
};
use crate::reconcile;
use godwit_protocol::id::{HostId, InstanceId, NetworkId, ServerGroupId};
use godwit_protocol::reservation::Reservation;
use std::borrow::Cow;
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

/// What is to be placed, and where not.
pub struct Wish<'a> {
    instance: &'a Instance,
    only: Option<HostId>,
    not: &'a [HostId],
    /// Where it runs while it is placed: a running guest finds the same processor again.
    runs_on: Option<HostId>,
    /// It has a place and looks for another.
    moves: bool,
}

impl<'a> Wish<'a> {
    /// An instance, on `only` when the user named it, and on none of `not`.
    pub fn of(instance: &'a Instance, only: Option<HostId>, not: &'a [HostId]) -> Self {
        Self { instance, only, not, runs_on: None, moves: false }
    }

    /// The same for an instance that runs on a host and moves without a stop.
    #[must_use]
    pub fn running_on(self, host: HostId) -> Self {
        Self { runs_on: Some(host), moves: true, ..self }
    }

    /// The same for an instance that moves switched off.
    #[must_use]
    pub fn moving(self) -> Self {
        Self { moves: true, ..self }
    }

    /// Whether a host may be looked at. A guest that runs takes no disk to another pool.
    fn allows(&self, fleet: &Fleet, host: HostId) -> bool {
        self.only.is_none_or(|only| only == host)
            && !self.not.contains(&host)
            && !self.runs_on.is_some_and(|source| fleet.are_apart(source, host))
    }
}

/// The host that takes the instance, and exactly what it holds there. It costs little whatever the answer, so that it may
/// be asked under the ledger's lock; [`why_not`] then says why there is none.
///
/// # Errors
/// [`StepError::NoRoom`] when no host takes it; what its flavor and image say breaks a rule.
pub fn choose(fleet: &Fleet, config: &Config, wish: &Wish<'_>) -> Result<(HostId, Reservation), StepError> {
    let request = request(wish.instance)?;
    let choice = Choice { terms: terms(fleet, wish), ..choice(config) };
    let allowed = |host: HostId| wish.allows(fleet, host) && is_up(fleet, config, host);
    let found = match wish.only.and_then(|host| fleet.roster().view(host)) {
        // Named by the user: nobody else is looked at.
        Some(host) if allowed(host.id) => place([host], &request, &choice).ok(),
        Some(_) => None,
        None => find(fleet.roster(), &request, &choice, |host| allowed(host.id)),
    };
    match found {
        Some(placement) => Ok((placement.host, placement.reservation(wish.instance.id))),
        None => Err(StepError::NoRoom(Box::new(Sought {
            instance: wish.instance.clone(),
            only: wish.only,
            not: wish.not.to_vec(),
            runs_on: wish.runs_on,
            moves: wish.moves,
        }))),
    }
}

/// What found no place.
#[derive(Clone, Debug)]
pub struct Sought {
    instance: Instance,
    only: Option<HostId>,
    not: Vec<HostId>,
    runs_on: Option<HostId>,
    moves: bool,
}

impl Sought {
    fn wish(&self) -> Wish<'_> {
        Wish {
            instance: &self.instance,
            only: self.only,
            not: &self.not,
            runs_on: self.runs_on,
            moves: self.moves,
        }
    }
}

/// Hosts that are looked at without letting others have the ledger: well under a millisecond.
const AT_ONCE: usize = 128;

/// Every host's reason why it does not take what found no place, and the smallest change that would make room; none: a
/// host takes it by now. The ledger is held for a few hosts at a time, for a large fleet takes tens of milliseconds.
///
/// # Errors
/// What its flavor and image say breaks a rule.
pub async fn why_not(ledger: &Ledger, config: &Config, sought: &Sought) -> Result<Option<Refusal>, Error> {
    let wish = sought.wish();
    let request = request(wish.instance)?;
    let choice = |fleet: &Fleet| Choice { terms: terms(fleet, &wish), ..choice(config) };
    let hosts: Vec<HostId> = ledger.read(|fleet| {
        fleet.roster().views().map(|host| host.id).filter(|host| wish.allows(fleet, *host)).collect()
    });
    let mut refusals = Vec::with_capacity(hosts.len());
    for hosts in hosts.chunks(AT_ONCE) {
        let looked_at: Result<Vec<HostRefusal>, HostId> = ledger.read(|fleet| {
            let (choice, at) = (choice(fleet), now());
            let views = hosts.iter().filter_map(|host| fleet.roster().view(*host));
            let look = |view| match place_on(&with_state(fleet, config, view, at), &request, &choice) {
                Ok(placement) => Err(placement.host),
                Err(refusal) => Ok(refusal),
            };
            views.map(look).collect()
        });
        match looked_at {
            Ok(looked_at) => refusals.extend(looked_at),
            Err(_) => return Ok(None),
        }
        tokio::task::yield_now().await;
    }
    // Only the nearest misses are searched for an instance to move.
    let mut nearest: Vec<_> = refusals.iter().map(|host| (Reverse(host.shortfall.rule), host.host)).collect();
    nearest.sort_unstable();
    let among = nearest.into_iter().take(NEAREST).map(|(_, host)| host);
    let change = ledger.read(|fleet| {
        let choice = choice(fleet);
        let allowed = |host: &HostView| wish.allows(fleet, host.id);
        let changes = changes(fleet, config, &request, &choice, among, allowed, LOOKS);
        changes.first().map(ToString::to_string)
    });
    Ok(Some(Refusal { hosts: refusals, change }))
}

/// Looks at hosts that the search for what would help may make in one go: about two milliseconds.
const LOOKS: usize = 1000;

/// Hosts that are searched for an instance to move, when somebody waits for the answer.
const NEAREST: usize = 32;

/// Changes after which a request would fit, the smallest first. An instance to move is looked for on the hosts `among`;
/// all searches together look `looks` times at a host at most.
pub fn changes(
    fleet: &Fleet,
    config: &Config,
    request: &Request,
    choice: &Choice,
    among: impl IntoIterator<Item = HostId>,
    allowed: impl Fn(&HostView) -> bool,
    looks: usize,
) -> Vec<Change> {
    let idle = |instance: &&Instance| {
        instance.status != InstanceStatus::Resized && fleet.running_operation(instance.id).is_none()
    };
    let on = |host| {
        fleet.instances_on(host).map(move |(instance, reservation)| Movable {
            instance: instance.id,
            host,
            reservation,
        })
    };
    let movable: Vec<Movable<'_>> = among.into_iter().flat_map(on).collect();
    let usable = |host: &HostView| allowed(host) && is_up(fleet, config, host.id);
    suggest::changes(fleet.roster(), request, choice, usable, movable, looks, |id| {
        let instance = fleet.instances.get(&id).filter(idle)?;
        let wish = Wish::of(instance, None, &[]).running_on(instance.host?);
        let its = Choice { terms: terms(fleet, &wish), ..self::choice(config) };
        Some((instance.name.clone(), self::request(instance).ok()?, its))
    })
}

/// What an instance needs.
///
/// # Errors
/// What its flavor and image say breaks a rule, which newer versions may know.
pub fn request(instance: &Instance) -> Result<Request, Error> {
    let flavor = &instance.flavor;
    let request =
        Request::accepted(flavor.vcpus, flavor.memory_mib, &flavor.extra_specs, &instance.image_properties)
            .map_err(|e| Error::Invalid(e.to_string()))?;
    Ok(Request { disk_bytes: instance.disk_bytes, ..request })
}

fn terms(fleet: &Fleet, wish: &Wish<'_>) -> Terms {
    let instance = wish.instance;
    let hosts = |ids: &[InstanceId]| -> BTreeSet<HostId> {
        ids.iter().filter_map(|id| fleet.instances.get(id)?.host).collect()
    };
    let hints = &instance.hints;
    // What it must be beside, it was put beside; when it moves on, that is no reason to stay.
    let beside = (!wish.moves && !hints.same_host.is_empty()).then(|| hosts(&hints.same_host));
    let networks = instance.nics.iter().filter_map(|nic| match nic {
        NicRequest::Network(network, _) => Some(*network),
        NicRequest::Port(port) => fleet.ports.get(port).map(|port| port.network),
    });
    let networks: Vec<NetworkId> = networks.collect();
    Terms {
        zone: instance.wanted_zone.clone(),
        project: instance.project.to_string(),
        group: hints.group.and_then(|group| group_terms(fleet, group, instance.id)),
        beside,
        apart: hosts(&hints.different_host),
        overlay_mtu: overlay_mtu(fleet, networks.iter().copied()),
        physical_networks: physical_networks(fleet, networks),
        processor: wish.runs_on.and_then(|host| processor(fleet, host)),
        ..Terms::of_specs(&instance.flavor.extra_specs)
    }
}

/// The largest MTU of those of some networks that are overlays.
pub fn overlay_mtu(fleet: &Fleet, networks: impl IntoIterator<Item = NetworkId>) -> Option<u32> {
    let networks = networks.into_iter().filter_map(|network| fleet.networks.get(&network));
    networks.filter(|network| network.segment == Segment::Vxlan).map(|network| network.mtu).max()
}

/// The physical networks that carry some networks, with the largest MTU of these on each.
pub fn physical_networks(
    fleet: &Fleet,
    networks: impl IntoIterator<Item = NetworkId>,
) -> BTreeMap<String, u32> {
    let mut carrying = BTreeMap::new();
    for network in networks.into_iter().filter_map(|network| fleet.networks.get(&network)) {
        if let Some(physical) = network.segment.physical() {
            let mtu = carrying.entry(physical.to_owned()).or_insert(network.mtu);
            *mtu = network.mtu.max(*mtu);
        }
    }
    carrying
}

/// Where the other members of a group are, those on their way included.
pub fn group_terms(fleet: &Fleet, group: ServerGroupId, except: InstanceId) -> Option<GroupTerms> {
    let group = fleet.server_groups.get(&group)?;
    let mut members: BTreeMap<HostId, u32> = BTreeMap::new();
    for id in group.members.iter().filter(|id| **id != except) {
        let target = fleet.running_migration(*id).and_then(|migration| migration.target);
        let host = fleet.instances.get(id).and_then(|instance| instance.host);
        for host in host.into_iter().chain(target).collect::<BTreeSet<_>>() {
            *members.entry(host).or_default() += 1;
        }
    }
    Some(GroupTerms { policy: group.policy, max_per_host: group.max_per_host.unwrap_or(1), members })
}

fn processor(fleet: &Fleet, host: HostId) -> Option<Processor> {
    let inventory = fleet.hosts.get(&host)?.inventory.as_ref()?;
    let model = inventory.hypervisor.kvm.then(|| inventory.cpu_model.clone());
    Some(Processor { architecture: inventory.architecture.clone(), model })
}

/// How the site wants hosts to be chosen.
pub fn choice(config: &Config) -> Choice {
    Choice {
        limits: limits(config),
        order: config.placement.order,
        seed: config.placement.seed,
        terms: Terms::default(),
    }
}

/// The ratios that the site allows.
pub fn limits(config: &Config) -> Limits {
    Limits { cpu_ratio: config.overcommit.cpu, memory_ratio: config.overcommit.memory }
}

fn is_up(fleet: &Fleet, config: &Config, host: HostId) -> bool {
    reconcile::liveness(fleet, host, config.heartbeat_ms, now()) == Liveness::Up
}

/// Every host that ever reported, with all that instances and migrations hold on it, and how alive it is.
pub fn views(fleet: &Fleet, config: &Config) -> Vec<HostView> {
    let at = now();
    fleet.roster().views().map(|host| with_state(fleet, config, host, at).into_owned()).collect()
}

fn with_state<'h>(fleet: &Fleet, config: &Config, host: &'h HostView, at: Time) -> Cow<'h, HostView> {
    // What people said goes first, as in the order of the rules.
    if host.state != HostState::Up {
        return Cow::Borrowed(host);
    }
    let state = match reconcile::liveness(fleet, host.id, config.heartbeat_ms, at) {
        Liveness::Up => return Cow::Borrowed(host),
        Liveness::Late => HostState::Late,
        Liveness::Lost => HostState::Lost,
    };
    Cow::Owned(HostView { state, ..host.clone() })
}
