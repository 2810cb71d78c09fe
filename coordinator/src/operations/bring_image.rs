//! Bring an image to the pool of a host that is to make a disk of it and has not got it: from a host that has it in its
//! pool, over the same streams as disks that move, once for each pool however many wait for it. That the pool is to have
//! it is recorded before its first byte; [`crate::images::copies`] removes it with the image, or when it is not wanted
//! any more before it is whole.

use super::step::Patience;
use super::{Context, StepError};
use crate::error::Error;
use crate::fleet::Fleet;
use crate::fleet::image::{Image, ImageCopy, ImageStatus};
use crate::images::{Flight, damages};
use crate::ledger::now;
use crate::liveness::Liveness;
use crate::reconcile;
use godwit_protocol::disk::{ImageArrival, ImageDeparture};
use godwit_protocol::error::{ErrorKind, RequestError};
use godwit_protocol::id::{HostId, ImageId};
use godwit_protocol::operation::Progress;
use godwit_protocol::request::{AgentReply, AgentRequest};
use std::collections::BTreeMap;
use uuid::Uuid;

/// The image is in the host's pool when this returns. Both ends are asked anew after each break, until nothing has moved
/// for `host_patience_seconds`. `missing` is what the host said of it.
///
/// # Errors
/// [`StepError::Cancelled`]; [`StepError::Host`] with `missing` when no host that answers has it, or as a host says.
pub(super) async fn bring(
    context: &Context,
    host: HostId,
    image: ImageId,
    missing: &RequestError,
) -> Result<(), StepError> {
    tokio::select! {
        brought = bring_in_turn(context, host, image, missing) => brought,
        // The stream ends with who waits for it: the next in turn, or the removal of what has come.
        () = cancelled(context) => Err(StepError::Cancelled),
    }
}

async fn cancelled(context: &Context) {
    while !context.is_cancelled() {
        context.pause().await;
    }
}

async fn bring_in_turn(
    context: &Context,
    host: HostId,
    image: ImageId,
    missing: &RequestError,
) -> Result<(), StepError> {
    let pool = context.app.ledger.read(|fleet| fleet.pool_mark(host));
    let copy = ImageCopy { image, host, pool, whole: false };
    let flight = context.app.images.flights.of(&copy);
    let _waiting = flight.join(context.instance);
    let _turn = flight.turn.lock().await;
    let way = Way { context, host, copy: &copy, flight: &flight, missing };
    let mut patience = Patience::new(context);
    loop {
        match way.attempt(&mut patience).await {
            Err(StepError::Host { error, .. }) if error.is_transient() && patience.lasts() => {
                tracing::warn!(%image, %host, %error, "the image's way to the host's pool is tried again");
                context.pause().await;
            }
            ended => return ended,
        }
    }
}

/// One image's way to one pool, for whose turn it is.
struct Way<'a> {
    context: &'a Context,
    host: HostId,
    copy: &'a ImageCopy,
    flight: &'a Flight,
    missing: &'a RequestError,
}

