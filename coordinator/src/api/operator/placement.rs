//! Where an instance would go, why not elsewhere, and how many of it there is room for. Nothing is reserved by asking.

use super::only;
use crate::api::context::{Body, Caller};
use crate::api::fault::{Answer, Fault};
use crate::app::{App, Shared};
use crate::fleet::Fleet;
use crate::fleet::image::Image;
use crate::fleet::instance::Flavor;
use crate::operations::place::{changes, choice, group_terms, limits, overlay_mtu, physical_networks, views};
use crate::placement::described::DescribedFleet;
use crate::placement::search::candidates;
use crate::placement::simulate::{Fill, fill};
use crate::placement::{Choice, HostRefusal, HostState, HostView, Placement, Request, Roster, Terms};
use axum::Json;
use axum::extract::State;
use godwit_protocol::id::InstanceId;
use serde::Deserialize;
use serde_json::{Value, json};
use std::collections::BTreeMap;

const GIB: u64 = 1 << 30;

/// Placements of one simulation, at most.
const MOST: u64 = 1_000_000;

/// What is to be placed, by id or name.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Question {
    flavor: String,
    #[serde(default)]
    image: Option<String>,
    #[serde(default)]
    network: Option<String>,
    #[serde(default)]
    availability_zone: Option<String>,
    #[serde(default)]
    server_group: Option<String>,
}

/// What is to be placed again and again, and where.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Simulation {
    flavor: String,
    #[serde(default)]
    image: Option<String>,
    #[serde(default)]
    availability_zone: Option<String>,
    /// At most so many.
    #[serde(default)]
    most: Option<u64>,
    /// A fleet that nobody has yet; this one otherwise.
    #[serde(default)]
    fleet: Option<DescribedFleet>,
}

/// A flavor and perhaps an image, found.
struct Subject {
    flavor: Flavor,
    image: Option<Image>,
}

impl Subject {
    fn find(fleet: &Fleet, flavor: &str, image: Option<&String>) -> Answer<Self> {
        let found = match fleet.flavors.get(flavor) {
            Some(flavor) => vec![flavor.clone()],
            None => fleet.flavors.values().filter(|f| f.name == flavor).cloned().collect(),
        };
        let flavor = only(found, "Flavor", flavor)?;
        let image = image.map(|key| {
            let named = |i: &&Image| i.id.to_string() == *key || i.name.as_deref() == Some(key);
            only(fleet.images.values().filter(named).cloned().collect(), "Image", key)
        });
        Ok(Self { flavor, image: image.transpose()? })
    }

    fn request(&self) -> Answer<Request> {
        request(&self.flavor, self.image.as_ref())
    }
}

/// POST /placement/explain.
pub(super) async fn explain(
    State(app): State<Shared>,
    caller: Caller,
    Body(question): Body<Question>,
) -> Answer<Json<Value>> {
    caller.require_admin()?;
    app.ledger.read(|fleet| {
        let subject = Subject::find(fleet, &question.flavor, question.image.as_ref())?;
        let request = subject.request()?;
        let choice = Choice { terms: terms(fleet, &caller, &subject, &question)?, ..choice(&app.config) };
        let views = views(fleet, &app.config);
        let answers = candidates(&views, &request, &choice);
        let mut hosts: Vec<Value> = answers.iter().map(row).collect();
        hosts.extend(silent(fleet));
        let changes = match answers.iter().any(Result::is_ok) {
            true => vec![],
            false => changes(fleet, &app.config, &request, &choice, fleet.hosts.keys().copied(), |_| true, usize::MAX),
        };
        let change = |change: &crate::placement::suggest::Change| {
            json!({ "kind": change.name(), "message": format!("it would fit if {change}") })
        };
        let changes: Vec<Value> = changes.iter().map(change).collect();
        Ok(Json(json!({
            "flavor": subject.flavor.id,
            "image": subject.image.map(|i| i.id),
            "hosts": hosts,
            "smallest_change": changes.first(),
            "changes": changes,
        })))
    })
}

fn terms(fleet: &Fleet, caller: &Caller, subject: &Subject, question: &Question) -> Answer<Terms> {
    let network = question.network.as_ref().map(|key| {
        let named = |n: &&crate::fleet::network::Network| n.id.to_string() == *key || n.name == *key;
        only(fleet.networks.values().filter(named).collect(), "Network", key).map(|network| network.id)
    });
    let group = question.server_group.as_ref().map(|key| {
        let named = |g: &&crate::fleet::group::ServerGroup| g.id.to_string() == *key || g.name == *key;
        only(fleet.server_groups.values().filter(named).collect(), "Server group", key).map(|group| group.id)
    });
    let network = network.transpose()?;
    let nobody = InstanceId(uuid::Uuid::nil());
    Ok(Terms {
        zone: zone(fleet, question.availability_zone.as_ref())?,
        project: caller.project.to_string(),
        group: group.transpose()?.and_then(|group| group_terms(fleet, group, nobody)),
        overlay_mtu: overlay_mtu(fleet, network),
        physical_networks: physical_networks(fleet, network),
        ..Terms::of_specs(&subject.flavor.extra_specs)
    })
}

fn zone(fleet: &Fleet, zone: Option<&String>) -> Answer<Option<String>> {
    match zone {
        Some(zone) if !fleet.zones().contains(zone.as_str()) => {
            Err(Fault::not_found("Availability zone", zone))
        }
        zone => Ok(zone.cloned()),
    }
}

