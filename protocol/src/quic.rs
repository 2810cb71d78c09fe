//! The QUIC channel: TLS 1.3 with certificates on both sides, ALPN `godwit/1`. The crate's only I/O.

use crate::frame::{self, FrameError, HEADER_BYTES};
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{
    ClientConfig, EndpointConfig, IdleTimeout, RecvStream, SendStream, ServerConfig, TransportConfig,
};
use quinn_proto::RandomConnectionIdGenerator;
use ring::hmac;
use rustls::CipherSuite;
use rustls::client::{ResolvesClientCert, WebPkiServerVerifier};
use rustls::crypto::CryptoProvider;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::{RootCertStore, SignatureScheme};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

/// Application protocol of the channel.
pub const ALPN: &[u8] = b"godwit/1";

/// Name in the coordinator's certificate, beside its addresses.
pub const COORDINATOR_NAME: &str = "coordinator.godwit";

/// Name in a host's certificate.
pub fn host_name(host: crate::id::HostId) -> String {
    format!("{host}.host.godwit")
}

/// What the key of resets is derived for, from the coordinator's own key.
const RESET_LABEL: &[u8] = b"godwit/1 stateless reset";

/// Bytes of a connection id.
const CONNECTION_ID_BYTES: usize = 8;

/// Without a packet for this long the connection is gone.
const IDLE: Duration = Duration::from_secs(10);

/// A certificate chain with its key, and the CA that the other side must come from. What it is shown by can be
/// exchanged for newer ones while connections and listeners go on.
#[derive(Debug)]
pub struct Identity {
    shown: Arc<Shown>,
    /// The key that it began with.
    key: PrivateKeyDer<'static>,
    ca: CertificateDer<'static>,
}

/// What the next handshake shows.
#[derive(Debug)]
struct Shown(RwLock<Arc<CertifiedKey>>);

impl Shown {
    fn now(&self) -> Arc<CertifiedKey> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl ResolvesServerCert for Shown {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.now())
    }
}

impl ResolvesClientCert for Shown {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(self.now())
    }

    fn has_certs(&self) -> bool {
        true
    }
}

