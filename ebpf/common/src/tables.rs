//! The maps that both objects share: what the agent has been told of each network, the account of each port,
//! and the ring of rare events.
//!
//! The agent writes [`NETWORKS_MAP`], [`STATIONS_MAP`] and [`NEIGHBOURS_MAP`] and is their only writer; the
//! programs write the others. The number in a map's name is its layout's: raise it with every change of what
//! key or value mean.

/// Map (hash): VNI (`u32`) to [`Network`].
pub const NETWORKS_MAP: &str = "NETWORKS_V1";

/// Map (hash): [`StationKey`] to [`Station`], every Ethernet address that the coordinator has told of.
pub const STATIONS_MAP: &str = "STATIONS_V1";

/// Map (hash): [`NeighbourKey`] to [`Neighbour`], every IP address that the coordinator has told of.
pub const NEIGHBOURS_MAP: &str = "NEIGHBOURS_V1";

/// Map (per-CPU hash): [`AccountKey`] to [`Account`].
pub const ACCOUNT_MAP: &str = "ACCOUNT_V1";

/// A program of the object `port`, for test runs only: adds the [`Account`] behind an [`AccountKey`] to
/// [`ACCOUNT_MAP`].
pub const CARRY_ACCOUNT_PROGRAM: &str = "carry_account";

/// Map (per-CPU array) of one [`Account`] that stays zero.
pub const BLANK_MAP: &str = "BLANK_V1";

/// Map (ring buffer) of [`Event`].
pub const EVENTS_MAP: &str = "EVENTS_V1";

/// Map (LRU hash): [`GateKey`] to the time of its last event, by the kernel's monotonic clock, in nanoseconds.
pub const GATE_MAP: &str = "EVENT_GATE_V1";

/// Map (per-CPU array of `u64`): what could not be written, by [`Lost`].
pub const LOST_MAP: &str = "LOST_V1";

/// Map (array) of one `u64`, which is another after each change of what the agent tells. Programs go by what they found
/// under the same one.
pub const GENERATION_MAP: &str = "GENERATION_V1";

/// Entries of [`NETWORKS_MAP`] unless the loader says otherwise.
pub const NETWORKS_ENTRIES: u32 = 4096;
/// Entries of [`STATIONS_MAP`] unless the loader says otherwise.
pub const STATIONS_ENTRIES: u32 = 16_384;
/// Entries of [`NEIGHBOURS_MAP`] unless the loader says otherwise.
pub const NEIGHBOURS_ENTRIES: u32 = 32_768;
/// Entries of [`ACCOUNT_MAP`] unless the loader says otherwise: ports, past ones of present networks included.
pub const ACCOUNT_ENTRIES: u32 = 8192;
/// Bytes of [`EVENTS_MAP`]: nearly 3500 events that no agent has read yet.
pub const EVENTS_BYTES: u32 = 256 * 1024;
/// Entries of [`GATE_MAP`].
pub const GATE_ENTRIES: u32 = 1024;

/// Time in which one station causes at most one event of a kind, in nanoseconds. Counters count all.
pub const EVENT_PAUSE_NS: u64 = 1_000_000_000;

/// What a network's ports do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Network {
    /// Of [`Network::SUPPRESS`], [`Network::FLOOD_UNICAST`] and [`Network::DROP_NEIGHBOURS`].
    pub flags: u32,
}

impl Network {
    /// Questions for known addresses are answered at the port.
    pub const SUPPRESS: u32 = 1;
    /// Unicast for an address that nobody has told of passes; else it ends at the port.
    pub const FLOOD_UNICAST: u32 = 2;
    /// Questions for an address that nobody has told of end at the port; else they pass.
    pub const DROP_NEIGHBOURS: u32 = 4;
}

/// An Ethernet address in a network.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(C)]
pub struct StationKey {
    /// VXLAN network identifier.
    pub vni: u32,
    /// The address.
    pub mac: [u8; 6],
    /// Zero.
    pub reserved: u16,
}

impl StationKey {
    /// The key of an address.
    #[inline(always)]
    pub const fn new(vni: u32, mac: [u8; 6]) -> Self {
        Self { vni, mac, reserved: 0 }
    }
}

/// Where an Ethernet address is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Station {
    /// [`Station::FLOATING`], [`Station::HERE`] or [`Station::ELSEWHERE`].
    pub place: u32,
    /// Zero.
    pub reserved: u32,
    /// The port's number in the account, while it is here.
    pub port: u64,
    /// When it left this host, by the kernel's monotonic clock in nanoseconds; zero if it never was here.
    pub left_ns: u64,
}

impl Station {
    /// At any port that may use it.
    pub const FLOATING: u32 = 0;
    /// At a port of this host.
    pub const HERE: u32 = 1;
    /// At a port of another host.
    pub const ELSEWHERE: u32 = 2;
}

