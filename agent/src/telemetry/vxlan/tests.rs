//! What the programs count: packets made by hand, given to the programs in the kernel and to the same parser
//! here.

mod attachment;
mod frames;

use super::{Options, Sample, VxlanTelemetry};
use crate::network::sandbox::{in_sandbox, run};
use crate::telemetry::Capacity;
use aya::programs::{SchedClassifier, TestRun, TestRunOptions};
use frames::{Frame, PORT, VNI, catalogue, extension};
use godwit_ebpf_common::packet::{Packet, Size, on_the_wire, parse};
use godwit_ebpf_common::underlay::{Class, Direction, Other};
use proptest::prelude::*;
use std::path::Path;

const BPFFS: &str = "/sys/fs/bpf";

/// The addresses of the outer header that [`Frame`] makes.
const SENDER: [u8; 4] = [198, 18, 0, 1];
const RECEIVER: [u8; 4] = [198, 18, 0, 2];

/// The kernel's TCX_NEXT: the packet goes to the next program, or on its way.
const NEXT: u32 = -1_i32 as u32;

/// A link that nothing passes on, so that only test runs count.
fn quiet_telemetry(options: Options) -> VxlanTelemetry {
    run("ip link add quiet type veth peer name quiet-peer");
    VxlanTelemetry::ensure("quiet", Path::new(BPFFS), options).unwrap()
}

/// Runs a program on a packet, as if the kernel had seen it with this offload, and checks that it lets it
/// pass as it was.
fn run_program(program: &SchedClassifier, packet: &[u8], segments: u32, segment_bytes: u32) {
    // struct __sk_buff, of which a test run takes these fields.
    let mut context = [0; 192];
    context[164..168].copy_from_slice(&segments.to_ne_bytes());
    context[176..180].copy_from_slice(&segment_bytes.to_ne_bytes());
    let mut out = vec![0; packet.len() + 256];
    let result = program.test_run(TestRunOptions {
        data_in: Some(packet),
        data_out: Some(&mut out),
        ctx_in: Some(&context),
        ..TestRunOptions::new()
    });
    let result = result.unwrap_or_else(|error| panic!("{packet:x?}: {error:?}"));
    assert_eq!(result.return_value, NEXT);
    assert_eq!(&out[..result.data_size_out as usize], packet, "the packet was altered");
}

fn others(telemetry: &VxlanTelemetry) -> [u64; Other::ALL.len()] {
    telemetry.read_other().unwrap().map(|(_, packets)| packets)
}

/// What the kernel's program makes of a packet, in the words of the parser.
fn kernel_parse(telemetry: &mut VxlanTelemetry, packet: &[u8]) -> Packet {
    let before = (telemetry.read().unwrap(), others(telemetry));
    run_program(telemetry.program_mut(Direction::Rx), packet, 0, 0);
    let after = (telemetry.read().unwrap(), others(telemetry));
    let counted: Vec<&Sample> = after.0.iter().filter(|sample| !before.0.contains(sample)).collect();
    let other =
        (0..Other::ALL.len()).filter(|index| after.1[*index] == before.1[*index] + 1).collect::<Vec<_>>();
    match (counted.as_slice(), other.as_slice()) {
        ([], []) => Packet::Foreign,
        ([], [index]) => Packet::Other(Other::ALL[*index]),
        ([sample], []) => Packet::Vxlan { vni: sample.vni, class: sample.class, inner: 0 },
        _ => panic!("{packet:x?} was counted more than once: {counted:?}, {other:?}"),
    }
}

/// Where the inner header starts cannot be read from the counters.
fn without_offset(packet: Packet) -> Packet {
    match packet {
        Packet::Vxlan { vni, class, .. } => Packet::Vxlan { vni, class, inner: 0 },
        other => other,
    }
}

#[test]
fn every_kind_of_packet_is_told_apart() {
    for (name, frame, expected) in catalogue() {
        assert_eq!(parse(frame.build().as_slice(), PORT), expected, "{name}");
    }
}

