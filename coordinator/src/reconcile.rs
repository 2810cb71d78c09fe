//! Wanted against reported: what follows from what a host says. It takes no orders, re-reads everything, and
//! never ends a guest: what it does not know it tells, and what is missing it shows.

use crate::app::{App, Shared};
use crate::fleet::host::{Host, Observed};
use crate::fleet::instance::{Fault, Instance, InstanceStatus};
use crate::fleet::migration::MigrationKind;
use crate::fleet::{Change, Fleet, Time};
use crate::ledger::now;
use crate::operations::live_migrate;
use crate::operations::resize_instance::pending;
use crate::store::StoreError;
use crate::{inventory_check, l2, liveness};
use godwit_protocol::host::Heartbeat;
use godwit_protocol::id::{HostId, InstanceId, MigrationId, NetworkId};
use godwit_protocol::instance::InstanceState;
use godwit_protocol::request::{AgentReply, AgentRequest, HostReport};
use godwit_protocol::reservation::Drift;
use std::time::Duration;
use uuid::Uuid;

/// Between two repairs of one host, so that a host that cannot do what is wanted is not asked without pause.
const REPAIR: Duration = Duration::from_secs(5);

/// A host's channel opened, or it gave a sign of life.
pub fn seen(app: &App, host: HostId, connected: bool) {
    app.ledger.observe(|fleet| {
        let observed = fleet.observed.entry(host).or_insert_with(|| Observed::at(now()));
        observed.seen_at = now();
        observed.connected |= connected;
    });
}

/// A host's channel broke. What it last said stays.
pub fn gone(app: &App, host: HostId) {
    app.ledger.observe(|fleet| {
        if let Some(observed) = fleet.observed.get_mut(&host) {
            observed.connected = false;
        }
    });
}

/// A heartbeat. One that tells of a newer report than is known makes us ask for it: reports are sent once, and
/// one may have been cut off.
pub fn heartbeat(app: &Shared, beat: &Heartbeat) {
    seen(app, beat.host, true);
    let known = app.ledger.read(|fleet| generation(fleet, beat.host));
    if known < beat.generation {
        let (app, host) = (app.clone(), beat.host);
        tokio::spawn(async move {
            if let Ok(AgentReply::Report(newer)) = app.agents.call(host, AgentRequest::Report).await {
                report(&app, *newer).await;
            }
        });
    }
}

fn generation(fleet: &Fleet, host: HostId) -> u64 {
    fleet.observed.get(&host).and_then(|o| o.report.as_ref()).map_or(0, |r| r.generation)
}

/// How alive a host is.
pub fn liveness(fleet: &Fleet, host: HostId, heartbeat_ms: u64, now: Time) -> liveness::Liveness {
    let seen_at = fleet.observed.get(&host).map(|o| o.seen_at);
    liveness::judge(now, seen_at, Duration::from_millis(heartbeat_ms))
}

/// A host's report: taken in unless it is older than what is known, then acted upon.
pub async fn report(app: &Shared, report: HostReport) {
    let host = report.host;
    let fresh = app.ledger.observe(|fleet| {
        if generation(fleet, host) >= report.generation {
            return false;
        }
        let observed = fleet.observed.entry(host).or_insert_with(|| Observed::at(now()));
        observed.seen_at = now();
        let before = observed.report.replace(report.clone()).map(|report| report.drifts);
        tell_drifts(&report, &before.unwrap_or_default());
        let contradiction = inventory_check::check(&report.inventory).err().map(|error| error.to_string());
        if let Some(text) =
            contradiction.as_ref().filter(|text| observed.contradiction.as_ref() != Some(text))
        {
            tracing::error!(%host, "its inventory cannot be true and is not taken in: {text}");
        }
        observed.contradiction = contradiction;
        true
    });
    if !fresh {
        return;
    }
    let arrived: Vec<MigrationId> = app.ledger.read(|fleet| arrivals(fleet, &report));
    for migration in arrived {
        if let Err(error) = live_migrate::switch_over(app, migration, Some(host)).await {
            tracing::error!(%migration, %error, "a switch-over was not noted; its operation does it");
        }
    }
    let noted = app.ledger.change(|fleet| Ok::<_, StoreError>((inventory_change(fleet, &report), ()))).await;
    if let Err(error) = noted {
        tracing::error!(%host, %error, "a report was not noted");
    }
    for (instance, judged_at) in app.ledger.read(|fleet| doubtful(fleet, &report)) {
        tokio::spawn(ask_again(app.clone(), host, instance, judged_at));
    }
    repair(app, host);
}

