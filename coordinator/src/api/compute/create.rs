//! POST /servers: reads what clients send, finds what it names, and hands it to the operation.

use super::metadata::pairs;
use super::{Asked, view};
use crate::api::attributes::{Attributes, read_flag};
use crate::api::context::{Body, Caller};
use crate::api::fault::{Answer, Fault};
use crate::app::Shared;
use crate::error::Error;
use crate::fleet::Fleet;
use crate::fleet::identity::KeyPair;
use crate::fleet::image::{Image, Visibility};
use crate::fleet::instance::{Flavor, Hints, NicRequest};
use crate::operations::create_instance::{self, NewInstance};
use crate::verbs::instance::{check_metadata, check_name};
use crate::verbs::security_group::DEFAULT;
use axum::extract::State;
use axum::http::header::LOCATION;
use axum::http::{HeaderName, StatusCode};
use axum::response::{IntoResponse, Json, Response};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use godwit_protocol::id::{HostId, ImageId, InstanceId, NetworkId, PortId, SecurityGroupId};
use serde_json::{Value, json};
use std::collections::HashSet;
use std::net::IpAddr;

/// Servers of one request at most.
const MAX_COUNT: u64 = 20;

/// Longest user data, in bytes of base64: what the metadata of other clouds takes.
const MAX_USER_DATA: usize = 65_535;

/// NICs of a server at most.
const MAX_NICS: usize = 16;

/// What a body says before anything is looked up.
struct Wish {
    name: String,
    description: Option<String>,
    image: String,
    flavor: String,
    networks: Networks,
    security_groups: Vec<String>,
    count: u64,
    key: Option<String>,
    metadata: std::collections::BTreeMap<String, String>,
    user_data: Option<String>,
    place: Place,
    hints: Hints,
}

/// Where a body wants a server to be.
#[derive(Default)]
struct Place {
    zone: Option<String>,
    host: Option<String>,
}

/// The NICs of a body.
enum Networks {
    /// The project's only network, if there is one.
    Usual,
    /// The same, and it is an error when there is none.
    Auto,
    /// Those listed, perhaps none.
    Listed(Vec<Nic>),
}

struct Nic {
    network: Option<String>,
    port: Option<String>,
    address: Option<IpAddr>,
}

/// POST /servers.
pub(super) async fn create(
    State(app): State<Shared>,
    asked: Asked,
    Body(body): Body<Value>,
) -> Answer<Response> {
    asked.caller.require_member()?;
    let wish = read(&asked, body)?;
    let (new, count) = app.ledger.read(|fleet| resolve(fleet, &asked.caller, wish))?;
    let mut first = None;
    for index in 1..=count {
        let name = if count == 1 { new.name.clone() } else { format!("{}-{index}", new.name) };
        let id = create_instance::request(&app, NewInstance { name, ..new.clone() }).await;
        let id = id.map_err(|error| match error {
            // What a request names and is not there makes the request wrong, not the path.
            Error::NotFound { .. } => Fault::bad_request(error.to_string()),
            error => error.into(),
        })?;
        first = first.or(Some(id));
    }
    let made = app.ledger.read(|fleet| first.and_then(|id| fleet.instances.get(&id).cloned()));
    let made =
        made.ok_or_else(|| Fault::new(StatusCode::CONFLICT, "The server was deleted while it was made."))?;
    let groups = app.ledger.read(|fleet| names_of(fleet, &made.security_groups));
    let href = asked.links.to(&format!("/compute/v2.1/servers/{}", made.id));
    let body = json!({ "server": {
        "id": made.id,
        "links": view::links(&asked, &made),
        "OS-DCF:diskConfig": "MANUAL",
        "security_groups": groups,
    } });
    let location: [(HeaderName, String); 1] = [(LOCATION, href)];
    Ok((StatusCode::ACCEPTED, location, Json(body)).into_response())
}

/// The last part of what may be a link: old clients send one for an image or flavor.
fn last_part(reference: &str) -> &str {
    reference.trim_end_matches('/').rsplit('/').next().unwrap_or_default()
}

