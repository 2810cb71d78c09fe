//! What happens around the programs: real packets, restarts, links that come and go.

use super::BPFFS;
use crate::metrics::{Exposition as _, Text};
use crate::network::sandbox::{add_host, in_namespace, in_sandbox, run, try_run};
use crate::telemetry::vxlan::{Options, VxlanCollector, VxlanTelemetry, side};
use crate::telemetry::{Capacity, TelemetryError};
use aya::programs::SchedClassifier;
use aya::sys::{Stats, enable_stats};
use godwit_ebpf_common::underlay::{Class, Direction};
use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream, UdpSocket};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

const VNI: u32 = 42;

/// Two hosts with a VXLAN of the kernel's own between them, and nothing else on their underlay: h1 is
/// 10.1.0.1 in it, h2 is 10.1.0.2. Each counts what leaves by its eth0 in a qdisc.
fn two_hosts() {
    for (host, last) in [("h1", 11), ("h2", 12)] {
        add_host(host, &format!("198.18.0.{last}"));
        in_namespace(host, || {
            for links in ["all", "default"] {
                fs::write(format!("/proc/sys/net/ipv6/conf/{links}/disable_ipv6"), "1").unwrap();
            }
        });
    }
    let mac =
        |host: &str, link: &str| run(&format!("ip netns exec {host} cat /sys/class/net/{link}/address"));
    for (host, own, peer) in [("h1", 1, 2), ("h2", 2, 1)] {
        run(&format!(
            "ip -n {host} link add vx type vxlan id {VNI} dev eth0 local 198.18.0.1{own} \
             remote 198.18.0.1{peer} dstport 4789"
        ));
        run(&format!("ip -n {host} address add 10.1.0.{own}/24 broadcast 10.1.0.255 dev vx"));
        run(&format!("ip -n {host} link set vx up"));
    }
    for (host, other, peer) in [("h1", "h2", 2), ("h2", "h1", 1)] {
        for (link, address) in [("eth0", format!("198.18.0.1{peer}")), ("vx", format!("10.1.0.{peer}"))] {
            let mac = mac(other, link);
            run(&format!(
                "ip -n {host} neighbour replace {address} dev {link} lladdr {} nud permanent",
                mac.trim()
            ));
        }
        run(&format!("tc -n {host} qdisc replace dev eth0 root pfifo limit 100000"));
    }
}

/// Packets and bytes that left by a host's eth0, by the account of its qdisc.
fn left(host: &str) -> (u64, u64) {
    let json = run(&format!("tc -n {host} -s -j qdisc show dev eth0"));
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json[0]["drops"], 0);
    (json[0]["packets"].as_u64().unwrap(), json[0]["bytes"].as_u64().unwrap())
}

fn ensure(host: &str, options: Options) -> VxlanTelemetry {
    in_namespace(host, || VxlanTelemetry::ensure("eth0", Path::new(BPFFS), options)).unwrap()
}

/// Packets and bytes of all classes, one way.
fn counted(telemetry: &VxlanTelemetry, direction: Direction) -> (u64, u64) {
    let samples = telemetry.read().unwrap().into_iter();
    let samples = samples.filter(|sample| sample.vni == VNI && sample.direction == direction);
    samples.fold((0, 0), |sum, sample| (sum.0 + sample.packets, sum.1 + sample.bytes))
}

fn by_class(telemetry: &VxlanTelemetry) -> BTreeMap<(Direction, Class), u64> {
    let samples = telemetry.read().unwrap().into_iter();
    samples.map(|sample| ((sample.direction, sample.class), sample.packets)).collect()
}

fn ping(count: u32) {
    run(&format!("ip netns exec h1 ping -q -c {count} -i 0.02 -W 2 10.1.0.2"));
}

/// How many programs are attached to a host's eth0, on both sides.
fn attached(host: &str) -> usize {
    let attached = |direction| SchedClassifier::query_tcx("eth0", side(direction)).unwrap().1.len();
    in_namespace(host, || Direction::ALL.map(attached)).iter().sum()
}

/// Waits for what the kernel does in its own time: detach what nothing holds any more, deliver what was sent.
fn eventually(done: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(5);
    while !done() && Instant::now() < deadline {
        thread::sleep(Duration::from_millis(5));
    }
}

fn pinned() -> Vec<String> {
    let Ok(folder) = fs::read_dir(Path::new(BPFFS).join("godwit")) else { return Vec::new() };
    let mut names: Vec<_> = folder.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort_unstable();
    names
}

