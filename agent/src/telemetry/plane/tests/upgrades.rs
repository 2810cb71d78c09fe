//! Agents of two versions, one after the other, on a host whose guest sends all the while.

use super::super::DataPlane;
use super::taps::{Site, VNI, bpffs, choice, port, site, wanted};
use crate::network::HostNetwork;
use crate::network::netlink::Netlink;
use crate::network::overlay::Overlay;
use crate::network::sandbox::{in_namespace, in_sandbox, run};
use crate::telemetry::Capacity;
use crate::telemetry::shared::Version;
use crate::telemetry::vxlan::{Options, VxlanTelemetry};
use godwit_ebpf_common::tables::{ACCOUNT_MAP, LOST_MAP, STATIONS_MAP};
use godwit_protocol::port::tap_name;
use std::net::UdpSocket;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

/// Maps of which a later version has another layout: counts, and what hosts are told.
const RENAMED: &[(&str, &str)] =
    &[(ACCOUNT_MAP, "ACCOUNT_V2"), (LOST_MAP, "LOST_V2"), (STATIONS_MAP, "STATIONS_V2")];

/// Programs as a later version has them: these, with the layouts' numbers raised.
fn later() -> Version {
    let rename = |object: &[u8]| {
        let mut object = object.to_vec();
        for (ours, theirs) in RENAMED {
            for at in 0..object.len() - ours.len() {
                if object[at..].starts_with(ours.as_bytes()) {
                    object[at..at + ours.len()].copy_from_slice(theirs.as_bytes());
                }
            }
        }
        object.into()
    };
    let Version { port, underlay, .. } = Version::OURS;
    Version { port: rename(&port), underlay: rename(&underlay), renamed: RENAMED }
}

/// The first host's agent is killed, and one of another version started.
fn exchange(one: &mut Site, version: &Version) {
    in_namespace("h1", || {
        let (folder, capacity) = (bpffs(1), Capacity::default());
        let mut underlay =
            VxlanTelemetry::open_version("eth0", &folder, Options::default(), version).unwrap();
        let plane = Arc::new(DataPlane::open_version(&folder, capacity, version).unwrap());
        let overlay = Overlay::new(Netlink::open(&choice(1)).unwrap(), Some(plane.clone()));
        overlay.ensure(&wanted(1)).unwrap();
        plane.adopt(Some(&mut underlay)).unwrap();
        (one.plane, one.overlay, one.underlay) = (Some(plane), overlay, underlay);
    });
}

/// Packets that the guest has sent, as the kernel counts them at its tap.
fn at_the_tap() -> u64 {
    let tap = tap_name(port(1).port);
    run(&format!("ip netns exec h1 cat /sys/class/net/{tap}/statistics/rx_packets")).trim().parse().unwrap()
}

#[test]
fn agents_of_other_versions_take_over_without_a_packet_or_a_count_lost() {
    in_sandbox(|| {
        let (mut one, _two) = (site(1, true), site(2, true));
        let counted = |one: &Site| one.account().from_packets.iter().sum::<u64>();
        // What the guest says before its tap has programs, which here is nothing that has to be known.
        let before = at_the_tap() - counted(&one);
        let receiver = in_namespace("g2", || UdpSocket::bind("10.0.0.2:9").unwrap());
        receiver.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
        let sender = in_namespace("g1", || UdpSocket::bind("10.0.0.1:9").unwrap());
        let (sent, done) = (AtomicU64::new(0), AtomicBool::new(false));
        let send_more = || {
            let until = sent.load(Ordering::Relaxed) + 50;
            while sent.load(Ordering::Relaxed) < until {
                thread::sleep(Duration::from_millis(1));
            }
        };
        let received = thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) && sent.load(Ordering::Relaxed) < 20_000 {
                    sender.send_to(&[0; 100], "10.0.0.2:9").unwrap();
                    sent.fetch_add(1, Ordering::Relaxed);
                    thread::sleep(Duration::from_millis(1));
                }
            });
            let receiving = scope.spawn(|| {
                let (mut packets, mut buffer) = (0_u64, [0; 200]);
                while receiver.recv(&mut buffer).is_ok() {
                    packets += 1;
                }
                packets
            });
            send_more();
            exchange(&mut one, &later());
            send_more();
            assert!(counted(&one) >= 50, "an upgrade takes over what was counted");
            exchange(&mut one, &Version::OURS);
            let back = counted(&one);
            send_more();
            assert!(back < 50 && counted(&one) >= 50, "a version before begins at zero, and counts");
            exchange(&mut one, &later());
            send_more();
            done.store(true, Ordering::Relaxed);
            receiving.join().unwrap()
        });
        assert_eq!(received, sent.load(Ordering::Relaxed), "every packet has arrived");
        assert_eq!(before + counted(&one), at_the_tap(), "every packet is counted once");
        assert!(one.plane.as_ref().unwrap().read().unwrap().keys().all(|key| key.vni == VNI));
        let left = std::fs::read_dir(bpffs(1).join("godwit")).unwrap();
        let left = left.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        // Of the counts of what was lost the earlier ones are read along.
        let left: Vec<String> =
            left.filter(|name| name.contains("_aside") && !name.starts_with("lost")).collect();
        assert_eq!(left, <[&str; 0]>::default());
    });
}
