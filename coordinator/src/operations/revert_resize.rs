//! Revert a resize: leave the new place, put the old disk back, move record and ports back, define and start on the old
//! host by the old reservation, which was held all the time, and let go of the new place. It only goes forward.

use super::confirm_resize::decided;
use super::live_migrate::{record, target};
use super::power::GRACE_MS;
use super::resize_instance::{leave_networks, release_new, resize, start_again, stop, switch};
use super::{Context, StepError, create_instance, journal, move_disk, spawn};
use crate::app::Shared;
use crate::error::Error;
use crate::fleet::instance::{Instance, InstanceStatus, Task};
use crate::fleet::migration::{Migration, MigrationStatus};
use crate::fleet::operation::{Operation, Verb};
use crate::fleet::{Change, Fleet};
use crate::ledger::now;
use crate::liveness::Liveness;
use crate::reconcile;
use godwit_protocol::id::{HostId, InstanceId, MigrationId, NetworkId};
use godwit_protocol::instance::InstanceState;
use godwit_protocol::request::AgentRequest;
use std::collections::BTreeSet;

/// In order.
pub(super) const STEPS: &[&str] = &["stop", "disk", "switch", "network", "define", "start", "release"];

/// Accepts that a resize does not stay.
///
/// # Errors
/// Not found; a conflict when the instance is not resized, something runs on it, or the host where it was is not
/// there.
pub async fn request(app: &Shared, id: InstanceId) -> Result<(), Error> {
    let heartbeat_ms = app.config.heartbeat_ms;
    let operation = app
        .ledger
        .change(|fleet| {
            let (instance, migration) = decided(fleet, id, "revert_resize")?;
            for host in [Some(migration.source), migration.target].into_iter().flatten() {
                check_host(fleet, host, heartbeat_ms)?;
            }
            let status = MigrationStatus::Reverting;
            let operation = journal(Verb::RevertResize { migration: migration.id }, id);
            let migration = Migration { status, updated_at: now(), ..migration.clone() };
            let task = Some(Task::ResizeReverting);
            let instance = Instance { task, updated_at: now(), ..instance.clone() };
            Ok::<_, Error>((vec![instance.into(), migration.into(), operation.clone().into()], operation.id))
        })
        .await?;
    spawn(app, operation);
    Ok(())
}

/// That a host takes part.
fn check_host(fleet: &Fleet, id: HostId, heartbeat_ms: u64) -> Result<(), Error> {
    let Some(host) = fleet.hosts.get(&id) else {
        return Err(Error::Conflict(
            "The host where the instance was is not there any more; confirm it.".into(),
        ));
    };
    if reconcile::liveness(fleet, id, heartbeat_ms, now()) == Liveness::Lost {
        let name = &host.name;
        return Err(Error::Conflict(format!(
            "Host {name} is lost and has to take part; revert when it is back, or confirm."
        )));
    }
    Ok(())
}

/// One step, by its place in [`STEPS`]. A host that was removed from the fleet meanwhile, which is only while the
/// instance is to be deleted, has nothing to take back.
pub(super) async fn run(context: &Context, id: MigrationId, step: usize) -> Result<(), StepError> {
    let migration = record(context, id)?;
    let (source, target) = (migration.source, target(&migration)?);
    let (resize, instance) = (resize(&migration)?, context.instance);
    let there = |host| context.app.ledger.read(|fleet| fleet.hosts.contains_key(&host));
    match STEPS[step] {
        "stop" if there(target) => {
            // What it writes now goes with the larger disk.
            let grace_ms = if resize.grows() { 0 } else { GRACE_MS };
            let runs = context.instance()?.power != Some(InstanceState::Stopped);
            match stop(context, target, runs, grace_ms).await {
                Err(StepError::Host { error, .. }) if !error.is_transient() => {
                    tracing::warn!(%instance, %error, "it is not asked to shut down any more");
                }
                stopped => stopped?,
            }
            context.ask(target, AgentRequest::RemoveInstance(instance)).await.map(drop)
        }
        "disk" if migration.disk_moves => move_disk::take_back(context, &migration).await,
        "disk" if resize.grows() => context.insist(target, AgentRequest::RestoreDisk(instance)).await,
        "switch" => {
            if source == target {
                context.insist(source, AgentRequest::Exchange(resize.old_reservation.clone())).await?;
            }
            switch(context, id, false).await
        }
        "network" if there(source) => create_instance::build_networks(context, source).await,
        "define" if there(source) => {
            let spec = context.app.ledger.read(|fleet| create_instance::spec(context, fleet))?;
            context.ask(source, AgentRequest::DefineInstance(Box::new(spec))).await.map(drop)
        }
        "start" if resize.ran && there(source) => start_again(context, source).await,
        "release" => {
            release_new(context, source, target).await?;
            let networks: BTreeSet<NetworkId> =
                context.app.ledger.read(|fleet| fleet.ports_of(instance).iter().map(|p| p.network).collect());
            leave_networks(context, target, networks).await;
            Ok(())
        }
        _ => Ok(()),
    }
}

pub(super) fn finish(fleet: &Fleet, operation: &Operation, id: MigrationId) -> Vec<Change> {
    let mut changes: Vec<Change> = Vec::new();
    let migration = fleet.migrations.get(&id);
    if let Some(migration) = migration {
        let status = MigrationStatus::Reverted;
        changes.push(Migration { status, updated_at: now(), ..migration.clone() }.into());
    }
    if let Some(instance) = fleet.instances.get(&operation.instance) {
        // The last step that could start it has said whether it did.
        let (status, power) = match instance.status {
            InstanceStatus::Active => (InstanceStatus::Active, InstanceState::Running),
            _ => (InstanceStatus::Stopped, InstanceState::Stopped),
        };
        let task = instance.delete_wanted.then_some(Task::Deleting);
        let power = Some(power);
        changes.push(Instance { status, power, task, updated_at: now(), ..instance.clone() }.into());
    }
    changes
}
