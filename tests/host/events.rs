//! What guests and hosts should not send: real frames, and who is told of them.

use std::time::Duration;

use crate::fleet::{Fleet, KILL};
use crate::trust::{http, token};
use godwit_tests::lab::{Probe, URL, until};
use serde_json::{Value, json};

fn text(value: &Value) -> String {
    value.as_str().expect("is text").to_owned()
}

/// A command in a guest that has no answer.
fn tries(guest: &Probe, line: &str) {
    let words: Vec<&str> = line.split(' ').collect();
    guest.output(&words).expect("it runs");
}

/// The first event that has all of these.
fn event(fleet: &Fleet, has: &Value) -> Option<Value> {
    let has = has.as_object().expect("is one");
    let events = fleet.godwit(&["event", "list"]);
    let events = events.as_array().expect("is a list");
    events.iter().find(|event| has.iter().all(|(key, value)| event[key] == *value)).cloned()
}

/// Does something until it is told of.
fn told(fleet: &Fleet, has: Value, mut cause: impl FnMut()) {
    let waited = until("the lab", &format!("the event {has}"), Duration::from_secs(20), || {
        cause();
        Ok(event(fleet, &has).is_some())
    });
    waited.unwrap_or_else(|error| panic!("{error}: {:#}", fleet.godwit(&["event", "list"])));
}

#[test]
fn a_spoof_a_conflict_a_strange_network_and_a_stale_sender_are_told_with_who_and_why() {
    let fleet = Fleet::start(2);
    let (here, there) = (fleet.host(1), fleet.host(2));
    let (one, port) = fleet.probe_with(here, &[]);
    let (two, other) = fleet.probe_with(there, &[]);
    let address = |port: &Value| text(&port["fixed_ips"][0]["ip_address"]);
    let (own, others) = (address(&port), address(&other));
    let vni = fleet.godwit(&["network", "show", "blue"])["provider:segmentation_id"].clone();
    until("the lab", "the network", Duration::from_secs(20), || {
        Ok(one.output(&["ping", "-c", "1", "-W", "1", &others])?.status.success())
    })
    .expect("both are reached");

    one.exec(&["ip", "address", "add", "10.77.0.200/32", "dev", "eth0"]).expect("it takes what it likes");
    let spoof = json!({
        "kind": "spoof", "host": "h1", "port": port["id"], "mac": port["mac_address"], "vni": vni,
        "address": "10.77.0.200", "reason": "spoofed_ipv4",
    });
    told(&fleet, spoof, || tries(&one, &format!("ping -c 1 -W 1 -I 10.77.0.200 {others}")));
    // One that answers for its neighbour.
    let spoof = json!({
        "kind": "spoof", "host": "h2", "port": other["id"], "mac": other["mac_address"], "address": own,
        "reason": "spoofed_arp",
    });
    let taken = format!("{own}/32");
    two.exec(&["ip", "address", "add", &taken, "dev", "eth0"]).expect("it takes what it likes");
    told(&fleet, spoof, || tries(&two, &format!("busybox arping -A -c 1 -w 1 -I eth0 -s {own} {own}")));
    two.exec(&["ip", "address", "delete", &taken, "dev", "eth0"]).expect("it lets go");
    let conflict = json!({
        "kind": "conflict", "host": "h1", "port": port["id"], "mac": port["mac_address"],
        "owner": other["mac_address"], "address": others,
    });
    told(&fleet, conflict, || tries(&one, &format!("busybox arping -D -c 1 -w 1 -I eth0 {others}")));

    let (to, from) = (here.address(), there.address());
    let words = ["ip", "link", "add", "strange", "type", "vxlan", "id", "77777", "dstport", "4789"];
    there.exec(&[&words[..], &["local", from, "remote", to]].concat()).expect("it is made");
    for line in ["address add 192.0.2.1/24 dev strange", "link set strange up"] {
        let words: Vec<&str> = ["ip"].into_iter().chain(line.split(' ')).collect();
        there.exec(&words).expect("it is set up");
    }
    let strange = json!({ "kind": "unknown_vni", "host": "h1", "vni": 77777, "peer": from, "network": null });
    told(&fleet, strange, || drop(there.output(&["ping", "-c", "1", "-W", "1", "192.0.2.2"])));
    there.exec(&["ip", "link", "delete", "strange"]).expect("it goes");

    let auth = format!("X-Auth-Token: {}", token(&fleet));
    let (status, answer) = http(&fleet, &["-H", &auth, &format!("{URL}/operator/v1/events?kind=conflict")]);
    assert_eq!(status, "200", "{answer}");
    assert!(answer.contains(r#""kind":"conflict""#) && !answer.contains("spoof"), "{answer}");

    // A host that cannot be told that a guest has left sends on to where it was, and that host tells of it.
    here.kill_agent(KILL).expect("it is killed");
    drop(two);
    fleet.godwit(&["port", "delete", &text(&other["id"])]);
    let stale = json!({ "kind": "stale", "host": "h2", "mac": other["mac_address"], "vni": vni, "peer": to });
    told(&fleet, stale, || tries(&one, &format!("ping -c 1 -W 1 {others}")));
    here.start_agent().expect("it starts");
    fleet.wait_for_hosts();
    drop(one);
    fleet.godwit(&["port", "delete", &text(&port["id"])]);
    fleet.check_nothing_left();
}
