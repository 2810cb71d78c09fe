//! Ports.

use super::list::{Collection, answer, with_fields};
use super::{admin_only, created, decide_all, items, networks, owner, security_groups};
use crate::addresses::AddressWish;
use crate::api::attributes::{Attributes, time_text};
use crate::api::context::{Body, Caller, Links, Params};
use crate::api::fault::{Answer, Fault};
use crate::app::Shared;
use crate::fleet::instance::InstanceStatus;
use crate::fleet::network::Port;
use crate::fleet::{Change, Fleet};
use crate::ledger::now;
use crate::verbs::port::{self, NewPort, PortUpdate};
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::{Json, Response};
use godwit_protocol::id::{HostId, NetworkId, PortId};
use godwit_protocol::port::Mac;
use ipnet::IpNet;
use serde_json::{Value, json};
use std::net::IpAddr;

const COLLECTION: Collection = Collection {
    name: "ports",
    attributes: &[
        "id",
        "name",
        "description",
        "tenant_id",
        "project_id",
        "network_id",
        "mac_address",
        "fixed_ips",
        "security_groups",
        "port_security_enabled",
        "device_id",
        "device_owner",
        "admin_state_up",
        "status",
        "binding:vnic_type",
        "binding:host_id",
        "binding:vif_type",
        "created_at",
        "updated_at",
        "revision_number",
    ],
};

const ADMIN_KEYS: [&str; 2] = ["binding:host_id", "binding:profile"];

fn view(fleet: &Fleet, port: &Port, caller: &Caller) -> Value {
    let ips = port.fixed_ips.iter().map(|ip| json!({ "subnet_id": ip.subnet, "ip_address": ip.address }));
    let pairs = port.allowed_pairs.iter().map(|(mac, range)| {
        // A range of one is written as an address.
        let alone = range.prefix_len() == range.max_prefix_len();
        let range = if alone { range.addr().to_string() } else { range.to_string() };
        json!({ "mac_address": mac, "ip_address": range })
    });
    let mut view = json!({
        "id": port.id,
        "name": port.name,
        "description": port.description,
        "tenant_id": port.project,
        "project_id": port.project,
        "network_id": port.network,
        "mac_address": port.mac.to_string(),
        "fixed_ips": ips.collect::<Vec<_>>(),
        "device_id": port.device_id,
        "device_owner": port.device_owner,
        "admin_state_up": port.admin_state_up,
        "status": status(fleet, port),
        "binding:vnic_type": "normal",
        "port_security_enabled": port.port_security,
        "security_groups": port.security_groups.as_deref().unwrap_or_default(),
        "allowed_address_pairs": pairs.collect::<Vec<_>>(),
        "tags": port.tags,
        "created_at": time_text(port.created_at),
        "updated_at": time_text(port.updated_at),
        "revision_number": port.revision,
    });
    if caller.is_admin() {
        let host = port.host.and_then(|id| fleet.hosts.get(&id)).map(|h| h.name.as_str());
        view["binding:host_id"] = host.unwrap_or_default().into();
        view["binding:vif_type"] = if host.is_some() { "bridge" } else { "unbound" }.into();
        view["binding:vif_details"] = json!({});
        view["binding:profile"] = json!({});
    }
    view
}

fn status(fleet: &Fleet, port: &Port) -> &'static str {
    let instance = port.instance.and_then(|id| fleet.instances.get(&id));
    match (port.host, instance.map(|i| i.status)) {
        (None, _) => "DOWN",
        (Some(_), Some(InstanceStatus::Building)) => "BUILD",
        (Some(_), Some(InstanceStatus::Stopped | InstanceStatus::Error)) => "DOWN",
        (Some(_), _) => "ACTIVE",
    }
}

fn sees(fleet: &Fleet, caller: &Caller, port: &Port) -> bool {
    caller.sees(port.project) || fleet.networks.get(&port.network).is_some_and(|n| caller.sees(n.project))
}

fn visible<'a>(fleet: &'a Fleet, caller: &Caller, id: &str) -> Answer<&'a Port> {
    let found = id.parse().ok().and_then(|id: PortId| fleet.ports.get(&id));
    found.filter(|p| sees(fleet, caller, p)).ok_or_else(|| Fault::not_found("Port", id))
}

