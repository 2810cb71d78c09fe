//! Counts the VXLAN packets that pass on the underlay link, by network, direction, class and peer, and notices what
//! should not be there. It lets every packet pass as it came, to whatever else is attached.
#![no_std]
#![no_main]

mod fresh;
mod object;
mod skb;
mod tables;

use aya_ebpf::{
    bindings::{BPF_F_NO_PREALLOC, BPF_NOEXIST, tcx_action_base::TCX_NEXT},
    helpers::bpf_ktime_get_ns,
    macros::{classifier, map},
    maps::{PerCpuArray, PerCpuHashMap},
    programs::TcContext,
};
use fresh::Stamp;
use godwit_ebpf_common::{
    guest::{self, Kind, NONE},
    packet::{self, Frame, Packet},
    tables::{Event, EventKind, Lost, Neighbour, Outcome, Station},
    underlay::{Class, Direction, Other, STALE_ENTRIES, Stale, TRAFFIC_ENTRIES, Traffic, TrafficKey},
};
use skb::Skb;

#[map(name = "TRAFFIC_V2")]
static TRAFFIC: PerCpuHashMap<TrafficKey, Traffic> =
    PerCpuHashMap::with_max_entries(TRAFFIC_ENTRIES, BPF_F_NO_PREALLOC);

#[map(name = "OTHER_V2")]
static OTHER: PerCpuArray<u64> = PerCpuArray::with_max_entries(Other::ALL.len() as u32, 0);

#[map(name = "STALE_V1")]
static STALE: PerCpuHashMap<u32, Stale> = PerCpuHashMap::with_max_entries(STALE_ENTRIES, BPF_F_NO_PREALLOC);

/// What a destination is.
#[repr(C)]
struct Find {
    stamp: Stamp,
    /// The station, and its network; zero: nothing is here yet.
    id: [u64; 2],
    /// A [`Class`].
    class: u64,
    /// When it left this host; zero: it did not.
    left_ns: u64,
}

/// Bits of how many finds each CPU keeps.
const FINDS_BITS: u32 = 9;

#[map(name = "FINDS")]
static FINDS: PerCpuArray<Find> = PerCpuArray::with_max_entries(1 << FINDS_BITS, 0);

/// Set by the loader before the kernel freezes it.
#[unsafe(no_mangle)]
static VXLAN_PORT: u16 = 4789;

/// Set likewise: whether networks that the agent was not told of are strangers, or counted like others.
#[unsafe(no_mangle)]
static KNOWN_ONLY: u8 = 0;

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

#[inline(always)]
fn count(context: &TcContext, direction: Direction) {
    let frame = Skb(context);
    // SAFETY: a static in .rodata, read as volatile because the loader's value is not the compiler's.
    let port = unsafe { core::ptr::read_volatile(&raw const VXLAN_PORT) };
    match packet::parse(&frame, port) {
        Packet::Foreign => {}
        Packet::Other(other) => count_other(other),
        Packet::Vxlan { vni, class, inner } => {
            let seen = packet::on_the_wire(&frame, inner, skb::size(context));
            let Some(peer) = packet::peer(&frame, direction) else { return };
            let class = match class {
                Class::Unicast => unicast(&frame, vni, inner, direction, peer, seen),
                class => class,
            };
            count_traffic(&TrafficKey::new(vni, direction, class, peer), seen);
            if matches!(class, Class::Broadcast | Class::Multicast) {
                watch(&frame, vni, inner, direction, peer);
            }
        }
    }
}

/// The class of a packet for one station, and a word about one that has left.
#[inline(always)]
fn unicast(
    frame: &Skb<'_>,
    vni: u32,
    inner: usize,
    direction: Direction,
    peer: [u8; 16],
    seen: Traffic,
) -> Class {
    let Some(mac) = frame.read::<6>(inner) else { return Class::Unicast };
    let Some(find) = find(vni, mac) else { return Class::Unicast };
    if find.left_ns != 0 && matches!(direction, Direction::Rx) {
        stale(vni, mac, find.left_ns, peer, seen);
    }
    if find.class == Class::UnknownUnicast as u64 { Class::UnknownUnicast } else { Class::Unicast }
}

#[inline(always)]
fn find(vni: u32, mac: [u8; 6]) -> Option<&'static Find> {
    let [a, b, c, d, e, f] = mac;
    let station = u64::from_ne_bytes([a, b, c, d, e, f, 0, 0]);
    // Inverted: the number of a network has 24 bits, so none is zero then.
    let id = [station, u64::from(!vni)];
    let now = tables::now();
    let place = FINDS.get_ptr_mut(fresh::place::<FINDS_BITS>(station ^ u64::from(vni) << 20))?;
    // SAFETY: this CPU's own value, as in tables.rs; every value is valid.
    let find = unsafe { &mut *place };
    if find.id != id || !find.stamp.is_good(&now) {
        let (class, left_ns) = match tables::station(vni, mac) {
            // Of a network that is not here nothing is known, and so nothing is unknown.
            None if tables::network(vni).is_some() => (Class::UnknownUnicast, 0),
            Some(station) if station.place == Station::ELSEWHERE => (Class::Unicast, station.left_ns),
            _ => (Class::Unicast, 0),
        };
        *find = Find { stamp: now, id, class: class as u64, left_ns };
    }
    Some(find)
}

