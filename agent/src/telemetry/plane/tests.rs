//! The ports' programs, given packets made by hand.

mod finds;
mod frames;
mod security;
mod taps;
mod upgrades;

use super::DataPlane;
use crate::network::sandbox::in_sandbox;
use crate::telemetry::Capacity;
use aya::programs::{TestRun, TestRunOptions};
use frames::{Arp, Eth, GUEST, OTHER, Udp, arp, eth, ipv4, nd};
use godwit_ebpf_common::port::{FROM_PROGRAM, TO_PROGRAM};
use godwit_ebpf_common::tables::{Account, AccountKey, Outcome, Protocol, Reason};
use godwit_ebpf_common::underlay::Class;
use godwit_protocol::id::{NetworkId, PortId};
use godwit_protocol::network::{Carrier, Forwarding, LocalPort, NetworkWanted, Unknown};
use godwit_protocol::port::Mac;
use proptest::prelude::*;
use security::{honest, spoofed};
use std::net::IpAddr;
use std::path::Path;
use uuid::Uuid;

const BPFFS: &str = "/sys/fs/bpf";
const VNI: u32 = 1001;

/// Test runs have the loopback link.
const LINK: u32 = 1;

const NEXT: u32 = -1_i32 as u32;
const DROP: u32 = 2;
const REDIRECT: u32 = 7;

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// The guest under test: fa:16:3e:00:00:01 with 10.0.0.1 and fd00::1.
fn guest() -> LocalPort {
    LocalPort {
        rules: None,
        leases: vec![],
        port: PortId(Uuid::from_u128(1 << 120)),
        mac: Mac(GUEST),
        addresses: vec![ip("10.0.0.1"), ip("fd00::1")],
        port_security: true,
        allowed_pairs: vec![],
    }
}

/// A network with the guest here, and its neighbour fa:16:3e:00:00:02 with 10.0.0.2 and fd00::2 on another host.
fn network() -> NetworkWanted {
    NetworkWanted {
        groups: vec![],
        network: NetworkId(Uuid::from_u128(7)),
        vni: VNI,
        carrier: Carrier::Vxlan,
        mtu: 1500,
        udp_port: 4789,
        generation: 1,
        ports: vec![guest()],
        forwarding: vec![Forwarding {
            mac: Mac(OTHER),
            addresses: vec![ip("10.0.0.2"), ip("fd00::2")],
            vtep: ip("198.18.0.12"),
        }],
        flood: vec![ip("198.18.0.12")],
        floating: vec![],
        routers: vec![ip("fd00::2")],
        unknown_unicast: Unknown::Drop,
        unknown_neighbours: Unknown::Flood,
    }
}

/// What became of a packet.
#[derive(Debug, PartialEq, Eq)]
struct Run {
    action: u32,
    packet: Vec<u8>,
}

struct Bench {
    plane: DataPlane,
}

impl Bench {
    fn new(wanted: &NetworkWanted) -> Self {
        let plane = DataPlane::open(Path::new(BPFFS), Capacity::default()).unwrap();
        let bench = Self { plane };
        bench.tell(wanted);
        bench
    }

    fn tell(&self, wanted: &NetworkWanted) {
        self.plane.ensure(wanted).unwrap();
        let mut inner = self.plane.inner();
        inner.ports.set_port(LINK, VNI, &wanted.ports[0]);
    }

    fn run(&self, program: &'static str, packet: &[u8], segments: u32, segment_bytes: u32) -> Run {
        let mut context = [0; 192];
        context[164..168].copy_from_slice(&segments.to_ne_bytes());
        context[176..180].copy_from_slice(&segment_bytes.to_ne_bytes());
        let mut out = vec![0; packet.len() + 256];
        let mut inner = self.plane.inner();
        let result = inner.ports.program_mut(program).test_run(TestRunOptions {
            data_in: Some(packet),
            data_out: Some(&mut out),
            ctx_in: Some(&context),
            ..TestRunOptions::new()
        });
        let result = result.unwrap_or_else(|error| panic!("{packet:x?}: {error:?}"));
        out.truncate(result.data_size_out as usize);
        Run { action: result.return_value, packet: out }
    }

