//! Parsing of what passes on the underlay link: Ethernet, VLAN tags, IPv4 or IPv6, UDP, VXLAN, and the
//! headers inside.
//!
//! Everything is bounded and forced inline, as the kernel's verifier wants it.

use crate::tables::mapped;
use crate::underlay::{Class, Direction, Other, Traffic};

const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_IPV6: u16 = 0x86dd;
const ETHERTYPE_VLAN: u16 = 0x8100;
const ETHERTYPE_SERVICE_VLAN: u16 = 0x88a8;

const PROTOCOL_HOP_BY_HOP: u8 = 0;
const PROTOCOL_TCP: u8 = 6;
const PROTOCOL_UDP: u8 = 17;
const PROTOCOL_ROUTING: u8 = 43;
const PROTOCOL_FRAGMENT: u8 = 44;
const PROTOCOL_DESTINATION_OPTIONS: u8 = 60;

const ETHERNET_BYTES: usize = 14;
const VLAN_BYTES: usize = 4;
const IPV4_BYTES: usize = 20;
const IPV6_BYTES: usize = 40;
const UDP_BYTES: usize = 8;
const VXLAN_BYTES: usize = 8;

/// VLAN tags that are followed: the customer's and the service provider's (IEEE 802.1ad).
const VLAN_TAGS: usize = 2;

/// IPv6 extension headers that are followed. More than a hop-by-hop, routing, fragment and two destination
/// options header are not meant to occur (RFC 8200, 4.1).
const EXTENSION_HEADERS: usize = 5;

/// No header starts farther off than this many bytes: as many extension headers as are followed, each as long as it
/// can be. All bits of it are set, for the verifier to see the bound.
const FAR: usize = 0x7fff;

/// The flag that says that a VXLAN header's VNI is valid (RFC 7348, 5).
const VXLAN_FLAG_VNI: u8 = 0x08;

/// A packet's bytes, from the outer Ethernet header on.
pub trait Frame {
    /// `N` bytes at `offset`, or `None` if the packet ends before their end.
    fn read<const N: usize>(&self, offset: usize) -> Option<[u8; N]>;

    /// The same number, of which the kernel's verifier has forgotten how it came about. Else it would follow what
    /// comes behind for each way that there is to get there.
    #[inline(always)]
    fn forget(&self, number: usize) -> usize {
        number
    }
}

impl Frame for [u8] {
    fn read<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        self.get(offset..)?.first_chunk().copied()
    }
}

/// What a packet on the underlay is to the overlay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Packet {
    /// Nothing: not UDP to the VXLAN port.
    Foreign,
    /// Something that cannot be counted by VNI.
    Other(Other),
    /// A packet of an overlay network.
    Vxlan {
        /// VXLAN network identifier, 24 bits.
        vni: u32,
        /// Whom it is for.
        class: Class,
        /// Where the inner Ethernet header starts, in bytes.
        inner: usize,
    },
}

/// What the UDP header lies behind.
enum Transport {
    Udp { offset: usize },
    Foreign,
    Other(Other),
}

const TRUNCATED: Transport = Transport::Other(Other::Truncated);
const MALFORMED: Transport = Transport::Other(Other::Malformed);
const FRAGMENT: Transport = Transport::Other(Other::Fragment);

/// Reads a packet of the underlay; VXLAN is UDP to `port` (RFC 7348: 4789).
#[inline(always)]
pub fn parse<F: Frame + ?Sized>(frame: &F, port: u16) -> Packet {
    let Some((ethertype, offset)) = ethertype(frame, 0) else {
        return Packet::Other(Other::Truncated);
    };
    let transport = match ethertype {
        ETHERTYPE_IPV4 => ipv4(frame, offset),
        ETHERTYPE_IPV6 => ipv6(frame, offset),
        _ => Transport::Foreign,
    };
    match transport {
        Transport::Udp { offset } => vxlan(frame, offset, port),
        Transport::Foreign => Packet::Foreign,
        Transport::Other(other) => Packet::Other(other),
    }
}

