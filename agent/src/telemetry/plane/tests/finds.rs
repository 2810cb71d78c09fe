//! Programs go by what they found a moment ago, and by what they are told from the next packet on.

use super::frames::{OTHER, Udp, ipv4};
use super::{BPFFS, Bench, LINK, VNI, dropped, guest, network, passed};
use crate::network::sandbox::in_sandbox;
use crate::telemetry::pins::Pins;
use crate::telemetry::shared::{self, STATIONS_PIN};
use aya::maps::HashMap;
use godwit_ebpf_common::tables::{AccountKey, STATIONS_MAP, Station, StationKey};
use godwit_ebpf_common::underlay::Class;
use godwit_protocol::id::PortId;
use godwit_protocol::network::{LocalPort, NetworkWanted};
use std::path::Path;
use std::time::{Duration, Instant};
use uuid::Uuid;

#[test]
fn what_a_host_is_told_holds_from_the_next_packet_on() {
    in_sandbox(|| {
        let bench = Bench::new(&network());
        let packet = ipv4("10.0.0.1", "10.0.0.2", Udp::default());
        let many = |expected| (0..200).all(|_| bench.guest_sends(&packet) == expected);
        let without = NetworkWanted { forwarding: vec![], ..network() };
        for _ in 0..3 {
            assert!(many(passed(&packet)));
            bench.plane.ensure(&without).unwrap();
            assert!(many(dropped(&packet)), "its destination has gone");
            bench.plane.ensure(&network()).unwrap();
        }
        assert!(many(passed(&packet)));
        let other = LocalPort { port: PortId(Uuid::from_u128(2 << 120)), ..guest() };
        bench.plane.inner().ports.set_port(LINK, VNI, &other);
        assert!(many(passed(&packet)));
        let account = bench.account();
        assert_eq!(account.from_packets[Class::UnknownUnicast as usize], 3 * 200);
        assert_eq!(account.from_packets[Class::Unicast as usize], 4 * 200);
        let key = AccountKey { port: 2 << 56, vni: VNI, reserved: 0 };
        assert_eq!(bench.plane.read().unwrap()[&key].from_packets[Class::Unicast as usize], 200);
    });
}

#[test]
fn what_was_found_is_looked_for_again_though_nobody_says_so() {
    in_sandbox(|| {
        let bench = Bench::new(&network());
        let packet = ipv4("10.0.0.1", "10.0.0.2", Udp::default());
        assert_eq!(bench.guest_sends(&packet), passed(&packet));
        // As an agent of a version would do it that knows of no generations.
        let pins = Pins::open(Path::new(BPFFS)).unwrap();
        let mut stations: HashMap<_, StationKey, Station> =
            shared::open(&pins, STATIONS_PIN, STATIONS_MAP).unwrap();
        stations.remove(&StationKey::new(VNI, OTHER)).unwrap();
        let begin = Instant::now();
        while bench.guest_sends(&packet) != dropped(&packet) {
            assert!(begin.elapsed() < Duration::from_secs(20), "it is still known");
        }
    });
}