    fn guest_sends(&self, packet: &[u8]) -> Run {
        self.run(FROM_PROGRAM, packet, 0, 0)
    }

    /// The account of the guest.
    fn account(&self) -> Account {
        let key = AccountKey { port: 1 << 56, vni: VNI, reserved: 0 };
        self.plane.read().unwrap().get(&key).copied().unwrap_or(Account::ZERO)
    }

    fn outcomes(&self, protocol: Protocol) -> Vec<(Outcome, u64)> {
        let counts = self.account().neighbours[protocol as usize];
        Outcome::ALL.into_iter().zip(counts).filter(|(_, count)| *count > 0).collect()
    }

    fn drops(&self) -> Vec<(Reason, u64)> {
        Reason::ALL.into_iter().zip(self.account().drops).filter(|(_, count)| *count > 0).collect()
    }
}

fn passed(packet: &[u8]) -> Run {
    Run { action: NEXT, packet: packet.to_vec() }
}

fn dropped(packet: &[u8]) -> Run {
    Run { action: DROP, packet: packet.to_vec() }
}

#[test]
fn a_question_by_arp_for_a_known_address_is_answered_as_its_owner_would() {
    in_sandbox(|| {
        let bench = Bench::new(&network());
        let question = arp(Arp::request("10.0.0.1", "10.0.0.2"));
        let run = bench.guest_sends(&question);
        assert_eq!(run.action, REDIRECT);
        let answer = Arp {
            operation: 2,
            mac: OTHER,
            sender: ip("10.0.0.2"),
            target_mac: GUEST,
            target: ip("10.0.0.1"),
        };
        let expected =
            [eth(Eth { destination: GUEST, source: OTHER, kind: 0x0806 }), answer.bytes()].concat();
        assert_eq!(run.packet, expected);
        assert_eq!(bench.outcomes(Protocol::Arp), [(Outcome::Seen, 1), (Outcome::Answered, 1)]);
    });
}

#[test]
fn a_padded_question_by_arp_is_answered_in_its_length() {
    in_sandbox(|| {
        let bench = Bench::new(&network());
        let mut question = arp(Arp::request("10.0.0.1", "10.0.0.2"));
        question.resize(60, 0);
        let run = bench.guest_sends(&question);
        assert_eq!((run.action, run.packet.len()), (REDIRECT, 60));
    });
}

#[test]
fn a_solicitation_for_a_known_address_is_answered_with_flags_and_checksum_right() {
    in_sandbox(|| {
        let bench = Bench::new(&network());
        // With its option, without it, and with one more than was asked for.
        let option: &[u8] = &[1, 1, 0xfa, 0x16, 0x3e, 0, 0, 1];
        let nonce: &[u8] = &[14, 1, 1, 2, 3, 4, 5, 6];
        for options in [option.to_vec(), vec![], [option, nonce].concat()] {
            let question = nd(135, "fd00::1", "ff02::1:ff00:2", "fd00::2", 0, &options);
            let run = bench.guest_sends(&question);
            assert_eq!(run.action, REDIRECT);
            let mut expected =
                nd(136, "fd00::2", "fd00::1", "fd00::2", 0xe0, &[2, 1, 0xfa, 0x16, 0x3e, 0, 0, 2]);
            expected[..6].copy_from_slice(&GUEST);
            expected[6..12].copy_from_slice(&OTHER);
            assert_eq!(run.packet, expected);
        }
        assert_eq!(bench.outcomes(Protocol::Nd), [(Outcome::Seen, 3), (Outcome::Answered, 3)]);
        let mut wanted = network();
        wanted.routers.clear();
        bench.tell(&wanted);
        let question = nd(135, "fd00::1", "ff02::1:ff00:2", "fd00::2", 0, option);
        assert_eq!(bench.guest_sends(&question).packet[58], 0x60, "solicited and override, no router");
    });
}

