//! The extensions that are truly there; clients steer by them.

use crate::api::context::Caller;
use crate::api::fault::{Answer, Fault};
use axum::extract::Path;
use axum::response::Json;
use serde_json::{Value, json};

/// Alias and what it says.
const EXTENSIONS: [(&str, &str); 20] = [
    ("agent", "Hosts and their agents are listed"),
    ("allowed-address-pairs", "Ports may send from more addresses than their own"),
    ("binding", "Ports tell the host they are plugged in on"),
    ("external-net", "Networks tell whether they lead outside; none does"),
    ("filter-validation", "A filter that is not known is refused"),
    ("net-mtu", "Networks tell their MTU"),
    ("net-mtu-writable", "A network's MTU may be set"),
    ("pagination", "Lists may be asked for page by page"),
    ("port-security", "Ports send from their own addresses only, unless told otherwise"),
    ("project-id", "Owners are told as project_id"),
    ("provider", "Networks tell administrators what carries them"),
    ("quota_details", "Quotas tell what is used"),
    ("quotas", "Quotas are told; only security groups have a limit"),
    ("security-group", "Rules say what may pass at ports"),
    ("sorting", "Lists may be sorted"),
    ("stateful-security-group", "Security groups may be stateless"),
    ("standard-attr-description", "Everything has a description"),
    ("standard-attr-revisions", "Everything counts its changes"),
    ("standard-attr-tag", "Everything has tags"),
    ("standard-attr-timestamp", "Everything tells when it was made and changed"),
];

fn view((alias, description): (&str, &str)) -> Value {
    json!({
        "alias": alias,
        "name": alias,
        "description": description,
        "updated": "2026-01-01T00:00:00Z",
        "links": [],
    })
}

/// GET /extensions.
pub(super) async fn list(_: Caller) -> Json<Value> {
    Json(json!({ "extensions": EXTENSIONS.map(view) }))
}

/// GET /extensions/{alias}.
pub(super) async fn show(_: Caller, Path(alias): Path<String>) -> Answer<Json<Value>> {
    let found = EXTENSIONS.into_iter().find(|(known, _)| *known == alias);
    let found = found.ok_or_else(|| Fault::not_found("Extension", alias))?;
    Ok(Json(json!({ "extension": view(found) })))
}
