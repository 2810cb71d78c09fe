//! Security groups at the tap of each guest: the maps of the object `filter`, and the parsing and deciding that its
//! programs do.

mod counts;

pub use counts::{Counts, Entries, Strays};

use crate::packet::Frame;

/// Map (hash): [`FilterKey`] to [`Filter`].
pub const FILTERS_MAP: &str = "FILTERS_V1";

/// Map (longest prefix match): [`Member`] to nothing of interest.
pub const MEMBERS_MAP: &str = "MEMBERS_V1";

/// Map (LRU hash): [`ConnectionKey`] to [`Connection`].
pub const CONNECTIONS_MAP: &str = "CONNECTIONS_V1";

/// Map (LRU hash): [`FragmentKey`] to the time of the first fragment, in nanoseconds.
pub const FRAGMENTS_MAP: &str = "FRAGMENTS_V1";

/// Map (per-CPU hash): [`FilterKey`] to [`Counts`].
pub const COUNTS_MAP: &str = "FILTER_COUNT_V1";

/// Map (per-CPU hash): [`FilterKey`] to [`Strays`].
pub const STRAYS_MAP: &str = "FILTER_STRAY_V1";

/// Map (per-CPU array of `u64`): what became of entries of the other maps, by [`Entries`].
pub const ENTRIES_MAP: &str = "FILTER_ENTRY_V1";

/// Map (ring buffer): [`Request`]s of guests to their host's DHCP responder.
pub const REQUESTS_MAP: &str = "DHCP_V1";

/// Map (array) of one `u64`, which is another after each change of filters or members. Programs let a connection's packets
/// pass by what they found under the same one.
pub const GENERATION_MAP: &str = "FILTER_GEN_V1";

/// Entries of [`FILTERS_MAP`], [`COUNTS_MAP`] and [`STRAYS_MAP`]: two a port.
pub const FILTERS_ENTRIES: u32 = 2048;

/// Entries of [`MEMBERS_MAP`] unless the loader says otherwise.
pub const MEMBERS_ENTRIES: u32 = 65_536;

/// Entries of [`CONNECTIONS_MAP`] unless the loader says otherwise.
pub const CONNECTIONS_ENTRIES: u32 = 65_536;

/// Entries of [`FRAGMENTS_MAP`].
pub const FRAGMENTS_ENTRIES: u32 = 4096;

/// Bytes of [`REQUESTS_MAP`].
pub const REQUESTS_BYTES: u32 = 256 * 1024;

/// The program for what a guest sends.
pub const FROM_PROGRAM: &str = "filter_from_guest";

/// The program for what a guest gets.
pub const TO_PROGRAM: &str = "filter_to_guest";

/// The mark of what the host's own responder sends: it passes whatever the rules say.
pub const ANSWER_MARK: u32 = 0x6777_0001;

/// Rules of one port and direction.
pub const MAX_RULES: usize = 128;

/// Bits of a [`Member`] before its address.
pub const MEMBER_BITS: u32 = 96;

/// To the guest.
pub const INGRESS: u32 = 0;
/// From the guest.
pub const EGRESS: u32 = 1;

/// A port and a direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(C)]
pub struct FilterKey {
    /// The tap's index.
    pub link: u32,
    /// [`INGRESS`] or [`EGRESS`].
    pub direction: u32,
}

/// What may pass one way at a port.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Filter {
    /// Until then, by the kernel's monotonic clock in nanoseconds, connections that the guest opened before it came to
    /// this host go on.
    pub arrival_ends_ns: u64,
    /// The network's number.
    pub vni: u32,
    /// Of [`Filter::RULES`], [`Filter::DHCP_V4`] and [`Filter::DHCP_V6`].
    pub flags: u32,
    /// Another one whenever rules or members change: connections of an older one are looked at again.
    pub epoch: u32,
    /// Rules that count.
    pub count: u32,
    /// They.
    pub rules: [Rule; MAX_RULES],
}

