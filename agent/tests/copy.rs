//! `godwit-agent copy` as people run it: killed at any moment, asked for what cannot be, read by scripts.

use godwit_agent::datapath::Stalls;
use godwit_agent::datapath::copy::{journal, partial};
use godwit_agent::datapath::worker::{CopyOrder, Options, Worker};
use godwit_agent::hypervisor::Cancel;
use godwit_protocol::error::ErrorKind;
use godwit_protocol::image::DiskFormat;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use prometheus::{Registry, TextEncoder};
use serde_json::Value;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

const AGENT: &str = env!("CARGO_BIN_EXE_godwit-agent");
const MIB: u64 = 1 << 20;

/// Chunks that may be under way at once: the deepest loop there is.
const DEPTH: u64 = 16;

struct Fixture {
    folder: tempfile::TempDir,
    source: PathBuf,
    destination: PathBuf,
}

impl Fixture {
    /// A folder on the machine's disk with a source of 48 MiB of data and a hole of 16 MiB.
    fn new() -> Self {
        let target = env!("CARGO_MANIFEST_DIR").to_owned() + "/../target";
        let folder = tempfile::Builder::new().tempdir_in(target).unwrap();
        let source = folder.path().join("source");
        let file = File::create(&source).unwrap();
        let bytes: Vec<u8> =
            (0..24 * MIB).map(|n| (n.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8).collect();
        file.write_all_at(&bytes, 0).unwrap();
        file.write_all_at(&bytes, 40 * MIB).unwrap();
        Self { destination: folder.path().join("destination"), source, folder }
    }

    fn command(&self) -> Command {
        let mut command = Command::new(AGENT);
        command.arg("copy").args([&self.source, &self.destination]);
        command.arg("--probes").arg(self.folder.path().join("probes"));
        command.stdin(Stdio::null());
        command
    }

    fn run(&self, arguments: &[&str]) -> Output {
        self.command().args(arguments).output().unwrap()
    }

    fn report(&self, arguments: &[&str]) -> Value {
        let output = self.run(&[&["--json"], arguments].concat());
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// Data of the chunks that the journal calls done, in bytes, and the bytes on the disk of what grows. A copy that was
    /// killed when it had its name already may have left its journal, which is about nothing any more.
    fn found(&self) -> (u64, u64) {
        let Ok(journal) = fs::read(journal(&self.destination)) else { return (0, 0) };
        if !partial(&self.destination).exists() {
            return (0, 0);
        }
        let done = journal.get(4096..).unwrap_or_default().iter().filter(|record| **record != 0).count();
        (
            done as u64 * self.grid(),
            fs::metadata(partial(&self.destination)).map_or(0, |file| file.blocks() * 512),
        )
    }

    /// The size of chunks, as the journal says it; zero before it does.
    fn grid(&self) -> u64 {
        let journal = fs::read(journal(&self.destination)).unwrap_or_default();
        let head = journal.get(..4095).and_then(|head| serde_json::from_slice::<Value>(head).ok());
        head.and_then(|head| head["subject"]["chunk_bytes"].as_u64()).unwrap_or(0)
    }

    fn is_same(&self) -> bool {
        fs::read(&self.source).unwrap() == fs::read(&self.destination).unwrap()
    }

    fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(self.folder.path()).unwrap();
        let mut names: Vec<_> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }
}

/// Numbers from a seed (splitmix64).
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb) % bound
    }
}

#[test]
fn a_copy_killed_at_any_moment_goes_on_and_copies_at_most_what_was_under_way_again() {
    for seed in 0..20 {
        let fixture = Fixture::new();
        fs::write(&fixture.destination, b"what was there").unwrap();
        let mut random = Random(seed);
        let method = ["io_uring", "threads"][random.below(2) as usize];
        for _ in 0..=random.below(4) {
            let mut copy =
                fixture.command().args(["--method", method, "--bandwidth", "400M", "-q"]).spawn().unwrap();
            std::thread::sleep(Duration::from_micros(random.below(120_000)));
            let running = copy.try_wait().unwrap().is_none();
            copy.kill().unwrap();
            copy.wait().unwrap();
            if !running {
                break;
            }
            let ((recorded, written), grid) = (fixture.found(), fixture.grid());
            // The file system's own blocks are a few more.
            assert!(
                written <= recorded + DEPTH * grid + MIB,
                "seed {seed}: {written} written, {recorded} recorded"
            );
            let there = fs::read(&fixture.destination).unwrap();
            assert!(there == b"what was there" || fixture.is_same(), "seed {seed}: half a copy is seen");
        }
        let (recorded, _) = fixture.found();
        let report = fixture.report(&["--method", method]);
        assert_eq!(report["resumed_bytes"], recorded, "seed {seed}: {report}");
        assert_eq!(report["data_bytes"].as_u64().unwrap() + recorded, 48 * MIB, "seed {seed}: {report}");
        assert!(fixture.is_same(), "seed {seed}");
        let names = fixture.names();
        assert!(names.iter().all(|name| !name.contains("partial")), "seed {seed}: {names:?}");
    }
}

