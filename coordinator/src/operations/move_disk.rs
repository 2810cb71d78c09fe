//! Bring an instance's disk to the host that it moves to, where that has another pool: the hosts find out whether they
//! share one, and if not, the source streams the disk to the target. An overlay's base goes before it, unless the target's
//! pool has the image, or can get it. A stream that breaks, or whose ends are killed, goes on where it was. From when the
//! target waits for the disk, the record says that it is on two pools, and what follows removes it from one of them.

use super::live_migrate::{record, target, update};
use super::step::Patience;
use super::{Context, StepError, bring_image};
use crate::error::Error;
use crate::fleet::migration::Migration;
use godwit_protocol::disk::{DiskArrival, DiskBase, DiskDeparture, DiskMark, DiskPart};
use godwit_protocol::error::{ErrorKind, RequestError};
use godwit_protocol::id::{HostId, ImageId, MigrationId};
use godwit_protocol::operation::Progress;
use godwit_protocol::request::{AgentReply, AgentRequest};
use uuid::Uuid;

/// The disk is on the target's pool when this returns. Both ends are asked anew after each break, until nothing has
/// moved for `host_patience_seconds`.
pub(super) async fn bring(context: &Context, id: MigrationId) -> Result<(), StepError> {
    let migration = record(context, id)?;
    let way = Way { context, source: migration.source, target: target(&migration)? };
    if way.source == way.target {
        return Ok(());
    }
    let mut patience = Patience::new(context);
    loop {
        let marked = way.mark().await?;
        let awaited = way.awaited(&marked, DiskPart::Disk, marked.used_bytes).await?;
        update(context, id, |m| m.disk_moves = awaited.is_some()).await?;
        let Some(awaited) = awaited else { return Ok(()) };
        let sent = match marked.base {
            Some(base) => way.send_overlay(&marked, base, &mut patience).await,
            None => way.send(awaited, &mut patience).await,
        };
        match sent {
            Ok(()) => return Ok(()),
            Err(_) if context.is_cancelled() => return Err(StepError::Cancelled),
            Err(StepError::Host { error, .. }) if error.is_transient() && patience.lasts() => {
                tracing::warn!(instance = %context.instance, %error, "the disk's way to its new host is tried again");
                context.pause().await;
            }
            Err(error) => return Err(error),
        }
    }
}

/// A disk's way from host to host.
struct Way<'a> {
    context: &'a Context,
    source: HostId,
    target: HostId,
}

/// A disk that is marked on the source.
struct Marked {
    mark: Uuid,
    used_bytes: u64,
    base: Option<DiskBase>,
}

impl Way<'_> {
    async fn mark(&self) -> Result<Marked, StepError> {
        let (instance, mark) = (self.context.instance, Uuid::new_v4());
        match self.context.ask(self.source, AgentRequest::MarkDisk(DiskMark { instance, mark })).await? {
            AgentReply::DiskMarked { used_bytes, base } => Ok(Marked { mark, used_bytes, base }),
            _ => Err(unexpected()),
        }
    }

    /// Where the target waits for one of the disk's files; none: it has it.
    async fn awaited(
        &self,
        marked: &Marked,
        part: DiskPart,
        used_bytes: u64,
    ) -> Result<Option<DiskDeparture>, StepError> {
        let instance = self.context.instance;
        let arrival = DiskArrival { instance, mark: marked.mark, source: self.source, part, used_bytes };
        match self.context.ask(self.target, AgentRequest::AwaitDisk(arrival)).await? {
            AgentReply::DiskHere => Ok(None),
            AgentReply::DiskAwaited(awaited) => Ok(Some(DiskDeparture { instance, part, awaited })),
            _ => Err(unexpected()),
        }
    }

    async fn send(&self, departure: DiskDeparture, patience: &mut Patience) -> Result<(), StepError> {
        let app = &self.context.app;
        let mut most = 0;
        let request = AgentRequest::SendDisk(Box::new(departure));
        let sent = app.agents.call_with(self.source, request, |progress| {
            if let Progress::Copy { done_bytes, .. } = progress
                && done_bytes > most
            {
                most = done_bytes;
                patience.renew();
            }
            app.operations.tell(self.context.instance, Some(progress));
        });
        sent.await.map(drop).map_err(|error| self.context.host_error(self.source, error))
    }

    /// Sends a disk that is nothing without its base, after that.
    async fn send_overlay(
        &self,
        marked: &Marked,
        base: DiskBase,
        patience: &mut Patience,
    ) -> Result<(), StepError> {
        let image = self.context.instance()?.image.image;
        let part = DiskPart::Base { format: base.format, image };
        if self.awaited(marked, part, base.used_bytes).await?.is_some() {
            self.bring_image(image).await?;
            if let Some(departure) = self.awaited(marked, part, base.used_bytes).await? {
                self.send(departure, patience).await?;
            }
        }
        match self.awaited(marked, DiskPart::Disk, marked.used_bytes).await? {
            Some(departure) => self.send(departure, patience).await,
            None => Ok(()),
        }
    }

    /// The image itself serves others on the target as well. Where it is deleted, or no host has it, the base comes for
    /// this disk alone.
    async fn bring_image(&self, image: ImageId) -> Result<(), StepError> {
        if !self.context.app.ledger.read(|fleet| fleet.images.contains_key(&image)) {
            return Ok(());
        }
        let missing = RequestError::new(ErrorKind::NotFound, "the image is not there");
        match bring_image::bring(self.context, self.target, image, &missing).await {
            Err(StepError::Cancelled) => Err(StepError::Cancelled),
            Err(error) => {
                tracing::info!(instance = %self.context.instance, %error, "its base comes without its image");
                Ok(())
            }
            Ok(()) => Ok(()),
        }
    }
}

fn unexpected() -> StepError {
    Error::Conflict("A host answered a move of a disk with something else.".into()).into()
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