impl Filter {
    /// The rules apply; without, everything passes.
    pub const RULES: u32 = 1;
    /// The host answers DHCP.
    pub const DHCP_V4: u32 = 2;
    /// The host answers DHCPv6.
    pub const DHCP_V6: u32 = 4;
}

/// Something that may pass.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Rule {
    /// First and last half of the other end's address, as it lies in memory; IPv4 mapped.
    pub address: [u64; 2],
    /// The bits of it that count.
    pub mask: [u64; 2],
    /// The group of the other end, for [`Rule::GROUP`]: the first eight bytes of its id.
    pub group: [u8; 8],
    /// First destination port, or the type and code of ICMP as one number.
    pub first: u16,
    /// The last.
    pub last: u16,
    /// Protocol number; 0: any.
    pub protocol: u8,
    /// 4 or 6.
    pub family: u8,
    /// Of [`Rule::GROUP`] and [`Rule::STATELESS`].
    pub flags: u8,
    /// Zero.
    pub reserved: u8,
}

impl Rule {
    /// The other end must be a member of [`Rule::group`].
    pub const GROUP: u8 = 1;
    /// No connection is remembered.
    pub const STATELESS: u8 = 2;
}

/// A member of a group in a network.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(C)]
pub struct Member {
    /// The network's number.
    pub vni: u32,
    /// The first eight bytes of the group's id.
    pub group: [u8; 8],
    /// The member's address; IPv4 mapped.
    pub address: [u8; 16],
}

/// A connection, as its guest sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct ConnectionKey {
    /// The tap's index.
    pub link: u32,
    /// The guest's port, or the number of an echo.
    pub local_port: u16,
    /// The other's port; for ICMP which way the question goes.
    pub remote_port: u16,
    /// The guest's address; IPv4 mapped.
    pub local: [u8; 16],
    /// The other's.
    pub remote: [u8; 16],
    /// Protocol number.
    pub protocol: u8,
    /// Zero.
    pub reserved: [u8; 3],
}

/// What is known of a connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Connection {
    /// When a packet of it was last seen, by the kernel's monotonic clock in nanoseconds.
    pub seen_ns: u64,
    /// The [`Filter::epoch`] by which it was let pass.
    pub epoch: u32,
    /// Of the constants below.
    pub flags: u32,
}

impl Connection {
    /// The guest opened it.
    pub const OUTWARD: u32 = 1;
    /// The side that did not open it has answered.
    pub const ANSWERED: u32 = 2;
    /// The guest has sent its last.
    pub const FIN_OUT: u32 = 4;
    /// The other has.
    pub const FIN_IN: u32 = 8;
    /// It is reset.
    pub const RESET: u32 = 16;

    /// Whether both sides have ended it.
    #[inline(always)]
    pub const fn is_over(&self) -> bool {
        let both = Self::FIN_OUT | Self::FIN_IN;
        self.flags & Self::RESET != 0 || self.flags & both == both
    }

    /// How long it is remembered without a packet, in nanoseconds: the kernel's own connection tracking's times.
    #[inline(always)]
    pub const fn timeout_ns(&self, protocol: u8) -> u64 {
        const SECOND: u64 = 1_000_000_000;
        let answered = self.flags & Self::ANSWERED != 0;
        match protocol {
            TCP if self.is_over() => 10 * SECOND,
            TCP if answered => 432_000 * SECOND,
            TCP => 120 * SECOND,
            UDP | UDP_LITE if answered => 180 * SECOND,
            UDP | UDP_LITE | ICMP | ICMPV6 => 30 * SECOND,
            _ => 600 * SECOND,
        }
    }
}

/// A packet that comes in parts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct FragmentKey {
    /// The tap's index.
    pub link: u32,
    /// Its number.
    pub id: u32,
    /// From whom; IPv4 mapped.
    pub source: [u8; 16],
    /// To whom.
    pub destination: [u8; 16],
    /// [`INGRESS`] or [`EGRESS`], and the protocol above it.
    pub direction: u32,
}

