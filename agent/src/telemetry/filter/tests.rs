//! The filter in this machine's kernel: crafted packets by BPF_PROG_TEST_RUN, and guests that talk to each other.

mod full;
mod guests;
mod packets;

use super::{PortFilter, Requests, Room, SIDES};
use crate::network::sandbox::in_sandbox;
use crate::telemetry::shared::program_mut;
use aya::programs::{TestRun, TestRunOptions};
use godwit_ebpf_common::filter::{FROM_PROGRAM, TO_PROGRAM};
use godwit_protocol::id::{NetworkId, PortId, SecurityGroupId};
use godwit_protocol::network::{Carrier, GroupMembers, LocalPort, NetworkWanted, Unknown};
use godwit_protocol::port::{Lease, Mac};
use godwit_protocol::security::{Direction, Family, Remote, Rule};
use ipnet::IpNet;
use packets::{ECHO, ECHO_REPLY, Packet, SYN, icmp, tcp, udp};
use proptest::prelude::*;
use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;
use uuid::Uuid;

const BPFFS: &str = "/sys/fs/bpf";
/// The link that a test run has, and its namespace's loopback.
const LINK: u32 = 1;
const VNI: u32 = 1001;

const GUEST: &str = "10.0.0.5";
const OTHER: &str = "10.0.0.9";
const GUEST6: &str = "fd00::5";
const OTHER6: &str = "fd00::9";

fn rule(direction: Direction) -> Rule {
    Rule {
        direction,
        family: Family::V4,
        protocol: None,
        ports: None,
        icmp: None,
        remote: Remote::Any,
        stateful: true,
    }
}

fn both(rule: Rule) -> [Rule; 2] {
    [rule, Rule { family: Family::V6, ..rule }]
}

fn port(rules: Vec<Rule>) -> LocalPort {
    LocalPort {
        port: PortId(Uuid::from_u128(5 << 120)),
        mac: Mac([0xfa, 0x16, 0x3e, 0, 0, 5]),
        addresses: vec![GUEST.parse().unwrap(), GUEST6.parse().unwrap()],
        port_security: true,
        allowed_pairs: vec![],
        rules: Some(rules),
        leases: vec![],
    }
}

fn network(ports: Vec<LocalPort>, groups: Vec<GroupMembers>) -> NetworkWanted {
    NetworkWanted {
        network: NetworkId(Uuid::from_u128(7)),
        vni: VNI,
        carrier: Carrier::Vxlan,
        mtu: 1450,
        udp_port: 4789,
        generation: 1,
        ports,
        forwarding: vec![],
        flood: vec![],
        floating: vec![],
        routers: vec![],
        unknown_unicast: Unknown::Drop,
        unknown_neighbours: Unknown::Flood,
        groups,
    }
}

struct Bench {
    filter: Arc<PortFilter>,
}

impl Bench {
    fn new(rules: impl IntoIterator<Item = Rule>) -> Self {
        let filter = Arc::new(PortFilter::open(Path::new(BPFFS), Room::default()).unwrap());
        let bench = Self { filter };
        bench.tell(rules);
        // A guest that has been here for long.
        bench.settle();
        bench
    }

    fn tell(&self, rules: impl IntoIterator<Item = Rule>) {
        self.filter.set_port(LINK, VNI, &port(rules.into_iter().collect()));
    }

    fn settle(&self) {
        let inner = &mut *self.filter.lock();
        let all: Vec<_> = inner.filters.iter().map(Result::unwrap).collect();
        for (key, found) in all {
            let settled = godwit_ebpf_common::filter::Filter { arrival_ends_ns: 0, ..found };
            inner.filters.insert(key, settled, 0).unwrap();
        }
    }

    fn run(&self, name: &'static str, packet: &[u8]) -> bool {
        let mut inner = self.filter.lock();
        let mut out = vec![0; packet.len() + 256];
        let result = program_mut(&mut inner.ebpf, name)
            .unwrap()
            .test_run(TestRunOptions {
                data_in: Some(packet),
                data_out: Some(&mut out),
                ..TestRunOptions::new()
            })
            .unwrap_or_else(|error| panic!("{packet:x?}: {error:?}"));
        assert_eq!(&out[..result.data_size_out as usize], packet, "the packet was altered");
        match result.return_value as i32 {
            // TCX_NEXT and TCX_DROP.
            -1 => true,
            2 => false,
            other => panic!("{other} is no verdict of ours"),
        }
    }

