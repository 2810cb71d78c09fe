//! On the tap of each guest: counts what passes, answers questions for known addresses in their owners' place, and
//! lets the guest send only from what is its own.
#![no_std]
#![no_main]

mod fresh;
mod object;
mod skb;
mod tables;

use aya_ebpf::{
    bindings::{
        BPF_F_NO_PREALLOC, TC_ACT_REDIRECT,
        tcx_action_base::{TCX_DROP, TCX_NEXT},
    },
    helpers::{bpf_redirect, bpf_skb_change_tail},
    macros::{classifier, map},
    maps::{HashMap, LpmTrie, PerCpuArray, lpm_trie::Key},
    programs::TcContext,
};
use godwit_ebpf_common::{
    answer,
    guest::{self, About, Arp, Dhcp, Ethernet, Ipv4, Ipv6, Kind, NONE},
    packet::{Frame, on_the_wire},
    port::{
        ALLOWED_ADDRESS, ALLOWED_ENTRIES, ALLOWED_HEAD_BITS, ALLOWED_MAC_BITS, Allowed, PORTS_ENTRIES, Port,
    },
    tables::{
        Account, AccountKey, Event, EventKind, Lost, Neighbour, Network, Outcome, Protocol, Reason, mapped,
    },
    underlay::{Class, Traffic},
};

use fresh::Stamp;
use skb::Head;

#[map(name = "PORTS_V1")]
static PORTS: HashMap<u32, Port> = HashMap::with_max_entries(PORTS_ENTRIES, 0);

#[map(name = "ALLOWED_V1")]
static ALLOWED: LpmTrie<Allowed, u32> = LpmTrie::with_max_entries(ALLOWED_ENTRIES, BPF_F_NO_PREALLOC);

/// The port of a link, and what it calls a destination.
#[repr(C)]
struct Find {
    stamp: Stamp,
    /// The tap's index; zero: nothing is here yet.
    link: u32,
    /// A [`Class`].
    class: u32,
    /// The destination, and which way the packet went.
    way: u64,
    port: Port,
}

/// Bits of how many finds each CPU keeps.
const FINDS_BITS: u32 = 8;

#[map(name = "FINDS")]
static FINDS: PerCpuArray<Find> = PerCpuArray::with_max_entries(1 << FINDS_BITS, 0);

#[classifier]
pub fn port_from_guest(context: TcContext) -> i32 {
    from_guest(&context)
}

#[classifier]
pub fn port_to_guest(context: TcContext) -> i32 {
    to_guest(&context);
    TCX_NEXT
}

/// No [`Reason`].
const NO_FAULT: usize = 0xff;

/// What is to be done with a packet.
enum Verdict {
    Pass,
    /// For a [`Reason`].
    Drop(usize),
    /// The answer is in the packet's place.
    Answered,
}

#[inline(always)]
fn link(context: &TcContext) -> u32 {
    // SAFETY: the context that the kernel passed to this program.
    unsafe { (*context.skb.skb).ifindex }
}

/// The port of a link, and the class of a packet that goes there or comes from it.
#[inline(always)]
fn find(link: u32, is_sent: bool, destination: [u8; 6]) -> Option<(&'static Port, u32)> {
    let [a, b, c, d, e, f] = destination;
    let way = u64::from_ne_bytes([a, b, c, d, e, f, is_sent as u8, 0]);
    let now = tables::now();
    let place = FINDS.get_ptr_mut(fresh::place::<FINDS_BITS>(way ^ u64::from(link) << 20))?;
    // SAFETY: this CPU's own value, which nothing else writes while the program runs, as in tables.rs; every value is
    // valid.
    let find = unsafe { &mut *place };
    if find.link != link || find.way != way || !find.stamp.is_good(&now) {
        // SAFETY: the agent replaces entries rather than change them in place.
        let Some(port) = (unsafe { PORTS.get(link) }) else {
            tables::lose(Lost::NoPort);
            return None;
        };
        let mut class = Class::of(destination);
        if matches!(class, Class::Unicast)
            && (is_sent || destination != port.mac)
            && tables::station(port.vni, destination).is_none()
        {
            class = Class::UnknownUnicast;
        }
        *find = Find { stamp: now, link, class: class as u32, way, port: *port };
    }
    Some((&find.port, find.class))
}

#[inline(always)]
fn to_guest(context: &TcContext) {
    let frame = skb::head(context);
    let Some(destination) = frame.read::<6>(0) else { return };
    let Some((port, class)) = find(link(context), false, destination) else { return };
    let seen = on_the_wire(&frame, 0, skb::size(context));
    if let Some(account) = tables::account(port.id, port.vni) {
        count(&mut account.to_packets, &mut account.to_bytes, class, seen);
    }
}