/// How long parts of a packet may come after the first, in nanoseconds (RFC 8200, 4.5).
pub const FRAGMENT_NS: u64 = 60_000_000_000;

/// A guest's question by DHCP, with its Ethernet header.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Request {
    /// The tap's index.
    pub link: u32,
    /// Bytes that count.
    pub length: u32,
    /// The frame.
    pub frame: [u8; Request::BYTES],
}

impl Request {
    /// Of one frame; longer ones are no DHCP that a client sends.
    pub const BYTES: usize = 1520;
}

const ICMP: u8 = 1;
const TCP: u8 = 6;
const UDP: u8 = 17;
const DCCP: u8 = 33;
const ICMPV6: u8 = 58;
const SCTP: u8 = 132;
const UDP_LITE: u8 = 136;

/// What a packet is to the filter. It is filled in place, for a program has little room on its stack.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Packet {
    /// 4 or 6.
    pub family: u8,
    /// Above it.
    pub protocol: u8,
    /// From whom; IPv4 mapped.
    pub source: [u8; 16],
    /// To whom.
    pub destination: [u8; 16],
    /// Of protocols that have ports; of ICMP none, of an echo its number.
    pub source_port: u16,
    /// Of protocols that have ports; of ICMP its type and code as one number.
    pub destination_port: u16,
    /// Of TCP.
    pub tcp_flags: u8,
    /// Where what is above starts, in bytes.
    pub offset: usize,
    /// The number of a packet that comes in parts.
    pub fragment: u32,
    /// Whether it does.
    pub is_fragment: bool,
    /// Whether this is a part other than the first, so that ports are not known.
    pub is_later: bool,
}

impl Packet {
    /// FIN, SYN, RST and ACK of TCP.
    pub const FIN: u8 = 1;
    /// See [`Self::FIN`].
    pub const SYN: u8 = 2;
    /// See [`Self::FIN`].
    pub const RST: u8 = 4;
    /// See [`Self::FIN`].
    pub const ACK: u8 = 16;

    /// The type of an ICMP message.
    #[inline(always)]
    pub const fn icmp_type(&self) -> u8 {
        (self.destination_port >> 8) as u8
    }

    /// Whether it is a question that an echo answers, or the answer; none: neither.
    #[inline(always)]
    pub const fn echo(&self) -> Option<bool> {
        match (self.protocol, self.icmp_type()) {
            (ICMP, 8 | 13) | (ICMPV6, 128) => Some(true),
            (ICMP, 0 | 14) | (ICMPV6, 129) => Some(false),
            _ => None,
        }
    }

    /// Whether it reports on another packet, part of which it carries.
    #[inline(always)]
    pub const fn is_error(&self) -> bool {
        match self.protocol {
            ICMP => matches!(self.icmp_type(), 3 | 11 | 12),
            ICMPV6 => matches!(self.icmp_type(), 1..=4),
            _ => false,
        }
    }

    /// Whether it is what IPv6 itself needs (RFC 4890, 4.4): neighbours, routers and listeners of groups.
    #[inline(always)]
    pub const fn is_neighbourly(&self) -> bool {
        self.protocol == ICMPV6 && matches!(self.icmp_type(), 130..=136 | 143)
    }

    /// Whether it goes from a DHCP client to a server, of either family.
    #[inline(always)]
    pub const fn is_dhcp_request(&self) -> bool {
        self.is_udp(if self.family == 4 { (68, 67) } else { (546, 547) })
    }

    /// Whether it goes from a DHCP server to a client.
    #[inline(always)]
    pub const fn is_dhcp_answer(&self) -> bool {
        self.is_udp(if self.family == 4 { (67, 68) } else { (547, 546) })
    }