#[test]
fn probes_announcements_and_questions_to_one_station_pass() {
    in_sandbox(|| {
        let bench = Bench::new(&network());
        let probe = arp(Arp::request("0.0.0.0", "10.0.0.1"));
        let announcement = arp(Arp::request("10.0.0.1", "10.0.0.1"));
        let reply = arp(Arp { operation: 2, target_mac: [0xff; 6], ..Arp::request("10.0.0.1", "10.0.0.1") });
        let mut unicast = arp(Arp::request("10.0.0.1", "10.0.0.2"));
        unicast[..6].copy_from_slice(&OTHER);
        for packet in [&probe, &announcement, &reply, &unicast] {
            assert_eq!(bench.guest_sends(packet), passed(packet));
        }
        let expected = [(Outcome::Unicast, 1), (Outcome::Probe, 1), (Outcome::Announcement, 2)];
        assert_eq!(bench.outcomes(Protocol::Arp), expected);
        let option: &[u8] = &[1, 1, 0xfa, 0x16, 0x3e, 0, 0, 1];
        let probe = nd(135, "::", "ff02::1:ff00:1", "fd00::1", 0, &[]);
        let announcement = nd(136, "fd00::1", "ff02::1", "fd00::1", 0x20, &[2, 1, 0xfa, 0x16, 0x3e, 0, 0, 1]);
        let mut unicast = nd(135, "fd00::1", "fd00::2", "fd00::2", 0, option);
        unicast[..6].copy_from_slice(&OTHER);
        for packet in [&probe, &announcement, &unicast] {
            assert_eq!(bench.guest_sends(packet), passed(packet));
        }
        let expected = [(Outcome::Unicast, 1), (Outcome::Probe, 1), (Outcome::Announcement, 1)];
        assert_eq!(bench.outcomes(Protocol::Nd), expected);
    });
}

#[test]
fn a_question_for_an_unknown_address_follows_the_policy() {
    in_sandbox(|| {
        let bench = Bench::new(&network());
        let question = arp(Arp::request("10.0.0.1", "10.0.0.99"));
        assert_eq!(bench.guest_sends(&question), passed(&question));
        let expected = [(Outcome::Seen, 1), (Outcome::Passed, 1), (Outcome::Unknown, 1)];
        assert_eq!(bench.outcomes(Protocol::Arp), expected);
        bench.tell(&NetworkWanted { unknown_neighbours: Unknown::Drop, ..network() });
        assert_eq!(bench.guest_sends(&question), dropped(&question));
        let expected =
            [(Outcome::Seen, 2), (Outcome::Suppressed, 1), (Outcome::Passed, 1), (Outcome::Unknown, 2)];
        assert_eq!(bench.outcomes(Protocol::Arp), expected);
        assert_eq!(bench.drops(), [(Reason::Neighbour, 1)]);
    });
}

#[test]
fn nobody_answers_for_an_address_that_two_ports_have_or_that_is_the_askers_own() {
    in_sandbox(|| {
        let mut wanted = network();
        wanted.forwarding.push(Forwarding {
            mac: Mac([0xfa, 0x16, 0x3e, 0, 0, 3]),
            addresses: vec![ip("10.0.0.2")],
            vtep: ip("198.18.0.13"),
        });
        wanted.ports[0].addresses.push(ip("10.0.0.11"));
        let bench = Bench::new(&wanted);
        let question = arp(Arp::request("10.0.0.1", "10.0.0.2"));
        assert_eq!(bench.guest_sends(&question), passed(&question));
        let own = arp(Arp::request("10.0.0.1", "10.0.0.11"));
        assert_eq!(bench.guest_sends(&own), dropped(&own));
        let expected = [(Outcome::Seen, 2), (Outcome::Suppressed, 1), (Outcome::Passed, 1)];
        assert_eq!(bench.outcomes(Protocol::Arp), expected);
    });
}

