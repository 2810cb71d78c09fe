//! Key pairs.

use super::page::Page;
use super::{Asked, fraction_text};
use crate::api::attributes::Attributes;
use crate::api::context::{Body, Params};
use crate::api::fault::{Answer, Fault};
use crate::app::Shared;
use crate::fleet::identity::KeyPair;
use crate::ledger::now;
use crate::verbs::keypair;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Json, Response};
use godwit_protocol::id::UserId;
use serde_json::{Value, json};

fn view(asked: &Asked, pair: &KeyPair) -> Value {
    let mut view =
        json!({ "name": pair.name, "public_key": pair.public_key, "fingerprint": pair.fingerprint });
    if asked.since(2) {
        view["type"] = "ssh".into();
    }
    view
}

/// The user whose key pairs are meant: the caller, or whom an administrator names from 2.10 on.
fn whose(asked: &Asked, named: Option<&str>) -> Answer<UserId> {
    let Some(named) = named.filter(|_| asked.since(10)) else { return Ok(asked.caller.user) };
    let user = named
        .parse()
        .map_err(|_| Fault::bad_request(format!("user_id must be a user's id, not {named}.")))?;
    if user == asked.caller.user || asked.caller.is_admin() {
        return Ok(user);
    }
    Err(Fault::forbidden("Only an administrator may see or change other users' key pairs."))
}

/// GET /os-keypairs.
pub(super) async fn list(State(app): State<Shared>, asked: Asked, params: Params) -> Answer<Json<Value>> {
    let user = whose(&asked, params.get("user_id"))?;
    let pairs: Vec<KeyPair> =
        app.ledger.read(|fleet| fleet.keypairs.values().filter(|k| k.user == user).cloned().collect());
    let wrap = |pair: &KeyPair| json!({ "keypair": view(&asked, pair) });
    if !asked.since(35) {
        return Ok(Json(json!({ "keypairs": pairs.iter().map(wrap).collect::<Vec<_>>() })));
    }
    let page = Page::cut(pairs, &params, |k| k.name.clone())?;
    let views = page.items.iter().map(wrap).collect();
    Ok(Json(page.body(&asked, "keypairs", "/os-keypairs", views)))
}

/// GET /os-keypairs/{name}.
pub(super) async fn show(
    State(app): State<Shared>,
    asked: Asked,
    Path(name): Path<String>,
    params: Params,
) -> Answer<Json<Value>> {
    let user = whose(&asked, params.get("user_id"))?;
    let pair = app.ledger.read(|fleet| keypair::find(fleet, user, &name).cloned())?;
    let mut view = view(&asked, &pair);
    view["user_id"] = json!(pair.user);
    view["created_at"] = fraction_text(pair.created_at).into();
    view["updated_at"] = Value::Null;
    view["deleted_at"] = Value::Null;
    view["deleted"] = false.into();
    view["id"] = number(&pair).into();
    Ok(Json(json!({ "keypair": view })))
}

/// A number for clients that want one: key pairs are known by name, so the fingerprint gives it.
fn number(pair: &KeyPair) -> u32 {
    let digits: String = pair.fingerprint.chars().filter(char::is_ascii_hexdigit).take(7).collect();
    u32::from_str_radix(&digits, 16).unwrap_or_default()
}

/// POST /os-keypairs.
pub(super) async fn create(
    State(app): State<Shared>,
    asked: Asked,
    Body(body): Body<Value>,
) -> Answer<Response> {
    asked.caller.require_member()?;
    let mut a = Attributes::inside(body, "keypair")?;
    let name = a.required_text("name")?;
    if asked.since(2) {
        a.inert("type", &[json!("ssh")])?;
    }
    let user = if asked.since(10) { a.text("user_id")? } else { None };
    let user = whose(&asked, user.as_deref())?;
    let given = a.text("public_key")?;
    a.finish()?;
    let (private, public) = match given {
        Some(public) => (None, public),
        None => {
            let (private, public) = keypair::generate()?;
            (Some(private), public)
        }
    };
    let pair = app.ledger.change(|fleet| keypair::create(fleet, user, name, &public, now())).await?;
    let mut view = view(&asked, &pair);
    view["user_id"] = json!(pair.user);
    if let Some(private) = private {
        view["private_key"] = private.into();
    }
    let status = if asked.since(2) { StatusCode::CREATED } else { StatusCode::OK };
    Ok((status, Json(json!({ "keypair": view }))).into_response())
}

/// DELETE /os-keypairs/{name}.
pub(super) async fn delete(
    State(app): State<Shared>,
    asked: Asked,
    Path(name): Path<String>,
    params: Params,
) -> Answer<StatusCode> {
    asked.caller.require_member()?;
    let user = whose(&asked, params.get("user_id"))?;
    app.ledger.change(|fleet| keypair::delete(fleet, user, &name)).await?;
    Ok(if asked.since(2) { StatusCode::NO_CONTENT } else { StatusCode::ACCEPTED })
}