/// The EtherType behind any VLAN tags, and where its payload starts.
#[inline(always)]
pub(crate) fn ethertype<F: Frame + ?Sized>(frame: &F, start: usize) -> Option<(u16, usize)> {
    let mut offset = start + ETHERNET_BYTES;
    let mut ethertype = u16::from_be_bytes(frame.read(offset - 2)?);
    for _ in 0..VLAN_TAGS {
        if ethertype != ETHERTYPE_VLAN && ethertype != ETHERTYPE_SERVICE_VLAN {
            break;
        }
        offset += VLAN_BYTES;
        ethertype = u16::from_be_bytes(frame.read(offset - 2)?);
    }
    Some((ethertype, offset))
}

#[inline(always)]
fn ipv4<F: Frame + ?Sized>(frame: &F, offset: usize) -> Transport {
    let Some(header) = frame.read::<IPV4_BYTES>(offset) else { return TRUNCATED };
    let header_bytes = usize::from(header[0] & 0x0f) * 4;
    if header[0] >> 4 != 4 || header_bytes < IPV4_BYTES {
        return MALFORMED;
    }
    if header[9] != PROTOCOL_UDP {
        return Transport::Foreign;
    }
    if u16::from_be_bytes([header[6], header[7]]) & 0x1fff != 0 {
        return FRAGMENT;
    }
    Transport::Udp { offset: offset + header_bytes }
}

#[inline(always)]
fn ipv6<F: Frame + ?Sized>(frame: &F, start: usize) -> Transport {
    let Some(header) = frame.read::<7>(start) else { return TRUNCATED };
    if header[0] >> 4 != 6 {
        return MALFORMED;
    }
    let mut protocol = header[6];
    let mut offset = start + IPV6_BYTES;
    let mut later_fragment = false;
    for _ in 0..=EXTENSION_HEADERS {
        match protocol {
            PROTOCOL_UDP if later_fragment => return FRAGMENT,
            PROTOCOL_UDP => return Transport::Udp { offset: frame.forget(offset) & FAR },
            PROTOCOL_HOP_BY_HOP | PROTOCOL_ROUTING | PROTOCOL_DESTINATION_OPTIONS if !later_fragment => {
                let Some(extension) = frame.read::<2>(offset) else { return TRUNCATED };
                protocol = extension[0];
                offset += (usize::from(extension[1]) + 1) * 8;
            }
            PROTOCOL_FRAGMENT if !later_fragment => {
                let Some(extension) = frame.read::<4>(offset) else { return TRUNCATED };
                protocol = extension[0];
                // What follows the header of a later fragment is payload: only the protocol is still of use.
                later_fragment = u16::from_be_bytes([extension[2], extension[3]]) & 0xfff8 != 0;
                offset += 8;
            }
            _ => return Transport::Foreign,
        }
    }
    MALFORMED
}

/// What lies behind the extension headers of an IPv6 packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Upper {
    /// A protocol, and where its header starts.
    At {
        /// Its number.
        protocol: u8,
        /// In bytes.
        offset: usize,
    },
    /// The payload of a fragment other than the first.
    Later,
}

/// Follows the extension headers of an IPv6 packet, of which the first has the number `protocol` and starts at
/// `offset`; none if they are cut or more than are followed.
#[inline(always)]
pub fn upper<F: Frame + ?Sized>(frame: &F, mut protocol: u8, mut offset: usize) -> Option<Upper> {
    for _ in 0..=EXTENSION_HEADERS {
        match protocol {
            PROTOCOL_HOP_BY_HOP | PROTOCOL_ROUTING | PROTOCOL_DESTINATION_OPTIONS => {
                let extension = frame.read::<2>(offset)?;
                protocol = extension[0];
                offset += (usize::from(extension[1]) + 1) * 8;
            }
            PROTOCOL_FRAGMENT => {
                let extension = frame.read::<4>(offset)?;
                if u16::from_be_bytes([extension[2], extension[3]]) & 0xfff8 != 0 {
                    return Some(Upper::Later);
                }
                protocol = extension[0];
                offset += 8;
            }
            _ => {
                // Both in one word: a protocol has eight bits, and the rest can say where any chain of headers ends.
                let both = frame.forget(offset << 8 | usize::from(protocol));
                return Some(Upper::At { protocol: both as u8, offset: (both >> 8) & FAR });
            }
        }
    }
    None
}