fn read(asked: &Asked, body: Value) -> Answer<Wish> {
    let mut outer = Attributes::of(body, "the request's body")?;
    let hints = hints(&mut outer)?;
    let mut a = Attributes::inside(Value::Object(outer.into_map()), "server")?;
    let image = match a.take("imageRef") {
        Some(Value::String(image)) => last_part(&image).to_owned(),
        None => String::new(),
        Some(other) => {
            return Err(Fault::bad_request(format!("imageRef must be an image's id, not {other}.")));
        }
    };
    check_disks(&mut a, &image)?;
    let flavor = match a.take("flavorRef") {
        Some(Value::String(flavor)) => last_part(&flavor).to_owned(),
        Some(Value::Number(flavor)) => flavor.to_string(),
        _ => return Err(Fault::bad_request("'flavorRef' is a required property: a flavor's id.")),
    };
    let metadata = match a.take("metadata") {
        Some(metadata) => pairs(Attributes::of(metadata, "metadata")?, "metadata")?,
        None => Default::default(),
    };
    check_metadata(&metadata)?;
    let name = a.required_text("name")?.trim().to_owned();
    check_name(&name)?;
    let place = wanted_place(asked, &mut a)?;
    let wish = Wish {
        name,
        description: if asked.since(19) { a.text("description")? } else { None },
        image,
        flavor,
        networks: networks(asked, &mut a)?,
        security_groups: group_names(&mut a)?,
        count: count(&mut a)?,
        key: a.text("key_name")?,
        metadata,
        user_data: user_data(&mut a)?,
        place,
        hints,
    };
    // Every server has a config drive, whether or not it is asked for.
    match a.take("config_drive") {
        Some(value) if value != "" && read_flag(&value).is_none() => {
            return Err(Fault::bad_request(format!("config_drive must be a boolean, not {value}.")));
        }
        _ => {}
    }
    refuse_unbuilt(asked, &mut a)?;
    a.finish()?;
    Ok(wish)
}

fn refuse_unbuilt(asked: &Asked, a: &mut Attributes) -> Answer<()> {
    a.inert("OS-DCF:diskConfig", &[json!("MANUAL")])?;
    a.inert("accessIPv4", &[json!("")])?;
    a.inert("accessIPv6", &[json!("")])?;
    a.inert("adminPass", &[json!("")])?;
    a.inert("return_reservation_id", &[json!(false), json!("False")])?;
    if !asked.since(57) {
        a.inert("personality", &[json!([])])?;
    }
    if asked.since(52) {
        a.inert("tags", &[json!([])])?;
    }
    if asked.since(63) {
        a.inert("trusted_image_certificates", &[json!([])])?;
    }
    Ok(())
}

/// Disks: the image's own, which clients also spell out as a mapping, and no other.
fn check_disks(a: &mut Attributes, image: &str) -> Answer<()> {
    const VOLUMES: &str =
        "Volumes are not supported here; boot from an image (imageRef), whose disk the flavor sizes.";
    if a.list("block_device_mapping")?.is_some_and(|mappings| !mappings.is_empty()) {
        return Err(Fault::bad_request(VOLUMES));
    }
    for mapping in a.list("block_device_mapping_v2")?.unwrap_or_default() {
        let is = |key: &str, value: &str| mapping[key] == value;
        let first = mapping["boot_index"] == 0 || is("boot_index", "0");
        let local = mapping["destination_type"].is_null() || is("destination_type", "local");
        if !(is("source_type", "image") && local && first && is("uuid", image)) {
            return Err(Fault::bad_request(VOLUMES));
        }
        if !mapping["volume_size"].is_null() || !mapping["tag"].is_null() {
            return Err(Fault::bad_request(
                "The disk's size is the flavor's, and it has no tag; leave both out.",
            ));
        }
    }
    if image.is_empty() {
        return Err(Fault::bad_request(format!("An image is needed. {VOLUMES}")));
    }
    Ok(())
}

fn count(a: &mut Attributes) -> Answer<u64> {
    let (least, most) = (a.number("min_count")?, a.number("max_count")?);
    let least = least.unwrap_or(1);
    let most = most.unwrap_or(least);
    if least < 1 || most < 1 {
        return Err(Fault::bad_request("min_count and max_count must be at least 1."));
    }
    if least > most {
        return Err(Fault::bad_request("min_count must be <= max_count"));
    }
    if most > MAX_COUNT {
        return Err(Fault::bad_request(format!(
            "max_count is {most}; at most {MAX_COUNT} servers can be made at once."
        )));
    }
    Ok(most)
}