#[inline(always)]
fn count(packets: &mut [u64; 4], bytes: &mut [u64; 4], class: u32, seen: Traffic) {
    let index = class as usize & 3;
    packets[index] += seen.packets;
    bytes[index] += seen.bytes;
}

#[inline(always)]
fn from_guest(context: &TcContext) -> i32 {
    let link = link(context);
    let frame = skb::head(context);
    // Never: the kernel takes no frame from a tap that is shorter.
    let Some(mut ethernet) = guest::ethernet(&frame, 0) else { return TCX_NEXT };
    // SAFETY: the context that the kernel passed to this program. An outer tag is in it, not in the packet.
    ethernet.is_tagged |= unsafe { (*context.skb.skb).vlan_present } != 0;
    let Some((port, class)) = find(link, true, ethernet.destination) else { return TCX_NEXT };
    let seen = on_the_wire(&frame, 0, skb::size(context));
    let Some(account) = tables::account(port.id, port.vni) else { return TCX_NEXT };
    count(&mut account.from_packets, &mut account.from_bytes, class, seen);
    let is_unknown = class == Class::UnknownUnicast as u32;
    match judge(context, &frame, link, port, &ethernet, is_unknown, account) {
        Verdict::Pass => TCX_NEXT,
        Verdict::Drop(reason) => {
            if reason < account.drops.len() {
                account.drops[reason] += seen.packets;
            }
            TCX_DROP
        }
        // SAFETY: no pointers; the kernel checks the index.
        Verdict::Answered => unsafe {
            bpf_redirect(link, 0);
            TC_ACT_REDIRECT
        },
    }
}

#[inline(always)]
fn judge(
    context: &TcContext,
    frame: &Head<'_>,
    link: u32,
    port: &Port,
    ethernet: &Ethernet,
    is_unknown: bool,
    account: &mut Account,
) -> Verdict {
    let is_secure = port.flags & Port::SECURE != 0;
    let Some(scratch) = tables::scratch() else { return Verdict::Pass };
    let mut fault = None;
    let mut is_message = false;
    let mut claimed = NONE;
    if is_secure && !is_own_mac(link, port, ethernet.source) {
        fault = Some(Reason::SpoofedMac);
    } else if ethernet.ethertype == guest::ARP {
        let arp = guest::arp(frame, ethernet.offset);
        if is_secure {
            fault = check_arp(arp.as_ref(), link, port);
        }
        if let Some(arp) = &arp {
            claimed = mapped(arp.sender);
            is_message = guest::arp_message(arp, &mut scratch.message);
        }
    } else if ethernet.ethertype == guest::IPV6 {
        let packet = guest::ipv6(frame, ethernet.offset);
        if is_secure {
            fault = check_ipv6(packet.as_ref(), link, port, ethernet);
        }
        if let Some(packet) = &packet {
            let is_neighbour = matches!(packet.about, About::Solicitation | About::Advertisement);
            claimed = if is_neighbour { packet.target } else { packet.source };
            is_message = guest::nd_message(packet, ethernet.source, &mut scratch.message);
        }
    } else if ethernet.ethertype == guest::IPV4 && is_secure {
        let packet = guest::ipv4(frame, ethernet.offset);
        fault = check_ipv4(packet.as_ref(), link, port, ethernet);
        claimed = packet.map_or(NONE, |packet| mapped(packet.source));
    }
    // What follows is the same however it came to this: the verifier need not look at it anew each time.
    let reason = frame.forget(fault.map_or(NO_FAULT, |reason| reason as usize));
    if reason != NO_FAULT {
        tell(port, EventKind::Spoof, ethernet.source, [0; 6], reason as u32, claimed);
        return Verdict::Drop(reason);
    }
    if let Some((kind, protocol)) = guest::settle(frame, &scratch.message, is_message && !ethernet.is_tagged)
    {
        return neighbours(context, port, ethernet, kind, protocol, account);
    }
    if is_unknown {
        let floods =
            tables::network(port.vni).is_none_or(|network| network.flags & Network::FLOOD_UNICAST != 0);
        if !floods {
            return Verdict::Drop(Reason::UnknownUnicast as usize);
        }
    }
    Verdict::Pass
}

#[inline(always)]
fn tell(port: &Port, kind: EventKind, mac: [u8; 6], owner: [u8; 6], detail: u32, address: [u8; 16]) {
    if let Some(scratch) = tables::scratch() {
        let (id, vni, kind) = (port.id, port.vni, kind as u32);
        scratch.event = Event { at_ns: 0, port: id, vni, kind, mac, owner, detail, address, peer: NONE };
        tables::tell();
    }
}

