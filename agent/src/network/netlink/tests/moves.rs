//! Addresses that move from one host to another, while packets are on their way to them.

use super::*;
use std::sync::atomic::{AtomicBool, Ordering};

#[test]
fn an_address_follows_the_order_from_its_port_to_another_host_and_back() {
    let bridged = || {
        let lines = run("bridge -n h1 fdb show br gwb1007");
        let ours =
            lines.lines().filter(|line| line.starts_with("fa:16:3e:00:00:01") && line.contains("master"));
        ours.map(str::to_owned).collect::<Vec<_>>()
    };
    in_sandbox(|| {
        add_host("h1", "198.18.0.11");
        add_guest("h1", "g1", 1);
        // It says nothing by itself, and asks for each address once.
        in_namespace("g1", || {
            std::fs::write("/proc/sys/net/ipv6/conf/all/disable_ipv6", "1").unwrap();
            std::fs::write("/proc/sys/net/ipv4/neigh/eth0/mcast_solicit", "1").unwrap();
        });
        let ensure = |wanted: NetworkWanted| in_namespace("h1", || open(11).ensure(&wanted).unwrap());
        let here = NetworkWanted { ports: vec![local_port(1)], ..wanted(&[], &[12]) };
        // A question for an address that was not asked for before is sent at once.
        let announce = |nobody| try_run(&format!("ip netns exec g1 ping -c 1 -W 0.1 10.0.0.{nobody}"));
        ensure(here.clone());
        announce(8);
        let tap = tap_name(local_port(1).port);
        assert!(bridged()[0].contains(&format!("dev {tap}")), "{:?}", bridged());
        // It runs on h2 now, and its port here is not gone yet.
        ensure(wanted(&[(1, 12)], &[12]));
        assert_eq!(bridged(), ["fa:16:3e:00:00:01 dev gwv1007 master gwb1007 static"]);
        // It is back, and says so before the order comes.
        announce(9);
        assert!(bridged()[0].contains(&format!("dev {tap}")), "{:?}", bridged());
        ensure(here.clone());
        assert!(bridged()[0].contains(&format!("dev {tap}")), "{:?}", bridged());
        assert!(ensure(here).is_empty());
    });
}

#[test]
fn a_packet_is_neither_lost_nor_flooded_while_its_entry_moves() {
    const MOVES: u32 = 200;
    in_sandbox(|| {
        add_host("h1", "198.18.0.11");
        add_guest("h1", "g1", 1);
        in_namespace("g1", || std::fs::write("/proc/sys/net/ipv6/conf/all/disable_ipv6", "1").unwrap());
        run(&format!("ip -n g1 neighbour replace 10.0.0.2 dev eth0 lladdr {} nud permanent", mac(2)));
        for host in [12, 13] {
            let peer = "lladdr 02:00:00:00:00:01 nud permanent";
            run(&format!("ip -n h1 neighbour replace 198.18.0.{host} dev eth0 {peer}"));
        }
        let at = |host| NetworkWanted { ports: vec![local_port(1)], ..wanted(&[(2, host)], &[12, 13]) };
        let sender = in_namespace("g1", || std::net::UdpSocket::bind("10.0.0.1:0").unwrap());
        let sent = in_namespace("h1", || {
            let network = open(11);
            network.ensure(&at(12)).unwrap();
            let moved = AtomicBool::new(false);
            std::thread::scope(|scope| {
                let sending = scope.spawn(|| {
                    let mut packets = 0_u64;
                    while !moved.load(Ordering::Relaxed) {
                        sender.send_to(&[0; 100], "10.0.0.2:9").unwrap();
                        packets += 1;
                    }
                    packets
                });
                let moves = [13, 12].into_iter().cycle().take(MOVES as usize);
                let changes = moves.map(|host| network.ensure(&at(host)).unwrap().forwarding);
                assert_eq!(changes.sum::<u32>(), MOVES);
                moved.store(true, Ordering::Relaxed);
                sending.join().unwrap()
            })
        });
        let statistics: serde_json::Value =
            serde_json::from_str(&run("ip -n h1 -s -j link show dev gwv1007")).unwrap();
        let left = &statistics[0]["stats64"]["tx"];
        assert_eq!((&left["packets"], &left["dropped"]), (&sent.into(), &0.into()));
        assert!(sent > u64::from(MOVES), "only {sent} packets");
    });
}
