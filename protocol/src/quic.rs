//! The QUIC channel: TLS 1.3 with certificates on both sides, ALPN `godwit/1`. The crate's only I/O.

use crate::frame::{self, FrameError, HEADER_BYTES};
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{
    ClientConfig, EndpointConfig, IdleTimeout, RecvStream, SendStream, ServerConfig, TransportConfig,
};
use quinn_proto::RandomConnectionIdGenerator;
use ring::hmac;
use rustls::RootCertStore;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::sync::Arc;
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

/// A certificate chain, its key and the CA that the other side must come from.
#[derive(Debug)]
pub struct Identity {
    /// Own chain, leaf first.
    pub chain: Vec<CertificateDer<'static>>,
    /// Own key.
    pub key: PrivateKeyDer<'static>,
    /// The CA.
    pub ca: CertificateDer<'static>,
}

/// What can go wrong on the channel.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// A PEM text that is none.
    #[error("the certificate or key does not read")]
    Pem(#[source] rustls_pki_types::pem::Error),
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

impl Identity {
    /// From PEM texts.
    ///
    /// # Errors
    /// [`ChannelError::Pem`].
    pub fn from_pem(chain: &str, key: &str, ca: &str) -> Result<Self, ChannelError> {
        let chain = CertificateDer::pem_slice_iter(chain.as_bytes()).collect::<Result<Vec<_>, _>>();
        Ok(Self {
            chain: chain.map_err(ChannelError::Pem)?,
            key: PrivateKeyDer::from_pem_slice(key.as_bytes()).map_err(ChannelError::Pem)?,
            ca: CertificateDer::from_pem_slice(ca.as_bytes()).map_err(ChannelError::Pem)?,
        })
    }

    fn roots(&self) -> Result<Arc<RootCertStore>, ChannelError> {
        let mut roots = RootCertStore::empty();
        roots.add(self.ca.clone()).map_err(|e| ChannelError::Tls(Box::new(e)))?;
        Ok(Arc::new(roots))
    }

    /// TLS 1.3 only, own certificate shown, the peer's demanded and checked against the CA.
    ///
    /// # Errors
    /// [`ChannelError::Tls`].
    pub fn tls_server(&self, alpn: &[u8]) -> Result<rustls::ServerConfig, ChannelError> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let tls = |e: rustls::Error| ChannelError::Tls(Box::new(e));
        let verifier =
            rustls::server::WebPkiClientVerifier::builder_with_provider(self.roots()?, provider.clone())
                .build()
                .map_err(|e| ChannelError::Tls(Box::new(e)))?;
        let mut config = rustls::ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(tls)?
            .with_client_cert_verifier(verifier)
            .with_single_cert(self.chain.clone(), self.key.clone_key())
            .map_err(tls)?;
        config.alpn_protocols = vec![alpn.to_vec()];
        Ok(config)
    }

    /// The client's side of [`Self::tls_server`].
    ///
    /// # Errors
    /// [`ChannelError::Tls`].
    pub fn tls_client(&self, alpn: &[u8]) -> Result<rustls::ClientConfig, ChannelError> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let tls = |e: rustls::Error| ChannelError::Tls(Box::new(e));
        let mut config = rustls::ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(tls)?
            .with_root_certificates(self.roots()?)
            .with_client_auth_cert(self.chain.clone(), self.key.clone_key())
            .map_err(tls)?;
        config.alpn_protocols = vec![alpn.to_vec()];
        Ok(config)
    }

    /// The coordinator's end of the channel.
    ///
    /// # Errors
    /// [`ChannelError::Tls`].
    pub fn quic_server(&self) -> Result<ServerConfig, ChannelError> {
        let tls =
            QuicServerConfig::try_from(self.tls_server(ALPN)?).map_err(|e| ChannelError::Tls(Box::new(e)))?;
        let mut config = ServerConfig::with_crypto(Arc::new(tls));
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
        let tls =
            QuicClientConfig::try_from(self.tls_client(ALPN)?).map_err(|e| ChannelError::Tls(Box::new(e)))?;
        let mut config = ClientConfig::new(Arc::new(tls));
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
