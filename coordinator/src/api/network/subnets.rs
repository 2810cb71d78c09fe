//! Subnets.

use super::list::{Collection, answer, with_fields};
use super::{created, decide_all, items, networks, owner};
use crate::api::attributes::{Attributes, time_text};
use crate::api::context::{Body, Caller, Links, Params};
use crate::api::fault::{Answer, Fault};
use crate::app::Shared;
use crate::fleet::network::Subnet;
use crate::fleet::{Change, Fleet};
use crate::ledger::now;
use crate::verbs::subnet::{self, GatewayWish, NewSubnet, SubnetUpdate};
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::{Json, Response};
use godwit_protocol::id::SubnetId;
use ipnet::IpNet;
use serde_json::{Value, json};
use std::net::IpAddr;

const COLLECTION: Collection = Collection {
    name: "subnets",
    attributes: &[
        "id",
        "name",
        "description",
        "tenant_id",
        "project_id",
        "network_id",
        "ip_version",
        "cidr",
        "gateway_ip",
        "enable_dhcp",
        "ipv6_ra_mode",
        "ipv6_address_mode",
        "subnetpool_id",
        "shared",
        "created_at",
        "updated_at",
        "revision_number",
    ],
};

/// How an IPv6 guest gets its address from DHCP. There are no router advertisements here that could tell it so.
const STATEFUL: &str = "dhcpv6-stateful";

const ADDRESS: &str = "an IP address";

fn view(subnet: &Subnet) -> Value {
    let pools = subnet.pools.iter().map(|(start, end)| json!({ "start": start, "end": end }));
    let routes =
        subnet.routes.iter().map(|(to, via)| json!({ "destination": to.to_string(), "nexthop": via }));
    json!({
        "id": subnet.id,
        "name": subnet.name,
        "description": subnet.description,
        "tenant_id": subnet.project,
        "project_id": subnet.project,
        "network_id": subnet.network,
        "ip_version": version(subnet.cidr.addr()),
        "cidr": subnet.cidr.to_string(),
        "gateway_ip": subnet.gateway,
        "allocation_pools": pools.collect::<Vec<_>>(),
        "dns_nameservers": subnet.dns,
        "host_routes": routes.collect::<Vec<_>>(),
        "enable_dhcp": subnet.dhcp,
        "ipv6_ra_mode": null,
        "ipv6_address_mode": (subnet.dhcp && subnet.cidr.addr().is_ipv6()).then_some(STATEFUL),
        "subnetpool_id": null,
        "tags": subnet.tags,
        "created_at": time_text(subnet.created_at),
        "updated_at": time_text(subnet.updated_at),
        "revision_number": subnet.revision,
    })
}

fn version(address: IpAddr) -> u64 {
    if address.is_ipv4() { 4 } else { 6 }
}

fn sees(fleet: &Fleet, caller: &Caller, subnet: &Subnet) -> bool {
    caller.sees(subnet.project) || fleet.networks.get(&subnet.network).is_some_and(|n| n.shared)
}

fn visible<'a>(fleet: &'a Fleet, caller: &Caller, id: &str) -> Answer<&'a Subnet> {
    let found = id.parse().ok().and_then(|id: SubnetId| fleet.subnets.get(&id));
    found.filter(|s| sees(fleet, caller, s)).ok_or_else(|| Fault::not_found("Subnet", id))
}

fn own<'a>(fleet: &'a Fleet, caller: &Caller, id: &str) -> Answer<&'a Subnet> {
    caller.require_member()?;
    let subnet = visible(fleet, caller, id)?;
    if caller.sees(subnet.project) {
        return Ok(subnet);
    }
    Err(Fault::forbidden(format!("Subnet {id} belongs to another project.")))
}

