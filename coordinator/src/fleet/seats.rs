//! Keeps placement's roster of the hosts as the records are: each change counts in what it holds, at once.

use super::{Change, Fleet};
use crate::fleet::group::Aggregate;
use crate::fleet::host::Host;
use crate::fleet::instance::Instance;
use crate::fleet::migration::Migration;
use crate::placement::{HostState, HostView, Limits, Roster};
use godwit_protocol::id::{HostId, InstanceId, MigrationId};
use godwit_protocol::reservation::Reservation;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// The roster, and whose reservations it has counted in.
#[derive(Default)]
pub(crate) struct Seats {
    roster: Roster,
    holders: BTreeMap<HostId, BTreeSet<Holder>>,
}

/// Whose a reservation is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Holder {
    Instance(InstanceId),
    Migration(MigrationId),
}

/// What a change touches, found out before it is applied.
pub(super) enum Touched {
    Nothing,
    Host(HostId),
    /// Whose, where it was held before, and what.
    Held(Holder, Option<(HostId, Reservation)>),
    Labels(BTreeSet<HostId>),
}

fn held_by_instance(instance: &Instance) -> Option<(HostId, &Reservation)> {
    instance.host.zip(instance.reservation.as_ref())
}

/// What a migration holds beside the instance: on its target until the instance's record has moved there, and then on
/// its source, which for a resize is what it goes back to.
fn held_by_migration(migration: &Migration) -> Option<(HostId, &Reservation)> {
    let running = migration.status.is_running().then_some(migration)?;
    let left = running.resize.as_ref().map(|resize| &resize.old_reservation);
    match running.switched_at {
        Some(_) => Some(running.source).zip(left.or(running.reservation.as_ref())),
        None => running.target.zip(running.reservation.as_ref()),
    }
}

impl Touched {
    pub(super) fn by(change: &Change, fleet: &Fleet) -> Self {
        match change {
            Change::Host(host) => Self::Host(host.id),
            Change::Instance(new) => {
                let before = fleet.instances.get(&new.id).and_then(held_by_instance);
                Self::held(Holder::Instance(new.id), before, held_by_instance(new))
            }
            Change::Migration(new) => {
                let before = fleet.migrations.get(&new.id).and_then(held_by_migration);
                Self::held(Holder::Migration(new.id), before, held_by_migration(new))
            }
            Change::Aggregate(new) => Self::labels(fleet.aggregates.get(&new.number), Some(new)),
            Change::Gone(kind, key) => Self::by_end(kind, key, fleet),
            _ => Self::Nothing,
        }
    }

    fn by_end(kind: &str, key: &str, fleet: &Fleet) -> Self {
        use super::Record;
        let end = |holder, before| Self::held(holder, before, None);
        match kind {
            Host::KIND => key.parse().map_or(Self::Nothing, Self::Host),
            Instance::KIND => key.parse().map_or(Self::Nothing, |id| {
                end(Holder::Instance(id), fleet.instances.get(&id).and_then(held_by_instance))
            }),
            Migration::KIND => key.parse().map_or(Self::Nothing, |id| {
                end(Holder::Migration(id), fleet.migrations.get(&id).and_then(held_by_migration))
            }),
            Aggregate::KIND => key
                .parse()
                .map_or(Self::Nothing, |number: u64| Self::labels(fleet.aggregates.get(&number), None)),
            _ => Self::Nothing,
        }
    }

    fn held(
        holder: Holder,
        before: Option<(HostId, &Reservation)>,
        after: Option<(HostId, &Reservation)>,
    ) -> Self {
        if before == after {
            return Self::Nothing;
        }
        Self::Held(holder, before.map(|(host, held)| (host, held.clone())))
    }

    fn labels(before: Option<&Aggregate>, after: Option<&Aggregate>) -> Self {
        Self::Labels(
            before.into_iter().chain(after).flat_map(|aggregate| &aggregate.hosts).copied().collect(),
        )
    }
}

impl Fleet {
    /// The hosts as placement sees them, without what only the clock knows.
    pub fn roster(&self) -> &Roster {
        &self.seats.roster
    }

