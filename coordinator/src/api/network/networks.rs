//! Networks.

use super::list::{Collection, answer, with_fields};
use super::{admin_only, created, decide_all, items, owner};
use crate::addresses;
use crate::api::attributes::{Attributes, time_text};
use crate::api::context::{Body, Caller, Links, Params};
use crate::api::fault::{Answer, Fault};
use crate::app::Shared;
use crate::config::ConfigError;
use crate::fleet::network::{Network, Segment};
use crate::fleet::{Change, Fleet};
use crate::ledger::now;
use crate::verbs::network::{self, NetworkUpdate, NewNetwork, Numbers, VLANS, Wish};
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::{Json, Response};
use godwit_protocol::id::NetworkId;
use serde_json::{Value, json};

const COLLECTION: Collection = Collection {
    name: "networks",
    attributes: &[
        "id",
        "name",
        "description",
        "tenant_id",
        "project_id",
        "admin_state_up",
        "status",
        "shared",
        "router:external",
        "mtu",
        "subnets",
        "port_security_enabled",
        "provider:network_type",
        "provider:physical_network",
        "provider:segmentation_id",
        "created_at",
        "updated_at",
        "revision_number",
    ],
};

const ADMIN_KEYS: [&str; 4] =
    ["shared", "provider:network_type", "provider:physical_network", "provider:segmentation_id"];

fn view(fleet: &Fleet, network: &Network, caller: &Caller) -> Value {
    let subnets: Vec<String> =
        addresses::subnets(fleet, network.id).iter().map(|s| s.id.to_string()).collect();
    let mut view = json!({
        "id": network.id,
        "name": network.name,
        "description": network.description,
        "tenant_id": network.project,
        "project_id": network.project,
        "admin_state_up": network.admin_state_up,
        "status": "ACTIVE",
        "shared": network.shared,
        "router:external": false,
        "mtu": network.mtu,
        "port_security_enabled": network.port_security,
        "subnets": subnets,
        "tags": network.tags,
        "created_at": time_text(network.created_at),
        "updated_at": time_text(network.updated_at),
        "revision_number": network.revision,
    });
    if caller.is_admin() {
        let (kind, segment) = match network.segment {
            Segment::Vxlan => ("vxlan", Some(network.vni)),
            Segment::Flat { .. } => ("flat", None),
            Segment::Vlan { tag, .. } => ("vlan", Some(u32::from(tag))),
        };
        view["provider:network_type"] = kind.into();
        view["provider:physical_network"] = network.segment.physical().into();
        view["provider:segmentation_id"] = segment.into();
    }
    view
}

/// The network of a path, when the caller may see it. A name is no id, and so not found.
pub(super) fn visible<'a>(fleet: &'a Fleet, caller: &Caller, id: &str) -> Answer<&'a Network> {
    let found = id.parse().ok().and_then(|id: NetworkId| fleet.networks.get(&id));
    found.filter(|n| n.shared || caller.sees(n.project)).ok_or_else(|| Fault::not_found("Network", id))
}

/// The same, when the caller may change it.
fn own<'a>(fleet: &'a Fleet, caller: &Caller, id: &str) -> Answer<&'a Network> {
    caller.require_member()?;
    let network = visible(fleet, caller, id)?;
    if caller.sees(network.project) {
        return Ok(network);
    }
    Err(Fault::forbidden(format!("Network {id} is shared with your project, but not its own.")))
}

/// GET /networks.
pub(super) async fn list(
    State(app): State<Shared>,
    caller: Caller,
    params: Params,
    links: Links,
) -> Answer<Json<Value>> {
    let views = app.ledger.read(|fleet| {
        let mut seen: Vec<&Network> =
            fleet.networks.values().filter(|n| n.shared || caller.sees(n.project)).collect();
        seen.sort_by_key(|n| (n.created_at, n.id));
        seen.into_iter().map(|n| view(fleet, n, &caller)).collect()
    });
    answer(&COLLECTION, views, &params, &links)
}