/// GET /ports.
pub(super) async fn list(
    State(app): State<Shared>,
    caller: Caller,
    params: Params,
    links: Links,
) -> Answer<Json<Value>> {
    let views = app.ledger.read(|fleet| {
        let mut seen: Vec<&Port> = fleet.ports.values().filter(|p| sees(fleet, &caller, p)).collect();
        seen.sort_by_key(|p| (p.created_at, p.id));
        seen.into_iter().map(|p| view(fleet, p, &caller)).collect()
    });
    answer(&COLLECTION, views, &params, &links)
}

/// GET /ports/{id}.
pub(super) async fn show(
    State(app): State<Shared>,
    caller: Caller,
    Path(id): Path<String>,
    params: Params,
) -> Answer<Json<Value>> {
    let view = app.ledger.read(|fleet| visible(fleet, &caller, &id).map(|p| view(fleet, p, &caller)))?;
    Ok(Json(json!({ "port": with_fields(view, &params) })))
}

fn wishes(a: &mut Attributes) -> Answer<Option<Vec<AddressWish>>> {
    let Some(items) = a.list("fixed_ips")? else { return Ok(None) };
    let wish = |item| {
        let mut wish = Attributes::of(item, "fixed_ips")?;
        let read = AddressWish {
            subnet: wish.parsed("subnet_id", "a subnet's id")?,
            address: wish.parsed("ip_address", "an IP address")?,
        };
        wish.finish()?;
        match read {
            AddressWish { subnet: None, address: None } => {
                Err(Fault::bad_request("An entry of fixed_ips needs 'subnet_id' or 'ip_address'."))
            }
            read => Ok(read),
        }
    };
    items.into_iter().map(wish).collect::<Answer<_>>().map(Some)
}

/// The host of a body: not named, none (null or empty), or the host of that name.
fn host(fleet: &Fleet, a: &mut Attributes) -> Answer<Option<Option<HostId>>> {
    if !a.has("binding:host_id") {
        return Ok(None);
    }
    let Some(name) = a.text("binding:host_id")?.filter(|name| !name.is_empty()) else {
        return Ok(Some(None));
    };
    let by_id = name.parse().ok().filter(|id| fleet.hosts.contains_key(id));
    let found = fleet.host_by_name(&name).map(|h| h.id).or(by_id);
    found.map(|id| Some(Some(id))).ok_or_else(|| Fault::not_found("Host", name))
}

fn refuse_unbuilt(a: &mut Attributes) -> Answer<()> {
    a.inert("admin_state_up", &[json!(true)])?;
    a.inert("binding:vnic_type", &[json!("normal")])?;
    a.inert("binding:profile", &[json!({})])?;
    a.inert("extra_dhcp_opts", &[json!([])])?;
    a.inert("qos_policy_id", &[])?;
    a.inert("dns_name", &[json!("")])?;
    a.inert("dns_domain", &[json!("")])
}

/// An allowed pair as it is written: a range, perhaps with an Ethernet address; without, that of the port.
type Pair = (Option<Mac>, IpNet);

/// Pairs of a body.
fn pairs(a: &mut Attributes) -> Answer<Option<Vec<Pair>>> {
    let Some(items) = a.list("allowed_address_pairs")? else {
        // Null asks for none.
        return Ok(None);
    };
    let pair = |item| {
        let mut pair = Attributes::of(item, "allowed_address_pairs")?;
        let mac = pair.parsed("mac_address", "an Ethernet address")?;
        let text = pair.text("ip_address")?.ok_or_else(|| {
            Fault::bad_request("AllowedAddressPair must contain ip_address.")
                .named("AllowedAddressPairsMissingIP")
        })?;
        pair.finish()?;
        let lone = text.parse::<IpAddr>().ok().map(IpNet::from);
        let range = lone.or_else(|| text.parse().ok());
        let range = range.ok_or_else(|| {
            Fault::bad_request(format!(
                "'{text}' is neither a valid IP address, nor is it a valid IP subnet."
            ))
        })?;
        Ok((mac, range))
    };
    items.into_iter().map(pair).collect::<Answer<_>>().map(Some)
}

/// Security groups of a body, by id.
fn groups(
    fleet: &Fleet,
    caller: &Caller,
    a: &mut Attributes,
) -> Answer<Option<Vec<godwit_protocol::id::SecurityGroupId>>> {
    let ids: Option<Vec<String>> = a.parsed_list("security_groups", "a security group's id")?;
    ids.map(|ids| security_groups::all(fleet, caller, &ids)).transpose()
}