/// What can go wrong on the channel.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// A PEM text that is none.
    #[error("the certificate or key does not read")]
    Pem(#[source] rustls_pki_types::pem::Error),
    /// A chain without its leaf, or a leaf that is no X.509.
    #[error("there is no certificate")]
    Empty,
    /// The key of another certificate.
    #[error("the certificate is for another key")]
    OtherKey,
    /// Certificates that TLS does not take.
    #[error("the TLS set-up is refused")]
    Tls(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The frame is wrong.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// The stream ended or broke.
    #[error("the stream broke")]
    Read(#[from] quinn::ReadExactError),
    /// The stream ended or broke.
    #[error("the stream broke")]
    Write(#[from] quinn::WriteError),
    /// The connection is gone.
    #[error("the connection is gone")]
    Connection(#[from] quinn::ConnectionError),
}

/// AES with keys of 128 bits comes first: it takes a tenth less CPU time than with 256, and TLS holds it for as sound.
fn provider() -> Arc<CryptoProvider> {
    let mut provider = rustls::crypto::ring::default_provider();
    provider.cipher_suites.sort_by_key(|suite| suite.suite() != CipherSuite::TLS13_AES_128_GCM_SHA256);
    Arc::new(provider)
}

fn tls<E: std::error::Error + Send + Sync + 'static>(error: E) -> ChannelError {
    ChannelError::Tls(Box::new(error))
}

/// When a certificate ends, in seconds since 1970; none when it is no X.509.
pub fn ends_at(certificate: &CertificateDer<'_>) -> Option<i64> {
    let (_, parsed) = x509_parser::parse_x509_certificate(certificate).ok()?;
    Some(parsed.validity().not_after.timestamp())
}

impl Identity {
    /// From PEM texts; what is no certificate in `chain` is passed over.
    ///
    /// # Errors
    /// [`ChannelError::Pem`], [`ChannelError::Empty`], [`ChannelError::OtherKey`], [`ChannelError::Tls`].
    pub fn from_pem(chain: &str, key: &str, ca: &str) -> Result<Self, ChannelError> {
        let chain = CertificateDer::pem_slice_iter(chain.as_bytes()).collect::<Result<Vec<_>, _>>();
        let chain = chain.map_err(ChannelError::Pem)?;
        let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).map_err(ChannelError::Pem)?;
        let ca = CertificateDer::from_pem_slice(ca.as_bytes()).map_err(ChannelError::Pem)?;
        chain.first().and_then(ends_at).ok_or(ChannelError::Empty)?;
        let shown = CertifiedKey::from_der(chain, key.clone_key(), &provider()).map_err(|e| match e {
            rustls::Error::InconsistentKeys(_) => ChannelError::OtherKey,
            other => tls(other),
        })?;
        Ok(Self { shown: Arc::new(Shown(RwLock::new(Arc::new(shown)))), key, ca })
    }

    /// The certificate that is shown now.
    pub fn leaf(&self) -> CertificateDer<'static> {
        self.shown.now().cert[0].clone()
    }

    /// When [`Self::leaf`] ends, in seconds since 1970.
    pub fn ends_at(&self) -> i64 {
        ends_at(&self.leaf()).unwrap_or(0)
    }

    /// Whether anybody who trusts our CA would take us for `name` now.
    ///
    /// # Errors
    /// [`ChannelError::Tls`] says what such a one would find wrong.
    pub fn proves(&self, name: &str) -> Result<(), ChannelError> {
        let name = ServerName::try_from(name).map_err(tls)?;
        let verifier = WebPkiServerVerifier::builder_with_provider(self.roots()?, provider());
        let shown = self.shown.now();
        let (leaf, rest) = shown.cert.split_first().ok_or(ChannelError::Empty)?;
        let verifier = verifier.build().map_err(tls)?;
        rustls::client::danger::ServerCertVerifier::verify_server_cert(
            &*verifier,
            leaf,
            rest,
            &name,
            &[],
            UnixTime::now(),
        )
        .map(drop)
        .map_err(tls)
    }

    /// From the next handshake on, shows what `newer` shows.
    pub fn exchange(&self, newer: &Self) {
        *self.shown.0.write().unwrap_or_else(PoisonError::into_inner) = newer.shown.now();
    }

    fn roots(&self) -> Result<Arc<RootCertStore>, ChannelError> {
        let mut roots = RootCertStore::empty();
        roots.add(self.ca.clone()).map_err(tls)?;
        Ok(Arc::new(roots))
    }

    /// TLS 1.2 and 1.3 for anybody, own certificate shown, none demanded.
    ///
    /// # Errors
    /// [`ChannelError::Tls`].
    pub fn tls_public(&self, alpn: &[u8]) -> Result<rustls::ServerConfig, ChannelError> {
        let mut config = rustls::ServerConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .map_err(tls)?
            .with_no_client_auth()
            .with_cert_resolver(self.shown.clone());
        config.alpn_protocols = vec![alpn.to_vec()];
        Ok(config)
    }

    /// TLS 1.3 only, own certificate shown, the peer's demanded and checked against the CA.
    ///
    /// # Errors
    /// [`ChannelError::Tls`].
    pub fn tls_server(&self, alpn: &[u8]) -> Result<rustls::ServerConfig, ChannelError> {
        let verifier = rustls::server::WebPkiClientVerifier::builder_with_provider(self.roots()?, provider())
            .build()
            .map_err(tls)?;
        let mut config = rustls::ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(tls)?
            .with_client_cert_verifier(verifier)
            .with_cert_resolver(self.shown.clone());
        config.alpn_protocols = vec![alpn.to_vec()];
        Ok(config)
    }

    /// The client's side of [`Self::tls_server`].
    ///
    /// # Errors
    /// [`ChannelError::Tls`].
    pub fn tls_client(&self, alpn: &[u8]) -> Result<rustls::ClientConfig, ChannelError> {
        let mut config = rustls::ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(tls)?
            .with_root_certificates(self.roots()?)
            .with_client_cert_resolver(self.shown.clone());
        config.alpn_protocols = vec![alpn.to_vec()];
        Ok(config)
    }

    /// The coordinator's end of the channel.
    ///
    /// # Errors
    /// [`ChannelError::Tls`].
    pub fn quic_server(&self) -> Result<ServerConfig, ChannelError> {
        let crypto = QuicServerConfig::try_from(self.tls_server(ALPN)?).map_err(tls)?;
        let mut config = ServerConfig::with_crypto(Arc::new(crypto));
        config.transport_config(Arc::new(transport()));
        Ok(config)
    }

    /// What the coordinator's end has of its own: its resets (RFC 9000, 10.3) are signed with a key that outlives the
    /// process. An agent that still speaks to a killed one hears so from the next one at its next packet, not
    /// after ten seconds of silence.
    pub fn quic_endpoint(&self) -> EndpointConfig {
        let own = hmac::Key::new(hmac::HMAC_SHA256, self.key.secret_der());
        let reset = hmac::Key::new(hmac::HMAC_SHA256, hmac::sign(&own, RESET_LABEL).as_ref());
        let mut config = EndpointConfig::new(Arc::new(reset));
        // Quinn's default ids carry a mark of the process, and packets for another one's are passed over.
        config.cid_generator(|| Box::new(RandomConnectionIdGenerator::new(CONNECTION_ID_BYTES)));
        config
    }

    /// The agent's end of the channel.
    ///
    /// # Errors
    /// [`ChannelError::Tls`].
    pub fn quic_client(&self) -> Result<ClientConfig, ChannelError> {
        let crypto = QuicClientConfig::try_from(self.tls_client(ALPN)?).map_err(tls)?;
        let mut config = ClientConfig::new(Arc::new(crypto));
        config.transport_config(Arc::new(transport()));
        Ok(config)
    }
}

/// Small windows: reports and requests, never bulk, so that ten thousand agents fit one coordinator.
fn transport() -> TransportConfig {
    let mut config = TransportConfig::default();
    config
        .max_concurrent_bidi_streams(64_u32.into())
        .max_concurrent_uni_streams(16_u32.into())
        .stream_receive_window((1_u32 << 20).into())
        .receive_window((4_u32 << 20).into())
        .datagram_receive_buffer_size(Some(64 << 10))
        .keep_alive_interval(Some(IDLE / 3))
        .max_idle_timeout(IdleTimeout::try_from(IDLE).ok());
    config
}

/// Writes one frame.
///
/// # Errors
/// [`ChannelError::Frame`] when it is too long, [`ChannelError::Write`] when the stream is gone.
pub async fn send<T: Serialize>(stream: &mut SendStream, message: &T) -> Result<(), ChannelError> {
    stream.write_all(&frame::encode(message)?).await?;
    Ok(())
}

/// Reads one frame.
///
/// # Errors
/// [`ChannelError::Frame`] when it is too long or malformed, [`ChannelError::Read`] when the stream ended.
pub async fn receive<T: DeserializeOwned>(stream: &mut RecvStream) -> Result<T, ChannelError> {
    let mut header = [0; HEADER_BYTES];
    stream.read_exact(&mut header).await?;
    let mut body = vec![0; frame::body_length(header)?];
    stream.read_exact(&mut body).await?;
    Ok(frame::decode(&body)?)
}
