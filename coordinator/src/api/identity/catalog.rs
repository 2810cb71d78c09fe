//! Which services there are and where.

use super::{DOMAIN_ID, DOMAIN_NAME};
use crate::api::context::{Links, Session};
use axum::Json;
use serde_json::{Value, json};

/// The region of all endpoints.
pub(super) const REGION: &str = "RegionOne";

/// Type and path of each service. There is no block storage yet, so it is not listed: clients then leave out what
/// they would ask of it.
const SERVICES: [(&str, &str); 5] = [
    ("identity", "/identity/v3"),
    ("compute", "/compute/v2.1"),
    ("image", "/image"),
    ("network", "/network"),
    ("placement", "/placement"),
];

/// The catalog with links to where the client came from. The same URL serves all three interfaces.
pub(super) fn catalog(links: &Links) -> Value {
    let entry = |(kind, path): (&str, &str)| {
        let endpoint = |interface: &str| {
            json!({
                "id": format!("{kind}-{interface}"),
                "interface": interface,
                "region": REGION,
                "region_id": REGION,
                "url": links.to(path),
            })
        };
        let endpoints = ["public", "internal", "admin"].map(endpoint);
        json!({ "id": kind, "type": kind, "name": format!("godwit-{kind}"), "endpoints": endpoints })
    };
    SERVICES.map(entry).into_iter().collect()
}

/// The only domain, as tokens name it.
pub(super) fn domain() -> Value {
    json!({ "id": DOMAIN_ID, "name": DOMAIN_NAME })
}

/// GET /v3/auth/catalog.
pub(super) async fn show(_: Session, links: Links) -> Json<Value> {
    Json(json!({ "catalog": catalog(&links), "links": { "self": links.to("/identity/v3/auth/catalog") } }))
}
