//! Resizes and cold migrations of a guest that runs: pins, disk, network, and what is held meanwhile.

use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::fleet::{Fleet, KILL, guests, instance_file, join, kept_reservations, part, pool_file};
use crate::guests::{reserved, vcpu_threads};
use crate::storage::noise;
use godwit_tests::lab::{Host, until};
use serde_json::Value;

/// The size that a guest sees of a disk, in bytes, and a digest of what is on it.
fn disk(path: &PathBuf) -> (u64, String) {
    let output = |command: &mut Command| {
        let output = command.output().expect("it runs");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).expect("is text")
    };
    let info = output(Command::new("qemu-img").args(["info", "-U", "--output=json"]).arg(path));
    let info: Value = serde_json::from_str(&info).expect("is JSON");
    let digest = output(Command::new("sha256sum").arg(path));
    let digest = digest.split_whitespace().next().expect("has one").to_owned();
    (info["virtual-size"].as_u64().expect("has one"), digest)
}

impl Fleet {
    /// A server's pins are what its host has reserved, by libvirt's word and the kernel's; returns them.
    fn check_pins(&self, server: &Value, host: &Host) -> Vec<String> {
        let wanted = reserved(host, &server["id"]);
        let guest = server["OS-EXT-SRV-ATTR:instance_name"].as_str().expect("it has a domain");
        assert_eq!(vcpu_threads(host, guest), wanted, "{}", host.name());
        let pins = host.exec(&["virsh", "-q", "vcpupin", guest]).expect("libvirt answers");
        let pins: Vec<&str> = pins.lines().filter_map(|line| line.split_whitespace().last()).collect();
        assert_eq!(pins, wanted, "{}", host.name());
        assert_eq!(server["OS-EXT-SRV-ATTR:host"], host.name());
        wanted
    }

    /// Waits until a guest has booted so many times.
    pub(crate) fn wait_for_boots(&self, name: &str, count: usize) {
        let booted = || {
            let console = self.lab.coordinator().cli_output(&["server", "console", name])?;
            let said = String::from_utf8_lossy(&console.stdout).into_owned();
            Ok(said.matches(godwit_tests::guest_image::READY).count() >= count)
        };
        until("c0", &format!("boot {count} of {name}"), Duration::from_secs(90), booted)
            .unwrap_or_else(|error| panic!("{error}"));
    }

    /// The flavors `one`, of one pinned vCPU and the image's disk, and `two`, of two in two cells and a GiB of disk: no
    /// host of two CPUs has room for both.
    pub(crate) fn create_pinned_flavors(&self) {
        let memory = format!("{}M", crate::fleet::MEMORY_MIB);
        for (name, vcpus, disk) in [("one", "1", "0"), ("two", "2", "1")] {
            let cells = format!("hw:numa_nodes={vcpus}");
            let words = ["flavor", "create", name, "--vcpus", vcpus, "--memory", &memory, "--disk", disk];
            let specs = ["--property", "hw:cpu_policy=dedicated", "--property", &cells];
            self.godwit(&[&words[..], &specs].concat());
        }
    }
}

/// Looks again and again whether a host still holds what it holds now, until it is told to stop.
struct Watch {
    over: Arc<AtomicBool>,
    thread: std::thread::JoinHandle<usize>,
}

impl Watch {
    fn start(host: &Host) -> Watch {
        let path = host.file("lib/godwit/reservations.json");
        let held = kept_reservations(host);
        let over = Arc::new(AtomicBool::new(false));
        let told = over.clone();
        let look = move || {
            let mut looks = 0;
            while !told.load(Ordering::Acquire) {
                // The file is replaced whole, so it reads at any moment.
                let text = std::fs::read(&path).expect("is there");
                let now: Value = serde_json::from_slice(&text).expect("is JSON");
                assert_eq!(now, held, "the old place was not held all the time");
                looks += 1;
                std::thread::sleep(Duration::from_millis(5));
            }
            looks
        };
        Watch { over, thread: std::thread::spawn(look) }
    }

    fn finish(self) {
        self.over.store(true, Ordering::Release);
        assert!(self.thread.join().expect("the old place was held") > 0);
    }
}