/// What the host found elsewhere than it was reserved goes to the log when it is new.
fn tell_drifts(report: &HostReport, before: &[Drift]) {
    for drift in report.drifts.iter().filter(|drift| !before.contains(drift)) {
        let (kind, wanted, found) = (drift.aspect.name(), &drift.wanted, &drift.found);
        let (host, instance) = (report.host, drift.instance);
        tracing::error!(%host, %instance, kind, wanted, found, "an instance is not where it was reserved");
    }
}

/// Migrations whose instance runs on this target now, and was not seen there before.
fn arrivals(fleet: &Fleet, report: &HostReport) -> Vec<MigrationId> {
    let running = report.instances.iter().filter(|i| i.state == InstanceState::Running);
    let arrived = running.filter_map(|i| fleet.running_migration(i.instance));
    let live = arrived.filter(|m| m.kind == MigrationKind::Live);
    live.filter(|m| m.target == Some(report.host) && m.switched_at.is_none()).map(|m| m.id).collect()
}

/// The host's inventory, when it is another than before and can be true.
fn inventory_change(fleet: &Fleet, report: &HostReport) -> Vec<Change> {
    if inventory_check::check(&report.inventory).is_err() {
        return vec![];
    }
    let host = fleet.hosts.get(&report.host).filter(|h| h.inventory.as_ref() != Some(&report.inventory));
    host.map(|h| Host { inventory: Some(report.inventory.clone()), ..h.clone() }.into()).into_iter().collect()
}

/// Instances on which nothing runs and of which the report says something else than is known, with the time of
/// their last change. The report may have been made before that change, so it decides nothing.
fn doubtful(fleet: &Fleet, report: &HostReport) -> Vec<(InstanceId, Time)> {
    let here = fleet.instances.values().filter(|i| i.host == Some(report.host));
    let idle = here.filter(|i| fleet.running_operation(i.id).is_none());
    let doubtful = idle.filter(|instance| {
        let state = report.instances.iter().find(|r| r.instance == instance.id).map(|r| r.state);
        let next = follow(instance, state);
        (next.status, next.power) != (instance.status, instance.power)
    });
    doubtful.map(|i| (i.id, i.updated_at)).collect()
}

/// Asks the host for an instance's state now, and follows it unless the instance was changed meanwhile.
async fn ask_again(app: Shared, host: HostId, id: InstanceId, judged_at: Time) {
    let Ok(AgentReply::State(state)) = app.agents.call(host, AgentRequest::InstanceState(id)).await else {
        return;
    };
    let followed = app.ledger.change(|fleet| {
        let unchanged =
            fleet.instances.get(&id).filter(|i| i.host == Some(host) && i.updated_at == judged_at);
        let idle = unchanged.filter(|_| fleet.running_operation(id).is_none());
        let next = idle.map(|instance| Instance { updated_at: now(), ..follow(instance, state) });
        Ok::<_, StoreError>((next.map(Change::from).into_iter().collect(), ()))
    });
    if let Err(error) = followed.await {
        tracing::error!(instance = %id, %error, "an instance's state was not noted");
    }
}

/// The instance as its host's word makes it.
fn follow(instance: &Instance, state: Option<InstanceState>) -> Instance {
    use {InstanceState as Is, InstanceStatus as Status};
    let mut next = Instance { power: state, ..instance.clone() };
    let lost = "The domain is not on its host any more; start or delete the instance.";
    next.status = match (instance.status, state) {
        (Status::Active | Status::Paused, None) => {
            next.fault = Some(Fault { message: lost.into(), at: now() });
            Status::Error
        }
        (Status::Active | Status::Paused, Some(Is::Stopped | Is::Crashed)) => Status::Stopped,
        (Status::Active | Status::Stopped, Some(Is::Paused)) => Status::Paused,
        (Status::Paused | Status::Stopped, Some(Is::Running)) => Status::Active,
        (Status::Error, Some(Is::Running)) if instance.fault.as_ref().is_some_and(|f| f.message == lost) => {
            next.fault = None;
            Status::Active
        }
        (status, _) => status,
    };
    next
}

