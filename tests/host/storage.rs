//! Disks and images when the pool is full, a copy dies, or an image wants to be more than it is.

use std::path::Path;
use std::time::Duration;

use crate::fleet::{Fleet, guests, reservations};
use godwit_tests::lab::{Host, until};

/// A file system of its own over a folder of the pool, as one host sees it: that is full soon, and for it alone.
fn cover(host: &Host, folder: &str, mib: u32) {
    host.exec(&["mount", "-t", "tmpfs", "-o", &format!("size={mib}m"), "tmpfs", folder]).expect("is mounted");
}

fn uncover(host: &Host, folder: &str) {
    let left = host.exec(&["find", folder, "-mindepth", "1"]).expect("find runs");
    assert_eq!(left, "", "something is left on the full pool");
    host.exec(&["umount", folder]).expect("is unmounted");
}

/// Bytes that no copy can leave out.
pub(crate) fn noise(mib: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let words = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    });
    words.take(mib << 17).flat_map(u64::to_le_bytes).collect()
}

/// Asks for a server that cannot be, and returns why.
fn failure(fleet: &Fleet, words: &[&str]) -> String {
    fleet.godwit(words);
    let server = fleet.wait_for_status("one", "ERROR");
    for host in fleet.lab.hosts() {
        assert_eq!(guests(host), []);
        assert_eq!(reservations(host), Vec::<String>::new());
    }
    fleet.clean();
    server["fault"]["message"].as_str().expect("it says why").to_owned()
}

const CREATE: [&str; 7] = ["server", "create", "one", "--network", "blue", "--flavor", "small"];

#[test]
fn a_disk_for_which_the_pool_has_no_room_is_refused_with_need_and_have_and_leaves_nothing() {
    let fleet = Fleet::start(1);
    let host = fleet.host(1);
    fleet.upload("noise", &fleet.file("noise.raw", &noise(24)), "raw");
    fleet.lab.set_baseline().expect("is listed");

    // More than the whole pool: no host is asked.
    fleet.godwit(&["flavor", "create", "huge", "--vcpus", "1", "--memory", "128M", "--disk", "1000T"]);
    let words = ["server", "create", "one", "--network", "blue", "--flavor", "huge", "--image", "blank"];
    let said = failure(&fleet, &words);
    assert!(said.contains("h1") && said.contains("disk_free") && said.contains("need"), "{said}");

    // Full in the middle of the copy, which placement could not foresee.
    host.exec(&["mkdir", "-p", "/srv/godwit/instances"]).expect("is made");
    fleet.lab.set_baseline().expect("is listed");
    cover(host, "/srv/godwit/instances", 8);
    let said = failure(&fleet, &[&CREATE[..], &["--image", "noise"]].concat());
    assert!(said.contains("h1") && said.contains("full") && said.contains("25165824"), "{said}");
    uncover(host, "/srv/godwit/instances");
    fleet.create("two", &[]);
    fleet.clean();
}

#[test]
fn an_upload_to_a_full_pool_is_refused_with_need_and_have_and_leaves_nothing() {
    let fleet = Fleet::start(1);
    let coordinator = fleet.lab.coordinator().host();
    let file = fleet.file("noise.raw", &noise(24));
    let file = file.to_string_lossy();
    cover(coordinator, "/srv/godwit/images", 8);
    let upload = ["image", "create", "noise", "--file", &file, "--disk-format", "raw"];
    let said = fleet.refusal(&upload);
    assert!(said.contains("no room") && said.contains("25165824"), "{said}");
    uncover(coordinator, "/srv/godwit/images");
    let names = fleet.godwit(&["image", "list"]);
    assert_eq!(names.as_array().expect("is a list").len(), 1, "{names:#}");
    fleet.check_nothing_left();
    fleet.godwit(&upload);
}