#[test]
fn every_packet_between_two_hosts_is_counted_in_its_class() {
    in_sandbox(|| {
        two_hosts();
        let telemetry = ensure("h1", Options::default());
        ping(7);
        assert!(!try_run("ip netns exec h1 ping -q -b -c 3 -i 0.02 -W 1 10.1.0.255").status.success());
        assert!(!try_run("ip netns exec h1 ping -q -I vx -c 2 -i 0.02 -W 1 224.0.0.1").status.success());
        let expected = [
            ((Direction::Rx, Class::Unicast), 7),
            ((Direction::Tx, Class::Unicast), 7),
            ((Direction::Tx, Class::Broadcast), 3),
            ((Direction::Tx, Class::Multicast), 2),
        ];
        assert_eq!(by_class(&telemetry), expected.into());
        assert_eq!(counted(&telemetry, Direction::Tx), left("h1"));
        assert_eq!(counted(&telemetry, Direction::Rx), left("h2"));
    });
}

#[test]
fn offloaded_streams_are_counted_as_what_is_on_the_wire() {
    const STREAM_BYTES: usize = 8 << 20;
    in_sandbox(|| {
        two_hosts();
        let telemetry = ensure("h1", Options::default());
        let _measuring = enable_stats(Stats::RunTime).unwrap();
        let listener = in_namespace("h2", || TcpListener::bind("10.1.0.2:7777").unwrap());
        let server = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut received = Vec::new();
            stream.read_to_end(&mut received).unwrap();
            stream.write_all(&received).unwrap();
        });
        let mut stream = in_namespace("h1", || TcpStream::connect("10.1.0.2:7777").unwrap());
        stream.write_all(&vec![7; STREAM_BYTES]).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let mut received = Vec::new();
        stream.read_to_end(&mut received).unwrap();
        server.join().unwrap();
        assert_eq!(received.len(), STREAM_BYTES);
        drop(stream);
        let seen = || [counted(&telemetry, Direction::Tx), counted(&telemetry, Direction::Rx)];
        // The last acknowledgements may still be on their way.
        eventually(|| seen() == [left("h1"), left("h2")]);
        assert_eq!(seen(), [left("h1"), left("h2")]);
        for (cost, (packets, bytes)) in telemetry.read_cost().unwrap().into_iter().zip(seen()) {
            assert!(bytes > STREAM_BYTES as u64);
            assert!(cost.runs > 0 && cost.runs < packets / 2, "{} runs, {packets} packets", cost.runs);
            assert!(!cost.time.is_zero());
        }
    });
}

#[test]
fn counting_goes_on_without_an_agent_and_with_the_next_one() {
    in_sandbox(|| {
        two_hosts();
        drop(ensure("h1", Options::default()));
        ping(5);
        let telemetry = ensure("h1", Options::default());
        assert_eq!(by_class(&telemetry)[&(Direction::Tx, Class::Unicast)], 5);
        ping(5);
        assert_eq!(counted(&telemetry, Direction::Tx), left("h1"));
        assert_eq!(counted(&telemetry, Direction::Rx), left("h2"));
        assert_eq!(attached("h1"), 2, "one program a side");
    });
}

#[test]
fn no_packet_is_missed_or_counted_twice_while_the_programs_are_exchanged() {
    in_sandbox(|| {
        two_hosts();
        let mut telemetry = ensure("h1", Options::default());
        let sender = in_namespace("h1", || UdpSocket::bind("10.1.0.1:0").unwrap());
        let exchanged = AtomicBool::new(false);
        let sent = thread::scope(|scope| {
            let sending = scope.spawn(|| {
                let mut packets = 0_u64;
                while !exchanged.load(Ordering::Relaxed) {
                    // Nobody listens: that the other host says so is an error of the next call.
                    packets += u64::from(sender.send_to(&[0; 100], "10.1.0.2:9").is_ok());
                }
                packets
            });
            for _ in 0..20 {
                telemetry = ensure("h1", Options::default());
            }
            exchanged.store(true, Ordering::Relaxed);
            sending.join().unwrap()
        });
        assert_eq!(left("h1").0, sent);
        assert_eq!(counted(&telemetry, Direction::Tx), left("h1"));
        assert_eq!(counted(&telemetry, Direction::Rx), left("h2"));
    });
}

