//! What is reserved is what runs, and what is not is told.

use std::time::Duration;

use crate::fleet::Fleet;
use godwit_tests::lab::until;
use serde_json::Value;

/// What `godwit host drift` lists: kind, wanted, found.
fn drifts(fleet: &Fleet) -> Vec<(String, String, String)> {
    let listed = fleet.godwit(&["host", "drift"]);
    let text = |drift: &Value, name: &str| drift[name].as_str().unwrap_or_default().to_owned();
    let all = listed.as_array().expect("is a list").iter();
    all.map(|drift| (text(drift, "kind"), text(drift, "wanted"), text(drift, "found"))).collect()
}

/// The lines of the first host's metrics that begin so.
fn metrics(fleet: &Fleet, beginning: &str) -> Vec<String> {
    let url = "http://127.0.0.1:9177/metrics";
    let text = fleet.host(1).exec(&["curl", "-sSf", url]).expect("metrics are served");
    text.lines().filter(|line| line.starts_with(beginning)).map(str::to_owned).collect()
}

#[test]
fn a_guest_with_cells_runs_where_it_was_reserved_and_a_changed_pin_is_told_until_it_is_put_back() {
    let fleet = Fleet::start(1);
    let host = fleet.host(1);
    let memory = format!("{}M", crate::fleet::MEMORY_MIB);
    let flavor = ["flavor", "create", "cells", "--vcpus", "2", "--memory", &memory, "--disk", "0"];
    let specs = [
        "--property",
        "hw:cpu_policy=dedicated",
        "--property",
        "hw:numa_nodes=2",
        "--property",
        "hw:emulator_threads_policy=share",
        "--property",
        "hw:cpu_sockets=2",
    ];
    fleet.godwit(&[&flavor[..], &specs].concat());
    let words = ["server", "create", "one", "--flavor", "cells", "--image", "blank", "--network", "blue"];
    fleet.godwit(&words);
    let server = fleet.wait_for_status("one", "ACTIVE");
    let guest = server["OS-EXT-SRV-ATTR:instance_name"].as_str().expect("it has a domain");
    let xml = host.exec(&["virsh", "dumpxml", guest]).expect("libvirt answers");
    for part in [
        "<sibling id='1' value='21'/>",
        "<topology sockets='2' dies='1' clusters='1' cores='1' threads='1'/>",
        "<emulatorpin cpuset='0-1'/>",
    ] {
        assert!(xml.contains(part), "{part} is missing from\n{xml}");
    }
    assert_eq!(drifts(&fleet), []);

    // Each cell of the guest has one vCPU, and each host cell of this lab half of the CPUs.
    let pins = host.exec(&["virsh", "-q", "vcpupin", guest]).expect("libvirt answers");
    let pins: Vec<&str> = pins.lines().filter_map(|line| line.split_whitespace().last()).collect();
    let (own, other) = (pins[0], pins[1]);
    assert_ne!(own, other, "two vCPUs are on one CPU");
    let lines = metrics(&fleet, "godwit_instance_vcpus{");
    assert_eq!(lines.len(), 2, "one vCPU ran in each cell: {lines:?}");
    assert!(lines.iter().all(|line| line.ends_with(" 1")), "{lines:?}");
    assert!(!metrics(&fleet, "godwit_instance_memory_bytes{").is_empty());
    assert_eq!(metrics(&fleet, "godwit_placement_drifts{kind=\"vcpu_thread\"}").len(), 1);

    host.exec(&["virsh", "vcpupin", guest, "0", other, "--live"]).expect("the pin is changed");
    let wanted = ["vcpu_pin", "vcpu_thread"]
        .map(|kind| (kind.to_owned(), format!("CPUs {own}"), format!("CPUs {other}")));
    let told = || Ok(drifts(&fleet) == wanted);
    until("h1", "the drift", Duration::from_secs(60), told)
        .unwrap_or_else(|error| panic!("{error}: {:?}", drifts(&fleet)));
    let problems = fleet.godwit(&["status"])["problems"].to_string();
    assert!(problems.contains("not where they were reserved"), "{problems}");
    let counted = "godwit_placement_drifts{kind=\"vcpu_pin\"} 1";
    assert_eq!(metrics(&fleet, "godwit_placement_drifts{kind=\"vcpu_pin\"}"), [counted]);

    // Off and on again, it is where it was reserved.
    host.exec(&["virsh", "destroy", guest]).expect("it is switched off");
    fleet.wait_for_status("one", "SHUTOFF");
    fleet.godwit(&["server", "start", "one", "--wait"]);
    fleet.wait_for_status("one", "ACTIVE");
    let again = host.exec(&["virsh", "-q", "vcpupin", guest]).expect("libvirt answers");
    let again: Vec<&str> = again.lines().filter_map(|line| line.split_whitespace().last()).collect();
    assert_eq!(again, pins);
    until("h1", "the end of the drift", Duration::from_secs(60), || Ok(drifts(&fleet).is_empty()))
        .unwrap_or_else(|error| panic!("{error}: {:?}", drifts(&fleet)));
    fleet.clean();
}