/// Whether the port may send from an Ethernet address.
#[inline(always)]
fn is_own_mac(link: u32, port: &Port, mac: [u8; 6]) -> bool {
    mac == port.mac
        || ALLOWED.get(Key::new(ALLOWED_MAC_BITS, Allowed { link, mac, family: 0, address: NONE })).is_some()
}

/// Whether the port may send from an IPv4 address with an Ethernet address.
#[inline(always)]
fn is_own_v4(link: u32, port: &Port, mac: [u8; 6], address: [u8; 4]) -> bool {
    if mac == port.mac && address == port.ipv4 && address != [0; 4] {
        return true;
    }
    let [a, b, c, d] = address;
    let address = [a, b, c, d, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    is_allowed(Allowed { link, mac, family: 4, address })
}

/// Whether the port may send from an IPv6 address with an Ethernet address.
#[inline(always)]
fn is_own_v6(link: u32, port: &Port, mac: [u8; 6], address: [u8; 16]) -> bool {
    (mac == port.mac && address == port.ipv6) || is_allowed(Allowed { link, mac, family: 6, address })
}

#[inline(always)]
fn is_allowed(sender: Allowed) -> bool {
    ALLOWED.get(Key::new(ALLOWED_HEAD_BITS + 128, sender)).is_some_and(|found| *found == ALLOWED_ADDRESS)
}

/// What is wrong with what ARP says.
#[inline(always)]
fn check_arp(arp: Option<&Arp>, link: u32, port: &Port) -> Option<Reason> {
    let Some(arp) = arp else { return Some(Reason::Malformed) };
    // A probe claims nothing yet (RFC 5227, 2.1.1).
    let is_fine = if arp.sender == [0; 4] {
        is_own_mac(link, port, arp.mac)
    } else {
        is_own_v4(link, port, arp.mac, arp.sender)
    };
    if is_fine { None } else { Some(Reason::SpoofedArp) }
}

/// What is wrong with the sender of an IPv4 packet.
#[inline(always)]
fn check_ipv4(packet: Option<&Ipv4>, link: u32, port: &Port, ethernet: &Ethernet) -> Option<Reason> {
    let Some(packet) = packet else { return Some(Reason::Malformed) };
    if matches!(packet.dhcp, Dhcp::Server) {
        return Some(Reason::DhcpServer);
    }
    let is_newcomer = packet.source == [0; 4] && matches!(packet.dhcp, Dhcp::Client);
    let is_fine = is_newcomer || is_own_v4(link, port, ethernet.source, packet.source);
    if is_fine { None } else { Some(Reason::SpoofedIpv4) }
}

/// What is wrong with the sender of an IPv6 packet, or with what it says of neighbours and routers.
#[inline(always)]
fn check_ipv6(packet: Option<&Ipv6>, link: u32, port: &Port, ethernet: &Ethernet) -> Option<Reason> {
    let mac = ethernet.source;
    let Some(packet) = packet else { return Some(Reason::Malformed) };
    let is_neighbour = matches!(packet.about, About::Solicitation | About::Advertisement);
    match packet.about {
        About::Router => return Some(Reason::RouterAdvertisement),
        About::Dhcp(Dhcp::Server) => return Some(Reason::DhcpServer),
        _ => {}
    }
    // A link-layer address option speaks for the sender.
    let claimed = packet.option.unwrap_or(mac);
    if is_neighbour && claimed != mac && !is_own_mac(link, port, claimed) {
        return Some(Reason::SpoofedNd);
    }
    if packet.source == NONE {
        // Before it has an address: it asks for routers, joins groups, or asks whether its own is free.
        return match packet.about {
            About::Newcomer => None,
            About::Solicitation if is_own_v6(link, port, mac, packet.target) => None,
            About::Solicitation => Some(Reason::SpoofedNd),
            _ => Some(Reason::SpoofedIpv6),
        };
    }
    if !is_own_v6(link, port, mac, packet.source) {
        return Some(Reason::SpoofedIpv6);
    }
    if matches!(packet.about, About::Advertisement) && !is_own_v6(link, port, claimed, packet.target) {
        return Some(Reason::SpoofedNd);
    }
    None
}

#[inline(always)]
fn neighbours(
    context: &TcContext,
    port: &Port,
    ethernet: &Ethernet,
    kind: Kind,
    protocol: Protocol,
    account: &mut Account,
) -> Verdict {
    let Some(scratch) = tables::scratch() else { return Verdict::Pass };
    let message = &scratch.message;
    let claimed = message.claimed(kind, protocol);
    if claimed != NONE
        && claimed != mapped([0; 4])
        && let Some(owner) = tables::neighbour(port.vni, claimed)
        && owner.mac != message.mac
    {
        tables::note(account, protocol, Outcome::Conflict);
        tell(port, EventKind::Conflict, message.mac, owner.mac, 0, claimed);
    }
    match kind {
        Kind::Reply => return Verdict::Pass,
        Kind::Announcement => {
            tables::note(account, protocol, Outcome::Announcement);
            return Verdict::Pass;
        }
        Kind::Probe => {
            tables::note(account, protocol, Outcome::Probe);
            return Verdict::Pass;
        }
        // To one station: only that can say whether it is still there (RFC 4861, 7.3.3; RFC 1122, 2.3.2.1).
        Kind::Request if ethernet.destination[0] & 1 == 0 => {
            tables::note(account, protocol, Outcome::Unicast);
            return Verdict::Pass;
        }
        Kind::Request => tables::note(account, protocol, Outcome::Seen),
    }
    let Some(network) = tables::network(port.vni) else {
        tables::note(account, protocol, Outcome::Unknown);
        tables::note(account, protocol, Outcome::Passed);
        return Verdict::Pass;
    };
    match tables::neighbour(port.vni, message.target) {
        None => {
            tables::note(account, protocol, Outcome::Unknown);
            if network.flags & Network::DROP_NEIGHBOURS != 0 {
                tables::note(account, protocol, Outcome::Suppressed);
                return Verdict::Drop(Reason::Neighbour as usize);
            }
        }
        Some(owner) if network.flags & Network::SUPPRESS != 0 && owner.flags & Neighbour::AMBIGUOUS == 0 => {
            if owner.mac == message.mac || owner.mac == ethernet.source {
                // It asks for itself: nobody else could answer.
                tables::note(account, protocol, Outcome::Suppressed);
                return Verdict::Drop(Reason::Neighbour as usize);
            }
            if answer(context, ethernet, protocol, &owner).is_ok() {
                tables::note(account, protocol, Outcome::Answered);
                return Verdict::Answered;
            }
        }
        Some(_) => {}
    }
    tables::note(account, protocol, Outcome::Passed);
    Verdict::Pass
}

/// Puts the owner's answer in the question's place.
#[inline(always)]
fn answer(context: &TcContext, ethernet: &Ethernet, protocol: Protocol, owner: &Neighbour) -> Result<(), ()> {
    let Some(scratch) = tables::scratch() else { return Err(()) };
    let message = &scratch.message;
    let mac = ethernet.source;
    match protocol {
        Protocol::Arp => {
            let [.., t0, t1, t2, t3] = message.target;
            let [.., s0, s1, s2, s3] = message.sender;
            let (target, sender) = ([t0, t1, t2, t3], [s0, s1, s2, s3]);
            let Some(bytes) = scratch.answer.first_chunk_mut() else { return Err(()) };
            answer::arp(bytes, owner.mac, target, message.mac, sender);
            // To the station that sent the packet, which may ask for another.
            bytes[..6].copy_from_slice(&mac);
            context.store(0, bytes, 0).map_err(drop)
        }
        Protocol::Nd => {
            let is_router = owner.flags & Neighbour::ROUTER != 0;
            answer::nd(&mut scratch.answer, owner.mac, &message.target, is_router, mac, &message.sender);
            let skb = context.skb.skb;
            // SAFETY: the context that the kernel passed to this program; what was read of the packet before is not
            // used any more.
            let changed = unsafe { bpf_skb_change_tail(skb, answer::ND_ANSWER_BYTES as u32, 0) };
            if changed != 0 {
                return Err(());
            }
            context.store(0, &scratch.answer, 0).map_err(drop)
        }
    }
}

/// Adds counts that another map held, given behind an empty Ethernet header.
#[classifier]
pub fn carry_account(context: TcContext) -> i32 {
    const KEY: usize = 14;
    const VALUE: usize = KEY + size_of::<AccountKey>();
    let frame = skb::Skb(&context);
    let (Some(port), Some(vni)) = (frame.read::<8>(KEY), frame.read::<4>(KEY + 8)) else { return TCX_NEXT };
    let Some(account) = tables::account(u64::from_ne_bytes(port), u32::from_ne_bytes(vni)) else {
        return TCX_NEXT;
    };
    let counters = (&raw mut *account).cast::<u64>();
    for index in 0..Account::COUNTERS {
        let Some(count) = frame.read::<8>(VALUE + 8 * index) else { return TCX_NEXT };
        // SAFETY: an account is so many integers and nothing else.
        unsafe { *counters.add(index) += u64::from_ne_bytes(count) };
    }
    TCX_NEXT
}
