//! `godwit-agent stream`: a disk from one host to another, cut off, changed, spoiled, asked for by the wrong ones.

use godwit_agent::datapath::disk_stream::worker::{End, Stream};
use godwit_agent::hypervisor::Cancel;
use godwit_protocol::error::ErrorKind;
use godwit_protocol::id::HostId;
use godwit_protocol::quic::host_name;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustls::ServerConnection;
use serde_json::Value;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

const AGENT: &str = env!("CARGO_BIN_EXE_godwit-agent");
const MIB: u64 = 1 << 20;
const TOKEN: &str = "a secret";

type Ca = CertifiedIssuer<'static, KeyPair>;

fn ca() -> Ca {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap()
}

/// A host's folder with its certificate.
fn host(dir: &Path, ca: &Ca) -> HostId {
    let id = HostId::random();
    let key = KeyPair::generate().unwrap();
    let leaf = CertificateParams::new([host_name(id)]).unwrap().signed_by(&key, ca).unwrap();
    let folder = dir.join("identity");
    fs::create_dir_all(&folder).unwrap();
    for (name, text) in [("ca.pem", ca.pem()), ("host.pem", leaf.pem()), ("host.key", key.serialize_pem())] {
        fs::write(folder.join(name), text).unwrap();
    }
    id
}

struct Fixture {
    folder: tempfile::TempDir,
    there: HostId,
    here: HostId,
    source: PathBuf,
    destination: PathBuf,
}

