//! The whole installation in one view.

use super::hosts::summary;
use crate::api::context::Caller;
use crate::api::fault::Answer;
use crate::app::Shared;
use crate::drift;
use crate::fleet::Fleet;
use crate::fleet::host::Host;
use crate::fleet::instance::InstanceStatus;
use crate::fleet::operation::Operation;
use axum::Json;
use axum::extract::State;
use serde_json::{Value, json};

/// GET /status.
pub(super) async fn show(State(app): State<Shared>, caller: Caller) -> Answer<Json<Value>> {
    caller.require_admin()?;
    Ok(Json(app.ledger.read(|fleet| {
        let mut hosts: Vec<&Host> = fleet.hosts.values().collect();
        hosts.sort_by(|a, b| a.name.cmp(&b.name));
        let hosts: Vec<Value> = hosts.into_iter().map(|host| summary(fleet, &app.config, host)).collect();
        let mut problems = problems(fleet, &hosts);
        problems.extend(fleet.damages.values().map(|damage| {
            let (image, how) = (damage.image, &damage.how);
            format!("image {image} is damaged on the pool, upload it again as another one: {how}")
        }));
        json!({
            "version": env!("CARGO_PKG_VERSION"),
            "protocol_version": godwit_protocol::VERSION,
            "healthy": problems.is_empty(),
            "problems": problems,
            "instances": fleet.instances.len(),
            "images": fleet.images.len(),
            "networks": fleet.networks.len(),
            "operations_running": fleet.operations.values().filter(|o| o.is_running()).count(),
            "migrations_running": fleet.migrations.values().filter(|m| m.is_moving()).count(),
            "hosts": hosts,
        })
    })))
}

/// What somebody should look at.
fn problems(fleet: &Fleet, hosts: &[Value]) -> Vec<String> {
    let mut problems = Vec::new();
    for host in hosts {
        let name = host["name"].as_str().unwrap_or_default();
        match host["state"].as_str() {
            Some("up") => {}
            Some(state) => problems.push(format!("host {name} is {state}")),
            None => {}
        }
        let version = host["agent_version"].as_str();
        if let Some(version) = version.filter(|version| *version != env!("CARGO_PKG_VERSION")) {
            problems.push(format!(
                "host {name} runs agent {version}, the coordinator is {}",
                env!("CARGO_PKG_VERSION")
            ));
        }
    }
    for host in fleet.hosts.values() {
        let pools = host.inventory.iter().flat_map(|i| &i.pools);
        for pool in pools.filter(|pool| !pool.reachable) {
            problems.push(format!("host {} does not reach pool {}", host.name, pool.path));
        }
    }
    for (id, observed) in &fleet.observed {
        if let Some(text) = &observed.contradiction {
            let name = fleet.hosts.get(id).map_or_else(|| id.to_string(), |host| host.name.clone());
            problems.push(format!("what host {name} says of itself cannot be true: {text}"));
        }
    }
    let drifts = drift::list(fleet).len();
    if drifts > 0 {
        problems.push(format!("{drifts} things are not where they were reserved: godwit host drift"));
    }
    let in_error = fleet.instances.values().filter(|i| i.status == InstanceStatus::Error).count();
    if in_error > 0 {
        problems.push(format!("{in_error} servers are in error"));
    }
    let undoing = |o: &&Operation| o.phase == crate::fleet::operation::Phase::Undoing;
    let undoing = fleet.operations.values().filter(undoing).count();
    if undoing > 0 {
        problems.push(format!("{undoing} operations are being undone"));
    }
    problems
}