/// Sends a host what makes it as wanted, soon: at once, or when [`REPAIR`] has passed since the last time.
fn repair(app: &Shared, host: HostId) {
    let delay = app.ledger.observe(|fleet| {
        let observed = fleet.observed.get_mut(&host)?;
        if std::mem::replace(&mut observed.repair_due, true) {
            return None;
        }
        let since = observed.repaired_at.map(|at| Duration::try_from(now() - at).unwrap_or_default());
        Some(since.map_or(Duration::ZERO, |since| REPAIR.saturating_sub(since)))
    });
    let Some(delay) = delay else { return };
    let app = app.clone();
    tokio::spawn(async move {
        tokio::time::sleep(delay).await;
        let report = app.ledger.observe(|fleet| {
            let observed = fleet.observed.get_mut(&host)?;
            observed.repair_due = false;
            let is_first = observed.repaired_at.replace(now()).is_none();
            Some((observed.report.clone()?, is_first))
        });
        if let Some((report, is_first)) = report {
            if is_first {
                tell_networks(&app, host).await;
            }
            make_as_wanted(&app, &report).await;
        }
    });
}

/// Tells a host all its networks: a coordinator that has just started may have other policies than the one before, and
/// of those hosts report nothing.
async fn tell_networks(app: &Shared, host: HostId) {
    for network in app.ledger.read(|fleet| l2::networks_of(fleet, host)) {
        if let Err(error) = l2::ensure(app, host, network).await {
            tracing::warn!(%host, %network, %error, "a host did not take a network");
        }
    }
}

/// Reservations that nobody owns go, networks that differ are told again, networks that nobody knows are removed.
async fn make_as_wanted(app: &Shared, report: &HostReport) {
    let host = report.host;
    let (stale, networks, unknown) = app.ledger.read(|fleet| {
        (stale_reservations(fleet, report), l2::drift(fleet, host, &app.config), unknown_vnis(fleet, report))
    });
    networks.into_iter().for_each(|network| app.l2_changed(network));
    for request in stale {
        tracing::warn!(%host, ?request, "a reservation that nobody owns is released");
        let _ = app.agents.call(host, request).await;
    }
    for vni in unknown {
        tracing::warn!(%host, vni, "a network that is not wanted any more is removed");
        let network = NetworkId(Uuid::nil());
        let request = AgentRequest::RemoveNetwork { network, vni, generation: u64::MAX };
        let _ = app.agents.call(host, request).await;
    }
}

/// What lets go of reservations of instances that are neither there, nor may go back there, nor are being worked on.
fn stale_reservations(fleet: &Fleet, report: &HostReport) -> Vec<AgentRequest> {
    let here = |id: InstanceId| fleet.instances.get(&id).is_some_and(|i| i.host == Some(report.host));
    let goes_back = |id: InstanceId| pending(fleet, id).is_some_and(|m| m.source == report.host);
    let idle = |id: InstanceId| fleet.running_operation(id).is_none();
    let runs = |id: InstanceId| report.instances.iter().any(|i| i.instance == id);
    let held = report.reservations.iter().map(|r| r.instance);
    let unowned = held.filter(|id| !here(*id) && !goes_back(*id) && idle(*id) && !runs(*id));
    let beside = report.beside.iter().map(|r| r.instance).filter(|id| !goes_back(*id) && idle(*id));
    unowned.map(AgentRequest::Release).chain(beside.map(AgentRequest::ReleaseBeside)).collect()
}

/// Numbers of networks that the host has and that exist nowhere in the fleet.
fn unknown_vnis(fleet: &Fleet, report: &HostReport) -> Vec<u32> {
    let known = |vni: u32| fleet.networks.values().any(|n| n.vni == vni);
    report.networks.iter().map(|n| n.vni).filter(|vni| !known(*vni)).collect()
}
