//! Copies in worker processes: the agent's own program is started as one.

use godwit_agent::datapath::digests::modified_ns;
use godwit_agent::datapath::worker::{CopyOrder, Options, Worker};
use godwit_agent::hypervisor::Cancel;
use godwit_agent::storage::{Pool, PoolPolicy, StorageError};
use godwit_protocol::digests::{self, Chunked, Whole};
use godwit_protocol::error::ErrorKind;
use godwit_protocol::id::{ImageId, InstanceId};
use godwit_protocol::image::{DiskFormat, ImageSource};
use godwit_protocol::operation::Progress;
use godwit_protocol::request::DiskRequest;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use prometheus::{Registry, TextEncoder};
use std::fs::{self, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const AGENT: &str = env!("CARGO_BIN_EXE_godwit-agent");

struct Fixture {
    _folder: tempfile::TempDir,
    registry: Registry,
    pool: Pool,
    request: DiskRequest,
}

/// A pool with one raw image of 3 MiB and a bit.
fn fixture() -> Fixture {
    let folder = tempfile::tempdir().unwrap();
    let registry = Registry::new();
    let pool = Pool::new(folder.path().to_owned(), PoolPolicy::default(), &registry)
        .unwrap()
        .with_worker(Worker::new(AGENT.into()));
    let bytes: Vec<u8> = (0..3_333_333_u32).map(|n| (n >> 5) as u8).collect();
    let image = ImageSource {
        image: ImageId::random(),
        format: DiskFormat::Raw,
        size_bytes: bytes.len() as u64,
        virtual_size_bytes: bytes.len() as u64,
    };
    fs::create_dir(folder.path().join("images")).unwrap();
    fs::write(pool.image(image.image), bytes).unwrap();
    let request = DiskRequest { instance: InstanceId::random(), image, size_bytes: 8 << 20 };
    Fixture { _folder: folder, registry, pool, request }
}

impl Fixture {
    fn create(&self, request: &DiskRequest, cancel: &Cancel) -> Result<DiskFormat, StorageError> {
        self.pool.create_disk(request, &mut |_| {}, cancel)
    }

    fn assert_nothing_left(&self) {
        assert!(!self.pool.instance(self.request.instance).folder.exists());
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
fn a_disk_is_made_once_whole_grown_and_counted() {
    let fixture = fixture();
    let mut last = None;
    let mut progress = |progress| last = Some(progress);
    let format = fixture.pool.create_disk(&fixture.request, &mut progress, &Cancel::default()).unwrap();
    assert_eq!(format, DiskFormat::Raw);
    assert!(matches!(last, Some(Progress::Copy { total_bytes: 3_333_333, .. })), "{last:?}");
    let disk = fixture.pool.instance(fixture.request.instance).disk;
    let copied = fs::read(&disk).unwrap();
    let image = fs::read(fixture.pool.image(fixture.request.image.image)).unwrap();
    assert!(copied.len() == 8 << 20 && copied.starts_with(&image));
    fs::write(&disk, b"used by a guest").unwrap();
    fixture.create(&fixture.request, &Cancel::default()).unwrap();
    assert_eq!(fs::read(&disk).unwrap(), b"used by a guest");
    let text = TextEncoder::new().encode_to_string(&fixture.registry.gather()).unwrap();
    let counted =
        text.lines().filter(|line| line.starts_with("godwit_disk_copies_total")).collect::<Vec<_>>();
    assert!(counted.len() == 1 && counted[0].ends_with(" 1"), "{text}");
}

#[test]
fn a_cancelled_copy_leaves_nothing() {
    let fixture = fixture();
    let cancel = Cancel::default();
    cancel.cancel();
    match fixture.create(&fixture.request, &cancel) {
        Err(StorageError::Worker(error)) => assert_eq!(error.kind, ErrorKind::Cancelled),
        other => panic!("{other:?}"),
    }
    fixture.assert_nothing_left();
}

#[test]
fn a_refused_copy_says_why_and_leaves_nothing() {
    let fixture = fixture();
    let with = |size_bytes, image: ImageSource| DiskRequest { size_bytes, image, ..fixture.request.clone() };
    let image = fixture.request.image.clone();
    let huge = fixture.create(&with(1 << 60, image.clone()), &Cancel::default());
    assert!(matches!(huge, Err(StorageError::NoSpace { need_bytes, have_bytes, .. })
        if need_bytes == 1 << 60 && have_bytes < need_bytes));
    let small = fixture.create(&with(1 << 20, image.clone()), &Cancel::default());
    assert!(matches!(small, Err(StorageError::Invalid(_))));
    let unknown = ImageSource { image: ImageId::random(), ..image.clone() };
    let unknown = fixture.create(&with(8 << 20, unknown), &Cancel::default());
    assert!(matches!(unknown, Err(StorageError::NotFound(_))));
    let no_qcow2 = ImageSource { format: DiskFormat::Qcow2, ..image };
    match fixture.create(&with(8 << 20, no_qcow2), &Cancel::default()) {
        Err(StorageError::Worker(error)) => {
            assert_eq!(error.kind, ErrorKind::Invalid);
            assert!(error.message.contains("not a qcow2 image"), "{error}");
        }
        other => panic!("{other:?}"),
    }
    fixture.assert_nothing_left();
}

#[test]
fn a_worker_that_dies_or_does_not_start_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let order = CopyOrder {
        source: folder.path().join("source"),
        destination: folder.path().join("destination"),
        format: DiskFormat::Raw,
        size_bytes: None,
        options: Options::default(),
    };
    for (program, word) in [("/bin/false", "died"), ("/nonexistent/agent", "no worker")] {
        let error = Worker::new(program.into()).copy(&order, &mut |_, _| {}, &Cancel::default()).unwrap_err();
        assert_eq!(error.kind, ErrorKind::Internal);
        assert!(error.message.contains(word), "{error}");
    }
}

/// A worker whose progress nobody reads waits in its first report: it is stopped in mid-copy for as long as the
/// test likes.
#[test]
fn a_worker_dies_with_its_parent_and_its_copy_never_appears() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    fs::write(path("source"), vec![7; 40 << 20]).unwrap();
    nix::unistd::mkfifo(&path("pipe"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    let mut pipe = OpenOptions::new().read(true).write(true).open(path("pipe")).unwrap();
    fcntl(&pipe, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
    while pipe.write(&[b'x'; 4096]).is_ok() {}
    let script = r#""$0" worker copy source destination --parent $$ --progress-fd 1 >pipe & echo $!; wait"#;
    let mut parent = Command::new("sh")
        .args(["-c", script, AGENT])
        .current_dir(folder.path())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(parent.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let worker = format!("/proc/{}", line.trim());
    until("data in the copy", || fs::metadata(path("destination.partial")).is_ok_and(|file| file.len() > 0));
    kill(Pid::from_raw(parent.id() as i32), Signal::SIGKILL).unwrap();
    parent.wait().unwrap();
    until("the worker's end", || !is_running(Path::new(&worker)));
    assert!(!path("destination").exists());
}

/// A zombie that nobody reaps has ended too.
fn is_running(process: &Path) -> bool {
    fs::read_to_string(process.join("stat")).is_ok_and(|stat| !stat.contains(") Z"))
}

#[test]
fn a_worker_of_another_parent_does_not_begin() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("source"), b"x").unwrap();
    let status = Command::new(AGENT)
        .args(["worker", "copy", "source", "destination", "--parent", "1"])
        .current_dir(folder.path())
        .stderr(Stdio::null())
        .status()
        .unwrap();
    assert!(!status.success());
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
}

#[test]
fn a_pool_that_runs_full_in_mid_copy_says_so_and_keeps_nothing() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("source"), vec![7; 9 << 20]).unwrap();
    fs::create_dir(folder.path().join("small")).unwrap();
    let script = r#"mount -t tmpfs -o size=4m tmpfs small &&
        { "$0" worker copy source small/destination --progress-fd 1 | cat; ls -A small; }"#;
    let output = Command::new("unshare")
        .args(["--map-root-user", "--mount", "sh", "-c", script, AGENT])
        .current_dir(folder.path())
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let last = text.lines().last().unwrap_or_default();
    assert!(last.contains(r#""kind":"no_space""#), "{text}{}", String::from_utf8_lossy(&output.stderr));
}

/// Leaves the image's digests beside it, as an upload does.
fn list_digests(image: &Path) {
    let metadata = fs::metadata(image).unwrap();
    let mut chunks = Chunked::default();
    chunks.update(&fs::read(image).unwrap());
    let list = chunks.finish(metadata.len(), modified_ns(&metadata), &Whole::default()).unwrap();
    fs::write(digests::beside(image), list).unwrap();
}

/// Another bit in the image's second chunk.
fn flip(image: &Path) {
    let file = OpenOptions::new().read(true).write(true).open(image).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, 2_000_000).unwrap();
    file.write_all_at(&[byte[0] ^ 4], 2_000_000).unwrap();
}

#[test]
fn an_image_with_a_flipped_bit_becomes_no_disk_whether_its_time_tells_or_not() {
    let fixture = fixture();
    let image = fixture.pool.image(fixture.request.image.image);
    list_digests(&image);
    let modified = fs::metadata(&image).unwrap().modified().unwrap();
    flip(&image);
    for silently in [false, true] {
        if silently {
            OpenOptions::new().write(true).open(&image).unwrap().set_modified(modified).unwrap();
        }
        match fixture.create(&fixture.request, &Cancel::default()) {
            Err(StorageError::Worker(error)) => {
                assert!(error.message.contains("damaged: the chunk at byte 1048576"), "{error}");
            }
            other => panic!("{other:?}"),
        }
        fixture.assert_nothing_left();
    }
    flip(&image);
    fixture.create(&fixture.request, &Cancel::default()).expect("it is what it was, whatever its time says");
}

#[test]
fn a_disk_that_is_given_up_by_its_instance_is_not_made() {
    let fixture = fixture();
    let instance = fixture.request.instance;
    // What is not made yet cannot be given up.
    fixture.pool.cancel_disk(instance);
    let pool = fixture.pool.clone();
    let mut give_up = |_| pool.cancel_disk(instance);
    match fixture.pool.create_disk(&fixture.request, &mut give_up, &Cancel::default()) {
        Err(StorageError::Worker(error)) => assert_eq!(error.kind, ErrorKind::Cancelled),
        other => panic!("{other:?}"),
    }
    fixture.assert_nothing_left();
}
