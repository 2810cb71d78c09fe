//! Parsing of what guests say to each other: Ethernet, ARP, IPv4 and IPv6 as far as neighbours, routers and DHCP
//! are concerned. It starts at an Ethernet header, which in a packet of the underlay is the inner one.

use crate::packet::{self, Frame};
use crate::tables::{Protocol, mapped};

/// EtherType of ARP.
pub const ARP: u16 = 0x0806;
/// EtherType of IPv4.
pub const IPV4: u16 = 0x0800;
/// EtherType of IPv6.
pub const IPV6: u16 = 0x86dd;

const ARP_BYTES: usize = 28;
const ICMPV6: u8 = 58;
const UDP: u8 = 17;
const ROUTER_SOLICITATION: u8 = 133;
const ROUTER_ADVERTISEMENT: u8 = 134;
const NEIGHBOUR_SOLICITATION: u8 = 135;
const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
const REDIRECT: u8 = 137;
/// Multicast listener discovery: query, report and done of version 1 (RFC 2710), report of version 2 (RFC 3810).
const LISTENER: [u8; 4] = [130, 131, 132, 143];

/// No address.
pub const NONE: [u8; 16] = [0; 16];

/// The Ethernet header, and any VLAN tags.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ethernet {
    /// To whom.
    pub destination: [u8; 6],
    /// From whom.
    pub source: [u8; 6],
    /// What is behind the tags.
    pub ethertype: u16,
    /// Where that starts, in bytes.
    pub offset: usize,
    /// Whether there are tags.
    pub is_tagged: bool,
}

/// Reads the header at `start`; none if the frame ends before.
#[inline(always)]
pub fn ethernet<F: Frame + ?Sized>(frame: &F, start: usize) -> Option<Ethernet> {
    let [d0, d1, d2, d3, d4, d5, s0, s1, s2, s3, s4, s5, ..] = frame.read::<14>(start)?;
    let (ethertype, offset) = packet::ethertype(frame, start)?;
    Some(Ethernet {
        destination: [d0, d1, d2, d3, d4, d5],
        source: [s0, s1, s2, s3, s4, s5],
        ethertype,
        offset,
        is_tagged: offset != start + 14,
    })
}

/// An ARP packet for IPv4 on Ethernet (RFC 826).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arp {
    /// 1: request, 2: reply.
    pub operation: u16,
    /// Who says it has `sender`.
    pub mac: [u8; 6],
    /// The sender's address.
    pub sender: [u8; 4],
    /// The address in question.
    pub target: [u8; 4],
}

/// Reads ARP at `offset`; none if it is cut, or about something else than IPv4 on Ethernet.
#[inline(always)]
pub fn arp<F: Frame + ?Sized>(frame: &F, offset: usize) -> Option<Arp> {
    let bytes = frame.read::<ARP_BYTES>(offset)?;
    let [0, 1, 8, 0, 6, 4, ..] = bytes else { return None };
    Some(Arp {
        operation: u16::from_be_bytes([bytes[6], bytes[7]]),
        mac: [bytes[8], bytes[9], bytes[10], bytes[11], bytes[12], bytes[13]],
        sender: [bytes[14], bytes[15], bytes[16], bytes[17]],
        target: [bytes[24], bytes[25], bytes[26], bytes[27]],
    })
}

/// What a DHCP message says of its sender.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dhcp {
    /// It is no DHCP.
    No,
    /// A client.
    Client,
    /// A server.
    Server,
}

/// An IPv4 packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ipv4 {
    /// From whom.
    pub source: [u8; 4],
    /// By its UDP ports (RFC 2131).
    pub dhcp: Dhcp,
}

/// Reads IPv4 at `offset`; none if it is cut or contradicts itself. A packet too short for its UDP ports is no DHCP.
#[inline(always)]
pub fn ipv4<F: Frame + ?Sized>(frame: &F, offset: usize) -> Option<Ipv4> {
    let header = frame.read::<20>(offset)?;
    let header_bytes = usize::from(header[0] & 0x0f) * 4;
    if header[0] >> 4 != 4 || header_bytes < 20 {
        return None;
    }
    let is_first = u16::from_be_bytes([header[6], header[7]]) & 0x1fff == 0;
    let dhcp =
        if is_first && header[9] == UDP { dhcp(frame, offset + header_bytes, 68, 67) } else { Dhcp::No };
    Some(Ipv4 { source: [header[12], header[13], header[14], header[15]], dhcp })
}

