//! Lists as the network service gives them: filtered by any attribute, sorted, paged, cut to the wanted fields.

use crate::api::attributes::read_flag;
use crate::api::context::{Links, Params};
use crate::api::fault::{Answer, Fault};
use axum::response::Json;
use serde_json::{Map, Value, json};

/// Keys of the query that are no filters.
const NO_FILTERS: [&str; 6] = ["fields", "limit", "marker", "page_reverse", "sort_key", "sort_dir"];

/// Filters by labels: all of these, any of these, and their opposites.
const TAG_FILTERS: [&str; 4] = ["tags", "tags-any", "not-tags", "not-tags-any"];

/// A list's name, and the attributes that may be filtered by.
pub(super) struct Collection {
    /// Plural, as in the path.
    pub(super) name: &'static str,
    /// All attributes, also those that only administrators see.
    pub(super) attributes: &'static [&'static str],
}

/// The answer to a list request for `views`, which are in their usual order.
pub(super) fn answer(
    collection: &Collection,
    mut views: Vec<Value>,
    params: &Params,
    links: &Links,
) -> Answer<Json<Value>> {
    check_filters(collection, params)?;
    views.retain(|view| matches(view, params));
    sort(&mut views, params);
    let name = collection.name;
    let limit: Option<usize> = params.number("limit")?.filter(|limit| *limit > 0);
    let backward = params.flag("page_reverse")?.unwrap_or(false);
    let (first, last) = window(&views, params.get("marker"), limit, backward)?;
    let mut links_out = Vec::new();
    let link = |rel: &str, view: &Value, backward: bool| {
        let marker = params.with("marker", text(&view["id"]).as_str());
        let query = Params::parse(&marker).with("page_reverse", if backward { "True" } else { "False" });
        json!({ "rel": rel, "href": links.to(&format!("/network/v2.0/{name}?{query}")) })
    };
    if limit.is_some() && first < last {
        if last < views.len() {
            links_out.push(link("next", &views[last - 1], false));
        }
        if first > 0 {
            links_out.push(link("previous", &views[first], true));
        }
    }
    let page: Vec<Value> = views.drain(first..last).map(|view| with_fields(view, params)).collect();
    let mut body = json!({ name: page });
    if !links_out.is_empty() {
        body[format!("{name}_links")] = links_out.into();
    }
    Ok(Json(body))
}

/// The places of the first view of a page and of the one after its last.
fn window(
    views: &[Value],
    marker: Option<&str>,
    limit: Option<usize>,
    backward: bool,
) -> Answer<(usize, usize)> {
    let limit = limit.unwrap_or(views.len());
    let at = match marker {
        None => None,
        Some(marker) => Some(views.iter().position(|view| view["id"] == marker).ok_or_else(|| {
            Fault::bad_request(format!(
                "Invalid input for operation: no object with id {marker} for the marker."
            ))
        })?),
    };
    Ok(if backward {
        let last = at.unwrap_or(views.len());
        (last.saturating_sub(limit), last)
    } else {
        let first = at.map_or(0, |at| at + 1);
        (first, first.saturating_add(limit).min(views.len()))
    })
}

fn check_filters(collection: &Collection, params: &Params) -> Answer<()> {
    let known = |key: &str| {
        NO_FILTERS.contains(&key) || TAG_FILTERS.contains(&key) || collection.attributes.contains(&key)
    };
    match params.iter().find(|(key, _)| !known(key)) {
        Some((key, _)) => Err(Fault::bad_request(format!("['{key}'] is invalid attribute for filtering."))),
        None => Ok(()),
    }
}

/// Whether a view passes all filters. Values of the same key are alternatives.
fn matches(view: &Value, params: &Params) -> bool {
    params.iter().all(|(key, value)| match key {
        _ if NO_FILTERS.contains(&key) => true,
        _ if TAG_FILTERS.contains(&key) => passes_tags(view, key, value),
        "fixed_ips" => passes_fixed_ips(view, params),
        _ => params.all(key).any(|value| equals(&view[key], value)),
    })
}

fn equals(value: &Value, wanted: &str) -> bool {
    match value {
        Value::String(text) => text == wanted,
        Value::Bool(flag) => read_flag(&Value::String(wanted.to_owned())) == Some(*flag),
        Value::Number(number) => number.to_string() == wanted,
        Value::Null => wanted.is_empty() || wanted == "None",
        Value::Array(items) => items.iter().any(|item| equals(item, wanted)),
        Value::Object(_) => false,
    }
}

fn passes_tags(view: &Value, key: &str, value: &str) -> bool {
    let mut wanted = value.split(',');
    let has = |tag: &str| view["tags"].as_array().is_some_and(|tags| tags.iter().any(|t| t == tag));
    match key {
        "tags" => wanted.all(has),
        "tags-any" => wanted.any(has),
        "not-tags" => !wanted.all(has),
        _ => !wanted.any(has),
    }
}