#[test]
fn what_is_tagged_or_odd_is_not_answered() {
    in_sandbox(|| {
        let bench = Bench::new(&network());
        let question = arp(Arp::request("10.0.0.1", "10.0.0.2"));
        let tagged = [&question[..12], &[0x81, 0, 0, 5], &question[12..]].concat();
        let mut hop_limit = nd(135, "fd00::1", "ff02::1:ff00:2", "fd00::2", 0, &[]);
        hop_limit[21] = 254;
        let mut code = nd(135, "fd00::1", "ff02::1:ff00:2", "fd00::2", 0, &[]);
        code[55] = 1;
        let group = nd(135, "fd00::1", "ff02::1:ff00:2", "ff02::2", 0, &[]);
        for packet in [tagged, hop_limit, code, group] {
            assert_eq!(bench.guest_sends(&packet), passed(&packet));
        }
        assert_eq!(bench.outcomes(Protocol::Arp), []);
        assert_eq!(bench.outcomes(Protocol::Nd), []);
    });
}

#[test]
fn unknown_unicast_ends_at_the_port_unless_it_is_to_be_flooded() {
    in_sandbox(|| {
        let bench = Bench::new(&network());
        let mut packet = ipv4("10.0.0.1", "10.0.0.99", Udp::default());
        packet[..6].copy_from_slice(&[0xfa, 0x16, 0x3e, 0, 0, 99]);
        assert_eq!(bench.guest_sends(&packet), dropped(&packet));
        assert_eq!(bench.drops(), [(Reason::UnknownUnicast, 1)]);
        bench.tell(&NetworkWanted { unknown_unicast: Unknown::Flood, ..network() });
        assert_eq!(bench.guest_sends(&packet), passed(&packet));
        bench.tell(&NetworkWanted { floating: vec![Mac([0xfa, 0x16, 0x3e, 0, 0, 99])], ..network() });
        assert_eq!(bench.guest_sends(&packet), passed(&packet), "a pair's address may be anywhere");
        let account = bench.account();
        assert_eq!(account.from_packets[Class::UnknownUnicast as usize], 2);
        assert_eq!(account.from_packets[Class::Unicast as usize], 1);
    });
}

#[test]
fn both_directions_are_counted_by_class_and_as_on_a_wire() {
    in_sandbox(|| {
        let bench = Bench::new(&network());
        let unicast = ipv4("10.0.0.1", "10.0.0.2", Udp::default());
        let mut tcp = unicast.clone();
        tcp[23] = 6;
        tcp.resize(34 + 20 + 2500, 0);
        tcp[46] = 0x50;
        bench.run(FROM_PROGRAM, &unicast, 0, 0);
        bench.run(FROM_PROGRAM, &tcp, 0, 1000);
        let mut group = ipv4("10.0.0.1", "224.0.0.251", Udp::default());
        group[..6].copy_from_slice(&[1, 0, 0x5e, 0, 0, 0xfb]);
        bench.run(FROM_PROGRAM, &group, 0, 0);
        let mut to_guest = unicast.clone();
        to_guest[..6].copy_from_slice(&GUEST);
        let mut flooded = unicast.clone();
        flooded[..6].copy_from_slice(&[0xfa, 0x16, 0x3e, 0, 0, 99]);
        let mut broadcast = unicast.clone();
        broadcast[..6].copy_from_slice(&[0xff; 6]);
        for packet in [&to_guest, &flooded, &broadcast] {
            assert_eq!(bench.run(TO_PROGRAM, packet, 0, 0), passed(packet));
        }
        let account = bench.account();
        let bytes = unicast.len() as u64;
        assert_eq!(account.from_packets, [1 + 3, 0, 1, 0]);
        assert_eq!(account.from_bytes, [bytes + 2500 + 3 * 54, 0, bytes, 0]);
        assert_eq!(account.to_packets, [1, 1, 0, 1]);
        assert_eq!(account.to_bytes, [bytes, bytes, 0, bytes]);
    });
}

