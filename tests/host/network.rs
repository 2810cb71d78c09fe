//! What guests may say to each other, what they are told, and what of their networks is put right.

use std::time::{Duration, Instant};

use crate::fleet::{Fleet, KILL, forwarding};
use godwit_tests::lab::{Host, Probe, until};
use serde_json::Value;

fn text(value: &Value) -> String {
    value.as_str().expect("is text").to_owned()
}

/// Whether a connection to a port of an address is taken.
fn connects(from: &Probe, address: &str, port: &str) -> bool {
    let words = ["busybox", "nc", "-w", "1", address, port, "-e", "true"];
    from.output(&words).expect("nc runs").status.success()
}

fn answers(from: &Probe, address: &str) -> bool {
    from.output(&["ping", "-c", "1", "-W", "1", address]).expect("ping runs").status.success()
}

/// One of the agent's series, by its whole name with labels.
fn series(host: &Host, name: &str) -> f64 {
    let text = host.exec(&["curl", "-sSf", "http://127.0.0.1:9177/metrics"]).expect("the agent answers");
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.unwrap_or_else(|| panic!("{name} is not in {text}")).parse().expect("is a number")
}

fn wait_for(what: &str, condition: impl Fn() -> bool) {
    until("the lab", what, Duration::from_secs(20), || Ok(condition()))
        .unwrap_or_else(|error| panic!("{error}"));
}

fn address_of(port: &Value) -> String {
    text(&port["fixed_ips"][0]["ip_address"])
}

#[test]
fn groups_say_what_passes_between_hosts_and_go_on_doing_so_without_their_agent() {
    let fleet = Fleet::start(2);
    let (here, there) = (fleet.host(1), fleet.host(2));
    let web = text(&fleet.godwit(&["security-group", "create", "web"])["id"]);
    let allow = ["security-group", "allow", "web", "--protocol", "tcp", "--port", "80"];
    fleet.godwit(&allow);
    let (client, port) = fleet.probe_with(here, &[]);
    let (server, of_server) = fleet.probe_with(there, &["--security-group", "web"]);
    assert_eq!(of_server["security_groups"], serde_json::json!([web]));
    let (of_client, address) = (address_of(&port), address_of(&of_server));
    let _listening: Vec<_> = ["80", "81"]
        .into_iter()
        .map(|port| server.spawn(&["busybox", "nc", "-ll", "-p", port, "-e", "true"]).expect("nc listens"))
        .collect();
    wait_for("the first connection", || connects(&client, &address, "80"));
    assert!(!connects(&client, &address, "81"), "no rule is about it");
    assert!(!answers(&client, &address), "nor about this");
    assert!(!answers(&server, &of_client), "the client's group takes its own members only");

    there.kill_agent(KILL).expect("it is killed");
    assert!(connects(&client, &address, "80") && !connects(&client, &address, "81"));
    there.start_agent().expect("it starts");
    fleet.wait_for_hosts();
    assert!(connects(&client, &address, "80") && !connects(&client, &address, "81"));

    // Who belongs to a group is known wherever a rule names it.
    fleet.godwit(&["security-group", "allow", "web", "--protocol", "icmp", "--remote-group", "default"]);
    wait_for("the members' being told", || answers(&client, &address));
    let member = fleet.godwit(&["security-group", "show", "web"]);
    let rules = member["security_group_rules"].as_array().expect("has rules");
    let rule = rules.iter().find(|rule| rule["protocol"] == "tcp").expect("is there");
    fleet.godwit(&["security-group", "forbid", &text(&rule["id"])]);
    wait_for("the rule's end", || !connects(&client, &address, "80"));
    assert!(answers(&client, &address), "the other rule stays");

    drop((client, server));
    fleet.godwit(&["port", "delete", &text(&port["id"]), &text(&of_server["id"])]);
    fleet.godwit(&["security-group", "delete", "web"]);
    fleet.check_nothing_left();
}