/// GET /networks/{id}.
pub(super) async fn show(
    State(app): State<Shared>,
    caller: Caller,
    Path(id): Path<String>,
    params: Params,
) -> Answer<Json<Value>> {
    let view = app.ledger.read(|fleet| visible(fleet, &caller, &id).map(|n| view(fleet, n, &caller)))?;
    Ok(Json(json!({ "network": with_fields(view, &params) })))
}

/// Attributes of other networks than ours, which may be named where they ask for nothing.
fn refuse_unbuilt(a: &mut Attributes) -> Answer<()> {
    a.inert("router:external", &[json!(false)])?;
    a.inert("availability_zone_hints", &[json!([])])?;
    a.inert("is_default", &[json!(false)])?;
    a.inert("vlan_transparent", &[json!(false)])?;
    a.inert("qos_policy_id", &[])?;
    a.inert("dns_domain", &[json!("")])
}

/// What is to carry a new network. The words of refusals are those of OpenStack's type drivers.
fn carrier(a: &mut Attributes) -> Answer<Wish> {
    let kind = a.text("provider:network_type")?;
    let physical = a.text("provider:physical_network")?;
    let number = figure(a.number("provider:segmentation_id")?, "provider:segmentation_id")?;
    let invalid = |text: String| Err(Fault::bad_request(format!("Invalid input for operation: {text}.")));
    match (kind.as_deref(), physical, number) {
        (None, Some(_), _) => invalid("network_type required".into()),
        (None | Some("vxlan"), None, number) => Ok(Wish::Vxlan(number)),
        (Some("vxlan"), Some(_), _) => {
            invalid("provider:physical_network specified for vxlan network".into())
        }
        (Some("flat"), None, _) => invalid("physical_network required for flat provider network".into()),
        (Some("flat"), Some(_), Some(_)) => {
            invalid("segmentation_id prohibited for flat provider network".into())
        }
        (Some("flat"), Some(physical), None) => Ok(Wish::Flat { physical }),
        (Some("vlan"), None, _) => invalid("physical_network required for VLAN provider network".into()),
        (Some("vlan"), Some(physical), None) => Ok(Wish::Vlan { physical, tag: None }),
        (Some("vlan"), Some(physical), Some(number)) => {
            match u16::try_from(number).ok().filter(|tag| VLANS.contains(tag)) {
                tag @ Some(_) => Ok(Wish::Vlan { physical, tag }),
                None => invalid(format!(
                    "segmentation_id out of range ({} through {})",
                    VLANS.start(),
                    VLANS.end()
                )),
            }
        }
        (Some(other), ..) => {
            invalid(format!("network_type value '{other}' not supported; here it is vxlan, flat or vlan"))
        }
    }
}

fn figure(figure: Option<u64>, key: &str) -> Answer<Option<u32>> {
    match figure.map(u32::try_from) {
        None => Ok(None),
        Some(Ok(figure)) => Ok(Some(figure)),
        Some(Err(_)) => Err(Fault::bad_request(format!("{key} is too large."))),
    }
}

fn make(
    fleet: &Fleet,
    caller: &Caller,
    numbers: &Numbers,
    mut a: Attributes,
) -> Answer<(Vec<Change>, Network)> {
    admin_only(caller, &a, &ADMIN_KEYS)?;
    refuse_unbuilt(&mut a)?;
    let carrier = carrier(&mut a)?;
    let new = NewNetwork {
        port_security: a.flag("port_security_enabled")?.unwrap_or(true),
        project: owner(caller, &mut a)?,
        name: a.text("name")?.unwrap_or_default(),
        description: a.text("description")?.unwrap_or_default(),
        shared: a.flag("shared")?.unwrap_or(false),
        admin_state_up: a.flag("admin_state_up")?.unwrap_or(true),
        carrier,
        // 0 is how some clients ask for the usual one.
        mtu: figure(a.number("mtu")?.filter(|mtu| *mtu != 0), "mtu")?,
    };
    a.finish()?;
    Ok(network::create(fleet, new, numbers, addresses::luck(), now())?)
}

