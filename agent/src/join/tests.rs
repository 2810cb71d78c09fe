//! Joining against a small HTTPS server on loopback.

use super::*;
use hyper::Response;
use hyper::service::service_fn;
use std::os::unix::fs::PermissionsExt;
use std::sync::Mutex;
use tokio::net::TcpListener;

/// What the server does with a request.
type Reply = Arc<dyn Fn(JoinRequest) -> (StatusCode, String) + Send + Sync>;

/// A coordinator's CA and its HTTPS end.
struct Server {
    url: String,
    ca: Ca,
    asked: Arc<Mutex<u32>>,
}

/// A CA whose certificates can be asked for.
struct Ca {
    issuer: Arc<rcgen::Issuer<'static, rcgen::KeyPair>>,
    pem: String,
    hash: String,
}

impl Ca {
    fn new() -> Self {
        let mut params = rcgen::CertificateParams::default();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let key = rcgen::KeyPair::generate().unwrap();
        let certificate = params.self_signed(&key).unwrap();
        let hash = hex::encode(Sha256::digest(certificate.der()));
        Self { issuer: Arc::new(rcgen::Issuer::new(params, key)), pem: certificate.pem(), hash }
    }

    fn token(&self) -> String {
        format!("gw1.c2VjcmV0.{}", self.hash)
    }

    /// Signs as the coordinator does: only the key is taken from the request.
    fn reply(&self) -> impl Fn(JoinRequest) -> JoinReply + Send + Sync + 'static {
        let (issuer, ca) = (self.issuer.clone(), self.pem.clone());
        move |request| {
            let csr = rcgen::CertificateSigningRequestParams::from_pem(&request.csr).unwrap();
            let host = HostId::random();
            let params = rcgen::CertificateParams::new(vec![host_name(host)]).unwrap();
            let certificate = params.signed_by(&csr.public_key, &issuer).unwrap().pem();
            JoinReply { host, certificate, ca: ca.clone(), agents_address: "127.0.0.1:8775".into() }
        }
    }
}

impl Server {
    /// Serves `reply` with a certificate for `name`.
    async fn start(ca: Ca, name: &str, reply: Reply) -> Self {
        let key = rcgen::KeyPair::generate().unwrap();
        let params = rcgen::CertificateParams::new(vec![name.to_owned()]).unwrap();
        let leaf = params.signed_by(&key, &ca.issuer).unwrap();
        let root = CertificateDer::from_pem_slice(ca.pem.as_bytes()).unwrap();
        let config = rustls::ServerConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![leaf.der().clone(), root], key.into())
            .unwrap();
        let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("https://{}", listener.local_addr().unwrap());
        let asked: Arc<Mutex<u32>> = Arc::default();
        let counted = asked.clone();
        tokio::spawn(async move {
            while let Ok((tcp, _)) = listener.accept().await {
                let Ok(tls) = acceptor.accept(tcp).await else { continue };
                let (reply, counted) = (reply.clone(), counted.clone());
                let service = service_fn(move |request: Request<hyper::body::Incoming>| {
                    let (reply, counted) = (reply.clone(), counted.clone());
                    async move {
                        *counted.lock().unwrap() += 1;
                        assert_eq!(request.uri().path(), "/operator/v1/join");
                        let body = request.into_body().collect().await.unwrap().to_bytes();
                        let (status, text) = reply(serde_json::from_slice(&body).unwrap());
                        Response::builder().status(status).body(Full::new(Bytes::from(text)))
                    }
                });
                let http = hyper::server::conn::http1::Builder::new();
                let _ = http.serve_connection(TokioIo::new(tls), service).await;
            }
        });
        Self { url, ca, asked }
    }

    async fn honest() -> Self {
        let ca = Ca::new();
        let reply = ca.reply();
        let json = move |request| (StatusCode::CREATED, serde_json::to_string(&reply(request)).unwrap());
        Self::start(ca, "127.0.0.1", Arc::new(json)).await
    }
}

