//! Images whose bytes on a pool are not those that were uploaded, as downloads and hosts have found them: told to
//! operators, and kept until the image is deleted, or comes down whole again.

use super::download::Broken;
use crate::app::App;
use crate::error::Error;
use crate::fleet::Change;
use crate::fleet::image::Damage;
use crate::ledger::now;
use crate::store::StoreError;
use godwit_protocol::error::chain;
use godwit_protocol::event::EventKind;
use godwit_protocol::id::{HostId, ImageId};
use std::io;

/// Tells the log why a download ended early, and operators of an image that is damaged.
pub(super) async fn note(app: &App, image: ImageId, broken: &Broken) {
    tracing::error!(%image, "a download was ended: {}", chain(broken));
    if let Broken::Damaged(how) = broken {
        keep(app, image, app.config.pool.to_string_lossy().into_owned(), how).await;
    }
}

/// Tells operators of an image whose copy in the pool of `host` is damaged, as a host has found.
pub async fn note_on_host(app: &App, image: ImageId, host: HostId, how: &str) {
    tracing::error!(%image, %host, "its copy there is damaged: {how}");
    let pool = app.ledger.read(|fleet| Some(fleet.pools_of(host).first()?.path.clone()));
    keep(app, image, pool.unwrap_or_default(), how).await;
}

/// Keeps how an image is damaged, and tells of it as an event.
async fn keep(app: &App, image: ImageId, pool: String, how: &str) {
    let noted = app.ledger.change(|fleet| {
        let known = fleet.damages.get(&image).is_some_and(|damage| damage.how == *how);
        let is_news = fleet.images.contains_key(&image) && !known;
        let damage = is_news.then(|| Damage { image, how: how.to_owned(), found_at: now() });
        Ok::<_, StoreError>((damage.into_iter().map(Change::from).collect(), ()))
    });
    if let Err(error) = noted.await {
        tracing::error!(%image, %error, "that it is damaged is not kept");
    }
    let at_ms = u64::try_from(now().unix_timestamp_nanos() / 1_000_000).unwrap_or_default();
    app.events.note(at_ms, EventKind::ImageDamaged, pool, format!("image {image}: {how}"));
}

/// The same, before the first byte was sent: what the user is told.
pub(super) async fn refuse(app: &App, image: ImageId, broken: Broken) -> Error {
    note(app, image, &broken).await;
    let what = match &broken {
        Broken::Damaged(_) => {
            format!("The data of image {image} is damaged on the pool. Upload it again as another image.")
        }
        Broken::Read(_) => format!("The data of image {image} could not be read from the pool."),
    };
    Error::Pool { what, source: io::Error::other(broken) }
}

/// All of an image was found to be what was uploaded.
pub(super) async fn clear(app: &App, image: ImageId) {
    if !app.ledger.read(|fleet| fleet.damages.contains_key(&image)) {
        return;
    }
    let cleared = app.ledger.change(|fleet| {
        let gone = fleet.damages.get(&image).map(Change::gone);
        Ok::<_, StoreError>((gone.into_iter().collect(), ()))
    });
    match cleared.await {
        Ok(()) => tracing::info!(%image, "an image that was damaged is whole again"),
        Err(error) => tracing::error!(%image, %error, "that it is whole again is not kept"),
    }
}
