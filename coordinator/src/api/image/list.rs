//! Lists of images: filters, order, pages.

use super::body::{self, show};
use crate::api::context::{Caller, Params};
use crate::api::fault::{Answer, Fault};
use crate::app::Shared;
use crate::fleet::Time;
use crate::fleet::image::{Image, Visibility};
use axum::Json;
use axum::extract::State;
use godwit_protocol::image::DiskFormat;
use serde_json::{Value, json};
use std::cmp::Ordering;
use time::format_description::well_known::Rfc3339;

/// Images of a page when the client does not say.
const PAGE: usize = 100;
/// Most images of a page.
const MAX_PAGE: usize = 1000;

/// Query keys that are no filters.
const CONTROLS: [&str; 6] = ["limit", "marker", "sort", "sort_key", "sort_dir", "member_status"];

/// GET /v2/images.
pub(super) async fn list(State(app): State<Shared>, caller: Caller, params: Params) -> Answer<Json<Value>> {
    let limit = params.number("limit")?.unwrap_or(PAGE).min(MAX_PAGE);
    let order = order(&params)?;
    let mut images: Vec<Image> = app.ledger.read(|fleet| fleet.images.values().cloned().collect());
    images.sort_by(|a, b| compare(a, b, &order));
    let rest = match params.get("marker") {
        None => &images[..],
        Some(marker) => {
            let found = images.iter().position(|image| image.id.to_string() == *marker);
            let found = found.filter(|index| super::sees(&caller, &images[*index]));
            &images[found
                .ok_or_else(|| Fault::bad_request(format!("There is no image {marker} to go on after.")))?
                + 1..]
        }
    };
    let mut page = Vec::new();
    let mut more = false;
    for image in rest {
        if matches(image, &caller, &params)? {
            if page.len() == limit {
                more = true;
                break;
            }
            page.push(image);
        }
    }
    let mut answer = json!({
        "images": page.iter().map(|image| show(image)).collect::<Vec<_>>(),
        "schema": "/v2/schemas/images",
        "first": first(&params),
    });
    if let (true, Some(last)) = (more, page.last()) {
        answer["next"] = json!(format!("/v2/images?{}", params.with("marker", &last.id.to_string())));
    }
    Ok(Json(answer))
}

fn first(params: &Params) -> String {
    match params.without("marker") {
        query if query.is_empty() => "/v2/images".into(),
        query => format!("/v2/images?{query}"),
    }
}

/// Whether an image is in the list that was asked for.
fn matches(image: &Image, caller: &Caller, params: &Params) -> Answer<bool> {
    let own = image.project == caller.project;
    let wanted = params.get("visibility");
    let visible = match (image.visibility, wanted) {
        (_, Some("all")) => super::sees(caller, image),
        (visibility, Some(wanted)) => {
            if body::visibility(&json!(wanted)).is_none() {
                return Err(Fault::bad_request(format!("{wanted:?} is no visibility of images.")));
            }
            body::visibility_name(visibility) == wanted && super::sees(caller, image)
        }
        // Community images are for those who know of them.
        (Visibility::Community, None) => own,
        (Visibility::Public, None) => true,
        (_, None) => own || caller.is_admin(),
    };
    let hidden = params.flag("os_hidden")?.unwrap_or(false);
    if !visible || image.hidden != hidden {
        return Ok(false);
    }
    for (key, value) in params.iter() {
        if !CONTROLS.contains(&key) && !passes(image, key, value)? {
            return Ok(false);
        }
    }
    Ok(true)
}

fn passes(image: &Image, key: &str, value: &str) -> Answer<bool> {
    let number = || {
        value
            .parse::<u64>()
            .map_err(|_| Fault::bad_request(format!("{key} must be a whole number, not {value:?}.")))
    };
    Ok(match key {
        "visibility" | "os_hidden" => true,
        "id" => is_one_of(value, &image.id.to_string()),
        "name" => is_one_of(value, image.name.as_deref().unwrap_or_default()),
        "status" => is_one_of(value, body::status_name(image.status)),
        "owner" => image.project.to_string() == value,
        "tag" => image.tags.iter().any(|tag| tag == value),
        "disk_format" => is_one_of(value, image.disk_format.map_or("", DiskFormat::as_str)),
        "container_format" => is_one_of(value, image.container_format.as_deref().unwrap_or_default()),
        "checksum" => image.md5.as_deref() == Some(value),
        "os_hash_value" => image.sha512.as_deref() == Some(value),
        "protected" => image.protected == Params::read_flag(key, value)?,
        "min_disk" => image.min_disk_gib == number()?,
        "min_ram" => image.min_memory_mib == number()?,
        "size_min" => image.size_bytes.unwrap_or(0) >= number()?,
        "size_max" => image.size_bytes.unwrap_or(0) <= number()?,
        "created_at" => compares(image.created_at, value)?,
        "updated_at" => compares(image.updated_at, value)?,
        property => image.properties.get(property).is_some_and(|v| v == value),
    })
}