#[test]
fn a_packet_cut_anywhere_is_truncated_unless_it_was_foreign_by_then() {
    for (name, frame, expected) in catalogue() {
        let packet = frame.build();
        let needed = (0..=packet.len()).find(|length| parse(&packet[..*length], PORT) == expected).unwrap();
        for length in 0..needed {
            let cut = parse(&packet[..length], PORT);
            assert_eq!(cut, Packet::Other(Other::Truncated), "{name} cut to {length} bytes");
        }
        if let Packet::Vxlan { inner, .. } = expected {
            assert_eq!(needed, inner + 14, "{name} is counted from its inner header's last byte on");
        }
    }
}

#[test]
fn a_header_that_contradicts_itself_is_malformed() {
    let mut short = Frame::v4().build();
    short[14] = 0x44;
    let mut version = Frame::v4().build();
    version[14] = 0x65;
    let mut version6 = Frame::v6(vec![]).build();
    version6[14] = 0x45;
    for packet in [short, version, version6] {
        assert_eq!(parse(packet.as_slice(), PORT), Packet::Other(Other::Malformed));
    }
}

#[test]
fn an_extension_header_that_points_past_the_end_is_truncated() {
    let mut packet = Frame::v6(vec![(0, extension(0))]).build();
    packet[55] = 255;
    assert_eq!(parse(packet.as_slice(), PORT), Packet::Other(Other::Truncated));
}

#[test]
fn the_kernel_reads_every_packet_as_the_parser_does() {
    in_sandbox(|| {
        let mut telemetry = quiet_telemetry(Options::default());
        for (name, frame, _) in catalogue() {
            let packet = frame.build();
            // A test run takes no IP packet without a whole IP header; behind a VLAN tag it does not look.
            let smallest = match packet[12..14] {
                [0x08, 0x00] => 34,
                [0x86, 0xdd] => 54,
                _ => 15,
            };
            for length in smallest..=packet.len() {
                let cut = &packet[..length];
                let expected = without_offset(parse(cut, PORT));
                assert_eq!(kernel_parse(&mut telemetry, cut), expected, "{name} cut to {length} bytes");
            }
        }
    });
}

#[test]
fn the_kernel_reads_garbled_packets_as_the_parser_does() {
    let frames: Vec<Vec<u8>> = catalogue().into_iter().map(|(_, frame, _)| frame.build()).collect();
    let garbled = (prop::sample::select(frames), prop::collection::vec((12..90_usize, any::<u8>()), 0..4));
    in_sandbox(|| {
        // The map must not fill up with the garbled VNIs.
        let telemetry = std::cell::RefCell::new(quiet_telemetry(Options::default()));
        proptest!(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(400) }, |(
            (mut packet, changes) in garbled,
        )| {
            for (index, byte) in changes {
                if let Some(place) = packet.get_mut(index) {
                    *place = byte;
                }
            }
            let expected = without_offset(parse(packet.as_slice(), PORT));
            prop_assert_eq!(kernel_parse(&mut telemetry.borrow_mut(), &packet), expected);
        });
    });
}

#[test]
fn both_directions_count_packets_and_bytes_by_themselves() {
    in_sandbox(|| {
        let mut telemetry = quiet_telemetry(Options::default());
        let (unicast, broadcast) = (Frame::v4(), Frame { destination: [0xff; 6], ..Frame::v4() });
        let bytes = unicast.build().len() as u64;
        for _ in 0..3 {
            run_program(telemetry.program_mut(Direction::Rx), &unicast.build(), 0, 0);
        }
        run_program(telemetry.program_mut(Direction::Tx), &broadcast.build(), 1, 0);
        let sample = |direction, class, packets| Sample {
            vni: VNI,
            direction,
            class,
            peer: if direction == Direction::Rx { SENDER } else { RECEIVER }.into(),
            packets,
            bytes: packets * bytes,
        };
        let expected =
            vec![sample(Direction::Rx, Class::Unicast, 3), sample(Direction::Tx, Class::Broadcast, 1)];
        assert_eq!(telemetry.read().unwrap(), expected);
    });
}

