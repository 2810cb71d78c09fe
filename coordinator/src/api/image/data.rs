//! An image's bytes, up and down, streamed: memory does not grow with the image.

use super::{body, fault, find, find_own, is_active};
use crate::api::context::Caller;
use crate::api::fault::{Answer, Fault};
use crate::app::Shared;
use crate::images::{self, Upload};
use axum::body::{Body, BodyDataStream};
use axum::extract::{Path, State};
use axum::http::header::{CONTENT_LENGTH, CONTENT_TYPE, EXPECT, HeaderName};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use futures_util::StreamExt;
use futures_util::stream::Fuse;
use std::time::Duration;
use tokio::time::timeout;

/// Without a byte for this long an upload counts as cut off.
const SILENCE: Duration = Duration::from_secs(60);
/// After a refusal, what still comes of a body is read and thrown away for this long, so that the client gets to read
/// the answer; one that sends on sees its connection closed.
const DRAIN: Duration = Duration::from_secs(10);

const IMAGE_SIZE: HeaderName = HeaderName::from_static("x-openstack-image-size");

/// PUT /v2/images/{id}/file.
pub(super) async fn upload(
    State(app): State<Shared>,
    caller: Caller,
    Path(id): Path<String>,
    headers: HeaderMap,
    body: Body,
) -> Answer<StatusCode> {
    // Fused: what is drained after a refusal may have ended already.
    let mut stream = body.into_data_stream().fuse();
    let result = match begin(&app, &caller, &id, &headers).await {
        Ok(upload) => receive(upload, &mut stream).await,
        // A client that waits for our word before it sends is answered at once.
        Err(fault) if headers.contains_key(EXPECT) => return Err(fault),
        Err(fault) => Err(fault),
    };
    if result.is_err() {
        let drain = async { while let Some(Ok(_)) = stream.next().await {} };
        let _ = timeout(DRAIN, drain).await;
    }
    result.map(|()| StatusCode::NO_CONTENT)
}

async fn begin(app: &Shared, caller: &Caller, id: &str, headers: &HeaderMap) -> Answer<Upload> {
    caller.require_member()?;
    let kind = headers.get(CONTENT_TYPE).map(|kind| kind.as_bytes());
    if kind != Some(b"application/octet-stream") {
        let message = "An image's data has the content type application/octet-stream.";
        return Err(Fault::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, message));
    }
    let declared = declared_bytes(headers)?;
    let id = app.ledger.read(|fleet| find_own(fleet, caller, id).map(|image| image.id))?;
    Upload::begin(app, id, declared).await.map_err(fault)
}

async fn receive(upload: Upload, stream: &mut Fuse<BodyDataStream>) -> Answer<()> {
    loop {
        match timeout(SILENCE, stream.next()).await {
            Ok(Some(Ok(bytes))) => {
                if !upload.send(bytes).await {
                    break;
                }
            }
            Ok(None) => break,
            Ok(Some(Err(_))) | Err(_) => {
                upload.abandon().await;
                return Err(Fault::bad_request(
                    "The upload was cut off; nothing of it was kept. Upload the image again.",
                ));
            }
        }
    }
    upload.finish().await.map_err(fault)
}

/// How many bytes the client says there are; it may say so twice, but not differently.
fn declared_bytes(headers: &HeaderMap) -> Answer<Option<u64>> {
    let read = |name: HeaderName| {
        let Some(value) = headers.get(&name) else { return Ok(None) };
        let number = value.to_str().ok().and_then(|text| text.trim().parse::<u64>().ok());
        number.map(Some).ok_or_else(|| Fault::bad_request(format!("{name} must be a number of bytes.")))
    };
    match (read(CONTENT_LENGTH)?, read(IMAGE_SIZE)?) {
        (Some(length), Some(size)) if length != size => Err(Fault::bad_request(format!(
            "The upload's Content-Length is {length}, but its X-OpenStack-Image-Size {size}."
        ))),
        (length, size) => Ok(length.or(size)),
    }
}

/// GET /v2/images/{id}/file. What turns out not to be what was uploaded ends the connection before it is sent.
pub(super) async fn download(
    State(app): State<Shared>,
    caller: Caller,
    Path(id): Path<String>,
) -> Answer<Response> {
    let image = app.ledger.read(|fleet| find(fleet, &caller, &id).cloned())?;
    if !is_active(&image) {
        tracing::debug!(image = %image.id, status = body::status_name(image.status), "no data to download yet");
        return Ok(StatusCode::NO_CONTENT.into_response());
    }
    let size = image.size_bytes.unwrap_or_default();
    let mut response = Body::from_stream(images::download(&app, &image).await?).into_response();
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, axum::http::HeaderValue::from_static("application/octet-stream"));
    headers.insert(CONTENT_LENGTH, size.into());
    // Image clients compare it with what they received, and expect hexadecimal digits, not RFC 1864's base64.
    if let Some(md5) = image.md5.and_then(|md5| md5.parse().ok()) {
        headers.insert(HeaderName::from_static("content-md5"), md5);
    }
    Ok(response)
}
