//! The maps that both objects share, and what both do with them.

use crate::fresh::Stamp;
use aya_ebpf::{
    bindings::{BPF_F_NO_PREALLOC, BPF_NOEXIST},
    helpers::bpf_ktime_get_ns,
    macros::map,
    maps::{Array, HashMap, LruHashMap, PerCpuArray, PerCpuHashMap, RingBuf},
};
use godwit_ebpf_common::answer::ND_ANSWER_BYTES;
use godwit_ebpf_common::guest::Message;
use godwit_ebpf_common::tables::{
    ACCOUNT_ENTRIES, Account, AccountKey, EVENT_PAUSE_NS, EVENTS_BYTES, Event, GATE_ENTRIES, GateKey, Lost,
    NEIGHBOURS_ENTRIES, NETWORKS_ENTRIES, Neighbour, NeighbourKey, Network, Outcome, Protocol,
    STATIONS_ENTRIES, Station, StationKey,
};

#[map(name = "NETWORKS_V1")]
static NETWORKS: HashMap<u32, Network> = HashMap::with_max_entries(NETWORKS_ENTRIES, 0);

#[map(name = "STATIONS_V1")]
static STATIONS: HashMap<StationKey, Station> = HashMap::with_max_entries(STATIONS_ENTRIES, 0);

#[map(name = "NEIGHBOURS_V1")]
static NEIGHBOURS: HashMap<NeighbourKey, Neighbour> = HashMap::with_max_entries(NEIGHBOURS_ENTRIES, 0);

#[map(name = "ACCOUNT_V1")]
static ACCOUNT: PerCpuHashMap<AccountKey, Account> =
    PerCpuHashMap::with_max_entries(ACCOUNT_ENTRIES, BPF_F_NO_PREALLOC);

/// What a new account starts with: too large for the stack.
#[map(name = "BLANK_V1")]
static BLANK: PerCpuArray<Account> = PerCpuArray::with_max_entries(1, 0);

/// What is counted where there is no room for an account.
#[map(name = "SPILL")]
static SPILL: PerCpuArray<Account> = PerCpuArray::with_max_entries(1, 0);

/// What a run of a program works on, as far as it is too large for the stack, or as the verifier shall forget what it
/// knows of it.
pub struct Scratch {
    /// See [`forget`].
    number: u64,
    /// A message about neighbours.
    pub message: Message,
    /// An answer to it.
    #[allow(dead_code, reason = "on the underlay nothing is answered")]
    pub answer: [u8; ND_ANSWER_BYTES],
    /// What is told next.
    pub event: Event,
}

#[map(name = "SCRATCH")]
static SCRATCH: PerCpuArray<Scratch> = PerCpuArray::with_max_entries(1, 0);

/// This CPU's place to work.
#[inline(always)]
pub fn scratch() -> Option<&'static mut Scratch> {
    // SAFETY: this CPU's own value, which nothing else uses while the program runs; every value is valid but for the
    // enums in the message, which is written before it is read.
    SCRATCH.get_ptr_mut(0).map(|scratch| unsafe { &mut *scratch })
}

#[map(name = "EVENTS_V1")]
static EVENTS: RingBuf = RingBuf::with_byte_size(EVENTS_BYTES, 0);

#[map(name = "EVENT_GATE_V1")]
static GATE: LruHashMap<GateKey, u64> = LruHashMap::with_max_entries(GATE_ENTRIES, 0);

#[map(name = "GENERATION_V1")]
static GENERATION: Array<u64> = Array::with_max_entries(1, 0);

#[map(name = "LOST_V1")]
static LOST: PerCpuArray<u64> = PerCpuArray::with_max_entries(Lost::ALL.len() as u32, 0);

/// This moment, by which what is found now will be judged.
#[inline(always)]
pub fn now() -> Stamp {
    Stamp::now(GENERATION.get(0).copied().unwrap_or(0))
}

/// The network of a VNI, if it is on this host.
#[inline(always)]
pub fn network(vni: u32) -> Option<Network> {
    // SAFETY: the agent replaces values whole, and one integer is read whole.
    unsafe { NETWORKS.get(vni) }.copied()
}

/// Where an Ethernet address is.
#[inline(always)]
pub fn station(vni: u32, mac: [u8; 6]) -> Option<&'static Station> {
    // SAFETY: the agent replaces entries rather than change them in place; a reader may see the old one.
    unsafe { STATIONS.get(StationKey::new(vni, mac)) }
}

/// Who has an IP address.
#[inline(always)]
pub fn neighbour(vni: u32, address: [u8; 16]) -> Option<Neighbour> {
    // SAFETY: as above.
    unsafe { NEIGHBOURS.get(NeighbourKey { vni, address }) }.copied()
}

/// A number out of memory, of which the verifier knows nothing.
#[inline(always)]
pub fn forget(number: u64) -> u64 {
    let Some(scratch) = scratch() else { return 0 };
    // SAFETY: a reference's place; volatile, because the compiler must not see that it is the same number.
    unsafe {
        (&raw mut scratch.number).write_volatile(number);
        (&raw const scratch.number).read_volatile()
    }
}

/// This CPU's counters of a port, made if they are not there. Where there is no room, some that nobody reads.
#[inline(always)]
pub fn account(port: u64, vni: u32) -> Option<&'static mut Account> {
    let key = AccountKey { port, vni, reserved: 0 };
    let mut entry = ACCOUNT.get_ptr_mut(key);
    if entry.is_none() {
        // Another CPU may be first; then this fails and the entry is there. If it is not, there is no room.
        if let Some(blank) = BLANK.get(0) {
            let _ = ACCOUNT.insert(key, blank, u64::from(BPF_NOEXIST));
        }
        entry = ACCOUNT.get_ptr_mut(key);
    }
    if entry.is_none() {
        lose(Lost::Account);
        entry = SPILL.get_ptr_mut(0);
    }
    // SAFETY: this CPU's own value, which nothing else writes while the program runs: programs of TC run with
    // bottom halves off.
    entry.map(|entry| unsafe { &mut *entry })
}

/// Counts one message about neighbours.
#[inline(always)]
pub fn note(account: &mut Account, protocol: Protocol, outcome: Outcome) {
    // The compiler would take the number's bounds for granted, and the verifier does not know them.
    let counts = &mut account.neighbours[forget(protocol as u64) as usize & 1];
    let index = outcome as usize;
    if index < counts.len() {
        counts[index] += 1;
    }
}

/// Counts what could not be written.
#[inline(always)]
pub fn lose(what: Lost) {
    if let Some(count) = LOST.get_ptr_mut(what as u32) {
        // SAFETY: this CPU's own value, as above.
        unsafe { *count += 1 };
    }
}

/// Tells the agent of the event in [`Scratch`], unless the station has caused such a one a moment ago.
#[inline(never)]
pub fn tell() {
    let Some(scratch) = scratch() else { return };
    let event = &mut scratch.event;
    // SAFETY: reads a clock.
    event.at_ns = unsafe { bpf_ktime_get_ns() };
    let key = GateKey { kind: event.kind, vni: event.vni, mac: event.mac, reserved: 0 };
    // SAFETY: one integer, read whole.
    let last = unsafe { GATE.get(key) }.copied();
    if last.is_some_and(|last| event.at_ns.wrapping_sub(last) < EVENT_PAUSE_NS) {
        return;
    }
    let _ = GATE.insert(key, event.at_ns, 0);
    if EVENTS.output::<Event>(&*event, 0).is_err() {
        lose(Lost::Event);
    }
}