#[test]
fn a_conversion_killed_at_any_moment_goes_on_to_a_sound_image() {
    for seed in 100..106 {
        let fixture = Fixture::new();
        let mut random = Random(seed);
        for _ in 0..=random.below(3) {
            let mut copy =
                fixture.command().args(["--to", "qcow2", "--bandwidth", "400M", "-q"]).spawn().unwrap();
            std::thread::sleep(Duration::from_micros(random.below(120_000)));
            copy.kill().unwrap();
            copy.wait().unwrap();
        }
        fixture.report(&["--to", "qcow2"]);
        for arguments in [&["check", "-q", "-f", "qcow2"][..], &["compare", "-q", "-f", "qcow2", "-F", "raw"]]
        {
            let mut command = Command::new("qemu-img");
            command.args(arguments).arg(&fixture.destination);
            if arguments[0] == "compare" {
                command.arg(&fixture.source);
            }
            assert!(command.status().unwrap().success(), "seed {seed}: {arguments:?}");
        }
    }
}

/// The last moment at which a kill leaves anything: the copy has its name, and its journal is still there.
#[test]
fn a_journal_that_a_kill_left_beside_a_whole_copy_goes_with_the_next_attempt_also_a_refused_one() {
    for again in [&[][..], &["--no-clobber"]] {
        let fixture = Fixture::new();
        let mut killed = fixture.command();
        killed.args(["-q", "--digests"]).env("GODWIT_CRASH_AT", "copy.rename:after");
        let killed = killed.output().unwrap();
        assert!(String::from_utf8_lossy(&killed.stderr).contains("crash point"), "{killed:?}");
        assert!(fixture.is_same(), "{again:?}");
        let left = ["destination", "destination.blake3.partial", "destination.partial.journal", "source"];
        assert_eq!(fixture.names(), left, "{again:?}");
        let ended = fixture.run(again);
        assert_eq!(ended.status.success(), again.is_empty(), "{ended:?}");
        assert!(fixture.is_same(), "{again:?}");
        assert_eq!(fixture.names(), ["destination", "source"], "{again:?}");
    }
}

/// A copy that is killed when it has some records, and whose journal's head is then as `change` makes it of the text
/// that it was.
fn leave_unfinished(fixture: &Fixture, option: &str, change: impl Fn(String) -> String) {
    let mut copy = fixture.command().args([option, "--bandwidth", "100M", "-q"]).spawn().unwrap();
    let path = journal(&fixture.destination);
    until("some records", || fs::metadata(&path).is_ok_and(|file| file.len() > 4096 + 8 * 64));
    copy.kill().unwrap();
    copy.wait().unwrap();
    let file = fs::OpenOptions::new().read(true).write(true).open(&path).unwrap();
    let mut head = vec![0; 4096];
    file.read_exact_at(&mut head, 0).unwrap();
    let was = String::from_utf8(head).unwrap();
    let is = format!("{:4096}", change(was.clone()).trim_end());
    assert_ne!(is, was);
    file.write_all_at(is.as_bytes(), 0).unwrap();
}

#[test]
fn what_another_boot_left_is_checked_before_it_counts() {
    for option in ["--digests", "--verify"] {
        let fixture = Fixture::new();
        // The journal of another boot, whose last writes did not all reach the disk.
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
        leave_unfinished(&fixture, option, |head| head.replace(boot.trim(), &"0".repeat(boot.trim().len())));
        let growing = fs::OpenOptions::new().write(true).open(partial(&fixture.destination)).unwrap();
        growing.write_all_at(&[0xaa; 4096], 2 * MIB).unwrap();
        let report = fixture.report(&[option]);
        assert!(report["resumed_bytes"].as_u64().unwrap() > 0, "{report}");
        assert_eq!(report["verified"], option == "--verify", "{report}");
        assert!(fixture.is_same());
    }
}

