//! `…/tags`: the labels of networks, subnets, ports and security groups, read and set alike for all of them.

use super::tags_of;
use crate::api::context::{Body, Caller};
use crate::api::fault::Answer;
use crate::app::Shared;
use crate::fleet::{Change, Fleet};
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::Json;
use axum::routing::{MethodRouter, get};
use serde_json::{Value, json};

/// The labels of an object that the caller names.
type Read = fn(&Fleet, &Caller, &str) -> Answer<Vec<String>>;

/// Gives it other labels, and says which it has then. No host hears of them.
type Write = fn(&Fleet, &Caller, &str, Vec<String>) -> Answer<(Vec<Change>, Vec<String>)>;

/// GET, PUT and DELETE of one kind of object's labels.
pub(super) fn routes(read: Read, write: Write) -> MethodRouter<Shared> {
    let show = move |State(app): State<Shared>, caller: Caller, Path(id): Path<String>| async move {
        let tags = app.ledger.read(|fleet| read(fleet, &caller, &id))?;
        Answer::Ok(Json(json!({ "tags": tags })))
    };
    let set = move |State(app): State<Shared>,
                    caller: Caller,
                    Path(id): Path<String>,
                    Body(body): Body<Value>| async move {
        let tags = apply(&app, &caller, &id, tags_of(body)?, write).await?;
        Answer::Ok(Json(json!({ "tags": tags })))
    };
    let clear = move |State(app): State<Shared>, caller: Caller, Path(id): Path<String>| async move {
        apply(&app, &caller, &id, vec![], write).await?;
        Answer::Ok(StatusCode::NO_CONTENT)
    };
    get(show).put(set).delete(clear)
}

async fn apply(
    app: &Shared,
    caller: &Caller,
    id: &str,
    tags: Vec<String>,
    write: Write,
) -> Answer<Vec<String>> {
    app.ledger.change(|fleet| write(fleet, caller, id, tags)).await
}
