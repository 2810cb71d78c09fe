//! Real bridges and VXLAN devices in namespaces, looked at with iproute2.

mod moves;
mod multicast;
mod provided;
mod taps;

use super::socket::Conversation;
use super::{Netlink, UnderlayChoice, host};
use crate::network::fake::FakeNetwork;
use crate::network::sandbox::{add_host, in_namespace, in_sandbox, run, try_run};
use crate::network::{Changes, HostNetwork, NetworkError};
use godwit_protocol::error::ErrorKind;
use godwit_protocol::id::{NetworkId, PortId};
use godwit_protocol::network::{Carrier, Forwarding, LocalPort, NetworkWanted, Unknown};
use godwit_protocol::port::{Mac, tap_name};
use std::collections::BTreeSet;
use std::net::IpAddr;
use uuid::Uuid;

const VNI: u32 = 1007;

fn mac(last: u8) -> Mac {
    Mac([0xfa, 0x16, 0x3e, 0, 0, last])
}

fn vtep(last: u8) -> IpAddr {
    IpAddr::from([198, 18, 0, last])
}

fn wanted(forwarding: &[(u8, u8)], flood: &[u8]) -> NetworkWanted {
    let entry =
        |(address, host): &(u8, u8)| Forwarding { mac: mac(*address), addresses: vec![], vtep: vtep(*host) };
    NetworkWanted {
        groups: vec![],
        network: NetworkId(Uuid::from_u128(7)),
        vni: VNI,
        carrier: Carrier::Vxlan,
        mtu: 1500,
        udp_port: 4789,
        generation: 1,
        ports: vec![],
        forwarding: forwarding.iter().map(entry).collect(),
        flood: flood.iter().copied().map(vtep).collect(),
        floating: vec![],
        routers: vec![],
        unknown_unicast: Unknown::Drop,
        unknown_neighbours: Unknown::Flood,
    }
}

/// The same with a group of the underlay.
fn in_group(wanted: NetworkWanted, group: &str, ttl: u8) -> NetworkWanted {
    let group: IpAddr = group.parse().unwrap();
    NetworkWanted { carrier: Carrier::VxlanGroup { group, ttl }, flood: vec![group], ..wanted }
}

fn local_port(last: u8) -> LocalPort {
    LocalPort {
        rules: None,
        leases: vec![],
        port: PortId(Uuid::from_u128(u128::from(last) << 120)),
        mac: mac(last),
        addresses: vec![],
        port_security: true,
        allowed_pairs: vec![],
    }
}

fn open(last: u8) -> Netlink {
    let choice =
        UnderlayChoice { link: Some("eth0".into()), address: Some(vtep(last)), ..UnderlayChoice::default() };
    Netlink::open(&choice).unwrap()
}

/// Runs `body` on the host h1 of the sandbox, whose address is 198.18.0.11.
fn on_a_host<R: Send>(body: impl FnOnce(Netlink) -> R + Send) -> R {
    in_sandbox(|| {
        add_host("h1", "198.18.0.11");
        in_namespace("h1", || body(open(11)))
    })
}

/// The lines of `bridge fdb` for the VXLAN device that are not about its own address.
fn entries() -> BTreeSet<String> {
    let lines = run("bridge fdb show dev gwv1007");
    lines.lines().filter(|line| !line.contains("permanent")).map(|line| line.trim().to_owned()).collect()
}

fn links() -> BTreeSet<String> {
    let json: serde_json::Value = serde_json::from_str(&run("ip -j link show")).unwrap();
    let links = json.as_array().unwrap().iter();
    links.map(|link| link["ifname"].as_str().unwrap().to_owned()).collect()
}

fn link(name: &str) -> serde_json::Value {
    let json: serde_json::Value =
        serde_json::from_str(&run(&format!("ip -j -d link show dev {name}"))).unwrap();
    json[0].clone()
}