/// The address at the other end of the tunnel, in a packet that [`parse`] has found to be VXLAN: whom one that was
/// received came from, and whom one that is sent goes to. IPv4 mapped.
#[inline(always)]
pub fn peer<F: Frame + ?Sized>(frame: &F, direction: Direction) -> Option<[u8; 16]> {
    let (ethertype, offset) = ethertype(frame, 0)?;
    let is_sent = matches!(direction, Direction::Tx) as usize;
    if ethertype == ETHERTYPE_IPV4 {
        Some(mapped(frame.read(offset + 12 + 4 * is_sent)?))
    } else {
        frame.read(offset + 8 + 16 * is_sent)
    }
}

#[inline(always)]
fn vxlan<F: Frame + ?Sized>(frame: &F, udp: usize, port: u16) -> Packet {
    let Some(destination) = frame.read::<2>(udp + 2) else { return Packet::Other(Other::Truncated) };
    if u16::from_be_bytes(destination) != port {
        return Packet::Foreign;
    }
    // The inner Ethernet header is read whole: without its EtherType it is no frame.
    let Some(header) = frame.read::<{ VXLAN_BYTES + ETHERNET_BYTES }>(udp + UDP_BYTES) else {
        return Packet::Other(Other::Truncated);
    };
    if header[0] & VXLAN_FLAG_VNI == 0 {
        return Packet::Other(Other::NoVni);
    }
    Packet::Vxlan {
        vni: u32::from_be_bytes([0, header[4], header[5], header[6]]),
        class: Class::of([header[8], header[9], header[10], header[11], header[12], header[13]]),
        inner: udp + UDP_BYTES + VXLAN_BYTES,
    }
}

/// A packet's size as the kernel tells it (`skb->len` and `skb_shared_info`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    /// Bytes from the outer Ethernet header on.
    pub bytes: u32,
    /// Segments that it will be cut into or was merged from; zero if nobody has counted them yet.
    pub segments: u32,
    /// Payload bytes of each segment but the last; zero if there is but one.
    pub segment_bytes: u32,
    /// Bytes of a VLAN tag that is on the wire and not in the packet.
    pub tag_bytes: u32,
}

/// What a VXLAN packet of this size is on the wire, where each segment repeats all headers.
///
/// If the inner headers cannot be read, the repeated headers are left out of the bytes.
#[inline(always)]
pub fn on_the_wire<F: Frame + ?Sized>(frame: &F, inner: usize, size: Size) -> Traffic {
    let bytes = u64::from(size.bytes) + u64::from(size.tag_bytes);
    if size.segments <= 1 && size.segment_bytes == 0 {
        return Traffic { packets: 1, bytes };
    }
    let Some(header_bytes) = headers(frame, inner) else {
        return Traffic { packets: u64::from(size.segments.max(1)), bytes };
    };
    let segments = match size.segments {
        // A guest's own offload: the kernel counts its segments only when it has to cut them.
        0 => segments(size.bytes.saturating_sub(header_bytes), size.segment_bytes),
        counted => counted,
    };
    let repeated = u64::from(header_bytes) + u64::from(size.tag_bytes);
    Traffic { packets: u64::from(segments), bytes: bytes + u64::from(segments - 1) * repeated }
}

/// How many segments of at most `segment_bytes` hold a payload; at least one. A division by zero would be a
/// panic to the compiler, even where it cannot happen, and the programs have none.
#[inline(always)]
fn segments(payload_bytes: u32, segment_bytes: u32) -> u32 {
    let whole = payload_bytes.checked_div(segment_bytes).unwrap_or(0);
    let rest = payload_bytes - whole * segment_bytes;
    (whole + (rest > 0) as u32).max(1)
}

/// The bytes of all headers, outer and inner, that every segment repeats.
#[inline(always)]
fn headers<F: Frame + ?Sized>(frame: &F, inner: usize) -> Option<u32> {
    let (ethertype, ip) = ethertype(frame, inner)?;
    let (protocol, transport) = match ethertype {
        ETHERTYPE_IPV4 => {
            let header = frame.read::<10>(ip)?;
            (header[9], ip + usize::from(header[0] & 0x0f) * 4)
        }
        ETHERTYPE_IPV6 => (frame.read::<7>(ip)?[6], ip + IPV6_BYTES),
        _ => return None,
    };
    let transport_bytes = match protocol {
        // Two bytes: that a single one is inside the packet, the verifier does not see.
        PROTOCOL_TCP => usize::from(frame.read::<2>(transport + 12)?[0] >> 4) * 4,
        PROTOCOL_UDP => UDP_BYTES,
        _ => return None,
    };
    Some((transport + transport_bytes) as u32)
}
