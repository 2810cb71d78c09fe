//! What a guest notices of the faults around it: nothing, or as little as can be.

use std::collections::BTreeSet;
use std::time::Duration;

use crate::fleet::{Fleet, KILL, address, forwarding, guests, kept_reservations, vxlan_packets};
use godwit_tests::lab::{Host, Pings, until};
use serde_json::Value;

/// The kernel's numbers of the pinned maps: a map that was made anew has another.
fn pinned_maps(host: &Host) -> BTreeSet<String> {
    let script = "for pin in $(find /sys/fs/bpf/godwit -type f); do \
                  bpftool map show pinned $pin 2>/dev/null | head -n 1 | sed \"s|^|$pin |\"; done";
    let listed = host.exec(&["sh", "-c", script]).expect("runs");
    let maps: BTreeSet<String> = listed.lines().map(str::to_owned).collect();
    assert!(!maps.is_empty(), "nothing is pinned");
    maps
}

#[test]
fn a_guest_does_not_notice_that_its_agent_is_killed_and_started_again() {
    let fleet = Fleet::start(2);
    fleet.upload_linux();
    let (here, there) = (fleet.host(1), fleet.host(2));
    let words = ["server", "create", "one", "--flavor", "small", "--image", "linux", "--network", "blue"];
    fleet.godwit(&[&words[..], &["--host", "h1"]].concat());
    let server = fleet.wait_for_status("one", "ACTIVE");
    let address = address(&server);
    let probe = fleet.probe(there);
    until("h2", "the guest's answer", Duration::from_secs(90), || {
        Ok(probe.output(&["ping", "-c", "1", "-W", "1", &address])?.status.success())
    })
    .expect("it boots");

    let before = (guests(here), pinned_maps(here), forwarding(here));
    let pings = Pings::start(&probe, &address, Duration::from_millis(5)).expect("they start");
    let mut counted = vxlan_packets(here);
    for _ in 0..3 {
        here.kill_agent(KILL).expect("it is killed");
        here.start_agent().expect("it starts");
        let answers =
            || Ok(here.output(&["curl", "-sSf", "http://127.0.0.1:9177/metrics"])?.status.success());
        here.wait("the agent's metrics", answers).expect("they are there");
        fleet.wait_for_hosts();
        let now = vxlan_packets(here);
        for (labels, count) in &counted {
            let later = now.iter().find(|(other, _)| other == labels).map(|(_, count)| *count);
            assert!(later.is_some_and(|later| later >= *count), "{labels}: {count}, then {later:?}");
        }
        let sum = |all: &[(String, u64)]| all.iter().map(|(_, count)| count).sum::<u64>();
        assert!(sum(&now) > sum(&counted), "nothing was counted while the agent was away: {now:?}");
        counted = now;
        assert_eq!((guests(here), pinned_maps(here), forwarding(here)), before);
    }
    let heard = pings.finish().expect("they end");
    assert!(heard.sent > 0 && heard.lost == 0, "{heard:?}");
    assert_eq!(fleet.server("one").expect("is there")["status"], "ACTIVE");
    fleet.end_probe(probe, there);
    fleet.clean();
}

#[test]
fn a_host_that_lost_its_power_shows_its_server_off_and_starts_it_again_with_its_network() {
    let fleet = Fleet::start(2);
    let server = fleet.create("one", &["--host", "h1"]);
    let (host, other) = (fleet.host(1), fleet.host(2));
    let probe = fleet.probe(other);
    let mac = server["addresses"]["blue"][0]["OS-EXT-IPS-MAC:mac_addr"].as_str().expect("has one").to_owned();
    let entry = |of: &Host, dst: &Host| {
        forwarding(of).iter().any(|line| line.starts_with(&mac) && line.contains(dst.address()))
    };
    other.wait("the forwarding entry", || Ok(entry(other, host))).expect("it is set");

    host.power_off().expect("goes off");
    fleet.lab.power_on(host).expect("comes back");
    host.start_agent().expect("the agent starts");
    fleet.wait_for_status("one", "SHUTOFF");
    assert_eq!(guests(host), []);
    fleet.godwit(&["server", "start", "one", "--wait"]);
    let server = fleet.wait_for_status("one", "ACTIVE");
    fleet.check_guest_on(&server, host);
    host.wait("the floods' entry", || Ok(forwarding(host).iter().any(|line| line.contains(other.address()))))
        .expect("the network is built anew");
    assert!(entry(other, host));
    fleet.end_probe(probe, other);
    fleet.clean();
}

/// What the kernel lets each vCPU's thread of a guest run on.
pub(crate) fn vcpu_threads(host: &Host, guest: &str) -> Vec<String> {
    let (process, _) = guests(host).into_iter().find(|(_, name)| name == guest).expect("the guest runs");
    let script = format!(
        "cd /proc/{process}/task && for thread in *; do grep -q '^CPU [0-9]' $thread/comm && \
         sed -n 's/^Cpus_allowed_list:[[:space:]]*//p' $thread/status; done; true"
    );
    host.exec(&["sh", "-c", &script]).expect("runs").lines().map(str::to_owned).collect()
}

/// The CPUs that a host has reserved for an instance's vCPUs.
pub(crate) fn reserved(host: &Host, id: &Value) -> Vec<String> {
    let kept = kept_reservations(host);
    let mut all = kept.as_array().into_iter().flatten();
    let mine = all.find(|reservation| reservation["instance"] == *id);
    let mine = mine.unwrap_or_else(|| panic!("{} holds nothing for it: {kept:#}", host.name()));
    let cells = mine["cells"].as_array().expect("is a list").iter();
    let pins = cells.flat_map(|cell| cell["pinning"].as_object().expect("is a map").values());
    pins.map(Value::to_string).collect()
}

#[test]
fn a_pinned_vcpu_runs_on_its_reserved_cpu_before_and_after_a_migration() {
    let fleet = Fleet::start(2);
    let memory = format!("{}M", crate::fleet::MEMORY_MIB);
    let flavor = ["flavor", "create", "pinned", "--vcpus", "1", "--memory", &memory, "--disk", "0"];
    let specs = ["--property", "hw:cpu_policy=dedicated", "--property", "hw:numa_nodes=1"];
    fleet.godwit(&[&flavor[..], &specs].concat());
    let create = |name: &str, host: &str| {
        let words = ["server", "create", name, "--flavor", "pinned", "--image", "blank", "--network", "blue"];
        fleet.godwit(&[&words[..], &["--host", host]].concat());
        fleet.wait_for_status(name, "ACTIVE")
    };
    let (one, two) = (create("one", "h1"), create("two", "h2"));
    let check = |server: &Value, host: &Host| {
        let wanted = reserved(host, &server["id"]);
        assert_eq!(wanted.len(), 1);
        let guest = server["OS-EXT-SRV-ATTR:instance_name"].as_str().expect("it has a domain");
        assert_eq!(vcpu_threads(host, guest), wanted, "{}", host.name());
        let pins = host.exec(&["virsh", "-q", "vcpupin", guest]).expect("libvirt answers");
        let pins: Vec<&str> = pins.lines().filter_map(|line| line.split_whitespace().last()).collect();
        assert_eq!(pins, wanted, "{}", host.name());
        wanted
    };
    let (first, second) = (check(&one, fleet.host(1)), check(&two, fleet.host(2)));
    assert_eq!(first, second, "both have their host's first CPU, so one of them must take another now");
    fleet.godwit(&["server", "migrate", "one", "--host", "h2", "--wait"]);
    assert_ne!(check(&one, fleet.host(2)), check(&two, fleet.host(2)));
    fleet.clean();
}
