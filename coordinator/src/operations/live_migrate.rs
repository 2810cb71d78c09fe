//! Live migration: hold a place on the target, get it ready, send memory, switch over, release the source. Until
//! the instance runs on the target everything is undone on a failure, and it runs on the source as before; from
//! then on there is only forward.

use super::reserve::{Verdict, generation, hold};
use super::{Context, StepError, create_instance, idle, journal, place, spawn};
use crate::app::{App, Shared};
use crate::error::Error;
use crate::fleet::instance::{Instance, InstanceStatus, Task};
use crate::fleet::migration::{Migration, MigrationKind, MigrationStatus};
use crate::fleet::network::Port;
use crate::fleet::operation::{Operation, Verb};
use crate::fleet::{Change, Fleet};
use crate::l2;
use crate::ledger::now;
use godwit_protocol::id::{HostId, InstanceId, MigrationId, NetworkId, UserId};
use godwit_protocol::instance::{InstanceSpec, InstanceState};
use godwit_protocol::migration::{MigrationOutcome, MigrationSource, MigrationTarget};
use godwit_protocol::operation::Progress;
use godwit_protocol::request::{AgentReply, AgentRequest};
use std::collections::BTreeSet;

/// In order.
pub(super) const STEPS: &[&str] = &["reserve", "prepare", "send", "switch_over", "release"];

/// Steps before this one can be undone.
pub(super) const POINT_OF_NO_RETURN: usize = 3;

/// Accepts a live migration, to a host or to wherever there is room.
///
/// # Errors
/// Not found; a conflict when the instance does not run, something runs on it, or it is there already.
pub async fn request(
    app: &Shared,
    id: InstanceId,
    wanted_target: Option<HostId>,
    user: UserId,
) -> Result<MigrationId, Error> {
    let (migration, operation) = app
        .ledger
        .change(|fleet| {
            let instance = idle(fleet, id)?;
            let source = match (instance.status, instance.host) {
                (InstanceStatus::Active | InstanceStatus::Paused, Some(host)) => host,
                (status, _) => return Err(Error::state("live_migrate", instance.id, status)),
            };
            if let Some(target) = wanted_target {
                let target = fleet.hosts.get(&target).ok_or_else(|| Error::not_found("Host", target))?;
                if target.id == source {
                    let text = format!("Instance {id} runs on host {} already.", target.name);
                    return Err(Error::Invalid(text));
                }
            }
            check_pool(fleet, source, wanted_target)?;
            let migration = queued(fleet, instance, source, wanted_target, user);
            let operation = journal(Verb::LiveMigrate { migration: migration.id }, id);
            let busy = Instance { task: Some(Task::Migrating), updated_at: now(), ..instance.clone() };
            let ids = (migration.id, operation.id);
            Ok((vec![busy.into(), migration.into(), operation.into()], ids))
        })
        .await?;
    spawn(app, operation);
    Ok(migration)
}

/// A running guest takes no disk along: it moves to hosts that have the same pool, as far as hosts have told theirs.
fn check_pool(fleet: &Fleet, source: HostId, wanted_target: Option<HostId>) -> Result<(), Error> {
    let name = |host: &HostId| fleet.hosts.get(host).map_or_else(|| host.to_string(), |h| h.name.clone());
    let advice = "Live migration is for hosts of one pool. Migrate the server cold, which takes its disk along: \
                  `openstack server migrate` without --live-migration, or `godwit server migrate --cold`.";
    let from = name(&source);
    match wanted_target {
        Some(target) if fleet.are_apart(source, target) => {
            let to = name(&target);
            Err(Error::Invalid(format!(
                "{to} is not on shared storage with {from}: its pool is another one. {advice}"
            )))
        }
        Some(_) => Ok(()),
        None => {
            let mut others = fleet.hosts.keys().filter(|host| **host != source).peekable();
            match others.peek().is_some() && others.all(|host| fleet.are_apart(source, *host)) {
                true => Err(Error::Invalid(format!("No host is on shared storage with {from}. {advice}"))),
                false => Ok(()),
            }
        }
    }
}

/// The record of a live migration that has not begun.
pub(super) fn queued(
    fleet: &Fleet,
    instance: &Instance,
    source: HostId,
    wanted_target: Option<HostId>,
    user: UserId,
) -> Migration {
    let at = now();
    Migration {
        id: MigrationId::random(),
        number: next_number(fleet),
        kind: MigrationKind::Live,
        resize: None,
        instance: instance.id,
        project: instance.project,
        user,
        source,
        wanted_target,
        refused_by: vec![],
        target: None,
        reservation: None,
        ready: None,
        disk_moves: false,
        status: MigrationStatus::Queued,
        outcome: None,
        switched_at: None,
        error: None,
        created_at: at,
        updated_at: at,
    }
}