/// `fixed_ips=subnet_id=…&fixed_ips=ip_address=…`: an address of the port passes each kind that is named.
fn passes_fixed_ips(view: &Value, params: &Params) -> bool {
    let passes = |ip: &Value| {
        ["subnet_id", "ip_address"].into_iter().all(|kind| {
            let mut wanted =
                params.all("fixed_ips").filter_map(|f| f.strip_prefix(kind)?.strip_prefix('=')).peekable();
            wanted.peek().is_none() || wanted.any(|wanted| equals(&ip[kind], wanted))
        })
    };
    let readable =
        params.all("fixed_ips").all(|f| f.starts_with("subnet_id=") || f.starts_with("ip_address="));
    readable && view["fixed_ips"].as_array().is_some_and(|ips| ips.iter().any(passes))
}

fn sort(views: &mut [Value], params: &Params) {
    let mut directions = params.all("sort_dir");
    let keys: Vec<(&str, bool)> =
        params.all("sort_key").map(|key| (key, directions.next() == Some("desc"))).collect();
    views.sort_by(|a, b| {
        let orders = keys.iter().map(|(key, descending)| {
            let order = match (a[*key].as_i64(), b[*key].as_i64()) {
                (Some(a), Some(b)) => a.cmp(&b),
                _ => text(&a[*key]).cmp(&text(&b[*key])),
            };
            if *descending { order.reverse() } else { order }
        });
        orders.fold(std::cmp::Ordering::Equal, std::cmp::Ordering::then)
    });
}

fn text(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

/// Only the wanted attributes; all when none is named.
pub(super) fn with_fields(view: Value, params: &Params) -> Value {
    let fields: Vec<&str> =
        params.all("fields").flat_map(|f| f.split(',')).filter(|f| !f.is_empty()).collect();
    match view {
        Value::Object(map) if !fields.is_empty() => {
            let kept: Map<String, Value> =
                map.into_iter().filter(|(key, _)| fields.contains(&key.as_str())).collect();
            Value::Object(kept)
        }
        view => view,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const COLLECTION: Collection =
        Collection { name: "ports", attributes: &["id", "name", "up", "mtu", "fixed_ips", "owner"] };

    fn views() -> Vec<Value> {
        let view = |id: &str, mtu: i64, ip: &str| {
            json!({ "id": id, "name": format!("n{id}"), "up": mtu > 5, "mtu": mtu, "tags": [id, "x"],
                    "fixed_ips": [{ "subnet_id": "s", "ip_address": ip }] })
        };
        vec![view("a", 10, "10.0.0.1"), view("b", 9, "10.0.0.2"), view("c", 2, "10.0.0.3")]
    }

    fn ids(query: &str) -> Answer<String> {
        let links = Links::for_tests("https://cloud");
        let Json(body) = answer(&COLLECTION, views(), &Params::parse(query), &links)?;
        Ok(body["ports"].as_array().unwrap().iter().map(|v| v["id"].as_str().unwrap()).collect())
    }

    #[test]
    fn filters_are_alternatives_within_a_key_and_all_needed_between_keys() {
        for (query, expected) in [
            ("", "abc"),
            ("id=a&id=c", "ac"),
            ("id=a&id=c&up=True", "a"),
            ("up=false", "c"),
            ("mtu=9", "b"),
            ("fixed_ips=ip_address%3D10.0.0.2", "b"),
            ("fixed_ips=ip_address%3D10.0.0.2&fixed_ips=subnet_id%3Dt", ""),
            ("fixed_ips=nonsense", ""),
            ("tags=a,x", "a"),
            ("tags-any=a,b", "ab"),
            ("not-tags=a,x", "bc"),
            ("not-tags-any=a,b", "c"),
            ("sort_key=mtu", "cba"),
            ("sort_key=up&sort_dir=desc&sort_key=name&sort_dir=desc", "bac"),
        ] {
            assert_eq!(ids(query).unwrap(), expected, "{query}");
        }
        assert!(ids("colour=red").unwrap_err().message().contains("colour"));
    }

    #[test]
    fn pages_follow_each_other_both_ways_and_name_their_neighbours() {
        assert_eq!(ids("limit=2").unwrap(), "ab");
        assert_eq!(ids("limit=2&marker=b").unwrap(), "c");
        assert_eq!(ids("limit=1&marker=c&page_reverse=True").unwrap(), "b");
        assert!(ids("marker=z").is_err());
        let links = Links::for_tests("https://cloud");
        let Json(body) = answer(&COLLECTION, views(), &Params::parse("limit=1&marker=a"), &links).unwrap();
        let hrefs: Vec<String> = body["ports_links"]
            .as_array()
            .unwrap()
            .iter()
            .map(|l| format!("{} {}", l["rel"], l["href"]))
            .collect();
        let base = "https://cloud/network/v2.0/ports?limit=1&marker=b&page_reverse=";
        assert_eq!(hrefs, [format!("\"next\" \"{base}False\""), format!("\"previous\" \"{base}True\"")]);
    }

    #[test]
    fn only_the_wanted_fields_are_told() {
        let view = with_fields(views().remove(0), &Params::parse("fields=id&fields=name"));
        assert_eq!(view, json!({ "id": "a", "name": "na" }));
    }
}
