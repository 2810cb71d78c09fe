//! A packet as the kernel hands it to a TC program.

use crate::tables;
use aya_ebpf::programs::TcContext;
use godwit_ebpf_common::packet::{Frame, Size};

/// How far into a packet headers are read in place, in bytes; a power of two, for the verifier to see the
/// bound.
const NEAR_BYTES: usize = 512;

/// Bytes in the linear part of a packet.
#[inline(always)]
fn near<const N: usize>(context: &TcContext, offset: usize) -> Option<[u8; N]> {
    // Read anew, or the compiler leaves out the mask, which the check below makes needless: the verifier of Linux 6.12 may
    // lose the number's bounds at that check, and then wants the mask.
    // SAFETY: a reference's place.
    let masked = unsafe { (&raw const offset).read_volatile() } & (NEAR_BYTES - 1);
    let start = context.data() + masked;
    if offset < NEAR_BYTES && start + N <= context.data_end() {
        // SAFETY: these bytes are inside the packet, as the verifier checks by the line above.
        return Some(unsafe { *(start as *const [u8; N]) });
    }
    None
}

/// A packet's bytes, read in place where they are in its linear part.
pub struct Skb<'a>(pub &'a TcContext);

impl Frame for Skb<'_> {
    #[inline(always)]
    fn read<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        // Not in the linear part, or far off: copied by the kernel, which takes twice as long.
        near(self.0, offset).or_else(|| self.0.load(offset).ok())
    }

    #[inline(always)]
    fn forget(&self, number: usize) -> usize {
        tables::forget(number as u64) as usize
    }
}

/// A packet's head: what is in its linear part, of which [`head`] makes sure that it has the usual headers. One way
/// to read rather than two halves what the verifier has to follow, each time.
#[allow(dead_code, reason = "on the underlay all is read, however far off")]
pub struct Head<'a>(pub &'a TcContext);

/// Bytes that the head has, if the packet does: twice what the longest message about neighbours needs.
#[allow(dead_code, reason = "as above")]
const HEAD_BYTES: u32 = 128;

/// The packet's head.
#[allow(dead_code, reason = "as above")]
#[inline(always)]
pub fn head(context: &TcContext) -> Head<'_> {
    let wanted = context.len().min(HEAD_BYTES);
    if context.data() + wanted as usize > context.data_end() && !is_segment(context) {
        // If there is no memory for it, less is read.
        let _ = context.pull_data(wanted);
    }
    Head(context)
}

/// Whether it is TCP whose headers, which are all that is read of it, are in the linear part. The payload of large
/// segments is elsewhere, and to pull some of it in would make the kernel copy the head of each.
#[allow(dead_code, reason = "as above")]
#[inline(always)]
fn is_segment(context: &TcContext) -> bool {
    let Some(bytes) = near::<54>(context, 0) else { return false };
    match [bytes[12], bytes[13]] {
        // Without options, and no fragment but perhaps the first.
        [0x08, 0x00] => bytes[14] == 0x45 && bytes[23] == 6 && bytes[20] & 0x1f == 0 && bytes[21] == 0,
        [0x86, 0xdd] => bytes[20] == 6 && near::<74>(context, 0).is_some(),
        _ => false,
    }
}

impl Frame for Head<'_> {
    #[inline(always)]
    fn read<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        near(self.0, offset)
    }

    #[inline(always)]
    fn forget(&self, number: usize) -> usize {
        tables::forget(number as u64) as usize
    }
}

/// A packet's size, with its offload.
#[inline(always)]
pub fn size(context: &TcContext) -> Size {
    let skb = context.skb.skb;
    // SAFETY: the context that the kernel passed to this program; these are its fields for any TC program.
    unsafe {
        Size {
            bytes: (*skb).len,
            segments: (*skb).gso_segs,
            segment_bytes: (*skb).gso_size,
            // An outer VLAN tag is beside the packet, not in it.
            tag_bytes: if (*skb).vlan_present != 0 { 4 } else { 0 },
        }
    }
}
