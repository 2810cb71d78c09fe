//! Real packets: two hosts with one guest each, their bridges and VXLAN as the agent makes them.

use super::super::{DataPlane, EventReader};
use super::ip;
use crate::network::HostNetwork;
use crate::network::netlink::{Netlink, UnderlayChoice};
use crate::network::overlay::Overlay;
use crate::network::sandbox::{add_host, in_namespace, in_sandbox, run, try_run};
use crate::telemetry::Capacity;
use crate::telemetry::vxlan::{Options, VxlanTelemetry};
use godwit_ebpf_common::tables::{Account, AccountKey, Outcome, Protocol};
use godwit_ebpf_common::underlay::{Class, Direction};
use godwit_protocol::event::EventKind;
use godwit_protocol::id::{NetworkId, PortId};
use godwit_protocol::network::{Carrier, Forwarding, LocalPort, NetworkWanted, Unknown};
use godwit_protocol::port::{Mac, tap_name};
use std::io::Read;
use std::net::UdpSocket;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};
use uuid::Uuid;

pub(super) const VNI: u32 = 1001;

/// A host with one guest, in namespaces h1 and g1 or h2 and g2.
pub(super) struct Site {
    number: u8,
    pub(super) plane: Option<Arc<DataPlane>>,
    pub(super) overlay: Overlay,
    pub(super) underlay: VxlanTelemetry,
}

pub(super) fn port(number: u8) -> LocalPort {
    LocalPort {
        rules: None,
        leases: vec![],
        port: PortId(Uuid::from_u128(u128::from(number) << 120)),
        mac: Mac([0xfa, 0x16, 0x3e, 0, 0, number]),
        addresses: vec![ip(&format!("10.0.0.{number}")), ip(&format!("fd00::{number}"))],
        port_security: true,
        allowed_pairs: vec![],
    }
}

pub(super) fn wanted(number: u8) -> NetworkWanted {
    let other = port(3 - number);
    let vtep = ip(&format!("198.18.0.1{}", 3 - number));
    NetworkWanted {
        groups: vec![],
        network: NetworkId(Uuid::from_u128(7)),
        vni: VNI,
        carrier: Carrier::Vxlan,
        mtu: 1500,
        udp_port: 4789,
        generation: 1,
        ports: vec![port(number)],
        forwarding: vec![Forwarding { mac: other.mac, addresses: other.addresses, vtep }],
        flood: vec![vtep],
        floating: vec![],
        routers: vec![],
        unknown_unicast: Unknown::Drop,
        unknown_neighbours: Unknown::Flood,
    }
}

pub(super) fn bpffs(number: u8) -> PathBuf {
    format!("/run/bpf{number}").into()
}

fn open(number: u8) -> DataPlane {
    in_namespace(&format!("h{number}"), || DataPlane::open(&bpffs(number), Capacity::default()).unwrap())
}

pub(super) fn choice(number: u8) -> UnderlayChoice {
    UnderlayChoice {
        link: Some("eth0".into()),
        address: Some(ip(&format!("198.18.0.1{number}"))),
        ..UnderlayChoice::default()
    }
}

/// The host and its guest, whose ports answer by programs or by the kernel.
pub(super) fn site(number: u8, by_programs: bool) -> Site {
    let (host, guest) = (format!("h{number}"), format!("g{number}"));
    let folder = bpffs(number);
    std::fs::create_dir(&folder).unwrap();
    run(&format!("mount -t bpf bpf {}", folder.display()));
    add_host(&host, &format!("198.18.0.1{number}"));
    let (links, underlay) = in_namespace(&host, || {
        let underlay = VxlanTelemetry::ensure("eth0", &folder, Options::default()).unwrap();
        (Netlink::open(&choice(number)).unwrap(), underlay)
    });
    let plane = by_programs.then(|| Arc::new(open(number)));
    let links = if by_programs { links } else { links.standing_in() };
    let overlay = Overlay::new(links, plane.clone());
    let (tap, mac) = (tap_name(port(number).port), port(number).mac);
    run(&format!("ip netns add {guest}"));
    run(&format!("ip -n {host} link add {tap} type veth peer name eth0 address {mac} netns {guest}"));
    run(&format!("ip -n {host} link set {tap} up"));
    in_namespace(&host, || overlay.ensure(&wanted(number)).unwrap());
    for line in [
        "link set lo up",
        "link set eth0 up",
        &format!("address add 10.0.0.{number}/24 dev eth0"),
        &format!("address add fd00::{number}/64 dev eth0 nodad"),
    ] {
        run(&format!("ip -n {guest} {line}"));
    }
    Site { number, plane, overlay, underlay }
}

