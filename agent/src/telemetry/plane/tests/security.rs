//! Port security: what a guest may say, and what it may not.

use super::frames::{Arp, Eth, GUEST, OTHER, Udp, V6, arp, eth, ipv4, ipv6, nd};
use super::{BPFFS, Bench, DROP, NEXT, dropped, ip, network, passed};
use crate::network::sandbox::in_sandbox;
use crate::telemetry::plane::EventReader;
use godwit_ebpf_common::tables::{Outcome, Reason};
use godwit_protocol::event::EventKind;
use godwit_protocol::port::Mac;
use std::path::Path;
use std::time::Duration;

/// Each with what is wrong with it.
pub(super) fn spoofed() -> Vec<(&'static str, Vec<u8>, Reason)> {
    let foreign_mac = {
        let mut packet = ipv4("10.0.0.1", "10.0.0.2", Udp::default());
        packet[6..12].copy_from_slice(&OTHER);
        packet
    };
    let tagged = |packet: Vec<u8>| [&packet[..12], &[0x81, 0, 0, 5], &packet[12..]].concat();
    let server = |source, destination| Udp { source, destination };
    let mut options = ipv4("10.0.0.9", "10.0.0.2", Udp::default());
    options[14] = 0x46;
    options.splice(34..34, [1, 1, 1, 1]);
    let advertisement =
        |target, mac: u8| nd(136, "fd00::1", "ff02::1", target, 0x20, &[2, 1, 0xfa, 0x16, 0x3e, 0, 0, mac]);
    let hop_by_hop = vec![(0, vec![0, 0, 0, 0, 0, 0, 0])];
    let first_fragment = vec![(44, vec![0, 0, 1, 0, 0, 0, 1])];
    let router = [134, 0, 0, 0, 64, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    vec![
        ("another Ethernet source", foreign_mac, Reason::SpoofedMac),
        ("another IPv4 source", ipv4("10.0.0.2", "10.0.0.3", Udp::default()), Reason::SpoofedIpv4),
        (
            "another IPv4 source behind a tag",
            tagged(ipv4("10.0.0.2", "10.0.0.3", Udp::default())),
            Reason::SpoofedIpv4,
        ),
        ("another IPv4 source with options", options, Reason::SpoofedIpv4),
        ("no IPv4 source, no DHCP", ipv4("0.0.0.0", "255.255.255.255", Udp::default()), Reason::SpoofedIpv4),
        ("a DHCP server", ipv4("10.0.0.1", "255.255.255.255", server(67, 68)), Reason::DhcpServer),
        ("another IPv6 source", ipv6(V6 { source: "fd00::2", ..V6::default() }), Reason::SpoofedIpv6),
        ("another link-local source", ipv6(V6 { source: "fe80::1", ..V6::default() }), Reason::SpoofedIpv6),
        (
            "an IPv4 address in IPv6",
            ipv6(V6 { source: "::ffff:10.0.0.1", ..V6::default() }),
            Reason::SpoofedIpv6,
        ),
        ("no IPv6 source", ipv6(V6 { source: "::", ..V6::default() }), Reason::SpoofedIpv6),
        ("a DHCPv6 server", ipv6(V6 { udp: server(547, 546), ..V6::default() }), Reason::DhcpServer),
        (
            "a DHCPv6 server behind options",
            ipv6(V6 { udp: server(547, 546), extensions: hop_by_hop.clone(), ..V6::default() }),
            Reason::DhcpServer,
        ),
        ("ARP for another address", arp(Arp::request("10.0.0.2", "10.0.0.3")), Reason::SpoofedArp),
        (
            "an ARP reply for a neighbour",
            arp(Arp { operation: 2, ..Arp::request("10.0.0.2", "10.0.0.2") }),
            Reason::SpoofedArp,
        ),
        (
            "ARP of another station",
            arp(Arp { mac: OTHER, ..Arp::request("10.0.0.1", "10.0.0.3") }),
            Reason::SpoofedArp,
        ),
        (
            "a probe of another station",
            arp(Arp { mac: OTHER, ..Arp::request("0.0.0.0", "10.0.0.3") }),
            Reason::SpoofedArp,
        ),
        ("an advertisement for a neighbour", advertisement("fd00::2", 1), Reason::SpoofedNd),
        ("an advertisement of another station", advertisement("fd00::1", 2), Reason::SpoofedNd),
        (
            "a solicitation of another station",
            nd(135, "fd00::1", "ff02::1:ff00:3", "fd00::3", 0, &[1, 1, 0xfa, 0x16, 0x3e, 0, 0, 2]),
            Reason::SpoofedNd,
        ),
        (
            "a probe for another address",
            nd(135, "::", "ff02::1:ff00:2", "fd00::2", 0, &[]),
            Reason::SpoofedNd,
        ),
        ("a router", ipv6(V6 { icmp: Some(router.to_vec()), ..V6::default() }), Reason::RouterAdvertisement),
        (
            "a router behind options",
            ipv6(V6 { icmp: Some(router.to_vec()), extensions: hop_by_hop, ..V6::default() }),
            Reason::RouterAdvertisement,
        ),
        (
            "a router in a fragment",
            ipv6(V6 { icmp: Some(router.to_vec()), extensions: first_fragment, ..V6::default() }),
            Reason::RouterAdvertisement,
        ),
        (
            "a redirect",
            ipv6(V6 { icmp: Some(vec![137, 0, 0, 0]), ..V6::default() }),
            Reason::RouterAdvertisement,
        ),
        (
            "more extension headers than are followed",
            ipv6(V6 { extensions: vec![(60, vec![0; 7]); 7], ..V6::default() }),
            Reason::Malformed,
        ),
        (
            "ARP for nothing known",
            {
                let mut packet = arp(Arp::request("10.0.0.1", "10.0.0.3"));
                packet[18] = 8;
                packet
            },
            Reason::Malformed,
        ),
    ]
}

#[test]
fn a_guest_sends_only_from_what_is_its_own() {
    in_sandbox(|| {
        let bench = Bench::new(&network());
        let mut reader = EventReader::open(Path::new(BPFFS)).unwrap();
        let mut expected = [0; Reason::ALL.len()];
        for (name, packet, reason) in spoofed() {
            assert_eq!(bench.guest_sends(&packet), dropped(&packet), "{name}");
            expected[reason as usize] += 1;
            assert_eq!(bench.account().drops, expected, "{name}");
        }
        let total: u64 = expected.iter().sum();
        assert_eq!(bench.account().from_packets.iter().sum::<u64>(), total, "each is counted as traffic too");
        let events = reader.wait(Duration::ZERO);
        let macs: Vec<_> =
            events.iter().map(|event| (event.kind, event.mac, event.reason.as_deref())).collect();
        let expected = [
            (EventKind::Spoof, Some(Mac(OTHER)), Some("spoofed_mac")),
            (EventKind::Spoof, Some(Mac(GUEST)), Some("spoofed_ipv4")),
        ];
        assert_eq!(macs, expected, "one a second for each station");
        assert_eq!(events[1].address, Some(ip("10.0.0.2")));
        assert_eq!(events[1].tap.as_deref(), Some("gwt01000000000"));
    });
}

/// What a guest without a lease, and one with it, must be able to say.
pub(super) fn honest() -> Vec<(&'static str, Vec<u8>)> {
    let client = |source, destination| Udp { source, destination };
    let listener = [143, 0, 0, 0, 0, 0, 0, 1, 4, 0, 0, 0];
    let mut rarp = arp(Arp::request("0.0.0.0", "0.0.0.0"));
    rarp[12..14].copy_from_slice(&[0x80, 0x35]);
    vec![
        ("IPv4", ipv4("10.0.0.1", "10.0.0.2", Udp::default())),
        ("a DHCP client", ipv4("0.0.0.0", "255.255.255.255", client(68, 67))),
        ("IPv6", ipv6(V6::default())),
        ("IPv6 from the link-local address", ipv6(V6 { source: "fe80::f816:3eff:fe00:1", ..V6::default() })),
        (
            "a DHCPv6 client",
            ipv6(V6 { source: "fe80::f816:3eff:fe00:1", udp: client(546, 547), ..V6::default() }),
        ),
        ("a later fragment", ipv6(V6 { extensions: vec![(44, vec![0, 0, 8, 0, 0, 0, 1])], ..V6::default() })),
        ("a listener's report", ipv6(V6 { source: "::", icmp: Some(listener.to_vec()), ..V6::default() })),
        (
            "a router's solicitation",
            ipv6(V6 { source: "::", icmp: Some(vec![133, 0, 0, 0, 0, 0, 0, 0]), ..V6::default() }),
        ),
        ("QEMU's announcement after a move", rarp),
        (
            "another EtherType",
            [eth(Eth { destination: OTHER, source: GUEST, kind: 0x88b5 }), vec![0; 46]].concat(),
        ),
    ]
}

#[test]
fn what_a_guest_needs_to_say_passes() {
    in_sandbox(|| {
        let bench = Bench::new(&network());
        for (name, packet) in honest() {
            assert_eq!(bench.guest_sends(&packet), passed(&packet), "{name}: {:?}", bench.drops());
        }
        assert_eq!(bench.drops(), []);
    });
}

#[test]
fn an_allowed_pair_is_as_good_as_the_ports_own() {
    const PAIR: [u8; 6] = [0, 0, 0x5e, 0, 1, 7];
    in_sandbox(|| {
        let mut wanted = network();
        let pairs = [(PAIR, "10.0.1.0/24"), (GUEST, "192.0.2.7/32"), (GUEST, "fd00:1::/64")];
        wanted.ports[0].allowed_pairs = pairs.map(|(mac, prefix)| (Mac(mac), prefix.parse().unwrap())).into();
        let bench = Bench::new(&wanted);
        let from = |mac: [u8; 6], mut packet: Vec<u8>| {
            packet[6..12].copy_from_slice(&mac);
            bench.guest_sends(&packet).action
        };
        assert_eq!(from(PAIR, ipv4("10.0.1.200", "10.0.0.2", Udp::default())), NEXT);
        assert_eq!(from(PAIR, ipv4("10.0.2.1", "10.0.0.2", Udp::default())), DROP);
        assert_eq!(
            from(GUEST, ipv4("10.0.1.200", "10.0.0.2", Udp::default())),
            DROP,
            "with the pair's MAC only"
        );
        assert_eq!(from(GUEST, ipv4("192.0.2.7", "10.0.0.2", Udp::default())), NEXT);
        assert_eq!(from(GUEST, ipv6(V6 { source: "fd00:1::77", ..V6::default() })), NEXT);
        assert_eq!(from(GUEST, ipv6(V6 { source: "fd00:2::77", ..V6::default() })), DROP);
        let claim = Arp { mac: PAIR, operation: 2, ..Arp::request("10.0.1.1", "10.0.1.1") };
        assert_eq!(from(GUEST, arp(claim)), NEXT, "ARP of the pair in a frame of the port's own");
        bench.tell(&network());
    });
}

#[test]
fn a_port_without_security_sends_what_it_likes() {
    in_sandbox(|| {
        let mut wanted = network();
        wanted.ports[0].port_security = false;
        let bench = Bench::new(&wanted);
        let mut reader = EventReader::open(Path::new(BPFFS)).unwrap();
        for (name, packet, _) in spoofed() {
            assert_ne!(bench.guest_sends(&packet).action, DROP, "{name}");
        }
        assert_eq!(bench.drops(), []);
        let events = reader.wait(Duration::ZERO);
        let conflict = events.iter().find(|event| event.kind == EventKind::Conflict).unwrap();
        assert_eq!((conflict.mac, conflict.owner), (Some(Mac(GUEST)), Some(Mac(OTHER))));
        assert_eq!(conflict.address, Some(ip("10.0.0.2")));
        assert!(bench.account().neighbours.iter().all(|counts| counts[Outcome::Conflict as usize] > 0));
    });
}
