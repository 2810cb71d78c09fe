//! Rules of security groups.

use super::list::{Collection, answer, with_fields};
use super::{created, decide_all, items, security_groups};
use crate::api::attributes::{Attributes, time_text};
use crate::api::context::{Body, Caller, Links, Params};
use crate::api::fault::{Answer, Fault};
use crate::app::Shared;
use crate::fleet::security::SecurityRule;
use crate::fleet::{Change, Fleet};
use crate::ledger::now;
use crate::verbs::security_rule::{self, NewRule, family_name};
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::{Json, Response};
use godwit_protocol::id::{NetworkId, ProjectId, SecurityRuleId};
use godwit_protocol::security::{Direction, Family, Remote};
use ipnet::IpNet;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::net::IpAddr;

const COLLECTION: Collection = Collection {
    name: "security_group_rules",
    attributes: &[
        "id",
        "security_group_id",
        "description",
        "tenant_id",
        "project_id",
        "direction",
        "ethertype",
        "protocol",
        "port_range_min",
        "port_range_max",
        "remote_ip_prefix",
        "remote_group_id",
        "created_at",
        "updated_at",
        "revision_number",
    ],
};

pub(super) fn view(rule: &SecurityRule) -> Value {
    let (range, group) = match rule.remote {
        Remote::Any => (None, None),
        Remote::Range(range) => (Some(range.to_string()), None),
        Remote::Group(group) => (None, Some(group)),
    };
    json!({
        "id": rule.id,
        "security_group_id": rule.group,
        "description": rule.description,
        "tenant_id": rule.project,
        "project_id": rule.project,
        "direction": match rule.direction { Direction::Ingress => "ingress", Direction::Egress => "egress" },
        "ethertype": family_name(rule.family),
        "protocol": rule.protocol_text.clone().or_else(|| rule.protocol.map(|p| p.to_string())),
        "port_range_min": rule.range.0,
        "port_range_max": rule.range.1,
        "remote_ip_prefix": range,
        "remote_group_id": group,
        "created_at": time_text(rule.created_at),
        "updated_at": time_text(rule.created_at),
        "revision_number": 0,
    })
}

fn visible<'a>(fleet: &'a Fleet, caller: &Caller, id: &str) -> Answer<&'a SecurityRule> {
    let found = id.parse().ok().and_then(|id: SecurityRuleId| fleet.security_rules.get(&id));
    found.filter(|r| caller.sees(r.project)).ok_or_else(|| Fault::not_found("SecurityGroupRule", id))
}

/// GET /security-group-rules.
pub(super) async fn list(
    State(app): State<Shared>,
    caller: Caller,
    params: Params,
    links: Links,
) -> Answer<Json<Value>> {
    let views = app.ledger.read(|fleet| {
        let mut seen: Vec<&SecurityRule> =
            fleet.security_rules.values().filter(|r| caller.sees(r.project)).collect();
        seen.sort_by_key(|r| (r.created_at, r.id));
        seen.into_iter().map(view).collect()
    });
    answer(&COLLECTION, views, &params, &links)
}

/// GET /security-group-rules/{id}.
pub(super) async fn show(
    State(app): State<Shared>,
    caller: Caller,
    Path(id): Path<String>,
    params: Params,
) -> Answer<Json<Value>> {
    let view = app.ledger.read(|fleet| visible(fleet, &caller, &id).map(view))?;
    Ok(Json(json!({ "security_group_rule": with_fields(view, &params) })))
}

fn direction(a: &mut Attributes) -> Answer<Direction> {
    match a.required_text("direction")?.to_ascii_lowercase().as_str() {
        "ingress" => Ok(Direction::Ingress),
        "egress" => Ok(Direction::Egress),
        other => Err(Fault::bad_request(format!(
            "Invalid input for direction. Reason: '{other}' is not in ['ingress', 'egress']."
        ))),
    }
}

/// A range; a lone address is a range of one.
fn range(a: &mut Attributes) -> Answer<Option<IpNet>> {
    let Some(text) = a.text("remote_ip_prefix")?.filter(|text| !text.is_empty()) else { return Ok(None) };
    let lone = text.parse::<IpAddr>().ok().map(IpNet::from);
    let range = text.parse::<IpNet>().ok().or(lone).map(|range| range.trunc());
    range.map(Some).ok_or_else(|| {
        Fault::bad_request(format!(
            "Invalid input for remote_ip_prefix. Reason: '{text}' is not a valid IP subnet."
        ))
    })
}

