//! The maps of the object `port`, whose programs are on the tap of each guest.

/// Map (hash): the tap's index (`u32`) to [`Port`].
pub const PORTS_MAP: &str = "PORTS_V1";

/// Map (longest prefix match): [`Allowed`] to what the match means, [`ALLOWED_MAC`] or [`ALLOWED_ADDRESS`].
pub const ALLOWED_MAP: &str = "ALLOWED_V1";

/// Entries of [`PORTS_MAP`] unless the loader says otherwise.
pub const PORTS_ENTRIES: u32 = 1024;

/// Entries of [`ALLOWED_MAP`] unless the loader says otherwise.
pub const ALLOWED_ENTRIES: u32 = 8192;

/// Value: the Ethernet address is the port's.
pub const ALLOWED_MAC: u32 = 1;

/// Value: the IP address is the port's, with this Ethernet address.
pub const ALLOWED_ADDRESS: u32 = 2;

/// Bits of an [`Allowed`] up to its Ethernet address: a prefix of so many means that alone.
pub const ALLOWED_MAC_BITS: u32 = 80;

/// Bits of an [`Allowed`] before its IP address.
pub const ALLOWED_HEAD_BITS: u32 = 96;

/// The program for what a guest sends.
pub const FROM_PROGRAM: &str = "port_from_guest";

/// The program for what a guest gets.
pub const TO_PROGRAM: &str = "port_to_guest";

/// A guest's port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Port {
    /// Its number in the account: the first eight bytes of its id.
    pub id: u64,
    /// VXLAN network identifier.
    pub vni: u32,
    /// [`Port::SECURE`] or zero.
    pub flags: u32,
    /// Its Ethernet address.
    pub mac: [u8; 6],
    /// Zero.
    pub reserved: u16,
    /// Its first IPv4 address, so that most packets need no look at [`ALLOWED_MAP`]; zero: none.
    pub ipv4: [u8; 4],
    /// Its first IPv6 address, likewise.
    pub ipv6: [u8; 16],
    /// Zero.
    pub reserved_too: u32,
}

impl Port {
    /// It sends only from what is its own.
    pub const SECURE: u32 = 1;
}

/// What a port may send from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(C)]
pub struct Allowed {
    /// The tap's index.
    pub link: u32,
    /// The Ethernet address.
    pub mac: [u8; 6],
    /// 4 or 6; zero: the Ethernet address alone.
    pub family: u16,
    /// The IP address, one of IPv4 in the first four bytes.
    pub address: [u8; 16],
}

#[cfg(feature = "user")]
#[expect(unsafe_code, reason = "aya's marker for types that may be copied from a map's bytes")]
mod pod {
    // SAFETY: repr(C), integers only, no padding, every bit pattern valid.
    unsafe impl aya::Pod for super::Port {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::Allowed {}
}