/// Stops a migration that has not switched over.
///
/// # Errors
/// Not found; a conflict when it has ended.
pub async fn cancel(app: &Shared, id: MigrationId) -> Result<(), Error> {
    app.ledger
        .change(|fleet| {
            let migration = fleet.migrations.get(&id).ok_or_else(|| Error::not_found("Migration", id))?;
            let operation = fleet.running_operation(migration.instance);
            match operation.filter(|o| o.verb == Verb::LiveMigrate { migration: id }) {
                Some(operation) if migration.switched_at.is_none() => {
                    Ok((vec![Operation { cancel: true, ..operation.clone() }.into()], ()))
                }
                _ => Err(Error::Conflict(format!(
                    "Migration {} has ended or switched over.",
                    migration.number
                ))),
            }
        })
        .await?;
    interrupt(app, id);
    Ok(())
}

/// Tells the source to stop sending, so that a cancelled operation gets to its undo now and not at the end.
pub(super) fn interrupt(app: &Shared, id: MigrationId) {
    let app = app.clone();
    tokio::spawn(async move {
        let source = app.ledger.read(|fleet| fleet.migrations.get(&id).map(|m| m.source));
        if let Some(source) = source {
            // If the source does not hear it, the step's own end does the work.
            let _ = app.agents.call(source, AgentRequest::CancelMigration(id)).await;
        }
    });
}

/// One step, by its place in [`STEPS`].
pub(super) async fn run(context: &Context, id: MigrationId, step: usize) -> Result<(), StepError> {
    match STEPS[step] {
        "reserve" => reserve(context, id).await,
        "prepare" => prepare(context, id).await,
        "send" => send(context, id).await,
        "switch_over" => switch_over(&context.app, id, None).await,
        _ => release(context, id).await,
    }
}

/// Undoes one step, whether or not it got to its effect. An instance that reached its target although it was
/// called back stays there: then there is nothing to undo, and the source is released instead.
pub(super) async fn undo(context: &Context, id: MigrationId, step: usize) -> Result<(), StepError> {
    let migration = record(context, id)?;
    let discard = AgentRequest::DiscardMigration { migration: id, instance: context.instance };
    match (STEPS[step], migration.target) {
        ("send", Some(target)) => {
            context.insist(migration.source, discard).await?;
            if is_on(context, migration.source, target).await == Some(target) {
                switch_over(&context.app, id, None).await?;
                release(context, id).await?;
            }
            Ok(())
        }
        _ if migration.switched_at.is_some() => Ok(()),
        ("prepare", Some(target)) => {
            context.insist(target, discard).await?;
            let networks = plug_in(context, None).await?;
            for network in networks {
                // A host that is away is told when it comes back.
                let _ = l2::ensure(&context.app, target, network).await;
                context.app.l2_changed(network);
            }
            Ok(())
        }
        ("reserve", Some(target)) => {
            context.insist(target, AgentRequest::Release(context.instance)).await?;
            update(context, id, |m| (m.target, m.reservation, m.ready) = (None, None, None)).await
        }
        _ => Ok(()),
    }
}

/// Which of the two hosts has the instance, by their own word; a host that does not answer is waited for. None
/// when neither has it.
async fn is_on(context: &Context, source: HostId, target: HostId) -> Option<HostId> {
    let ask = AgentRequest::InstanceState(context.instance);
    loop {
        let on_source = context.app.agents.call(source, ask.clone()).await;
        let on_target = context.app.agents.call(target, ask.clone()).await;
        match (on_source, on_target) {
            (_, Ok(AgentReply::State(Some(InstanceState::Running)))) => return Some(target),
            (Ok(AgentReply::State(Some(_))), _) => return Some(source),
            (Ok(AgentReply::State(None)), Ok(AgentReply::State(state))) => return state.map(|_| target),
            // A host that does not answer may be the one that runs it.
            _ => context.pause().await,
        }
    }
}