#[test]
fn a_network_is_a_bridge_with_a_vxlan_device_that_learns_nothing() {
    on_a_host(|host| {
        let changes = host.ensure(&wanted(&[(1, 12)], &[12, 13])).unwrap();
        assert_eq!((changes.forwarding, changes.flood, changes.ports), (1, 2, 0));
        let vxlan = link("gwv1007");
        let data = &vxlan["linkinfo"]["info_data"];
        assert_eq!(data["id"], 1007);
        assert_eq!(data["local"], "198.18.0.11");
        assert_eq!(data["port"], 4789);
        assert_eq!(data["link"], "eth0");
        assert_eq!(data["learning"], false);
        assert_eq!(vxlan["mtu"], 1500);
        assert_eq!(vxlan["master"], "gwb1007");
        assert_eq!(vxlan["linkinfo"]["info_slave_data"]["learning"], false);
        let bridge = link("gwb1007");
        assert_eq!(bridge["mtu"], 1500);
        assert_eq!(bridge["linkinfo"]["info_data"]["stp_state"], 0);
        assert_eq!(bridge["linkinfo"]["info_data"]["mcast_snooping"], 0);
        for link in [&vxlan, &bridge] {
            let flags = link["flags"].as_array().unwrap();
            assert!(flags.contains(&"UP".into()), "{link}");
        }
        for name in ["gwv1007", "gwb1007"] {
            let address = run(&format!("ip -6 address show dev {name}"));
            assert_eq!(address, "", "the host must not be on the network");
        }
        let expected = [
            "00:00:00:00:00:00 dst 198.18.0.12 self static",
            "00:00:00:00:00:00 dst 198.18.0.13 self static",
            "fa:16:3e:00:00:01 dst 198.18.0.12 self static",
            "fa:16:3e:00:00:01 master gwb1007 static",
        ];
        assert_eq!(entries(), expected.map(str::to_owned).into());
    });
}

#[test]
fn a_second_time_changes_nothing() {
    on_a_host(|host| {
        let wanted = wanted(&[(1, 12), (2, 13)], &[12, 13]);
        assert!(!host.ensure(&wanted).unwrap().is_empty());
        assert_eq!(host.ensure(&wanted).unwrap(), Changes::default());
        assert_eq!(open(11).ensure(&wanted).unwrap(), Changes::default(), "by an agent started anew");
    });
}

#[test]
fn what_is_reported_is_what_was_wanted() {
    on_a_host(|host| {
        assert_eq!(host.observe().unwrap(), []);
        host.ensure(&wanted(&[(2, 13), (1, 12)], &[13, 12])).unwrap();
        let reported = host.observe().unwrap();
        assert_eq!(reported.len(), 1);
        assert_eq!(reported[0].vni, VNI);
        assert_eq!(reported[0].forwarding, [(mac(1), vtep(12)), (mac(2), vtep(13))]);
        assert_eq!(reported[0].flood, [vtep(12), vtep(13)]);
    });
}

#[test]
fn entries_move_and_stale_ones_go() {
    on_a_host(|host| {
        host.ensure(&wanted(&[(1, 12), (2, 12), (3, 13)], &[12, 13])).unwrap();
        let changes = host.ensure(&wanted(&[(1, 14), (3, 13)], &[13, 14])).unwrap();
        assert_eq!(changes, Changes { links: 0, forwarding: 2, flood: 2, ports: 0 });
        let reported = host.observe().unwrap().remove(0);
        assert_eq!(reported.forwarding, [(mac(1), vtep(14)), (mac(3), vtep(13))]);
        assert_eq!(reported.flood, [vtep(13), vtep(14)]);
        assert_eq!(entries().iter().filter(|line| line.contains("master")).count(), 2);
    });
}