#[test]
fn an_offloaded_packet_counts_as_its_segments_with_all_their_headers() {
    in_sandbox(|| {
        let mut telemetry = quiet_telemetry(Options::default());
        let packet = Frame::v4().with_tcp(2500).build();
        let headers = packet.len() as u64 - 2500;
        assert_eq!(headers, 50 + 14 + 20 + 32);
        let seen = |telemetry: &VxlanTelemetry| {
            let sample = telemetry.read().unwrap()[0];
            (sample.packets, sample.bytes)
        };
        run_program(telemetry.program_mut(Direction::Tx), &packet, 3, 1000);
        assert_eq!(seen(&telemetry), (3, 2500 + 3 * headers), "counted by the kernel");
        run_program(telemetry.program_mut(Direction::Tx), &packet, 0, 1000);
        assert_eq!(seen(&telemetry), (6, 2 * (2500 + 3 * headers)), "not counted by the kernel yet");
    });
}

#[test]
fn wire_sizes_are_those_of_the_segments() {
    let wire = |frame: &Frame, segments, segment_bytes| {
        let packet = frame.build();
        let Packet::Vxlan { inner, .. } = parse(packet.as_slice(), PORT) else { panic!("not VXLAN") };
        let bytes = packet.len() as u32;
        let traffic =
            on_the_wire(packet.as_slice(), inner, Size { bytes, segments, segment_bytes, tag_bytes: 0 });
        (traffic.packets, traffic.bytes - u64::from(bytes))
    };
    let tcp = Frame::v4().with_tcp(2000);
    assert_eq!(wire(&tcp, 0, 0), (1, 0), "no offload");
    assert_eq!(wire(&tcp, 1, 1448), (1, 0), "one segment");
    assert_eq!(wire(&tcp, 2, 1448), (2, 116), "two segments repeat the headers once");
    assert_eq!(wire(&tcp, 0, 1000), (2, 116), "exactly two");
    assert_eq!(wire(&tcp, 0, 999), (3, 232), "two and a rest");
    let unknown = Frame::v4();
    assert_eq!(wire(&unknown, 5, 10), (5, 0), "inner headers that are not understood are not repeated");
    let mut udp = Frame::v6(vec![]).with_tcp(100);
    udp.inner[11] = 17;
    assert_eq!(wire(&udp, 3, 50), (3, 2 * (70 + 14 + 20 + 8)), "UDP segmentation, outer IPv6");
    let cut = Frame { inner: vec![0x08, 0x00, 0x45], ..Frame::v4() };
    assert_eq!(wire(&cut, 2, 50), (2, 0), "inner headers that are cut");
}

#[test]
fn another_port_can_be_the_one_of_vxlan() {
    in_sandbox(|| {
        let mut telemetry = quiet_telemetry(Options { port: 8472, ..Options::default() });
        let linux = Frame { port: 8472, ..Frame::v4() }.build();
        assert_eq!(kernel_parse(&mut telemetry, &Frame::v4().build()), Packet::Foreign);
        let expected = Packet::Vxlan { vni: VNI, class: Class::Unicast, inner: 0 };
        assert_eq!(kernel_parse(&mut telemetry, &linux), expected);
    });
}

#[test]
fn a_packet_without_room_in_the_map_is_counted_as_that() {
    in_sandbox(|| {
        let mut telemetry = quiet_telemetry(Options {
            capacity: Capacity { traffic: 2, ..Capacity::default() },
            ..Options::default()
        });
        for destination in [frames::UNICAST, [0xff; 6]] {
            let frame = Frame { destination, ..Frame::v4() };
            run_program(telemetry.program_mut(Direction::Rx), &frame.build(), 0, 0);
        }
        assert_eq!(telemetry.read().unwrap().len(), 2);
        for _ in 0..2 {
            run_program(telemetry.program_mut(Direction::Tx), &Frame::v4().build(), 0, 0);
        }
        assert_eq!(telemetry.read().unwrap().len(), 2);
        assert_eq!(others(&telemetry), [0, 0, 0, 0, 2, 0]);
        run_program(telemetry.program_mut(Direction::Rx), &Frame::v4().build(), 0, 0);
        assert_eq!(telemetry.read().unwrap()[0].packets, 2, "what has its entry is counted on");
    });
}
