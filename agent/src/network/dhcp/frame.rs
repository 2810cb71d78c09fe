//! Ethernet, IP and UDP around a DHCP message.

use godwit_protocol::port::Mac;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

const ETHERNET: usize = 14;
const IPV6: usize = 40;
const UDP: usize = 8;
const PROTOCOL_UDP: u8 = 17;

/// Longest life of a packet that never leaves the host.
const HOPS: u8 = 64;

/// A question.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Asked {
    /// The guest's Ethernet address.
    pub(super) mac: Mac,
    /// The guest's address, which may be none yet.
    pub(super) source: IpAddr,
    /// The message.
    pub(super) message: Vec<u8>,
}

impl Asked {
    /// Reads a frame that the filter has taken for DHCP; none if it is not whole.
    pub(super) fn read(frame: &[u8]) -> Option<Self> {
        let mac = Mac(frame.get(6..12)?.try_into().ok()?);
        let packet = frame.get(ETHERNET..)?;
        let (source, udp): (IpAddr, &[u8]) = match packet.first()? >> 4 {
            4 => {
                let source: [u8; 4] = packet.get(12..16)?.try_into().ok()?;
                let length = usize::from(u16::from_be_bytes(packet.get(2..4)?.try_into().ok()?));
                (source.into(), packet.get(usize::from(packet.first()? & 15) * 4..length)?)
            }
            6 if packet.get(6) == Some(&PROTOCOL_UDP) => {
                let source: [u8; 16] = packet.get(8..24)?.try_into().ok()?;
                (source.into(), packet.get(IPV6..)?)
            }
            _ => return None,
        };
        let length = usize::from(u16::from_be_bytes(udp.get(4..6)?.try_into().ok()?));
        Some(Self { mac, source, message: udp.get(UDP..length)?.to_vec() })
    }

    /// Whether it is DHCP, and not DHCPv6.
    pub(super) fn is_v4(&self) -> bool {
        self.source.is_ipv4()
    }
}

/// Where a message goes, and from where.
#[derive(Clone, Copy, Debug)]
pub(super) struct Path<A> {
    /// From which Ethernet address.
    pub(super) from: Mac,
    /// To which.
    pub(super) to: Mac,
    /// From which address.
    pub(super) source: A,
    /// To which.
    pub(super) destination: A,
}

/// A message from a DHCP server to a client (RFC 2131).
pub(super) fn v4(path: Path<Ipv4Addr>, message: &[u8]) -> Vec<u8> {
    let length = (20 + UDP + message.len()) as u16;
    let mut frame = ethernet(path.to, path.from, [0x08, 0x00]);
    let mut header = vec![0x45, 0];
    header.extend(length.to_be_bytes());
    header.extend([0, 0, 0x40, 0, HOPS, PROTOCOL_UDP, 0, 0]);
    header.extend(path.source.octets());
    header.extend(path.destination.octets());
    let sum = checksum(&header, 0);
    header[10..12].copy_from_slice(&sum.to_be_bytes());
    frame.extend(header);
    let pseudo = [path.source.octets(), path.destination.octets()].concat();
    frame.extend(udp(67, 68, &pseudo, message));
    frame
}

/// A message from a DHCPv6 server to a client (RFC 8415).
pub(super) fn v6(path: Path<Ipv6Addr>, message: &[u8]) -> Vec<u8> {
    let mut frame = ethernet(path.to, path.from, [0x86, 0xdd]);
    frame.extend([0x60, 0, 0, 0]);
    frame.extend(((UDP + message.len()) as u16).to_be_bytes());
    frame.extend([PROTOCOL_UDP, HOPS]);
    frame.extend(path.source.octets());
    frame.extend(path.destination.octets());
    let pseudo = [path.source.octets(), path.destination.octets()].concat();
    frame.extend(udp(547, 546, &pseudo, message));
    frame
}

fn ethernet(to: Mac, from: Mac, ethertype: [u8; 2]) -> Vec<u8> {
    [&to.0[..], &from.0, &ethertype].concat()
}

fn udp(source: u16, destination: u16, pseudo: &[u8], message: &[u8]) -> Vec<u8> {
    let length = (UDP + message.len()) as u16;
    let mut datagram = [source, destination, length, 0].map(u16::to_be_bytes).concat();
    datagram.extend(message);
    // Over the addresses, protocol and length, and then all (RFC 768; RFC 8200, 8.1); zero is written as its other
    // form.
    let sum = match checksum(&[pseudo, &datagram].concat(), u32::from(PROTOCOL_UDP) + u32::from(length)) {
        0 => u16::MAX,
        sum => sum,
    };
    datagram[6..8].copy_from_slice(&sum.to_be_bytes());
    datagram
}

/// RFC 1071, with `more` added.
fn checksum(bytes: &[u8], more: u32) -> u16 {
    let words = bytes.chunks(2).map(|word| match word {
        [high, low] => u32::from(u16::from_be_bytes([*high, *low])),
        [high] => u32::from(*high) << 8,
        _ => 0,
    });
    let mut sum = words.sum::<u32>() + more;
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}
