//! The coordinator and the agents are killed at each step of what they do; it is done all the same, once.

use crate::fleet::{Fleet, KILL, guests, instance_file, join, part, reservations};
use godwit_tests::lab::Host;
use serde_json::Value;

/// The marker that a crash point leaves, as its daemon names it.
fn marker(point: &str) -> String {
    format!("/run/{}", point.replace(':', "-"))
}

/// Sets where a host's daemon will die, once.
fn arm(host: &Host, point: Option<&str>) {
    host.set_environment("GODWIT_CRASH_AT", point);
    host.set_environment("GODWIT_CRASH_ONCE", point.map(marker).as_deref());
}

fn has_crashed(host: &Host, point: &str) -> bool {
    host.file(marker(point).trim_start_matches('/')).exists()
}

/// Both sides of each step of an operation.
fn sides(operation: &str, steps: &[&str]) -> Vec<String> {
    let sides = |step| ["before", "after"].map(|side| format!("{operation}.{step}:{side}"));
    steps.iter().flat_map(sides).collect()
}

impl Fleet {
    /// Starts what `begin` does, kills the coordinator at each of `points` on the way, and starts it again.
    fn coordinator_dies_at(&self, points: &[String], begin: impl FnOnce()) {
        let coordinator = self.lab.coordinator();
        coordinator.kill(KILL).expect("it is killed");
        arm(coordinator.host(), Some(&points[0]));
        coordinator.start().expect("it starts");
        self.wait_for_hosts();
        begin();
        for (number, point) in points.iter().enumerate() {
            let died = || Ok(coordinator.process()?.is_none());
            coordinator.host().wait(&format!("its death at {point}"), died).unwrap_or_else(|error| {
                panic!("{error}: {:#}", self.godwit(&["operation", "list"]));
            });
            assert!(has_crashed(coordinator.host(), point), "it died elsewhere than at {point}");
            let next = points.get(number + 1).map(String::as_str);
            arm(coordinator.host(), next);
            // It may die again before it listens.
            if let Err(error) = coordinator.start() {
                assert!(next.is_some_and(|next| has_crashed(coordinator.host(), next)), "{error}");
            }
        }
    }

    /// Starts what `begin` does, kills agents at each point on the way, in this order, and starts them again.
    fn agents_die_at(&self, points: &[(&Host, String)], begin: impl FnOnce()) {
        let (first, point) = &points[0];
        restart(first, Some(point));
        self.wait_for_hosts();
        begin();
        for (number, (host, point)) in points.iter().enumerate() {
            let died = || Ok(host.agent_process()?.is_none());
            host.wait(&format!("its agent's death at {point}"), died).unwrap_or_else(|error| {
                panic!("{error}: {:#}", self.godwit(&["operation", "list"]));
            });
            assert!(has_crashed(host, point), "{}'s agent died elsewhere than at {point}", host.name());
            let next = points.get(number + 1);
            match next {
                Some((other, next)) if other.name() == host.name() => arm(host, Some(next)),
                Some((other, next)) => {
                    // Before the one that it waits for is back.
                    restart(other, Some(next));
                    arm(host, None);
                }
                None => arm(host, None),
            }
            host.start_agent().expect("the agent starts");
        }
    }
}

/// The end of each step of an operation, when its effect is there and not yet noted.
fn ends(operation: &str, steps: &[&str]) -> Vec<String> {
    steps.iter().map(|step| format!("{operation}.{step}:after")).collect()
}

/// The steps of a resize, in order.
const RESIZE: [&str; 8] = ["reserve", "stop", "leave", "disk", "network", "switch", "define", "start"];

fn restart(host: &Host, point: Option<&str>) {
    host.kill_agent(KILL).expect("the agent is killed");
    arm(host, point);
    host.start_agent().expect("the agent starts");
}

const CREATE: [&str; 6] = ["reserve", "disk", "ports", "network", "define", "start"];

#[test]
fn a_coordinator_killed_at_each_step_of_a_creation_and_a_deletion_makes_one_server_and_leaves_none() {
    let fleet = Fleet::start(2);
    fleet.coordinator_dies_at(&sides("create_instance", &CREATE), || fleet.ask_for("one", &[]));
    let server = fleet.wait_for_status("one", "ACTIVE");
    fleet.check_home(&server);

    let id = server["id"].as_str().expect("has one");
    let steps = ["domain", "disk", "ports", "reservation"];
    fleet.coordinator_dies_at(&sides("delete_instance", &steps), || {
        let _ = fleet.lab.coordinator().cli_output(&["server", "delete", id]).expect("godwit runs");
    });
    fleet
        .lab
        .coordinator()
        .host()
        .wait("the deletion", || Ok(fleet.server("one").is_none()))
        .expect("it ends");
    fleet.check_nothing_left();
}