#[test]
fn the_tables_hold_what_was_told_and_nothing_else() {
    in_sandbox(|| {
        let bench = Bench::new(&network());
        let dump = |bench: &Bench| bench.plane.inner().tables.dump();
        let first = dump(&bench);
        assert_eq!(first[&VNI].stations.len(), 2);
        assert_eq!(first[&VNI].neighbours.len(), 4);
        let mut wanted = network();
        wanted.forwarding[0].addresses = vec![ip("10.0.0.3")];
        wanted.forwarding.push(Forwarding {
            mac: Mac([0xfa, 0x16, 0x3e, 0, 0, 4]),
            addresses: vec![ip("10.0.0.4")],
            vtep: ip("198.18.0.12"),
        });
        bench.tell(&wanted);
        let inner = bench.plane.inner();
        assert_eq!(
            &inner.tables.dump()[&VNI],
            inner.tables.get(VNI).unwrap(),
            "the kernel's against the agent's"
        );
        assert_eq!(inner.tables.sizes(), [1, 3, 4]);
        drop(inner);
        // Another agent finds the same, and undoes it to the last entry.
        let again = Bench { plane: DataPlane::open(Path::new(BPFFS), Capacity::default()).unwrap() };
        again.tell(&network());
        assert_eq!(dump(&again), first);
        again.plane.remove(VNI).unwrap();
        // Who is still sent to here is remembered for a while.
        let left = dump(&again).remove(&VNI).unwrap();
        assert_eq!(
            (left.stations.keys().copied().collect::<Vec<_>>(), left.neighbours.len()),
            (vec![GUEST], 0)
        );
        let third = Bench { plane: DataPlane::open(Path::new(BPFFS), Capacity::default()).unwrap() };
        third.plane.forget_departed(&mut third.plane.inner(), u64::MAX).unwrap();
        assert!(dump(&third).is_empty(), "also by an agent that starts later");
    });
}

#[test]
fn a_full_map_is_told_and_cuts_nobody_off() {
    in_sandbox(|| {
        let capacity = Capacity { stations: 2, neighbours: 3, ..Capacity::default() };
        let plane = DataPlane::open(Path::new(BPFFS), capacity).unwrap();
        let bench = Bench { plane };
        let mut wanted = network();
        wanted.forwarding.push(Forwarding {
            mac: Mac([0xfa, 0x16, 0x3e, 0, 0, 3]),
            addresses: vec![],
            vtep: ip("198.18.0.13"),
        });
        bench.tell(&wanted);
        let filling = bench.plane.filling();
        assert_eq!(filling.incomplete, 1);
        assert_eq!(filling.entries[1..3], [("stations", 2), ("neighbours", 3)]);
        assert_eq!(bench.plane.full.load(std::sync::atomic::Ordering::Relaxed), 2);
        let mut packet = ipv4("10.0.0.1", "10.0.0.3", Udp::default());
        packet[..6].copy_from_slice(&[0xfa, 0x16, 0x3e, 0, 0, 3]);
        assert_eq!(bench.guest_sends(&packet), passed(&packet));
        drop(bench);
        // With more room, and all that was told and counted still there.
        let bench = Bench { plane: DataPlane::open(Path::new(BPFFS), Capacity::default()).unwrap() };
        assert_eq!(bench.plane.filling().entries[1..3], [("stations", 2), ("neighbours", 3)]);
        assert_eq!(bench.account().from_packets.iter().sum::<u64>(), 1);
        bench.tell(&wanted);
        assert_eq!(bench.plane.filling().incomplete, 0);
        assert_eq!(bench.plane.filling().entries[1..3], [("stations", 3), ("neighbours", 4)]);
    });
}

