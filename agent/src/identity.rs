//! Who the host is while its agent runs: read once, shown everywhere, its certificate exchanged before it ends.

use crate::state::{IdentityPaths, StateError, write_atomic};
use godwit_protocol::error::{ErrorKind, RequestError, chain};
use godwit_protocol::id::HostId;
use godwit_protocol::quic::{ChannelError, Identity, host_name};
use prometheus::{IntGauge, Registry};
use std::fs;
use std::path::Path;
use std::sync::Arc;

/// Why there is no identity.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// A file.
    #[error(transparent)]
    State(#[from] StateError),
    /// What the files hold.
    #[error("the identity in the agent's folder cannot be used; join again with --force")]
    Unusable(#[from] ChannelError),
}

/// Reads what is in `DIR/identity`.
///
/// # Errors
/// [`IdentityError`].
pub fn read(dir: &Path) -> Result<Identity, IdentityError> {
    let paths = IdentityPaths::new(dir);
    Ok(Identity::from_pem(&text(&paths.certificate)?, &text(&paths.key)?, &text(&paths.ca)?)?)
}

fn text(path: &Path) -> Result<String, StateError> {
    fs::read_to_string(path).map_err(|source| StateError::Io { path: path.to_owned(), source })
}

/// The host's identity, and where it is kept.
pub struct HostIdentity {
    shown: Arc<Identity>,
    host: HostId,
    paths: IdentityPaths,
    ends: IntGauge,
}

impl HostIdentity {
    /// `shown`, which is in the agent's folder `dir`, of `host`.
    ///
    /// # Errors
    /// When `registry` holds such a metric already.
    pub fn new(
        shown: Arc<Identity>,
        host: HostId,
        dir: &Path,
        registry: &Registry,
    ) -> Result<Self, prometheus::Error> {
        let help = "When the host's certificate ends, in seconds since 1970.";
        let ends = IntGauge::new("godwit_agent_certificate_expiry_timestamp_seconds", help)?;
        registry.register(Box::new(ends.clone()))?;
        ends.set(shown.ends_at());
        Ok(Self { shown, host, paths: IdentityPaths::new(dir), ends })
    }

    /// Keeps a newer certificate of the host's own key, and shows it from the next handshake on. One that ends no later
    /// than the present one changes nothing.
    ///
    /// # Errors
    /// What is wrong with it: it is for another key or host, of another CA, or not valid now. The present one stays.
    pub fn take(&self, certificate: &str) -> Result<(), RequestError> {
        let kept = |error: StateError| RequestError::new(ErrorKind::Unavailable, chain(&error));
        let (key, ca) = (text(&self.paths.key).map_err(kept)?, text(&self.paths.ca).map_err(kept)?);
        let newer = Identity::from_pem(certificate, &key, &ca)
            .and_then(|newer| newer.proves(&host_name(self.host)).map(|()| newer))
            .map_err(|error| {
                let text = format!("the certificate is none for this host: {}", chain(&error));
                RequestError::new(ErrorKind::Invalid, text)
            })?;
        if newer.ends_at() > self.shown.ends_at() {
            write_atomic(&self.paths.certificate, certificate.as_bytes(), 0o644).map_err(kept)?;
            self.shown.exchange(&newer);
            self.ends.set(newer.ends_at());
            tracing::info!("the host's certificate is renewed");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::datapath::stream::tests::{Ca, ca};
    use rcgen::{CertificateParams, KeyPair};
    use std::time::{Duration, SystemTime};

    const DAY: u64 = 86_400;

    /// A certificate that ends in so many days.
    fn certificate(ca: &Ca, host: HostId, key: &KeyPair, days: u64) -> String {
        let mut params = CertificateParams::new([host_name(host)]).unwrap();
        params.not_after = (SystemTime::now() + Duration::from_secs(days * DAY)).into();
        params.signed_by(key, ca).unwrap().pem()
    }

    #[test]
    fn a_newer_certificate_is_shown_and_kept_and_any_other_is_refused() {
        let (dir, host, key) = (tempfile::tempdir().unwrap(), HostId::random(), KeyPair::generate().unwrap());
        let (ours, other) = (ca(), ca());
        let paths = IdentityPaths::new(dir.path());
        fs::create_dir(&paths.folder).unwrap();
        fs::write(&paths.certificate, certificate(&ours, host, &key, 20)).unwrap();
        fs::write(&paths.key, key.serialize_pem()).unwrap();
        fs::write(&paths.ca, ours.pem()).unwrap();
        let shown = Arc::new(read(dir.path()).unwrap());
        let identity = HostIdentity::new(shown.clone(), host, dir.path(), &Registry::new()).unwrap();
        let (first, kept) = (shown.ends_at(), || fs::read_to_string(&paths.certificate).unwrap());

        for wrong in [
            certificate(&other, host, &key, 300),
            certificate(&ours, HostId::random(), &key, 300),
            certificate(&ours, host, &KeyPair::generate().unwrap(), 300),
            "no certificate".to_owned(),
        ] {
            assert_eq!(identity.take(&wrong).unwrap_err().kind, ErrorKind::Invalid);
        }
        identity.take(&certificate(&ours, host, &key, 10)).unwrap();
        assert_eq!(shown.ends_at(), first);

        let newer = certificate(&ours, host, &key, 300);
        identity.take(&newer).unwrap();
        assert_eq!(kept(), newer);
        assert_eq!(shown.ends_at(), read(dir.path()).unwrap().ends_at());
        assert!(shown.ends_at() > first);
        assert_eq!(identity.ends.get(), shown.ends_at());
    }
}
