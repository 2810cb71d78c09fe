//! Packets to try the filter with.

use std::net::IpAddr;

pub(super) const SYN: u8 = 2;

/// Types of ICMP, by family.
pub(super) const ECHO: [u8; 2] = [8, 128];
pub(super) const ECHO_REPLY: [u8; 2] = [0, 129];

/// Makes frames.
pub(super) struct Packet;

impl Packet {
    pub(super) fn v4(protocol: u8, from: [u8; 4], to: [u8; 4], fragment: [u8; 4], payload: &[u8]) -> Vec<u8> {
        let length = (20 + payload.len()) as u16;
        let mut frame = [&[2; 12][..], &[0x08, 0x00, 0x45, 0], &length.to_be_bytes(), &fragment].concat();
        frame.extend([64, protocol, 0, 0]);
        [&frame[..], &from, &to, payload].concat()
    }

    pub(super) fn v6(protocol: u8, from: &str, to: &str, payload: &[u8]) -> Vec<u8> {
        let octets = |text: &str| text.parse::<std::net::Ipv6Addr>().unwrap().octets();
        let length = (payload.len() as u16).to_be_bytes();
        let head = [&[2; 12][..], &[0x86, 0xdd, 0x60, 0, 0, 0], &length, &[protocol, 255]].concat();
        [&head[..], &octets(from), &octets(to), payload].concat()
    }
}

fn ip(protocol: u8, from: &str, to: &str, payload: &[u8]) -> Vec<u8> {
    match (from.parse().unwrap(), to.parse().unwrap()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            Packet::v4(protocol, from.octets(), to.octets(), [0; 4], payload)
        }
        _ => Packet::v6(protocol, from, to, payload),
    }
}

pub(super) fn tcp(from: &str, to: &str, source: u16, destination: u16, flags: u8) -> Vec<u8> {
    let mut segment = [source.to_be_bytes(), destination.to_be_bytes()].concat();
    segment.extend([0; 8]);
    segment.extend([0x50, flags, 0, 0, 0, 0, 0, 0]);
    ip(6, from, to, &segment)
}

pub(super) fn udp(from: &str, to: &str, source: u16, destination: u16) -> Vec<u8> {
    ip(17, from, to, &[source, destination, 20, 0, 1, 2, 3, 4, 5, 6].map(u16::to_be_bytes).concat())
}

pub(super) fn icmp(from: &str, to: &str, kind: [u8; 2], id: u16) -> Vec<u8> {
    let is_v6 = from.contains(':');
    let message = [&[kind[usize::from(is_v6)], 0, 0, 0][..], &id.to_be_bytes(), &[0, 1]].concat();
    ip(if is_v6 { 58 } else { 1 }, from, to, &message)
}

/// A datagram in two parts.
pub(super) fn fragments(from: &str, to: &str, source: u16, destination: u16, id: u16) -> [Vec<u8>; 2] {
    let head = [source, destination, 40, 0].map(u16::to_be_bytes).concat();
    let ([a, b], rest) = (id.to_be_bytes(), [7; 16]);
    match (from.parse().unwrap(), to.parse().unwrap()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => [
            Packet::v4(17, from.octets(), to.octets(), [a, b, 0x20, 0], &head),
            Packet::v4(17, from.octets(), to.octets(), [a, b, 0, 1], &rest),
        ],
        _ => [
            Packet::v6(44, from, to, &[&[17, 0, 0, 1, 0, 0, a, b][..], &head].concat()),
            Packet::v6(44, from, to, &[&[17, 0, 0, 8, 0, 0, a, b][..], &rest].concat()),
        ],
    }
}

/// A router's word that a packet was too big.
pub(super) fn too_big(from: &str, to: &str, quoted: &[u8]) -> Vec<u8> {
    let is_v6 = from.contains(':');
    let head = if is_v6 { [2, 0, 0, 0, 0, 0, 5, 0] } else { [3, 4, 0, 0, 0, 0, 5, 0] };
    // As IPv4 does: the header and eight bytes.
    let enough = if is_v6 { quoted.len() } else { 28 };
    ip(if is_v6 { 58 } else { 1 }, from, to, &[&head[..], &quoted[..enough]].concat())
}
