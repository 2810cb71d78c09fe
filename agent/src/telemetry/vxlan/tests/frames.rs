//! Packets made by hand.

use godwit_ebpf_common::packet::Packet;
use godwit_ebpf_common::underlay::{Class, Other};

pub(super) const PORT: u16 = 4789;
pub(super) const VNI: u32 = 0x00ab_cdef;
pub(super) const UNICAST: [u8; 6] = [0xfa, 0x16, 0x3e, 0, 0, 1];

/// A VXLAN packet whose parts can be changed before it is built.
#[derive(Clone, Debug)]
pub(super) struct Frame {
    /// VLAN tags, outermost first, by EtherType.
    pub(super) tags: Vec<u16>,
    pub(super) outer: Outer,
    pub(super) port: u16,
    pub(super) flags: u8,
    pub(super) destination: [u8; 6],
    /// From the inner EtherType on.
    pub(super) inner: Vec<u8>,
}

#[derive(Clone, Debug)]
pub(super) enum Outer {
    V4 {
        /// 32-bit words of options.
        options: u8,
        /// Flags and offset, as in the header.
        fragment: u16,
        protocol: u8,
    },
    V6 {
        /// Extension headers: their number, and what is in them after the number of the next one.
        extensions: Vec<(u8, Vec<u8>)>,
    },
}

impl Frame {
    pub(super) fn v4() -> Self {
        Self {
            tags: Vec::new(),
            outer: Outer::V4 { options: 0, fragment: 0, protocol: 17 },
            port: PORT,
            flags: 0x08,
            destination: UNICAST,
            inner: [vec![0x88, 0xb5], vec![0x5a; 46]].concat(),
        }
    }

    pub(super) fn v6(extensions: Vec<(u8, Vec<u8>)>) -> Self {
        Self { outer: Outer::V6 { extensions }, ..Self::v4() }
    }

    pub(super) fn build(&self) -> Vec<u8> {
        let mut bytes = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
        for tag in &self.tags {
            bytes.extend(tag.to_be_bytes());
            bytes.extend([0, 42]);
        }
        match &self.outer {
            Outer::V4 { options, fragment, protocol } => {
                bytes.extend([0x08, 0x00, 0x45 + options, 0, 0, 0, 0, 0]);
                bytes.extend(fragment.to_be_bytes());
                bytes.extend([64, *protocol, 0, 0, 198, 18, 0, 1, 198, 18, 0, 2]);
                bytes.extend(vec![1; usize::from(*options) * 4]);
            }
            Outer::V6 { extensions } => {
                let numbers: Vec<u8> = extensions.iter().map(|extension| extension.0).chain([17]).collect();
                bytes.extend([0x86, 0xdd, 0x60, 0, 0, 0, 0, 0, numbers[0], 64]);
                bytes.extend([0xfd; 32]);
                for ((_, body), next) in extensions.iter().zip(&numbers[1..]) {
                    bytes.push(*next);
                    bytes.extend(body);
                }
            }
        }
        bytes.extend([0xc0, 0x00]);
        bytes.extend(self.port.to_be_bytes());
        bytes.extend([0, 0, 0, 0]);
        bytes.extend([self.flags, 0, 0, 0]);
        bytes.extend((VNI << 8).to_be_bytes());
        bytes.extend(self.destination);
        bytes.extend([2, 0, 0, 0, 0, 3]);
        bytes.extend(&self.inner);
        bytes
    }

    /// An inner IPv4 and TCP segment, with 12 bytes of TCP options, of this many payload bytes.
    pub(super) fn with_tcp(mut self, payload_bytes: usize) -> Self {
        self.inner = vec![0x08, 0x00, 0x45, 0, 0, 0, 0, 0, 0x40, 0, 64, 6, 0, 0];
        self.inner.extend([10, 0, 0, 1, 10, 0, 0, 2]);
        self.inner.extend([0; 12]);
        self.inner.extend([0x80, 0x10, 0, 0, 0, 0, 0, 0]);
        self.inner.extend([1; 12]);
        self.inner.extend(vec![0; payload_bytes]);
        self
    }
}