#[inline(always)]
fn dhcp<F: Frame + ?Sized>(frame: &F, udp: usize, client: u16, server: u16) -> Dhcp {
    let Some([s0, s1, d0, d1]) = frame.read::<4>(udp) else { return Dhcp::No };
    let (source, destination) = (u16::from_be_bytes([s0, s1]), u16::from_be_bytes([d0, d1]));
    if destination == client {
        // Whatever port it comes from: clients look at the one that it goes to.
        Dhcp::Server
    } else if source == client && destination == server {
        Dhcp::Client
    } else {
        Dhcp::No
    }
}

/// What an IPv6 packet is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum About {
    /// Nothing of interest here.
    Other,
    /// Neighbour solicitation (RFC 4861, 4.3).
    Solicitation,
    /// Neighbour advertisement (4.4).
    Advertisement,
    /// Router solicitation or multicast listener discovery, which have no source at first.
    Newcomer,
    /// Router advertisement or redirect.
    Router,
    /// DHCPv6 (RFC 8415).
    Dhcp(Dhcp),
}

/// An IPv6 packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ipv6 {
    /// From whom.
    pub source: [u8; 16],
    /// To whom.
    pub destination: [u8; 16],
    /// What it is about.
    pub about: About,
    /// Of a neighbour's message: whose address it is about.
    pub target: [u8; 16],
    /// Of a neighbour's message: the Ethernet address in its first option, if that is one.
    pub option: Option<[u8; 6]>,
    /// Of a neighbour's message: it came from no farther than this network (hop limit 255), and is whole.
    pub is_valid: bool,
}

/// Reads IPv6 at `offset`; none if it is cut, contradicts itself, hides what it is about behind more extension
/// headers than are followed, or is a first fragment without its whole header chain (RFC 7112).
#[inline(always)]
pub fn ipv6<F: Frame + ?Sized>(frame: &F, offset: usize) -> Option<Ipv6> {
    let first = frame.read::<8>(offset)?;
    if first[0] >> 4 != 6 {
        return None;
    }
    let source = frame.read::<16>(offset + 8)?;
    let destination = frame.read::<16>(offset + 24)?;
    let mut packet =
        Ipv6 { source, destination, about: About::Other, target: NONE, option: None, is_valid: false };
    let (protocol, upper) = match packet::upper(frame, first[6], offset + 40)? {
        packet::Upper::Later => return Some(packet),
        packet::Upper::At { protocol, offset } => (protocol, offset),
    };
    match protocol {
        UDP => packet.about = About::Dhcp(dhcp(frame, upper, 546, 547)),
        ICMPV6 => {
            // Two bytes: that a single one is inside the packet, the verifier does not see.
            let [kind, code] = frame.read::<2>(upper)?;
            packet.about = match kind {
                NEIGHBOUR_SOLICITATION => About::Solicitation,
                NEIGHBOUR_ADVERTISEMENT => About::Advertisement,
                ROUTER_ADVERTISEMENT | REDIRECT => About::Router,
                ROUTER_SOLICITATION => About::Newcomer,
                _ if kind == LISTENER[0]
                    || kind == LISTENER[1]
                    || kind == LISTENER[2]
                    || kind == LISTENER[3] =>
                {
                    About::Newcomer
                }
                _ => About::Other,
            };
            if matches!(packet.about, About::Solicitation | About::Advertisement) {
                packet.target = frame.read::<16>(upper + 8)?;
                packet.option = option(frame, upper + 24, packet.about);
                packet.is_valid = first[7] == 255 && code == 0 && packet.target[0] != 0xff;
            }
        }
        _ => {}
    }
    Some(packet)
}

