//! Networks over an underlay of IPv6.

use std::time::Duration;

use crate::fleet::{Fleet, KILL, forwarding, vxlan_packets};
use godwit_tests::lab::until;
use serde_json::Value;

#[test]
fn guests_meet_over_an_ipv6_underlay_by_what_the_coordinator_tells_and_again_when_its_link_is_back() {
    let fleet = Fleet::start(2);
    let vtep = |number: usize| format!("fd18::1{number}");
    for number in [1, 2] {
        let host = fleet.host(number);
        let address = format!("{}/64", vtep(number));
        host.exec(&["ip", "address", "add", &address, "dev", "eth0", "nodad"]).expect("it has two now");
        let file = host.file("lib/godwit/agent.toml");
        let before = std::fs::read_to_string(&file).expect("is there");
        let settings = format!("underlay_address = \"{}\"\n{before}", vtep(number));
        std::fs::write(&file, settings).expect("is writable");
        host.kill_agent(KILL).expect("it is killed");
        host.start_agent().expect("it starts");
    }
    fleet.wait_for_hosts();
    // Twenty bytes more of header, twenty less for guests.
    let mtu = |fleet: &Fleet| fleet.godwit(&["network", "show", "blue"])["mtu"].as_u64();
    assert_eq!(mtu(&fleet), Some(1450));
    until("c0", "an MTU for IPv6 underneath", Duration::from_secs(20), || {
        fleet.godwit(&["network", "delete", "blue"]);
        fleet.godwit(&["network", "create", "blue", "--subnet", "10.77.0.0/24"]);
        Ok(mtu(&fleet) == Some(1430))
    })
    .expect("hosts have told of their underlay");

    let (one, port) = fleet.probe_with(fleet.host(1), &[]);
    let (two, other) = fleet.probe_with(fleet.host(2), &[]);
    let text = |value: &Value| value.as_str().expect("is text").to_owned();
    let address = text(&other["fixed_ips"][0]["ip_address"]);
    let largest = ["ping", "-c", "1", "-W", "1", "-M", "do", "-s", "1402", &address];
    until("the lab", "the other guest", Duration::from_secs(20), || {
        Ok(one.output(&largest)?.status.success())
    })
    .expect("it is reached");
    let entry = format!("{} dev gwv", text(&other["mac_address"]));
    let entries = forwarding(fleet.host(1));
    let leads_there = |line: &String| line.starts_with(&entry) && line.contains(&format!("dst {}", vtep(2)));
    assert!(entries.iter().any(leads_there), "{entries:#?}");
    let counted = vxlan_packets(fleet.host(1));
    let of = |direction: &str, class: &str| -> u64 {
        let wanted = [format!("peer=\"{}\"", vtep(2)), format!("\"{direction}\""), format!("\"{class}\"")];
        let ours = counted.iter().filter(|(labels, _)| wanted.iter().all(|label| labels.contains(label)));
        ours.map(|(_, count)| count).sum()
    };
    assert!(of("tx", "unicast") > 0 && of("rx", "unicast") > 0, "{counted:?}");
    assert_eq!(of("tx", "broadcast"), 0, "the neighbour is known: {counted:?}");

    // The link goes and comes back: what was made on it is still there, and is counted on.
    let there = fleet.host(2);
    let keep = "echo 1 > /proc/sys/net/ipv6/conf/eth0/keep_addr_on_down";
    there.exec(&["sh", "-c", &format!("{keep} && ip link set eth0 down")]).expect("it goes");
    assert!(!one.output(&largest).expect("it runs").status.success());
    there.exec(&["ip", "link", "set", "eth0", "up"]).expect("it comes back");
    until("the lab", "the other guest behind its link", Duration::from_secs(30), || {
        Ok(one.output(&largest)?.status.success())
    })
    .expect("it is reached again");
    let received = |counted: &[(String, u64)]| -> u64 {
        let ours = counted.iter().filter(|(labels, _)| {
            labels.contains("\"rx\"") && labels.contains("\"unicast\"") && labels.contains(&vtep(1))
        });
        ours.map(|(_, count)| count).sum()
    };
    let before = received(&vxlan_packets(there));
    one.exec(&largest).expect("it is reached");
    assert!(received(&vxlan_packets(there)) > before);
    drop((one, two));
    fleet.godwit(&["port", "delete", &text(&port["id"]), &text(&other["id"])]);
    fleet.check_nothing_left();
}
