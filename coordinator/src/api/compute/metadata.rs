//! A server's metadata, which its owner may change at any time; the guest sees it as it was at creation.

use super::Asked;
use super::servers::{changeable, visible};
use crate::api::attributes::Attributes;
use crate::api::context::Body;
use crate::api::fault::{Answer, Fault};
use crate::app::Shared;
use crate::ledger::now;
use crate::verbs;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::Json;
use serde_json::{Value, json};
use std::collections::BTreeMap;

type Pairs = BTreeMap<String, String>;

/// Texts by key, of a body's object; values of other kinds are refused.
pub(super) fn pairs(attributes: Attributes, what: &str) -> Answer<Pairs> {
    let texts = attributes.into_map().into_iter().map(|(key, value)| match value {
        Value::String(text) => Ok((key, text)),
        other => Err(Fault::bad_request(format!(
            "Invalid {what}: the value of '{key}' must be a string, not {other}."
        ))),
    });
    texts.collect()
}

async fn change(
    app: &Shared,
    asked: &Asked,
    id: &str,
    change: impl FnOnce(&mut Pairs) -> Answer<()>,
) -> Answer<Pairs> {
    let id = changeable(app, asked, id)?;
    app.ledger
        .change(|fleet| {
            let mut pairs = verbs::instance::find(fleet, id)?.metadata.clone();
            change(&mut pairs)?;
            verbs::instance::set_metadata(fleet, id, pairs, now()).map_err(Fault::from)
        })
        .await
}

/// GET /servers/{id}/metadata.
pub(super) async fn list(
    State(app): State<Shared>,
    asked: Asked,
    Path(id): Path<String>,
) -> Answer<Json<Value>> {
    let pairs = app.ledger.read(|fleet| visible(fleet, &asked, &id).map(|i| i.metadata.clone()))?;
    Ok(Json(json!({ "metadata": pairs })))
}

/// POST /servers/{id}/metadata: adds to what is there.
pub(super) async fn merge(
    State(app): State<Shared>,
    asked: Asked,
    Path(id): Path<String>,
    Body(body): Body<Value>,
) -> Answer<Json<Value>> {
    let new = pairs(Attributes::inside(body, "metadata")?, "metadata")?;
    let pairs = change(&app, &asked, &id, |pairs| {
        pairs.extend(new);
        Ok(())
    });
    Ok(Json(json!({ "metadata": pairs.await? })))
}

/// PUT /servers/{id}/metadata: instead of what is there.
pub(super) async fn replace(
    State(app): State<Shared>,
    asked: Asked,
    Path(id): Path<String>,
    Body(body): Body<Value>,
) -> Answer<Json<Value>> {
    let new = pairs(Attributes::inside(body, "metadata")?, "metadata")?;
    let pairs = change(&app, &asked, &id, |pairs| {
        *pairs = new;
        Ok(())
    });
    Ok(Json(json!({ "metadata": pairs.await? })))
}

/// GET /servers/{id}/metadata/{key}.
pub(super) async fn show(
    State(app): State<Shared>,
    asked: Asked,
    Path((id, key)): Path<(String, String)>,
) -> Answer<Json<Value>> {
    let value =
        app.ledger.read(|fleet| visible(fleet, &asked, &id).map(|i| i.metadata.get(&key).cloned()))?;
    let value = value.ok_or_else(|| Fault::not_found("Metadata item", &key))?;
    Ok(Json(json!({ "meta": { key: value } })))
}

/// PUT /servers/{id}/metadata/{key}.
pub(super) async fn set(
    State(app): State<Shared>,
    asked: Asked,
    Path((id, key)): Path<(String, String)>,
    Body(body): Body<Value>,
) -> Answer<Json<Value>> {
    let mut new = pairs(Attributes::inside(body, "meta")?, "meta")?;
    let value = new.remove(&key).filter(|_| new.is_empty());
    let value =
        value.ok_or_else(|| Fault::bad_request(format!("The body must hold '{key}' and nothing else.")))?;
    let (entry, text) = (key.clone(), value.clone());
    change(&app, &asked, &id, |pairs| {
        pairs.insert(entry, text);
        Ok(())
    })
    .await?;
    Ok(Json(json!({ "meta": { key: value } })))
}

/// DELETE /servers/{id}/metadata/{key}.
pub(super) async fn unset(
    State(app): State<Shared>,
    asked: Asked,
    Path((id, key)): Path<(String, String)>,
) -> Answer<StatusCode> {
    change(&app, &asked, &id, |pairs| {
        pairs.remove(&key).map(drop).ok_or_else(|| Fault::not_found("Metadata item", &key))
    })
    .await?;
    Ok(StatusCode::NO_CONTENT)
}