impl Site {
    pub(super) fn account(&self) -> Account {
        let key = AccountKey { port: u64::from(self.number) << 56, vni: VNI, reserved: 0 };
        let accounts = self.plane.as_ref().unwrap().read().unwrap();
        accounts.get(&key).copied().unwrap_or(Account::ZERO)
    }

    fn outcome(&self, protocol: Protocol, outcome: Outcome) -> u64 {
        self.account().neighbours[protocol as usize][outcome as usize]
    }

    /// Packets with a broadcast or known multicast question in them that left the host.
    fn left(&self, class: Class) -> u64 {
        let samples = self.underlay.read().unwrap().into_iter();
        let sent = samples.filter(|sample| sample.direction == Direction::Tx && sample.class == class);
        sent.map(|sample| sample.packets).sum()
    }
}

fn ping(from: u8, to: &str, count: u32) -> bool {
    try_run(&format!("ip netns exec g{from} ping -q -c {count} -i 0.02 -W 2 {to}")).status.success()
}

#[test]
fn a_known_neighbour_is_answered_at_the_port_and_no_question_leaves() {
    in_sandbox(|| {
        let (one, two) = (site(1, true), site(2, true));
        assert!(ping(1, "10.0.0.2", 3));
        assert!(ping(2, "fd00::1", 3));
        assert!(ping(1, "fd00::2", 3));
        for (site, protocol) in
            [(&one, Protocol::Arp), (&one, Protocol::Nd), (&two, Protocol::Arp), (&two, Protocol::Nd)]
        {
            let seen = site.outcome(protocol, Outcome::Seen);
            assert!(seen > 0, "host {} {protocol:?}", site.number);
            assert_eq!(site.outcome(protocol, Outcome::Answered), seen);
            assert_eq!(site.outcome(protocol, Outcome::Leaked), 0);
        }
        assert_eq!((one.left(Class::Broadcast), two.left(Class::Broadcast)), (0, 0));
        // Nobody has told of this one: it is asked for everywhere.
        assert!(!ping(1, "10.0.0.77", 1));
        assert!(one.outcome(Protocol::Arp, Outcome::Unknown) > 0);
        assert_eq!(one.left(Class::Broadcast), one.outcome(Protocol::Arp, Outcome::Unknown));
    });
}

#[test]
fn where_programs_cannot_be_the_kernel_is_set_to_answer_for_known_neighbours() {
    in_sandbox(|| {
        let (one, _two) = (site(1, false), site(2, false));
        assert!(ping(1, "10.0.0.2", 3));
        let neighbours = run("ip -n h1 neighbour show dev gwb1001 nud permanent");
        assert_eq!(neighbours.trim(), "10.0.0.2 lladdr fa:16:3e:00:00:02 PERMANENT");
        let vxlan = run("bridge -n h1 -d link show dev gwv1001");
        for setting in ["neigh_suppress on", "learning off", " flood off"] {
            assert!(vxlan.contains(setting), "{setting}: {vxlan}");
        }
        assert!(ping(2, "fd00::1", 3), "flooded, for the bridge has no IPv6");
        let again = in_namespace("h1", || one.overlay.ensure(&wanted(1)).unwrap());
        assert!(again.is_empty(), "{again:?}");
        let moved = NetworkWanted { forwarding: vec![], flood: vec![], ..wanted(1) };
        in_namespace("h1", || one.overlay.ensure(&moved).unwrap());
        assert_eq!(run("ip -n h1 neighbour show dev gwb1001 nud permanent"), "");
    });
}

#[test]
fn an_uninvited_question_for_a_known_address_is_counted_as_leaked() {
    in_sandbox(|| {
        let (one, _two) = (site(1, true), site(2, true));
        // Not from the port, so that no program answers: from the bridge itself.
        run("ip -n h1 link add stray type veth peer name stray-end");
        run("ip -n h1 link set stray master gwb1001 up");
        run("ip -n h1 address add 10.0.0.200/24 dev stray-end");
        run("ip -n h1 link set stray-end up");
        assert!(!try_run("ip netns exec h1 ping -q -c 1 -W 1 -I stray-end 10.0.0.2").status.success());
        let key = AccountKey { port: 0, vni: VNI, reserved: 0 };
        let accounts = one.plane.as_ref().unwrap().read().unwrap();
        let leaked = accounts[&key].neighbours[Protocol::Arp as usize][Outcome::Leaked as usize];
        assert!(leaked > 0);
        assert_eq!(leaked, one.left(Class::Broadcast));
    });
}

