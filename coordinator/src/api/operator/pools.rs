//! Pools, put together from what each host reports of its own.

use crate::api::context::Caller;
use crate::api::fault::Answer;
use crate::app::Shared;
use crate::fleet::Fleet;
use axum::Json;
use axum::extract::{Path, State};
use godwit_protocol::host::PoolReport;
use serde_json::{Value, json};
use std::collections::BTreeMap;

/// What makes two hosts' pools one: the folder, and the share in it.
type Key<'a> = (&'a str, Option<&'a str>);

/// The pools of the fleet, each with its hosts, in order of their folders.
fn pools(fleet: &Fleet) -> Vec<Value> {
    let mut found: BTreeMap<Key, Vec<(&str, &PoolReport)>> = BTreeMap::new();
    for host in fleet.hosts.values() {
        let report = fleet.observed.get(&host.id).and_then(|observed| observed.report.as_ref());
        let inventory = report.map(|report| &report.inventory).or(host.inventory.as_ref());
        for pool in inventory.iter().flat_map(|inventory| &inventory.pools) {
            found.entry((&pool.path, pool.source.as_deref())).or_default().push((&host.name, pool));
        }
    }
    found.into_values().map(|hosts| view(&hosts)).collect()
}

/// One pool. Its sizes are those that a host which reaches it told.
fn view(hosts: &[(&str, &PoolReport)]) -> Value {
    let (_, pool) = hosts.iter().find(|(_, pool)| pool.reachable).unwrap_or(&hosts[0]);
    let mut names: Vec<Value> =
        hosts.iter().map(|(name, pool)| json!({ "host": name, "reachable": pool.reachable })).collect();
    names.sort_by_key(|host| host["host"].as_str().map(str::to_owned));
    json!({
        "id": pool.name,
        "name": pool.name,
        "path": pool.path,
        "kind": pool.kind,
        "source": pool.source,
        "total_bytes": pool.total_bytes,
        "free_bytes": pool.free_bytes,
        "total_inodes": pool.total_inodes,
        "free_inodes": pool.free_inodes,
        "hosts": names,
    })
}

/// GET /pools.
pub(super) async fn list(State(app): State<Shared>, caller: Caller) -> Answer<Json<Value>> {
    caller.require_admin()?;
    Ok(Json(json!({ "pools": app.ledger.read(pools) })))
}

/// GET /pools/{pool}, by its name or its folder.
pub(super) async fn show(
    State(app): State<Shared>,
    caller: Caller,
    Path(key): Path<String>,
) -> Answer<Json<Value>> {
    caller.require_admin()?;
    let mut pools = app.ledger.read(pools);
    pools.retain(|pool| pool["name"] == key || pool["path"] == key);
    let pool = super::only(pools, "Pool", &key)?;
    Ok(Json(json!({ "pool": pool })))
}
