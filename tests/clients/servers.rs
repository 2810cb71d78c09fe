//! A server's life with the `openstack` command, and with the `nova` command; each step is looked up on the hosts.

use std::time::Duration;

use godwit_tests::lab::until;

use crate::guests::{self, Guest};
use crate::stage::Stage;

#[test]
fn a_server_of_the_openstack_command_lives_on_its_host_moves_and_leaves_nothing() {
    let stage = Stage::start(2);
    guests::prepare(&stage);
    let guest = Guest::create(&stage, "one", "h1");
    guest.is_carried_by(&stage, "h1");
    guest.boots(&stage, 1);
    assert!(guest.boots(&stage, 1).contains(&format!("address={}", guest.address)));
    let disk = stage.lab().pool().join("instances").join(&guest.id).join("disk");
    let bytes = std::fs::metadata(&disk).expect("its disk is on the pool").len();
    assert!(bytes > 0, "the disk holds the image");

    let listed = stage.json(&["server", "list", "--long", "--all-projects"]);
    let row = &listed[0];
    assert_eq!((&row["Name"], &row["Status"], &row["Host"]), (&"one".into(), &"ACTIVE".into(), &"h1".into()));
    assert_eq!((&row["Image Name"], &row["Flavor"]), (&"guest".into(), &"small".into()), "{listed}");
    assert_eq!(row["Networks"]["net"][0], guest.address.as_str(), "{listed}");

    stage.run(&["openstack", "server", "stop", "one"]);
    guest.becomes(&stage, "SHUTOFF");
    guest.is_off(&stage);
    stage.run(&["openstack", "server", "start", "one"]);
    guest.becomes(&stage, "ACTIVE");
    guest.is_carried_by(&stage, "h1");
    guest.boots(&stage, 2);
    stage.run(&["openstack", "server", "reboot", "--hard", "--wait", "one"]);
    guest.is_carried_by(&stage, "h1");
    guest.boots(&stage, 3);
    stage.run(&["openstack", "server", "reboot", "--wait", "one"]);
    guest.boots(&stage, 4);

    stage.run(&["openstack", "server", "pause", "one"]);
    guest.becomes(&stage, "PAUSED");
    assert_eq!(guest.state(stage.host("h1")), "paused");
    stage.run(&["openstack", "server", "unpause", "one"]);
    guest.becomes(&stage, "ACTIVE");
    assert_eq!(guest.state(stage.host("h1")), "running");

    stage.run(&["openstack", "server", "migrate", "--live-migration", "--host", "h2", "--wait", "one"]);
    guest.is_carried_by(&stage, "h2");
    stage.run(&["openstack", "server", "migrate", "--live-migration", "--wait", "one"]);
    guest.is_carried_by(&stage, "h1");
    let moves = stage.json(&["server", "migration", "list", "--server", "one"]);
    let moves = moves.as_array().expect("is a list");
    assert_eq!(moves.len(), 2, "{moves:?}");
    for row in moves {
        assert_eq!((&row["Status"], &row["Type"]), (&"completed".into(), &"live-migration".into()), "{row}");
        assert_ne!(row["Source Compute"], row["Dest Compute"], "{row}");
    }
    assert_eq!(stage.json(&["server", "migration", "list"]).as_array().map(Vec::len), Some(2));

    resizes_and_moves_cold(&stage, &guest);
    let events = stage.json(&["server", "event", "list", "one"]);
    let events: Vec<&str> =
        events.as_array().into_iter().flatten().filter_map(|e| e["Action"].as_str()).collect();
    for event in
        ["create", "stop", "start", "reboot", "pause", "unpause", "live-migration", "resize", "migrate"]
    {
        assert!(events.contains(&event), "{event} is missing in {events:?}");
    }
    stage.run(&["openstack", "server", "set", "--name", "other", "one"]);
    assert!(stage.run(&["openstack", "server", "list"]).contains("other"));
    stage.run(&["openstack", "server", "set", "--name", "one", "other"]);
    guest.delete(&stage);
    guests::clear(&stage);
}

