//! POST /servers/{id}/action: one action a body.

use super::create::{self, find_flavor, find_host};
use super::servers::{changeable, visible};
use super::{Asked, not_built};
use crate::api::attributes::Attributes;
use crate::api::context::Body;
use crate::api::fault::{Answer, Fault};
use crate::app::Shared;
use crate::ledger::now;
use crate::operations::resize_instance::{self, Wanted};
use crate::operations::{confirm_resize, live_migrate, power, revert_resize};
use crate::verbs::port::{self, PortUpdate};
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Json, Response};
use godwit_protocol::error::{ErrorKind, RequestError};
use godwit_protocol::id::InstanceId;
use godwit_protocol::request::{AgentReply, AgentRequest};
use serde_json::{Value, json};
use std::collections::BTreeSet;

/// Actions that the API knows and Godwit does not do, and what to do instead.
const NOT_BUILT: [(&str, &str); 22] = [
    ("createImage", "Stop the server and copy its data, or build the image elsewhere and upload it."),
    ("createBackup", "Stop the server and copy its data."),
    ("rebuild", "Delete the server and create it again."),
    ("rescue", "Read its console log, or reboot it."),
    ("unrescue", "Nothing is ever rescued."),
    ("suspend", "Pause it, or stop it."),
    ("resume", "A paused server is unpaused."),
    ("shelve", "Stop it."),
    ("shelveOffload", "Stop it."),
    ("unshelve", "Nothing is ever shelved."),
    ("lock", "Leave the role of member to those who may change it."),
    ("unlock", "Nothing is ever locked."),
    ("evacuate", "Nothing is restarted elsewhere while its host may still run it."),
    ("changePassword", "Use an SSH key."),
    ("addFixedIp", "Make a port with the address and create the server with it."),
    ("removeFixedIp", "Create the server with the ports it shall have."),
    ("addFloatingIp", "There are no routers and so no floating addresses."),
    ("removeFloatingIp", "There are no routers and so no floating addresses."),
    ("os-resetState", "A server's state is its host's word; delete the server if it is of no use."),
    ("os-getVNCConsole", "Read the console log: os-getConsoleOutput."),
    ("forceDelete", "Delete it; that is enough."),
    ("restore", "What is deleted is gone."),
];

/// POST /servers/{id}/action.
pub(super) async fn act(
    State(app): State<Shared>,
    asked: Asked,
    Path(id): Path<String>,
    Body(body): Body<Value>,
) -> Answer<Response> {
    let action = Attributes::of(body, "the request's body")?.into_map();
    let mut entries = action.into_iter();
    let (Some((name, argument)), None) = (entries.next(), entries.next()) else {
        return Err(Fault::bad_request("The body must hold one action."));
    };
    let id = changeable(&app, &asked, &id)?;
    match name.as_str() {
        "os-start" => power::start(&app, id).await?,
        "os-stop" => power::stop(&app, id).await?,
        "pause" => power::pause(&app, id, true).await?,
        "unpause" => power::pause(&app, id, false).await?,
        "reboot" => power::reboot(&app, id, is_hard(argument)?).await?,
        "resize" => resize(&app, &asked, id, argument).await?,
        "migrate" => migrate(&app, &asked, id, argument).await?,
        "confirmResize" => {
            confirm_resize::request(&app, id).await?;
            return Ok(StatusCode::NO_CONTENT.into_response());
        }
        "revertResize" => revert_resize::request(&app, id).await?,
        "os-migrateLive" => migrate_live(&app, &asked, id, argument).await?,
        "os-getConsoleOutput" => return console(&app, &asked, id, argument).await,
        "addSecurityGroup" => regroup(&app, &asked, id, argument, true).await?,
        "removeSecurityGroup" => regroup(&app, &asked, id, argument, false).await?,
        other => {
            let known = NOT_BUILT.iter().find(|(name, _)| *name == other);
            return Err(match known {
                Some((name, instead)) => not_built(name, instead),
                None => Fault::bad_request(format!("There is no such action: {other}")),
            });
        }
    }
    Ok(StatusCode::ACCEPTED.into_response())
}

/// Gives a security group to every port of a server, or takes it away.
async fn regroup(app: &Shared, asked: &Asked, id: InstanceId, argument: Value, add: bool) -> Answer<()> {
    let mut a = Attributes::of(argument, "the security group")?;
    let name = a.required_text("name")?;
    a.finish()?;
    let networks = app
        .ledger
        .change(|fleet| {
            let group = create::find_group(fleet, &asked.caller, &name)?;
            let (mut changes, mut networks) = (Vec::new(), BTreeSet::new());
            let mut has = false;
            for port in fleet.ports_of(id).into_iter().filter(|p| p.port_security) {
                let mut groups = port.security_groups.clone().unwrap_or_default();
                has |= groups.contains(&group);
                groups.retain(|g| *g != group);
                groups.extend(add.then_some(group));
                let change = PortUpdate { security_groups: Some(groups), ..PortUpdate::default() };
                let (changed, (_, tell)) = port::update(fleet, port.id, change, now())?;
                networks.extend(tell.then_some(port.network));
                changes.extend(changed);
            }
            if !add && !has {
                return Err(Fault::new(
                    StatusCode::NOT_FOUND,
                    format!("Security group {name} is not associated with the instance {id}."),
                ));
            }
            Ok((changes, networks))
        })
        .await?;
    networks.into_iter().for_each(|network| app.l2_changed(network));
    Ok(())
}