#[test]
fn a_copy_whose_worker_is_killed_fails_the_creation_with_the_reason_and_leaves_nothing() {
    let fleet = Fleet::start(1);
    let host = fleet.host(1);
    fleet.upload("noise", &fleet.file("noise.raw", &noise(384)), "raw");
    fleet.lab.set_baseline().expect("is listed");
    let killed = std::thread::scope(|scope| {
        let killer = scope.spawn(|| {
            until("h1", "the copy's worker", Duration::from_secs(60), || {
                let listed = host.exec(&["ps", "-eo", "pid=,args="])?;
                let worker = listed.lines().find(|line| line.contains("worker copy"));
                let Some(process) = worker.and_then(|line| line.split_whitespace().next()) else {
                    return Ok(false);
                };
                Ok(host.output(&["kill", "-9", process])?.status.success())
            })
        });
        fleet.godwit(&[&CREATE[..], &["--image", "noise"]].concat());
        killer.join().expect("it does not panic")
    });
    killed.expect("there was a worker to kill");
    let said = fleet.wait_for_status("one", "ERROR")["fault"]["message"].to_string();
    assert!(said.contains("h1") && said.contains("worker died"), "{said}");
    fleet.clean();
    fleet.godwit(&[&CREATE[..], &["--image", "noise"]].concat());
    fleet.wait_for_status("one", "ACTIVE");
    fleet.clean();
}

fn qemu_img(words: &[&str]) {
    let output = std::process::Command::new("qemu-img").args(words).output().expect("qemu-img runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn an_image_that_points_elsewhere_or_is_broken_is_refused_and_nothing_of_it_is_kept() {
    let fleet = Fleet::start(1);
    let secret = fleet.lab.pool().join("secret");
    std::fs::write(&secret, "the hosts' own\n".repeat(40_000)).expect("is writable");
    fleet.lab.set_baseline().expect("is listed");
    let inside = "/srv/godwit/secret";
    let path = |name: &str| fleet.lab.folder().join(name).to_string_lossy().into_owned();

    let (backed, external, corrupt) = (path("backed.qcow2"), path("external.qcow2"), path("corrupt.qcow2"));
    qemu_img(&["create", "-q", "-u", "-f", "qcow2", "-F", "raw", "-b", inside, &backed, "1M"]);
    let data = path("data");
    qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        &format!("data_file={data},data_file_raw=on"),
        &external,
        "1M",
    ]);
    qemu_img(&["amend", "-q", "-f", "qcow2", "-o", &format!("data_file={data}"), &external]);
    let blank = path("blank.raw");
    qemu_img(&["convert", "-q", "-O", "qcow2", &blank, &corrupt]);
    break_tables(Path::new(&corrupt));
    let disguised = path("disguised.raw");
    std::fs::copy(&backed, &disguised).expect("is copied");

    let cases = [
        (&backed, "qcow2", "backing file"),
        (&external, "qcow2", "external file"),
        (&corrupt, "qcow2", "corrupt"),
        (&disguised, "raw", "its content is qcow2"),
    ];
    for (file, format, reason) in cases {
        let said = fleet.refusal(&["image", "create", "evil", "--file", file, "--disk-format", format]);
        assert!(said.contains("not accepted") && said.contains(reason), "{file}: {said}");
        assert!(!said.contains(inside) && !said.contains("own"), "{file}: {said}");
        let images = fleet.godwit(&["image", "list"]);
        assert_eq!(images.as_array().expect("is a list").len(), 1, "{images:#}");
        fleet.check_nothing_left();
    }
    fleet.create("one", &[]);
    fleet.clean();
}

/// Points the first entry of the L1 table (its offset is at byte 40) beyond the end of the file.
fn break_tables(path: &Path) {
    let mut bytes = std::fs::read(path).expect("is there");
    let table = bytes[40..48].try_into().expect("is eight bytes");
    let table = usize::try_from(u64::from_be_bytes(table)).expect("fits");
    bytes[table..table + 8].copy_from_slice(&(0x8000_0000_7fff_0000_u64).to_be_bytes());
    std::fs::write(path, bytes).expect("is writable");
}
