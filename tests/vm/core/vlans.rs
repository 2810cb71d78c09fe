//! VLAN networks, with a kernel that has VLANs: the agent's own code in a VM, and frames as they are on its wire.

use std::collections::BTreeMap;
use std::time::Duration;

use godwit_tests::vm::{Vm, VmError, Wire};
use serde_json::{Value, json};

const TAG: u16 = 42;
const GUEST: [u8; 6] = [0xfa, 0x16, 0x3e, 0, 0, 1];
const STATION: [u8; 6] = [0x52, 0x54, 0, 0, 0, 9];

/// The port's id, and the link that stands for its tap.
const PORT: &str = "01000000-0000-0000-0000-000000000000";
const TAP: &str = "gwt01000000000";

/// The network's number; those of networks that are no VXLAN begin here.
const NUMBER: u32 = 1 << 24;

/// What the coordinator would say of the network (`NetworkWanted` in protocol/).
fn order(carrier: Value) -> String {
    let port = json!({ "port": PORT, "mac": "fa:16:3e:00:00:01", "addresses": [] });
    let order = json!({
        "network": "00000000-0000-0000-0000-000000000007",
        "vni": NUMBER,
        "carrier": carrier,
        "mtu": 1500,
        "udp_port": 4789,
        "generation": 1,
        "ports": [port],
        "forwarding": [],
        "flood": [],
    });
    order.to_string()
}

/// Has the agent's code carry out an order over eth0, which is the underlay too.
fn ensure(vm: &Vm, carrier: Value) -> Result<String, VmError> {
    let words = ["network-order", "eth0", "10.9.0.1", "outside=eth0"];
    vm.spawn_with(&words, &BTreeMap::new(), &order(carrier))?.finish(Duration::from_secs(60))
}

/// An ARP request for an address, with a tag or without.
fn question(tag: Option<u16>, address: [u8; 4]) -> Vec<u8> {
    let mut frame = [[0xff; 6], STATION].concat();
    if let Some(tag) = tag {
        frame.extend([0x81, 0x00]);
        frame.extend(tag.to_be_bytes());
    }
    // ARP over Ethernet for IPv4, request (RFC 826); asked by 10.42.0.9.
    frame.extend([0x08, 0x06, 0, 1, 8, 0, 6, 4, 0, 1]);
    frame.extend(STATION);
    frame.extend([address[0], address[1], address[2], 9, 0, 0, 0, 0, 0, 0]);
    frame.extend(address);
    frame.resize(64, 0);
    frame
}

/// Who answers an ARP request, and with which tag.
fn answer(frame: &[u8]) -> Option<([u8; 6], Option<u16>)> {
    let source = frame.get(6..12)?.try_into().ok()?;
    let (tag, rest) = match frame.get(12..16)? {
        [0x81, 0x00, high, low] => (Some(u16::from_be_bytes([*high, *low]) & 0xfff), frame.get(16..)?),
        _ => (None, frame.get(12..)?),
    };
    (rest.starts_with(&[0x08, 0x06]) && rest.get(8..10)? == [0, 2]).then_some((source, tag))
}

#[test]
fn a_guest_on_a_vlan_speaks_with_its_tag_and_the_hosts_own_packets_have_none() {
    let wire = Wire::new().expect("a wire");
    let vm =
        Vm::builder("vlans").wire(&wire, "10.9.0.1/24").program("network-order").start().expect("starts");
    let guest = format!(
        "ip netns add guest
         ip link add {TAP} type veth peer name eth0 netns guest
         ip link set {TAP} up
         ip -n guest link set eth0 address fa:16:3e:00:00:01 up
         ip -n guest address add 10.42.0.5/24 dev eth0"
    );
    vm.shell(&format!("modprobe -a 8021q bridge veth\n{guest}")).expect("runs");
    let addresses = "ip -o -4 address show dev eth0";
    let before = vm.shell(addresses).expect("runs");

    let text = ensure(&vm, json!({ "flat": "outside" })).expect_err("it is the underlay").to_string();
    assert!(text.contains("underlay"), "{text}");
    let vlan = || json!({ "vlan": ["outside", TAG] });
    assert!(ensure(&vm, vlan()).expect("is made").contains("ports: 1"));
    assert_eq!(ensure(&vm, vlan()).expect("is there").trim(), "as wanted");
    assert_eq!(vm.shell(addresses).expect("runs"), before);

    let mut station = wire.station().expect("is plugged in");
    // Only the first and the last of the guest's are for it: it answers in the order that it is asked.
    for (tag, address) in [
        (Some(TAG), [10, 42, 0, 5]),
        (Some(TAG + 1), [10, 42, 0, 5]),
        (None, [10, 42, 0, 5]),
        (None, [10, 9, 0, 1]),
        (Some(TAG), [10, 42, 0, 5]),
    ] {
        station.send(&question(tag, address)).expect("is sent");
    }
    let (mut of_guest, mut of_host) = (Vec::new(), Vec::new());
    while of_guest.len() < 2 || of_host.is_empty() {
        let frame = station.receive(Duration::from_secs(20)).expect("an answer comes");
        match answer(&frame) {
            Some((GUEST, tag)) => of_guest.push(tag),
            Some((_, tag)) => of_host.push(tag),
            None => {}
        }
    }
    assert_eq!(of_guest, [Some(TAG); 2], "the guest is on its VLAN only");
    assert_eq!(of_host, [None], "the host answers for itself, without a tag");

    let removed = vm.exec(&["network-order", "remove", "eth0", "10.9.0.1", &NUMBER.to_string()]);
    assert_eq!(removed.expect("runs").trim(), "removed");
    assert_eq!(vm.shell("ip -o link show type vlan; ip -o link show type bridge").expect("runs"), "");
    assert_eq!(vm.shell(addresses).expect("runs"), before);
}