/// The link-layer address option of a solicitation (source, 1) or advertisement (target, 2), where it is the first
/// option (RFC 4861, 4.6.1).
#[inline(always)]
fn option<F: Frame + ?Sized>(frame: &F, offset: usize, about: About) -> Option<[u8; 6]> {
    let [kind, 1, a, b, c, d, e, f] = frame.read::<8>(offset)? else { return None };
    let wanted = if matches!(about, About::Solicitation) { 1 } else { 2 };
    (kind == wanted).then_some([a, b, c, d, e, f])
}

/// What a message about neighbours is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Who has the target?
    Request,
    /// Is the target free? (RFC 5227, 2.1.1; RFC 4862, 5.4)
    Probe,
    /// The sender has its address. (RFC 5227, 2.3; RFC 4861, 7.2.6)
    Announcement,
    /// An answer.
    Reply,
}

/// A message about neighbours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message {
    /// By which protocol.
    pub protocol: Protocol,
    /// What it is.
    pub kind: Kind,
    /// The Ethernet address that claims, or asks for itself.
    pub mac: [u8; 6],
    /// The address of the sender; IPv4 mapped.
    pub sender: [u8; 16],
    /// The address in question; IPv4 mapped.
    pub target: [u8; 16],
}

impl Message {
    /// The address that [`Self::mac`] says it has, or would have, in a message of this kind.
    #[inline(always)]
    pub const fn claimed(&self, kind: Kind, protocol: Protocol) -> [u8; 16] {
        match (kind, protocol) {
            (Kind::Probe, _) => self.target,
            (Kind::Announcement | Kind::Reply, Protocol::Nd) => self.target,
            _ => self.sender,
        }
    }
}

/// What the message is, if it is one, when the verifier has forgotten how it came about (see [`Frame::forget`]).
#[inline(always)]
pub fn settle<F: Frame + ?Sized>(frame: &F, message: &Message, is_there: bool) -> Option<(Kind, Protocol)> {
    let known =
        if is_there { 1 | (message.protocol as usize) << 1 | (message.kind as usize) << 2 } else { 0 };
    let code = frame.forget(known);
    if code & 1 == 0 {
        return None;
    }
    let protocol = if code & 2 == 0 { Protocol::Arp } else { Protocol::Nd };
    let kind = match code >> 2 {
        0 => Kind::Request,
        1 => Kind::Probe,
        2 => Kind::Announcement,
        _ => Kind::Reply,
    };
    Some((kind, protocol))
}

/// Writes the message about neighbours in an untagged frame, if it is one that a neighbour would heed. Says whether.
#[inline(always)]
pub fn message<F: Frame + ?Sized>(frame: &F, ethernet: &Ethernet, message: &mut Message) -> bool {
    match ethernet.ethertype {
        ARP => arp(frame, ethernet.offset).is_some_and(|arp| arp_message(&arp, message)),
        IPV6 => {
            ipv6(frame, ethernet.offset).is_some_and(|packet| nd_message(&packet, ethernet.source, message))
        }
        _ => false,
    }
}

/// What an ARP packet is, if its operation is known.
#[inline(always)]
pub fn arp_message(arp: &Arp, message: &mut Message) -> bool {
    let kind = match arp.operation {
        1 | 2 if arp.sender == arp.target => Kind::Announcement,
        1 if arp.sender == [0; 4] => Kind::Probe,
        1 => Kind::Request,
        2 => Kind::Reply,
        _ => return false,
    };
    let (sender, target) = (mapped(arp.sender), mapped(arp.target));
    *message = Message { protocol: Protocol::Arp, kind, mac: arp.mac, sender, target };
    true
}

/// What an IPv6 packet is, if it is a valid message of neighbour discovery.
#[inline(always)]
pub fn nd_message(packet: &Ipv6, source: [u8; 6], message: &mut Message) -> bool {
    if !packet.is_valid {
        return false;
    }
    let kind = match packet.about {
        About::Solicitation if packet.source == NONE => Kind::Probe,
        About::Solicitation => Kind::Request,
        About::Advertisement if packet.destination[0] == 0xff => Kind::Announcement,
        About::Advertisement => Kind::Reply,
        _ => return false,
    };
    let mac = packet.option.unwrap_or(source);
    let (sender, target) = (packet.source, packet.target);
    *message = Message { protocol: Protocol::Nd, kind, mac, sender, target };
    true
}