    fn sends(&self, packet: &[u8]) -> bool {
        self.run(FROM_PROGRAM, packet)
    }

    fn gets(&self, packet: &[u8]) -> bool {
        self.run(TO_PROGRAM, packet)
    }

    fn counts(&self) -> (u64, u64) {
        let inner = self.filter.lock();
        let counts = inner.counts.iter().flat_map(|map| map.iter()).map(|entry| entry.unwrap().1);
        counts
            .flat_map(|values| values.iter().map(|c| (c.dropped, c.malformed)).collect::<Vec<_>>())
            .fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1))
    }
}

#[test]
fn without_a_rule_nothing_passes_but_what_addresses_need() {
    in_sandbox(|| {
        let bench = Bench::new([]);
        for (a, b) in [(GUEST, OTHER), (GUEST6, OTHER6)] {
            for packet in [tcp(a, b, 4000, 80, SYN), udp(a, b, 4000, 53), icmp(a, b, ECHO, 7)] {
                assert!(!bench.sends(&packet), "{packet:x?}");
            }
            for packet in [tcp(b, a, 4000, 80, SYN), udp(b, a, 4000, 53), icmp(b, a, ECHO, 7)] {
                assert!(!bench.gets(&packet), "{packet:x?}");
            }
        }
        assert_eq!(bench.counts(), (12, 0));
        let arp = [&[0xff; 6][..], &[2; 6], &[8, 6], &[0; 28]].concat();
        let discover = udp("0.0.0.0", "255.255.255.255", 68, 67);
        let solicit = udp("fe80::1", "ff02::1:2", 546, 547);
        let neighbour = Packet::v6(58, "fe80::1", "ff02::1", &[135, 0, 0, 0, 0, 0, 0, 0]);
        for packet in [arp, discover, solicit, neighbour] {
            assert!(bench.sends(&packet), "{packet:x?}");
        }
        let offer = udp("10.0.0.1", GUEST, 67, 68);
        assert!(bench.gets(&offer), "from whatever serves DHCP there");
    });
}

#[test]
fn an_answer_passes_and_the_same_packet_unasked_does_not() {
    in_sandbox(|| {
        let bench = Bench::new(both(rule(Direction::Egress)));
        for (guest, other) in [(GUEST, OTHER), (GUEST6, OTHER6)] {
            for (question, answer) in [
                (tcp(guest, other, 4000, 80, SYN), tcp(other, guest, 80, 4000, SYN | 16)),
                (udp(guest, other, 4000, 53), udp(other, guest, 53, 4000)),
                (icmp(guest, other, ECHO, 7), icmp(other, guest, ECHO_REPLY, 7)),
            ] {
                assert!(!bench.gets(&answer), "nobody asked: {answer:x?}");
                assert!(bench.sends(&question));
                assert!(bench.gets(&answer), "{answer:x?}");
            }
            assert!(!bench.gets(&icmp(other, guest, ECHO, 7)), "a question is no answer");
            assert!(!bench.gets(&icmp(other, guest, ECHO_REPLY, 8)), "nor is an answer to another");
            assert!(!bench.gets(&udp(other, guest, 53, 4001)));
            assert!(!bench.gets(&udp(other, guest, 54, 4000)));
        }
    });
}

#[test]
fn a_rule_that_goes_takes_its_connections_with_it() {
    in_sandbox(|| {
        let ssh = Rule { protocol: Some(6), ports: Some((22, 22)), ..rule(Direction::Ingress) };
        let bench = Bench::new([ssh]);
        assert!(bench.gets(&tcp(OTHER, GUEST, 4000, 22, SYN)));
        assert!(bench.sends(&tcp(GUEST, OTHER, 22, 4000, SYN | 16)), "the answer");
        bench.tell([ssh, rule(Direction::Egress)]);
        assert!(bench.gets(&tcp(OTHER, GUEST, 4000, 22, 16)), "another rule changes nothing for it");
        bench.tell([]);
        bench.settle();
        assert!(!bench.sends(&tcp(GUEST, OTHER, 22, 4000, 16)));
        assert!(!bench.gets(&tcp(OTHER, GUEST, 4000, 22, 16)));
    });
}