#[test]
fn a_map_of_another_size_is_made_anew_with_what_the_old_one_counted() {
    in_sandbox(|| {
        two_hosts();
        let sized =
            |traffic| Options { capacity: Capacity { traffic, ..Capacity::default() }, ..Options::default() };
        for (round, traffic) in [100, 200, 100, 100].into_iter().enumerate() {
            let telemetry = ensure("h1", sized(traffic));
            ping(5);
            let expected = (round as u64 + 1) * 5;
            assert_eq!(by_class(&telemetry)[&(Direction::Tx, Class::Unicast)], expected);
            assert_eq!(counted(&telemetry, Direction::Tx), left("h1"));
            assert_eq!(attached("h1"), 2);
        }
    });
}

#[test]
fn a_map_of_another_layout_is_made_anew() {
    let strange = [
        "type percpu_hash key 24 value 24 entries 65536 name TRAFFIC_V2",
        "type percpu_hash key 4 value 16 entries 65536 name TRAFFIC_V2",
        "type hash key 24 value 16 entries 65536 name TRAFFIC_V2",
        "type percpu_hash key 24 value 16 entries 65536 name TRAFFIC_V1",
    ];
    in_sandbox(|| {
        two_hosts();
        for layout in strange {
            fs::create_dir_all(format!("{BPFFS}/godwit")).unwrap();
            run(&format!("bpftool map create {BPFFS}/godwit/underlay_traffic {layout}"));
            let telemetry = ensure("h1", Options::default());
            ping(2);
            assert_eq!(by_class(&telemetry)[&(Direction::Tx, Class::Unicast)], 2, "{layout}");
            telemetry.remove().unwrap();
        }
    });
}

#[test]
fn what_was_counted_in_an_earlier_layout_is_taken_over() {
    in_sandbox(|| {
        two_hosts();
        let pins = format!("{BPFFS}/godwit");
        fs::create_dir_all(&pins).unwrap();
        // As agents had it before peers were told apart.
        for (pin, layout, key, value) in [
            (
                "underlay_traffic",
                "type percpu_hash key 8 value 16 entries 8192 name TRAFFIC_V1",
                "233 3 0 0 1 0 0 0",
                "5 0 0 0 0 0 0 0 200 0 0 0 0 0 0 0",
            ),
            (
                "underlay_other",
                "type percpu_array key 4 value 8 entries 5 name OTHER_V1",
                "3 0 0 0",
                "7 0 0 0 0 0 0 0",
            ),
        ] {
            run(&format!("bpftool map create {pins}/{pin} {layout}"));
            run(&format!("bpftool map update pinned {pins}/{pin} key {key} value {value}"));
        }
        let cpus = aya::util::nr_cpus().unwrap() as u64;
        for _ in 0..2 {
            let telemetry = ensure("h1", Options::default());
            let samples = telemetry.read().unwrap();
            let [sample] = samples.as_slice() else { panic!("{samples:?}") };
            assert_eq!((sample.vni, sample.direction, sample.class), (1001, Direction::Tx, Class::Unicast));
            assert_eq!((sample.packets, sample.bytes), (5 * cpus, 200 * cpus));
            assert!(sample.peer.is_unspecified(), "nobody knows with whom");
            let others = telemetry.read_other().unwrap();
            assert_eq!(others.map(|(_, count)| count), [0, 0, 0, 7 * cpus, 0, 0]);
        }
        ensure("h1", Options::default()).remove().unwrap();
        assert!(!fs::exists(pins).unwrap(), "nothing of it is left");
    });
}

#[test]
fn the_programs_follow_the_underlay_to_another_link() {
    in_sandbox(|| {
        two_hosts();
        run("ip -n h1 link add eth9 type veth peer name eth8");
        let elsewhere = in_namespace("h1", || {
            VxlanTelemetry::ensure("eth9", Path::new(BPFFS), Options::default()).unwrap()
        });
        ping(2);
        assert_eq!(elsewhere.read().unwrap(), []);
        drop(elsewhere);
        let telemetry = ensure("h1", Options::default());
        ping(4);
        assert_eq!(counted(&telemetry, Direction::Rx).0, 4);
        let left_behind =
            in_namespace("h1", || SchedClassifier::query_tcx("eth9", side(Direction::Rx)).unwrap().1.len());
        assert_eq!(left_behind, 0);
    });
}

