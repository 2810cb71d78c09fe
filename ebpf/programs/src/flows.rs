//! Connections of which packets passed a moment ago. Most packets are of one: each CPU remembers some, so that nothing has
//! to be looked for in the tables. Their entries there are up to date to a second all the same.

use crate::fresh::{self, Stamp};
use aya_ebpf::{
    macros::map,
    maps::{Array, PerCpuArray},
    programs::TcContext,
};
use godwit_ebpf_common::filter::Packet;

#[map(name = "FILTER_GEN_V1")]
static GENERATION: Array<u64> = Array::with_max_entries(1, 0);

/// What one way of a connection that was let pass is told by: the tap, way, family and protocol; the ports; the
/// addresses.
type Way = [u64; 6];

/// A way that was let pass, and goes on.
#[repr(C)]
struct Flow {
    stamp: Stamp,
    way: Way,
}

/// Bits of how many flows each CPU keeps.
const FLOWS_BITS: u32 = 10;

#[map(name = "FLOWS")]
static FLOWS: PerCpuArray<Flow> = PerCpuArray::with_max_entries(1 << FLOWS_BITS, 0);

/// A packet's way, and where this CPU remembers it.
pub struct Found {
    flow: &'static mut Flow,
    way: Way,
    now: Stamp,
}

/// Where a packet's connection would be remembered; none if it is not [`usual`].
#[inline(always)]
pub fn find(context: &TcContext, link: u32, direction: u32) -> Option<Found> {
    let now = Stamp::now(GENERATION.get(0).copied().unwrap_or(0));
    let way = usual(context, link, direction)?;
    let [a, b, c, d, e, f] = way;
    let mixed = a ^ b.rotate_left(13) ^ c.rotate_left(29) ^ d ^ e.rotate_left(43) ^ f.rotate_left(7);
    let flow = FLOWS.get_ptr_mut(fresh::place::<FLOWS_BITS>(mixed))?;
    // SAFETY: this CPU's own value, which nothing else uses while the program runs; every value is valid.
    Some(Found { flow: unsafe { &mut *flow }, way, now })
}

impl Found {
    /// Whether a packet like this was let pass, and nothing has changed since.
    #[inline(always)]
    pub fn is_known(&self) -> bool {
        self.flow.way == self.way && self.flow.stamp.is_good(&self.now)
    }

    /// That this one is.
    #[inline(always)]
    pub fn remember(&mut self) {
        *self.flow = Flow { stamp: self.now, way: self.way };
    }
}

/// The way of a packet as most are: UDP, or TCP in the midst of its connection, without tags, options, extension headers
/// or fragments. Other packets may mean more than that their connection goes on.
#[inline(always)]
fn usual(context: &TcContext, link: u32, direction: u32) -> Option<Way> {
    const TCP: u8 = 6;
    const UDP: u8 = 17;
    const CHANGES: u8 = Packet::SYN | Packet::FIN | Packet::RST;
    const V4_BYTES: usize = 54;
    const V6_BYTES: usize = 74;
    let (start, end) = (context.data(), context.data_end());
    if start + V4_BYTES > end {
        return None;
    }
    // SAFETY: these bytes are inside the packet, as the verifier checks by the line above.
    let b = unsafe { &*(start as *const [u8; V4_BYTES]) };
    if b[12] == 0x08 && b[13] == 0 {
        let (protocol, flags) = (b[23], b[47]);
        let is_whole = b[14] == 0x45 && b[20] & 0x3f == 0 && b[21] == 0;
        if !is_whole || !(protocol == UDP || protocol == TCP && flags & CHANGES == 0) {
            return None;
        }
        return Some([way(link, direction, 4, protocol), ports(b, 34), word(b, 26), 0, 0, 0]);
    }
    if b[12] != 0x86 || b[13] != 0xdd || start + V6_BYTES > end {
        return None;
    }
    // SAFETY: as above.
    let b = unsafe { &*(start as *const [u8; V6_BYTES]) };
    let (protocol, flags) = (b[20], b[67]);
    if b[14] >> 4 != 6 || !(protocol == UDP || protocol == TCP && flags & CHANGES == 0) {
        return None;
    }
    let way = way(link, direction, 6, protocol);
    Some([way, ports(b, 54), word(b, 22), word(b, 30), word(b, 38), word(b, 46)])
}

#[inline(always)]
fn way(link: u32, direction: u32, family: u8, protocol: u8) -> u64 {
    u64::from(link) << 32 | u64::from(direction) << 16 | u64::from(family) << 8 | u64::from(protocol)
}

#[inline(always)]
fn ports(b: &[u8], at: usize) -> u64 {
    word(b, at) & 0xffff_ffff
}

/// Eight bytes at a place that is known when this is compiled, as they lie in memory.
#[inline(always)]
fn word(b: &[u8], at: usize) -> u64 {
    match b.get(at..).and_then(|rest| rest.first_chunk()) {
        Some(bytes) => u64::from_le_bytes(*bytes),
        None => 0,
    }
}