#[test]
fn a_guest_gets_other_pins_and_a_larger_disk_on_another_host_and_its_old_ones_back() {
    let fleet = Fleet::start(2);
    fleet.upload_linux();
    fleet.create_pinned_flavors();
    let words = ["server", "create", "it", "--flavor", "one", "--image", "linux", "--network", "blue"];
    fleet.godwit(&[&words[..], &["--host", "h1"]].concat());
    let server = fleet.wait_for_status("it", "ACTIVE");
    let (h1, h2) = (fleet.host(1), fleet.host(2));
    let id = server["id"].as_str().expect("has one");
    let path = fleet.lab.pool().join("instances").join(id).join("disk");
    let old_pins = fleet.check_pins(&server, h1);
    let old_disk = disk(&path);
    fleet.wait_for_boots("it", 1);

    let watch = Watch::start(h1);
    let resized = fleet.godwit(&["server", "resize", "it", "--flavor", "two", "--wait"]);
    assert_eq!(resized["status"], "VERIFY_RESIZE", "{resized:#}");
    assert_eq!(fleet.check_pins(&resized, h2).len(), 2);
    assert_eq!(reserved(h1, &server["id"]), old_pins);
    assert_eq!(guests(h1), []);
    assert_eq!(disk(&path).0, 1 << 30);
    assert_eq!(resized["addresses"], server["addresses"]);
    fleet.wait_for_boots("it", 2);
    let agrees = || Ok(fleet.godwit(&["host", "drift"]) == serde_json::json!([]));
    h1.wait("two places being no drift", agrees).expect("both hosts have reported since");
    let reverted = fleet.godwit(&["server", "resize", "revert", "it", "--wait"]);
    watch.finish();
    assert_eq!(reverted["status"], "ACTIVE", "{reverted:#}");
    assert_eq!(fleet.check_pins(&reverted, h1), old_pins);
    assert_eq!(disk(&path), old_disk, "the disk is as it was");
    assert_eq!(reverted["flavor"]["original_name"], "one");
    fleet.check_home(&reverted);
    fleet.wait_for_boots("it", 3);

    // The same flavor on another host, for good.
    let moved = fleet.godwit(&["server", "migrate", "it", "--cold", "--wait"]);
    assert_eq!(moved["OS-EXT-SRV-ATTR:host"], "h2", "{moved:#}");
    assert_eq!(reserved(h1, &server["id"]), old_pins, "until it is confirmed");
    let stays = fleet.godwit(&["server", "resize", "confirm", "it", "--wait"]);
    assert_eq!(stays["status"], "ACTIVE");
    fleet.check_pins(&stays, h2);
    fleet.check_home(&stays);
    assert_eq!(disk(&path), old_disk);

    let last = the_disk_goes_along_to_a_host_with_a_pool_of_its_own(&fleet, &old_disk);

    // What was not decided about is deleted whole, on both hosts.
    fleet.godwit(&["server", "delete", "--wait", last["id"].as_str().expect("has one")]);
    let kinds = fleet.godwit(&["migration", "list"]);
    let kinds: Vec<_> = kinds
        .as_array()
        .expect("is a list")
        .iter()
        .map(|m| (m["migration_type"].as_str().unwrap_or_default(), m["status"].as_str().unwrap_or_default()))
        .collect();
    let all = ["reverted", "confirmed", "reverted", "confirmed", "confirmed"];
    let kind = |n| if n % 4 == 0 { "resize" } else { "migration" };
    let all: Vec<_> = all.into_iter().enumerate().map(|(n, end)| (kind(n), end)).collect();
    assert_eq!(kinds, all);
    an_image_comes_to_a_pool_without_it_and_what_lies_on_it_goes_along(&fleet);
    join(h1);
    fleet.clean();
}