#[test]
fn what_flows_stops_with_its_rule_and_with_its_member() {
    in_sandbox(|| {
        let group = SecurityGroupId(Uuid::from_u128(9 << 64));
        let members = |ranges: &[&str]| {
            let members = ranges.iter().map(|range| range.parse::<IpNet>().unwrap()).collect();
            network(vec![], vec![GroupMembers { group, members }])
        };
        let of_group = both(Rule { remote: Remote::Group(group), ..rule(Direction::Ingress) });
        let bench = Bench::new([]);
        for (a, b) in [(OTHER, GUEST), (OTHER6, GUEST6)] {
            let opened = [tcp(a, b, 4000, 80, SYN), udp(a, b, 4000, 53)];
            let there = [tcp(a, b, 4000, 80, 16), udp(a, b, 4000, 53)];
            let back = [tcp(b, a, 80, 4000, 16), udp(b, a, 53, 4000)];
            // So often that every CPU that this may run on has seen it flow.
            let flows = || {
                assert!(opened.iter().all(|packet| bench.gets(packet)));
                for _ in 0..200 {
                    assert!(there.iter().all(|packet| bench.gets(packet)));
                    assert!(back.iter().all(|packet| bench.sends(packet)));
                }
            };
            let stops = || {
                bench.settle();
                assert!(!there.iter().any(|packet| bench.gets(packet)));
                assert!(!back.iter().any(|packet| bench.sends(packet)));
            };
            bench.tell(both(rule(Direction::Ingress)));
            flows();
            bench.tell([]);
            stops();
            bench.filter.ensure(&members(&["10.0.0.9/32", "fd00::9/128"])).unwrap();
            bench.tell(of_group);
            flows();
            bench.filter.ensure(&members(&["10.0.0.8/32"])).unwrap();
            // What the network's change does for a tap that is there.
            bench.tell(of_group);
            stops();
            // What does not flow is looked at, however like it is to what does.
            bench.tell(both(rule(Direction::Ingress)));
            flows();
            for packet in [tcp(b, a, 80, 4001, 16), tcp(b, a, 81, 4000, 16), udp(b, a, 80, 4000)] {
                assert!(!bench.sends(&packet), "{packet:x?}");
            }
        }
    });
}

#[test]
fn only_members_of_the_group_pass_and_only_as_long_as_they_are() {
    in_sandbox(|| {
        let group = SecurityGroupId(Uuid::from_u128(9 << 64));
        let members = |ranges: &[&str]| {
            let members = ranges.iter().map(|range| range.parse::<IpNet>().unwrap()).collect();
            network(vec![], vec![GroupMembers { group, members }])
        };
        let bench = Bench::new(both(Rule { remote: Remote::Group(group), ..rule(Direction::Ingress) }));
        assert!(!bench.gets(&udp(OTHER, GUEST, 1, 2)));
        bench.filter.ensure(&members(&["10.0.0.9/32", "fd00::8/125"])).unwrap();
        assert!(bench.gets(&udp(OTHER, GUEST, 1, 2)));
        assert!(bench.gets(&udp(OTHER6, GUEST6, 1, 2)));
        assert!(!bench.gets(&udp("10.0.0.8", GUEST, 1, 2)));
        assert!(!bench.gets(&udp("fd00::7", GUEST6, 1, 2)));
        assert!(bench.sends(&udp(GUEST, OTHER, 2, 1)), "the answer");
        bench.filter.ensure(&members(&["10.0.0.8/32"])).unwrap();
        // What the network's change does for a tap that is there.
        bench.tell(both(Rule { remote: Remote::Group(group), ..rule(Direction::Ingress) }));
        assert!(!bench.gets(&udp(OTHER, GUEST, 1, 2)), "no member any more");
        assert!(!bench.sends(&udp(GUEST, OTHER, 2, 1)));
        assert!(bench.gets(&udp("10.0.0.8", GUEST, 1, 2)));
        bench.filter.remove(VNI).unwrap();
        assert!(bench.filter.lock().told.is_empty());
    });
}

#[test]
fn a_stateless_rule_lets_no_answer_pass() {
    in_sandbox(|| {
        let bench = Bench::new([Rule { stateful: false, ..rule(Direction::Egress) }]);
        assert!(bench.sends(&udp(GUEST, OTHER, 4000, 53)));
        assert!(!bench.gets(&udp(OTHER, GUEST, 53, 4000)));
    });
}

