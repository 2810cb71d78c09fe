//! Streams between two hosts' halves over loopback.

use super::*;
use godwit_protocol::id::HostId;
use godwit_protocol::quic::host_name;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use std::io::{Read, Write};
use std::os::unix::net as unix;

pub(crate) type Ca = CertifiedIssuer<'static, KeyPair>;

pub(crate) fn ca() -> Ca {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap()
}

pub(crate) fn identity(ca: &Ca, host: HostId) -> Identity {
    let key = KeyPair::generate().unwrap();
    let leaf = CertificateParams::new([host_name(host)]).unwrap().signed_by(&key, ca).unwrap();
    Identity::from_pem(&leaf.pem(), &key.serialize_pem(), &ca.pem()).unwrap()
}

fn carried() -> Carried {
    let counter = |name| IntCounter::new(name, "bytes").unwrap();
    Carried { sent: counter("sent"), received: counter("received") }
}

struct Pair {
    folder: tempfile::TempDir,
    target_host: HostId,
    source: Streams,
    target: Streams,
}

impl Pair {
    fn new(ca_of_source: &Ca, ca_of_target: &Ca) -> Self {
        let target_host = HostId::random();
        let listen = "127.0.0.1:0".parse().unwrap();
        Self {
            folder: tempfile::tempdir().unwrap(),
            target_host,
            source: Streams::start(&identity(ca_of_source, HostId::random()), listen, carried()).unwrap(),
            target: Streams::start(&identity(ca_of_target, target_host), listen, carried()).unwrap(),
        }
    }

    fn sockets(&self, side: &str) -> Sockets {
        let path = |name| self.folder.path().join(format!("{side}-{name}.sock"));
        Sockets { libvirt: path("libvirt"), memory: path("memory") }
    }

    fn destination(&self, token: &str) -> Destination {
        Destination {
            address: self.target.address(),
            server_name: host_name(self.target_host),
            token: token.to_owned(),
        }
    }

    /// Connects to the source's memory socket and reads to the end; what came.
    fn read_to_end(&self, sent: &[u8]) -> Vec<u8> {
        let mut stream = unix::UnixStream::connect(self.sockets("source").memory).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        // A stream that is refused closes while it is written to.
        let _ = stream.write_all(sent);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let mut got = Vec::new();
        match stream.read_to_end(&mut got) {
            Err(error) if error.kind() != io::ErrorKind::ConnectionReset => panic!("{error}"),
            _ => got,
        }
    }
}

/// Answers the first stream on `path` with all its bytes, after it has read them to the end.
fn echo(path: &Path) -> std::thread::JoinHandle<()> {
    let listener = unix::UnixListener::bind(path).unwrap();
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut all = Vec::new();
        stream.read_to_end(&mut all).unwrap();
        stream.write_all(&all).unwrap();
    })
}

#[test]
fn bytes_arrive_both_ways_and_each_end_closes_on_its_own() {
    let ca = ca();
    let pair = Pair::new(&ca, &ca);
    let echo = echo(&pair.sockets("target").memory);
    let _awaiting = pair.target.await_streams("secret".to_owned(), pair.sockets("target"));
    let _sending = pair.source.send_streams(&pair.sockets("source"), pair.destination("secret")).unwrap();
    let bytes: Vec<u8> = (0..3_000_001_u32).map(|n| (n >> 7) as u8).collect();
    assert!(pair.read_to_end(&bytes) == bytes);
    echo.join().unwrap();
    for carried in [&pair.source.carried, &pair.target.carried] {
        assert_eq!((carried.sent.get(), carried.received.get()), (3_000_001, 3_000_001));
    }
}

#[test]
fn a_wrong_token_opens_nothing_and_the_source_learns_why() {
    let ca = ca();
    let pair = Pair::new(&ca, &ca);
    let _awaiting = pair.target.await_streams("secret".to_owned(), pair.sockets("target"));
    let sending = pair.source.send_streams(&pair.sockets("source"), pair.destination("guess")).unwrap();
    assert_eq!(pair.read_to_end(b"hello"), b"");
    assert!(sending.failure().unwrap().contains("no migration waits here"));
}

#[test]
fn a_socket_that_nobody_listens_on_is_told_to_the_source() {
    let ca = ca();
    let pair = Pair::new(&ca, &ca);
    let _awaiting = pair.target.await_streams("secret".to_owned(), pair.sockets("target"));
    let sending = pair.source.send_streams(&pair.sockets("source"), pair.destination("secret")).unwrap();
    assert_eq!(pair.read_to_end(b"hello"), b"");
    assert!(sending.failure().unwrap().contains("nothing listens on"));
}

#[test]
fn a_certificate_of_another_ca_opens_nothing() {
    let pair = Pair::new(&ca(), &ca());
    let _awaiting = pair.target.await_streams("secret".to_owned(), pair.sockets("target"));
    let sending = pair.source.send_streams(&pair.sockets("source"), pair.destination("secret")).unwrap();
    assert_eq!(pair.read_to_end(b"hello"), b"");
    assert!(sending.failure().unwrap().contains("certificate"));
}

#[test]
fn a_host_under_another_name_is_not_talked_to() {
    let ca = ca();
    let pair = Pair::new(&ca, &ca);
    let _awaiting = pair.target.await_streams("secret".to_owned(), pair.sockets("target"));
    let other = Destination { server_name: host_name(HostId::random()), ..pair.destination("secret") };
    let sending = pair.source.send_streams(&pair.sockets("source"), other).unwrap();
    assert_eq!(pair.read_to_end(b"hello"), b"");
    assert!(sending.failure().unwrap().contains("certificate"));
}

#[test]
fn the_end_of_a_session_ends_its_streams() {
    let ca = ca();
    let pair = Pair::new(&ca, &ca);
    let listener = unix::UnixListener::bind(pair.sockets("target").memory).unwrap();
    let awaiting = pair.target.await_streams("secret".to_owned(), pair.sockets("target"));
    let _sending = pair.source.send_streams(&pair.sockets("source"), pair.destination("secret")).unwrap();
    let mut near = unix::UnixStream::connect(pair.sockets("source").memory).unwrap();
    near.write_all(b"x").unwrap();
    let (mut far, _) = listener.accept().unwrap();
    far.read_exact(&mut [0]).unwrap();
    drop(awaiting);
    near.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    assert!(matches!(near.read(&mut [0]), Ok(0)));
    assert_eq!(pair.read_to_end(b"again"), b"");
}
