//! Live migrations that are cut: the server runs on one host afterwards, and its record tells which.

use std::time::Duration;

use crate::fleet::{Fleet, KILL, forwarding};
use godwit_tests::guest_image;
use godwit_tests::lab::{Host, until};
use serde_json::Value;

/// So slow that the memory of a guest that has booted takes half a minute.
const SLOW: &str = "20mbit";

impl Fleet {
    /// Waits until a migration is among its memory: some has been sent, more is to come.
    fn wait_until_sending(&self) {
        let mut shown = Value::Null;
        let waited = until("c0", "the sending of memory", Duration::from_secs(60), || {
            shown = self.migration();
            Ok(shown["progress"]["memory_processed_bytes"].as_u64().is_some_and(|bytes| bytes > 0))
        });
        waited.unwrap_or_else(|error| panic!("{error}: {shown:#}"));
        assert_eq!(shown["status"], "running", "{shown:#}");
    }

    /// Slows the underlay down towards a host, so that memory takes seconds to arrive; none heals it.
    fn throttle(&self, host: &Host, rate: Option<&str>) {
        let port = format!("to-{}", host.name());
        let words = match rate {
            Some(rate) => format!("tc qdisc replace dev {port} root tbf rate {rate} burst 64k latency 400ms"),
            None => format!("tc qdisc del dev {port} root"),
        };
        let words: Vec<&str> = words.split(' ').collect();
        let output = self.lab.capture(&words).expect("tc starts").finish().expect("tc ends");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }

    fn named(&self, name: &str) -> &Host {
        self.lab.hosts().iter().find(|host| host.name() == name).expect("there is such a host")
    }
}

/// A fleet of three with a guest that has booted on h1, and a port on h3 that must be able to find it.
struct Scene {
    fleet: Fleet,
    probe: godwit_tests::lab::Probe,
    server: Value,
}

impl Scene {
    fn set() -> Scene {
        let fleet = Fleet::start(3);
        fleet.upload_linux();
        let words = ["server", "create", "one", "--flavor", "small", "--image", "linux", "--network", "blue"];
        fleet.godwit(&[&words[..], &["--host", "h1"]].concat());
        let server = fleet.wait_for_status("one", "ACTIVE");
        let id = server["id"].as_str().expect("has one");
        let console = fleet.lab.pool().join("instances").join(id).join("console.log");
        let ready =
            || Ok(std::fs::read_to_string(&console).is_ok_and(|text| text.contains(guest_image::READY)));
        until("h1", "the guest's ready line", Duration::from_secs(120), ready).expect("it boots");
        let probe = fleet.probe(fleet.host(3));
        Scene { fleet, probe, server }
    }

    fn home(&self) -> &Host {
        let server = self.fleet.server("one").expect("is there");
        self.fleet.named(server["OS-EXT-SRV-ATTR:host"].as_str().expect("is on a host"))
    }

    /// The host of h1 and h2 that the server is not on.
    fn other(&self) -> &Host {
        let number = if self.home().name() == "h1" { 2 } else { 1 };
        self.fleet.host(number)
    }

    /// Starts a migration that takes its time, and waits until it is in the middle of it.
    fn begin(&self) -> (&Host, &Host) {
        let (source, target) = (self.home(), self.other());
        self.fleet.throttle(target, Some(SLOW));
        self.fleet.godwit(&["server", "migrate", "one", "--host", target.name()]);
        self.fleet.wait_until_sending();
        (source, target)
    }

    /// All is healed: the migration ends, what is there agrees with it, h3 finds the guest, and it can move again.
    /// Returns its record, and the host that it left the guest on.
    fn end(&self, target: &Host) -> (Value, String) {
        self.fleet.throttle(target, None);
        let migration = self.fleet.settle("one");
        let home = self.home().name().to_owned();
        self.check_reachable();
        self.fleet.godwit(&["server", "migrate", "one", "--host", self.other().name(), "--wait"]);
        assert_eq!(self.fleet.settle("one")["status"], "completed");
        self.check_reachable();
        (migration, home)
    }

    /// h3 forwards to the host that has the guest, and the guest answers.
    fn check_reachable(&self) {
        let home = self.home();
        let address = &self.server["addresses"]["blue"][0];
        let mac = address["OS-EXT-IPS-MAC:mac_addr"].as_str().expect("has one");
        let third = self.fleet.host(3);
        let right = || {
            let entries = forwarding(third);
            let mut mine = entries.iter().filter(|line| line.starts_with(mac));
            Ok(mine.all(|line| line.contains(&format!("dst {} ", home.address()))))
        };
        third.wait("its forwarding to the guest's host", right).expect("it is set");
        let address = address["addr"].as_str().expect("has one");
        let answers = || Ok(self.probe.output(&["ping", "-c", "1", "-W", "1", address])?.status.success());
        until("h3", "the guest's answer", Duration::from_secs(30), answers).expect("it goes on");
    }

    fn leave(self) {
        self.fleet.end_probe(self.probe, self.fleet.lab.host(3));
        self.fleet.clean();
    }
}

#[test]
fn a_daemon_killed_while_memory_is_sent_leaves_the_server_on_one_host() {
    let scene = Scene::set();

    let (source, target) = scene.begin();
    source.kill_agent(KILL).expect("it is killed");
    source.start_agent().expect("it starts");
    scene.end(target);

    let (_, target) = scene.begin();
    target.kill_agent(KILL).expect("it is killed");
    target.start_agent().expect("it starts");
    scene.end(target);

    let (_, target) = scene.begin();
    scene.fleet.lab.coordinator().kill(KILL).expect("it is killed");
    scene.fleet.lab.coordinator().start().expect("it starts");
    let (migration, _) = scene.end(target);
    assert_eq!(migration["status"], "completed", "the hosts went on by themselves: {migration:#}");
    scene.leave();
}

#[test]
fn a_link_cut_while_memory_is_sent_leaves_the_guest_running_and_the_record_true() {
    let scene = Scene::set();
    for cut_source in [false, true] {
        let (source, target) = scene.begin();
        let cut = if cut_source { source } else { target };
        scene.fleet.lab.cut_link(cut).expect("is cut");
        // Only then may the link be healed: a stream that has not broken would go on. The coordinator may not hear
        // of it before, when the host that knows is the one that is cut off.
        let id = scene.server["id"].as_str().expect("has one");
        let domain = format!("instance-{}", &id[..8]);
        let gives_up = || Ok(source.exec(&["virsh", "domjobinfo", &domain])?.contains("None"));
        let given_up = until(source.name(), "the source's giving up", Duration::from_secs(120), gives_up);
        scene.fleet.lab.heal_link(cut).expect("is healed");
        given_up.expect("it gives up");
        scene.fleet.wait_for_hosts();
        let (migration, was_on) = scene.end(target);
        // A target that is cut off fails it. A source that is cut off could not tell that it gave up, is asked
        // again when it is back, and may send a second time.
        let status = migration["status"].as_str().expect("has one");
        assert!(status == "failed" || (cut_source && status == "completed"), "{migration:#}");
        let has_it = if status == "failed" { source } else { target };
        assert_eq!(migration["source"].as_str(), Some(source.name()), "{migration:#}");
        assert!(was_on == has_it.name(), "it is on {was_on}: {migration:#}");
    }
    scene.leave();
}