#[test]
fn later_fragments_pass_behind_their_first_and_never_alone() {
    in_sandbox(|| {
        let dns = Rule { protocol: Some(17), ports: Some((53, 53)), ..rule(Direction::Egress) };
        let bench = Bench::new(both(dns));
        for (a, b) in [(GUEST, OTHER), (GUEST6, OTHER6)] {
            let [first, later] = packets::fragments(a, b, 4000, 53, 99);
            assert!(!bench.sends(&later));
            assert!(bench.sends(&first));
            assert!(bench.sends(&later));
            let [first, later] = packets::fragments(a, b, 4000, 54, 100);
            assert!(!bench.sends(&first));
            assert!(!bench.sends(&later));
        }
    });
}

#[test]
fn an_error_passes_when_it_is_about_a_connection_that_is_known() {
    in_sandbox(|| {
        let bench = Bench::new(both(rule(Direction::Egress)));
        for (guest, other, router) in [(GUEST, OTHER, "10.0.0.1"), (GUEST6, OTHER6, "fd00::1")] {
            let sent = udp(guest, other, 4000, 53);
            let error = packets::too_big(router, guest, &sent[14..]);
            assert!(!bench.gets(&error));
            assert!(bench.sends(&sent));
            assert!(bench.gets(&error));
            let foreign = packets::too_big(router, guest, &udp(guest, other, 4000, 54)[14..]);
            assert!(!bench.gets(&foreign));
        }
    });
}

#[test]
fn a_guest_that_has_moved_goes_on_with_what_it_had_opened() {
    in_sandbox(|| {
        let web = Rule { protocol: Some(6), ports: Some((80, 80)), ..rule(Direction::Egress) };
        let bench = Bench { filter: Arc::new(PortFilter::open(Path::new(BPFFS), Room::default()).unwrap()) };
        bench.tell([web]);
        assert!(!bench.gets(&tcp(OTHER, GUEST, 80, 4000, SYN)), "a new one is not one that was");
        assert!(!bench.gets(&tcp(OTHER, GUEST, 81, 4000, 16)), "nor one that no rule would have let begin");
        assert!(bench.gets(&tcp(OTHER, GUEST, 80, 4000, 16)));
        bench.settle();
        assert!(!bench.gets(&tcp(OTHER, GUEST, 80, 4001, 16)), "later it must be known");
        assert!(bench.gets(&tcp(OTHER, GUEST, 80, 4000, 16)));
    });
}

#[test]
fn a_guests_dhcp_goes_to_the_responder_and_no_further() {
    in_sandbox(|| {
        let bench = Bench::new([]);
        let lease = Lease {
            address: GUEST.parse().unwrap(),
            prefix_length: 24,
            gateway: None,
            dns: vec![],
            routes: vec![],
            dhcp: true,
        };
        bench.filter.set_port(LINK, VNI, &LocalPort { leases: vec![lease], ..port(vec![]) });
        let mut requests = Requests::open(Path::new(BPFFS)).unwrap();
        let discover = udp("0.0.0.0", "255.255.255.255", 68, 67);
        assert!(!bench.sends(&discover));
        let asked = requests.wait(1000);
        assert_eq!(asked.len(), 1);
        assert_eq!((asked[0].link, asked[0].frame.as_slice()), (LINK, discover.as_slice()));
        assert!(!bench.gets(&udp("10.0.0.1", GUEST, 67, 68)), "nobody else is to answer");
        assert!(bench.sends(&udp("fe80::1", "ff02::1:2", 546, 547)), "DHCPv6 is not served here");
    });
}

#[test]
fn any_bytes_get_a_verdict_and_are_left_as_they_are() {
    in_sandbox(|| {
        let bench = Bench::new(both(rule(Direction::Egress)));
        let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig::with_cases(2000));
        let kinds = prop_oneof![
            Just([0x08, 0x00]),
            Just([0x86, 0xdd]),
            Just([0x81, 0x00]),
            Just([0x08, 0x06]),
            any::<[u8; 2]>()
        ];
        // The kernel runs no program on IP that is shorter than its header.
        let bytes = proptest::collection::vec(any::<u8>(), 39..300);
        let packets =
            (kinds, any::<u8>(), prop_oneof![Just(6_u8), Just(17), Just(58), Just(44), any::<u8>()], bytes);
        runner
            .run(&packets, |(kind, first, protocol, bytes)| {
                let mut packet = [&[2; 12][..], &kind, &[first], &bytes].concat();
                if let Some(byte) = packet.get_mut(if kind[0] == 8 { 23 } else { 20 }) {
                    *byte = protocol;
                }
                for (name, _) in SIDES {
                    bench.run(name, &packet);
                }
                Ok(())
            })
            .unwrap();
    });
}

