//! Why a request was not answered as wished, in the shape that each service's clients read.

use crate::api::Service;
use crate::error::Error;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde_json::json;
use std::borrow::Cow;

/// A refusal on its way to the user. It travels as an extension of an empty response; the frame around all routes
/// gives it the body of the service that was asked.
#[derive(Clone, Debug)]
pub struct Fault {
    status: StatusCode,
    message: String,
    name: Option<Cow<'static, str>>,
}

/// What handlers return.
pub type Answer<T = Response> = Result<T, Fault>;

impl Fault {
    /// `status`, with a text for the user.
    pub fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Self { status, message: message.into(), name: None }
    }

    /// 400: the request is wrong.
    pub fn bad_request(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, message)
    }

    /// 401: no token, or not a good one.
    pub fn unauthorized(message: impl Into<String>) -> Self {
        Self::new(StatusCode::UNAUTHORIZED, message)
    }

    /// 403: the user may not.
    pub fn forbidden(message: impl Into<String>) -> Self {
        Self::new(StatusCode::FORBIDDEN, message)
    }

    /// 404: there is no `noun` called `key`.
    pub fn not_found(noun: &'static str, key: impl ToString) -> Self {
        Error::not_found(noun, key).into()
    }

    /// The same with the name that the network service's clients see as `type`.
    #[must_use]
    pub fn named(mut self, name: impl Into<Cow<'static, str>>) -> Self {
        self.name = Some(name.into());
        self
    }

    /// The same with another status.
    #[must_use]
    pub fn with_status(mut self, status: StatusCode) -> Self {
        self.status = status;
        self
    }

    /// Its status.
    pub fn status(&self) -> StatusCode {
        self.status
    }

    /// Its text.
    pub fn message(&self) -> &str {
        &self.message
    }

    /// What axum itself answers when no route, method or extractor took a request.
    pub fn of_status(status: StatusCode) -> Self {
        let message = match status {
            StatusCode::NOT_FOUND => "The resource could not be found.",
            StatusCode::METHOD_NOT_ALLOWED => "The method is not allowed for this resource.",
            StatusCode::PAYLOAD_TOO_LARGE => "The request's body is too large.",
            other => other.canonical_reason().unwrap_or("The request failed."),
        };
        Self::new(status, message)
    }

    /// The response in the words of `service`.
    pub fn render(&self, service: Service) -> Response {
        let (code, message) = (self.status.as_u16(), &self.message);
        let body = match service {
            Service::Compute => json!({ compute_key(self.status): { "code": code, "message": message } }),
            Service::Network => {
                let kind = self.name.as_deref().unwrap_or_else(|| network_type(self.status));
                json!({ "NeutronError": { "type": kind, "message": message, "detail": "" } })
            }
            Service::Identity => {
                json!({ "error": { "code": code, "message": message, "title": self.title() } })
            }
            Service::Placement => json!({ "errors": [{
                "status": code, "title": self.title(), "detail": message, "code": "placement.undefined_code",
            }] }),
            // Glance answers with a page of HTML; both image clients show a message in JSON whole and unadorned.
            Service::Image | Service::Operator => json!({ "error": { "code": code, "message": message } }),
        };
        (self.status, axum::Json(body)).into_response()
    }

    fn title(&self) -> &'static str {
        self.status.canonical_reason().unwrap_or("Error")
    }
}

fn compute_key(status: StatusCode) -> &'static str {
    match status.as_u16() {
        400 => "badRequest",
        401 => "unauthorized",
        403 => "forbidden",
        404 => "itemNotFound",
        405 => "badMethod",
        409 => "conflictingRequest",
        413 | 429 => "overLimit",
        415 => "badMediaType",
        501 => "notImplemented",
        503 => "serviceUnavailable",
        _ => "computeFault",
    }
}

/// What clients call an action.
fn compute_action(action: &str) -> &str {
    match action {
        "live_migrate" => "os-migrateLive",
        "confirm_resize" => "confirmResize",
        "revert_resize" => "revertResize",
        other => other,
    }
}

fn network_type(status: StatusCode) -> &'static str {
    match status.as_u16() {
        400 => "BadRequest",
        401 => "HTTPUnauthorized",
        403 => "PolicyNotAuthorized",
        404 => "HTTPNotFound",
        409 => "Conflict",
        501 => "HTTPNotImplemented",
        503 => "ServiceUnavailable",
        _ => "HTTPInternalServerError",
    }
}

impl IntoResponse for Fault {
    fn into_response(self) -> Response {
        let mut response = self.status.into_response();
        response.extensions_mut().insert(self);
        response
    }
}

impl From<Error> for Fault {
    fn from(error: Error) -> Self {
        let status = match &error {
            Error::NotFound { .. } => StatusCode::NOT_FOUND,
            Error::Conflict(_) | Error::State { .. } | Error::Exhausted(_) => StatusCode::CONFLICT,
            Error::Invalid(_) => StatusCode::BAD_REQUEST,
            Error::Forbidden(_) => StatusCode::FORBIDDEN,
            Error::Unavailable(_) => StatusCode::SERVICE_UNAVAILABLE,
            Error::Store(_) | Error::Pool { .. } => {
                // The user's text says what failed; why is the operators' business.
                tracing::error!(error = godwit_protocol::error::chain(&error), "a request failed");
                StatusCode::INTERNAL_SERVER_ERROR
            }
        };
        let fault = Self::new(status, error.to_string());
        match error {
            Error::NotFound { noun, .. } => fault.named(format!("{noun}NotFound")),
            Error::State { action, instance, status: state } => {
                let action = compute_action(action);
                let state = state.name();
                Self::new(
                    status,
                    format!("Cannot '{action}' instance {instance} while it is in vm_state {state}"),
                )
            }
            _ => fault,
        }
    }
}

impl From<crate::store::StoreError> for Fault {
    fn from(error: crate::store::StoreError) -> Self {
        Error::from(error).into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http_body_util::BodyExt;
    use serde_json::Value;

    async fn body(fault: Fault, service: Service) -> (StatusCode, String) {
        let response = fault.render(service);
        let status = response.status();
        let bytes = response.into_body().collect().await.unwrap().to_bytes();
        (status, String::from_utf8(bytes.to_vec()).unwrap())
    }

    #[tokio::test]
    async fn each_service_gives_a_refusal_its_own_shape() {
        let fault = || Fault::from(Error::not_found("Network", "blue"));
        let json = |text: &str| serde_json::from_str::<Value>(text).unwrap();
        let message = "Network blue could not be found.";
        for (service, expected) in [
            (Service::Compute, json!({ "itemNotFound": { "code": 404, "message": message } })),
            (
                Service::Network,
                json!({ "NeutronError": { "type": "NetworkNotFound", "message": message, "detail": "" } }),
            ),
            (
                Service::Identity,
                json!({ "error": { "code": 404, "message": message, "title": "Not Found" } }),
            ),
            (Service::Image, json!({ "error": { "code": 404, "message": message } })),
            (Service::Operator, json!({ "error": { "code": 404, "message": message } })),
        ] {
            let (status, text) = body(fault(), service).await;
            assert_eq!((status, json(&text)), (StatusCode::NOT_FOUND, expected));
        }
    }
}
