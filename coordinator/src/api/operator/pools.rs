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
use uuid::Uuid;

/// What makes two hosts' pools one: the mark in it. Where there is none: the folder, and the share in it.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
enum Key<'a> {
    Mark(Uuid),
    Place(&'a str, Option<&'a str>),
}

/// The pools of the fleet, each with its hosts, in order of their folders.
fn pools(fleet: &Fleet) -> Vec<Value> {
    let mut found: BTreeMap<Key, Vec<(&str, &PoolReport)>> = BTreeMap::new();
    for host in fleet.hosts.values() {
        for pool in fleet.pools_of(host.id) {
            let place = Key::Place(&pool.path, pool.source.as_deref());
            found.entry(pool.mark.map_or(place, Key::Mark)).or_default().push((&host.name, pool));
        }
    }
    let mut found: Vec<_> = found.into_values().collect();
    found.iter_mut().for_each(|hosts| hosts.sort_by_key(|(name, _)| *name));
    found.sort_by_key(|hosts| hosts.first().map(|(host, pool)| (&pool.path, &pool.source, *host)));
    found.iter().map(|hosts| view(hosts)).collect()
}

/// One pool. Its sizes are those that a host which reaches it told.
fn view(hosts: &[(&str, &PoolReport)]) -> Value {
    let (_, pool) = hosts.iter().find(|(_, pool)| pool.reachable).unwrap_or(&hosts[0]);
    let names: Vec<Value> =
        hosts.iter().map(|(name, pool)| json!({ "host": name, "reachable": pool.reachable })).collect();
    json!({
        "id": pool.mark.map_or_else(|| pool.name.clone(), |mark| mark.to_string()),
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

/// GET /pools/{pool}, by its id, its name or its folder.
pub(super) async fn show(
    State(app): State<Shared>,
    caller: Caller,
    Path(key): Path<String>,
) -> Answer<Json<Value>> {
    caller.require_admin()?;
    let mut pools = app.ledger.read(pools);
    pools.retain(|pool| ["id", "name", "path"].iter().any(|known| pool[known] == key));
    let pool = super::only(pools, "Pool", &key)?;
    Ok(Json(json!({ "pool": pool })))
}