/// Hosts that never reported are nowhere in placement's view, but their operator looks for them here.
fn silent(fleet: &Fleet) -> impl Iterator<Item = Value> {
    fleet.hosts.values().filter(|host| host.inventory.is_none()).map(|host| {
        json!({
            "host": host.name,
            "fits": false,
            "rule": "host_lost",
            "need": "up",
            "have": "never reported",
            "message": "the host has joined, but its agent has not reported yet",
        })
    })
}

/// POST /placement/simulate.
pub(super) async fn simulate(
    State(app): State<Shared>,
    caller: Caller,
    Body(wish): Body<Simulation>,
) -> Answer<Json<Value>> {
    caller.require_admin()?;
    let most = wish.most.unwrap_or(MOST);
    if most == 0 || most > MOST {
        return Err(Fault::bad_request(format!("most must be from 1 to {MOST}, not {most}.")));
    }
    let (subject, request, choice, roster) = app.ledger.read(|fleet| {
        let subject = Subject::find(fleet, &wish.flavor, wish.image.as_ref())?;
        let request = subject.request()?;
        let zone = match &wish.fleet {
            None => zone(fleet, wish.availability_zone.as_ref())?,
            Some(_) => wish.availability_zone.clone(),
        };
        let terms = Terms {
            zone,
            project: caller.project.to_string(),
            ..Terms::of_specs(&subject.flavor.extra_specs)
        };
        let choice = Choice { terms, ..choice(&app.config) };
        let roster = match &wish.fleet {
            None => snapshot(fleet, &app),
            Some(described) => described
                .roster(limits(&app.config))
                .map_err(|error| Fault::bad_request(error.to_string()))?,
        };
        Ok::<_, Fault>((subject, request, choice, roster))
    })?;
    // A large fleet takes seconds; nobody else waits for them.
    let filled = tokio::task::spawn_blocking(move || {
        fill(roster, &request, &choice, most, |host: &HostView| host.state == HostState::Up)
    });
    let filled = filled.await.map_err(|_| Fault::of_status(axum::http::StatusCode::INTERNAL_SERVER_ERROR))?;
    Ok(Json(filling(&subject, &filled)))
}

/// The hosts as they are, each as alive as it is.
fn snapshot(fleet: &Fleet, app: &App) -> Roster {
    let mut roster = fleet.roster().clone();
    for host in views(fleet, &app.config) {
        roster.change(host.id, |view| view.state = host.state);
    }
    roster
}

fn filling(subject: &Subject, fill: &Fill) -> Value {
    let hosts: Vec<Value> =
        fill.by_host.iter().map(|(host, count)| json!({ "host": host, "count": count })).collect();
    let mut rules: BTreeMap<&str, u64> = BTreeMap::new();
    for host in fill.stopped_by.iter().flat_map(|refusal| &refusal.hosts) {
        *rules.entry(host.shortfall.rule.name()).or_default() += 1;
    }
    json!({
        "flavor": subject.flavor.id,
        "image": subject.image.as_ref().map(|i| i.id),
        "placed": fill.placed,
        "complete": fill.stopped_by.is_some(),
        "hosts": hosts,
        "stopped_by": fill.stopped_by.as_ref().map(ToString::to_string),
        "rules": rules,
    })
}

fn request(flavor: &Flavor, image: Option<&Image>) -> Answer<Request> {
    let none = Default::default();
    let properties = image.map_or(&none, |image| &image.properties);
    let request = Request::from_specs(flavor.vcpus, flavor.memory_mib, &flavor.extra_specs, properties)
        .map_err(|error| Fault::bad_request(error.to_string()))?;
    let disk_bytes = match flavor.disk_gib {
        0 => image.and_then(|image| image.virtual_size_bytes).unwrap_or(0),
        gib => gib.saturating_mul(GIB),
    };
    Ok(Request { disk_bytes, ..request })
}

fn row(answer: &Result<Placement, HostRefusal>) -> Value {
    match answer {
        Ok(placement) => json!({
            "host": placement.host_name,
            "fits": true,
            "rule": null,
            "need": null,
            "have": null,
            "message": place(placement),
        }),
        Err(refusal) => json!({
            "host": refusal.name,
            "fits": false,
            "rule": refusal.shortfall.rule.name(),
            "need": refusal.shortfall.need.to_string(),
            "have": refusal.shortfall.have.to_string(),
            "guest_cell": refusal.cells.map(|pair| pair.guest),
            "host_cell": refusal.cells.map(|pair| pair.host),
            "message": refusal.to_string(),
        }),
    }
}

/// Where each guest cell would be.
fn place(placement: &Placement) -> String {
    if placement.cells.is_empty() {
        return format!("{} vCPUs float over the shared CPUs", placement.vcpus);
    }
    let cell = |cell: &crate::placement::fit::PlacedCell| {
        let pinned: Vec<String> = cell.pinning.pins.cpus().map(|cpu| cpu.to_string()).collect();
        let cpus = if pinned.is_empty() { String::new() } else { format!(", CPUs {}", pinned.join(" ")) };
        format!("guest cell {} on cell {}{cpus}", cell.guest, cell.host)
    };
    placement.cells.iter().map(cell).collect::<Vec<_>>().join("; ")
}
