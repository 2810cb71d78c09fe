//! The HTTP client: which certificates it trusts, how long it waits, and what a failed connection means.

use crate::cloud::Cloud;
use crate::error::{Error, Result};
use rustls::CertificateError;
use std::io;
use std::path::Path;
use std::time::Duration;
use ureq::Agent;
use ureq::tls::{Certificate, PemItem, RootCerts, TlsConfig, parse_pem};

/// Where Debian and most others keep the system's authorities.
const SYSTEM_AUTHORITIES: &str = "/etc/ssl/certs/ca-certificates.crt";
/// A service that takes no connection within this is not there.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest silence in a transfer, and longest wait for an ordinary answer.
const SILENCE: Duration = Duration::from_secs(60);

/// A client for `cloud`.
///
/// # Errors
/// [`Error::Cloud`] when its certificates cannot be read.
pub(crate) fn agent(cloud: &Cloud) -> Result<Agent> {
    let roots = match &cloud.cacert {
        Some(path) => RootCerts::from(certificates(path).map_err(|reason| {
            Error::Cloud(format!("cacert of {}: {}: {reason}", cloud.origin, path.display()))
        })?),
        None => match certificates(Path::new(SYSTEM_AUTHORITIES)) {
            Ok(found) => RootCerts::from(found),
            Err(_) => RootCerts::WebPki,
        },
    };
    let tls = TlsConfig::builder().root_certs(roots).disable_verification(!cloud.verify).build();
    Ok(Agent::config_builder()
        .tls_config(tls)
        .http_status_as_error(false)
        .max_redirects(0)
        .user_agent(concat!("godwit/", env!("CARGO_PKG_VERSION")))
        .timeout_connect(Some(CONNECT_TIMEOUT))
        .timeout_recv_response(Some(SILENCE))
        .timeout_per_read(Some(SILENCE))
        .timeout_per_write(Some(SILENCE))
        .build()
        .new_agent())
}

fn certificates(path: &Path) -> std::result::Result<Vec<Certificate<'static>>, String> {
    let pem = std::fs::read(path).map_err(|error| error.to_string())?;
    let mut found = Vec::new();
    for item in parse_pem(&pem) {
        if let PemItem::Certificate(certificate) = item.map_err(|error| error.to_string())? {
            found.push(certificate);
        }
    }
    if found.is_empty() { Err("holds no certificate in PEM".into()) } else { Ok(found) }
}

/// Says what a connection's failure means for the reader.
pub(crate) fn unreachable(cloud: &Cloud, url: &str, error: ureq::Error) -> Error {
    let (reason, advice) = explain(cloud, &error);
    Error::Unreachable { url: url.to_owned(), origin: cloud.origin.clone(), reason, advice }
}

fn explain(cloud: &Cloud, error: &ureq::Error) -> (String, String) {
    if let Some(tls) = tls_error(error) {
        return explain_tls(cloud, tls);
    }
    let running = "Check that the coordinator runs and that auth_url is its address.".to_owned();
    match error {
        ureq::Error::Protocol(source) => (
            format!("it does not speak HTTP ({source})"),
            "Check the port, and whether auth_url should start with https://.".into(),
        ),
        ureq::Error::HostNotFound => ("the host name is unknown".into(), "Check auth_url.".into()),
        ureq::Error::Timeout(_) => ("no answer in time".into(), running),
        ureq::Error::Io(source) if source.kind() == io::ErrorKind::ConnectionRefused => {
            ("connection refused".into(), running)
        }
        ureq::Error::Io(source) => (source.to_string(), running),
        other => (other.to_string(), running),
    }
}

fn explain_tls(cloud: &Cloud, error: &rustls::Error) -> (String, String) {
    match error {
        rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer) => {
            let advice = match &cloud.cacert {
                Some(path) => {
                    format!("{} is another authority's: is it this coordinator's ca.pem?", path.display())
                }
                None => {
                    "Set `cacert` (or OS_CACERT) to the ca.pem that `godwit-coordinator init` wrote.".into()
                }
            };
            ("its certificate is not signed by an authority we trust".into(), advice)
        }
        rustls::Error::InvalidCertificate(
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
        ) => (
            "its certificate is for another name or address".into(),
            "Use the address given to `godwit-coordinator init --url`.".into(),
        ),
        rustls::Error::InvalidMessage(_) => (
            "it does not speak TLS".into(),
            "Check the port, and whether auth_url should start with http://.".into(),
        ),
        other => (other.to_string(), "Check cacert and the coordinator's certificate.".into()),
    }
}

fn tls_error(error: &ureq::Error) -> Option<&rustls::Error> {
    match error {
        ureq::Error::Rustls(tls) => Some(tls),
        ureq::Error::Io(source) => source.get_ref()?.downcast_ref(),
        _ => None,
    }
}

/// Percent-encodes a path segment or a query value (RFC 3986: all but the unreserved characters).
pub(crate) fn encode(text: &str) -> String {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            encoded.push(char::from(byte));
        } else {
            encoded.push_str(&format!("%{byte:02X}"));
        }
    }
    encoded
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_cannot_leave_its_path_segment() {
        assert_eq!(encode("../a b?c&d=é"), "..%2Fa%20b%3Fc%26d%3D%C3%A9");
    }
}