fn user_data(a: &mut Attributes) -> Answer<Option<String>> {
    let Some(text) = a.text("user_data")? else { return Ok(None) };
    if text.len() > MAX_USER_DATA {
        return Err(Fault::bad_request(format!(
            "user_data has {} characters; {MAX_USER_DATA} are allowed.",
            text.len()
        )));
    }
    // Some tools break the lines of base64.
    let joined: String = text.split_ascii_whitespace().collect();
    match STANDARD.decode(&joined) {
        Ok(_) => Ok(Some(joined)),
        Err(_) => Err(Fault::bad_request("user_data must be base64.")),
    }
}

/// The zone and the host by name: `availability_zone: "ZONE:HOST"`, or `host` from 2.74 on.
fn wanted_place(asked: &Asked, a: &mut Attributes) -> Answer<Place> {
    let mut place = Place::default();
    if asked.since(74) {
        let (name, node) = (a.text("host")?, a.text("hypervisor_hostname")?);
        if name.is_some() && node.is_some() && name != node {
            return Err(Fault::bad_request("host and hypervisor_hostname name different hosts."));
        }
        place.host = name.or(node);
    }
    if let Some(text) = a.text("availability_zone")?.filter(|zone| !zone.is_empty()) {
        let mut parts = text.split(':');
        place.zone = parts.next().filter(|zone| !zone.is_empty()).map(str::to_owned);
        let named: Vec<&str> = parts.filter(|part| !part.is_empty()).collect();
        if let Some(name) = named.first() {
            if place.host.is_some() {
                return Err(Fault::bad_request(
                    "The host is named twice: in availability_zone and by itself.",
                ));
            }
            if named.len() > 2 || named.get(1).is_some_and(|node| node != name) {
                return Err(Fault::bad_request(format!("'{text}' must look like ZONE or ZONE:HOST.")));
            }
            place.host = Some((*name).to_owned());
        }
    }
    if place.host.is_some() {
        asked.caller.require_admin()?;
    }
    Ok(place)
}

/// Scheduler hints, beside the server in the body, under either of two names.
fn hints(outer: &mut Attributes) -> Answer<Hints> {
    let (new, old) = (outer.take("os:scheduler_hints"), outer.take("OS-SCH-HNT:scheduler_hints"));
    let Some(hints) = new.or(old) else { return Ok(Hints::default()) };
    let mut a = Attributes::of(hints, "os:scheduler_hints")?;
    let ids = |value: Option<Value>, key: &str| -> Answer<Vec<InstanceId>> {
        let items = match value {
            None => vec![],
            Some(Value::Array(items)) => items,
            Some(one) => vec![one],
        };
        let read = |item: &Value| item.as_str().and_then(|text| text.parse().ok());
        let wrong = |item: &Value| Fault::bad_request(format!("{key}: {item} is not the id of a server."));
        items.iter().map(|item| read(item).ok_or_else(|| wrong(item))).collect()
    };
    let same_host = ids(a.take("same_host"), "same_host")?;
    let different_host = ids(a.take("different_host"), "different_host")?;
    let group = a.parsed("group", "the id of a server group")?;
    a.finish()?;
    Ok(Hints { group, same_host, different_host })
}

/// That what the hints and the zone name is there, and the caller's to see.
fn check_place(fleet: &Fleet, caller: &Caller, wish: &Wish) -> Answer<()> {
    if let Some(zone) = wish.place.zone.as_deref().filter(|zone| !fleet.zones().contains(zone)) {
        let zones = fleet.zones().into_iter().collect::<Vec<_>>().join("', '");
        return Err(Fault::bad_request(format!(
            "The requested availability zone '{zone}' is not available; there is '{zones}'."
        )));
    }
    let hints = &wish.hints;
    if let Some(group) = hints.group {
        let found = fleet.server_groups.get(&group).filter(|g| caller.sees(g.project));
        found.ok_or_else(|| Fault::bad_request(format!("Instance group {group} could not be found.")))?;
    }
    let seen = |id: &&InstanceId| fleet.instances.get(id).is_some_and(|i| caller.sees(i.project));
    match hints.same_host.iter().chain(&hints.different_host).find(|id| !seen(id)) {
        Some(id) => Err(Fault::bad_request(format!("Instance {id} could not be found."))),
        None => Ok(()),
    }
}