async fn reserve(context: &Context, id: MigrationId) -> Result<(), StepError> {
    let mut stale = 0;
    loop {
        let (target, reservation, generation) = context
            .place(|fleet| {
                let migration = in_fleet(fleet, id)?;
                if let (Some(target), Some(reservation)) = (migration.target, &migration.reservation) {
                    return Ok((vec![], (target, reservation.clone(), generation(fleet, target))));
                }
                let instance = context.in_fleet(fleet)?;
                let mut excluded = migration.refused_by.clone();
                excluded.push(migration.source);
                let wish = place::Wish::of(instance, migration.wanted_target, &excluded)
                    .running_on(migration.source);
                let (target, reservation) = place::choose(fleet, &context.app.config, &wish)?;
                let placed = Migration {
                    target: Some(target),
                    reservation: Some(reservation.clone()),
                    status: MigrationStatus::Preparing,
                    updated_at: now(),
                    ..migration.clone()
                };
                Ok((vec![placed.into()], (target, reservation, generation(fleet, target))))
            })
            .await?;
        let verdict = hold(context, target, reservation, (generation, false), &mut stale).await?;
        if verdict == Verdict::Held {
            return Ok(());
        }
        update(context, id, |m| {
            (m.target, m.reservation) = (None, None);
            m.refused_by.extend((verdict == Verdict::Refused).then_some(target));
        })
        .await?;
    }
}

async fn prepare(context: &Context, id: MigrationId) -> Result<(), StepError> {
    let migration = record(context, id)?;
    let target = target(&migration)?;
    for network in plug_in(context, Some(target)).await? {
        context.app.l2_changed(network);
    }
    create_instance::build_networks(context, target).await?;
    let spec = context.app.ledger.read(|fleet| create_instance::spec(context, fleet))?;
    let reservation = migration.reservation.unwrap_or_else(|| spec.reservation.clone());
    let spec = InstanceSpec { reservation, ..spec };
    let request = AgentRequest::PrepareMigration(Box::new(MigrationTarget { migration: id, spec }));
    match context.ask(target, request).await? {
        AgentReply::TargetReady(ready) => update(context, id, |m| m.ready = Some(*ready)).await,
        _ => Err(Error::Unavailable("The target did not say how it is reached.".into()).into()),
    }
}

/// Says of the instance's ports where they will be; returns their networks.
pub(super) async fn plug_in(
    context: &Context,
    target_host: Option<HostId>,
) -> Result<BTreeSet<NetworkId>, StepError> {
    context
        .change(|fleet| {
            let ports = fleet.ports_of(context.instance);
            let networks: BTreeSet<NetworkId> = ports.iter().map(|p| p.network).collect();
            let differing = ports.into_iter().filter(|p| p.target_host != target_host);
            let mut changes: Vec<Change> =
                differing.map(|p| Port { target_host, ..p.clone() }.into()).collect();
            if !changes.is_empty() {
                changes.extend(networks.iter().filter_map(|n| l2::touched(fleet, *n)));
            }
            Ok((changes, networks))
        })
        .await
}

async fn send(context: &Context, id: MigrationId) -> Result<(), StepError> {
    let migration = record(context, id)?;
    let ready = migration.ready.clone();
    let ready = ready.ok_or_else(|| Error::Unavailable("The target is not ready.".into()))?;
    update(context, id, |m| m.status = MigrationStatus::Running).await?;
    let request = MigrationSource {
        migration: id,
        instance: context.instance,
        target: ready,
        max_downtime_ms: context.app.config.max_downtime_ms,
        bandwidth_mib_s: None,
    };
    match context.ask(migration.source, AgentRequest::Migrate(Box::new(request))).await {
        Ok(AgentReply::Migrated(outcome)) => update(context, id, |m| m.outcome = Some(outcome)).await,
        Ok(_) => {
            settle(context, &migration, Error::Unavailable("The source gave no outcome.".into()).into()).await
        }
        Err(error) => settle(context, &migration, error).await,
    }
}

/// After an answer that is no success, the hosts themselves say where the instance is: only when it is on the
/// target did it move.
async fn settle(context: &Context, migration: &Migration, error: StepError) -> Result<(), StepError> {
    let target = target(migration)?;
    if is_on(context, migration.source, target).await != Some(target) {
        return Err(error);
    }
    let progress = match context.app.operations.progress(context.instance) {
        Some(Progress::Migration(progress)) => progress,
        _ => Default::default(),
    };
    let outcome = MigrationOutcome { progress, ..Default::default() };
    update(context, migration.id, |m| m.outcome = Some(outcome)).await
}