fn pattern(length: u64, seed: u64) -> Vec<u8> {
    (0..length).map(|n| ((n ^ seed).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8).collect()
}

impl Fixture {
    /// Two hosts, and a disk of 64 MiB and a bit with a hole of 24 MiB.
    fn new() -> Self {
        let target = env!("CARGO_MANIFEST_DIR").to_owned() + "/../target";
        let folder = tempfile::Builder::new().tempdir_in(target).unwrap();
        let ca = ca();
        let (there, here) = (host(&folder.path().join("there"), &ca), host(&folder.path().join("here"), &ca));
        let source = folder.path().join("source");
        let file = File::create(&source).unwrap();
        file.write_all_at(&pattern(20 * MIB, 1), 0).unwrap();
        file.write_all_at(&pattern(20 * MIB + 777, 2), 44 * MIB).unwrap();
        file.sync_all().unwrap();
        Self { destination: folder.path().join("destination"), source, there, here, folder }
    }

    fn receive(&self, arguments: &[&str]) -> Receiver {
        let mut command = Command::new(AGENT);
        command.args(["stream", "receive", "--json", "--listen", "127.0.0.1:0", "--token", TOKEN, "--dir"]);
        command.arg(self.folder.path().join("here")).args(arguments).arg(&self.destination);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut errors = BufReader::new(child.stderr.take().unwrap());
        let mut line = String::new();
        errors.read_line(&mut line).unwrap();
        let address =
            line.trim().strip_prefix("listening on ").unwrap_or_else(|| panic!("{line}")).to_owned();
        Receiver { child, errors, address }
    }

    fn sender(&self, address: &str, arguments: &[&str]) -> Command {
        self.sender_from("there", &self.here, address, arguments)
    }

    fn sender_from(&self, dir: &str, to: &HostId, address: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new(AGENT);
        command.args(["stream", "send", "--json", "--to", address, "--host", &to.to_string(), "--dir"]);
        command.arg(self.folder.path().join(dir));
        if !arguments.contains(&"--token") {
            command.args(["--token", TOKEN]);
        }
        command.args(arguments).arg(&self.source);
        command
    }

    /// Both ends' reports.
    fn stream(&self, receive: &[&str], send: &[&str]) -> (Value, Value) {
        let receiver = self.receive(receive);
        let sent = self.sender(&receiver.address, send).output().unwrap();
        let received = receiver.end();
        assert!(sent.status.success() && received.0, "{}{}", text(&sent.stderr), received.2);
        (serde_json::from_slice(&sent.stdout).unwrap(), serde_json::from_str(&received.1).unwrap())
    }

    fn is_same(&self) -> bool {
        fs::read(&self.source).unwrap() == fs::read(&self.destination).unwrap()
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

struct Receiver {
    child: Child,
    errors: BufReader<ChildStderr>,
    address: String,
}

impl Receiver {
    /// Whether it went well, what it printed, and what it said.
    fn end(mut self) -> (bool, String, String) {
        let (mut out, mut errors) = (String::new(), String::new());
        self.child.stdout.take().unwrap().read_to_string(&mut out).unwrap();
        self.errors.read_to_string(&mut errors).unwrap();
        (self.child.wait().unwrap().success(), out, errors)
    }
}

fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !holds() {
        assert!(Instant::now() < deadline, "not within 30 s: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_disk_arrives_sparse_by_one_connection_and_by_many() {
    let fixture = Fixture::new();
    for connections in ["1", "4", "16"] {
        let (sent, received) =
            fixture.stream(&["--host", &fixture.there.to_string()], &["--connections", connections]);
        assert!(fixture.is_same());
        assert_eq!(sent["sent_bytes"], received["received_bytes"]);
        assert_eq!(received["sum"], "xxh3");
        assert!(sent["sent_bytes"].as_u64().unwrap() <= 41 * MIB, "{sent}");
        let blocks = fs::metadata(&fixture.destination).unwrap().blocks() * 512;
        assert!(blocks <= 42 * MIB, "{blocks}");
        fs::remove_file(&fixture.destination).unwrap();
    }
    let mut names: Vec<_> =
        fs::read_dir(fixture.folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["here", "source", "there"]);
}

#[test]
fn small_and_empty_disks_arrive() {
    let fixture = Fixture::new();
    for length in [0, 1, 4096, MIB + 1] {
        fs::write(&fixture.source, pattern(length, 3)).unwrap();
        fixture.stream(&[], &[]);
        assert!(fixture.is_same(), "{length}");
        fs::remove_file(&fixture.destination).unwrap();
    }
}

#[test]
fn only_chunks_that_changed_are_sent_where_an_older_copy_is() {
    let fixture = Fixture::new();
    for (digests, connections) in [(&["--digests"][..], "4"), (&[], "1")] {
        // The first time with digests, the second over an older copy.
        let (_, received) = fixture.stream(digests, &[]);
        assert_eq!(received["sum"], "blake3");
        let source = File::options().write(true).open(&fixture.source).unwrap();
        source.write_all_at(&pattern(100, digests.len() as u64 + 9), 7 * MIB + 5).unwrap();
        // Zeros where there was data, and data where there was none.
        source.write_all_at(&vec![0; 2 * MIB as usize], 10 * MIB).unwrap();
        source.write_all_at(b"new", 30 * MIB + digests.len() as u64 * MIB).unwrap();
        let (sent, received) = fixture.stream(digests, &["--connections", connections]);
        assert!(fixture.is_same());
        assert!(sent["sent_bytes"].as_u64().unwrap() <= 3 * MIB, "{sent}");
        assert_eq!(received["sum"], "blake3");
        assert!(received["same_bytes"].as_u64().unwrap() >= 35 * MIB, "{received}");
        assert_eq!(fixture.folder.path().join("destination.blake3").exists(), !digests.is_empty());
    }
}

#[test]
fn a_stream_that_is_cut_at_either_end_goes_on_where_it_was() {
    let fixture = Fixture::new();
    let journal = fixture.folder.path().join("destination.partial.journal");
    let mut had = 0;
    // One connection has two threads where a disk is waited for, several have one each.
    for (cut_sender, connections) in [(true, "1"), (false, "4"), (true, "4"), (false, "1")] {
        let mut receiver = fixture.receive(&[]);
        let mut sender = fixture
            .sender(&receiver.address, &["--bandwidth", "30M", "--connections", connections])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let records = || {
            let journal = fs::read(&journal).unwrap_or_default();
            journal.get(4096..).unwrap_or_default().chunks(64).filter(|record| record[0] != 0).count()
        };
        until("some chunks more", || records() > had + 2);
        if cut_sender {
            sender.kill().unwrap()
        } else {
            receiver.child.kill().unwrap()
        }
        sender.wait().unwrap();
        assert!(!receiver.end().0 && !fixture.destination.exists());
        had = records();
    }
    let (sent, received) = fixture.stream(&[], &[]);
    assert!(fixture.is_same());
    assert_eq!(received["resumed_bytes"], had as u64 * MIB, "{received}");
    assert_eq!(sent["resumed_bytes"], received["resumed_bytes"]);
}

#[test]
fn who_has_no_token_or_another_ca_or_another_name_sends_nothing_and_disturbs_nobody() {
    let fixture = Fixture::new();
    host(&fixture.folder.path().join("stranger"), &ca());
    let receiver = fixture.receive(&["--host", &fixture.there.to_string()]);
    let refused = |mut command: Command, word: &str| {
        let Output { status, stderr, .. } = command.output().unwrap();
        assert_eq!(status.code(), Some(1));
        assert!(text(&stderr).contains(word), "{}", text(&stderr));
    };
    let address = &receiver.address;
    refused(fixture.sender(address, &["--token", "wrong"]), "no disk is awaited here with this token");
    refused(fixture.sender_from("stranger", &fixture.here, address, &[]), "TLS with");
    // The receiver is not who was meant, and the sender is not who was awaited.
    refused(fixture.sender_from("there", &fixture.there, address, &[]), "TLS with");
    refused(fixture.sender_from("here", &fixture.here, address, &[]), "connection broke");
    for garbage in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0x16; 5000], b""] {
        TcpStream::connect(address).unwrap().write_all(garbage).unwrap();
    }
    let _silent = TcpStream::connect(address).unwrap();
    assert!(fixture.sender(address, &[]).status().unwrap().success());
    assert!(receiver.end().0 && fixture.is_same());
}

#[test]
fn a_flipped_bit_in_the_source_is_an_error_and_no_disk() {
    let fixture = Fixture::new();
    // A copy with its list of digests is the source of the next one.
    fixture.stream(&["--digests"], &[]);
    let mut second = Fixture::new();
    second.source = fixture.destination.clone();
    let disk = File::options().read(true).write(true).open(&second.source).unwrap();
    let modified = disk.metadata().unwrap().modified().unwrap();
    let mut byte = [0];
    disk.read_exact_at(&mut byte, 9 * MIB).unwrap();
    disk.write_all_at(&[byte[0] ^ 1], 9 * MIB).unwrap();
    disk.set_modified(modified).unwrap();
    let receiver = second.receive(&[]);
    let sent = second.sender(&receiver.address, &[]).output().unwrap();
    let (well, _, errors) = receiver.end();
    assert_eq!(sent.status.code(), Some(3), "{}{errors}", text(&sent.stderr));
    assert!(text(&sent.stderr).contains("does not have the digest"), "{}", text(&sent.stderr));
    assert!(!well && errors.contains("the peer failed"), "{errors}");
    assert!(!second.destination.exists());
}

#[test]
fn an_agent_of_another_version_is_said_to_be_one() {
    let fixture = Fixture::new();
    let identity = godwit_agent::identity::read(&fixture.folder.path().join("here")).unwrap();
    let config = Arc::new(identity.tls_server(b"godwit-disk/0").unwrap());
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let other = std::thread::spawn(move || {
        let (mut socket, _) = listener.accept().unwrap();
        ServerConnection::new(config).unwrap().complete_io(&mut socket).unwrap_err()
    });
    let sent = fixture.sender(&address, &[]).output().unwrap();
    assert_eq!(sent.status.code(), Some(1));
    assert!(text(&sent.stderr).contains("is of another version"), "{}", text(&sent.stderr));
    other.join().unwrap();
}

#[test]
fn nobody_who_sends_or_listens_is_said_so() {
    let fixture = Fixture::new();
    let (well, _, errors) = fixture.receive(&["--wait", "1"]).end();
    assert!(!well && errors.contains("no sender with the right token came within 1 s"), "{errors}");
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let sent = fixture.sender(&free, &[]).output().unwrap();
    assert!(text(&sent.stderr).contains("cannot connect to"), "{}", text(&sent.stderr));
    assert_eq!(fixture.sender(&free, &["--connections", "0"]).status().unwrap().code(), Some(2));
}

impl Fixture {
    /// One end as the agent starts it.
    fn end<'a>(&self, dir: &'a Path, disk: &'a Path, address: SocketAddr, peer: HostId) -> End<'a> {
        End { program: Path::new(AGENT), dir, disk, address, peer, token: TOKEN }
    }
}

#[test]
fn workers_move_a_disk_into_a_folder_of_its_own_also_after_one_of_them_was_given_up() {
    let fixture = Fixture::new();
    let (there, here) = (fixture.folder.path().join("there"), fixture.folder.path().join("here"));
    let destination = fixture.folder.path().join("instances/one/disk");
    let any = SocketAddr::from(([127, 0, 0, 1], 0));
    let receive = |peer| Stream::receive(fixture.end(&here, &destination, any, peer)).unwrap();
    let send = |address| Stream::send(fixture.end(&there, &fixture.source, address, fixture.here)).unwrap();
    let (nobody, told) = (Cancel::default(), Mutex::new((0, 0)));
    let mut tell = |done, all| *told.lock().unwrap() = (done, all);

    // Given up before its sender comes: nothing is there, not even the folder.
    let (receiver, gone) = receive(fixture.there);
    let cancelled = Cancel::default();
    cancelled.cancel();
    assert_eq!(receiver.finish(&mut |_, _| {}, &cancelled).unwrap_err().kind, ErrorKind::Cancelled);
    assert!(!destination.parent().unwrap().exists());
    assert_eq!(send(gone).finish(&mut tell, &nobody).unwrap_err().kind, ErrorKind::Unavailable);

    // Not from the host that was said.
    let (receiver, address) = receive(HostId::random());
    let sent = send(address).finish(&mut tell, &nobody).unwrap_err();
    assert_eq!(sent.kind, ErrorKind::Unavailable, "{sent}");
    receiver.finish(&mut |_, _| {}, &cancelled).unwrap_err();
    assert!(!destination.parent().unwrap().exists());

    let (receiver, address) = receive(fixture.there);
    let received = std::thread::spawn(move || receiver.finish(&mut |_, _| {}, &Cancel::default()));
    let sent = send(address).finish(&mut tell, &nobody).unwrap();
    let received = received.join().unwrap().unwrap();
    assert_eq!((sent.size_bytes, sent.moved_bytes), (64 * MIB + 777, 40 * MIB + 777));
    assert_eq!(received, sent);
    assert_eq!(told.lock().unwrap().1, sent.size_bytes, "progress was told");
    assert!(fs::read(&fixture.source).unwrap() == fs::read(&destination).unwrap());
    assert_eq!(fs::read_dir(destination.parent().unwrap()).unwrap().count(), 1, "nothing beside it");
}
