//! On the tap of each guest: lets pass what the port's security groups allow and what belongs to a connection that
//! they allowed, and hands the guest's DHCP to the host's responder.
#![no_std]
#![no_main]

mod flows;
mod fresh;
mod object;

use aya_ebpf::{
    bindings::{
        BPF_ANY, BPF_F_NO_PREALLOC, BPF_NOEXIST,
        tcx_action_base::{TCX_DROP, TCX_NEXT},
    },
    helpers::{bpf_ktime_get_ns, bpf_skb_load_bytes},
    macros::{classifier, map},
    maps::{HashMap, LpmTrie, LruHashMap, PerCpuArray, PerCpuHashMap, RingBuf, lpm_trie::Key},
    programs::TcContext,
};
use godwit_ebpf_common::{
    filter::{
        ANSWER_MARK, CONNECTIONS_ENTRIES, Connection, ConnectionKey, Counts, EGRESS, Entries,
        FILTERS_ENTRIES, FRAGMENT_NS, FRAGMENTS_ENTRIES, Filter, FilterKey, FragmentKey, INGRESS, MAX_RULES,
        MEMBER_BITS, MEMBERS_ENTRIES, Member, Opening, Packet, Parsed, REQUESTS_BYTES, Request, Rule, Strays,
        halves, ip, parse,
    },
    packet::Frame,
};

use flows::Found;

#[map(name = "FILTERS_V1")]
static FILTERS: HashMap<FilterKey, Filter> = HashMap::with_max_entries(FILTERS_ENTRIES, BPF_F_NO_PREALLOC);

#[map(name = "MEMBERS_V1")]
static MEMBERS: LpmTrie<Member, u32> = LpmTrie::with_max_entries(MEMBERS_ENTRIES, BPF_F_NO_PREALLOC);

#[map(name = "CONNECTIONS_V1")]
static CONNECTIONS: LruHashMap<ConnectionKey, Connection> =
    LruHashMap::with_max_entries(CONNECTIONS_ENTRIES, 0);

#[map(name = "FRAGMENTS_V1")]
static FRAGMENTS: LruHashMap<FragmentKey, u64> = LruHashMap::with_max_entries(FRAGMENTS_ENTRIES, 0);

#[map(name = "FILTER_COUNT_V1")]
static COUNTS: PerCpuHashMap<FilterKey, Counts> =
    PerCpuHashMap::with_max_entries(FILTERS_ENTRIES, BPF_F_NO_PREALLOC);

#[map(name = "FILTER_STRAY_V1")]
static STRAYS: PerCpuHashMap<FilterKey, Strays> =
    PerCpuHashMap::with_max_entries(FILTERS_ENTRIES, BPF_F_NO_PREALLOC);

#[map(name = "FILTER_ENTRY_V1")]
static ENTRIES: PerCpuArray<u64> = PerCpuArray::with_max_entries(Entries::KINDS, 0);

#[map(name = "DHCP_V1")]
static REQUESTS: RingBuf = RingBuf::with_byte_size(REQUESTS_BYTES, 0);

/// A connection's time is written no oftener than this: other CPUs need not fetch it with every packet.
const TOUCH_NS: u64 = 1_000_000_000;

/// What a packet is.
const OTHER: u32 = 0;
const MALFORMED: u32 = 1;
const IP: u32 = 2;

/// What rules say of an opening.
const REFUSED: u32 = 0;
const ALLOWED: u32 = 1;
const ALLOWED_STATELESS: u32 = 2;

#[classifier]
pub fn filter_from_guest(context: TcContext) -> i32 {
    judge(&context, EGRESS)
}

#[classifier]
pub fn filter_to_guest(context: TcContext) -> i32 {
    judge(&context, INGRESS)
}

/// How far into a packet headers are looked for, in bytes: enough for an error that quotes IPv6 behind two tags. What
/// has its headers farther in is malformed.
const HEAD_BYTES: usize = 192;

/// The first bytes of a packet, copied: reading them in place would cost the kernel's verifier a case for each.
#[repr(C)]
struct Head {
    bytes: [u8; HEAD_BYTES],
    length: usize,
}