/// The instance runs on the target: ports, record and forwarding follow. Called by the step and, earlier, by the
/// target's own report; the second changes nothing.
pub(crate) async fn switch_over(
    app: &App,
    id: MigrationId,
    seen_on: Option<HostId>,
) -> Result<(), StepError> {
    let networks = app
        .ledger
        .change(|fleet| {
            let migration = in_fleet(fleet, id)?;
            let target = target(migration)?;
            if migration.switched_at.is_some() || seen_on.is_some_and(|host| host != target) {
                return Ok::<_, StepError>((vec![], BTreeSet::new()));
            }
            let at = now();
            let ports = fleet.ports_of(migration.instance);
            let networks: BTreeSet<NetworkId> = ports.iter().map(|p| p.network).collect();
            let mut changes: Vec<Change> = ports
                .into_iter()
                .map(|p| Port { host: Some(target), target_host: None, updated_at: at, ..p.clone() }.into())
                .collect();
            changes.extend(networks.iter().filter_map(|n| l2::touched(fleet, *n)));
            if let Some(instance) = fleet.instances.get(&migration.instance) {
                let moved = Instance {
                    host: Some(target),
                    reservation: migration.reservation.clone(),
                    updated_at: at,
                    ..instance.clone()
                };
                changes.push(moved.into());
            }
            changes.push(Migration { switched_at: Some(at), updated_at: at, ..migration.clone() }.into());
            Ok((changes, networks))
        })
        .await?;
    networks.into_iter().for_each(|network| app.l2_changed(network));
    Ok(())
}

/// Nothing is left of the migration on either host, nor of the instance on the source.
async fn release(context: &Context, id: MigrationId) -> Result<(), StepError> {
    let migration = record(context, id)?;
    let discard = AgentRequest::DiscardMigration { migration: id, instance: context.instance };
    context.insist(target(&migration)?, discard.clone()).await?;
    context.insist(migration.source, discard).await?;
    context.insist(migration.source, AgentRequest::RemoveInstance(context.instance)).await?;
    context.insist(migration.source, AgentRequest::Release(context.instance)).await?;
    let networks: BTreeSet<NetworkId> =
        context.app.ledger.read(|fleet| fleet.ports_of(context.instance).iter().map(|p| p.network).collect());
    for network in networks {
        let _ = l2::ensure(&context.app, migration.source, network).await;
        context.app.l2_changed(network);
    }
    Ok(())
}

/// The number of the next migration.
pub(super) fn next_number(fleet: &Fleet) -> u64 {
    1 + fleet.migrations.values().map(|m| m.number).max().unwrap_or(0)
}

pub(super) fn in_fleet(fleet: &Fleet, id: MigrationId) -> Result<&Migration, StepError> {
    Ok(fleet.migrations.get(&id).ok_or_else(|| Error::not_found("Migration", id))?)
}

pub(super) fn record(context: &Context, id: MigrationId) -> Result<Migration, StepError> {
    context.app.ledger.read(|fleet| in_fleet(fleet, id).cloned())
}

pub(super) fn target(migration: &Migration) -> Result<HostId, StepError> {
    migration.target.ok_or_else(|| Error::Conflict("The migration has no target.".into()).into())
}

pub(super) async fn update(
    context: &Context,
    id: MigrationId,
    change: impl FnOnce(&mut Migration),
) -> Result<(), StepError> {
    context
        .change(|fleet| {
            let mut migration = in_fleet(fleet, id)?.clone();
            change(&mut migration);
            migration.updated_at = now();
            Ok((vec![migration.into()], ()))
        })
        .await
}

pub(super) fn finish(
    fleet: &Fleet,
    operation: &Operation,
    id: MigrationId,
    error: Option<&StepError>,
) -> Vec<Change> {
    let mut changes = Vec::new();
    if let Some(migration) = fleet.migrations.get(&id) {
        let error = error.filter(|_| migration.switched_at.is_none());
        let status = match error {
            None => MigrationStatus::Completed,
            Some(_) if operation.cancel => MigrationStatus::Cancelled,
            Some(_) => MigrationStatus::Failed,
        };
        let error = error.map(ToString::to_string);
        changes.push(Migration { status, error, ready: None, updated_at: now(), ..migration.clone() }.into());
    }
    if let Some(instance) = fleet.instances.get(&operation.instance) {
        let task = instance.delete_wanted.then_some(Task::Deleting);
        changes.push(Instance { task, updated_at: now(), ..instance.clone() }.into());
    }
    changes
}