/// An IP address in a network.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(C)]
pub struct NeighbourKey {
    /// VXLAN network identifier.
    pub vni: u32,
    /// The address; IPv4 as IPv6 maps it (RFC 4291, 2.5.5.2).
    pub address: [u8; 16],
}

/// IPv4 as IPv6 maps it.
#[inline(always)]
pub const fn mapped(address: [u8; 4]) -> [u8; 16] {
    let [a, b, c, d] = address;
    [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, a, b, c, d]
}

/// Who has an IP address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Neighbour {
    /// Its Ethernet address.
    pub mac: [u8; 6],
    /// Of [`Neighbour::ROUTER`] and [`Neighbour::AMBIGUOUS`].
    pub flags: u8,
    /// Zero.
    pub reserved: u8,
}

impl Neighbour {
    /// It is a router (RFC 4861, 4.4).
    pub const ROUTER: u8 = 1;
    /// Several ports have been given the address: nobody answers for them.
    pub const AMBIGUOUS: u8 = 2;
}

/// Which of the two protocols that ask for an Ethernet address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Protocol {
    /// RFC 826.
    Arp = 0,
    /// RFC 4861.
    Nd = 1,
}

impl Protocol {
    /// Both, in the order of their number.
    pub const ALL: [Self; 2] = [Self::Arp, Self::Nd];

    /// The name in metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Arp => "arp",
            Self::Nd => "nd",
        }
    }
}

/// What became of a message about neighbours. `Seen` is `Answered` + `Suppressed` + `Passed`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Outcome {
    /// A guest asked who has an address.
    Seen = 0,
    /// It was answered at its port.
    Answered = 1,
    /// It ended at its port without an answer.
    Suppressed = 2,
    /// It went on.
    Passed = 3,
    /// Of those seen: nobody has told of the address.
    Unknown = 4,
    /// It left for another host though its address is known.
    Leaked = 5,
    /// A question to one station: whether that is still there.
    Unicast = 6,
    /// A question whether an address is free.
    Probe = 7,
    /// A guest said unasked what its address is.
    Announcement = 8,
    /// Somebody claimed an address that somebody else is known to have.
    Conflict = 9,
}

impl Outcome {
    /// Every outcome, in the order of its number.
    pub const ALL: [Self; 10] = [
        Self::Seen,
        Self::Answered,
        Self::Suppressed,
        Self::Passed,
        Self::Unknown,
        Self::Leaked,
        Self::Unicast,
        Self::Probe,
        Self::Announcement,
        Self::Conflict,
    ];

    /// The name in metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Seen => "seen",
            Self::Answered => "answered",
            Self::Suppressed => "suppressed",
            Self::Passed => "passed",
            Self::Unknown => "unknown",
            Self::Leaked => "leaked",
            Self::Unicast => "unicast",
            Self::Probe => "probe",
            Self::Announcement => "announcement",
            Self::Conflict => "conflict",
        }
    }
}

/// Why a port let a packet of its guest go no further.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Reason {
    /// Its Ethernet source is not the port's.
    SpoofedMac = 0,
    /// Its IPv4 source is not the port's.
    SpoofedIpv4 = 1,
    /// Its IPv6 source is not the port's.
    SpoofedIpv6 = 2,
    /// It says by ARP what is not so.
    SpoofedArp = 3,
    /// It says by neighbour discovery what is not so.
    SpoofedNd = 4,
    /// It speaks as a router (RFC 4861: advertisement, redirect).
    RouterAdvertisement = 5,
    /// It speaks as a DHCP server.
    DhcpServer = 6,
    /// Nobody has told of its destination.
    UnknownUnicast = 7,
    /// It asks for an address that nobody has told of, or for its own.
    Neighbour = 8,
    /// Its headers are cut, contradict themselves, or are more than the program follows.
    Malformed = 9,
}

impl Reason {
    /// Every reason, in the order of its number.
    pub const ALL: [Self; 10] = [
        Self::SpoofedMac,
        Self::SpoofedIpv4,
        Self::SpoofedIpv6,
        Self::SpoofedArp,
        Self::SpoofedNd,
        Self::RouterAdvertisement,
        Self::DhcpServer,
        Self::UnknownUnicast,
        Self::Neighbour,
        Self::Malformed,
    ];

    /// The name in metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::SpoofedMac => "spoofed_mac",
            Self::SpoofedIpv4 => "spoofed_ipv4",
            Self::SpoofedIpv6 => "spoofed_ipv6",
            Self::SpoofedArp => "spoofed_arp",
            Self::SpoofedNd => "spoofed_nd",
            Self::RouterAdvertisement => "router_advertisement",
            Self::DhcpServer => "dhcp_server",
            Self::UnknownUnicast => "unknown_unicast",
            Self::Neighbour => "neighbour",
            Self::Malformed => "malformed",
        }
    }
}