/// POST /networks.
pub(super) async fn create(
    State(app): State<Shared>,
    caller: Caller,
    Body(body): Body<Value>,
) -> Answer<Response> {
    caller.require_member()?;
    let broken = |error: ConfigError| Fault::new(StatusCode::INTERNAL_SERVER_ERROR, error.to_string());
    let numbers =
        Numbers { vnis: app.config.vnis().map_err(broken)?, vlans: app.config.vlans().map_err(broken)? };
    let (items, bulk) = items(body, "network", "networks")?;
    let made = app
        .ledger
        .change(|fleet| decide_all(fleet, items, |fleet, a| make(fleet, &caller, &numbers, a)))
        .await?;
    let views = app.ledger.read(|fleet| made.iter().map(|n| view(fleet, n, &caller)).collect());
    Ok(created(views, bulk, "network", "networks"))
}

/// PUT /networks/{id}.
pub(super) async fn update(
    State(app): State<Shared>,
    caller: Caller,
    Path(id): Path<String>,
    Body(body): Body<Value>,
) -> Answer<Json<Value>> {
    let mut a = Attributes::inside(body, "network")?;
    admin_only(&caller, &a, &ADMIN_KEYS)?;
    refuse_unbuilt(&mut a)?;
    if ADMIN_KEYS.iter().any(|key| key.starts_with("provider:") && a.has(key)) {
        return Err(Fault::bad_request(
            "Invalid input for operation: Plugin does not support updating provider attributes; make another network.",
        ));
    }
    let mtu = a.number("mtu")?.map(u32::try_from).transpose();
    let change = NetworkUpdate {
        name: a.text("name")?,
        description: a.text("description")?,
        shared: a.flag("shared")?,
        admin_state_up: a.flag("admin_state_up")?,
        mtu: mtu.map_err(|_| Fault::bad_request("mtu is too large."))?,
        port_security: a.flag("port_security_enabled")?,
        tags: None,
    };
    a.finish()?;
    let told = change.mtu.is_some();
    let changed = apply(&app, &caller, &id, change).await?;
    if told {
        app.l2_changed(changed.id);
    }
    let view = app.ledger.read(|fleet| view(fleet, &changed, &caller));
    Ok(Json(json!({ "network": view })))
}

async fn apply(app: &Shared, caller: &Caller, id: &str, change: NetworkUpdate) -> Answer<Network> {
    app.ledger
        .change(|fleet| {
            let id = own(fleet, caller, id)?.id;
            network::update(fleet, id, change, now()).map_err(Fault::from)
        })
        .await
}

/// DELETE /networks/{id}.
pub(super) async fn delete(
    State(app): State<Shared>,
    caller: Caller,
    Path(id): Path<String>,
) -> Answer<StatusCode> {
    app.ledger
        .change(|fleet| {
            let id = own(fleet, &caller, &id)?.id;
            network::delete(fleet, id).map_err(|e| match Fault::from(e) {
                fault if fault.status() == StatusCode::CONFLICT => fault.named("NetworkInUse"),
                fault => fault,
            })
        })
        .await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Its labels.
pub(super) fn tags(fleet: &Fleet, caller: &Caller, id: &str) -> Answer<Vec<String>> {
    visible(fleet, caller, id).map(|n| n.tags.clone())
}

/// Gives it other labels.
pub(super) fn retag(
    fleet: &Fleet,
    caller: &Caller,
    id: &str,
    tags: Vec<String>,
) -> Answer<(Vec<Change>, Vec<String>)> {
    let id = own(fleet, caller, id)?.id;
    let change = NetworkUpdate { tags: Some(tags), ..NetworkUpdate::default() };
    let (changes, network) = network::update(fleet, id, change, now())?;
    Ok((changes, network.tags))
}