impl Frame for Head {
    #[inline(always)]
    fn read<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        if offset > HEAD_BYTES - N || offset + N > self.length {
            return None;
        }
        // SAFETY: these bytes are inside the array, as the line above checks.
        Some(unsafe { *self.bytes.as_ptr().add(offset).cast() })
    }
}

/// What a run works on, off its stack.
#[repr(C)]
struct Work {
    head: Head,
    packet: Packet,
    quoted: Packet,
    connection: ConnectionKey,
    fragment: FragmentKey,
    opening: Opening,
}

#[map(name = "FILTER_WORK")]
static WORK: PerCpuArray<Work> = PerCpuArray::with_max_entries(1, 0);

#[inline(always)]
fn judge(context: &TcContext, direction: u32) -> i32 {
    let skb = context.skb.skb;
    // SAFETY: the context that the kernel passed to this program; these are its fields for any TC program.
    let (link, mark) = unsafe { ((*skb).ifindex, (*skb).mark) };
    let key = FilterKey { link, direction };
    let mut flow = flows::find(context, link, direction);
    if flow.as_ref().is_some_and(Found::is_known) {
        return TCX_NEXT;
    }
    // SAFETY: the agent replaces entries rather than change them in place.
    let Some(filter) = (unsafe { FILTERS.get(key) }) else {
        // The agent writes the entry before it attaches the program: this port is not to be open by mistake.
        return TCX_DROP;
    };
    if filter.flags == 0 {
        if let Some(flow) = &mut flow {
            flow.remember();
        }
        return TCX_NEXT;
    }
    let Some(work) = WORK.get_ptr_mut(0) else { return TCX_DROP };
    // SAFETY: this CPU's own value, which nothing else uses while the program runs: it is not preempted by another
    // run, since both directions run with bottom halves off.
    let work = unsafe { &mut *work };
    // SAFETY: as above.
    let length = unsafe { (*skb).len };
    let length = if length > HEAD_BYTES as u32 { HEAD_BYTES as u32 } else { length };
    // Never: the kernel takes no frame that is shorter.
    if length < 14 {
        return TCX_NEXT;
    }
    // SAFETY: no more is written than there is room for.
    if unsafe { bpf_skb_load_bytes(skb.cast(), 0, work.head.bytes.as_mut_ptr().cast(), length) } != 0 {
        return TCX_DROP;
    }
    work.head.length = length as usize;
    match filter_parse() {
        OTHER => return TCX_NEXT,
        MALFORMED if filter.flags & Filter::RULES == 0 => return TCX_NEXT,
        MALFORMED => {
            count(key, |counts| counts.malformed += 1);
            return TCX_DROP;
        }
        _ => {}
    }
    let packet = &work.packet;
    let serves = filter.flags & if packet.family == 4 { Filter::DHCP_V4 } else { Filter::DHCP_V6 } != 0;
    if direction == EGRESS && packet.is_dhcp_request() {
        if !serves {
            return TCX_NEXT;
        }
        hand_over(context, key);
        return TCX_DROP;
    }
    if direction == INGRESS && packet.is_dhcp_answer() && (mark == ANSWER_MARK || !serves) {
        return TCX_NEXT;
    }
    if filter.flags & Filter::RULES == 0 || packet.is_neighbourly() {
        return TCX_NEXT;
    }
    match passes(work, key, filter) {
        Passes::No => {}
        Passes::Alone => return TCX_NEXT,
        Passes::Flows => {
            if let Some(flow) = &mut flow {
                flow.remember();
            }
            return TCX_NEXT;
        }
    }
    // SAFETY: as above.
    let segments = unsafe { (*skb).gso_segs };
    let segments = u64::from(if segments == 0 { 1 } else { segments });
    if work.packet.is_tcp() && work.packet.tcp_flags & Packet::SYN == 0 {
        stray(key, Strays { segments, full: 0 });
    } else {
        count(key, |counts| counts.dropped += segments);
    }
    TCX_DROP
}