    #[inline(always)]
    const fn is_udp(&self, ports: (u16, u16)) -> bool {
        self.protocol == UDP
            && !self.is_later
            && self.source_port == ports.0
            && self.destination_port == ports.1
    }

    /// Whether connections of its protocol can be told apart.
    #[inline(always)]
    pub const fn has_ports(protocol: u8) -> bool {
        matches!(protocol, TCP | UDP | DCCP | SCTP | UDP_LITE)
    }

    /// Whether it is TCP.
    #[inline(always)]
    pub const fn is_tcp(&self) -> bool {
        self.protocol == TCP
    }

    /// Whether it is ICMP of either family.
    #[inline(always)]
    pub const fn is_icmp(&self) -> bool {
        matches!(self.protocol, ICMP | ICMPV6)
    }
}

/// What a frame is to the filter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parsed {
    /// Not IP.
    Other,
    /// IP whose headers are cut, contradict themselves, or are more than are followed.
    Malformed,
    /// IP.
    Ip,
}

/// VLAN tags and IPv6 extension headers that are followed at most.
const TAGS: usize = 2;
const EXTENSIONS: usize = 4;

/// Reads an Ethernet frame into `packet`, which is to be read only when it is IP.
#[inline(always)]
pub fn parse<F: Frame + ?Sized>(frame: &F, packet: &mut Packet) -> Parsed {
    let mut offset = 14;
    let Some(bytes) = frame.read::<2>(12) else { return Parsed::Other };
    let mut ethertype = u16::from_be_bytes(bytes);
    for _ in 0..TAGS {
        if ethertype != 0x8100 && ethertype != 0x88a8 {
            break;
        }
        let Some(bytes) = frame.read::<2>(offset + 2) else { return Parsed::Malformed };
        ethertype = u16::from_be_bytes(bytes);
        offset += 4;
    }
    let read = match ethertype {
        0x0800 => ip(frame, offset, 4, packet),
        0x86dd => ip(frame, offset, 6, packet),
        _ => return Parsed::Other,
    };
    if read.is_some() { Parsed::Ip } else { Parsed::Malformed }
}

/// Reads an IP packet at `offset`; none if it is malformed.
#[inline(always)]
pub fn ip<F: Frame + ?Sized>(frame: &F, offset: usize, family: u8, packet: &mut Packet) -> Option<()> {
    packet.family = family;
    packet.source_port = 0;
    packet.destination_port = 0;
    packet.tcp_flags = 0;
    packet.fragment = 0;
    packet.is_fragment = false;
    packet.is_later = false;
    if family == 4 {
        ipv4(frame, offset, packet)?
    } else {
        ipv6(frame, offset, packet)?
    }
    if packet.is_later {
        return Some(());
    }
    transport(frame, packet)
}

#[inline(always)]
fn ipv4<F: Frame + ?Sized>(frame: &F, offset: usize, packet: &mut Packet) -> Option<()> {
    let h = frame.read::<20>(offset)?;
    let header_bytes = usize::from(h[0] & 15) * 4;
    if h[0] >> 4 != 4 || header_bytes < 20 {
        return None;
    }
    let fragment = u16::from_be_bytes([h[6], h[7]]);
    packet.is_later = fragment & 0x1fff != 0;
    packet.is_fragment = packet.is_later || fragment & 0x2000 != 0;
    packet.fragment = u32::from(u16::from_be_bytes([h[4], h[5]]));
    packet.protocol = h[9];
    packet.source = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 255, 255, h[12], h[13], h[14], h[15]];
    packet.destination = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 255, 255, h[16], h[17], h[18], h[19]];
    packet.offset = offset + header_bytes;
    Some(())
}

