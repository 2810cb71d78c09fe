//! What is attached to a server: its ports. Volumes and graphical consoles there are none, and nothing is plugged
//! in while it runs.

use super::servers::{changeable, visible};
use super::{Asked, not_built};
use crate::api::fault::{Answer, Fault};
use crate::app::Shared;
use crate::fleet::network::Port;
use axum::extract::{Path, State};
use axum::response::Json;
use serde_json::{Value, json};
use std::collections::HashMap;

fn view(asked: &Asked, port: &Port) -> Value {
    let ips = port.fixed_ips.iter().map(|ip| json!({ "subnet_id": ip.subnet, "ip_address": ip.address }));
    let mut view = json!({
        "port_id": port.id,
        "net_id": port.network,
        "mac_addr": port.mac.to_string(),
        "port_state": if port.host.is_some() { "ACTIVE" } else { "DOWN" },
        "fixed_ips": ips.collect::<Vec<_>>(),
    });
    if asked.since(70) {
        view["tag"] = Value::Null;
    }
    view
}

/// GET /servers/{id}/os-interface.
pub(super) async fn interfaces(
    State(app): State<Shared>,
    asked: Asked,
    Path(id): Path<String>,
) -> Answer<Json<Value>> {
    app.ledger.read(|fleet| {
        let instance = visible(fleet, &asked, &id)?.id;
        let views: Vec<Value> = fleet.ports_of(instance).into_iter().map(|p| view(&asked, p)).collect();
        Ok(Json(json!({ "interfaceAttachments": views })))
    })
}

/// GET /servers/{id}/os-interface/{port}.
pub(super) async fn interface(
    State(app): State<Shared>,
    asked: Asked,
    Path((id, port)): Path<(String, String)>,
) -> Answer<Json<Value>> {
    app.ledger.read(|fleet| {
        let instance = visible(fleet, &asked, &id)?.id;
        let found = fleet.ports_of(instance).into_iter().find(|p| p.id.to_string() == port);
        let found = found.ok_or_else(|| Fault::not_found("Port", &port))?;
        Ok(Json(json!({ "interfaceAttachment": view(&asked, found) })))
    })
}

/// POST /servers/{id}/os-interface, DELETE …/{port}.
pub(super) async fn no_hotplug(
    State(app): State<Shared>,
    asked: Asked,
    Path(path): Path<HashMap<String, String>>,
) -> Answer<Json<Value>> {
    changeable(&app, &asked, path.get("id").map_or("", String::as_str))?;
    Err(not_built("Plugging a port in or out", "Create the server with the ports it shall have."))
}

/// GET /servers/{id}/os-volume_attachments.
pub(super) async fn volumes(
    State(app): State<Shared>,
    asked: Asked,
    Path(id): Path<String>,
) -> Answer<Json<Value>> {
    app.ledger.read(|fleet| visible(fleet, &asked, &id).map(drop))?;
    Ok(Json(json!({ "volumeAttachments": [] })))
}

/// POST /servers/{id}/os-volume_attachments.
pub(super) async fn no_volumes(
    State(app): State<Shared>,
    asked: Asked,
    Path(id): Path<String>,
) -> Answer<Json<Value>> {
    changeable(&app, &asked, &id)?;
    Err(not_built("Attaching a volume", "Choose a flavor whose disk is large enough."))
}

/// POST /servers/{id}/remote-consoles.
pub(super) async fn no_consoles(
    State(app): State<Shared>,
    asked: Asked,
    Path(id): Path<String>,
) -> Answer<Json<Value>> {
    changeable(&app, &asked, &id)?;
    Err(not_built("A graphical console", "Read the serial console's log: os-getConsoleOutput."))
}
