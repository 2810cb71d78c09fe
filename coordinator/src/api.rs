//! The API: OpenStack's wire protocol for users and tools, `/operator/v1` for what OpenStack cannot say.
//! Handlers translate and decide nothing; OpenStack's words stay below this module.

mod attributes;
pub mod compute;
pub mod context;
pub mod fault;
pub mod frame;
pub mod identity;
pub mod image;
pub mod microversion;
pub mod network;
pub mod operator;
pub mod placement;
pub mod server;
#[cfg(test)]
pub(crate) mod testing;

use crate::app::Shared;
use axum::Router;
use axum::routing::get;

/// A part of the API: its errors have a shape of their own, and its requests are counted by its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Service {
    /// `/identity`.
    Identity,
    /// `/image`.
    Image,
    /// `/compute`.
    Compute,
    /// `/network`.
    Network,
    /// `/placement`.
    Placement,
    /// `/operator`.
    Operator,
}

impl Service {
    /// Which service a path belongs to; what is none of the others is answered as the operator API answers.
    pub fn of_path(path: &str) -> Self {
        match path.split('/').nth(1) {
            Some("identity") => Self::Identity,
            Some("image") => Self::Image,
            Some("compute") => Self::Compute,
            Some("network") => Self::Network,
            Some("placement") => Self::Placement,
            _ => Self::Operator,
        }
    }

    /// Its name in metrics and logs.
    pub fn name(self) -> &'static str {
        match self {
            Self::Identity => "identity",
            Self::Image => "image",
            Self::Compute => "compute",
            Self::Network => "network",
            Self::Placement => "placement",
            Self::Operator => "operator",
        }
    }
}

/// Everything the API serves. A path's trailing slash is ignored, so routes are written without.
pub fn router(app: Shared, requests: frame::Requests) -> Router {
    let services = Router::new()
        .route("/", get(operator::roots))
        .nest("/identity", identity::router())
        .nest("/image", image::router())
        .nest("/compute", compute::router())
        .nest("/network", network::router())
        .nest("/placement", placement::router())
        .nest("/operator/v1", operator::router())
        .with_state(app.clone());
    // The frame changes paths, so it must run before anything is routed: hence a router around the router.
    Router::new()
        .fallback_service(services)
        .layer(axum::middleware::from_fn_with_state((app, requests), frame::frame))
}