#[inline(always)]
fn ipv6<F: Frame + ?Sized>(frame: &F, start: usize, packet: &mut Packet) -> Option<()> {
    let h = frame.read::<8>(start)?;
    if h[0] >> 4 != 6 {
        return None;
    }
    packet.source = frame.read(start + 8)?;
    packet.destination = frame.read(start + 24)?;
    let (mut protocol, mut offset) = (h[6], start + 40);
    for _ in 0..EXTENSIONS {
        match protocol {
            // Hop-by-hop options, routing, destination options.
            0 | 43 | 60 => {
                let e = frame.read::<2>(offset)?;
                protocol = e[0];
                offset += (usize::from(e[1]) + 1) * 8;
            }
            // Authentication counts in words.
            51 => {
                let e = frame.read::<2>(offset)?;
                protocol = e[0];
                offset += (usize::from(e[1]) + 2) * 4;
            }
            44 => {
                let e = frame.read::<8>(offset)?;
                protocol = e[0];
                offset += 8;
                packet.is_fragment = true;
                packet.fragment = u32::from_be_bytes([e[4], e[5], e[6], e[7]]);
                if u16::from_be_bytes([e[2], e[3]]) & 0xfff8 != 0 {
                    packet.is_later = true;
                    break;
                }
            }
            _ => break,
        }
    }
    packet.protocol = protocol;
    packet.offset = offset;
    match protocol {
        // More than are followed: what hides behind them is not let pass.
        0 | 43 | 44 | 51 | 60 if !packet.is_later => None,
        _ => Some(()),
    }
}

#[inline(always)]
fn transport<F: Frame + ?Sized>(frame: &F, packet: &mut Packet) -> Option<()> {
    let at = packet.offset;
    if Packet::has_ports(packet.protocol) {
        let ports = frame.read::<4>(at)?;
        packet.source_port = u16::from_be_bytes([ports[0], ports[1]]);
        packet.destination_port = u16::from_be_bytes([ports[2], ports[3]]);
        if packet.protocol == TCP {
            // Of a packet that is quoted in an error only the first eight bytes are sure.
            packet.tcp_flags = frame.read::<2>(at + 12).map_or(0, |bytes| bytes[1]);
        }
    } else if packet.is_icmp() {
        let kind = frame.read::<2>(at)?;
        packet.destination_port = u16::from_be_bytes(kind);
        if packet.echo().is_some() {
            packet.source_port = u16::from_be_bytes(frame.read(at + 4)?);
        }
    }
    Some(())
}

/// A connection's opening, as rules see it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Opening {
    /// The other end's address, as it lies in memory; IPv4 mapped.
    pub remote: [u64; 2],
    /// Destination port, or type and code of ICMP.
    pub port: u16,
    /// Protocol number.
    pub protocol: u8,
    /// 4 or 6.
    pub family: u8,
    /// Zero.
    pub reserved: u32,
}

/// An address as two numbers, as it lies in memory.
#[inline(always)]
pub const fn halves(a: &[u8; 16]) -> [u64; 2] {
    [
        u64::from_ne_bytes([a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7]]),
        u64::from_ne_bytes([a[8], a[9], a[10], a[11], a[12], a[13], a[14], a[15]]),
    ]
}

impl Rule {
    /// Whether an opening is what the rule is about, but for the group of its other end.
    #[inline(always)]
    pub const fn is_about(&self, opening: &Opening) -> bool {
        self.family == opening.family
            && (self.protocol == 0 || self.protocol == opening.protocol)
            && self.first <= opening.port
            && opening.port <= self.last
            && opening.remote[0] & self.mask[0] == self.address[0]
            && opening.remote[1] & self.mask[1] == self.address[1]
    }
}

#[cfg(feature = "user")]
#[expect(unsafe_code, reason = "aya's marker for types that may be copied from a map's bytes")]
mod pod {
    // SAFETY: repr(C), integers only, no padding, every bit pattern valid.
    unsafe impl aya::Pod for super::FilterKey {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::Filter {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::Member {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::ConnectionKey {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::Connection {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::Counts {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::Strays {}
}