/// Parses what [`WORK`] has copied. Global for the reason that [`filter_matching`] has.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn filter_parse() -> u32 {
    let Some(work) = WORK.get_ptr_mut(0) else { return MALFORMED };
    // SAFETY: this CPU's own value, as in `judge`.
    let work = unsafe { &mut *work };
    match parse(&work.head, &mut work.packet) {
        Parsed::Other => OTHER,
        Parsed::Malformed => MALFORMED,
        Parsed::Ip => IP,
    }
}

/// Parses the packet that the one in [`WORK`] quotes: 1 if there is one.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn filter_parse_quoted() -> u32 {
    let Some(work) = WORK.get_ptr_mut(0) else { return 0 };
    // SAFETY: as above.
    let work = unsafe { &mut *work };
    let read = ip(&work.head, work.packet.offset + 8, work.packet.family, &mut work.quoted);
    u32::from(read.is_some() && !work.quoted.is_later)
}

/// Gives a guest's question to the agent.
#[inline(always)]
fn hand_over(context: &TcContext, key: FilterKey) {
    let skb = context.skb.skb;
    // SAFETY: the context that the kernel passed to this program.
    let length = unsafe { (*skb).len };
    // Longer than a client sends, or shorter than its headers: then nobody would answer it.
    if length < 42 || length > Request::BYTES as u32 {
        return;
    }
    let Some(mut entry) = REQUESTS.reserve::<Request>(0) else {
        return count(key, |counts| counts.lost += 1);
    };
    let request = entry.as_mut_ptr();
    // SAFETY: the ring's own memory, of which no more is written than there is.
    let failed = unsafe {
        (*request).link = key.link;
        (*request).length = length;
        bpf_skb_load_bytes(skb.cast(), 0, (&raw mut (*request).frame).cast(), length)
    };
    if failed == 0 { entry.submit(0) } else { entry.discard(0) }
}

/// What is to become of a packet.
enum Passes {
    No,
    /// It passes, and says nothing of the next.
    Alone,
    /// It is of a connection that goes on.
    Flows,
}

#[inline(always)]
fn passes(work: &mut Work, key: FilterKey, filter: &Filter) -> Passes {
    let now = now();
    if work.packet.is_fragment {
        work.fragment = FragmentKey {
            link: key.link,
            id: work.packet.fragment,
            source: work.packet.source,
            destination: work.packet.destination,
            direction: key.direction | u32::from(work.packet.protocol) << 8,
        };
    }
    if work.packet.is_later {
        // SAFETY: a number, written whole.
        let first = unsafe { FRAGMENTS.get(&work.fragment) };
        let passes = first.is_some_and(|at| now.saturating_sub(*at) < FRAGMENT_NS);
        return if passes { Passes::Alone } else { Passes::No };
    }
    identify(&work.packet, key, &mut work.connection);
    let flows = is_of_connection(work, key, filter, now);
    if !flows && !is_opening(work, key, filter, now) && !is_related(work, key, now) {
        return Passes::No;
    }
    if work.packet.is_fragment {
        let is_kept = FRAGMENTS.insert(&work.fragment, now, u64::from(BPF_ANY)).is_ok();
        note(if is_kept { Entries::Fragments } else { Entries::FragmentsFull });
    }
    if flows { Passes::Flows } else { Passes::Alone }
}

#[inline(always)]
fn now() -> u64 {
    // SAFETY: reads a clock.
    unsafe { bpf_ktime_get_ns() }
}

/// The connection that a packet is of.
#[inline(always)]
fn identify(packet: &Packet, key: FilterKey, id: &mut ConnectionKey) {
    let is_out = key.direction == EGRESS;
    let (local_port, remote_port) = if packet.is_icmp() {
        // An echo by its number and by who asked; all else of ICMP by its type and code.
        match packet.echo() {
            Some(is_question) => (packet.source_port, u16::from(is_question == is_out)),
            None => (packet.destination_port, 2),
        }
    } else if is_out {
        (packet.source_port, packet.destination_port)
    } else {
        (packet.destination_port, packet.source_port)
    };
    id.link = key.link;
    id.local_port = local_port;
    id.remote_port = remote_port;
    id.protocol = packet.protocol;
    id.reserved = [0; 3];
    if is_out {
        id.local = packet.source;
        id.remote = packet.destination;
    } else {
        id.local = packet.destination;
        id.remote = packet.source;
    }
}