/// `a`, or `in:a,b,"c,d"`.
fn is_one_of(wanted: &str, value: &str) -> bool {
    let Some(list) = wanted.strip_prefix("in:") else { return wanted == value };
    let mut quoted = false;
    let mut items = vec![String::new()];
    for character in list.chars() {
        match character {
            '"' => quoted = !quoted,
            ',' if !quoted => items.push(String::new()),
            other => {
                if let Some(item) = items.last_mut() {
                    item.push(other);
                }
            }
        }
    }
    items.iter().any(|item| item == value)
}

/// `gte:2026-01-31T12:00:00Z` and the like; times count in whole seconds, as they are shown.
fn compares(time: Time, wanted: &str) -> Answer<bool> {
    let wrong = || {
        Fault::bad_request(format!("{wanted:?} is no comparison with a time, like gte:2026-01-31T12:00:00Z."))
    };
    let (operator, text) = match wanted.split_once(':') {
        Some((operator @ ("gt" | "gte" | "lt" | "lte" | "eq" | "neq"), text)) => (operator, text),
        _ => ("eq", wanted),
    };
    let text = if text.ends_with('Z') || text.contains('+') { text.to_owned() } else { format!("{text}Z") };
    let other = Time::parse(&text, &Rfc3339).map_err(|_| wrong())?.unix_timestamp();
    let ordering = time.unix_timestamp().cmp(&other);
    Ok(match operator {
        "gt" => ordering.is_gt(),
        "gte" => ordering.is_ge(),
        "lt" => ordering.is_lt(),
        "lte" => ordering.is_le(),
        "neq" => ordering.is_ne(),
        _ => ordering.is_eq(),
    })
}

/// Keys with their direction: true is ascending.
fn order(params: &Params) -> Answer<Vec<(String, bool)>> {
    let direction = |text: &str| match text {
        "asc" => Ok(true),
        "desc" => Ok(false),
        other => Err(Fault::bad_request(format!("{other:?} is no direction to sort in: asc or desc."))),
    };
    let mut order = Vec::new();
    if let Some(sort) = params.get("sort") {
        for item in sort.split(',') {
            let (key, dir) = item.split_once(':').unwrap_or((item, "desc"));
            order.push((key.trim().to_owned(), direction(dir.trim())?));
        }
    } else {
        let directions: Vec<&str> = params.all("sort_dir").collect();
        for (index, key) in params.all("sort_key").enumerate() {
            let dir = directions.get(index).or(directions.last()).copied().unwrap_or("desc");
            order.push((key.to_owned(), direction(dir)?));
        }
    }
    const KEYS: [&str; 8] =
        ["name", "status", "container_format", "disk_format", "size", "id", "created_at", "updated_at"];
    if let Some((key, _)) = order.iter().find(|(key, _)| !KEYS.contains(&key.as_str())) {
        return Err(Fault::bad_request(format!(
            "Images cannot be sorted by {key:?}, but by {}.",
            KEYS.join(", ")
        )));
    }
    // Later keys only decide between equals, so that the order is total and pages neither repeat nor skip.
    let default = params.get("sort_dir").map(direction).transpose()?.unwrap_or(false);
    order.extend([("created_at".to_owned(), default), ("id".to_owned(), default)]);
    Ok(order)
}

fn compare(a: &Image, b: &Image, order: &[(String, bool)]) -> Ordering {
    let by = |key: &str| match key {
        "name" => a.name.cmp(&b.name),
        "status" => body::status_name(a.status).cmp(body::status_name(b.status)),
        "container_format" => a.container_format.cmp(&b.container_format),
        "disk_format" => a.disk_format.map(DiskFormat::as_str).cmp(&b.disk_format.map(DiskFormat::as_str)),
        "size" => a.size_bytes.cmp(&b.size_bytes),
        "created_at" => a.created_at.cmp(&b.created_at),
        "updated_at" => a.updated_at.cmp(&b.updated_at),
        _ => a.id.cmp(&b.id),
    };
    let decide = |(key, ascending): &(String, bool)| if *ascending { by(key) } else { by(key).reverse() };
    order.iter().map(decide).find(|ordering| ordering.is_ne()).unwrap_or(Ordering::Equal)
}
