//! Certificates that end soon are made anew while everything goes on: the coordinator's own, and those of its hosts.

use crate::app::Shared;
use crate::ca::{self, Ca, RENEW_BEFORE};
use crate::config::Config;
use crate::init::{self, InitError};
use crate::ledger::now;
use godwit_protocol::error::chain;
use godwit_protocol::id::HostId;
use godwit_protocol::quic::{ChannelError, Identity, ends_at};
use godwit_protocol::request::AgentRequest;
use prometheus::{IntGauge, Registry};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// Time between looks at what ends.
const LOOK_EVERY: Duration = Duration::from_secs(3600);

/// Why the coordinator has no certificate to show.
#[derive(Debug, thiserror::Error)]
pub enum RenewalError {
    /// It cannot be made.
    #[error(transparent)]
    Make(#[from] InitError),
    /// It cannot be read.
    #[error("{0} cannot be read")]
    Read(PathBuf, #[source] std::io::Error),
    /// It does not fit.
    #[error("the coordinator's certificate cannot be used")]
    Unusable(#[from] ChannelError),
}

/// The coordinator's own certificate, its key and the CA; a new one when it ends soon or the addresses in
/// coordinator.toml changed. The CA is in the chain: a host that joins knows nothing of it but its hash.
///
/// # Errors
/// [`RenewalError`].
pub fn own_identity(dir: &Path, ca: &Ca, config: &Config) -> Result<Identity, RenewalError> {
    let path = dir.join("server.pem");
    let read = || std::fs::read_to_string(&path).map_err(|source| RenewalError::Read(path.clone(), source));
    let mut pem = read().unwrap_or_default();
    if !ca::serves(&pem, &init::certificate_names(config)?, now()) {
        tracing::info!("the coordinator's certificate is made anew");
        init::write_server_certificate(dir, ca, config)?;
        pem = read()?;
    }
    Ok(Identity::from_pem(&format!("{pem}{}", ca.pem()), &pem, ca.pem())?)
}

/// Whether a certificate that ends then, in seconds since 1970, is to be made anew.
pub fn is_due(ends_at: i64) -> bool {
    ends_at < (now() + RENEW_BEFORE).unix_timestamp()
}

/// Looks at all certificates for as long as the coordinator runs, and shows the newest of its own by `own`.
///
/// # Errors
/// When `registry` has such a metric already.
pub fn start(
    app: &Shared,
    dir: PathBuf,
    own: Arc<Identity>,
    registry: &Registry,
) -> Result<(), prometheus::Error> {
    let help = "When the coordinator's certificate ends, in seconds since 1970.";
    let ends = IntGauge::new("godwit_coordinator_certificate_expiry_timestamp_seconds", help)?;
    registry.register(Box::new(ends.clone()))?;
    ends.set(own.ends_at());
    let app = app.clone();
    tokio::spawn(async move {
        loop {
            tokio::time::sleep(LOOK_EVERY).await;
            match own_identity(&dir, &app.ca, &app.config) {
                Ok(newest) => own.exchange(&newest),
                Err(error) => tracing::error!(error = chain(&error), "the coordinator keeps its certificate"),
            }
            ends.set(own.ends_at());
            let due = (now() + RENEW_BEFORE).unix_timestamp();
            for (host, shown) in app.agents.ending_before(due) {
                renew_host(&app, host, &shown).await;
            }
        }
    });
    Ok(())
}

/// Gives a connected host a certificate that follows on the one it has `shown`.
pub async fn renew_host(app: &Shared, host: HostId, shown: &CertificateDer<'_>) {
    let newer = match app.ca.renew_host(host, shown, now()) {
        Ok(newer) => newer,
        Err(error) => {
            tracing::error!(%host, error = chain(&error), "the host's certificate cannot be renewed");
            return;
        }
    };
    let ends = CertificateDer::from_pem_slice(newer.as_bytes()).ok().and_then(|der| ends_at(&der));
    match app.agents.call(host, AgentRequest::TakeCertificate(newer)).await {
        Ok(_) => {
            app.agents.renewed(host, ends.unwrap_or(0));
            tracing::info!(%host, "the host's certificate is renewed");
        }
        Err(error) => tracing::warn!(%host, error = error.message, "the host keeps its certificate"),
    }
}