#[test]
fn an_entry_that_somebody_else_changed_is_put_right() {
    on_a_host(|host| {
        let wanted = wanted(&[(1, 12)], &[12]);
        host.ensure(&wanted).unwrap();
        let before = entries();
        run("bridge fdb replace fa:16:3e:00:00:01 dev gwv1007 dst 198.18.0.99 self static");
        run("bridge fdb append 00:00:00:00:00:00 dev gwv1007 dst 198.18.0.99 self static");
        run("bridge fdb del fa:16:3e:00:00:01 dev gwv1007 master");
        assert!(!host.ensure(&wanted).unwrap().is_empty());
        assert_eq!(entries(), before);
        assert_eq!(host.ensure(&wanted).unwrap(), Changes::default());
    });
}

#[test]
fn a_vxlan_device_with_a_wrong_setting_is_replaced_and_the_ports_stay_on_the_bridge() {
    let stale = [
        "type vxlan id 99 dev eth0 local 198.18.0.11 dstport 4789 nolearning",
        "type vxlan id 1007 dev eth0 local 198.18.0.77 dstport 4789 nolearning",
        "type vxlan id 1007 dev eth0 local 198.18.0.11 dstport 8472 nolearning",
        "type vxlan id 1007 local 198.18.0.11 dstport 4789 nolearning",
        "type vxlan id 1007 dev eth0 local 198.18.0.11 dstport 4789",
        "type veth peer name other",
    ];
    on_a_host(|host| {
        let wanted = wanted(&[(1, 12)], &[12]);
        host.ensure(&wanted).unwrap();
        run("ip link add guest type veth peer name tap");
        run("ip link set tap master gwb1007");
        for settings in stale {
            run("ip link del gwv1007");
            run(&format!("ip link add gwv1007 {settings}"));
            let changes = host.ensure(&wanted).unwrap();
            assert_eq!((changes.forwarding, changes.flood), (1, 1), "{settings}");
            assert!(host.ensure(&wanted).unwrap().is_empty(), "{settings}");
            assert_eq!(link("tap")["master"], "gwb1007", "{settings}");
        }
    });
}

#[test]
fn other_settings_are_put_right_in_place() {
    on_a_host(|host| {
        host.ensure(&wanted(&[], &[])).unwrap();
        let index = link("gwv1007")["ifindex"].clone();
        let spoil = [
            "ip link set gwb1007 type bridge stp_state 1",
            "ip link set gwb1007 type bridge mcast_snooping 1",
            "ip link set gwb1007 mtu 1400",
            "ip link set gwb1007 down",
            "ip link set gwv1007 mtu 1400",
            "ip link set gwv1007 down",
            "ip link set gwv1007 nomaster",
            "ip link set gwv1007 type bridge_slave learning on",
        ];
        for command in spoil {
            run(command);
            assert!(!host.ensure(&wanted(&[], &[])).unwrap().is_empty(), "{command}");
            assert!(host.ensure(&wanted(&[], &[])).unwrap().is_empty(), "{command}");
        }
        assert_eq!(link("gwv1007")["ifindex"], index, "it is still the same device");
    });
}

#[test]
fn a_local_port_is_put_on_the_bridge_as_soon_as_it_is_there() {
    on_a_host(|host| {
        let port = local_port(1);
        let wanted = NetworkWanted { ports: vec![port.clone()], ..wanted(&[], &[12]) };
        assert_eq!(host.ensure(&wanted).unwrap().ports, 0);
        let tap = tap_name(port.port);
        run(&format!("ip link add {tap} type veth peer name guest"));
        assert_eq!(host.ensure(&wanted).unwrap(), Changes { ports: 1, ..Changes::default() });
        assert_eq!(link(&tap)["master"], "gwb1007");
    });
}

#[test]
fn a_port_with_a_smaller_mtu_does_not_pull_the_bridge_down_to_it() {
    on_a_host(|host| {
        for mtu in [1500, 1501] {
            let wanted = NetworkWanted { mtu, ..wanted(&[], &[]) };
            host.ensure(&wanted).unwrap();
            run("ip link add tap mtu 1400 type veth peer name guest");
            run("ip link set tap master gwb1007");
            assert_eq!(link("gwb1007")["mtu"], mtu);
            assert_eq!(host.ensure(&wanted).unwrap(), Changes::default());
            run("ip link del tap");
        }
    });
}