/// The same question answered the plain way.
fn allows(rules: &[Rule], direction: Direction, other: IpAddr, protocol: u8, port: u16) -> bool {
    rules.iter().any(|rule| {
        rule.direction == direction
            && (rule.family == Family::V4) == other.is_ipv4()
            && rule.protocol.is_none_or(|p| p == protocol)
            && rule.ports.is_none_or(|(first, last)| first <= port && port <= last)
            && match rule.remote {
                Remote::Range(range) => range.contains(&other),
                _ => true,
            }
    })
}

fn some_rule() -> impl Strategy<Value = Rule> {
    let direction = prop_oneof![Just(Direction::Ingress), Just(Direction::Egress)];
    let protocol = prop_oneof![Just(None), Just(Some(6)), Just(Some(17))];
    let ports = (0..8_u16, 0..4_u16).prop_map(|(first, more)| (80 + first, 80 + first + more));
    let range = (0..=16_u8, 24..=32_u8).prop_map(|(last, length)| format!("10.0.0.{last}/{length}"));
    let range6 = (0..=16_u8, 120..=128_u8).prop_map(|(last, length)| format!("fd00::{last:x}/{length}"));
    let remote = proptest::option::of((range, range6));
    (direction, any::<bool>(), protocol, ports, any::<bool>(), remote).prop_map(
        |(direction, is_v4, protocol, ports, with_ports, remote)| Rule {
            direction,
            family: if is_v4 { Family::V4 } else { Family::V6 },
            protocol,
            ports: Some(ports).filter(|_| with_ports && protocol.is_some()),
            icmp: None,
            remote: remote.map_or(Remote::Any, |(v4, v6)| {
                Remote::Range((if is_v4 { v4 } else { v6 }).parse::<IpNet>().unwrap().trunc())
            }),
            stateful: false,
        },
    )
}

#[test]
fn what_passes_is_what_the_rules_say() {
    in_sandbox(|| {
        let bench = Bench::new([]);
        let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig::with_cases(300));
        let rules = proptest::collection::vec(some_rule(), 0..12);
        let packet = (any::<bool>(), any::<bool>(), any::<bool>(), 0..20_u8, 78..92_u16);
        runner
            .run(&(rules, proptest::collection::vec(packet, 30)), |(rules, packets)| {
                bench.tell(rules.clone());
                bench.settle();
                for (is_out, is_v4, is_tcp, last, port) in packets {
                    let (guest, other) = if is_v4 {
                        (GUEST, format!("10.0.0.{last}"))
                    } else {
                        (GUEST6, format!("fd00::{last:x}"))
                    };
                    let (direction, a, b) = if is_out {
                        (Direction::Egress, guest, other.as_str())
                    } else {
                        (Direction::Ingress, other.as_str(), guest)
                    };
                    let bytes = if is_tcp { tcp(a, b, 4000, port, SYN) } else { udp(a, b, 4000, port) };
                    let passed = if is_out { bench.sends(&bytes) } else { bench.gets(&bytes) };
                    let protocol = if is_tcp { 6 } else { 17 };
                    let wanted = allows(&rules, direction, other.parse().unwrap(), protocol, port);
                    prop_assert_eq!(
                        passed,
                        wanted,
                        "{:?} {} {} {}: {:?}",
                        direction,
                        other,
                        protocol,
                        port,
                        rules
                    );
                }
                Ok(())
            })
            .unwrap();
    });
}

#[test]
fn as_many_rules_as_there_may_be_are_all_looked_at() {
    in_sandbox(|| {
        let one = |port| Rule { protocol: Some(17), ports: Some((port, port)), ..rule(Direction::Ingress) };
        let bench = Bench::new((1..=128).map(one));
        assert!(bench.gets(&udp(OTHER, GUEST, 9, 128)));
        assert!(!bench.gets(&udp(OTHER, GUEST, 9, 129)));
        // One more than fits is not let pass; nothing else changes.
        bench.tell((1..=129).map(one));
        assert!(!bench.gets(&udp(OTHER, GUEST, 9, 129)));
    });
}