fn networks(asked: &Asked, a: &mut Attributes) -> Answer<Networks> {
    match a.take("networks") {
        None if asked.since(37) => Err(Fault::bad_request("'networks' is a required property from 2.37 on.")),
        None => Ok(Networks::Usual),
        Some(Value::String(word)) if asked.since(37) && word == "auto" => Ok(Networks::Auto),
        Some(Value::String(word)) if asked.since(37) && word == "none" => Ok(Networks::Listed(vec![])),
        Some(Value::Array(items)) if items.is_empty() && !asked.since(37) => Ok(Networks::Usual),
        Some(Value::Array(items)) if items.len() <= MAX_NICS => {
            let nic = |item| {
                let mut nic = Attributes::of(item, "networks")?;
                let read = Nic {
                    network: nic.text("uuid")?,
                    port: nic.text("port")?,
                    address: nic.parsed("fixed_ip", "an IP address")?,
                };
                nic.inert("tag", &[])?;
                nic.finish()?;
                Ok(read)
            };
            items.into_iter().map(nic).collect::<Answer<_>>().map(Networks::Listed)
        }
        Some(Value::Array(items)) => Err(Fault::bad_request(format!(
            "{} networks are too many; a server has {MAX_NICS} NICs at most.",
            items.len()
        ))),
        Some(other) => {
            Err(Fault::bad_request(format!("networks must be a list, \"auto\" or \"none\", not {other}.")))
        }
    }
}

/// Finds what a wish names. What is not there, or not the caller's, makes the request wrong.
fn resolve(fleet: &Fleet, caller: &Caller, wish: Wish) -> Answer<(NewInstance, u64)> {
    check_place(fleet, caller, &wish)?;
    let image = find_image(fleet, caller, &wish.image)?.id;
    let flavor = find_flavor(fleet, caller, &wish.flavor)?;
    let key = match wish.key {
        None => None,
        Some(name) => {
            let pair = fleet.keypairs.get(&KeyPair::key_for(caller.user, &name));
            let pair = pair.ok_or_else(|| {
                Fault::bad_request(format!("Invalid key_name provided: you have no key pair '{name}'."))
            })?;
            Some((name, pair.public_key.clone()))
        }
    };
    let nics = nics(fleet, caller, wish.networks)?;
    let own = |nic: &NicRequest| !matches!(nic, NicRequest::Network(_, None));
    if wish.count > 1 && nics.iter().any(own) {
        return Err(Fault::bad_request(
            "A port or fixed_ip belongs to one server; ask for several servers without.",
        ));
    }
    let security_groups = find_groups(fleet, caller, &wish.security_groups)?;
    let wanted_host = wish.place.host.map(|name| find_host(fleet, &name)).transpose()?;
    let new = NewInstance {
        name: wish.name,
        description: wish.description,
        project: caller.project,
        user: caller.user,
        flavor: flavor.clone(),
        image,
        nics,
        security_groups,
        key,
        metadata: wish.metadata,
        user_data: wish.user_data,
        wanted_host,
        wanted_zone: wish.place.zone,
        hints: wish.hints,
    };
    Ok((new, wish.count))
}

/// Names or ids of the security groups of a body.
fn group_names(a: &mut Attributes) -> Answer<Vec<String>> {
    let name = |item| {
        let mut group = Attributes::of(item, "security_groups")?;
        let name = group.required_text("name")?;
        group.finish()?;
        Ok(name)
    };
    a.list("security_groups")?.unwrap_or_default().into_iter().map(name).collect()
}

/// The caller's security group of that id or name.
///
/// # Errors
/// 400: there is none, or several have the name.
pub(super) fn find_group(fleet: &Fleet, caller: &Caller, key: &str) -> Answer<SecurityGroupId> {
    let own: Vec<_> = fleet.security_groups.values().filter(|g| g.project == caller.project).collect();
    if let Some(group) = key.parse().ok().and_then(|id| own.iter().find(|g| g.id == id)) {
        return Ok(group.id);
    }
    match own.iter().filter(|g| g.name == key).collect::<Vec<_>>().as_slice() {
        [group] => Ok(group.id),
        [] => {
            Err(Fault::bad_request(format!("Security group {key} not found for project {}.", caller.project)))
        }
        _ => Err(Fault::new(
            StatusCode::CONFLICT,
            format!("Multiple security groups found matching '{key}'. Use an ID to be more specific."),
        )),
    }
}

fn find_groups(fleet: &Fleet, caller: &Caller, keys: &[String]) -> Answer<Vec<SecurityGroupId>> {
    let mut groups = Vec::new();
    for key in keys {
        // Before the project has its default group, its name asks for what happens anyway.
        let missing = fleet.security_groups.values().all(|g| g.project != caller.project || !g.is_default);
        if key == DEFAULT && missing {
            continue;
        }
        let group = find_group(fleet, caller, key)?;
        if !groups.contains(&group) {
            groups.push(group);
        }
    }
    Ok(groups)
}