fn make(fleet: &Fleet, caller: &Caller, mut a: Attributes) -> Answer<(Vec<Change>, Port)> {
    admin_only(caller, &a, &ADMIN_KEYS)?;
    refuse_unbuilt(&mut a)?;
    let network = a.required_text("network_id")?;
    let network = networks::visible(fleet, caller, &network)?;
    let new = NewPort {
        network: network.id,
        project: owner(caller, &mut a)?,
        name: a.text("name")?.unwrap_or_default(),
        description: a.text("description")?.unwrap_or_default(),
        mac: a.parsed("mac_address", "an Ethernet address")?,
        addresses: wishes(&mut a)?,
        device_id: a.text("device_id")?.unwrap_or_default(),
        device_owner: a.text("device_owner")?.unwrap_or_default(),
        host: host(fleet, &mut a)?.flatten(),
        port_security: a.flag("port_security_enabled")?,
        allowed_pairs: pairs(&mut a)?.unwrap_or_default(),
        security_groups: groups(fleet, caller, &mut a)?,
    };
    a.finish()?;
    Ok(port::create(fleet, new, now())?)
}

/// POST /ports.
pub(super) async fn create(
    State(app): State<Shared>,
    caller: Caller,
    Body(body): Body<Value>,
) -> Answer<Response> {
    caller.require_member()?;
    let (items, bulk) = items(body, "port", "ports")?;
    let made =
        app.ledger.change(|fleet| decide_all(fleet, items, |fleet, a| make(fleet, &caller, a))).await?;
    let plugged: std::collections::BTreeSet<NetworkId> =
        made.iter().filter(|p| p.host.is_some()).map(|p| p.network).collect();
    plugged.into_iter().for_each(|network| app.l2_changed(network));
    let views = app.ledger.read(|fleet| made.iter().map(|p| view(fleet, p, &caller)).collect());
    Ok(created(views, bulk, "port", "ports"))
}

/// PUT /ports/{id}.
pub(super) async fn update(
    State(app): State<Shared>,
    caller: Caller,
    Path(id): Path<String>,
    Body(body): Body<Value>,
) -> Answer<Json<Value>> {
    caller.require_member()?;
    let mut a = Attributes::inside(body, "port")?;
    admin_only(&caller, &a, &ADMIN_KEYS)?;
    refuse_unbuilt(&mut a)?;
    let (changed, tell) = app
        .ledger
        .change(|fleet| {
            let port = visible(fleet, &caller, &id)?;
            let change = PortUpdate {
                name: a.text("name")?,
                description: a.text("description")?,
                addresses: wishes(&mut a)?,
                mac: a.parsed("mac_address", "an Ethernet address")?,
                device_id: a.text("device_id")?,
                device_owner: a.text("device_owner")?,
                host: host(fleet, &mut a)?,
                port_security: a.flag("port_security_enabled")?,
                allowed_pairs: pairs(&mut a)?,
                security_groups: groups(fleet, &caller, &mut a)?,
                tags: None,
            };
            a.finish()?;
            port::update(fleet, port.id, change, now()).map_err(Fault::from)
        })
        .await?;
    if tell {
        app.l2_changed(changed.network);
    }
    let view = app.ledger.read(|fleet| view(fleet, &changed, &caller));
    Ok(Json(json!({ "port": view })))
}

/// DELETE /ports/{id}.
pub(super) async fn delete(
    State(app): State<Shared>,
    caller: Caller,
    Path(id): Path<String>,
) -> Answer<StatusCode> {
    caller.require_member()?;
    let gone = app
        .ledger
        .change(|fleet| {
            let id = visible(fleet, &caller, &id)?.id;
            port::delete(fleet, id).map_err(|e| match Fault::from(e) {
                fault if fault.status() == StatusCode::CONFLICT => fault.named("PortInUse"),
                fault => fault,
            })
        })
        .await?;
    if gone.host.is_some() {
        app.l2_changed(gone.network);
    }
    Ok(StatusCode::NO_CONTENT)
}

/// Its labels.
pub(super) fn tags(fleet: &Fleet, caller: &Caller, id: &str) -> Answer<Vec<String>> {
    visible(fleet, caller, id).map(|p| p.tags.clone())
}

/// Gives it other labels.
pub(super) fn retag(
    fleet: &Fleet,
    caller: &Caller,
    id: &str,
    tags: Vec<String>,
) -> Answer<(Vec<Change>, Vec<String>)> {
    caller.require_member()?;
    let id = visible(fleet, caller, id)?.id;
    let change = PortUpdate { tags: Some(tags), ..PortUpdate::default() };
    let (changes, (port, _)) = port::update(fleet, id, change, now())?;
    Ok((changes, port.tags))
}