#[test]
fn removing_leaves_nothing_and_may_be_repeated() {
    on_a_host(|host| {
        let before = links();
        assert!(!host.remove(VNI).unwrap());
        host.ensure(&wanted(&[(1, 12)], &[12])).unwrap();
        assert!(host.remove(VNI).unwrap());
        assert!(!host.remove(VNI).unwrap());
        assert_eq!(links(), before);
        assert_eq!(host.observe().unwrap(), []);
    });
}

#[test]
fn the_overlay_in_memory_changes_and_reports_what_the_kernel_does() {
    on_a_host(|host| {
        let fake = FakeNetwork::new(host.underlay().unwrap(), vec![]);
        let orders = [
            wanted(&[(1, 12), (2, 12), (3, 13)], &[12, 13]),
            wanted(&[(1, 12), (2, 12), (3, 13)], &[13, 12]),
            wanted(&[(1, 14), (3, 13), (4, 12)], &[13, 14]),
            NetworkWanted { mtu: 1400, ..wanted(&[(1, 14), (3, 13)], &[13]) },
            NetworkWanted { udp_port: 8472, mtu: 1400, ..wanted(&[(1, 14)], &[13, 15]) },
            NetworkWanted { vni: 2000, ..wanted(&[(1, 14)], &[]) },
            NetworkWanted { mtu: 9000, ..wanted(&[], &[]) },
            wanted(&[], &[]),
            in_group(wanted(&[(1, 14), (2, 12)], &[]), "239.0.3.239", 1),
            in_group(wanted(&[(1, 14), (2, 12)], &[]), "239.0.3.239", 9),
            in_group(wanted(&[(1, 14)], &[]), "239.0.3.240", 9),
            wanted(&[(1, 14)], &[13, 14]),
            NetworkWanted { vni: 3000, ..in_group(wanted(&[], &[]), "239.0.3.239", 1) },
            NetworkWanted { vni: 1 << 24, carrier: Carrier::Flat("outside".into()), ..wanted(&[], &[]) },
        ];
        for (step, order) in orders.iter().enumerate() {
            let (ours, theirs) = (fake.ensure(order), host.ensure(order));
            assert_eq!(ours.map_err(|error| error.to_string()), theirs.map_err(|error| error.to_string()));
            assert_eq!(fake.observe().unwrap(), host.observe().unwrap(), "after step {step}");
        }
        for vni in [VNI, VNI, 2000, 3000] {
            assert_eq!(fake.remove(vni).unwrap(), host.remove(vni).unwrap());
            assert_eq!(fake.observe().unwrap(), host.observe().unwrap());
        }
    });
}

#[test]
fn a_network_that_does_not_fit_the_underlay_is_refused_with_need_and_have() {
    on_a_host(|host| {
        let too_large = NetworkWanted { mtu: 1551, ..wanted(&[], &[]) };
        let error = host.ensure(&too_large).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Conflict);
        let text = error.to_string();
        for part in ["1601", "1600", "eth0", "1550 or less"] {
            assert!(text.contains(part), "{text}");
        }
        assert_eq!(host.observe().unwrap(), []);
        assert!(!host.ensure(&NetworkWanted { mtu: 1550, ..too_large }).unwrap().is_empty());
    });
}