/// Eight bytes of a hop-by-hop, routing or destination options header, without the number of the next one.
pub(super) fn extension(units: u8) -> Vec<u8> {
    let mut body = vec![units];
    body.extend(vec![0; usize::from(units) * 8 + 6]);
    body
}

/// A fragment header with this offset and flag.
pub(super) fn fragment(offset_and_flag: u16) -> Vec<u8> {
    let [high, low] = offset_and_flag.to_be_bytes();
    vec![0, high, low, 0, 0, 0, 1]
}

/// Every kind of packet, with what it is.
pub(super) fn catalogue() -> Vec<(&'static str, Frame, Packet)> {
    let vxlan = |class, inner| Packet::Vxlan { vni: VNI, class, inner };
    let v4 = |options, fragment, protocol| Frame {
        outer: Outer::V4 { options, fragment, protocol },
        ..Frame::v4()
    };
    vec![
        ("IPv4", Frame::v4(), vxlan(Class::Unicast, 50)),
        ("IPv4 with options", v4(10, 0, 17), vxlan(Class::Unicast, 90)),
        ("IPv4 that must not be fragmented", v4(0, 0x4000, 17), vxlan(Class::Unicast, 50)),
        ("IPv4, first fragment", v4(0, 0x2000, 17), vxlan(Class::Unicast, 50)),
        ("IPv4, middle fragment", v4(0, 0x20b9, 17), Packet::Other(Other::Fragment)),
        ("IPv4, last fragment", v4(0, 0x00b9, 17), Packet::Other(Other::Fragment)),
        ("IPv4, later fragment of TCP", v4(0, 0x00b9, 6), Packet::Foreign),
        ("IPv4, TCP", v4(0, 0, 6), Packet::Foreign),
        ("VLAN", Frame { tags: vec![0x8100], ..Frame::v4() }, vxlan(Class::Unicast, 54)),
        ("two VLANs", Frame { tags: vec![0x88a8, 0x8100], ..Frame::v4() }, vxlan(Class::Unicast, 58)),
        ("three VLANs", Frame { tags: vec![0x88a8, 0x8100, 0x8100], ..Frame::v4() }, Packet::Foreign),
        ("IPv6", Frame::v6(vec![]), vxlan(Class::Unicast, 70)),
        (
            "IPv6 behind every extension header once",
            Frame::v6(vec![(0, extension(0)), (60, extension(1)), (43, extension(2)), (44, fragment(1))]),
            vxlan(Class::Unicast, 70 + 8 + 16 + 24 + 8),
        ),
        (
            "IPv6 behind more options than are read in place",
            Frame::v6(vec![(60, extension(80))]),
            vxlan(Class::Unicast, 70 + 648),
        ),
        ("IPv6, later fragment", Frame::v6(vec![(44, fragment(8))]), Packet::Other(Other::Fragment)),
        (
            "IPv6 with more headers than are followed",
            Frame::v6((0..6).map(|_| (60, extension(0))).collect()),
            Packet::Other(Other::Malformed),
        ),
        ("IPv6, another protocol", Frame::v6(vec![(58, vec![0; 7])]), Packet::Foreign),
        ("another port", Frame { port: PORT + 1, ..Frame::v4() }, Packet::Foreign),
        ("no VNI", Frame { flags: 0xf7, ..Frame::v4() }, Packet::Other(Other::NoVni)),
        ("reserved flags", Frame { flags: 0xff, ..Frame::v4() }, vxlan(Class::Unicast, 50)),
        ("broadcast", Frame { destination: [0xff; 6], ..Frame::v4() }, vxlan(Class::Broadcast, 50)),
        (
            "multicast",
            Frame { destination: [0x33, 0x33, 0, 0, 0, 1], ..Frame::v4() },
            vxlan(Class::Multicast, 50),
        ),
        (
            "multicast, nearly broadcast",
            Frame { destination: [0xff, 0xff, 0xff, 0xff, 0xff, 0xfe], ..Frame::v6(vec![]) },
            vxlan(Class::Multicast, 70),
        ),
    ]
}