fn is_hard(argument: Value) -> Answer<bool> {
    let mut a = Attributes::of(argument, "reboot")?;
    let kind = a.required_text("type")?;
    a.finish()?;
    match kind.to_ascii_uppercase().as_str() {
        "HARD" => Ok(true),
        "SOFT" => Ok(false),
        _ => Err(Fault::bad_request(format!("Invalid reboot type '{kind}': it is HARD or SOFT."))),
    }
}

async fn resize(app: &Shared, asked: &Asked, id: InstanceId, argument: Value) -> Answer<()> {
    let mut a = Attributes::of(argument, "resize")?;
    let flavor = a.required_text("flavorRef")?;
    a.inert("OS-DCF:diskConfig", &[json!("MANUAL")])?;
    a.finish()?;
    let flavor = app.ledger.read(|fleet| find_flavor(fleet, &asked.caller, &flavor).cloned())?;
    resize_instance::request(app, id, Wanted::Flavor(flavor), asked.caller.user).await?;
    Ok(())
}

/// A cold migration.
async fn migrate(app: &Shared, asked: &Asked, id: InstanceId, argument: Value) -> Answer<()> {
    asked.caller.require_admin()?;
    let host = match argument {
        Value::Null => None,
        argument if asked.since(56) => {
            let mut a = Attributes::of(argument, "migrate")?;
            if !a.has("host") {
                return Err(Fault::bad_request("'host' is a required property."));
            }
            let host = a.text("host")?;
            a.finish()?;
            host
        }
        // Before, whatever stands there means nothing.
        _ => None,
    };
    let target = host.map(|name| app.ledger.read(|fleet| find_host(fleet, &name))).transpose()?;
    resize_instance::request(app, id, Wanted::Host(target), asked.caller.user).await?;
    Ok(())
}

async fn migrate_live(app: &Shared, asked: &Asked, id: InstanceId, argument: Value) -> Answer<()> {
    asked.caller.require_admin()?;
    let mut a = Attributes::of(argument, "os-migrateLive")?;
    let host = a.text("host")?;
    // Disks are on the pool that both hosts share: they are not copied, and nothing can be overcommitted.
    let mut harmless = vec![json!(false), json!("False")];
    if asked.since(25) {
        harmless.push(json!("auto"));
    } else {
        a.inert("disk_over_commit", &harmless)?;
    }
    if let Some(value) = a.take("block_migration").filter(|value| !harmless.contains(value)) {
        return Err(Fault::bad_request(format!(
            "block_migration = {value} is not supported here: the disk of a server that runs is not copied. Leave it out, \
             or migrate the server cold, which takes its disk along."
        )));
    }
    if asked.since(30) && !asked.since(68) {
        a.inert("force", &[json!(false), json!("False")])?;
    }
    a.finish()?;
    let target = host.map(|name| app.ledger.read(|fleet| find_host(fleet, &name))).transpose()?;
    live_migrate::request(app, id, target, asked.caller.user).await?;
    Ok(())
}

async fn console(app: &Shared, asked: &Asked, id: InstanceId, argument: Value) -> Answer<Response> {
    let mut a = match argument {
        Value::Null => Attributes::of(json!({}), "os-getConsoleOutput")?,
        argument => Attributes::of(argument, "os-getConsoleOutput")?,
    };
    // -1 is how clients ask for all of it.
    let lines = match a.take("length") {
        Some(Value::Number(length)) if length.as_i64() == Some(-1) => None,
        Some(Value::String(length)) if length == "-1" => None,
        Some(length) => Some(lines(&length).ok_or_else(|| {
            Fault::bad_request(format!("length must be a whole number or -1, not {length}."))
        })?),
        None => None,
    };
    a.finish()?;
    let host = app.ledger.read(|fleet| visible(fleet, asked, &id.to_string()).map(|i| i.host))?;
    let host = host.ok_or_else(|| {
        Fault::new(StatusCode::CONFLICT, format!("Instance {id} is not ready: it is on no host yet."))
    })?;
    match app.agents.call(host, AgentRequest::Console { instance: id, lines }).await {
        Ok(AgentReply::Console(output)) => Ok(Json(json!({ "output": output })).into_response()),
        Ok(_) => Err(Fault::new(StatusCode::INTERNAL_SERVER_ERROR, "The host answered something else.")),
        Err(error) => Err(of_host(&error)),
    }
}

fn lines(length: &Value) -> Option<u32> {
    let number = length.as_u64().or_else(|| length.as_str()?.trim().parse().ok());
    number.and_then(|n| u32::try_from(n).ok())
}

/// A host's refusal as a status.
fn of_host(error: &RequestError) -> Fault {
    let status = match error.kind {
        ErrorKind::NotFound => StatusCode::NOT_FOUND,
        ErrorKind::Refused | ErrorKind::Conflict | ErrorKind::NoSpace | ErrorKind::Cancelled => {
            StatusCode::CONFLICT
        }
        ErrorKind::Invalid => StatusCode::BAD_REQUEST,
        ErrorKind::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
        ErrorKind::Damaged | ErrorKind::Internal => StatusCode::INTERNAL_SERVER_ERROR,
    };
    Fault::new(status, format!("The server's host could not answer: {error}."))
}