/// GET /subnets.
pub(super) async fn list(
    State(app): State<Shared>,
    caller: Caller,
    params: Params,
    links: Links,
) -> Answer<Json<Value>> {
    let views = app.ledger.read(|fleet| {
        let mut seen: Vec<&Subnet> = fleet.subnets.values().filter(|s| sees(fleet, &caller, s)).collect();
        seen.sort_by_key(|s| (s.created_at, s.id));
        seen.into_iter().map(view).collect()
    });
    answer(&COLLECTION, views, &params, &links)
}

/// GET /subnets/{id}.
pub(super) async fn show(
    State(app): State<Shared>,
    caller: Caller,
    Path(id): Path<String>,
    params: Params,
) -> Answer<Json<Value>> {
    let view = app.ledger.read(|fleet| visible(fleet, &caller, &id).map(view))?;
    Ok(Json(json!({ "subnet": with_fields(view, &params) })))
}

fn pools(a: &mut Attributes) -> Answer<Option<Vec<(IpAddr, IpAddr)>>> {
    let Some(items) = a.list("allocation_pools")? else { return Ok(None) };
    let pool = |item| {
        let mut pool = Attributes::of(item, "allocation_pools")?;
        let ends = (pool.parsed("start", ADDRESS)?, pool.parsed("end", ADDRESS)?);
        pool.finish()?;
        match ends {
            (Some(start), Some(end)) => Ok((start, end)),
            _ => Err(Fault::bad_request("An allocation pool needs 'start' and 'end'.")),
        }
    };
    items.into_iter().map(pool).collect::<Answer<_>>().map(Some)
}

fn routes(a: &mut Attributes) -> Answer<Option<Vec<(IpNet, IpAddr)>>> {
    let Some(items) = a.list("host_routes")? else { return Ok(None) };
    let route = |item| {
        let mut route = Attributes::of(item, "host_routes")?;
        let ends = (
            route.parsed::<IpNet>("destination", "a range such as 10.0.0.0/8")?,
            route.parsed("nexthop", ADDRESS)?,
        );
        route.finish()?;
        match ends {
            (Some(to), Some(via)) => Ok((to.trunc(), via)),
            _ => Err(Fault::bad_request("A host route needs 'destination' and 'nexthop'.")),
        }
    };
    items.into_iter().map(route).collect::<Answer<_>>().map(Some)
}

/// The gateway of a body: not named, none, or an address.
fn gateway(a: &mut Attributes) -> Answer<GatewayWish> {
    if !a.has("gateway_ip") {
        return Ok(GatewayWish::First);
    }
    Ok(a.parsed("gateway_ip", ADDRESS)?.map_or(GatewayWish::None, GatewayWish::Address))
}

fn refuse_unbuilt(a: &mut Attributes) -> Answer<()> {
    a.inert("subnetpool_id", &[])?;
    a.inert("use_default_subnetpool", &[json!(false)])?;
    a.inert("prefixlen", &[])?;
    a.inert("ipv6_ra_mode", &[])?;
    a.inert("ipv6_address_mode", &[json!(STATEFUL)])?;
    a.inert("segment_id", &[])?;
    a.inert("service_types", &[json!([])])?;
    a.inert("dns_publish_fixed_ip", &[json!(false)])
}

fn make(fleet: &Fleet, caller: &Caller, mut a: Attributes) -> Answer<(Vec<Change>, Subnet)> {
    refuse_unbuilt(&mut a)?;
    let cidr: Option<IpNet> = a.parsed("cidr", "a range such as 10.0.0.0/24")?;
    let cidr = cidr.ok_or_else(|| {
        Fault::bad_request("Bad subnets request: a cidr must be specified; there are no subnet pools here.")
    })?;
    let network = a.required_text("network_id")?;
    let network = networks::visible(fleet, caller, &network)?;
    if !caller.sees(network.project) {
        return Err(Fault::forbidden(format!("Network {} belongs to another project.", network.id)));
    }
    match a.number("ip_version")? {
        Some(wanted) if wanted != version(cidr.addr()) => {
            return Err(Fault::bad_request(format!("The cidr {cidr} is not of ip_version {wanted}.")));
        }
        _ => {}
    }
    let new = NewSubnet {
        network: network.id,
        project: owner(caller, &mut a)?,
        name: a.text("name")?.unwrap_or_default(),
        description: a.text("description")?.unwrap_or_default(),
        cidr,
        gateway: gateway(&mut a)?,
        pools: pools(&mut a)?,
        dns: a.parsed_list("dns_nameservers", ADDRESS)?.unwrap_or_default(),
        routes: routes(&mut a)?.unwrap_or_default(),
        dhcp: a.flag("enable_dhcp")?.unwrap_or(true),
    };
    a.finish()?;
    Ok(subnet::create(fleet, new, now())?)
}

