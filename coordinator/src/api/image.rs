//! The image API, v2.

mod body;
mod data;
mod list;
mod patch;
mod schema;

use crate::api::context::{Body, Caller, Links};
use crate::api::fault::{Answer, Fault};
use crate::app::Shared;
use crate::error::Error;
use crate::fleet::image::{Image, ImageStatus, Visibility};
use crate::fleet::instance::InstanceStatus;
use crate::fleet::{Change, Fleet};
use crate::ledger::now;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use godwit_protocol::id::ImageId;
use serde_json::{Map, Value, json};

/// Its routes, below `/image`.
pub fn router() -> Router<Shared> {
    Router::new()
        .route("/", get(roots))
        .route("/versions", get(versions))
        .route("/v2", get(versions))
        .route("/v2/images", get(list::list).post(create))
        .route("/v2/images/{id}", get(show).patch(patch::patch).delete(delete))
        .route("/v2/images/{id}/file", get(data::download).put(data::upload))
        .route("/v2/images/{id}/tags/{tag}", axum::routing::put(add_tag).delete(remove_tag))
        .route("/v2/schemas/image", get(schema::image))
        .route("/v2/schemas/images", get(schema::images))
}

/// Newest minor version; clients find in it what they may ask for.
const NEWEST: u32 = 9;

fn version_list(links: &Links) -> Value {
    let version = |minor: u32| {
        json!({
            "id": format!("v2.{minor}"),
            "status": if minor == NEWEST { "CURRENT" } else { "SUPPORTED" },
            "links": [{ "rel": "self", "href": links.to("/image/v2/") }],
        })
    };
    json!({ "versions": (0..=NEWEST).rev().map(version).collect::<Vec<_>>() })
}

async fn roots(links: Links) -> Response {
    (StatusCode::MULTIPLE_CHOICES, Json(version_list(&links))).into_response()
}

async fn versions(links: Links) -> Json<Value> {
    Json(version_list(&links))
}

/// Whether a user may see an image that they name.
fn sees(caller: &Caller, image: &Image) -> bool {
    matches!(image.visibility, Visibility::Public | Visibility::Community) || caller.sees(image.project)
}

/// The image that a path names, if the user may see it. A name where an id is wanted is not found: clients then list.
fn find<'a>(fleet: &'a Fleet, caller: &Caller, key: &str) -> Result<&'a Image, Error> {
    let image = key.parse().ok().and_then(|id: ImageId| fleet.images.get(&id));
    image.filter(|image| sees(caller, image)).ok_or_else(|| Error::not_found("Image", key))
}

/// The same, if the user may also change it.
fn find_own<'a>(fleet: &'a Fleet, caller: &Caller, key: &str) -> Result<&'a Image, Error> {
    let image = find(fleet, caller, key)?;
    if caller.sees(image.project) {
        Ok(image)
    } else {
        Err(Error::Forbidden(format!("Image {} belongs to another project.", image.id)))
    }
}

/// What stands against an image's name, formats and labels, wherever they come from.
fn validate(caller: &Caller, image: &Image) -> Result<(), Error> {
    if image.visibility == Visibility::Public && !caller.is_admin() {
        return Err(Error::Forbidden("Only an administrator may make an image public.".into()));
    }
    if image.properties.len() > body::MAX_PROPERTIES {
        return Err(Error::Invalid(format!("An image may have {} properties.", body::MAX_PROPERTIES)));
    }
    Ok(())
}

async fn create(State(app): State<Shared>, caller: Caller, Body(body): Body<Map<String, Value>>) -> Answer {
    caller.require_member()?;
    let mut image = body::empty(caller.project, now());
    for (key, value) in body {
        body::set(&mut image, &caller, &key, value, true)?;
    }
    let image = app
        .ledger
        .change(|fleet| {
            validate(&caller, &image)?;
            if fleet.images.contains_key(&image.id) {
                return Err(Error::Conflict(format!("There is an image {} already.", image.id)));
            }
            Ok::<_, Error>((vec![image.clone().into()], image))
        })
        .await?;
    let location = [("location", format!("/v2/images/{}", image.id))];
    Ok((StatusCode::CREATED, location, Json(body::show(&image))).into_response())
}

async fn show(State(app): State<Shared>, caller: Caller, Path(id): Path<String>) -> Answer<Json<Value>> {
    Ok(Json(app.ledger.read(|fleet| find(fleet, &caller, &id).map(body::show))?))
}

/// The record goes first, then the bytes: a crash between the two leaves a file that nobody names, never an image
/// without its file. What other pools have of it goes as soon as their hosts answer.
async fn delete(State(app): State<Shared>, caller: Caller, Path(id): Path<String>) -> Answer<StatusCode> {
    caller.require_member()?;
    let gone = app
        .ledger
        .change(|fleet| {
            let image = find_own(fleet, &caller, &id)?;
            if image.protected {
                return Err(Error::Forbidden(format!(
                    "Image {id} is protected and cannot be deleted; unset protected first."
                )));
            }
            let user = fleet.instances.values().find(|instance| {
                instance.image.image == image.id && instance.status == InstanceStatus::Building
            });
            if let Some(instance) = user {
                return Err(Error::Conflict(format!(
                    "Image {id} is in use: instance {} is being made from it.",
                    instance.id
                )));
            }
            let damage = fleet.damages.get(&image.id).map(Change::gone);
            Ok::<_, Error>((damage.into_iter().chain([Change::gone(image)]).collect(), image.id))
        })
        .await?;
    app.images.remove(gone).await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn add_tag(
    State(app): State<Shared>,
    caller: Caller,
    Path((id, tag)): Path<(String, String)>,
) -> Answer<StatusCode> {
    change_tags(&app, &caller, &id, |tags| {
        body::check_tag(&tag)?;
        if !tags.contains(&tag) {
            tags.push(tag);
        }
        Ok(())
    })
    .await
}

async fn remove_tag(
    State(app): State<Shared>,
    caller: Caller,
    Path((id, tag)): Path<(String, String)>,
) -> Answer<StatusCode> {
    change_tags(&app, &caller, &id, |tags| {
        let index = tags.iter().position(|t| *t == tag).ok_or_else(|| Error::not_found("Tag", &tag))?;
        tags.remove(index);
        Ok(())
    })
    .await
}

async fn change_tags(
    app: &Shared,
    caller: &Caller,
    id: &str,
    change: impl FnOnce(&mut Vec<String>) -> Result<(), Error>,
) -> Answer<StatusCode> {
    caller.require_member()?;
    app.ledger
        .change(|fleet| {
            let mut image = find_own(fleet, caller, id)?.clone();
            change(&mut image.tags)?;
            image.updated_at = now();
            Ok::<_, Error>((vec![image.into()], ()))
        })
        .await?;
    Ok(StatusCode::NO_CONTENT)
}

/// An image's bytes are only there when it is active.
fn is_active(image: &Image) -> bool {
    image.status == ImageStatus::Active
}

/// A refusal in the image service's words: no room is "too large" there.
fn fault(error: Error) -> Fault {
    match error {
        Error::Exhausted(_) => Fault::from(error).with_status(StatusCode::PAYLOAD_TOO_LARGE),
        other => other.into(),
    }
}

#[cfg(test)]
mod tests;
