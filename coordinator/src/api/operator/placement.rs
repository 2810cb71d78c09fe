//! Where an instance would go, and why not elsewhere. Nothing is reserved by asking.

use super::only;
use crate::api::context::{Body, Caller};
use crate::api::fault::{Answer, Fault};
use crate::app::Shared;
use crate::fleet::image::Image;
use crate::fleet::instance::Flavor;
use crate::operations::place::{limits, views};
use crate::placement::search::candidates;
use crate::placement::{HostRefusal, Order, Placement, Request};
use axum::Json;
use axum::extract::State;
use serde::Deserialize;
use serde_json::{Value, json};

const GIB: u64 = 1 << 30;

/// What is to be placed, by id or name.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Question {
    flavor: String,
    #[serde(default)]
    image: Option<String>,
}

/// POST /placement/explain.
pub(super) async fn explain(
    State(app): State<Shared>,
    caller: Caller,
    Body(question): Body<Question>,
) -> Answer<Json<Value>> {
    caller.require_admin()?;
    let (flavor, image) = app.ledger.read(|fleet| {
        let flavor = match fleet.flavors.get(&question.flavor) {
            Some(flavor) => vec![flavor.clone()],
            None => fleet.flavors.values().filter(|f| f.name == question.flavor).cloned().collect(),
        };
        let flavor = only(flavor, "Flavor", &question.flavor)?;
        let image = question.image.as_ref().map(|key| {
            let named = |i: &&Image| i.id.to_string() == *key || i.name.as_deref() == Some(key);
            only(fleet.images.values().filter(named).cloned().collect(), "Image", key)
        });
        Ok::<_, Fault>((flavor, image.transpose()?))
    })?;
    let request = request(&flavor, image.as_ref())?;
    let (views, silent) = app.ledger.read(|fleet| {
        let silent =
            fleet.hosts.values().filter(|host| host.inventory.is_none()).map(|host| host.name.clone());
        (views(fleet, &app.config), silent.collect::<Vec<_>>())
    });
    let answers = candidates(&views, &request, &limits(&app.config), Order::Spread);
    let mut hosts: Vec<Value> = answers.iter().map(row).collect();
    // A host that never reported is nowhere in placement's view, but its operator looks for it here.
    hosts.extend(silent.into_iter().map(|name| {
        json!({
            "host": name,
            "fits": false,
            "rule": "host_lost",
            "need": "up",
            "have": "never reported",
            "message": "the host has joined, but its agent has not reported yet",
        })
    }));
    Ok(Json(json!({ "flavor": flavor.id, "image": image.map(|i| i.id), "hosts": hosts })))
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
        let pinned: Vec<String> = cell.pinning.pins.values().map(u32::to_string).collect();
        let cpus = if pinned.is_empty() { String::new() } else { format!(", CPUs {}", pinned.join(" ")) };
        format!("guest cell {} on cell {}{cpus}", cell.guest, cell.host)
    };
    placement.cells.iter().map(cell).collect::<Vec<_>>().join("; ")
}