/// Its records held BLAKE3 digests of another grid, which must not be taken for sums of ours.
#[test]
fn a_verified_copy_that_an_older_version_left_begins_anew() {
    let fixture = Fixture::new();
    leave_unfinished(&fixture, "--verify", |head| {
        head.replace(r#""version":2"#, r#""version":1"#).replace(r#""digests":"xxh3""#, r#""digests":true"#)
    });
    let report = fixture.report(&["--verify"]);
    assert_eq!((&report["resumed_bytes"], &report["verified"]), (&0.into(), &true.into()), "{report}");
    assert!(fixture.is_same());
}

#[test]
fn a_source_that_changed_since_the_kill_is_copied_from_its_begin() {
    let fixture = Fixture::new();
    let mut copy = fixture.command().args(["--bandwidth", "100M", "-q"]).spawn().unwrap();
    until("some records", || fixture.found().0 > 0);
    copy.kill().unwrap();
    copy.wait().unwrap();
    File::options().write(true).open(&fixture.source).unwrap().write_all_at(b"new", 0).unwrap();
    assert_eq!(fixture.report(&[])["resumed_bytes"], 0);
    assert!(fixture.is_same());
}

/// A file of 24 MiB that answers EIO from its middle on, in a mount namespace of its own, and the copy of it.
fn copy_what_does_not_read(fixture: &Fixture, method: &str) -> Output {
    let script = r#"
        set -e
        mkdir -p "$1"
        nbdfuse "$1/disk" --command nbdkit -s --exit-with-parent eval \
            get_size='echo 24M' \
            pread='[ $4 -lt 12582912 ] || { echo EIO a bad sector >&2; exit 1; }; head -c $3 /dev/zero | tr "\0" x' &
        for wait in $(seq 1 1000); do [ -e "$1/disk" ] && break; sleep 0.01; done
        "$2" copy --json --method "$4" "$1/disk" "$3""#;
    let mut command = Command::new("unshare");
    command.args(["--mount", "--pid", "--fork", "--kill-child", "--", "sh", "-c", script, "sh"]);
    command.arg(fixture.folder.path().join("mount")).arg(AGENT).arg(&fixture.destination).arg(method);
    command.stdin(Stdio::null()).output().unwrap()
}

#[test]
fn a_source_that_does_not_read_in_its_middle_is_told_of_and_what_was_there_stays() {
    for method in ["io_uring", "threads"] {
        let fixture = Fixture::new();
        fs::write(&fixture.destination, b"what was there").unwrap();
        let output = copy_what_does_not_read(&fixture, method);
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        let error: Value = serde_json::from_slice(&output.stdout).unwrap();
        let message = error["error"]["message"].as_str().unwrap();
        assert!(message.contains("read") && message.contains("Input/output error"), "{message}");
        assert_eq!(fs::read(&fixture.destination).unwrap(), b"what was there");
    }
}

#[test]
fn a_name_with_a_newline_is_a_name_and_one_that_ends_in_dots_is_refused() {
    let mut fixture = Fixture::new();
    fixture.destination = fixture.folder.path().join("two\nlines");
    fixture.report(&[]);
    assert!(fixture.is_same());
    assert_eq!(fixture.names(), ["source", "two\nlines"]);
    let refused = fixture.run(&["--no-clobber"]);
    let text = String::from_utf8(refused.stderr).unwrap();
    assert!(text.contains(r"two\nlines"), "a name must not make lines of its own: {text}");
    for name in ["..", ".", "source/.."] {
        fixture.destination = fixture.folder.path().join(name);
        assert_eq!(fixture.run(&[]).status.code(), Some(1), "{name}");
    }
    assert_eq!(fixture.names(), ["source", "two\nlines"]);
}

#[test]
fn scripts_are_told_what_happened_and_how_it_ended() {
    let fixture = Fixture::new();
    let report = fixture.report(&["--verify"]);
    assert_eq!(report["verified"], true);
    assert_eq!(report["size_bytes"], 64 * MIB);
    assert!(report["method"].is_string() && !report["reason"].as_str().unwrap().is_empty());
    assert!(report["phases"]["transfer_ms"].is_u64(), "{report}");
    let lines = fixture.run(&["--progress-fd", "1", "-q"]);
    let lines: Vec<Value> = String::from_utf8(lines.stdout)
        .unwrap()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert!(lines[0]["progress"]["total_bytes"].is_u64(), "{lines:?}");
    assert!(lines.last().unwrap()["finished"]["Ok"].is_object(), "{lines:?}");
    let code = |arguments: &[&str]| fixture.run(arguments).status.code();
    assert_eq!(code(&["--no-clobber"]), Some(1));
    assert_eq!(code(&["--method", "magic"]), Some(2));
    assert_eq!(code(&["--bandwidth", "0"]), Some(2));
    assert_eq!(code(&["--expect", "/nonexistent"]), Some(1));
    let error = fixture.run(&["--json", "--no-clobber"]);
    let error: Value = serde_json::from_slice(&error.stdout).unwrap();
    assert_eq!(error["error"]["kind"], "conflict");
}

#[test]
fn nobody_needs_to_read_the_report() {
    let fixture = Fixture::new();
    for arguments in [&[][..], &["--json"], &["--json", "--no-clobber"]] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let output = fixture.command().args(arguments).stdout(writer).output().unwrap();
        let failed = arguments.contains(&"--no-clobber");
        assert_eq!(output.status.code(), Some(i32::from(failed)), "{output:?}");
    }
    assert!(fixture.is_same());
}