#[test]
fn nonsense_is_refused_before_anything_is_made() {
    on_a_host(|host| {
        let twice = wanted(&[(1, 12), (1, 13)], &[]);
        let group = {
            let mut wanted = wanted(&[(1, 12)], &[]);
            wanted.forwarding[0].mac = Mac([1, 0, 0, 0, 0, 1]);
            wanted
        };
        let nonsense = [
            NetworkWanted { vni: 0, ..wanted(&[], &[]) },
            NetworkWanted { vni: 1 << 24, ..wanted(&[], &[]) },
            NetworkWanted { mtu: 60, ..wanted(&[], &[]) },
            NetworkWanted { udp_port: 0, ..wanted(&[], &[]) },
            NetworkWanted { flood: vec!["fd00::1".parse().unwrap()], ..wanted(&[], &[]) },
            wanted(&[(1, 11)], &[]),
            wanted(&[], &[11]),
            twice,
            in_group(wanted(&[], &[]), "10.0.0.1", 1),
            in_group(wanted(&[], &[]), "ff05::1", 1),
            in_group(wanted(&[], &[]), "239.0.0.1", 0),
            NetworkWanted { flood: vec![vtep(12)], ..in_group(wanted(&[], &[]), "239.0.0.1", 1) },
            NetworkWanted { carrier: Carrier::Flat("outside".into()), ..wanted(&[], &[]) },
            NetworkWanted {
                vni: 1 << 24,
                carrier: Carrier::Vlan("outside".into(), 4095),
                ..wanted(&[], &[])
            },
            group,
        ];
        let before = links();
        for wanted in nonsense {
            let error = host.ensure(&wanted).unwrap_err();
            assert!(matches!(error, NetworkError::Invalid { .. }), "{error}");
        }
        assert_eq!(links(), before);
    });
}

#[test]
fn a_missing_underlay_link_is_named() {
    on_a_host(|_| {
        let choice = UnderlayChoice {
            link: Some("eth7".into()),
            address: Some(vtep(11)),
            ..UnderlayChoice::default()
        };
        let error = Netlink::open(&choice).unwrap().ensure(&wanted(&[], &[])).unwrap_err();
        assert!(matches!(&error, NetworkError::NoUnderlay { link } if link == "eth7"), "{error}");
    });
}

#[test]
fn the_kernels_own_words_are_in_the_error() {
    on_a_host(|host| {
        run("ip link add squatter type vxlan id 1007 dev eth0 local 198.18.0.11 dstport 4789 nolearning");
        let error: godwit_protocol::error::RequestError = host.ensure(&wanted(&[], &[])).unwrap_err().into();
        assert!(error.message.contains("make link gwv1007"), "{error}");
        assert!(error.message.contains("VNI"), "{error}");
    });
}

#[test]
fn the_underlay_is_found_by_the_route_to_the_coordinator() {
    on_a_host(|_| {
        let find = |choice| Netlink::open(&choice)?.underlay();
        let towards = Some(IpAddr::from([198, 18, 0, 1]));
        let underlay = find(UnderlayChoice { towards, ..UnderlayChoice::default() }).unwrap();
        assert_eq!((underlay.link.as_str(), underlay.address, underlay.mtu), ("eth0", vtep(11), 1600));
        let error = find(UnderlayChoice::default()).unwrap_err();
        assert!(matches!(error, NetworkError::NoRoute { towards: None }), "{error}");
        run("ip route add default via 198.18.0.1");
        assert_eq!(find(UnderlayChoice::default()).unwrap(), underlay);
        let by_link = UnderlayChoice { link: Some("eth0".into()), ..UnderlayChoice::default() };
        assert_eq!(find(by_link).unwrap(), underlay);
    });
}

