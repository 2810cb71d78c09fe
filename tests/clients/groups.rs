//! Groups of ports and of hosts, as the `openstack` command makes them, and what they do on the hosts.

use crate::guests::{self, Guest};
use crate::stage::Stage;

#[test]
fn a_security_group_of_the_openstack_command_lets_pass_what_its_rules_say() {
    let stage = Stage::start(1);
    guests::prepare(&stage);
    let listed = stage.run(&["openstack", "security", "group", "list"]);
    assert!(listed.contains("Default security group"), "{listed}");
    stage.run(&["openstack", "security", "group", "create", "web"]);
    let rule = ["security", "group", "rule", "create", "--protocol", "tcp", "--dst-port", "80:81", "web"];
    let made = stage.json(&rule);
    assert_eq!((&made["port_range_min"], &made["port_range_max"]), (&80.into(), &81.into()), "{made}");
    let wrong =
        ["openstack", "security", "group", "rule", "create", "--protocol", "tcp", "--dst-port", "9:8"];
    let said = stage.refused(&[&wrong[..], &["web"]].concat());
    assert!(said.contains("port"), "{said}");

    let guest = Guest::create(&stage, "one", "h1");
    stage.run(&["openstack", "server", "add", "security", "group", "one", "web"]);
    let groups = guest.shown(&stage, "security_groups").to_string();
    assert!(groups.contains("web") && groups.contains("default"), "{groups}");
    // The program that applies them sits at the guest's tap.
    let taps = stage.host("h1").exec(&["virsh", "-q", "domiflist", &guest.id]).expect("libvirt answers");
    let tap = taps.split_whitespace().next().expect("it has a NIC").to_owned();
    let attached = stage.host("h1").exec(&["bpftool", "net", "show", "dev", &tap]).expect("runs");
    assert!(attached.contains("filter"), "{attached}");
    let said = stage.refused(&["openstack", "security", "group", "delete", "web"]);
    assert!(said.contains("in use"), "{said}");
    stage.run(&["openstack", "server", "remove", "security", "group", "one", "web"]);
    stage.run(&["openstack", "security", "group", "delete", "web"]);
    guest.delete(&stage);
    guests::clear(&stage);
}

#[test]
fn an_aggregate_of_the_openstack_command_is_a_zone_that_servers_are_placed_in() {
    let stage = Stage::start(2);
    guests::prepare(&stage);
    stage.run(&["openstack", "aggregate", "create", "--zone", "east", "racks"]);
    stage.run(&["openstack", "aggregate", "add", "host", "racks", "h2"]);
    assert!(stage.run(&["openstack", "availability", "zone", "list"]).contains("east"));
    let parts = ["server", "create", "--flavor", "small", "--image", "guest", "--network", "net"];
    let shown = stage.json(&[&parts[..], &["--availability-zone", "east", "--wait", "one"]].concat());
    assert_eq!(shown["status"], "ACTIVE", "{shown}");
    let guest = Guest::named(&stage, "one");
    guest.is_carried_by(&stage, "h2");
    guest.delete(&stage);
    stage.run(&["openstack", "aggregate", "remove", "host", "racks", "h2"]);
    stage.run(&["openstack", "aggregate", "delete", "racks"]);
    guests::clear(&stage);
}