/// What rules must allow for a packet to open its connection, or to be of one that the other side opened.
#[inline(always)]
fn describe(work: &mut Work, is_forward: bool) {
    let packet = &work.packet;
    let port = if is_forward {
        packet.destination_port
    } else {
        match packet.echo() {
            // The question that this answers: type 8 to 0, 13 to 14, 128 to 129.
            Some(_) if packet.icmp_type() == 0 => 8 << 8,
            Some(_) => packet.destination_port.wrapping_sub(256),
            None if packet.is_icmp() => packet.destination_port,
            None => packet.source_port,
        }
    };
    let opening = &mut work.opening;
    opening.remote = halves(&work.connection.remote);
    opening.port = port;
    opening.protocol = packet.protocol;
    opening.family = packet.family;
    opening.reserved = 0;
}

#[inline(always)]
fn is_of_connection(work: &mut Work, key: FilterKey, filter: &Filter, now: u64) -> bool {
    let Some(found) = CONNECTIONS.get_ptr_mut(&work.connection) else { return false };
    // SAFETY: a map's value. Other CPUs may write it meanwhile: times and flags that only grow, and a flag that is
    // lost by that is set again by the next packet.
    let connection = unsafe { &mut *found };
    let (is_tcp, tcp_flags) = (work.packet.is_tcp(), work.packet.tcp_flags);
    if now.saturating_sub(connection.seen_ns) >= connection.timeout_ns(work.packet.protocol) {
        return false;
    }
    let is_out = key.direction == EGRESS;
    let is_forward = (connection.flags & Connection::OUTWARD != 0) == is_out;
    if is_tcp && connection.is_over() && tcp_flags & (Packet::SYN | Packet::ACK) == Packet::SYN {
        // Another connection between the same ports.
        return false;
    }
    if connection.epoch != filter.epoch {
        if !is_still_allowed(work, key, is_forward) {
            if CONNECTIONS.remove(&work.connection).is_ok() {
                note(Entries::Closed);
            }
            return false;
        }
        connection.epoch = filter.epoch;
    }
    let mut flags = connection.flags;
    if !is_forward {
        flags |= Connection::ANSWERED;
    }
    if is_tcp {
        if tcp_flags & Packet::RST != 0 {
            flags |= Connection::RESET;
        }
        if tcp_flags & Packet::FIN != 0 {
            flags |= if is_out { Connection::FIN_OUT } else { Connection::FIN_IN };
        }
    }
    if flags != connection.flags {
        connection.flags = flags;
    }
    if now.saturating_sub(connection.seen_ns) > TOUCH_NS {
        connection.seen_ns = now;
    }
    true
}

/// Whether today's rules would let the connection be opened.
#[inline(always)]
fn is_still_allowed(work: &mut Work, key: FilterKey, is_forward: bool) -> bool {
    describe(work, is_forward);
    let opener = if is_forward { key.direction } else { key.direction ^ 1 };
    filter_matching(key.link, opener) == ALLOWED
}

#[inline(always)]
fn is_opening(work: &mut Work, key: FilterKey, filter: &Filter, now: u64) -> bool {
    let is_out = key.direction == EGRESS;
    let outward = if is_out { Connection::OUTWARD } else { 0 };
    describe(work, true);
    let flags = match filter_matching(key.link, key.direction) {
        ALLOWED => outward,
        ALLOWED_STATELESS => return true,
        _ => {
            // A guest that has come from another host brought its connections with it. What it opened itself goes
            // on: TCP that is under way, where a rule would have let it begin.
            let is_under_way = work.packet.is_tcp()
                && work.packet.tcp_flags & (Packet::SYN | Packet::RST | Packet::ACK) == Packet::ACK;
            if is_out || !is_under_way || now >= filter.arrival_ends_ns {
                return false;
            }
            if !is_still_allowed(work, key, false) {
                return false;
            }
            Connection::OUTWARD | Connection::ANSWERED
        }
    };
    let connection = Connection { seen_ns: now, epoch: filter.epoch, flags };
    // Nearly always there is none yet, or one that is over or was too long unused.
    let is_new = CONNECTIONS.insert(&work.connection, connection, u64::from(BPF_NOEXIST)).is_ok();
    if is_new {
        note(Entries::Opened);
    }
    let is_kept = is_new || CONNECTIONS.insert(&work.connection, connection, u64::from(BPF_ANY)).is_ok();
    count(key, |counts| counts.opened += 1);
    if !is_kept {
        stray(key, Strays { segments: 0, full: 1 });
    }
    true
}