impl Way<'_> {
    async fn attempt(&self, patience: &mut Patience) -> Result<(), StepError> {
        let image = self.copy.image;
        if self.find(self.host).await.map_err(|error| self.context.host_error(self.host, error))?.is_some() {
            // Somebody has brought it meanwhile, perhaps an earlier life of this process.
            return self.note_whole().await;
        }
        let Some((source, used_bytes)) = self.source().await? else {
            let text =
                format!("{}, and no other host that answers has image {image} in its pool", self.missing);
            return Err(self.context.host_error(self.host, RequestError::new(ErrorKind::NotFound, text)));
        };
        let record = self.note().await?;
        let arrival = Box::new(ImageArrival {
            image,
            source,
            size_bytes: record.size_bytes.unwrap_or_default(),
            used_bytes,
            sha512: record.sha512,
            md5: record.md5,
        });
        let awaited = self.ask(self.host, AgentRequest::AwaitImage(arrival.clone()), patience).await?;
        if let AgentReply::DiskAwaited(awaited) = awaited {
            let departure = Box::new(ImageDeparture { image, awaited });
            let sent = self.ask(source, AgentRequest::SendImage(departure), patience).await;
            self.look_for_damage(source, sent).await?;
        }
        // The connection has proved that what has come is what was sent.
        let settled = self.ask(self.host, AgentRequest::SettleImage(arrival), patience).await;
        self.look_for_damage(source, settled).await?;
        self.note_whole().await
    }

    /// Tells operators when the source's copy is not what was uploaded.
    async fn look_for_damage(
        &self,
        source: HostId,
        outcome: Result<AgentReply, StepError>,
    ) -> Result<AgentReply, StepError> {
        if let Err(StepError::Host { host, error }) = &outcome
            && error.kind == ErrorKind::Damaged
        {
            let from = self.context.host_name(source);
            let how = format!("host {host}, of what came from host {from}: {error}");
            damages::note_on_host(&self.context.app, self.copy.image, source, &how).await;
        }
        outcome
    }

    /// Asks a host once; all who wait see how far it is.
    async fn ask(
        &self,
        host: HostId,
        request: AgentRequest,
        patience: &mut Patience,
    ) -> Result<AgentReply, StepError> {
        let app = &self.context.app;
        let mut most = 0;
        let call = app.agents.call_with(host, request, |progress| {
            if let Progress::Copy { done_bytes, .. } = progress
                && done_bytes > most
            {
                most = done_bytes;
                patience.renew();
            }
            for instance in self.flight.waiting() {
                app.operations.tell(instance, Some(progress));
            }
        });
        call.await.map_err(|error| self.context.host_error(host, error))
    }

    /// Bytes that the image takes in a host's pool; none when it is not there.
    async fn find(&self, host: HostId) -> Result<Option<u64>, RequestError> {
        match self.context.app.agents.call(host, AgentRequest::FindImage(self.copy.image)).await? {
            AgentReply::Image { used_bytes } => Ok(used_bytes),
            _ => Err(RequestError::new(ErrorKind::Internal, "it answers something else")),
        }
    }

    /// A host that has the image in its pool, and what it takes there. Of the hosts of one pool one answers for all.
    ///
    /// # Errors
    /// When none has it, but one that might does not answer now.
    async fn source(&self) -> Result<Option<(HostId, u64)>, StepError> {
        let mut silent = None;
        for hosts in self.context.app.ledger.read(|fleet| self.other_pools(fleet)).into_values() {
            for host in hosts {
                match self.find(host).await {
                    Ok(Some(used_bytes)) => return Ok(Some((host, used_bytes))),
                    Ok(None) => break,
                    Err(error) => silent = Some(self.context.host_error(host, error)),
                }
            }
        }
        match silent {
            Some(silent) => Err(silent),
            None if self.others_may_come() => {
                let text = format!("{}, and of the other hosts not all are connected", self.missing);
                Err(self.context.host_error(self.host, RequestError::new(ErrorKind::Unavailable, text)))
            }
            None => Ok(None),
        }
    }

    /// Whether a host that is not connected will be again, as far as one can tell: its agent, or this process, has just
    /// been started.
    fn others_may_come(&self) -> bool {
        let (app, at) = (&self.context.app, now());
        let away = |host: &HostId| *host != self.host && !app.agents.is_connected(*host);
        let is_late = |fleet: &Fleet| {
            let alive = |host: &HostId| {
                reconcile::liveness(fleet, *host, app.config.heartbeat_ms, at) != Liveness::Lost
            };
            fleet.hosts.keys().any(|host| away(host) && alive(host))
        };
        app.ledger.read(is_late) || self.context.hosts_may_come()
    }

    /// Hosts that are there, by their pools.
    fn other_pools(&self, fleet: &Fleet) -> BTreeMap<Uuid, Vec<HostId>> {
        let mut pools = BTreeMap::<Uuid, Vec<HostId>>::new();
        for host in fleet.hosts.keys().filter(|host| self.context.app.agents.is_connected(**host)) {
            let pool = fleet.pool_mark(*host);
            if *host != self.host && (pool.is_none() || pool != self.copy.pool) {
                pools.entry(pool.unwrap_or(host.0)).or_default().push(*host);
            }
        }
        pools
    }

    /// Records that the pool is to have the image, and returns that.
    async fn note(&self) -> Result<Image, StepError> {
        self.context
            .change(|fleet| {
                let image = fleet.images.get(&self.copy.image);
                let image = image.filter(|image| image.status == ImageStatus::Active);
                let image = image.ok_or_else(|| Error::not_found("Image", self.copy.image))?;
                let is_noted = fleet.image_copies.contains_key(&self.copy.map_key());
                let change = (!is_noted).then(|| self.copy.clone().into());
                Ok((change.into_iter().collect(), image.clone()))
            })
            .await
    }

    /// Records that the pool has all of it. One that it has by itself is not recorded.
    async fn note_whole(&self) -> Result<(), StepError> {
        self.context
            .change(|fleet| {
                let copy = fleet.image_copies.get(&self.copy.map_key()).filter(|copy| !copy.whole);
                let change = copy.map(|copy| ImageCopy { whole: true, ..copy.clone() }.into());
                Ok((change.into_iter().collect(), ()))
            })
            .await
    }
}