#[tokio::test]
async fn a_host_that_joins_has_an_identity_that_only_root_can_read() {
    let server = Server::honest().await;
    let dir = tempfile::tempdir().unwrap();
    let host = join(dir.path(), &server.url, &server.ca.token(), false).await.unwrap();
    let paths = IdentityPaths::new(dir.path());
    let text = |path: &Path| fs::read_to_string(path).unwrap();
    Identity::from_pem(&text(&paths.certificate), &text(&paths.key), &text(&paths.ca)).unwrap();
    assert_eq!(text(&paths.host).trim(), host.to_string());
    assert_eq!(fs::metadata(&paths.key).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(text(&dir.path().join("agent.toml")), "coordinator = \"127.0.0.1:8775\"\n");
}

#[tokio::test]
async fn an_identity_is_not_overwritten_unless_forced() {
    let server = Server::honest().await;
    let dir = tempfile::tempdir().unwrap();
    let first = join(dir.path(), &server.url, &server.ca.token(), false).await.unwrap();
    let error = join(dir.path(), &server.url, &server.ca.token(), false).await.unwrap_err();
    assert!(error.to_string().contains(&first.to_string()), "{error}");
    assert_eq!(*server.asked.lock().unwrap(), 1);
    let second = join(dir.path(), &server.url, &server.ca.token(), true).await.unwrap();
    assert_ne!(first, second);
}

#[tokio::test]
async fn a_server_of_another_ca_is_sent_nothing() {
    let server = Server::honest().await;
    let dir = tempfile::tempdir().unwrap();
    let error = join(dir.path(), &server.url, &Ca::new().token(), false).await.unwrap_err();
    assert!(matches!(error, JoinError::WrongAuthority { .. }), "{error}");
    assert_eq!(*server.asked.lock().unwrap(), 0);
    assert!(!IdentityPaths::new(dir.path()).key.exists());
}

#[tokio::test]
async fn a_certificate_of_the_right_ca_for_another_name_is_sent_nothing() {
    let ca = Ca::new();
    let server = Server::start(ca, "127.0.0.9", Arc::new(|_| unreachable!())).await;
    let dir = tempfile::tempdir().unwrap();
    let error = join(dir.path(), &server.url, &server.ca.token(), false).await.unwrap_err();
    assert!(matches!(error, JoinError::WrongAuthority { .. }), "{error}");
    assert_eq!(*server.asked.lock().unwrap(), 0);
}

#[tokio::test]
async fn a_used_or_expired_token_is_told_in_the_coordinators_words() {
    for status in [StatusCode::UNAUTHORIZED, StatusCode::FORBIDDEN, StatusCode::CONFLICT] {
        let refuse = move |_| (status, r#"{"error":{"message":"the token was used"}}"#.to_owned());
        let server = Server::start(Ca::new(), "127.0.0.1", Arc::new(refuse)).await;
        let dir = tempfile::tempdir().unwrap();
        let error = join(dir.path(), &server.url, &server.ca.token(), false).await.unwrap_err();
        assert!(matches!(&error, JoinError::Refused(text) if text == "the token was used"), "{error}");
    }
}

#[tokio::test]
async fn an_answer_that_contradicts_the_token_the_key_or_the_name_changes_nothing() {
    let spoils: [fn(&mut JoinReply); 4] = [
        |reply| reply.ca = Ca::new().pem,
        |reply| reply.host = HostId::random(),
        |reply| reply.agents_address = "somewhere".into(),
        |reply| {
            let key = rcgen::KeyPair::generate().unwrap();
            let params = rcgen::CertificateParams::new(vec![host_name(reply.host)]).unwrap();
            reply.certificate = params.self_signed(&key).unwrap().pem();
        },
    ];
    for spoil in spoils {
        let ca = Ca::new();
        let reply = ca.reply();
        let spoiled = move |request| {
            let mut reply = reply(request);
            spoil(&mut reply);
            (StatusCode::OK, serde_json::to_string(&reply).unwrap())
        };
        let server = Server::start(ca, "127.0.0.1", Arc::new(spoiled)).await;
        let dir = tempfile::tempdir().unwrap();
        let error = join(dir.path(), &server.url, &server.ca.token(), false).await.unwrap_err();
        assert!(matches!(error, JoinError::Reply(_)), "{error}");
        assert!(!IdentityPaths::new(dir.path()).host.exists());
        assert!(!dir.path().join("agent.toml").exists());
    }
}

#[tokio::test]
async fn nobody_at_the_address_is_told_as_that() {
    let dir = tempfile::tempdir().unwrap();
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let error = join(dir.path(), &format!("https://{free}"), &Ca::new().token(), false).await.unwrap_err();
    assert!(matches!(&error, JoinError::Unreachable { authority, .. } if *authority == free.to_string()));
}

#[tokio::test]
async fn what_is_no_token_or_no_url_is_refused_before_anything_is_sent() {
    let dir = tempfile::tempdir().unwrap();
    let token = Ca::new().token();
    for wrong in ["", "gw1", "gw1.x.abc", &format!("{token}.x"), &token.replacen("gw1", "gw2", 1)] {
        let error = join(dir.path(), "https://127.0.0.1:1", wrong, false).await.unwrap_err();
        assert!(matches!(error, JoinError::Token(_)), "{wrong}: {error}");
    }
    for wrong in ["", "127.0.0.1:8774", "http://127.0.0.1:8774", "https://", "https://a@b/?x"] {
        let error = join(dir.path(), wrong, &token, false).await.unwrap_err();
        assert!(matches!(error, JoinError::Url(_)), "{wrong}: {error}");
    }
}