#[inline(always)]
fn stale(vni: u32, mac: [u8; 6], left_ns: u64, peer: [u8; 16], seen: Traffic) {
    let mut entry = STALE.get_ptr_mut(vni);
    if entry.is_none() {
        let _ = STALE.insert(vni, Stale::default(), u64::from(BPF_NOEXIST));
        entry = STALE.get_ptr_mut(vni);
    }
    match entry {
        // SAFETY: this CPU's own value; and reading a clock.
        Some(stale) => unsafe {
            let since = bpf_ktime_get_ns().wrapping_sub(left_ns);
            (*stale).packets += seen.packets;
            if since > (*stale).longest_ns {
                (*stale).longest_ns = since;
            }
        },
        None => tables::lose(Lost::Stale),
    }
    tell(EventKind::Stale, vni, 0, mac, [0; 6], NONE, peer);
}

/// What is broadcast: a question that should not have left, or a claim that cannot be true.
#[inline(always)]
fn watch(frame: &Skb<'_>, vni: u32, inner: usize, direction: Direction, peer: [u8; 16]) {
    let Some(ethernet) = guest::ethernet(frame, inner) else { return };
    if ethernet.is_tagged || (ethernet.ethertype != guest::ARP && ethernet.ethertype != guest::IPV6) {
        return;
    }
    let Some(scratch) = tables::scratch() else { return };
    let is_message = guest::message(frame, &ethernet, &mut scratch.message);
    let message = &scratch.message;
    let Some((kind, protocol)) = guest::settle(frame, message, is_message) else { return };
    let is_claim = matches!(direction, Direction::Rx);
    if !is_claim && !matches!(kind, Kind::Request) {
        return;
    }
    let address = if is_claim { message.claimed(kind, protocol) } else { message.target };
    let Some(owner) = tables::neighbour(vni, address) else { return };
    if owner.mac == message.mac || (!is_claim && owner.flags & Neighbour::AMBIGUOUS != 0) {
        return;
    }
    let port = if is_claim {
        tell(EventKind::Conflict, vni, 0, message.mac, owner.mac, address, peer);
        0
    } else {
        tables::station(vni, ethernet.source).map_or(0, |station| station.port)
    };
    let outcome = if is_claim { Outcome::Conflict } else { Outcome::Leaked };
    if let Some(account) = tables::account(port, vni) {
        tables::note(account, protocol, outcome);
    }
}

#[inline(always)]
fn tell(
    kind: EventKind,
    vni: u32,
    port: u64,
    mac: [u8; 6],
    owner: [u8; 6],
    address: [u8; 16],
    peer: [u8; 16],
) {
    let kind = kind as u32;
    if let Some(scratch) = tables::scratch() {
        scratch.event = Event { at_ns: 0, port, vni, kind, mac, owner, detail: 0, address, peer };
        tables::tell();
    }
}

#[inline(always)]
fn count_traffic(key: &TrafficKey, seen: Traffic) {
    // Nearly always it is there, and nothing else is looked up.
    let Some(entry) = TRAFFIC.get_ptr_mut(key) else { return begin_traffic(key, seen) };
    add(entry, seen);
}

/// Counts the first packet of a kind.
#[inline(always)]
fn begin_traffic(key: &TrafficKey, seen: Traffic) {
    // SAFETY: a static in .rodata, as above.
    let known_only = unsafe { core::ptr::read_volatile(&raw const KNOWN_ONLY) } != 0;
    if known_only && key.direction == Direction::Rx as u8 && tables::network(key.vni).is_none() {
        count_other(Other::UnknownVni);
        tell(EventKind::UnknownVni, key.vni, 0, [0; 6], [0; 6], NONE, key.peer);
        return;
    }
    add_traffic(key, seen);
}

#[inline(always)]
fn add_traffic(key: &TrafficKey, seen: Traffic) {
    let mut entry = TRAFFIC.get_ptr_mut(key);
    if entry.is_none() {
        // Another CPU may be first; then this fails and the entry is there. If it is not, there is no room.
        let _ = TRAFFIC.insert(key, Traffic::default(), u64::from(BPF_NOEXIST));
        entry = TRAFFIC.get_ptr_mut(key);
    }
    match entry {
        Some(entry) => add(entry, seen),
        None => count_other(Other::MapFull),
    }
}

#[inline(always)]
fn add(entry: *mut Traffic, seen: Traffic) {
    // SAFETY: this CPU's own value, which nothing else writes while the program runs: it is not preempted by another
    // run, since both directions run with bottom halves off.
    unsafe {
        (*entry).packets += seen.packets;
        (*entry).bytes += seen.bytes;
    }
}

#[inline(always)]
fn count_other(other: Other) {
    if let Some(packets) = OTHER.get_ptr_mut(other as u32) {
        // SAFETY: this CPU's own value, as above.
        unsafe { *packets += 1 };
    }
}

/// Adds a count that another map held, given behind an empty Ethernet header.
#[classifier]
pub fn carry_traffic(context: TcContext) -> i32 {
    let frame = Skb(&context);
    let (Some(vni), Some([direction, class]), Some(peer)) =
        (frame.read::<4>(14), frame.read::<2>(18), frame.read::<16>(22))
    else {
        return TCX_NEXT;
    };
    let (Some(packets), Some(bytes)) = (frame.read::<8>(38), frame.read::<8>(46)) else { return TCX_NEXT };
    let key = TrafficKey { vni: u32::from_ne_bytes(vni), direction, class, reserved: 0, peer };
    let seen = Traffic { packets: u64::from_ne_bytes(packets), bytes: u64::from_ne_bytes(bytes) };
    add_traffic(&key, seen);
    TCX_NEXT
}
