//! A network's forwarding, host by host: what each should have against what its kernel has.

use super::only;
use crate::api::context::Caller;
use crate::api::fault::Answer;
use crate::app::Shared;
use crate::config::Config;
use crate::fleet::Fleet;
use crate::fleet::host::Host;
use crate::fleet::network::Network;
use crate::l2;
use axum::Json;
use axum::extract::{Path, State};
use godwit_protocol::network::{NetworkReported, NetworkWanted};
use godwit_protocol::port::Mac;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::net::IpAddr;

/// GET /networks/{network}/l2, by id or name.
pub(super) async fn show(
    State(app): State<Shared>,
    caller: Caller,
    Path(key): Path<String>,
) -> Answer<Json<Value>> {
    caller.require_admin()?;
    let found = app.ledger.read(|fleet| {
        let id = key.parse().ok();
        let by_id = fleet.networks.values().filter(|n| Some(n.id) == id);
        let by_name = fleet.networks.values().filter(|n| n.name == key && id.is_none());
        by_id.chain(by_name).map(|network| tables(fleet, network, &app.config)).collect::<Vec<_>>()
    });
    Ok(Json(only(found, "Network", &key)?))
}

fn tables(fleet: &Fleet, network: &Network, config: &Config) -> Value {
    let mut hosts: Vec<&Host> = fleet.hosts.values().collect();
    hosts.sort_by(|a, b| a.name.cmp(&b.name));
    let row = |host: &&Host| {
        let wanted = l2::wanted(fleet, network, host.id, config);
        let report = fleet.observed.get(&host.id).and_then(|o| o.report.as_ref());
        let reported = report.and_then(|r| r.networks.iter().find(|n| n.vni == network.vni));
        if wanted.is_none() && reported.is_none() {
            return None;
        }
        Some(json!({
            "host": host.name,
            "vtep": host.inventory.as_ref().map(|i| i.underlay.address),
            "agrees": agrees(wanted.as_ref(), reported),
            "generation": reported.and_then(|r| r.generation),
            "wanted": wanted.as_ref().map(|w| json!({
                "ports": w.ports,
                "forwarding": w.forwarding,
                "flood": w.flood,
                "groups": w.groups,
            })),
            "reported": reported.map(|r| json!({
                "forwarding": r.forwarding.iter().map(|(mac, vtep)| json!({ "mac": mac, "vtep": vtep }))
                    .collect::<Vec<_>>(),
                "flood": r.flood,
            })),
        }))
    };
    json!({
        "network": network.id,
        "name": network.name,
        "vni": network.vni,
        "mtu": network.mtu,
        "udp_port": config.vxlan_port,
        "generation": network.generation,
        "hosts": hosts.iter().filter_map(row).collect::<Vec<_>>(),
    })
}

fn agrees(wanted: Option<&NetworkWanted>, reported: Option<&NetworkReported>) -> bool {
    let (Some(wanted), Some(reported)) = (wanted, reported) else { return false };
    let want: BTreeSet<(Mac, IpAddr)> = wanted.forwarding.iter().map(|f| (f.mac, f.vtep)).collect();
    let have: BTreeSet<(Mac, IpAddr)> = reported.forwarding.iter().copied().collect();
    let want_flood: BTreeSet<IpAddr> = wanted.flood.iter().copied().collect();
    want == have
        && want_flood == reported.flood.iter().copied().collect()
        && wanted.carrier.group_ttl() == reported.group_ttl
}
