//! Frames made by hand, and what they say.

use crate::site::{Station, VXLAN_PORT};
use std::net::{IpAddr, Ipv6Addr};

pub(crate) const BROADCAST: [u8; 6] = [0xff; 6];

/// By which a neighbour is asked for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Protocol {
    Arp,
    Nd,
}

/// A question or an answer, as it was read.
pub(crate) struct Message {
    pub(crate) is_question: bool,
    /// The Ethernet address that it gives for the sender.
    pub(crate) mac: [u8; 6],
    /// Numbers of the stations that it is from and about.
    pub(crate) sender: u32,
    pub(crate) target: u32,
}

fn ethernet(destination: [u8; 6], source: [u8; 6], kind: u16) -> Vec<u8> {
    [&destination[..], &source, &kind.to_be_bytes()].concat()
}

/// Who has the target?
pub(crate) fn question(protocol: Protocol, from: Station, target: Station) -> Vec<u8> {
    match protocol {
        Protocol::Arp => arp(1, from, BROADCAST, [0; 6], target),
        Protocol::Nd => {
            let [.., a, b, c] = target.v6().octets();
            let group = Ipv6Addr::from_bits(0xff02_0000_0000_0000_0000_0001_ff00_0000).to_bits()
                | u128::from(u32::from_be_bytes([0, a, b, c]));
            let body = nd(135, 0, target.v6(), 1, from.mac());
            icmp6(from, [0x33, 0x33, 0xff, a, b, c], Ipv6Addr::from_bits(group), body)
        }
    }
}

/// I have it.
pub(crate) fn answer(protocol: Protocol, from: Station, to: Station) -> Vec<u8> {
    match protocol {
        Protocol::Arp => arp(2, from, to.mac(), to.mac(), to),
        Protocol::Nd => icmp6(from, to.mac(), to.v6(), nd(136, 0x60, from.v6(), 2, from.mac())),
    }
}

fn arp(operation: u8, from: Station, to: [u8; 6], target_mac: [u8; 6], target: Station) -> Vec<u8> {
    [
        ethernet(to, from.mac(), 0x0806),
        vec![0, 1, 8, 0, 6, 4, 0, operation],
        from.mac().to_vec(),
        from.v4().octets().to_vec(),
        target_mac.to_vec(),
        target.v4().octets().to_vec(),
    ]
    .concat()
}

fn nd(kind: u8, flags: u8, target: Ipv6Addr, option: u8, mac: [u8; 6]) -> Vec<u8> {
    [&[kind, 0, 0, 0, flags, 0, 0, 0][..], &target.octets(), &[option, 1], &mac].concat()
}

/// The Internet checksum (RFC 1071) of an even number of bytes.
fn checksum(mut sum: u32, bytes: &[u8]) -> u16 {
    for word in bytes.chunks(2) {
        sum += u32::from(u16::from_be_bytes([word[0], word[1]]));
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

fn icmp6(from: Station, to: [u8; 6], destination: Ipv6Addr, mut body: Vec<u8>) -> Vec<u8> {
    let (source, destination) = (from.v6().octets(), destination.octets());
    let pseudo = [&source[..], &destination, &body].concat();
    let sum = checksum(58 + body.len() as u32, &pseudo);
    body[2..4].copy_from_slice(&sum.to_be_bytes());
    let length = (body.len() as u16).to_be_bytes();
    let header = [&[0x60, 0, 0, 0][..], &length, &[58, 255], &source, &destination].concat();
    [ethernet(to, from.mac(), 0x86dd), header, body].concat()
}

/// What a frame says about neighbours; none if it is about something else.
pub(crate) fn read(frame: &[u8]) -> Option<Message> {
    let number = |at: usize| {
        let bytes = frame.get(at..at + 3)?;
        Some(u32::from_be_bytes([0, bytes[0], bytes[1], bytes[2]]))
    };
    let mac = |at: usize| frame.get(at..at + 6)?.try_into().ok();
    match frame.get(12..14)? {
        [8, 6] => Some(Message {
            is_question: frame.get(21) == Some(&1),
            mac: mac(22)?,
            sender: number(29)?,
            target: number(39)?,
        }),
        [0x86, 0xdd] if frame.get(20) == Some(&58) && matches!(frame.get(54), Some(135 | 136)) => {
            Some(Message {
                is_question: frame[54] == 135,
                mac: mac(80)?,
                sender: number(35)?,
                target: number(75)?,
            })
        }
        _ => None,
    }
}

/// A UDP packet of so many payload bytes, or a TCP segment with this many payload bytes.
pub(crate) fn ipv4(from: Station, to: Station, is_tcp: bool, payload: usize) -> Vec<u8> {
    let upper = if is_tcp { 20 } else { 8 };
    let length = (20 + upper + payload) as u16;
    let [a, b] = length.to_be_bytes();
    let protocol = if is_tcp { 6 } else { 17 };
    let mut frame = ethernet(to.mac(), from.mac(), 0x0800);
    frame.extend([0x45, 0, a, b, 0, 0, 0x40, 0, 64, protocol, 0, 0]);
    frame.extend(from.v4().octets());
    frame.extend(to.v4().octets());
    // A bridge may look at it.
    let sum = checksum(0, &frame[14..34]);
    frame[24..26].copy_from_slice(&sum.to_be_bytes());
    frame.extend(5000_u16.to_be_bytes());
    frame.extend(5001_u16.to_be_bytes());
    if is_tcp {
        frame.extend([0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 0x20, 0, 0, 0, 0, 0]);
    } else {
        frame.extend(((8 + payload) as u16).to_be_bytes());
        frame.extend([0, 0]);
    }
    frame.resize(frame.len() + payload, 0x5a);
    frame
}

/// A frame in VXLAN, on an IPv4 underlay.
pub(crate) fn vxlan(vni: u32, source: IpAddr, destination: IpAddr, frame: &[u8]) -> Vec<u8> {
    let octets = |address| match address {
        IpAddr::V4(address) => address.octets(),
        IpAddr::V6(_) => unreachable!("the underlay of this bench is IPv4"),
    };
    let udp_bytes = 16 + frame.len();
    let [a, b] = ((20 + udp_bytes) as u16).to_be_bytes();
    let mut packet = ethernet([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2], 0x0800);
    packet.extend([0x45, 0, a, b, 0, 0, 0, 0, 64, 17, 0, 0]);
    packet.extend(octets(source));
    packet.extend(octets(destination));
    packet.extend(40_000_u16.to_be_bytes());
    packet.extend(VXLAN_PORT.to_be_bytes());
    packet.extend((udp_bytes as u16).to_be_bytes());
    packet.extend([0, 0, 8, 0, 0, 0]);
    packet.extend((vni << 8).to_be_bytes());
    packet.extend(frame);
    packet
}