#[test]
fn a_coordinator_killed_at_each_step_of_an_undo_leaves_the_reason_and_nothing_else() {
    let fleet = Fleet::start(1);
    let image = fleet.godwit(&["image", "show", "blank"]);
    let path = fleet.lab.pool().join("images").join(image["id"].as_str().expect("has one"));
    let kept = std::fs::read(&path).expect("is there");
    std::fs::remove_file(&path).expect("is ours");
    let points = sides("create_instance", &["undo_disk", "undo_reserve"]);
    fleet.coordinator_dies_at(&points, || fleet.ask_for("one", &[]));
    let server = fleet.wait_for_status("one", "ERROR");
    let fault = server["fault"]["message"].as_str().unwrap_or_default();
    assert!(fault.contains("h1") && fault.contains("is not there"), "{fault}");
    assert_eq!(reservations(fleet.host(1)), Vec::<String>::new());
    assert_eq!(guests(fleet.host(1)), []);
    std::fs::write(&path, kept).expect("is ours");
    fleet.clean();
    fleet.create("two", &[]);
    fleet.clean();
}

#[test]
fn an_agent_killed_at_each_request_of_a_creation_and_a_deletion_makes_one_server_and_leaves_none() {
    let fleet = Fleet::start(1);
    let host = fleet.host(1);
    let points = |requests: &[&str]| -> Vec<(&Host, String)> {
        sides("agent", requests).into_iter().map(|point| (host, point)).collect()
    };
    let requests = ["reserve", "create_disk", "ensure_network", "define_instance", "start_instance"];
    fleet.agents_die_at(&points(&requests), || fleet.ask_for("one", &[]));
    let server = fleet.wait_for_status("one", "ACTIVE");
    fleet.check_home(&server);

    fleet.agents_die_at(&points(&["remove_instance", "delete_disk", "release"]), || {
        fleet.godwit(&["server", "delete", "one"]);
    });
    host.wait("the deletion", || Ok(fleet.server("one").is_none())).expect("it ends");
    fleet.check_nothing_left();
}

#[test]
fn a_coordinator_killed_at_each_step_of_a_migration_has_the_server_on_one_host() {
    let fleet = Fleet::start(2);
    fleet.create("one", &["--host", "h1"]);
    let steps = ["reserve", "prepare", "send", "switch_over", "release"];
    fleet.coordinator_dies_at(&sides("live_migrate", &steps), || {
        let _ = fleet.lab.coordinator().cli_output(&["server", "migrate", "one"]).expect("godwit runs");
    });
    let migration = fleet.settle("one");
    assert_eq!(migration["status"], "completed", "{migration:#}");
    fleet.godwit(&["server", "migrate", "one", "--wait"]);
    fleet.settle("one");
    fleet.clean();
}

#[test]
fn agents_killed_at_each_request_of_a_migration_have_the_server_on_one_host() {
    let fleet = Fleet::start(2);
    fleet.create("one", &["--host", "h1"]);
    let (source, target) = (fleet.host(1), fleet.host(2));
    let at = |host, requests: &[&str]| sides("agent", requests).into_iter().map(move |point| (host, point));
    let points: Vec<(&Host, String)> = at(target, &["reserve", "ensure_network", "prepare_migration"])
        .chain(at(source, &["migrate"]))
        .chain(at(target, &["discard_migration"]))
        .chain(at(source, &["discard_migration", "remove_instance", "release"]))
        .collect();
    fleet.agents_die_at(&points, || {
        fleet.godwit(&["server", "migrate", "one", "--host", "h2"]);
    });
    let migration = fleet.settle("one");
    assert_eq!(migration["status"], "completed", "{migration:#}");
    fleet.godwit(&["server", "migrate", "one", "--wait"]);
    fleet.settle("one");
    fleet.clean();
}

impl Fleet {
    /// A server "it" that runs on h1, has booted and fits only on h2 with flavor "two".
    fn create_pinned(&self) {
        self.upload_linux();
        self.create_pinned_flavors();
        let words = ["server", "create", "it", "--flavor", "one", "--image", "linux", "--network", "blue"];
        self.godwit(&[&words[..], &["--host", "h1"]].concat());
        self.wait_for_status("it", "ACTIVE");
        self.wait_for_boots("it", 1);
    }

    /// The size of its disk's file, in bytes.
    fn disk_bytes(&self, server: &Value, host: &Host) -> u64 {
        assert!(!instance_file(host, server, "disk-old").exists(), "the old disk is left");
        std::fs::metadata(instance_file(host, server, "disk")).expect("is there").len()
    }

    fn try_godwit(&self, words: &[&str]) {
        let _ = self.lab.coordinator().cli_output(words).expect("godwit runs");
    }
}

