//! Guests' packets, made by hand.

use std::net::{IpAddr, Ipv6Addr};

pub(super) const GUEST: [u8; 6] = [0xfa, 0x16, 0x3e, 0, 0, 1];
pub(super) const OTHER: [u8; 6] = [0xfa, 0x16, 0x3e, 0, 0, 2];

pub(super) struct Eth {
    pub(super) destination: [u8; 6],
    pub(super) source: [u8; 6],
    pub(super) kind: u16,
}

pub(super) fn eth(header: Eth) -> Vec<u8> {
    [&header.destination[..], &header.source, &header.kind.to_be_bytes()].concat()
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

pub(super) struct Arp {
    pub(super) operation: u16,
    pub(super) mac: [u8; 6],
    pub(super) sender: IpAddr,
    pub(super) target_mac: [u8; 6],
    pub(super) target: IpAddr,
}

impl Arp {
    pub(super) fn request(sender: &str, target: &str) -> Self {
        let (sender, target) = (sender.parse().unwrap(), target.parse().unwrap());
        Self { operation: 1, mac: GUEST, sender, target_mac: [0; 6], target }
    }

    pub(super) fn bytes(&self) -> Vec<u8> {
        [
            &[0, 1, 8, 0, 6, 4][..],
            &self.operation.to_be_bytes(),
            &self.mac,
            &octets(self.sender),
            &self.target_mac,
            &octets(self.target),
        ]
        .concat()
    }
}

/// Broadcast by the guest.
pub(super) fn arp(arp: Arp) -> Vec<u8> {
    [eth(Eth { destination: [0xff; 6], source: GUEST, kind: 0x0806 }), arp.bytes()].concat()
}

#[derive(Clone, Copy)]
pub(super) struct Udp {
    pub(super) source: u16,
    pub(super) destination: u16,
}

impl Default for Udp {
    fn default() -> Self {
        Self { source: 5000, destination: 9 }
    }
}

impl Udp {
    fn bytes(self) -> Vec<u8> {
        [&self.source.to_be_bytes()[..], &self.destination.to_be_bytes(), &[0, 26, 0, 0], &[0x5a; 18]]
            .concat()
    }
}

/// To the neighbour.
pub(super) fn ipv4(source: &str, destination: &str, udp: Udp) -> Vec<u8> {
    let mut packet = eth(Eth { destination: OTHER, source: GUEST, kind: 0x0800 });
    packet.extend([0x45, 0, 0, 46, 0, 0, 0, 0, 64, 17, 0, 0]);
    packet.extend(octets(source.parse().unwrap()));
    packet.extend(octets(destination.parse().unwrap()));
    packet.extend(udp.bytes());
    packet
}

pub(super) struct V6 {
    pub(super) source: &'static str,
    pub(super) udp: Udp,
    /// In place of UDP.
    pub(super) icmp: Option<Vec<u8>>,
    /// Their number, and what is in them behind the number of the next one.
    pub(super) extensions: Vec<(u8, Vec<u8>)>,
}

impl Default for V6 {
    fn default() -> Self {
        Self { source: "fd00::1", udp: Udp::default(), icmp: None, extensions: vec![] }
    }
}

/// To the neighbour.
pub(super) fn ipv6(header: V6) -> Vec<u8> {
    let mut packet = eth(Eth { destination: OTHER, source: GUEST, kind: 0x86dd });
    let upper = if header.icmp.is_some() { 58 } else { 17 };
    let numbers: Vec<u8> = header.extensions.iter().map(|extension| extension.0).chain([upper]).collect();
    packet.extend([0x60, 0, 0, 0, 0, 0, numbers[0], 255]);
    packet.extend(header.source.parse::<Ipv6Addr>().unwrap().octets());
    packet.extend("fd00::2".parse::<Ipv6Addr>().unwrap().octets());
    for ((_, body), next) in header.extensions.iter().zip(&numbers[1..]) {
        packet.push(*next);
        packet.extend(body);
    }
    packet.extend(header.icmp.unwrap_or_else(|| header.udp.bytes()));
    packet
}

/// A message of neighbour discovery, to the group's or the neighbour's Ethernet address.
pub(super) fn nd(
    kind: u8,
    source: &str,
    destination: &str,
    target: &str,
    flags: u8,
    options: &[u8],
) -> Vec<u8> {
    let parse = |text: &str| text.parse::<Ipv6Addr>().unwrap().octets();
    let to = parse(destination);
    let ethernet = if to[0] == 0xff { [0x33, 0x33, to[12], to[13], to[14], to[15]] } else { OTHER };
    let mut body = [&[kind, 0, 0, 0, flags, 0, 0, 0][..], &parse(target), options].concat();
    let mut sum = 58 + body.len() as u32;
    for word in [&parse(source)[..], &to, &body].concat().chunks(2) {
        sum += u32::from(word[0]) << 8 | u32::from(word[1]);
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    body[2..4].copy_from_slice(&(!(sum as u16)).to_be_bytes());
    let mut packet = eth(Eth { destination: ethernet, source: GUEST, kind: 0x86dd });
    packet.extend([0x60, 0, 0, 0]);
    packet.extend((body.len() as u16).to_be_bytes());
    packet.extend([58, 255]);
    packet.extend(parse(source));
    packet.extend(to);
    packet.extend(body);
    packet
}