/// Whose account. Port zero is that of what came from other hosts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(C)]
pub struct AccountKey {
    /// The port's number: the first eight bytes of its id.
    pub port: u64,
    /// VXLAN network identifier.
    pub vni: u32,
    /// Zero.
    pub reserved: u32,
}

/// Counters of a port, of one CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Account {
    /// Packets from the guest by [`crate::underlay::Class`], as they would be on a wire.
    pub from_packets: [u64; 4],
    /// Their bytes from the Ethernet header on.
    pub from_bytes: [u64; 4],
    /// Packets to the guest, likewise.
    pub to_packets: [u64; 4],
    /// Their bytes.
    pub to_bytes: [u64; 4],
    /// Messages about neighbours, by [`Protocol`] and [`Outcome`].
    pub neighbours: [[u64; 10]; 2],
    /// Packets that ended at the port, by [`Reason`].
    pub drops: [u64; 10],
}

impl Account {
    /// How many counters it is.
    pub const COUNTERS: usize = size_of::<Self>() / 8;

    /// Nothing counted.
    pub const ZERO: Self = Self {
        from_packets: [0; 4],
        from_bytes: [0; 4],
        to_packets: [0; 4],
        to_bytes: [0; 4],
        neighbours: [[0; 10]; 2],
        drops: [0; 10],
    };

    /// Adds what another CPU has counted.
    pub fn add(&mut self, other: &Self) {
        let add = |ours: &mut [u64], theirs: &[u64]| {
            for (our, their) in ours.iter_mut().zip(theirs) {
                *our += their;
            }
        };
        add(&mut self.from_packets, &other.from_packets);
        add(&mut self.from_bytes, &other.from_bytes);
        add(&mut self.to_packets, &other.to_packets);
        add(&mut self.to_bytes, &other.to_bytes);
        for (ours, theirs) in self.neighbours.iter_mut().zip(&other.neighbours) {
            add(ours, theirs);
        }
        add(&mut self.drops, &other.drops);
    }
}

/// What is rare enough to be told one by one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u32)]
pub enum EventKind {
    /// Somebody claimed an address that somebody else is known to have.
    Conflict = 0,
    /// A guest sent from what is not its own.
    Spoof = 1,
    /// Another host still sends here for a station that has left.
    Stale = 2,
    /// Another host sends for a network that is not here.
    UnknownVni = 3,
}

impl EventKind {
    /// Every kind, in the order of its number.
    pub const ALL: [Self; 4] = [Self::Conflict, Self::Spoof, Self::Stale, Self::UnknownVni];
}

/// One of them. What does not apply is zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Event {
    /// When, by the kernel's monotonic clock, in nanoseconds.
    pub at_ns: u64,
    /// The port's number in the account.
    pub port: u64,
    /// VXLAN network identifier.
    pub vni: u32,
    /// An [`EventKind`].
    pub kind: u32,
    /// The Ethernet address that sent, or that left.
    pub mac: [u8; 6],
    /// The one that is known to have the address.
    pub owner: [u8; 6],
    /// For a spoof the [`Reason`].
    pub detail: u32,
    /// The IP address in question; IPv4 mapped.
    pub address: [u8; 16],
    /// The other host's VTEP; IPv4 mapped.
    pub peer: [u8; 16],
}

/// What has an event of its own at most once in [`EVENT_PAUSE_NS`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct GateKey {
    /// An [`EventKind`].
    pub kind: u32,
    /// VXLAN network identifier.
    pub vni: u32,
    /// The station that sent, or that left.
    pub mac: [u8; 6],
    /// Zero.
    pub reserved: u16,
}

/// What could not be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Lost {
    /// An event, because the ring was full.
    Event = 0,
    /// A packet's count, because [`ACCOUNT_MAP`] was full.
    Account = 1,
    /// A packet of a link that has no port: it passed uncounted.
    NoPort = 2,
    /// A stale packet's count, because [`crate::underlay::STALE_MAP`] was full.
    Stale = 3,
}

impl Lost {
    /// Every kind, in the order of its number.
    pub const ALL: [Self; 4] = [Self::Event, Self::Account, Self::NoPort, Self::Stale];

    /// The name in metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Event => "event",
            Self::Account => "account",
            Self::NoPort => "no_port",
            Self::Stale => "stale",
        }
    }
}

#[cfg(feature = "user")]
#[expect(unsafe_code, reason = "aya's marker for types that may be copied from a map's bytes")]
mod pod {
    // SAFETY: repr(C), integers only, no padding, every bit pattern valid.
    unsafe impl aya::Pod for super::Network {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::StationKey {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::Station {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::NeighbourKey {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::Neighbour {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::AccountKey {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::Account {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::GateKey {}
}