/// A resize that stays, and a move of a guest that is off, which is taken back.
fn resizes_and_moves_cold(stage: &Stage, guest: &Guest) {
    let host = || guest.shown(stage, "OS-EXT-SRV-ATTR:host").as_str().expect("has a host").to_owned();
    let size = ["--ram", "320", "--vcpus", "1", "--disk", "2", "--property", "hw:numa_nodes=1"];
    stage.run(&[&["openstack", "flavor", "create"], &size[..], &["larger"]].concat());
    stage.run(&["openstack", "server", "resize", "--flavor", "larger", "--wait", "one"]);
    guest.becomes(stage, "VERIFY_RESIZE");
    let memory = stage.host(&host()).exec(&["virsh", "dominfo", &guest.id]).expect("libvirt answers");
    assert!(memory.contains("327680 KiB"), "{memory}");
    stage.run(&["openstack", "server", "resize", "confirm", "one"]);
    guest.becomes(stage, "ACTIVE");
    let there = host();
    guest.is_carried_by(stage, &there);
    stage.run(&["openstack", "server", "migrate", "--wait", "one"]);
    guest.becomes(stage, "VERIFY_RESIZE");
    assert_ne!(host(), there);
    stage.run(&["openstack", "server", "resize", "revert", "one"]);
    guest.becomes(stage, "ACTIVE");
    guest.is_carried_by(stage, &there);
    let moves = stage.json(&["server", "migration", "list", "--server", "one"]);
    let moves = moves.as_array().into_iter().flatten();
    let moves: Vec<(&str, &str)> = moves
        .filter_map(|m| Some((m["Type"].as_str()?, m["Status"].as_str()?)))
        .filter(|(kind, _)| *kind != "live-migration")
        .collect();
    assert_eq!(moves, [("migration", "reverted"), ("resize", "confirmed")]);
    stage.run(&["openstack", "flavor", "delete", "larger"]);
}

#[test]
fn a_server_of_the_nova_command_lives_on_its_host_moves_and_leaves_nothing() {
    let stage = Stage::start(2);
    guests::prepare(&stage);
    assert!(stage.run(&["nova", "flavor-list"]).contains("small"));
    stage.run(&["nova", "flavor-create", "numa", "auto", "256", "1", "1"]);
    stage.run(&["nova", "flavor-key", "numa", "set", "hw:numa_nodes=1"]);
    let network = stage.run(&["openstack", "network", "show", "net", "-f", "value", "-c", "id"]);
    let nic = format!("net-id={}", network.trim());
    let boot = ["nova", "boot", "--flavor", "numa", "--image", "guest", "--nic", &nic, "--poll", "two"];
    let printed = stage.run(&boot);
    assert!(printed.contains("Finished") && printed.contains("| two"), "{printed}");
    let guest = Guest::named(&stage, "two");
    let first = guest.shown(&stage, "OS-EXT-SRV-ATTR:host").as_str().expect("has a host").to_owned();
    let other = if first == "h1" { "h2" } else { "h1" };
    guest.is_carried_by(&stage, &first);
    guest.boots(&stage, 1);
    assert!(stage.run(&["nova", "list", "--all-tenants"]).contains(&guest.id));
    assert!(stage.run(&["nova", "show", "two"]).contains(&guest.address));
    assert!(stage.run(&["nova", "console-log", "two"]).contains(godwit_tests::guest_image::READY));

    stage.run(&["nova", "live-migration", "two", other]);
    let carried = || guest.state(stage.host(other)) == "running" && guest.shown(&stage, "status") == "ACTIVE";
    until(other, "the end of the migration", Duration::from_secs(60), || Ok(carried()))
        .unwrap_or_else(|error| panic!("{error}"));
    guest.is_carried_by(&stage, other);
    let moves = stage.run(&["nova", "migration-list"]);
    assert!(moves.contains("completed") && moves.contains("live-migration"), "{moves}");
    assert!(!stage.run(&["nova", "server-migration-list", "two"]).contains("completed"), "only running ones");

    stage.run(&["nova", "stop", "two"]);
    guest.becomes(&stage, "SHUTOFF");
    guest.is_off(&stage);
    stage.run(&["nova", "start", "two"]);
    guest.becomes(&stage, "ACTIVE");
    stage.run(&["nova", "reboot", "--poll", "--hard", "two"]);
    guest.is_carried_by(&stage, other);
    assert!(stage.run(&["nova", "instance-action-list", "two"]).contains("live-migration"));

    assert!(stage.run(&["nova", "hypervisor-list"]).contains("h2"));
    assert!(stage.run(&["nova", "hypervisor-show", "h1"]).contains("198.18.0.11"));
    assert_eq!(stage.run(&["nova", "service-list"]).matches("nova-compute").count(), 2);
    assert!(stage.run(&["nova", "availability-zone-list"]).contains("available"));
    for command in ["quota-show", "limits", "usage"] {
        stage.run(&["nova", command]);
    }

    stage.run(&["nova", "delete", "two"]);
    until("c0", "the end of server two", Duration::from_secs(60), || {
        Ok(!stage.run(&["nova", "list", "--all-tenants"]).contains(&guest.id))
    })
    .unwrap_or_else(|error| panic!("{error}"));
    guest.is_gone(&stage);
    stage.run(&["nova", "flavor-delete", "numa"]);
    guests::clear(&stage);
}