/// On h1, whose pool has no images: a server is made of one that comes there, as an overlay; it does not leave live, and
/// cold it takes along what it lies on, though the image is deleted by then.
fn an_image_comes_to_a_pool_without_it_and_what_lies_on_it_goes_along(fleet: &Fleet) {
    let (h1, h2) = (fleet.host(1), fleet.host(2));
    let settings = h1.file("lib/godwit/agent.toml");
    let before = std::fs::read_to_string(&settings).expect("is there");
    std::fs::write(&settings, format!("disks = \"overlay\"\n{before}")).expect("is writable");
    h1.kill_agent(KILL).expect("it is killed");
    h1.start_agent().expect("it starts");
    fleet.wait_for_hosts();
    let pools = fleet.godwit(&["pool", "list"]);
    assert_eq!(pools.as_array().map(Vec::len), Some(2), "told apart by their marks: {pools:#}");

    let mut bytes = noise(3);
    let file = fleet.file("noise.raw", &bytes);
    fleet.upload("noise", &file, "raw");
    let image = fleet.godwit(&["image", "show", "noise"])["id"].as_str().expect("has one").to_owned();
    let words = ["server", "create", "new", "--flavor", "small", "--image", "noise", "--network", "blue"];
    fleet.godwit(&[&words[..], &["--host", "h1"]].concat());
    let server = fleet.wait_for_status("new", "ACTIVE");
    fleet.check_home(&server);
    let copy = pool_file(h1, &format!("images/{image}"));
    assert!(std::fs::read(&copy).expect("it has come") == bytes);
    let list = pool_file(h1, &format!("images/{image}.blake3"));
    assert!(list.exists() && instance_file(h1, &server, "base.raw").exists());

    let said = fleet.refusal(&["server", "migrate", "new", "--host", "h2"]);
    assert!(said.contains("h2 is not on shared storage with h1") && said.contains("cold"), "{said}");
    let said = fleet.refusal(&["server", "migrate", "new"]);
    assert!(said.contains("No host is on shared storage with h1"), "{said}");

    // The copy goes with the image, also where the host is away just then.
    h1.kill_agent(KILL).expect("it is killed");
    fleet.godwit(&["image", "delete", "noise"]);
    assert!(copy.exists());
    h1.start_agent().expect("it starts");
    h1.wait("the copy's end", || Ok(!copy.exists() && !list.exists())).expect("it goes with its image");
    fleet.wait_for_hosts();

    fleet.godwit(&["server", "stop", "new", "--wait"]);
    let inside =
        |server: &Value| format!("/srv/godwit/instances/{}/disk", server["id"].as_str().expect("has one"));
    h1.exec(&["qemu-io", "-f", "qcow2", "-c", "write -P 7 1M 64k", &inside(&server)]).expect("is written");
    bytes[1 << 20..][..65536].fill(7);
    let wanted = fleet.file("wanted.raw", &bytes);
    let moved = fleet.godwit(&["server", "migrate", "new", "--cold", "--wait"]);
    assert_eq!(moved["OS-EXT-SRV-ATTR:host"], "h2", "{moved:#}");
    let same =
        ["qemu-img", "compare", "-f", "qcow2", "-F", "raw", &inside(&server), &wanted.to_string_lossy()];
    h2.exec(&same).expect("all of it has come along");
    fleet.godwit(&["server", "resize", "confirm", "new", "--wait"]);
    assert!(!instance_file(h1, &server, "").exists(), "what was left goes");
    fleet.godwit(&["server", "start", "new", "--wait"]);
    fleet.check_home(&fleet.server("new").expect("is there"));
    fleet.godwit(&["server", "delete", "--wait", "new"]);
    // Nobody lies on what the cache has, which goes when somebody needs its room.
    h1.exec(&["rm", "-r", "/srv/godwit/cache"]).expect("is there");
    std::fs::write(&settings, before).expect("is writable");
}

/// From h2 to h1, whose pool is now another one, and back with a larger disk; what was there before stays until the move
/// is confirmed. Returns the server on h2, with that undecided.
fn the_disk_goes_along_to_a_host_with_a_pool_of_its_own(fleet: &Fleet, old_disk: &(u64, String)) -> Value {
    let (h1, h2) = (fleet.host(1), fleet.host(2));
    part(h1);
    let moved = fleet.godwit(&["server", "migrate", "it", "--cold", "--wait"]);
    assert_eq!(moved["OS-EXT-SRV-ATTR:host"], "h1", "{moved:#}");
    let disks = [h1, h2].map(|host| instance_file(host, &moved, "disk"));
    fleet.wait_for_boots("it", 1);
    assert!(disks.iter().all(|path| disk(path) == *old_disk), "both are whole until it is confirmed");
    fleet.godwit(&["server", "resize", "revert", "it", "--wait"]);
    assert!(!disks[0].parent().expect("has one").exists(), "what was brought goes");
    assert_eq!(disk(&disks[1]), *old_disk);

    fleet.godwit(&["server", "migrate", "it", "--cold", "--wait"]);
    let stays = fleet.godwit(&["server", "resize", "confirm", "it", "--wait"]);
    fleet.check_pins(&stays, h1);
    fleet.check_home(&stays);
    assert!(!disks[1].parent().expect("has one").exists(), "what was left goes");
    assert_eq!(disk(&disks[0]), *old_disk);

    let larger = fleet.godwit(&["server", "resize", "it", "--flavor", "two", "--wait"]);
    assert_eq!(larger["OS-EXT-SRV-ATTR:host"], "h2", "{larger:#}");
    fleet.wait_for_boots("it", 1);
    assert_eq!((disk(&disks[0]), disk(&disks[1]).0), (old_disk.clone(), 1 << 30));
    larger
}
