//! Counts the VXLAN packets that pass on the underlay link, by network, direction and class. It lets every
//! packet pass as it came, to whatever else is attached.
#![no_std]
#![no_main]

use aya_ebpf::{
    bindings::{BPF_NOEXIST, tcx_action_base::TCX_NEXT},
    macros::{classifier, map},
    maps::{PerCpuArray, PerCpuHashMap},
    programs::TcContext,
};
use godwit_ebpf_common::{
    packet::{self, Frame, Packet, Size},
    underlay::{Direction, Other, TRAFFIC_ENTRIES, Traffic, TrafficKey},
};

#[map(name = "TRAFFIC_V1")]
static TRAFFIC: PerCpuHashMap<TrafficKey, Traffic> = PerCpuHashMap::with_max_entries(TRAFFIC_ENTRIES, 0);

#[map(name = "OTHER_V1")]
static OTHER: PerCpuArray<u64> = PerCpuArray::with_max_entries(Other::ALL.len() as u32, 0);

/// Set by the loader before the kernel freezes it.
#[unsafe(no_mangle)]
static VXLAN_PORT: u16 = 4789;

#[classifier]
pub fn underlay_ingress(context: TcContext) -> i32 {
    count(&context, Direction::Rx);
    TCX_NEXT
}

#[classifier]
pub fn underlay_egress(context: TcContext) -> i32 {
    count(&context, Direction::Tx);
    TCX_NEXT
}

/// How far into a packet headers are read in place, in bytes; a power of two, for the verifier to see the
/// bound.
const NEAR_BYTES: usize = 512;

struct Skb<'a>(&'a TcContext);

impl Frame for Skb<'_> {
    #[inline(always)]
    fn read<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        let start = self.0.data() + (offset & (NEAR_BYTES - 1));
        if offset < NEAR_BYTES && start + N <= self.0.data_end() {
            // SAFETY: these bytes are inside the packet, as the verifier checks by the line above.
            return Some(unsafe { *(start as *const [u8; N]) });
        }
        // Not in the linear part, or far off: copied by the kernel, which takes twice as long.
        self.0.load(offset).ok()
    }
}

#[inline(always)]
fn count(context: &TcContext, direction: Direction) {
    let frame = Skb(context);
    // SAFETY: a static in .rodata, read as volatile because the loader's value is not the compiler's.
    let port = unsafe { core::ptr::read_volatile(&raw const VXLAN_PORT) };
    match packet::parse(&frame, port) {
        Packet::Foreign => {}
        Packet::Other(other) => count_other(other),
        Packet::Vxlan { vni, class, inner } => {
            let skb = context.skb.skb;
            // SAFETY: the context that the kernel passed to this program; these are its fields for any TC
            // program.
            let size = unsafe {
                Size { bytes: (*skb).len, segments: (*skb).gso_segs, segment_bytes: (*skb).gso_size }
            };
            let seen = packet::on_the_wire(&frame, inner, size);
            count_traffic(&TrafficKey::new(vni, direction, class), seen);
        }
    }
}

#[inline(always)]
fn count_traffic(key: &TrafficKey, seen: Traffic) {
    let mut entry = TRAFFIC.get_ptr_mut(key);
    if entry.is_none() {
        // Another CPU may be first; then this fails and the entry is there. If it is not, there is no room.
        let _ = TRAFFIC.insert(key, Traffic::default(), u64::from(BPF_NOEXIST));
        entry = TRAFFIC.get_ptr_mut(key);
    }
    match entry {
        // SAFETY: this CPU's own value, which nothing else writes while the program runs: it is not preempted
        // by another run, since both directions run with bottom halves off.
        Some(traffic) => unsafe {
            (*traffic).packets += seen.packets;
            (*traffic).bytes += seen.bytes;
        },
        None => count_other(Other::MapFull),
    }
}

#[inline(always)]
fn count_other(other: Other) {
    if let Some(packets) = OTHER.get_ptr_mut(other as u32) {
        // SAFETY: this CPU's own value, as above.
        unsafe { *packets += 1 };
    }
}

/// There is nothing in these programs that panics; the compiler wants to be told what would happen.
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// The kernel reads this: helpers reserved to GPL-compatible programs are open to this licence.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