#[test]
fn nothing_is_lost_or_counted_twice_while_the_programs_are_exchanged() {
    in_sandbox(|| {
        let (mut one, two) = (site(1, true), site(2, true));
        assert!(ping(1, "10.0.0.2", 1) && ping(2, "10.0.0.1", 1));
        let before = one.account();
        let receiver = in_namespace("g2", || UdpSocket::bind("10.0.0.2:9").unwrap());
        receiver.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
        let sender = in_namespace("g1", || UdpSocket::bind("10.0.0.1:9").unwrap());
        let exchanged = AtomicBool::new(false);
        let (sent, received) = thread::scope(|scope| {
            let sending = scope.spawn(|| {
                let mut packets = 0_u64;
                while !exchanged.load(Ordering::Relaxed) {
                    sender.send_to(&[0; 100], "10.0.0.2:9").unwrap();
                    packets += 1;
                    thread::sleep(Duration::from_millis(1));
                }
                packets
            });
            let receiving = scope.spawn(|| {
                let (mut packets, mut buffer) = (0_u64, [0; 200]);
                while receiver.recv(&mut buffer).is_ok() {
                    packets += 1;
                }
                packets
            });
            for _ in 0..5 {
                // Dropped without a farewell, as by kill -9.
                let plane = open(1);
                in_namespace("h1", || plane.adopt(None)).unwrap();
                one.plane = Some(Arc::new(plane));
            }
            exchanged.store(true, Ordering::Relaxed);
            (sending.join().unwrap(), receiving.join().unwrap())
        });
        assert_eq!(received, sent, "every packet has arrived");
        let class = Class::Unicast as usize;
        // What else there was is of the two guests' neighbour caches, to one station.
        let others =
            one.outcome(Protocol::Arp, Outcome::Unicast) + one.outcome(Protocol::Nd, Outcome::Unicast);
        let counted = one.account().from_packets[class] - before.from_packets[class];
        assert!((sent..=sent + others + 8).contains(&counted), "{sent} sent, {counted} counted");
        drop(two);
    });
}

#[test]
fn the_account_is_what_a_capture_at_the_tap_sees() {
    in_sandbox(|| {
        let (one, _two) = (site(1, true), site(2, true));
        assert!(ping(1, "10.0.0.2", 1));
        let tap = tap_name(port(1).port);
        let capture = |way: &str| {
            let mut child = Command::new("ip")
                .args([
                    "netns", "exec", "h1", "tcpdump", "-i", &tap, "-Q", way, "-p", "-n", "-l", "-e", "-q",
                    "ip",
                ])
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()
                .unwrap();
            // It says so when it listens.
            let mut stderr = child.stderr.take().unwrap();
            let (mut said, mut byte) = (Vec::new(), [0]);
            while !said.ends_with(b"listening on") && stderr.read(&mut byte).unwrap() > 0 {
                said.push(byte[0]);
            }
            thread::spawn(move || std::io::copy(&mut stderr, &mut std::io::sink()));
            child
        };
        let captures = ["in", "out"].map(capture);
        let before = one.account();
        for size in [0, 100, 1400] {
            run(&format!("ip netns exec g1 ping -q -c 40 -i 0.005 -s {size} -W 2 10.0.0.2"));
        }
        let after = one.account();
        // tcpdump hands its lines out a moment later: wait until nothing more comes.
        let deadline = Instant::now() + Duration::from_secs(1);
        while Instant::now() < deadline {
            thread::sleep(Duration::from_millis(50));
        }
        let seen = captures.map(|mut child| {
            nix::sys::signal::kill(
                nix::unistd::Pid::from_raw(child.id() as i32),
                nix::sys::signal::Signal::SIGINT,
            )
            .unwrap();
            let mut text = String::new();
            child.stdout.take().unwrap().read_to_string(&mut text).unwrap();
            child.wait().unwrap();
            let lengths = text.lines().filter_map(|line| {
                let length = line.split("length ").nth(1)?;
                length.split([':', ',', ' ']).next()?.parse::<u64>().ok()
            });
            let lengths: Vec<u64> = lengths.collect();
            (lengths.len() as u64, lengths.iter().sum::<u64>())
        });
        let class = Class::Unicast as usize;
        let counted = |packets: fn(&Account) -> [u64; 4], bytes: fn(&Account) -> [u64; 4]| {
            (packets(&after)[class] - packets(&before)[class], bytes(&after)[class] - bytes(&before)[class])
        };
        assert_eq!(seen[0].0, 120);
        assert_eq!(counted(|a| a.from_packets, |a| a.from_bytes), seen[0]);
        assert_eq!(counted(|a| a.to_packets, |a| a.to_bytes), seen[1]);
    });
}

