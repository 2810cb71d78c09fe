//! How a host becomes one of the fleet: a one-time token, a key of its own, a certificate from the coordinator's CA.

use crate::config::{self, ConfigError};
use crate::state::{IdentityPaths, StateError, lock, write_atomic};
use godwit_protocol::error::chain;
use godwit_protocol::id::HostId;
use godwit_protocol::quic::{Identity, host_name};
use godwit_protocol::request::{JoinReply, JoinRequest};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::{Request, StatusCode, Uri};
use hyper_util::rt::TokioIo;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::{CertificateError, DigitallySignedStruct, RootCertStore, SignatureScheme};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use sha2::{Digest, Sha256};
use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

/// For the whole exchange.
const TIMEOUT: Duration = Duration::from_secs(20);

/// Longest answer that is read, in bytes.
const MAX_REPLY_BYTES: usize = 1 << 20;

/// Why a host did not join.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// Not a token.
    #[error("this is no join token: {0}; copy it whole, it looks like gw1.<random>.<64 hexadecimal digits>")]
    Token(&'static str),
    /// Not a URL to join at.
    #[error("'{0}' is no URL such as https://198.18.0.1:8774")]
    Url(String),
    /// The host has joined before.
    #[error("this host has joined already, as {host} ({}); use --force to make it a new host", path.display())]
    Joined {
        /// Who it is.
        host: String,
        /// Where that is written.
        path: PathBuf,
    },
    /// Nothing answers.
    #[error("cannot reach the coordinator at {authority}; is it running, and is the address right?")]
    Unreachable {
        /// Host and port.
        authority: String,
        /// What went wrong.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// It answers too slowly.
    #[error("the coordinator at {0} does not answer within {timeout} seconds", timeout = TIMEOUT.as_secs())]
    Timeout(String),
    /// What answers is not what the token is from.
    #[error(
        "what answers at {authority} does not prove to be the coordinator that made this token; \
         nothing was sent to it. Check the URL, and that nobody sits between"
    )]
    WrongAuthority {
        /// Host and port.
        authority: String,
        /// Which check failed.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The token is not taken.
    #[error("the coordinator refuses the token: {0}")]
    Refused(String),
    /// Another answer than expected.
    #[error("the coordinator answers with HTTP status {status}: {message}")]
    Status {
        /// The status.
        status: u16,
        /// What it says.
        message: String,
    },
    /// An answer that does not read, or contradicts the token.
    #[error("the coordinator's answer is wrong: {0}")]
    Reply(String),
    /// The key cannot be made.
    #[error("cannot make a key and a signing request")]
    Key(#[from] rcgen::Error),
    /// The TLS library refuses its set-up.
    #[error("cannot set TLS up")]
    Tls(#[from] rustls::Error),
    /// The identity cannot be kept.
    #[error(transparent)]
    State(#[from] StateError),
    /// The configuration cannot be kept.
    #[error(transparent)]
    Config(#[from] ConfigError),
}

/// A token: `gw1.<random>.<sha256 of the CA's certificate, hexadecimal>`.
struct Token {
    text: String,
    ca_hash: [u8; 32],
}

impl FromStr for Token {
    type Err = JoinError;
    fn from_str(text: &str) -> Result<Self, JoinError> {
        let text = text.trim();
        let mut parts = text.split('.');
        let (version, random, hash) = (parts.next(), parts.next(), parts.next());
        if version != Some("gw1") || parts.next().is_some() {
            return Err(JoinError::Token("it does not have the three parts of version gw1"));
        }
        if random.is_none_or(str::is_empty) {
            return Err(JoinError::Token("its secret is missing"));
        }
        let mut ca_hash = [0; 32];
        hex::decode_to_slice(hash.unwrap_or_default(), &mut ca_hash)
            .map_err(|_| JoinError::Token("its third part is no SHA-256 hash"))?;
        Ok(Self { text: text.to_owned(), ca_hash })
    }
}

/// Joins the fleet of the coordinator at `url`: proves by the token's hash whom it talks to, sends a signing
/// request, keeps the certificate in `DIR/identity` and the coordinator's address in `DIR/agent.toml`.
///
/// # Errors
/// Each of [`JoinError`]; the folder is then as it was.
pub async fn join(dir: &Path, url: &str, token: &str, force: bool) -> Result<HostId, JoinError> {
    let token: Token = token.parse()?;
    let url = Endpoint::parse(url)?;
    let paths = IdentityPaths::new(dir);
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&paths.folder)
        .map_err(|source| StateError::Io { path: paths.folder.clone(), source })?;
    let _lock = lock(dir)?;
    if let Ok(host) = fs::read_to_string(&paths.host)
        && !force
    {
        return Err(JoinError::Joined { host: host.trim().to_owned(), path: paths.host });
    }
    let key = rcgen::KeyPair::generate()?;
    let csr = rcgen::CertificateParams::default().serialize_request(&key)?.pem()?;
    let hostname = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default().trim().to_owned();
    let request = JoinRequest { token: token.text.clone(), csr, hostname };
    let reply = tokio::time::timeout(TIMEOUT, post(&url, &token, &request))
        .await
        .map_err(|_| JoinError::Timeout(url.authority.clone()))??;
    let agents: SocketAddr = reply.agents_address.parse().map_err(|_| {
        JoinError::Reply(format!("'{}' is no address for the agent's channel", reply.agents_address))
    })?;
    check_reply(&reply, &token, &key.serialize_pem())?;

    if let Err(source) = fs::remove_file(&paths.host)
        && source.kind() != std::io::ErrorKind::NotFound
    {
        return Err(StateError::Io { path: paths.host, source }.into());
    }
    write_atomic(&paths.key, key.serialize_pem().as_bytes(), 0o600)?;
    write_atomic(&paths.certificate, reply.certificate.as_bytes(), 0o644)?;
    write_atomic(&paths.ca, reply.ca.as_bytes(), 0o644)?;
    config::write_coordinator(dir, agents)?;
    write_atomic(&paths.host, format!("{}\n", reply.host).as_bytes(), 0o644)?;
    Ok(reply.host)
}

/// Where to join.
struct Endpoint {
    authority: String,
    host: String,
    port: u16,
    path: String,
}

impl Endpoint {
    fn parse(text: &str) -> Result<Self, JoinError> {
        let bad = || JoinError::Url(text.to_owned());
        let uri: Uri = text.parse().map_err(|_| bad())?;
        let authority = uri.authority().filter(|_| uri.scheme_str() == Some("https")).ok_or_else(bad)?;
        if authority.as_str().contains('@') || uri.query().is_some() {
            return Err(bad());
        }
        Ok(Self {
            authority: authority.to_string(),
            host: authority.host().trim_start_matches('[').trim_end_matches(']').to_owned(),
            port: authority.port_u16().unwrap_or(443),
            path: format!("{}/operator/v1/join", uri.path().trim_end_matches('/')),
        })
    }
}

async fn post(url: &Endpoint, token: &Token, request: &JoinRequest) -> Result<JoinReply, JoinError> {
    let unreachable = |source: Box<dyn std::error::Error + Send + Sync>| JoinError::Unreachable {
        authority: url.authority.clone(),
        source,
    };
    let name = ServerName::try_from(url.host.clone()).map_err(|_| JoinError::Url(url.authority.clone()))?;
    let connector = tokio_rustls::TlsConnector::from(Arc::new(tls_config(token)?));
    let tcp = tokio::net::TcpStream::connect((url.host.as_str(), url.port))
        .await
        .map_err(|e| unreachable(e.into()))?;
    let tls = connector.connect(name, tcp).await.map_err(|e| {
        let is_tls = e
            .get_ref()
            .is_some_and(|inner| matches!(inner.downcast_ref(), Some(rustls::Error::InvalidCertificate(_))));
        let authority = url.authority.clone();
        if is_tls { JoinError::WrongAuthority { authority, source: e.into() } } else { unreachable(e.into()) }
    })?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(tls)).await.map_err(|e| unreachable(e.into()))?;
    let driver = tokio::spawn(connection);
    let body = serde_json::to_vec(request).map_err(|e| JoinError::Reply(e.to_string()))?;
    let http = Request::post(url.path.as_str())
        .header("host", url.authority.as_str())
        .header("content-type", "application/json")
        .body(Full::new(Bytes::from(body)))
        .map_err(|_| JoinError::Url(url.authority.clone()))?;
    let response = sender.send_request(http).await.map_err(|e| unreachable(e.into()))?;
    let status = response.status();
    let body = Limited::new(response.into_body(), MAX_REPLY_BYTES).collect().await.map_err(unreachable)?;
    driver.abort();
    read_reply(status, &body.to_bytes())
}

fn read_reply(status: StatusCode, body: &[u8]) -> Result<JoinReply, JoinError> {
    /// The error's shape, as in the other APIs of the coordinator.
    #[derive(serde::Deserialize)]
    struct Failure {
        error: Message,
    }
    #[derive(serde::Deserialize)]
    struct Message {
        message: String,
    }
    if status.is_success() {
        return serde_json::from_slice(body).map_err(|e| JoinError::Reply(e.to_string()));
    }
    let message = serde_json::from_slice::<Failure>(body).map_or_else(
        |_| String::from_utf8_lossy(body).chars().take(200).collect(),
        |failure| failure.error.message,
    );
    Err(match status {
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN | StatusCode::CONFLICT => {
            JoinError::Refused(message)
        }
        _ => JoinError::Status { status: status.as_u16(), message },
    })
}

/// The answer must fit the token, the key that was sent, and the host's own name.
fn check_reply(reply: &JoinReply, token: &Token, key: &str) -> Result<(), JoinError> {
    let wrong = |what: String| JoinError::Reply(what);
    let ca = CertificateDer::from_pem_slice(reply.ca.as_bytes())
        .map_err(|e| wrong(format!("its CA certificate does not read: {e}")))?;
    if Sha256::digest(&ca).as_slice() != token.ca_hash {
        return Err(wrong("its CA certificate is not the one that the token names".to_owned()));
    }
    Identity::from_pem(&reply.certificate, key, &reply.ca)
        .and_then(|identity| identity.proves(&host_name(reply.host)))
        .map_err(|e| wrong(format!("its certificate is none for this host: {}", chain(&e))))
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

fn tls_config(token: &Token) -> Result<rustls::ClientConfig, rustls::Error> {
    let provider = provider();
    let verifier = PinnedCa { hash: token.ca_hash, provider: provider.clone() };
    Ok(rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_no_client_auth())
}

fn web_pki(
    ca: CertificateDer<'static>,
    provider: &Arc<CryptoProvider>,
) -> Result<Arc<WebPkiServerVerifier>, rustls::Error> {
    let mut roots = RootCertStore::empty();
    roots.add(ca)?;
    WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider.clone())
        .build()
        .map_err(|e| rustls::Error::General(e.to_string()))
}

/// Takes a server's chain when it holds the CA certificate of a known hash and passes every ordinary check,
/// name included, with that CA as the only root.
#[derive(Debug)]
struct PinnedCa {
    hash: [u8; 32],
    provider: Arc<CryptoProvider>,
}

/// The chain has no certificate with the token's hash.
#[derive(Debug, thiserror::Error)]
#[error("the server's chain does not hold the CA certificate that the token names")]
struct NoPinnedCa;

impl ServerCertVerifier for PinnedCa {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let pinned = intermediates.iter().find(|c| Sha256::digest(c).as_slice() == self.hash);
        let pinned = pinned.ok_or_else(|| {
            rustls::Error::from(CertificateError::Other(rustls::OtherError(Arc::new(NoPinnedCa))))
        })?;
        web_pki(pinned.clone().into_owned(), &self.provider)?.verify_server_cert(
            end_entity,
            intermediates,
            server_name,
            ocsp_response,
            now,
        )
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, signed, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, signed, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests;