#[test]
fn a_coordinator_killed_at_each_step_of_a_resize_and_of_its_end_has_the_server_whole_on_one_host() {
    let fleet = Fleet::start(2);
    fleet.create_pinned();
    let before = fleet.disk_bytes(&fleet.server("it").expect("is there"), fleet.host(1));
    let resize = || fleet.try_godwit(&["server", "resize", "it", "--flavor", "two"]);
    fleet.coordinator_dies_at(&sides("resize_instance", &RESIZE), resize);
    let server = fleet.wait_for_status("it", "VERIFY_RESIZE");
    fleet.check_guest_on(&server, fleet.host(2));
    let steps = ["stop", "disk", "switch", "network", "define", "start", "release"];
    fleet.coordinator_dies_at(&ends("revert_resize", &steps), || {
        fleet.try_godwit(&["server", "resize", "revert", "it"]);
    });
    let server = fleet.wait_for_status("it", "ACTIVE");
    assert_eq!(server["OS-EXT-SRV-ATTR:host"], "h1");
    fleet.check_home(&server);
    assert_eq!(fleet.disk_bytes(&server, fleet.host(1)), before);

    // Its disk is away, so what has been done is undone, and it cannot be started again either.
    let id = server["id"].as_str().expect("has one");
    let disk = fleet.lab.pool().join("instances").join(id).join("disk");
    let away = fleet.lab.folder().join("away");
    std::fs::rename(&disk, &away).expect("is ours");
    let undone = ["undo_disk", "undo_leave", "undo_stop", "undo_reserve"];
    fleet.coordinator_dies_at(&ends("resize_instance", &undone), resize);
    let server = fleet.wait_for_status("it", "SHUTOFF");
    std::fs::rename(&away, &disk).expect("is ours");
    fleet.check_held_by(&server, "h1");
    fleet.wait_for_hosts();
    fleet.godwit(&["server", "start", "it", "--wait"]);

    fleet.godwit(&["server", "migrate", "it", "--cold", "--wait"]);
    fleet.coordinator_dies_at(&ends("confirm_resize", &["disk", "release"]), || {
        fleet.try_godwit(&["server", "resize", "confirm", "it"]);
    });
    let server = fleet.wait_for_status("it", "ACTIVE");
    assert_eq!(server["OS-EXT-SRV-ATTR:host"], "h2");
    fleet.check_home(&server);
    fleet.clean();
}

#[test]
fn agents_killed_at_each_request_of_a_resize_have_the_server_whole_on_one_host() {
    let fleet = Fleet::start(2);
    fleet.create_pinned();
    let (source, target) = (fleet.host(1), fleet.host(2));
    let at = |host, requests: &[&str]| sides("agent", requests).into_iter().map(move |point| (host, point));
    let points: Vec<(&Host, String)> = at(target, &["reserve"])
        .chain(at(source, &["stop_instance", "remove_instance"]))
        .chain(at(target, &["grow_disk", "ensure_network", "define_instance", "start_instance"]))
        .collect();
    fleet.agents_die_at(&points, || {
        fleet.godwit(&["server", "resize", "it", "--flavor", "two"]);
    });
    let server = fleet.wait_for_status("it", "VERIFY_RESIZE");
    fleet.check_guest_on(&server, target);
    let at_end =
        |host, requests: &[&str]| ends("agent", requests).into_iter().map(move |point| (host, point));
    let points: Vec<(&Host, String)> = at_end(target, &["remove_instance", "restore_disk"])
        .chain(at_end(source, &["define_instance"]))
        .chain(at_end(target, &["release"]))
        .collect();
    fleet.agents_die_at(&points, || {
        fleet.godwit(&["server", "resize", "revert", "it"]);
    });
    let server = fleet.wait_for_status("it", "ACTIVE");
    assert_eq!(server["OS-EXT-SRV-ATTR:host"], "h1");
    fleet.check_home(&server);
    fleet.disk_bytes(&server, source);

    // Again, to a pool of the target's own: the disk moves too.
    part(target);
    let points: Vec<(&Host, String)> = at_end(source, &["mark_disk"])
        .chain(at_end(target, &["await_disk"]))
        .chain(at(source, &["send_disk"]))
        .collect();
    fleet.agents_die_at(&points, || {
        fleet.godwit(&["server", "resize", "it", "--flavor", "two"]);
    });
    fleet.wait_for_status("it", "VERIFY_RESIZE");
    let points: Vec<(&Host, String)> =
        at(target, &["drop_old_disk"]).chain(at(source, &["leave_disk", "release"])).collect();
    fleet.agents_die_at(&points, || {
        fleet.godwit(&["server", "resize", "confirm", "it"]);
    });
    let server = fleet.wait_for_status("it", "ACTIVE");
    fleet.check_home(&server);
    fleet.disk_bytes(&server, target);
    assert!(!instance_file(source, &server, "").exists(), "the disk is left on the source");

    // A server of an image that the target's pool has not got.
    let points: Vec<(&Host, String)> = at_end(target, &["await_image"])
        .chain(at_end(source, &["send_image"]))
        .chain(at_end(target, &["settle_image"]))
        .collect();
    fleet.agents_die_at(&points, || fleet.ask_for("new", &["--host", "h2"]));
    let server = fleet.wait_for_status("new", "ACTIVE");
    fleet.check_held_by(&server, "h2");
    fleet.clean();
    let images = || Ok(target.exec(&["find", "/srv/godwit/images", "-type", "f"])?.lines().count());
    assert_eq!(images().expect("find runs"), 2, "the image and its digests, and nothing half-made");
    fleet.godwit(&["image", "delete", "blank"]);
    target.wait("the copy's end", || Ok(images()? == 0)).expect("it goes with its image");
    join(target);
}
