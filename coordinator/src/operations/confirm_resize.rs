//! Confirm a resize: the old disk and the old place go. It only goes forward. A source that is silent is not waited for
//! for ever: nothing of the instance is there but its old place, which a host lets go of when it is back. One that has the
//! old disk in a pool of its own is.

use super::live_migrate::{record, target};
use super::resize_instance::resize;
use super::{Context, StepError, idle, journal, move_disk, spawn};
use crate::app::Shared;
use crate::error::Error;
use crate::fleet::instance::{Instance, InstanceStatus, Task};
use crate::fleet::migration::{Migration, MigrationStatus};
use crate::fleet::operation::{Operation, Verb};
use crate::fleet::{Change, Fleet, Time};
use crate::ledger::now;
use godwit_protocol::id::{InstanceId, MigrationId};
use godwit_protocol::instance::InstanceState;
use godwit_protocol::request::AgentRequest;
use std::time::Duration;

/// In order.
pub(super) const STEPS: &[&str] = &["disk", "release"];

/// How often resizes that nobody has confirmed are looked for.
const LOOK_EVERY: Duration = Duration::from_secs(5);

/// Accepts that a resize stays.
///
/// # Errors
/// Not found; a conflict when the instance is not resized, or something runs on it.
pub async fn request(app: &Shared, id: InstanceId) -> Result<(), Error> {
    let operation = app
        .ledger
        .change(|fleet| {
            let (instance, migration) = decided(fleet, id, "confirm_resize")?;
            let status = MigrationStatus::Confirming;
            let operation = journal(Verb::ConfirmResize { migration: migration.id }, id);
            let migration = Migration { status, updated_at: now(), ..migration.clone() };
            let instance = Instance { updated_at: now(), ..instance.clone() };
            Ok::<_, Error>((vec![instance.into(), migration.into(), operation.clone().into()], operation.id))
        })
        .await?;
    spawn(app, operation);
    Ok(())
}

/// The instance and its resize that are to be decided about.
///
/// # Errors
/// As [`request`].
pub(super) fn decided<'a>(
    fleet: &'a Fleet,
    id: InstanceId,
    action: &'static str,
) -> Result<(&'a Instance, &'a Migration), Error> {
    let instance = idle(fleet, id)?;
    let pending = fleet.running_migration(id).filter(|_| instance.status == InstanceStatus::Resized);
    let migration = pending.ok_or_else(|| Error::state(action, id, instance.status))?;
    Ok((instance, migration))
}

/// One step, by its place in [`STEPS`].
pub(super) async fn run(context: &Context, id: MigrationId, step: usize) -> Result<(), StepError> {
    let migration = record(context, id)?;
    let (source, target) = (migration.source, target(&migration)?);
    match STEPS[step] {
        "disk" => {
            if resize(&migration)?.grows() {
                context.insist(target, AgentRequest::DropOldDisk(context.instance)).await?;
            }
            move_disk::leave(context, &migration).await
        }
        "release" if source == target => {
            context.insist(source, AgentRequest::ReleaseBeside(context.instance)).await
        }
        "release" if context.app.ledger.read(|fleet| fleet.hosts.contains_key(&source)) => {
            match context.ask(source, AgentRequest::Release(context.instance)).await {
                Err(StepError::Host { host, error }) if error.is_transient() => {
                    tracing::warn!(host, instance = %context.instance, %error, "it lets go of the old place later");
                    Ok(())
                }
                // A deletion waits.
                Err(StepError::Cancelled) => Ok(()),
                other => other.map(drop),
            }
        }
        _ => Ok(()),
    }
}

pub(super) fn finish(fleet: &Fleet, operation: &Operation, id: MigrationId) -> Vec<Change> {
    let mut changes: Vec<Change> = Vec::new();
    if let Some(migration) = fleet.migrations.get(&id) {
        let status = MigrationStatus::Confirmed;
        changes.push(Migration { status, updated_at: now(), ..migration.clone() }.into());
    }
    if let Some(instance) = fleet.instances.get(&operation.instance) {
        let status = match instance.power {
            Some(InstanceState::Running | InstanceState::Incoming) => InstanceStatus::Active,
            Some(InstanceState::Paused) => InstanceStatus::Paused,
            Some(InstanceState::Stopped | InstanceState::Crashed) | None => InstanceStatus::Stopped,
        };
        let task = instance.delete_wanted.then_some(Task::Deleting);
        changes.push(Instance { status, task, updated_at: now(), ..instance.clone() }.into());
    }
    changes
}

/// The task that confirms what nobody has decided about for `resize_confirm_window`.
pub async fn run_window(app: Shared) {
    let window = Duration::from_secs(app.config.resize_confirm_window);
    if window.is_zero() {
        return;
    }
    loop {
        tokio::time::sleep(LOOK_EVERY).await;
        for instance in app.ledger.read(|fleet| overdue(fleet, window, now())) {
            match request(&app, instance).await {
                Ok(()) => {
                    tracing::info!(%instance, "its resize is confirmed, for nobody has decided about it")
                }
                // Somebody was faster, or will be tried again.
                Err(error) => tracing::debug!(%instance, %error, "its resize is not confirmed now"),
            }
        }
    }
}

/// Instances whose resize ended longer than `window` ago.
pub(crate) fn overdue(fleet: &Fleet, window: Duration, now: Time) -> Vec<InstanceId> {
    let waits = |m: &&Migration| m.status == MigrationStatus::Finished && m.updated_at + window <= now;
    fleet.migrations.values().filter(waits).map(|m| m.instance).collect()
}