    /// The overcommit that the site allows.
    pub fn set_limits(&mut self, limits: Limits) {
        self.seats.roster.set_limits(limits);
    }

    /// Builds the roster from all records: after the store was read.
    pub fn seat_all(&mut self) {
        let mut holders: BTreeMap<HostId, BTreeSet<Holder>> = BTreeMap::new();
        for holder in self.instances.keys().map(|id| Holder::Instance(*id)) {
            if let Some((host, _)) = self.held(holder) {
                holders.entry(host).or_default().insert(holder);
            }
        }
        for holder in self.migrations.keys().map(|id| Holder::Migration(*id)) {
            if let Some((host, _)) = self.held(holder) {
                holders.entry(host).or_default().insert(holder);
            }
        }
        self.seats.holders = holders;
        let limits = *self.seats.roster.limits();
        let views = self.hosts.keys().filter_map(|host| Some((self.empty_view(*host)?, self.held_on(*host))));
        self.seats.roster = Roster::new(views, limits);
    }

    /// Follows a change that was applied.
    pub(super) fn settle(&mut self, touched: Touched) {
        match touched {
            Touched::Nothing => {}
            Touched::Host(host) => match self.empty_view(host) {
                Some(view) => {
                    let mut roster = std::mem::take(&mut self.seats.roster);
                    roster.put(view, self.held_on(host));
                    self.seats.roster = roster;
                }
                None => self.seats.roster.remove(host),
            },
            Touched::Held(holder, before) => self.settle_holder(holder, before),
            Touched::Labels(hosts) => {
                for host in hosts {
                    let labels = Arc::new(self.labels_of(host));
                    self.seats.roster.change(host, |view| view.labels = labels);
                }
            }
        }
    }

    fn settle_holder(&mut self, holder: Holder, before: Option<(HostId, Reservation)>) {
        let mut roster = std::mem::take(&mut self.seats.roster);
        if let Some((host, reservation)) = before {
            if let Some(holders) = self.seats.holders.get_mut(&host) {
                holders.remove(&holder);
            }
            roster.release(host, &reservation, || self.held_on(host));
        }
        if let Some(host) = self.held(holder).map(|(host, _)| host) {
            self.seats.holders.entry(host).or_default().insert(holder);
        }
        if let Some((host, reservation)) = self.held(holder) {
            roster.hold(host, reservation);
        }
        self.seats.roster = roster;
    }

    fn held(&self, holder: Holder) -> Option<(HostId, &Reservation)> {
        match holder {
            Holder::Instance(id) => self.instances.get(&id).and_then(held_by_instance),
            Holder::Migration(id) => self.migrations.get(&id).and_then(held_by_migration),
        }
    }

    /// Everything that is held on a host, by instances and by migrations.
    pub fn held_on(&self, host: HostId) -> Vec<&Reservation> {
        let holders = self.seats.holders.get(&host).into_iter().flatten();
        holders.filter_map(|holder| self.held(*holder).map(|(_, reservation)| reservation)).collect()
    }

    /// The instances that hold something on a host, and what.
    pub fn instances_on(&self, host: HostId) -> impl Iterator<Item = (&Instance, &Reservation)> {
        let holders = self.seats.holders.get(&host).into_iter().flatten();
        holders.filter_map(|holder| match holder {
            Holder::Instance(id) => self.instances.get(id).zip(self.held(*holder).map(|(_, held)| held)),
            Holder::Migration(_) => None,
        })
    }

    /// A host with nothing on it; none until it has reported.
    fn empty_view(&self, id: HostId) -> Option<HostView> {
        let host = self.hosts.get(&id)?;
        let inventory = host.inventory.as_ref()?;
        let state = match (host.enabled, &host.drain) {
            (false, _) => HostState::Disabled,
            (true, Some(_)) => HostState::Draining,
            (true, None) => HostState::Up,
        };
        let mut view = HostView::new(id, state, inventory, []);
        view.labels = Arc::new(self.labels_of(id));
        Some(view)
    }
}