fn family(a: &mut Attributes, range: Option<IpNet>) -> Answer<Family> {
    match a.text("ethertype")?.map(|text| text.to_ascii_lowercase()).as_deref() {
        Some("ipv4") => Ok(Family::V4),
        Some("ipv6") => Ok(Family::V6),
        Some(other) => Err(Fault::bad_request(format!(
            "Invalid input for ethertype. Reason: '{other}' is not in ['IPv4', 'IPv6']."
        ))),
        None if range.is_some_and(|range| !range.addr().is_ipv4()) => Ok(Family::V6),
        None => Ok(Family::V4),
    }
}

fn protocol(a: &mut Attributes) -> Answer<Option<String>> {
    match a.take("protocol") {
        None => Ok(None),
        Some(Value::String(text)) if text.is_empty() => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(Value::Number(number)) => Ok(Some(number.to_string())),
        Some(other) => Err(Fault::bad_request(format!("Invalid input for protocol: {other}."))),
    }
}

/// A rule and the networks whose hosts must hear of it.
type Made = (SecurityRule, BTreeSet<NetworkId>);

fn make(fleet: &Fleet, caller: &Caller, mut a: Attributes) -> Answer<(Vec<Change>, Made)> {
    let group = a.required_text("security_group_id")?;
    let group = security_groups::visible(fleet, caller, &group)?;
    // Rules are their group's, whoever is named.
    for key in ["tenant_id", "project_id"] {
        let named: Option<ProjectId> = a.parsed(key, "a project's id")?;
        if named.is_some_and(|project| project != group.project) {
            return Err(Fault::bad_request("A rule belongs to the project of its group."));
        }
    }
    a.inert("remote_address_group_id", &[])?;
    let range = range(&mut a)?;
    let remote = match (range, a.text("remote_group_id")?) {
        (Some(_), Some(_)) => {
            return Err(Fault::bad_request("Only remote_ip_prefix or remote_group_id may be provided.")
                .named("SecurityGroupMultipleRemoteEntites"));
        }
        (Some(range), None) => Remote::Range(range),
        (None, Some(id)) => Remote::Group(security_groups::visible(fleet, caller, &id)?.id),
        (None, None) => Remote::Any,
    };
    let new = NewRule {
        group: group.id,
        description: a.text("description")?.unwrap_or_default(),
        direction: direction(&mut a)?,
        family: family(&mut a, range)?,
        protocol: protocol(&mut a)?,
        first: a.number("port_range_min")?,
        last: a.number("port_range_max")?,
        remote,
    };
    a.finish()?;
    Ok(security_rule::create(fleet, new, now())?)
}

/// POST /security-group-rules.
pub(super) async fn create(
    State(app): State<Shared>,
    caller: Caller,
    Body(body): Body<Value>,
) -> Answer<Response> {
    caller.require_member()?;
    let (items, bulk) = items(body, "security_group_rule", "security_group_rules")?;
    let made =
        app.ledger.change(|fleet| decide_all(fleet, items, |fleet, a| make(fleet, &caller, a))).await?;
    let networks: BTreeSet<NetworkId> =
        made.iter().flat_map(|(_, networks)| networks.iter().copied()).collect();
    networks.into_iter().for_each(|network| app.l2_changed(network));
    let views = made.iter().map(|(rule, _)| view(rule)).collect();
    Ok(created(views, bulk, "security_group_rule", "security_group_rules"))
}

/// DELETE /security-group-rules/{id}.
pub(super) async fn delete(
    State(app): State<Shared>,
    caller: Caller,
    Path(id): Path<String>,
) -> Answer<StatusCode> {
    caller.require_member()?;
    let networks = app
        .ledger
        .change(|fleet| {
            let id = visible(fleet, &caller, &id)?.id;
            security_rule::delete(fleet, id, now()).map_err(Fault::from)
        })
        .await?;
    networks.into_iter().for_each(|network| app.l2_changed(network));
    Ok(StatusCode::NO_CONTENT)
}
