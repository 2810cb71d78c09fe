//! The daemon itself: made, started, asked, stopped.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

const DEADLINE: Duration = Duration::from_secs(20);

fn coordinator(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_godwit-coordinator"));
    command.args(arguments);
    command
}

/// A new installation whose listeners take any port, with the API and the metrics on unix sockets too.
fn installation(folder: &TempDir) -> PathBuf {
    let dir = folder.path().join("c0");
    let arguments = ["--listen", "127.0.0.1:0", "--agents-listen", "127.0.0.1:0", "--pool"];
    let mut init = coordinator(&["init", "--url", "https://127.0.0.1:8774", "--dir"]);
    let output = init.arg(&dir).args(arguments).arg(folder.path()).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let settings = dir.join("coordinator.toml");
    let text = std::fs::read_to_string(&settings).unwrap();
    let socket = |name: &str| format!("\"unix:{}\"", dir.join(name).display());
    let text = text.replace("\"127.0.0.1:9178\"", &socket("metrics.sock"));
    std::fs::write(&settings, format!("plain_listen = {}\n{text}", socket("api.sock"))).unwrap();
    dir
}

/// A daemon that is killed with its test.
struct Daemon(Child);

impl Daemon {
    /// Returns when it serves.
    fn start(dir: &Path) -> Self {
        let child = coordinator(&["run", "--dir"]).arg(dir).stderr(Stdio::null()).spawn().unwrap();
        let daemon = Self(child);
        let start = Instant::now();
        while UnixStream::connect(dir.join("metrics.sock")).is_err() {
            assert!(start.elapsed() < DEADLINE, "the coordinator does not serve");
            std::thread::sleep(Duration::from_millis(10));
        }
        daemon
    }

    fn terminate(mut self) -> std::process::ExitStatus {
        let pid = nix::unistd::Pid::from_raw(self.0.id().try_into().unwrap());
        nix::sys::signal::kill(pid, nix::sys::signal::SIGTERM).unwrap();
        let start = Instant::now();
        loop {
            if let Some(status) = self.0.try_wait().unwrap() {
                return status;
            }
            assert!(start.elapsed() < DEADLINE, "the coordinator does not stop");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn get(socket: &Path, path: &str) -> String {
    let mut stream = UnixStream::connect(socket).unwrap();
    write!(stream, "GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    text
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn a_coordinator_serves_until_it_is_told_to_stop_and_serves_again() {
    let folder = tempfile::tempdir().unwrap();
    let dir = installation(&folder);
    for _ in 0..2 {
        let daemon = Daemon::start(&dir);
        let version = get(&dir.join("api.sock"), "/identity/v3/");
        assert!(version.starts_with("HTTP/1.1 200"), "{version}");
        assert!(version.contains("http://localhost/identity/v3/"), "{version}");
        assert!(get(&dir.join("metrics.sock"), "/metrics").contains("godwit_coordinator_hosts"));
        assert!(get(&dir.join("api.sock"), "/metrics").starts_with("HTTP/1.1 404"), "not on the API");
        assert!(daemon.terminate().success());
        assert!(!dir.join("api.sock").exists());
    }
}

#[test]
fn a_coordinator_that_was_killed_starts_again() {
    let folder = tempfile::tempdir().unwrap();
    let dir = installation(&folder);
    drop(Daemon::start(&dir));
    assert!(dir.join("api.sock").exists(), "nobody removed it");
    assert!(Daemon::start(&dir).terminate().success());
}

#[test]
fn two_coordinators_never_share_an_installation() {
    let folder = tempfile::tempdir().unwrap();
    let dir = installation(&folder);
    let _first = Daemon::start(&dir);
    let second = coordinator(&["run", "--dir"]).arg(&dir).output().unwrap();
    assert_eq!(second.status.code(), Some(1));
    assert!(said(&second).contains("another coordinator runs"), "{}", said(&second));
}

#[test]
fn an_installation_is_not_made_twice_nor_served_before_it_is_made() {
    let folder = tempfile::tempdir().unwrap();
    let nothing = coordinator(&["run", "--dir"]).arg(folder.path()).output().unwrap();
    assert_eq!(nothing.status.code(), Some(1));
    assert!(said(&nothing).contains("godwit-coordinator init"), "{}", said(&nothing));
    let dir = installation(&folder);
    let again =
        coordinator(&["init", "--url", "https://127.0.0.1:8774", "--dir"]).arg(&dir).output().unwrap();
    assert_eq!(again.status.code(), Some(1));
    assert!(said(&again).contains("--force"), "{}", said(&again));
}
