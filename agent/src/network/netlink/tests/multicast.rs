//! Broadcast by a group of the underlay: one packet, which a switch that snoops IGMP and MLD brings to those hosts only
//! that have joined.

use super::*;
use std::io::{BufRead, BufReader};
use std::net::{SocketAddr, UdpSocket};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

/// The source port of packets that end what a capture is asked for.
const MARKER: u16 = 9;

/// One underlay, of IPv4 or IPv6.
#[derive(Clone, Copy)]
struct Family {
    is_v4: bool,
    group: &'static str,
}

impl Family {
    fn vtep(self, last: u8) -> IpAddr {
        if self.is_v4 { vtep(last) } else { format!("fd00::{last}").parse().unwrap() }
    }

    fn open(self, last: u8) -> Netlink {
        let choice = UnderlayChoice {
            link: Some("eth0".into()),
            address: Some(self.vtep(last)),
            ..UnderlayChoice::default()
        };
        Netlink::open(&choice).unwrap()
    }

    /// The state of the host of guest `own`, when the other guest is on `host`.
    fn order(self, own: u8, other: u8, host: u8) -> NetworkWanted {
        let forwarding = vec![Forwarding { mac: mac(other), addresses: vec![], vtep: self.vtep(host) }];
        let plain = NetworkWanted { ports: vec![local_port(own)], forwarding, ..wanted(&[], &[]) };
        in_group(plain, self.group, 1)
    }

    /// How tcpdump tells of the hops that a packet may take.
    fn hops(self, hops: u8) -> String {
        format!("{} {hops},", if self.is_v4 { "ttl" } else { "hlim" })
    }
}

/// Three hosts on a switch that brings packets to a group to its members alone; guest 1 on h1, guest 2 on h2.
fn build(family: Family) {
    std::fs::write("/proc/sys/net/ipv6/conf/default/accept_dad", "0").unwrap();
    for last in [11_u8, 12, 13] {
        let host = format!("h{}", last - 10);
        add_host(&host, &vtep(last).to_string());
        run(&format!("ip -n {host} address add fd00::{last}/64 dev eth0 nodad"));
        // Without it the switch would pass on a packet to a group that it does not know of.
        run(&format!("ip link set {host} type bridge_slave mcast_flood off"));
        for peer in [11_u8, 12, 13].into_iter().filter(|peer| *peer != last && !family.is_v4) {
            in_namespace(&host, || {
                let mac = "lladdr 02:00:00:00:00";
                run(&format!("ip link set eth0 address 02:00:00:00:00:{last}"));
                run(&format!("ip neighbour replace fd00::{peer} dev eth0 {mac}:{peer} nud permanent"));
            });
        }
    }
    // Hundredths of a second; a query must be on its way before the switch answers for the absence of members.
    let quick = "mcast_query_response_interval 10 mcast_last_member_interval 10 mcast_last_member_count 1";
    run(&format!("ip link set underlay type bridge mcast_snooping 1 {quick}"));
    run("ip link set underlay type bridge mcast_querier 1");
    for last in [1, 2] {
        add_guest(&format!("h{last}"), &format!("g{last}"), last);
        let (guest, other) = (format!("g{last}"), 3 - last);
        in_namespace(&guest, || std::fs::write("/proc/sys/net/ipv6/conf/all/disable_ipv6", "1").unwrap());
        let there = format!("10.0.0.{other} dev eth0 lladdr {} nud permanent", mac(other));
        run(&format!("ip -n {guest} neighbour replace {there}"));
    }
}

fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !condition() {
        assert!(Instant::now() < deadline, "it does not come to this: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The hosts that the switch knows to be members of a group.
fn members(group: &str) -> BTreeSet<String> {
    let json: serde_json::Value = serde_json::from_str(&run("bridge -j mdb show dev underlay")).unwrap();
    let entries = json.as_array().unwrap().iter().flat_map(|bridge| bridge["mdb"].as_array().unwrap());
    let of_group = entries.filter(|entry| entry["grp"] == group && entry["port"] != "underlay");
    of_group.map(|entry| entry["port"].as_str().unwrap().to_owned()).collect()
}

fn await_members(group: &str, hosts: &[&str]) {
    let wanted: BTreeSet<String> = hosts.iter().map(|host| (*host).to_owned()).collect();
    until(&format!("the members of {group} are {hosts:?}"), || members(group) == wanted);
}

/// Whether a host's own kernel is a member.
fn has_joined(host: &str, group: &str) -> bool {
    run(&format!("ip -n {host} maddress show dev eth0")).contains(group)
}

/// What passes a host's link, by tcpdump.
struct Capture {
    child: Child,
    lines: BufReader<ChildStdout>,
}

impl Capture {
    fn start(host: &str) -> Self {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", host, "timeout", "60", "tcpdump", "-nvlti", "eth0"]);
        command.args(["--immediate-mode", "udp port 4789"]);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut said = BufReader::new(child.stderr.take().unwrap());
        let mut line = String::new();
        while !line.contains("listening on") {
            line.clear();
            assert!(said.read_line(&mut line).unwrap() > 0, "tcpdump does not start");
        }
        // It may say more at its end.
        std::thread::spawn(move || std::io::copy(&mut said, &mut std::io::sink()));
        let lines = BufReader::new(child.stdout.take().unwrap());
        Self { child, lines }
    }

    /// The packets up to the next marker, each as the text of its outer header.
    fn packets(&mut self) -> Vec<String> {
        let (mut packets, mut before) = (Vec::new(), String::new());
        loop {
            let mut line = String::new();
            assert!(self.lines.read_line(&mut line).unwrap() > 0, "the marker does not come: {packets:?}");
            if line.contains(".4789:") {
                if line.contains(&format!(".{MARKER} >")) {
                    return packets;
                }
                packets.push(format!("{} {}", before.trim(), line.trim()));
            }
            before = line;
        }
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A packet behind which nothing comes that was sent before it, from h1 to each of the other hosts.
fn mark(family: Family) {
    let socket = in_namespace("h1", || UdpSocket::bind(SocketAddr::new(family.vtep(11), MARKER)).unwrap());
    for host in [12, 13] {
        socket.send_to(&[0; 8], SocketAddr::new(family.vtep(host), 4789)).unwrap();
    }
}

/// Sends from guest 1 to all, until guest 2 has got one: then the switch passes them on.
fn broadcasts_arrive() {
    let sender = in_namespace("g1", || UdpSocket::bind("10.0.0.1:0").unwrap());
    let receiver = in_namespace("g2", || UdpSocket::bind("0.0.0.0:7").unwrap());
    sender.set_broadcast(true).unwrap();
    receiver.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
    until("a broadcast arrives", || {
        sender.send_to(b"all", "10.0.0.255:7").unwrap();
        receiver.recv(&mut [0; 8]).is_ok()
    });
}

fn one_copy_reaches_the_members(family: Family) {
    in_sandbox(|| {
        build(family);
        let (first, second) =
            (in_namespace("h1", || family.open(11)), in_namespace("h2", || family.open(12)));
        let orders = [family.order(1, 2, 12), family.order(2, 1, 11)];
        in_namespace("h1", || first.ensure(&orders[0]).unwrap());
        in_namespace("h2", || second.ensure(&orders[1]).unwrap());
        await_members(family.group, &["h1", "h2"]);
        assert_eq!(["h1", "h2", "h3"].map(|host| has_joined(host, family.group)), [true, true, false]);
        broadcasts_arrive();

        let mut captures = ["h1", "h2", "h3"].map(Capture::start);
        let sender = in_namespace("g1", || UdpSocket::bind("10.0.0.1:0").unwrap());
        sender.set_broadcast(true).unwrap();
        for to in ["10.0.0.255:7", "10.0.0.2:7", "10.0.0.255:7", "10.0.0.255:7"] {
            sender.send_to(b"word", to).unwrap();
        }
        mark(family);
        let [left, second_got, third_got] = captures.each_mut().map(Capture::packets);
        let to = |packets: &[String], address: &str| -> Vec<String> {
            packets.iter().filter(|packet| packet.contains(&format!("> {address}.4789"))).cloned().collect()
        };
        let by_group = to(&left, family.group);
        assert_eq!(by_group.len(), 3, "one packet for each broadcast: {left:?}");
        assert!(by_group.iter().all(|packet| packet.contains(&family.hops(1))), "{by_group:?}");
        let known = to(&left, &family.vtep(12).to_string());
        assert_eq!(known.len(), 1, "a known address goes to its host alone: {left:?}");
        assert!(known[0].contains(&family.hops(64)), "{known:?}");
        let to_second =
            to(&second_got, family.group).len() + to(&second_got, &family.vtep(12).to_string()).len();
        assert_eq!(to_second, 4, "{second_got:?}");
        assert_eq!(third_got, [""; 0], "h3 has no port in the network");

        assert!(in_namespace("h2", || second.remove(VNI).unwrap()));
        await_members(family.group, &["h1"]);
        assert!(!has_joined("h2", family.group), "the last port is gone");
        drop(captures);
    });
}

#[test]
fn a_broadcast_leaves_once_and_reaches_only_the_members_of_its_group() {
    one_copy_reaches_the_members(Family { is_v4: true, group: "239.0.3.239" });
}

#[test]
fn the_same_over_an_ipv6_underlay() {
    one_copy_reaches_the_members(Family { is_v4: false, group: "ff05::3ef" });
}

#[test]
fn another_way_of_broadcast_keeps_the_device_its_entries_and_what_is_known() {
    let family = Family { is_v4: true, group: "239.0.3.239" };
    in_sandbox(|| {
        build(family);
        let (first, second) = (in_namespace("h1", || open(11)), in_namespace("h2", || open(12)));
        let [by_group, far_order] = [family.order(1, 2, 12), family.order(2, 1, 11)];
        let replicated = NetworkWanted { carrier: Carrier::Vxlan, flood: vec![vtep(12)], ..by_group.clone() };
        in_namespace("h2", || second.ensure(&far_order).unwrap());
        in_namespace("h1", || {
            first.ensure(&replicated).unwrap();
            let (index, before) = (link("gwv1007")["ifindex"].clone(), entries());
            for round in 0..3 {
                let changes = first.ensure(&by_group).unwrap();
                assert_eq!((changes.links, changes.forwarding), (1, 0), "round {round}");
                assert!(first.ensure(&by_group).unwrap().is_empty(), "round {round}");
                assert_eq!(first.observe().unwrap()[0].flood, [by_group.flood[0]]);
                assert_eq!(first.observe().unwrap()[0].group_ttl, Some(1));
                let farther = in_group(by_group.clone(), "239.0.3.239", 5);
                assert_eq!(first.ensure(&farther).unwrap(), Changes { links: 1, ..Changes::default() });
                assert_eq!(link("gwv1007")["linkinfo"]["info_data"]["ttl"], 5);
                assert_eq!(first.observe().unwrap()[0].group_ttl, Some(5));
                let changes = first.ensure(&replicated).unwrap();
                assert_eq!((changes.links, changes.forwarding, changes.flood), (1, 0, 1), "round {round}");
                assert!(first.ensure(&replicated).unwrap().is_empty(), "round {round}");
                assert_eq!((link("gwv1007")["ifindex"].clone(), entries()), (index.clone(), before.clone()));
            }
        });
        assert!(!has_joined("h1", family.group));
        in_namespace("h1", || first.ensure(&by_group).unwrap());
        await_members(family.group, &["h1", "h2"]);
        broadcasts_arrive();
        run("ip netns exec g1 ping -c 1 -W 5 10.0.0.2");
    });
}
