//! What surrounds every request: its id, its path without a slash at the end, its microversion, the shape of a
//! refusal, its line in the log and its place in the metrics.

use crate::api::Service;
use crate::api::context::MAX_BODY_BYTES;
use crate::api::fault::Fault;
use crate::api::microversion::Microversion;
use crate::app::Shared;
use axum::extract::{DefaultBodyLimit, Request, State};
use axum::http::header::{CONTENT_TYPE, HeaderName, HeaderValue, WWW_AUTHENTICATE};
use axum::http::uri::{PathAndQuery, Uri};
use axum::http::{HeaderMap, StatusCode};
use axum::middleware::Next;
use axum::response::Response;
use prometheus::{HistogramOpts, HistogramVec, IntCounterVec, Opts, Registry};
use std::time::Instant;
use uuid::Uuid;

const REQUEST_ID: HeaderName = HeaderName::from_static("x-openstack-request-id");
const OLD_REQUEST_ID: HeaderName = HeaderName::from_static("x-compute-request-id");

/// Longest request line's path and query, in bytes.
const MAX_URI_BYTES: usize = 16 << 10;

/// Counts requests.
#[derive(Clone)]
pub struct Requests {
    total: IntCounterVec,
    seconds: HistogramVec,
}

impl Requests {
    /// Counters in `registry`.
    ///
    /// # Errors
    /// When the registry has them already.
    pub fn new(registry: &Registry) -> Result<Self, prometheus::Error> {
        let total =
            Opts::new("godwit_coordinator_api_requests_total", "Requests answered, by service and status.");
        let seconds = HistogramOpts::new(
            "godwit_coordinator_api_request_seconds",
            "Time from a request's head to the head of its answer, by service.",
        )
        .buckets(vec![0.001, 0.005, 0.02, 0.1, 0.5, 2.0, 10.0, 60.0]);
        let requests = Self {
            total: IntCounterVec::new(total, &["service", "status"])?,
            seconds: HistogramVec::new(seconds, &["service"])?,
        };
        registry.register(Box::new(requests.total.clone()))?;
        registry.register(Box::new(requests.seconds.clone()))?;
        Ok(requests)
    }
}

/// The id of a request, as its answer tells it; operations and logs refer to it.
#[derive(Clone, Debug)]
pub struct RequestId(pub String);

/// The middleware around all routes.
pub async fn frame(
    State((app, requests)): State<(Shared, Requests)>,
    mut request: Request,
    next: Next,
) -> Response {
    let start = Instant::now();
    let id = format!("req-{}", Uuid::new_v4());
    let method = request.method().clone();
    *request.uri_mut() = without_slash(request.uri());
    let path = request.uri().path().to_owned();
    let service = Service::of_path(&path);
    request.extensions_mut().insert(RequestId(id.clone()));
    let (version, response) = match admit(service, &request) {
        Ok(version) => {
            if let Some(version) = version {
                request.extensions_mut().insert(version);
            }
            DefaultBodyLimit::apply(DefaultBodyLimit::max(MAX_BODY_BYTES), &mut request);
            (version, next.run(request).await)
        }
        Err(fault) => (None, fault.render(service)),
    };
    let mut response = shape(service, response);
    let status = response.status();
    let headers = response.headers_mut();
    if let Some(version) = version {
        version.echo(service, headers);
    }
    if status == StatusCode::UNAUTHORIZED {
        challenge(&app.config.url, headers);
    }
    if let Ok(value) = HeaderValue::from_str(&id) {
        if service == Service::Compute {
            headers.insert(OLD_REQUEST_ID, value.clone());
        }
        headers.insert(REQUEST_ID, value);
    }
    let seconds = start.elapsed().as_secs_f64();
    requests.total.with_label_values(&[service.name(), status.as_str()]).inc();
    requests.seconds.with_label_values(&[service.name()]).observe(seconds);
    if status.is_server_error() {
        tracing::warn!(%method, path, status = status.as_u16(), seconds, request = id, "answered with a failure");
    } else {
        tracing::debug!(%method, path, status = status.as_u16(), seconds, request = id, "answered");
    }
    response
}

/// What can be said before anything is routed.
fn admit(service: Service, request: &Request) -> Result<Option<Microversion>, Fault> {
    if request.uri().path_and_query().is_some_and(|p| p.as_str().len() > MAX_URI_BYTES) {
        return Err(Fault::of_status(StatusCode::URI_TOO_LONG));
    }
    // Discovery answers whatever version a client wishes for: it is how the client learns which there are.
    if is_discovery(request.uri().path()) {
        return Ok(None);
    }
    Microversion::of_request(service, request.headers())
}

fn is_discovery(path: &str) -> bool {
    matches!(path, "/compute" | "/compute/v2.0" | "/compute/v2.1" | "/placement")
}

/// The same URI with no slash at the end and none doubled: clients write both.
fn without_slash(uri: &Uri) -> Uri {
    let path = uri.path();
    if !path.contains("//") && (path == "/" || !path.ends_with('/')) {
        return uri.clone();
    }
    let mut clean = String::with_capacity(path.len());
    for segment in path.split('/').filter(|segment| !segment.is_empty()) {
        clean.push('/');
        clean.push_str(segment);
    }
    if clean.is_empty() {
        clean.push('/');
    }
    if let Some(query) = uri.query() {
        clean.push('?');
        clean.push_str(query);
    }
    let mut parts = uri.clone().into_parts();
    match clean.parse::<PathAndQuery>() {
        Ok(path) => parts.path_and_query = Some(path),
        Err(_) => return uri.clone(),
    }
    Uri::from_parts(parts).unwrap_or_else(|_| uri.clone())
}

/// Gives a refusal the body that the service's clients read. One that has a JSON body of its own keeps it.
fn shape(service: Service, response: Response) -> Response {
    let status = response.status();
    let own =
        response.headers().get(CONTENT_TYPE).is_some_and(|t| t.as_bytes().starts_with(b"application/json"));
    if let Some(fault) = response.extensions().get::<Fault>() {
        let mut shaped = fault.render(service);
        for (name, value) in response.headers() {
            if name != CONTENT_TYPE && name != axum::http::header::CONTENT_LENGTH {
                shaped.headers_mut().insert(name.clone(), value.clone());
            }
        }
        shaped
    } else if (status.is_client_error() || status.is_server_error()) && !own {
        let mut shaped = Fault::of_status(status).render(service);
        if let Some(allow) = response.headers().get(axum::http::header::ALLOW) {
            shaped.headers_mut().insert(axum::http::header::ALLOW, allow.clone());
        }
        shaped
    } else {
        response
    }
}

fn challenge(url: &str, headers: &mut HeaderMap) {
    let value = format!("Keystone uri=\"{}/identity\"", url.trim_end_matches('/'));
    if let Ok(value) = HeaderValue::from_str(&value) {
        headers.insert(WWW_AUTHENTICATE, value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_loses_its_last_slash_and_doubled_ones_but_keeps_its_query() {
        let clean = |uri: &'static str| without_slash(&Uri::from_static(uri)).to_string();
        assert_eq!(clean("/compute/"), "/compute");
        assert_eq!(clean("/image//v2/images/?limit=2"), "/image/v2/images?limit=2");
        assert_eq!(clean("/"), "/");
        assert_eq!(clean("//"), "/");
        assert_eq!(clean("/a/b?c=/"), "/a/b?c=/");
    }
}
