//! From the fleet to placement's view of it: which host takes an instance, given all that is held and on its way.

use crate::config::Config;
use crate::error::Error;
use crate::fleet::Fleet;
use crate::fleet::instance::Instance;
use crate::ledger::now;
use crate::liveness::Liveness;
use crate::operations::StepError;
use crate::placement::{HostState, HostView, Limits, Order, Request, place};
use crate::reconcile;
use godwit_protocol::id::HostId;
use godwit_protocol::reservation::Reservation;
use std::collections::BTreeMap;

/// What is to be placed, and where not.
pub struct Wish<'a> {
    instance: &'a Instance,
    only: Option<HostId>,
    not: &'a [HostId],
}

impl<'a> Wish<'a> {
    /// An instance, on `only` when the user named it, and on none of `not`.
    pub fn of(instance: &'a Instance, only: Option<HostId>, not: &'a [HostId]) -> Self {
        Self { instance, only, not }
    }
}

/// The host that takes the instance, and exactly what it holds there.
///
/// # Errors
/// [`StepError::NoPlace`] with every host's reason.
pub fn choose(fleet: &Fleet, config: &Config, wish: &Wish<'_>) -> Result<(HostId, Reservation), StepError> {
    let instance = wish.instance;
    let flavor = &instance.flavor;
    let request =
        Request::from_specs(flavor.vcpus, flavor.memory_mib, &flavor.extra_specs, &instance.image_properties)
            .map_err(|e| Error::Invalid(e.to_string()))?;
    let request = Request { disk_bytes: instance.disk_bytes, ..request };
    let allowed = |id: HostId| wish.only.is_none_or(|only| only == id) && !wish.not.contains(&id);
    let hosts: Vec<HostView> = views(fleet, config).into_iter().filter(|h| allowed(h.id)).collect();
    let placement = place(&hosts, &request, &limits(config), Order::Spread)?;
    Ok((placement.host, placement.reservation(instance.id)))
}

/// The ratios that the site allows.
pub fn limits(config: &Config) -> Limits {
    Limits { cpu_ratio: config.overcommit.cpu, memory_ratio: config.overcommit.memory }
}

/// Every host that ever reported, with all that instances and migrations hold on it.
pub fn views(fleet: &Fleet, config: &Config) -> Vec<HostView> {
    let mut held: BTreeMap<HostId, Vec<&Reservation>> = BTreeMap::new();
    let instances = fleet.instances.values().filter_map(|i| Some((i.host?, i.reservation.as_ref()?)));
    let running = fleet.migrations.values().filter(|m| m.status.is_running());
    let migrations = running.flat_map(|m| {
        let on_target = m.target.zip(m.reservation.as_ref());
        // After the switch-over the instance's record has moved on; the source is held until it is released.
        let on_source = m.switched_at.and(m.reservation.as_ref()).map(|r| (m.source, r));
        on_target.filter(|_| m.switched_at.is_none()).into_iter().chain(on_source)
    });
    for (host, reservation) in instances.chain(migrations) {
        held.entry(host).or_default().push(reservation);
    }
    let at = now();
    let hosts = fleet.hosts.values().filter_map(|host| {
        let inventory = host.inventory.as_ref()?;
        let state = match reconcile::liveness(fleet, host.id, config.heartbeat_ms, at) {
            Liveness::Lost => HostState::Lost,
            Liveness::Late => HostState::Late,
            Liveness::Up if !host.enabled => HostState::Disabled,
            Liveness::Up => HostState::Up,
        };
        let reservations = held.get(&host.id).into_iter().flatten().copied();
        Some(HostView::new(host.id, state, inventory, reservations))
    });
    hosts.collect()
}
