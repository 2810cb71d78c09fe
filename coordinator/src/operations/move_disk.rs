//! Bring an instance's disk to the host that it moves to, where that has another pool: the hosts find out whether they
//! share one, and if not, the source streams the disk to the target. A stream that breaks, or whose ends are killed, goes
//! on where it was. From when the target waits for the disk, the record says that it is on two pools, and what follows
//! removes it from one of them.

use super::live_migrate::{record, target, update};
use super::{Context, StepError};
use crate::error::Error;
use crate::fleet::migration::Migration;
use godwit_protocol::disk::{DiskArrival, DiskDeparture, DiskMark};
use godwit_protocol::id::{HostId, MigrationId};
use godwit_protocol::operation::Progress;
use godwit_protocol::request::{AgentReply, AgentRequest};
use std::time::{Duration, Instant};
use uuid::Uuid;

/// The disk is on the target's pool when this returns. Both ends are asked anew after each break, until nothing has
/// moved for `host_patience_seconds`.
pub(super) async fn bring(context: &Context, id: MigrationId) -> Result<(), StepError> {
    let migration = record(context, id)?;
    let (source, target) = (migration.source, target(&migration)?);
    if source == target {
        return Ok(());
    }
    let patience = Duration::from_secs(context.app.config.host_patience_seconds);
    let mut moved = Instant::now();
    loop {
        let departure = awaited(context, source, target).await?;
        update(context, id, |m| m.disk_moves = departure.is_some()).await?;
        let Some(departure) = departure else { return Ok(()) };
        let mut most = 0;
        let request = AgentRequest::SendDisk(Box::new(departure));
        let sent = context.app.agents.call_with(source, request, |progress| {
            if let Progress::Copy { done_bytes, .. } = progress
                && done_bytes > most
            {
                (most, moved) = (done_bytes, Instant::now());
            }
            context.app.operations.tell(context.instance, Some(progress));
        });
        match sent.await {
            Ok(_) => return Ok(()),
            Err(_) if context.is_cancelled() => return Err(StepError::Cancelled),
            Err(error) if error.is_transient() && moved.elapsed() < patience => {
                tracing::warn!(instance = %context.instance, %error, "the disk's way to its new host is tried again");
                context.pause().await;
            }
            Err(error) => return Err(context.host_error(source, error)),
        }
    }
}

/// Where the target waits for the disk; none: its pool has it.
async fn awaited(
    context: &Context,
    source: HostId,
    target: HostId,
) -> Result<Option<DiskDeparture>, StepError> {
    let unexpected = || Error::Conflict("A host answered a move of a disk with something else.".into());
    let (instance, mark) = (context.instance, Uuid::new_v4());
    let marked = context.ask(source, AgentRequest::MarkDisk(DiskMark { instance, mark })).await?;
    let AgentReply::DiskMarked { used_bytes } = marked else { return Err(unexpected().into()) };
    let arrival = DiskArrival { instance, mark, source, used_bytes };
    match context.ask(target, AgentRequest::AwaitDisk(arrival)).await? {
        AgentReply::DiskHere => Ok(None),
        AgentReply::DiskAwaited(awaited) => Ok(Some(DiskDeparture { instance, awaited })),
        _ => Err(unexpected().into()),
    }
}

/// Removes the disk from the target, which the instance does not move to, or leaves again.
pub(super) async fn take_back(context: &Context, migration: &Migration) -> Result<(), StepError> {
    let target = target(migration)?;
    match migration.disk_moves {
        true => context.insist(target, AgentRequest::DeleteDisk(context.instance)).await,
        false => Ok(()),
    }
}

/// Removes the disk from the source, which the instance has left for good.
pub(super) async fn leave(context: &Context, migration: &Migration) -> Result<(), StepError> {
    match migration.disk_moves {
        true => context.insist(migration.source, AgentRequest::LeaveDisk(context.instance)).await,
        false => Ok(()),
    }
}
