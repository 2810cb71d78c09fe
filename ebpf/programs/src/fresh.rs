//! How long a CPU may go by what it has found in the maps.
//!
//! A look into a hash map takes as long as all else that is done with a packet, so each CPU keeps what it found in an array
//! of its own, where a look takes nearly nothing. The agent writes another number into the map of generations after each
//! change of what it tells; and what was found is looked for again after [`TICKS`], whoever may have forgotten that.

use aya_ebpf::helpers::generated::bpf_jiffies64;

/// How long a find is good, in ticks of the kernel: 64 to 640 ms, as it was built.
const TICKS: u64 = 64;

/// When something was found, and by which generation of what the agent tells.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Stamp {
    generation: u64,
    tick: u64,
}

impl Stamp {
    /// Now. The generation is to be read before what is looked for.
    #[inline(always)]
    pub fn now(generation: u64) -> Self {
        // SAFETY: reads a number; the kernel puts the read itself in the place of this call.
        Self { generation, tick: unsafe { bpf_jiffies64() } }
    }

    /// Whether it is still good.
    #[inline(always)]
    pub fn is_good(&self, now: &Self) -> bool {
        self.generation == now.generation && now.tick.wrapping_sub(self.tick) < TICKS
    }
}

/// The place of something among `1 << BITS`, by numbers that tell it from others (Fibonacci hashing: Knuth, TAOCP 6.4).
#[inline(always)]
pub fn place<const BITS: u32>(mixed: u64) -> u32 {
    (mixed.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (64 - BITS)) as u32
}
