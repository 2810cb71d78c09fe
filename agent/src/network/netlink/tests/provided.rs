//! Networks that a link of the host carries. VLANs need a kernel that has them: they are tested in a VM (tests/vm).

use super::*;

const NUMBER: u32 = 1 << 24;

/// A network on the link that the host names `outside`, with the port of a guest.
fn flat(last: u8) -> NetworkWanted {
    NetworkWanted {
        vni: NUMBER,
        carrier: Carrier::Flat("outside".into()),
        ports: vec![local_port(last)],
        ..wanted(&[], &[])
    }
}

fn open_with(last: u8, outside: &str) -> Netlink {
    open(last).with_physical([("outside".to_owned(), outside.to_owned())].into())
}

/// Gives a host a second link, on a switch of its own.
fn add_link(host: &str) {
    if !try_run("ip link show street").status.success() {
        run("ip link add street type bridge");
        run("ip link set street up");
    }
    run(&format!("ip link add {host}street type veth peer name eth1 netns {host}"));
    run(&format!("ip link set {host}street master street up"));
}

#[test]
fn guests_on_a_flat_network_reach_what_is_on_the_link() {
    in_sandbox(|| {
        for (host, address) in [("h1", "198.18.0.11"), ("h2", "198.18.0.12")] {
            add_host(host, address);
            add_link(host);
        }
        let before = in_namespace("h1", links);
        add_guest("h1", "g1", 1);
        add_guest("h2", "g2", 2);
        let hosts = [(11, "h1"), (12, "h2")].map(|(last, host)| {
            let network = in_namespace(host, || open_with(last, "eth1"));
            in_namespace(host, || {
                assert_eq!(network.ensure(&flat(last - 10)).unwrap().ports, 1);
                assert_eq!(network.ensure(&flat(last - 10)).unwrap(), Changes::default());
            });
            network
        });
        run("ip netns exec g1 ping -c 1 -W 5 10.0.0.2");
        run("ip address add 10.0.0.9/24 dev street");
        run("ip netns exec g1 ping -c 1 -W 5 10.0.0.9");
        in_namespace("h1", || {
            assert_eq!(link("eth1")["master"], format!("gwb{NUMBER}"));
            assert_eq!(hosts[0].observe().unwrap()[0].vni, NUMBER);
            let inventory: Vec<String> =
                hosts[0].links().unwrap().into_iter().map(|link| link.name).collect();
            assert_eq!(inventory, ["eth0", "eth1"], "it is still the host's link");
            assert_eq!(hosts[0].physical_networks().unwrap()[0].mtu, 1500);
            run(&format!("ip link del {}", tap_name(local_port(1).port)));
            assert!(hosts[0].remove(NUMBER).unwrap());
            assert_eq!(links(), before);
            assert_eq!(link("eth1")["master"], serde_json::Value::Null);
            assert_eq!(hosts[0].observe().unwrap(), []);
        });
    });
}

#[test]
fn a_link_that_serves_the_host_is_refused_and_left_alone() {
    in_sandbox(|| {
        add_host("h1", "198.18.0.11");
        add_link("h1");
        in_namespace("h1", || {
            run("ip link set eth1 up");
            let before = links();
            let refused = |outside: &str, parts: &[&str]| {
                let text = open_with(11, outside).ensure(&flat(1)).unwrap_err().to_string();
                assert!(parts.iter().all(|part| text.contains(part)), "{text}");
                assert_eq!(links(), before);
            };
            refused("eth0", &["eth0", "outside", "underlay"]);
            assert!(run("ip address show dev eth0").contains("198.18.0.11/24"));
            refused("eth9", &["no link eth9", "physical_networks"]);
            run("ip address add 192.0.2.1/24 dev eth1");
            refused("eth1", &["eth1", "addresses of the host"]);
            assert!(run("ip address show dev eth1").contains("192.0.2.1/24"));
            run("ip address del 192.0.2.1/24 dev eth1");
            let elsewhere = NetworkWanted { carrier: Carrier::Flat("inside".into()), ..flat(1) };
            let error = open_with(11, "eth1").ensure(&elsewhere).unwrap_err();
            assert!(
                matches!(&error, NetworkError::NoPhysical { physical } if physical == "inside"),
                "{error}"
            );
            let error = open_with(11, "eth1").ensure(&NetworkWanted { mtu: 1501, ..flat(1) }).unwrap_err();
            assert!(error.to_string().contains("eth1 has 1500"), "{error}");
            assert_eq!(links(), before);
        });
        in_namespace("h1", || {
            run("ip link add other type bridge");
            run("ip link set eth1 master other");
            let text = open_with(11, "eth1").ensure(&flat(1)).unwrap_err().to_string();
            assert!(text.contains("another bridge"), "{text}");
            assert_eq!(link("eth1")["master"], "other");
        });
    });
}

#[test]
fn a_kernel_without_vlans_says_so() {
    in_sandbox(|| {
        add_host("h1", "198.18.0.11");
        in_namespace("h1", || {
            let before = links();
            let order = NetworkWanted { carrier: Carrier::Vlan("outside".into(), 42), ..flat(1) };
            // Over the underlay's link: its addresses are not touched.
            let host = open_with(11, "eth0");
            match host.ensure(&order) {
                Ok(_) => assert!(host.remove(NUMBER).unwrap(), "this kernel has them"),
                Err(error) => assert!(matches!(error, NetworkError::NoVlans { .. }), "{error}"),
            }
            assert_eq!(links(), before);
        });
    });
}