#[test]
fn counts_go_on_in_a_map_of_another_size() {
    in_sandbox(|| {
        let packet = ipv4("10.0.0.1", "10.0.0.2", Udp::default());
        for (round, accounts) in [100, 200, 300, 100].into_iter().enumerate() {
            let capacity = Capacity { accounts, ..Capacity::default() };
            let bench = Bench { plane: DataPlane::open(Path::new(BPFFS), capacity).unwrap() };
            bench.tell(&network());
            bench.plane.adopt(None).unwrap();
            assert_eq!(bench.account().from_packets[0], round as u64);
            bench.guest_sends(&packet);
            bench.run(TO_PROGRAM, &packet, 0, 0);
            let account = bench.account();
            assert_eq!(
                (account.from_packets[0], account.to_packets[0]),
                (round as u64 + 1, round as u64 + 1)
            );
        }
    });
}

#[test]
fn random_packets_are_each_counted_once_and_never_altered_unless_answered() {
    let seeds: Vec<Vec<u8>> = spoofed()
        .into_iter()
        .map(|(_, packet, _)| packet)
        .chain(honest().into_iter().map(|(_, packet)| packet))
        .chain([
            arp(Arp::request("10.0.0.1", "10.0.0.2")),
            nd(135, "fd00::1", "ff02::1:ff00:2", "fd00::2", 0, &[1, 1, 0xfa, 0x16, 0x3e, 0, 0, 1]),
        ])
        .collect();
    let garbled = (
        prop::sample::select(seeds),
        prop::collection::vec((0..100_usize, any::<u8>()), 0..5),
        60..300_usize,
    );
    in_sandbox(|| {
        let bench = Bench::new(&network());
        proptest!(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(1500) }, |(
            (mut packet, changes, length) in garbled,
        )| {
            for (index, byte) in changes {
                if let Some(place) = packet.get_mut(index) {
                    *place = byte;
                }
            }
            // Cut, but not so much that a test run refuses it.
            packet.truncate(length);
            packet.resize(packet.len().max(60), 0);
            let before = bench.account();
            let run = bench.guest_sends(&packet);
            let after = bench.account();
            let sum = |counts: &[u64]| counts.iter().sum::<u64>();
            prop_assert_eq!(sum(&after.from_packets), sum(&before.from_packets) + 1);
            prop_assert_eq!(sum(&after.from_bytes), sum(&before.from_bytes) + packet.len() as u64);
            let drops = sum(&after.drops) - sum(&before.drops);
            let of = |account: &Account, outcome: Outcome| {
                account.neighbours.iter().map(|counts| counts[outcome as usize]).sum::<u64>()
            };
            let answered = of(&after, Outcome::Answered) - of(&before, Outcome::Answered);
            match run.action {
                NEXT => prop_assert_eq!((drops, answered, &run.packet), (0, 0, &packet)),
                DROP => prop_assert_eq!((drops, answered, &run.packet), (1, 0, &packet)),
                REDIRECT => prop_assert_eq!((drops, answered), (0, 1)),
                other => prop_assert!(false, "{}", other),
            }
            let ends = [Outcome::Answered, Outcome::Suppressed, Outcome::Passed];
            let ended: u64 = ends.into_iter().map(|outcome| of(&after, outcome)).sum();
            prop_assert_eq!(of(&after, Outcome::Seen), ended);
        });
    });
}

#[test]
fn the_verifier_has_room_left() {
    in_sandbox(|| {
        let _bench = Bench::new(&network());
        let loaded = aya::programs::loaded_programs().flatten();
        let ours =
            loaded.filter(|program| program.name_as_str().is_some_and(|name| name.starts_with("port_")));
        for program in ours {
            // A million is the end of it; other kernels take more or fewer for the same program.
            let count = program.verified_instruction_count().unwrap();
            assert!(count < 600_000, "{:?}: {count}", program.name_as_str());
        }
    });
}