#[test]
fn a_host_with_several_addresses_says_which_is_its_vtep() {
    on_a_host(|_| {
        let find = |address| {
            let choice = UnderlayChoice { link: Some("eth0".into()), address, ..UnderlayChoice::default() };
            Netlink::open(&choice)?.underlay().map(|underlay| underlay.address)
        };
        run("ip address add fd18::11/64 dev eth0 nodad");
        assert_eq!(find(None).unwrap(), vtep(11), "IPv4 comes first");
        assert_eq!(find(Some("fd18::11".parse().unwrap())).unwrap().to_string(), "fd18::11");
        let error = find(Some(vtep(12))).unwrap_err().to_string();
        assert!(error.contains("lacks 198.18.0.12") && error.contains("198.18.0.11"), "{error}");
        run("ip address add 198.18.0.99/24 dev eth0");
        let error = find(None).unwrap_err().to_string();
        assert!(error.contains("198.18.0.11, 198.18.0.99") && error.contains("underlay_address"), "{error}");
        assert_eq!(find(Some(vtep(99))).unwrap(), vtep(99));
        run("ip address flush dev eth0");
        let error = find(None).unwrap_err().to_string();
        assert!(error.contains("give it one"), "{error}");
    });
}

#[test]
fn the_inventory_has_the_hosts_links_and_no_others() {
    on_a_host(|host| {
        host.ensure(&wanted(&[], &[])).unwrap();
        run("ip tuntap add dev tap7 mode tap");
        run("ip link add gwt0 type veth peer name eth1");
        let links = host.links().unwrap();
        let names: Vec<&str> = links.iter().map(|link| link.name.as_str()).collect();
        assert_eq!(names, ["eth0", "eth1"]);
        assert!(links[0].up && !links[1].up);
        assert_eq!(links[0].mtu, 1600);
        assert!(links[0].addresses.contains(&vtep(11)));
        assert_eq!(links[0].mac, link("eth0")["address"].as_str().unwrap());
        assert_eq!(links[0].cell, None);
    });
}

#[test]
fn the_cell_of_a_link_is_that_of_its_device() {
    on_a_host(|_| {
        let sysfs = tempfile::tempdir().unwrap();
        let device = sysfs.path().join("class/net/eth0/device");
        std::fs::create_dir_all(&device).unwrap();
        for (text, cell) in [("1\n", Some(1)), ("-1\n", None)] {
            std::fs::write(device.join("numa_node"), text).unwrap();
            let links = host::collect_links(&mut Conversation::open().unwrap(), sysfs.path()).unwrap();
            assert_eq!(links[0].cell, cell);
        }
    });
}

/// A guest in a namespace of its own, behind the port of `host`, with this address of the network.
fn add_guest(host: &str, guest: &str, last: u8) {
    let tap = tap_name(local_port(last).port);
    run(&format!("ip netns add {guest}"));
    run(&format!("ip link add {tap} mtu 1500 netns {host} type veth peer name eth0 mtu 1500 netns {guest}"));
    run(&format!("ip -n {guest} link set eth0 address {} up", mac(last)));
    run(&format!("ip -n {guest} address add 10.0.0.{last}/24 dev eth0"));
    run(&format!("ip -n {host} link set {tap} up"));
}

#[test]
fn guests_reach_each_other_across_hosts_and_a_moved_one_is_found_again() {
    let order = |ports: &[u8], forwarding: &[(u8, u8)], flood: &[u8]| NetworkWanted {
        ports: ports.iter().map(|last| local_port(*last)).collect(),
        ..wanted(forwarding, flood)
    };
    in_sandbox(|| {
        for (host, address) in [("h1", "198.18.0.11"), ("h2", "198.18.0.12"), ("h3", "198.18.0.13")] {
            add_host(host, address);
        }
        add_guest("h1", "g1", 1);
        add_guest("h2", "g2", 2);
        let ensure = |host, last, wanted: NetworkWanted| {
            in_namespace(host, || open(last).ensure(&wanted).unwrap());
        };
        ensure("h1", 11, order(&[1], &[(2, 12)], &[12]));
        ensure("h2", 12, order(&[2], &[(1, 11)], &[11]));
        run("ip netns exec g1 ping -c 3 -i 0.05 -W 2 -M do -s 1472 10.0.0.2");

        // The guest g2 now is on h3: its port goes from one bridge to the other.
        let tap = tap_name(local_port(2).port);
        run(&format!("ip -n h2 link set {tap} nomaster"));
        run(&format!("ip -n h2 link set {tap} netns h3"));
        run(&format!("ip -n h3 link set {tap} up"));
        ensure("h3", 13, order(&[2], &[(1, 11)], &[11]));
        ensure("h1", 11, order(&[1], &[(2, 13)], &[13]));
        ensure("h2", 12, order(&[], &[(1, 11), (2, 13)], &[]));
        run("ip netns exec g1 ping -c 3 -i 0.05 -W 2 10.0.0.2");
        run("ip netns exec g2 ping -c 3 -i 0.05 -W 2 10.0.0.1");
    });
}