/// Whether a packet reports an error of a connection that is known.
#[inline(always)]
fn is_related(work: &mut Work, key: FilterKey, now: u64) -> bool {
    if !work.packet.is_error() {
        return false;
    }
    if filter_parse_quoted() == 0 {
        return false;
    }
    let quoted = &work.quoted;
    // What is quoted went the other way.
    let back = FilterKey { link: key.link, direction: key.direction ^ 1 };
    identify(quoted, back, &mut work.connection);
    // SAFETY: a map's value, of which only the time and flags are read.
    let connection = unsafe { CONNECTIONS.get(&work.connection) };
    connection.is_some_and(|c| now.saturating_sub(c.seen_ns) < c.timeout_ns(quoted.protocol))
}

/// What the rules of a port in a direction say of the opening that is described in [`WORK`]. A function that the kernel
/// sees as global is verified once, and not anew for each way that leads to it: for that it takes numbers only, and finds
/// the rest itself.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn filter_matching(link: u32, direction: u32) -> u32 {
    // SAFETY: the agent replaces entries rather than change them in place.
    let Some(filter) = (unsafe { FILTERS.get(FilterKey { link, direction }) }) else { return REFUSED };
    let Some(work) = WORK.get_ptr(0) else { return REFUSED };
    // SAFETY: this CPU's own value, as in `judge`.
    let opening = unsafe { &(*work).opening };
    let mut index = 0;
    while index < MAX_RULES {
        if index as u32 >= filter.count {
            break;
        }
        let rule = &filter.rules[index];
        index += 1;
        if !rule.is_about(opening) {
            continue;
        }
        if rule.flags & Rule::GROUP != 0 && !is_member(filter.vni, rule.group, opening.remote) {
            continue;
        }
        return if rule.flags & Rule::STATELESS != 0 { ALLOWED_STATELESS } else { ALLOWED };
    }
    REFUSED
}

#[inline(always)]
fn is_member(vni: u32, group: [u8; 8], remote: [u64; 2]) -> bool {
    let [a, b] = remote.map(u64::to_ne_bytes);
    let address =
        [a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]];
    MEMBERS.get(Key::new(MEMBER_BITS + 128, Member { vni, group, address })).is_some()
}

#[inline(always)]
fn count(key: FilterKey, add: impl FnOnce(&mut Counts)) {
    let mut entry = COUNTS.get_ptr_mut(key);
    if entry.is_none() {
        // Another CPU may be first; then this fails and the entry is there.
        let _ = COUNTS.insert(
            key,
            Counts { dropped: 0, malformed: 0, opened: 0, lost: 0 },
            u64::from(BPF_NOEXIST),
        );
        entry = COUNTS.get_ptr_mut(key);
    }
    if let Some(counts) = entry {
        // SAFETY: this CPU's own value, which nothing else writes while the program runs.
        add(unsafe { &mut *counts });
    } else {
        note(Entries::CountsFull);
    }
}

/// Counts what became of an entry.
#[inline(always)]
fn note(what: Entries) {
    if let Some(count) = ENTRIES.get_ptr_mut(what as u32) {
        // SAFETY: this CPU's own value, as in `count`.
        unsafe { *count += 1 };
    }
}

#[inline(always)]
fn stray(key: FilterKey, more: Strays) {
    match STRAYS.get_ptr_mut(key) {
        // SAFETY: this CPU's own value, as in `count`.
        Some(strays) => unsafe {
            (*strays).segments += more.segments;
            (*strays).full += more.full;
        },
        // The others' are zero then.
        None => {
            if STRAYS.insert(key, more, u64::from(BPF_ANY)).is_err() {
                note(Entries::StraysFull);
            }
        }
    }
}