/// POST /subnets.
pub(super) async fn create(
    State(app): State<Shared>,
    caller: Caller,
    Body(body): Body<Value>,
) -> Answer<Response> {
    caller.require_member()?;
    let (items, bulk) = items(body, "subnet", "subnets")?;
    let made =
        app.ledger.change(|fleet| decide_all(fleet, items, |fleet, a| make(fleet, &caller, a))).await?;
    Ok(created(made.iter().map(view).collect(), bulk, "subnet", "subnets"))
}

/// PUT /subnets/{id}.
pub(super) async fn update(
    State(app): State<Shared>,
    caller: Caller,
    Path(id): Path<String>,
    Body(body): Body<Value>,
) -> Answer<Json<Value>> {
    let mut a = Attributes::inside(body, "subnet")?;
    refuse_unbuilt(&mut a)?;
    let change = SubnetUpdate {
        name: a.text("name")?,
        description: a.text("description")?,
        gateway: match (a.has("gateway_ip"), gateway(&mut a)?) {
            (false, _) | (true, GatewayWish::First) => None,
            (true, GatewayWish::None) => Some(None),
            (true, GatewayWish::Address(address)) => Some(Some(address)),
        },
        pools: pools(&mut a)?,
        dns: a.parsed_list("dns_nameservers", ADDRESS)?,
        routes: routes(&mut a)?,
        dhcp: a.flag("enable_dhcp")?,
        tags: None,
    };
    a.finish()?;
    let changed = apply(&app, &caller, &id, change).await?;
    Ok(Json(json!({ "subnet": view(&changed) })))
}

async fn apply(app: &Shared, caller: &Caller, id: &str, change: SubnetUpdate) -> Answer<Subnet> {
    let changed = app
        .ledger
        .change(|fleet| {
            let id = own(fleet, caller, id)?.id;
            subnet::update(fleet, id, change, now()).map_err(Fault::from)
        })
        .await?;
    app.l2_changed(changed.network);
    Ok(changed)
}

/// DELETE /subnets/{id}.
pub(super) async fn delete(
    State(app): State<Shared>,
    caller: Caller,
    Path(id): Path<String>,
) -> Answer<StatusCode> {
    app.ledger
        .change(|fleet| {
            let id = own(fleet, &caller, &id)?.id;
            subnet::delete(fleet, id).map_err(|e| match Fault::from(e) {
                fault if fault.status() == StatusCode::CONFLICT => fault.named("SubnetInUse"),
                fault => fault,
            })
        })
        .await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Its labels.
pub(super) fn tags(fleet: &Fleet, caller: &Caller, id: &str) -> Answer<Vec<String>> {
    visible(fleet, caller, id).map(|s| s.tags.clone())
}

/// Gives it other labels.
pub(super) fn retag(
    fleet: &Fleet,
    caller: &Caller,
    id: &str,
    tags: Vec<String>,
) -> Answer<(Vec<Change>, Vec<String>)> {
    let id = own(fleet, caller, id)?.id;
    let change = SubnetUpdate { tags: Some(tags), ..SubnetUpdate::default() };
    let (changes, subnet) = subnet::update(fleet, id, change, now())?;
    Ok((changes, subnet.tags))
}