#[test]
fn a_tap_gets_its_programs_when_it_comes_and_leaves_nothing_when_it_goes() {
    in_sandbox(|| {
        let one = site(1, true);
        let plane = one.plane.as_ref().unwrap();
        let tap = tap_name(port(1).port);
        let refresh = || in_namespace("h1", || plane.refresh());
        let attached = || in_namespace("h1", || plane.attached());
        assert_eq!(attached(), (1, 0));
        run(&format!("ip -n h1 link del {tap}"));
        refresh();
        assert_eq!(attached(), (0, 0));
        assert_eq!(in_namespace("h1", || plane.filling()).entries[3..], [("ports", 0), ("allowed", 0)]);
        let pins = || {
            std::fs::read_dir(bpffs(1).join("godwit"))
                .unwrap()
                .filter(|entry| entry.as_ref().unwrap().file_name().to_string_lossy().starts_with("tap_"))
        };
        assert_eq!(pins().count(), 0);
        run(&format!("ip -n h1 link add {tap} type veth peer name again"));
        assert_eq!(attached(), (0, 1));
        refresh();
        assert_eq!(attached(), (1, 0));
        assert_eq!(pins().count(), 2);
    });
}

#[test]
fn a_packet_for_a_station_that_left_is_stale_and_one_for_a_strange_network_is_counted() {
    in_sandbox(|| {
        let (one, two) = (site(1, true), site(2, true));
        assert!(ping(1, "10.0.0.2", 1));
        // The second guest moves away, which only its own host has been told of.
        let moved = NetworkWanted {
            ports: vec![],
            forwarding: vec![Forwarding {
                mac: port(2).mac,
                addresses: port(2).addresses,
                vtep: ip("198.18.0.11"),
            }],
            ..wanted(2)
        };
        in_namespace("h2", || two.overlay.ensure(&moved).unwrap());
        ping(1, "10.0.0.2", 3);
        let stale = two.underlay.read_stale().unwrap();
        assert!(stale[&VNI].0 >= 3, "{stale:?}");
        assert!(stale[&VNI].1 > Duration::ZERO);
        let events = EventReader::open(Path::new(&bpffs(2))).unwrap().wait(Duration::ZERO);
        let event = events.iter().find(|event| event.kind == EventKind::Stale).unwrap();
        assert_eq!((event.mac, event.peer), (Some(port(2).mac), Some(ip("198.18.0.11"))));
        drop(one);
    });
}

#[test]
fn packets_for_a_station_that_left_with_its_network_are_stale_and_not_only_of_a_strange_one() {
    in_sandbox(|| {
        let (_one, two) = (site(1, true), site(2, true));
        assert!(ping(1, "10.0.0.2", 1));
        in_namespace("h2", || two.overlay.remove(VNI).unwrap());
        ping(1, "10.0.0.2", 3);
        let stale = two.underlay.read_stale().unwrap();
        assert!(stale[&VNI].0 >= 3 && stale[&VNI].1 > Duration::ZERO, "{stale:?}");
        let plane = two.plane.as_ref().unwrap();
        plane.forget_departed(&mut plane.inner(), u64::MAX).unwrap();
        assert!(two.underlay.read_stale().unwrap().is_empty());
        ping(1, "10.0.0.2", 1);
        assert!(two.underlay.read_stale().unwrap().is_empty(), "nothing is known of it any more");
        // It comes back as if it had never been here.
        in_namespace("h2", || two.overlay.ensure(&wanted(2)).unwrap());
        assert!(ping(1, "10.0.0.2", 1));
        assert!(two.underlay.read_stale().unwrap().is_empty());
    });
}