/// Groups as servers' bodies name them; none named is the default group.
pub(super) fn names_of(fleet: &Fleet, groups: &[SecurityGroupId]) -> Vec<Value> {
    if groups.is_empty() {
        return vec![json!({ "name": DEFAULT })];
    }
    let groups = groups.iter().filter_map(|id| fleet.security_groups.get(id));
    groups.map(|group| json!({ "name": group.name })).collect()
}

fn find_image<'a>(fleet: &'a Fleet, caller: &Caller, id: &str) -> Answer<&'a Image> {
    let found = id.parse().ok().and_then(|id: ImageId| fleet.images.get(&id));
    let open = |image: &&Image| {
        caller.sees(image.project) || matches!(image.visibility, Visibility::Public | Visibility::Community)
    };
    found.filter(open).ok_or_else(|| {
        Fault::bad_request(format!("Can not find requested image {id}: imageRef must be the id of an image."))
    })
}

/// The flavor of that id, if the caller may use it.
///
/// # Errors
/// 400: the id is part of a request, not of a path.
pub(super) fn find_flavor<'a>(fleet: &'a Fleet, caller: &Caller, id: &str) -> Answer<&'a Flavor> {
    let found = fleet.flavors.get(id).filter(|flavor| flavor.public || caller.is_admin());
    found.ok_or_else(|| {
        Fault::bad_request(format!("Flavor {id} could not be found: flavorRef must be a flavor's id."))
    })
}

/// The host of that name.
///
/// # Errors
/// 400: the name is part of a request, not of a path.
pub(super) fn find_host(fleet: &Fleet, name: &str) -> Answer<HostId> {
    let found = fleet.host_by_name(name);
    found
        .map(|host| host.id)
        .ok_or_else(|| Fault::bad_request(format!("Compute host {name} could not be found.")))
}

fn nics(fleet: &Fleet, caller: &Caller, networks: Networks) -> Answer<Vec<NicRequest>> {
    let open =
        |network: &&crate::fleet::network::Network| network.shared || network.project == caller.project;
    match networks {
        Networks::Listed(nics) => {
            let mut ports = HashSet::new();
            nics.into_iter().map(|nic| find_nic(fleet, caller, nic, &mut ports)).collect()
        }
        Networks::Usual | Networks::Auto => {
            let all: Vec<_> = fleet.networks.values().filter(open).collect();
            match (all.as_slice(), matches!(networks, Networks::Auto)) {
                ([only], _) => Ok(vec![NicRequest::Network(only.id, None)]),
                ([], false) => Ok(vec![]),
                ([], true) => {
                    Err(Fault::bad_request("Your project has no network; create one, or ask for \"none\"."))
                }
                _ => Err(Fault::new(
                    StatusCode::CONFLICT,
                    "Multiple possible networks found, use a Network ID to be more specific.",
                )),
            }
        }
    }
}

fn find_nic(fleet: &Fleet, caller: &Caller, nic: Nic, ports: &mut HashSet<PortId>) -> Answer<NicRequest> {
    if let Some(id) = nic.port {
        let port =
            id.parse().ok().and_then(|id: PortId| fleet.ports.get(&id)).filter(|p| caller.sees(p.project));
        let port = port.ok_or_else(|| Fault::bad_request(format!("Port {id} could not be found.")))?;
        if nic.address.is_some() {
            return Err(Fault::bad_request(format!(
                "Port {id} has its addresses; fixed_ip cannot be asked for."
            )));
        }
        if nic.network.is_some_and(|network| network != port.network.to_string()) {
            return Err(Fault::bad_request(format!(
                "Port {id} is not on the network that is named beside it."
            )));
        }
        if !ports.insert(port.id) {
            return Err(Fault::bad_request(format!("Port {id} is named twice.")));
        }
        return Ok(NicRequest::Port(port.id));
    }
    let id = nic.network.ok_or_else(|| Fault::bad_request("A network needs 'uuid' or 'port'."))?;
    let found = id.parse().ok().and_then(|id: NetworkId| fleet.networks.get(&id));
    let network = found.filter(|n| n.shared || caller.sees(n.project));
    let network = network.ok_or_else(|| Fault::bad_request(format!("Network {id} could not be found.")))?;
    Ok(NicRequest::Network(network.id, nic.address))
}
