//! How a machine becomes a host: an administrator makes a token, the machine sends it with a signing request.

use crate::api::attributes::time_text;
use crate::api::context::{Body, Caller};
use crate::api::fault::{Answer, Fault};
use crate::app::{App, Shared};
use crate::ca::{self, CaError, JOIN_TOKEN_LIFE, JoinError};
use crate::error::Error;
use crate::fleet::Change;
use crate::init::authority;
use crate::ledger::now;
use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use godwit_protocol::error::chain;
use godwit_protocol::id::HostId;
use godwit_protocol::request::{JoinReply, JoinRequest};
use serde::Deserialize;
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::time::Duration;

/// Longest life of a join token.
const MAX_LIFE: Duration = Duration::from_secs(30 * 86_400);
/// Join tokens that may wait to be used.
const MAX_TOKENS: usize = 1000;

/// Body of POST /join-tokens.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct TokenRequest {
    ttl_seconds: Option<u64>,
}

/// POST /join-tokens.
pub(super) async fn create_token(
    State(app): State<Shared>,
    caller: Caller,
    Body(request): Body<TokenRequest>,
) -> Answer<(StatusCode, Json<Value>)> {
    caller.require_admin()?;
    let life = request.ttl_seconds.map_or(JOIN_TOKEN_LIFE, Duration::from_secs);
    if life.is_zero() || life > MAX_LIFE {
        return Err(Fault::bad_request(format!("ttl_seconds must be from 1 to {}.", MAX_LIFE.as_secs())));
    }
    let (token, record) = app.ca.join_token(now(), life).map_err(internal)?;
    let expires_at = record.expires_at;
    app.ledger
        .change(|fleet| {
            // Expired ones that nobody used go; used ones stay with their host, so that a replay is told apart.
            let expired = fleet.join_tokens.values().filter(|t| t.used_by.is_none() && t.expires_at <= now());
            let mut changes: Vec<Change> = expired.map(Change::gone).collect();
            let waiting = fleet.join_tokens.values().filter(|t| t.used_by.is_none()).count();
            if waiting - changes.len() >= MAX_TOKENS {
                return Err(Error::Exhausted(format!("{MAX_TOKENS} join tokens wait to be used already.")));
            }
            changes.push(record.into());
            Ok::<_, Error>((changes, ()))
        })
        .await?;
    Ok((StatusCode::CREATED, Json(json!({ "token": token, "expires_at": time_text(expires_at) }))))
}

fn internal(error: CaError) -> Fault {
    tracing::error!(error = chain(&error), "no join token could be made");
    Fault::new(StatusCode::INTERNAL_SERVER_ERROR, error.to_string())
}

/// POST /join. The join token is the only thing that is asked for.
pub(super) async fn join(
    State(app): State<Shared>,
    Body(request): Body<JoinRequest>,
) -> Answer<Json<JoinReply>> {
    // A stranger must not get as far as our parsing of certificates.
    if !app.ledger.read(|fleet| fleet.join_tokens.contains_key(&ca::token_hash(&request.token))) {
        return Err(refused(&request, JoinError::Unknown));
    }
    let host = HostId::random();
    let signed = app.ca.sign_host(host, &request.csr, now())?;
    let agents_address = agents_address(&app).await?;
    let name = request.hostname.trim();
    app.ledger
        .change(|fleet| ca::join(fleet, &request.token, host, name, &signed.key_digest, now()))
        .await
        .map_err(|error| refused(&request, error))?;
    tracing::info!(%host, name, "a host has joined");
    Ok(Json(JoinReply { host, certificate: signed.certificate, ca: app.ca.pem().to_owned(), agents_address }))
}

/// Tells the stranger, and the log: somebody may be trying tokens.
fn refused(request: &JoinRequest, error: JoinError) -> Fault {
    tracing::warn!(hostname = ?request.hostname, %error, "a host is not let in");
    fault(error)
}

fn fault(error: JoinError) -> Fault {
    let status = match &error {
        JoinError::Unknown | JoinError::Expired => StatusCode::UNAUTHORIZED,
        JoinError::Used | JoinError::NameTaken(_) => StatusCode::CONFLICT,
        JoinError::BadName(_) => StatusCode::BAD_REQUEST,
        JoinError::Other(_) => {
            return match error {
                JoinError::Other(error) => error.into(),
                other => Fault::bad_request(other.to_string()),
            };
        }
    };
    Fault::new(status, error.to_string())
}

/// Where agents find the channel: the address that is listened on or, when that is any, the URL's.
async fn agents_address(app: &App) -> Answer<String> {
    let listen = app.config.agents_listen;
    if !listen.ip().is_unspecified() {
        return Ok(listen.to_string());
    }
    let unknown = || {
        Fault::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "The coordinator does not know its own address: its URL's name does not resolve. Set agents_listen.",
        )
    };
    let (host, _) = authority(&app.config.url).map_err(|_| unknown())?;
    let mut found = tokio::net::lookup_host((host, listen.port())).await.map_err(|_| unknown())?;
    let address: SocketAddr = found.next().ok_or_else(unknown)?;
    Ok(address.to_string())
}