#[test]
fn a_limit_holds_a_copy_back_and_it_says_that_it_lives() {
    let fixture = Fixture::new();
    let begun = Instant::now();
    let output = fixture.run(&["--bandwidth", "32M", "--progress-fd", "1", "-q"]);
    assert!(output.status.success());
    // 48 MiB of data: a limit that did nothing would take a tenth of this.
    assert!(begun.elapsed() >= Duration::from_millis(1200), "{:?}", begun.elapsed());
    let lines = String::from_utf8(output.stdout).unwrap().lines().count();
    assert!(lines >= 4, "{lines}");
}

/// Lanes that make room for others must not wait for ever when there is nothing left to do.
#[test]
fn a_polite_copy_comes_to_its_end_by_every_way() {
    let fixture = Fixture::new();
    for method in ["io_uring", "threads"] {
        for _ in 0..5 {
            fixture.report(&["--polite", "--io-class", "idle", "--method", method]);
            assert!(fixture.is_same());
        }
    }
}

#[test]
fn a_way_found_by_a_probe_is_remembered_for_the_mounts() {
    let fixture = Fixture::new();
    let bytes = vec![7; MIB as usize];
    let source = File::options().write(true).open(&fixture.source).unwrap();
    for step in 0..520 {
        source.write_all_at(&bytes, step * MIB).unwrap();
    }
    source.sync_all().unwrap();
    let reason = |report: &Value| report["reason"].as_str().unwrap().to_owned();
    assert!(reason(&fixture.report(&[])).contains("in a probe of these mounts"));
    assert!(fixture.is_same());
    assert!(reason(&fixture.report(&[])).contains("in an earlier probe"));
    let probes: Value =
        serde_json::from_slice(&fs::read(fixture.folder.path().join("probes")).unwrap()).unwrap();
    assert!(!probes.as_array().unwrap().is_empty());
}

fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !holds() {
        assert!(Instant::now() < deadline, "not within 30 s: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The worker of this process's copy to `destination`.
fn worker_of(destination: &Path) -> Option<Pid> {
    let own = std::process::id().to_string();
    fs::read_dir("/proc").ok()?.flatten().find_map(|entry| {
        let pid: i32 = entry.file_name().to_str()?.parse().ok()?;
        let status = fs::read_to_string(entry.path().join("status")).ok()?;
        let parent = status.lines().find_map(|line| line.strip_prefix("PPid:"))?.trim().to_owned();
        let line = fs::read(entry.path().join("cmdline")).ok()?;
        let ours = parent == own && line.windows(6).any(|word| word == b"worker");
        let names =
            line.split(|byte| *byte == 0).any(|word| word == destination.as_os_str().as_encoded_bytes());
        (ours && names).then(|| Pid::from_raw(pid))
    })
}

/// A stopped process says nothing, as one that a dead mount holds.
#[test]
fn a_copy_that_gets_no_further_is_counted_goes_on_or_is_cancelled_and_leaves_nothing() {
    let fixture = Fixture::new();
    let registry = Registry::new();
    let worker = Worker::new(AGENT.into()).with_stalls(Stalls::new(&registry).unwrap());
    let order = CopyOrder {
        source: fixture.source.clone(),
        destination: fixture.destination.clone(),
        format: DiskFormat::Raw,
        size_bytes: None,
        options: Options { bandwidth_bytes: Some(24 * MIB), ..Options::default() },
    };
    let shown = |line: &str| TextEncoder::new().encode_to_string(&registry.gather()).unwrap().contains(line);
    for cancelled in [false, true] {
        let cancel = Cancel::default();
        let outcome = std::thread::scope(|scope| {
            let copying = scope.spawn(|| worker.copy(&order, &mut |_, _| {}, &cancel));
            until("a worker at work", || fixture.found().0 > 0);
            let pid = worker_of(&fixture.destination).unwrap();
            kill(pid, Signal::SIGSTOP).unwrap();
            until("a stall", || shown("godwit_copies_stalled 1"));
            if cancelled {
                cancel.cancel();
            } else {
                kill(pid, Signal::SIGCONT).unwrap();
                until("the stall's end", || shown("godwit_copies_stalled 0"));
            }
            copying.join().unwrap()
        });
        assert!(shown("godwit_copies_stalled 0"));
        match outcome {
            Ok(_) if !cancelled => {
                assert!(fixture.is_same());
                fs::remove_file(&fixture.destination).unwrap();
            }
            Err(error) if cancelled => assert_eq!(error.kind, ErrorKind::Cancelled),
            other => panic!("{other:?}"),
        }
        assert!(!fixture.destination.exists());
    }
    assert!(shown("godwit_copy_stalls_total 2"));
}
