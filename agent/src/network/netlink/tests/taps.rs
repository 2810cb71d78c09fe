//! Taps that are made for guests, and what is on them before a packet passes.

use super::super::{Netlink, tap};
use super::{VNI, local_port, on_a_host, wanted};
use crate::network::HostNetwork;
use crate::network::filtered::Filtered;
use crate::network::keeper::Keeper;
use crate::network::overlay::Overlay;
use crate::network::sandbox::{run, try_run};
use crate::network::wanted::WantedNetworks;
use crate::telemetry::Capacity;
use crate::telemetry::filter::{PortFilter, Room};
use crate::telemetry::plane::DataPlane;
use godwit_protocol::network::NetworkWanted;
use godwit_protocol::port::tap_name;
use std::collections::BTreeSet;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;

/// The host's networks as the agent has them.
fn host(links: Netlink) -> Filtered<Overlay> {
    let bpffs = Path::new("/sys/fs/bpf");
    let plane = Arc::new(DataPlane::open(bpffs, Capacity::default()).unwrap());
    let filter = Arc::new(PortFilter::open(bpffs, Room::default()).unwrap());
    Filtered::new(Overlay::new(links, Some(plane)), Some(filter))
}

fn network() -> NetworkWanted {
    let mut port = local_port(1);
    port.rules = Some(vec![]);
    NetworkWanted { ports: vec![port], ..wanted(&[(2, 12)], &[12]) }
}

fn taps() -> (String, BTreeSet<String>) {
    let name = tap_name(local_port(1).port);
    (name.clone(), BTreeSet::from([name]))
}

/// What iproute2 says between the angle brackets.
fn flags(tap: &str) -> Vec<String> {
    let shown = run(&format!("ip link show dev {tap}"));
    let flags = shown.split(['<', '>']).nth(1).unwrap_or_default();
    flags.split(',').map(str::to_owned).collect()
}

#[test]
fn a_tap_lets_nothing_pass_before_its_programs_are_on_it() {
    on_a_host(|links| {
        let (host, (name, taps)) = (host(links), taps());
        let is_up = || flags(&name).iter().any(|flag| flag == "UP");
        host.ensure(&network()).unwrap();
        host.make_taps(&network(), &taps).unwrap();
        // QEMU has it open and a guest that sends at once: the kernel takes nothing on a link that is down.
        let frame = [[0; 10].as_slice(), &[0xff; 60]].concat();
        let mut guest = tap::open(&name).unwrap();
        let sent = guest.write(&frame).unwrap_err();
        assert_eq!(sent.raw_os_error(), Some(libc::EIO));
        assert!(!is_up());
        host.ensure(&network()).unwrap();
        assert!(!is_up(), "what is on it does not open it");
        let programs = run(&format!("bpftool net show dev {name}"));
        for program in ["port_from_guest", "port_to_guest", "filter_from_guest", "filter_to_guest"] {
            assert!(programs.contains(program), "{program}: {programs}");
        }
        assert!(run(&format!("ip link show dev {name}")).contains(&format!("master gwb{VNI}")));
        host.open_taps(&taps).unwrap();
        assert!(is_up());
        guest.write_all(&frame).unwrap();
        let settings = run(&format!("cat /proc/sys/net/ipv6/conf/{name}/disable_ipv6"));
        assert_eq!(settings.trim(), "1", "the host is not a neighbour of its guests");
    });
}

#[test]
fn a_tap_whose_port_cannot_be_filtered_stays_closed() {
    on_a_host(|links| {
        let (host, (name, taps)) = (Filtered::new(links, None), taps());
        let folder = tempfile::tempdir().unwrap();
        let registry = prometheus::Registry::new();
        let kept = Arc::new(WantedNetworks::open(folder.path()).unwrap());
        kept.keep(&network()).unwrap();
        let keeper = Keeper::new(Arc::new(host), kept, &registry).unwrap();
        let error = keeper.open_taps(&taps).unwrap_err();
        assert!(error.message.contains("security groups"), "{error}");
        assert!(!flags(&name).iter().any(|flag| flag == "UP"));
    });
}

#[test]
fn a_tap_is_there_before_its_guest_and_goes_with_its_port() {
    on_a_host(|links| {
        let (name, taps) = taps();
        let folder = tempfile::tempdir().unwrap();
        let registry = prometheus::Registry::new();
        let kept = Arc::new(WantedNetworks::open(folder.path()).unwrap());
        let keeper = Keeper::new(Arc::new(host(links)), kept, &registry).unwrap();
        let is_there = || try_run(&format!("ip link show dev {name}")).status.success();
        let error = keeper.open_taps(&taps).unwrap_err();
        assert!(error.message.contains(&name), "no network has it: {error}");
        keeper.ensure(&network()).unwrap();
        assert!(!is_there(), "a port whose guest runs elsewhere, or that is somebody else's");
        for _ in 0..2 {
            keeper.open_taps(&taps).unwrap();
            keeper.check();
            assert!(is_there());
            let shown = run(&format!("ip link show dev {name}"));
            assert!(shown.contains("mtu 1500") && shown.contains("NO-CARRIER"), "{shown}");
        }
        // The guest runs here still when its port has gone: its tap goes with it.
        let guest = tap::open(&name).unwrap();
        assert!(flags(&name).iter().any(|flag| flag == "LOWER_UP"));
        keeper.ensure(&NetworkWanted { ports: vec![], ..network() }).unwrap();
        assert!(is_there());
        drop(guest);
        keeper.check();
        assert!(!is_there());
        // A tap that others made is theirs.
        run(&format!("ip link add {name} type veth peer name other"));
        keeper.check();
        assert!(is_there());
    });
}
