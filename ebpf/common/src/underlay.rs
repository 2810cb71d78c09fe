//! The maps and globals of the program `underlay`, which counts VXLAN traffic on the underlay link.

/// Map (per-CPU hash): [`TrafficKey`] to [`Traffic`]. The number is the layout's: raise it with every change
/// of what key or value mean, and an agent that finds a pinned map of another layout makes a new one.
pub const TRAFFIC_MAP: &str = "TRAFFIC_V2";

/// Map (per-CPU array of `u64`): packets that [`TRAFFIC_MAP`] does not hold, by [`Other`]. Numbered likewise.
pub const OTHER_MAP: &str = "OTHER_V2";

/// Map (per-CPU hash): VNI (`u32`) to [`Stale`].
pub const STALE_MAP: &str = "STALE_V1";

/// Entries of [`STALE_MAP`].
pub const STALE_ENTRIES: u32 = 4096;

/// Global (`u16`): the UDP destination port that is VXLAN, in host byte order.
pub const PORT_GLOBAL: &str = "VXLAN_PORT";

/// Global (`u8`): whether a packet for a network that the agent was not told of is a stranger.
pub const KNOWN_ONLY_GLOBAL: &str = "KNOWN_ONLY";

/// The program for packets that come from the underlay.
pub const INGRESS_PROGRAM: &str = "underlay_ingress";

/// The program for packets that leave to the underlay.
pub const EGRESS_PROGRAM: &str = "underlay_egress";

/// A program for test runs only: adds the [`Traffic`] behind a [`TrafficKey`] to [`TRAFFIC_MAP`]. What it is given
/// is the two, one behind the other. It runs as the others do, so it adds to what they count and loses nothing.
pub const CARRY_TRAFFIC_PROGRAM: &str = "carry_traffic";

/// Entries that [`TRAFFIC_MAP`] has unless its loader says otherwise: 1000 networks with eight peers at eight
/// entries each. They take memory as they come.
pub const TRAFFIC_ENTRIES: u32 = 65_536;

/// Whether the host received or sent a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum Direction {
    /// From the underlay.
    Rx = 0,
    /// To the underlay.
    Tx = 1,
}

impl Direction {
    /// Every direction, in the order of its number.
    pub const ALL: [Self; 2] = [Self::Rx, Self::Tx];

    /// The name in metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Rx => "rx",
            Self::Tx => "tx",
        }
    }
}

/// Whom the inner Ethernet destination addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum Class {
    /// One station.
    Unicast = 0,
    /// Every station.
    Broadcast = 1,
    /// A group.
    Multicast = 2,
    /// One station that nobody has told of.
    UnknownUnicast = 3,
}

impl Class {
    /// Every class, in the order of its number.
    pub const ALL: [Self; 4] = [Self::Unicast, Self::Broadcast, Self::Multicast, Self::UnknownUnicast];

    /// The class of an Ethernet destination address (IEEE 802.3, 3.2.3: the first octet's lowest bit is the
    /// group's).
    #[inline(always)]
    pub const fn of(mac: [u8; 6]) -> Self {
        match mac {
            [0xff, 0xff, 0xff, 0xff, 0xff, 0xff] => Self::Broadcast,
            [first, ..] if first & 1 == 1 => Self::Multicast,
            _ => Self::Unicast,
        }
    }

    /// The name in metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Unicast => "unicast",
            Self::Broadcast => "broadcast",
            Self::Multicast => "multicast",
            Self::UnknownUnicast => "unknown_unicast",
        }
    }
}

/// Why a packet was not counted by VNI.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u32)]
pub enum Other {
    /// It ends before its headers do. Counted for every IPv4 and IPv6 packet: whether it was VXLAN, nobody
    /// can tell.
    Truncated = 0,
    /// A header contradicts itself, or there are more of them than the program follows.
    Malformed = 1,
    /// A fragment of a UDP packet other than the first, whose port and VNI are in the first.
    Fragment = 2,
    /// It came to the VXLAN port without the flag that says its VNI is valid.
    NoVni = 3,
    /// It was good, but [`TRAFFIC_MAP`] had no room for its key.
    MapFull = 4,
    /// It came for a network that is not on this host.
    UnknownVni = 5,
}

impl Other {
    /// Every reason, in the order of its number, which is its index in [`OTHER_MAP`].
    pub const ALL: [Self; 6] =
        [Self::Truncated, Self::Malformed, Self::Fragment, Self::NoVni, Self::MapFull, Self::UnknownVni];

    /// The name in metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Truncated => "truncated",
            Self::Malformed => "malformed",
            Self::Fragment => "fragment",
            Self::NoVni => "no_vni",
            Self::MapFull => "map_full",
            Self::UnknownVni => "unknown_vni",
        }
    }
}

/// What traffic is counted by. Without padding: the kernel compares keys byte by byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct TrafficKey {
    /// VXLAN network identifier, 24 bits.
    pub vni: u32,
    /// A [`Direction`].
    pub direction: u8,
    /// A [`Class`].
    pub class: u8,
    /// Zero.
    pub reserved: u16,
    /// The VTEP at the other end, or the group that it goes to; IPv4 mapped.
    pub peer: [u8; 16],
}

impl TrafficKey {
    /// The key of one kind of traffic.
    #[inline(always)]
    pub const fn new(vni: u32, direction: Direction, class: Class, peer: [u8; 16]) -> Self {
        Self { vni, direction: direction as u8, class: class as u8, reserved: 0, peer }
    }

    /// The direction and class, or `None` for numbers that this version does not know.
    pub fn kind(self) -> Option<(Direction, Class)> {
        let direction = Direction::ALL.get(usize::from(self.direction))?;
        let class = Class::ALL.get(usize::from(self.class))?;
        Some((*direction, *class))
    }
}

/// What one CPU has seen of a key.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Traffic {
    /// Packets as they are on the wire: one that the link will cut into segments counts as many.
    pub packets: u64,
    /// Bytes on the wire from the outer Ethernet header on, without preamble, checksum and padding.
    pub bytes: u64,
}

/// What one CPU has seen of packets for stations that have left this host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Stale {
    /// Packets as they were on the wire.
    pub packets: u64,
    /// The longest time from a station's leaving, as the agent was told of it, to a packet for it; nanoseconds.
    pub longest_ns: u64,
}

#[cfg(feature = "user")]
#[expect(unsafe_code, reason = "aya's marker for types that may be copied from a map's bytes")]
mod pod {
    // SAFETY: repr(C), integers only, no padding, every bit pattern valid.
    unsafe impl aya::Pod for super::TrafficKey {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::Traffic {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::Stale {}
}