#[test]
fn the_programs_come_back_to_a_link_that_was_made_anew() {
    in_sandbox(|| {
        run("ip link add eth0 type veth peer name peer");
        let before = VxlanTelemetry::ensure("eth0", Path::new(BPFFS), Options::default()).unwrap();
        let is_attached = |telemetry: &VxlanTelemetry| {
            Direction::ALL.map(|direction| telemetry.is_attached(direction).unwrap())
        };
        assert_eq!(is_attached(&before), [true; 2]);
        run("ip link del eth0");
        assert_eq!(is_attached(&before), [false; 2]);
        run("ip link add eth0 type veth peer name peer");
        assert_eq!(is_attached(&before), [false; 2]);
        let after = VxlanTelemetry::ensure("eth0", Path::new(BPFFS), Options::default()).unwrap();
        assert_eq!(is_attached(&after), [true; 2]);
        for direction in Direction::ALL {
            assert_eq!(SchedClassifier::query_tcx("eth0", side(direction)).unwrap().1.len(), 1);
        }
    });
}

#[test]
fn others_programs_on_the_link_stay_and_see_the_packets_too() {
    in_sandbox(|| {
        two_hosts();
        fs::create_dir("/run/bpf").unwrap();
        run("mount -t bpf bpf /run/bpf");
        let other = in_namespace("h1", || {
            VxlanTelemetry::ensure("eth0", Path::new("/run/bpf"), Options::default()).unwrap()
        });
        let ours = ensure("h1", Options::default());
        assert_eq!(attached("h1"), 4);
        ping(3);
        assert_eq!(ours.read().unwrap(), other.read().unwrap());
        assert_eq!(counted(&ours, Direction::Rx).0, 3);
    });
}

#[test]
fn removing_leaves_nothing_in_the_kernel() {
    in_sandbox(|| {
        two_hosts();
        let telemetry = ensure("h1", Options::default());
        let names = pinned();
        for own in
            ["underlay_egress", "underlay_ingress", "underlay_other", "underlay_stale", "underlay_traffic"]
        {
            assert!(names.iter().any(|name| name == own), "{names:?}");
        }
        telemetry.remove().unwrap();
        eventually(|| attached("h1") == 0);
        assert_eq!(attached("h1"), 0);
        assert!(!Path::new(BPFFS).join("godwit").exists());
        assert_eq!(ensure("h1", Options::default()).read().unwrap(), [], "counts went with it");
    });
}

#[test]
fn what_is_missing_is_named_with_what_to_do() {
    in_sandbox(|| {
        two_hosts();
        let on_h1 = |link: &str, bpffs: &str| {
            let ensured =
                in_namespace("h1", || VxlanTelemetry::ensure(link, Path::new(bpffs), Options::default()));
            ensured.map(|_| ()).unwrap_err()
        };
        let error = on_h1("eth7", BPFFS);
        assert!(matches!(error, TelemetryError::NoLink { .. }), "{error}");
        assert!(error.to_string().contains("underlay_link"), "{error}");
        let error = on_h1("eth0", "/run");
        assert!(matches!(error, TelemetryError::NoBpffs { .. }), "{error}");
        assert!(error.to_string().contains("mount -t bpf bpf /run"), "{error}");
        assert_eq!((pinned().len(), attached("h1")), (0, 0));
    });
}

#[test]
fn a_scrape_shows_what_the_kernel_counted() {
    in_sandbox(|| {
        two_hosts();
        let telemetry = Arc::new(ensure("h1", Options::default()));
        let collector = VxlanCollector::new(Arc::clone(&telemetry));
        let scrape = || {
            let mut text = String::new();
            let mut take = |piece: String| text.push_str(&piece);
            in_namespace("h1", || collector.write(&mut Text::new(&mut take)));
            text
        };
        assert!(!scrape().contains("godwit_vxlan_packets_total"), "nothing was counted yet");
        ping(4);
        let (_, bytes) = left("h1");
        let expected = [
            r#"godwit_vxlan_packets_total{vni="42",direction="rx",class="unicast",peer="198.18.0.12"} 4"#
                .to_owned(),
            r#"godwit_vxlan_packets_total{vni="42",direction="tx",class="unicast",peer="198.18.0.12"} 4"#
                .to_owned(),
            format!(
                r#"godwit_vxlan_bytes_total{{vni="42",direction="tx",class="unicast",peer="198.18.0.12"}} {bytes}"#
            ),
            r#"godwit_vxlan_other_packets_total{reason="truncated"} 0"#.to_owned(),
            r#"godwit_vxlan_other_packets_total{reason="map_full"} 0"#.to_owned(),
            r#"godwit_vxlan_program_attached{direction="rx"} 1"#.to_owned(),
            "godwit_vxlan_reads_failed_total 0".to_owned(),
        ];
        for _ in 0..2 {
            let text = scrape();
            for line in &expected {
                assert!(text.lines().any(|found| found == line), "no {line} in:\n{text}");
            }
        }
    });
}
