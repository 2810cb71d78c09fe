//! The compute API.

use crate::app::Shared;
use axum::Router;

/// Its routes.
pub fn router() -> Router<Shared> {
    Router::new()
}