#[test]
fn guests_are_told_their_addresses_while_the_coordinator_is_down_and_entries_changed_by_hand_come_back() {
    let fleet = Fleet::start(2);
    let (here, there) = (fleet.host(1), fleet.host(2));
    let (probe, port) = fleet.probe_with(here, &[]);
    let (other, of_other) = fleet.probe_with(there, &[]);
    let address = address_of(&port);
    wait_for("the network", || answers(&probe, &address_of(&of_other)));

    let coordinator = fleet.lab.coordinator();
    coordinator.kill(KILL).expect("it is killed");
    here.kill_agent(KILL).expect("it is killed");
    here.start_agent().expect("it starts");
    // What is only in the network's own range says where it comes from.
    probe.exec(&["ip", "address", "flush", "dev", "eth0"]).expect("it has none");
    let script = fleet.file("told.sh", b"#!/bin/sh\n[ \"$1\" = deconfig ] || echo \"$1 $ip/$mask\"\n");
    probe.exec(&["chmod", "755", &script.to_string_lossy()]).expect("it may run");
    let asks = ["busybox", "udhcpc", "-fnq", "-t", "10", "-T", "1", "-i", "eth0", "-s"];
    let told = probe.exec(&[&asks[..], &[&script.to_string_lossy()]].concat()).expect("it is answered");
    assert!(told.contains(&format!("bound {address}/24")), "{told}");
    coordinator.start().expect("it starts");
    coordinator.wait_until_listening().expect("it listens");
    fleet.wait_for_hosts();

    let vni = fleet.godwit(&["network", "show", "blue"])["provider:segmentation_id"].to_string();
    let device = format!("gwv{vni}");
    let mac = text(&of_other["mac_address"]);
    let fdb = |words: &[&str]| here.exec(&[&["bridge", "fdb"][..], words].concat()).expect("bridge runs");
    let entries = || {
        let listed = fdb(&["show", "dev", &device]);
        let mut lines: Vec<String> = listed
            .lines()
            .filter_map(|l| Some(l.split_once(" self")?.0.to_owned()))
            .filter(|l| l.contains(" dst "))
            .collect();
        lines.sort();
        lines
    };
    let before = entries();
    let repairs = r#"godwit_network_repairs_total{kind="forwarding"}"#;
    let counted = series(here, repairs);
    fdb(&["del", &mac, "dev", &device, "dst", there.address(), "self"]);
    fdb(&["add", "fa:16:3e:99:99:99", "dev", &device, "dst", there.address(), "self"]);
    fdb(&["append", "00:00:00:00:00:00", "dev", &device, "dst", "198.18.0.99", "self"]);
    let put_right =
        until("h1", "the entries' being put right", Duration::from_secs(20), || Ok(entries() == before));
    put_right.unwrap_or_else(|error| panic!("{error}: {:#?}, not {before:#?}", entries()));
    wait_for("the repairs' being counted", || {
        series(here, repairs) >= counted + 2.0
            && series(here, r#"godwit_network_repairs_total{kind="flood"}"#) >= 1.0
    });
    here.exec(&["ip", "link", "delete", &device]).expect("it goes");
    wait_for("the device's being made again", || entries() == before);
    wait_for("both sides' agreeing", || {
        let tables = fleet.godwit(&["network", "l2", "blue"]);
        let hosts = tables["hosts"].as_array().expect("is a list");
        hosts.len() == 2 && hosts.iter().all(|host| host["agrees"] == true)
    });
    drop((probe, other));
    fleet.godwit(&["port", "delete", &text(&port["id"]), &text(&of_other["id"])]);
    fleet.check_nothing_left();
}

/// The forwarding entries that the kernel tells of while `change` is made and followed on a host: those that were made
/// or changed, and those that went.
fn entries_changed(host: &Host, device: &str, change: impl FnOnce()) -> Vec<(bool, String)> {
    let log = "/run/fdb-monitor";
    let script = format!("exec bridge monitor fdb >{log}");
    let monitor = host.spawn(&["sh", "-c", &script]).expect("bridge runs");
    host.wait("the monitor", || Ok(host.output(&["test", "-e", log])?.status.success())).expect("it runs");
    change();
    monitor.signal(KILL).expect("it is ended");
    drop(monitor);
    let told = host.exec(&["cat", log]).expect("it has written");
    host.exec(&["rm", log]).expect("it goes");
    let of_device = told.lines().filter(|line| line.contains(device) && line.contains(" dst "));
    of_device
        .map(|line| {
            let gone = line.strip_prefix("Deleted ");
            let mac = gone.unwrap_or(line).split(' ').next().unwrap_or_default();
            (gone.is_none(), mac.to_owned())
        })
        .collect()
}

#[test]
fn a_host_that_was_away_or_cut_off_gets_what_it_missed_and_nothing_else() {
    let fleet = Fleet::start(2);
    let (here, there) = (fleet.host(1), fleet.host(2));
    let (one, port) = fleet.probe_with(here, &[]);
    let (two, _other) = fleet.probe_with(there, &[]);
    let external = |name: &str| {
        fleet.godwit(&["port", "create", "blue", "--name", name, "--host", "h1"])["mac_address"].clone()
    };
    let (stays, goes) = (text(&external("stays")), text(&external("goes")));
    let vni = fleet.godwit(&["network", "show", "blue"])["provider:segmentation_id"].to_string();
    let device = format!("gwv{vni}");
    let knows = |mac: &str| forwarding(there).iter().any(|entry| entry.starts_with(mac));
    wait_for("the entries", || knows(&stays) && knows(&goes));
    let reaches = || answers(&two, &address_of(&port));
    wait_for("the network", reaches);

    // Entries change while the agent is away: the next one makes what is missing and takes what is stale, no more.
    there.kill_agent(KILL).expect("it is killed");
    fleet.godwit(&["port", "delete", "goes"]);
    let comes = text(&external("comes"));
    let mut changed = entries_changed(there, &device, || {
        there.start_agent().expect("it starts");
        fleet.wait_for_hosts();
        wait_for("what it missed", || knows(&comes) && !knows(&goes));
    });
    changed.sort();
    assert_eq!(changed, [(false, goes.clone()), (true, comes.clone())]);

    // The same with a cable that is out for half a minute. Guests of one host go on.
    let (third, of_third) = fleet.probe_with(there, &[]);
    wait_for("the neighbour", || answers(&two, &address_of(&of_third)));
    fleet.lab.cut_link(there).expect("it is pulled out");
    let cut = Instant::now();
    fleet.godwit(&["port", "delete", "comes"]);
    let mut later = String::new();
    let changed = entries_changed(there, &device, || {
        later = text(&external("later"));
        while cut.elapsed() < Duration::from_secs(30) {
            assert!(answers(&two, &address_of(&of_third)), "one host's guests need no cable");
            std::thread::sleep(Duration::from_millis(500));
        }
        assert!(!knows(&later) && knows(&comes), "nobody can have told it");
        fleet.lab.heal_link(there).expect("it is plugged in");
        wait_for("what it missed", || knows(&later) && !knows(&comes));
    });
    assert_eq!(changed.len(), 2, "{changed:?}");
    wait_for("the network", reaches);
    let agrees = || {
        let tables = fleet.godwit(&["network", "l2", "blue"]);
        tables["hosts"].as_array().expect("is a list").iter().all(|host| host["agrees"] == true)
    };
    wait_for("both sides' agreeing", agrees);
    drop((one, two, third));
    let ports = fleet.godwit(&["port", "list"]);
    let ids: Vec<String> =
        ports.as_array().expect("is a list").iter().map(|port| text(&port["id"])).collect();
    fleet.godwit(&[&["port", "delete"][..], &ids.iter().map(String::as_str).collect::<Vec<_>>()].concat());
    fleet.check_nothing_left();
}