#[test]
fn the_underlay_may_be_ipv6() {
    let vtep = |last: u8| IpAddr::from([0xfd00, 0, 0, 0, 0, 0, 0, u16::from(last)]);
    let order = |port, last, remote| NetworkWanted {
        mtu: 1530,
        ports: vec![local_port(port)],
        forwarding: vec![Forwarding { mac: mac(last), addresses: vec![], vtep: vtep(remote) }],
        flood: vec![vtep(remote)],
        ..wanted(&[], &[])
    };
    in_sandbox(|| {
        for (host, last) in [("h1", 11), ("h2", 12)] {
            add_host(host, &format!("198.18.0.{last}"));
            run(&format!("ip -n {host} address add {}/64 dev eth0 nodad", vtep(last)));
        }
        for (host, guest, last, wanted) in
            [("h1", "g1", 11, order(1, 2, 12)), ("h2", "g2", 12, order(2, 1, 11))]
        {
            add_guest(host, guest, last - 10);
            in_namespace(host, || {
                let choice =
                    UnderlayChoice { link: Some("eth0".into()), address: Some(vtep(last)), towards: None };
                let network = Netlink::open(&choice).unwrap();
                let error = network.ensure(&NetworkWanted { mtu: 1531, ..wanted.clone() }).unwrap_err();
                assert!(matches!(error, NetworkError::MtuTooLarge { need: 1601, have: 1600, .. }), "{error}");
                assert!(!network.ensure(&wanted).unwrap().is_empty());
                assert_eq!(network.ensure(&wanted).unwrap(), Changes::default());
                assert_eq!(network.observe().unwrap()[0].flood, wanted.flood);
            });
        }
        run("ip netns exec g1 ping -c 3 -i 0.05 -W 2 -M do -s 1472 10.0.0.2");
    });
}

#[test]
fn a_guest_does_not_reach_the_host_over_its_network() {
    in_sandbox(|| {
        add_host("h1", "198.18.0.11");
        add_guest("h1", "g1", 1);
        let wanted = NetworkWanted { ports: vec![local_port(1)], ..wanted(&[], &[]) };
        in_namespace("h1", || open(11).ensure(&wanted).unwrap());
        run("ip -n g1 route add 198.18.0.0/24 dev eth0");
        let ping = || try_run("ip netns exec g1 ping -c 1 -W 1 198.18.0.11").status.success();
        assert!(!ping(), "the host answered ARP for its underlay address");
        let bridge: serde_json::Value =
            serde_json::from_str(&run("ip -n h1 -j link show dev gwb1007")).unwrap();
        let bridge = bridge[0]["address"].as_str().unwrap();
        run(&format!("ip -n g1 neighbour replace 198.18.0.11 dev eth0 lladdr {bridge} nud permanent"));
        let received =
            || in_namespace("h1", || std::fs::read_to_string("/proc/thread-self/net/snmp").unwrap());
        let icmp = |text: String| {
            let line = text.lines().filter(|line| line.starts_with("Icmp:")).nth(1).unwrap();
            line.split(' ').nth(1).unwrap().to_owned()
        };
        let before = icmp(received());
        assert!(!ping(), "the host answered to the bridge's own address");
        assert_eq!(icmp(received()), before, "the host took a packet from a guest");
    });
}
