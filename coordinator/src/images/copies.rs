//! What other pools have of images goes with the images: also on hosts that are away when an image is deleted, once they
//! are back; and so goes what came of an image for nobody who still wants it.

use crate::app::Shared;
use crate::fleet::image::ImageCopy;
use crate::fleet::instance::InstanceStatus;
use crate::fleet::{Change, Fleet};
use crate::store::StoreError;
use godwit_protocol::id::{HostId, ImageId};
use godwit_protocol::request::{AgentReply, AgentRequest};
use std::collections::{BTreeMap, HashMap};
use std::time::Duration;
use tokio::task::{AbortHandle, JoinSet};
use uuid::Uuid;

/// Pools that are asked at once. A host whose pool stands still takes half a minute to say so, and one that hangs two
/// minutes to be given up.
const MAX_AT_ONCE: usize = 64;

/// Looks at all copies until the process ends. Each pool has a task of its own, so that none waits for another's host.
pub async fn run(app: Shared) {
    let heartbeat = Duration::from_millis(app.config.heartbeat_ms);
    let mut tasks = JoinSet::new();
    let mut under_way = HashMap::<Uuid, AbortHandle>::new();
    let mut last = Uuid::nil();
    loop {
        tokio::time::sleep(heartbeat).await;
        while tasks.try_join_next().is_some() {}
        under_way.retain(|_, task| !task.is_finished());
        let mut due: Vec<_> = app.ledger.read(due).into_iter().collect();
        // Where there are too many, those that had no turn come first.
        let after_last = due.partition_point(|(pool, _)| *pool <= last);
        due.rotate_left(after_last);
        for (pool, copies) in due {
            if under_way.len() < MAX_AT_ONCE && !under_way.contains_key(&pool) {
                under_way.insert(pool, tasks.spawn(settle_all(app.clone(), copies)));
                last = pool;
            }
        }
    }
}

/// Looks at the copies of one pool.
async fn settle_all(app: Shared, copies: Vec<ImageCopy>) {
    for copy in copies {
        if let Err(error) = settle(&app, &copy).await {
            tracing::error!(image = %copy.image, %error, "what another pool has of it is looked at again");
        }
    }
}

/// Copies of images that are gone, and what has come of others and is wanted by nobody; by their pools.
fn due(fleet: &Fleet) -> BTreeMap<Uuid, Vec<ImageCopy>> {
    let mut due = BTreeMap::<Uuid, Vec<ImageCopy>>::new();
    for copy in fleet.image_copies.values().filter(|copy| is_due(fleet, copy)) {
        due.entry(copy.pool.unwrap_or(copy.host.0)).or_default().push(copy.clone());
    }
    due
}

fn is_due(fleet: &Fleet, copy: &ImageCopy) -> bool {
    !fleet.images.contains_key(&copy.image) || !copy.whole && !is_wanted(fleet, copy.image)
}

fn is_wanted(fleet: &Fleet, image: ImageId) -> bool {
    let mut instances = fleet.instances.values();
    instances.any(|instance| instance.image.image == image && instance.status == InstanceStatus::Building)
}

/// Asks a host of the pool to remove it, and notes what is left: of an image that is not deleted, all of it may have come
/// just before the coordinator stopped.
async fn settle(app: &Shared, copy: &ImageCopy) -> Result<(), StoreError> {
    let flight = app.images.flights.of(copy);
    // Somebody brings it.
    let Ok(_turn) = flight.turn.try_lock() else { return Ok(()) };
    let key = copy.map_key();
    let now = |fleet: &Fleet| {
        let copy = fleet.image_copies.get(&key).filter(|copy| is_due(fleet, copy))?;
        Some((!fleet.images.contains_key(&copy.image), hosts(fleet, copy)))
    };
    let Some((whole, hosts)) = app.ledger.read(now) else { return Ok(()) };
    let is_there = match hosts.iter().find(|host| app.agents.is_connected(**host)) {
        // Nobody will come back who could. A host that has another pool for now may have this one again.
        None if !app.ledger.read(|fleet| hosts.is_empty() && !fleet.hosts.contains_key(&copy.host)) => {
            return Ok(());
        }
        None => false,
        Some(host) => {
            let request = AgentRequest::DropImage { image: copy.image, whole };
            match app.agents.call(*host, request).await {
                Ok(AgentReply::Image { used_bytes }) => used_bytes.is_some(),
                Ok(_) => return Ok(()),
                Err(error) => {
                    tracing::debug!(image = %copy.image, %host, %error, "its copy is removed later");
                    return Ok(());
                }
            }
        }
    };
    app.ledger
        .change(|fleet| {
            let Some(copy) = fleet.image_copies.get(&key) else { return Ok((vec![], ())) };
            let change = match is_there && !whole {
                true => ImageCopy { whole: true, ..copy.clone() }.into(),
                false => Change::gone(copy),
            };
            Ok((vec![change], ()))
        })
        .await
}

/// Hosts that have the pool, as far as is known.
fn hosts(fleet: &Fleet, copy: &ImageCopy) -> Vec<HostId> {
    let has = |host: &HostId| match copy.pool {
        Some(pool) => fleet.pool_mark(*host) == Some(pool),
        None => *host == copy.host,
    };
    fleet.hosts.keys().copied().filter(has).collect()
}
