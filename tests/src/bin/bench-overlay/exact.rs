//! Counters against captures: two hosts whose guests send each other random mixes of all kinds of packets. At the taps
//! and at the tunnel every packet and byte must be counted as packet sockets at the same places see them.

use crate::frames;
use crate::namespaces::{batch, run, try_run, within};
use crate::site::{Host, Policy, Programs, Station, VNI, VXLAN_PORT, acquaint, wanted};
use crate::wire::{Seen, Wire};
use godwit_agent::telemetry::Capacity;
use godwit_protocol::port::Mac;
use nix::net::if_::if_nametoindex;
use nix::sys::socket::{setsockopt, sockopt};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6, TcpListener, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

const STATIONS: [Station; 2] = [Station { number: 1, host: 1 }, Station { number: 2, host: 2 }];

/// An Ethernet address that nobody has told of, and the IPv4 address that guests believe to be there.
const STRANGER: Mac = Mac([0xfa, 0x16, 0x3e, 0x99, 0x99, 0x99]);
const STRANGE_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 0, 99, 99);

/// What each of the two guests does in a round.
const ACTIONS: u32 = 6;

/// Counters and captures must agree this soon after the last packet.
const PATIENCE: Duration = Duration::from_secs(10);

/// Packets and bytes by place, class and, on the tunnel, peer. Questions are counted as such too.
type Tally = BTreeMap<String, (u64, u64)>;

/// Numbers without a pattern (Marsaglia, Xorshift RNGs, 2003), the same for the same seed.
struct Dice(u64);

impl Dice {
    fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % bound
    }

    fn between(&mut self, least: u64, most: u64) -> usize {
        (least + self.below(most - least + 1)) as usize
    }
}

pub(crate) fn judge(rounds: u32, seed: u64) -> Result<Value, String> {
    eprintln!("exact: {rounds} rounds, seed {seed}");
    let hosts = STATIONS.map(|station| {
        let host = Host::start(station.host, Programs::Telemetry, Capacity::default());
        host.add_guest(&format!("g{}", station.host), station);
        let policy = Policy { port_security: true, rules: None };
        host.ensure(&wanted(VNI, station.host, &STATIONS, &policy));
        host
    });
    acquaint(2);
    let tallies: [Mutex<Tally>; 2] = Default::default();
    let stop = AtomicBool::new(false);
    let wires = STATIONS.map(|station| {
        let host = format!("h{}", station.host);
        within(&host, || Watch::open(station)).map_err(|error| error.to_string())
    });
    let [one, two] = wires;
    let wires = [one?, two?];
    // The captures are there before any guest can send.
    thread::scope(|scope| {
        for (watch, tally) in wires.iter().zip(&tallies) {
            let stop = &stop;
            scope.spawn(move || watch.run(tally, stop));
        }
        let outcome = STATIONS
            .iter()
            .try_for_each(|station| ready(*station))
            .and_then(|()| (0..rounds).try_for_each(|round| play(round, seed, &hosts, &wires, &tallies)));
        stop.store(true, Ordering::Relaxed);
        outcome
    })?;
    let packets: u64 =
        tallies.iter().flat_map(|tally| locked(tally).values().map(|v| v.0).collect::<Vec<_>>()).sum();
    Ok(json!({ "exact": rounds, "rounds": rounds, "seed": seed, "packets": packets }))
}

fn locked(tally: &Mutex<Tally>) -> std::sync::MutexGuard<'_, Tally> {
    tally.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The guest's addresses and routes.
fn ready(station: Station) -> Result<(), String> {
    let guest = format!("g{}", station.host);
    within(&guest, || {
        ["all", "default", "eth0"].iter().try_for_each(|which| {
            std::fs::write(format!("/proc/sys/net/ipv6/conf/{which}/disable_ipv6"), "0")
        })
    })
    .map_err(|error| error.to_string())?;
    batch(
        &guest,
        &[
            format!("address add {}/16 broadcast 10.0.255.255 dev eth0", station.v4()),
            format!("address add {}/64 dev eth0 nodad", station.v6()),
            "route add 224.0.0.0/4 dev eth0".to_owned(),
            format!("neighbour replace {STRANGE_ADDRESS} lladdr {STRANGER} dev eth0"),
        ],
    );
    Ok(())
}

/// One round: both guests act at once, and then every counter must be what was seen.
fn play(
    round: u32,
    seed: u64,
    hosts: &[Host; 2],
    wires: &[Watch; 2],
    tallies: &[Mutex<Tally>; 2],
) -> Result<(), String> {
    let mut dice = Dice::new(seed.wrapping_add(u64::from(round)));
    offload(&mut dice);
    let dices = [Dice::new(dice.below(u64::MAX)), Dice::new(dice.below(u64::MAX))];
    thread::scope(|scope| {
        let acting: Vec<_> = [(0, 1), (1, 0)]
            .into_iter()
            .zip(dices)
            .map(|((own, other), mut dice)| {
                scope.spawn(move || {
                    (0..ACTIONS).try_for_each(|_| act(&mut dice, STATIONS[own], STATIONS[other]))
                })
            })
            .collect();
        acting
            .into_iter()
            .try_for_each(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    })
    .map_err(|error| format!("round {round}, seed {seed}: {error}"))?;
    let deadline = Instant::now() + PATIENCE;
    loop {
        let differences: Vec<String> = hosts
            .iter()
            .zip(tallies)
            .zip(STATIONS)
            .flat_map(|((host, tally), station)| differences(host, station, &locked(tally).clone()))
            .collect();
        if differences.is_empty() {
            break;
        }
        if Instant::now() > deadline {
            let list = differences.join("\n  ");
            return Err(format!("round {round}, seed {seed}: counters are not what was seen:\n  {list}"));
        }
        thread::sleep(Duration::from_millis(20));
    }
    for watch in wires {
        let lost = watch.wire.lost().map_err(|error| error.to_string())?;
        if lost > 0 {
            return Err(format!("round {round}: the capture itself has lost {lost} packets"));
        }
    }
    Ok(())
}

/// Which packets links take uncut, and which they put together, is the dice's to say.
fn offload(dice: &mut Dice) {
    let mut word = |name: &str| format!("{name} {}", if dice.below(2) == 0 { "on" } else { "off" });
    for station in STATIONS {
        for (namespace, link) in [
            (format!("g{}", station.host), "eth0".to_owned()),
            (format!("h{}", station.host), "eth0".to_owned()),
            (format!("h{}", station.host), station.tap()),
        ] {
            let words = [word("tso"), word("gso"), word("gro"), word("tx-udp-segmentation")].join(" ");
            // Some of them a link may not have; then it stays as it is.
            let _ = try_run(&format!("ip netns exec {namespace} ethtool -K {link} {words}"));
        }
    }
}

fn act(dice: &mut Dice, own: Station, other: Station) -> Result<(), String> {
    let guest = format!("g{}", own.host);
    let is_v6 = dice.below(2) == 0;
    let to: IpAddr = if is_v6 { other.v6().into() } else { other.v4().into() };
    let failed = |error: std::io::Error| format!("to {to}: {error}");
    match dice.below(9) {
        0 | 1 => stream(own, other, to, dice.between(1_000, 1_500_000)).map_err(failed),
        2 => send(&guest, SocketAddr::new(to, 9), &sizes(dice, 30, 0, 1_400), None).map_err(failed),
        // Longer than the link takes: fragments.
        3 => send(&guest, SocketAddr::new(to, 9), &sizes(dice, 5, 1_500, 20_000), None).map_err(failed),
        4 => {
            let segment = dice.between(400, 1_200) as i32;
            send(&guest, SocketAddr::new(to, 9), &sizes(dice, 5, 1_300, 30_000), Some(segment))
                .map_err(failed)
        }
        5 => {
            let sizes = sizes(dice, 5, 0, 1_400);
            send(&guest, "10.0.255.255:9".parse().expect("is one"), &sizes, None).map_err(failed)?;
            send(&guest, "224.0.0.251:5353".parse().expect("is one"), &sizes, None).map_err(failed)?;
            let index = within(&guest, || if_nametoindex("eth0")).map_err(|error| error.to_string())?;
            let group: Ipv6Addr = "ff02::fb".parse().expect("is one");
            send(&guest, SocketAddrV6::new(group, 5353, 0, index).into(), &sizes, None).map_err(failed)
        }
        6 => {
            let to = SocketAddr::new(STRANGE_ADDRESS.into(), 9);
            send(&guest, to, &sizes(dice, 10, 0, 1_400), None).map_err(failed)
        }
        7 => {
            // Caches are empty: known addresses are asked for, and one that nobody has.
            run(&format!("ip -n {guest} neighbour flush dev eth0"));
            let nobody = if is_v6 { "fd00::7777" } else { "10.0.77.77" };
            let nobody = SocketAddr::new(nobody.parse().expect("is one"), 9);
            send(&guest, SocketAddr::new(to, 9), &[10], None).map_err(failed)?;
            // The kernel may say that it has not found out yet.
            let _ = send(&guest, nobody, &[10], None);
            Ok(())
        }
        _ => odd(dice, &guest, own, other).map_err(failed),
    }
}

fn sizes(dice: &mut Dice, count: u64, least: u64, most: u64) -> Vec<usize> {
    (0..dice.between(1, count)).map(|_| dice.between(least, most)).collect()
}

/// A TCP connection over which so many bytes go.
fn stream(own: Station, other: Station, to: IpAddr, bytes: usize) -> std::io::Result<()> {
    let listener = within(&format!("g{}", other.host), || TcpListener::bind((to, 0)))?;
    let address = listener.local_addr()?;
    let mut client = within(&format!("g{}", own.host), || TcpStream::connect(address))?;
    let (mut server, _) = listener.accept()?;
    thread::scope(|scope| {
        let receiving = scope.spawn(move || std::io::copy(&mut server, &mut std::io::sink()));
        client.write_all(&vec![0x5a; bytes])?;
        drop(client);
        let received = receiving.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        if received == bytes as u64 { Ok(()) } else { Err(std::io::ErrorKind::UnexpectedEof.into()) }
    })
}

/// UDP packets of these sizes; with `segment` the kernel is to cut each.
fn send(guest: &str, to: SocketAddr, sizes: &[usize], segment: Option<i32>) -> std::io::Result<()> {
    within(guest, || {
        let any: IpAddr =
            if to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
        let socket = UdpSocket::bind((any, 0))?;
        socket.set_broadcast(true)?;
        if let Some(segment) = segment {
            setsockopt(&socket, sockopt::UdpGsoSegment, &segment)?;
        }
        let bytes = vec![0x5a; 65_000];
        for size in sizes {
            match socket.send_to(&bytes[..*size], to) {
                // An error message that came for an earlier packet.
                Err(error) if error.kind() == std::io::ErrorKind::ConnectionRefused => {}
                result => drop(result?),
            }
        }
        Ok(())
    })
}

/// Frames that no honest guest sends: from others' addresses, tagged, or noise.
fn odd(dice: &mut Dice, guest: &str, own: Station, other: Station) -> std::io::Result<()> {
    within(guest, || {
        let wire = Wire::open(Some("eth0"), 1)?;
        for _ in 0..dice.between(1, 10) {
            let mut frame = frames::ipv4(own, other, dice.below(2) == 0, dice.between(0, 600));
            match dice.below(4) {
                0 => frame[6..12].copy_from_slice(&STRANGER.0),
                1 => frame[26..30].copy_from_slice(&STRANGE_ADDRESS.octets()),
                2 => drop(frame.splice(12..12, [0x81, 0, 0, dice.between(1, 99) as u8])),
                _ => {
                    let length = dice.between(14, 200);
                    frame.resize(length, 0);
                    frame[12..].iter_mut().for_each(|byte| *byte = dice.below(256) as u8);
                }
            }
            wire.send(&frame)?;
        }
        Ok(())
    })
}

/// A capture of all that passes a host's tap and underlay link.
struct Watch {
    wire: Wire,
    station: Station,
    tap: u32,
    underlay: u32,
}

impl Watch {
    fn open(station: Station) -> std::io::Result<Self> {
        let (tap, underlay) = (if_nametoindex(station.tap().as_str())?, if_nametoindex("eth0")?);
        Ok(Self { wire: Wire::open(None, 20)?, station, tap, underlay })
    }

    fn run(&self, tally: &Mutex<Tally>, stop: &AtomicBool) {
        while !stop.load(Ordering::Relaxed) {
            match self.wire.receive() {
                Ok(Some(seen)) => self.count(&seen, &mut locked(tally)),
                Ok(None) => {}
                Err(error) => panic!("the capture on host {}: {error}", self.station.host),
            }
        }
    }

    fn count(&self, seen: &Seen, tally: &mut Tally) {
        if seen.link == self.tap {
            let place = if seen.is_outgoing { "to_guest" } else { "from_guest" };
            add(tally, format!("{place} {}", class(&seen.head)), on_the_wire(seen, 0));
            if !seen.is_outgoing
                && seen.tag_bytes == 0
                && let Some(protocol) = asks(&seen.head, seen.length)
            {
                add(tally, format!("asked {protocol}"), (1, 0));
            }
        } else if seen.link == self.underlay && is_vxlan(&seen.head) {
            let (way, at) = if seen.is_outgoing { ("tx", 30) } else { ("rx", 26) };
            let peer = Ipv4Addr::new(seen.head[at], seen.head[at + 1], seen.head[at + 2], seen.head[at + 3]);
            add(tally, format!("{way} {} {peer}", class(&seen.head[50..])), on_the_wire(seen, 50));
        }
    }
}

fn add(tally: &mut Tally, key: String, (packets, bytes): (u64, u64)) {
    let entry = tally.entry(key).or_default();
    entry.0 += packets;
    entry.1 += bytes;
}

fn is_vxlan(head: &[u8]) -> bool {
    head[12..14] == [8, 0] && head[14] == 0x45 && head[23] == 17 && head[36..38] == VXLAN_PORT.to_be_bytes()
}

fn class(head: &[u8]) -> &'static str {
    match head[..6].try_into().unwrap_or([0; 6]) {
        frames::BROADCAST => "broadcast",
        mac if mac[0] & 1 == 1 => "multicast",
        mac if STATIONS.iter().any(|station| station.mac() == mac) => "unicast",
        _ => "unknown_unicast",
    }
}

/// Packets and bytes that a packet is on a wire; its innermost Ethernet header starts at `inner`.
fn on_the_wire(seen: &Seen, inner: usize) -> (u64, u64) {
    if seen.segment_bytes == 0 {
        return (1, seen.length as u64);
    }
    let head = &seen.head[inner..];
    let (protocol, transport) = match head[12..14] {
        [8, 0] => (head[23], 14 + usize::from(head[14] & 15) * 4),
        _ => (head[20], 54),
    };
    let transport_bytes = if protocol == 6 { usize::from(head[transport + 12] >> 4) * 4 } else { 8 };
    let headers = inner + transport + transport_bytes + seen.tag_bytes;
    let segments = (seen.length - headers).div_ceil(seen.segment_bytes).max(1);
    (segments as u64, (seen.length + (segments - 1) * headers) as u64)
}

/// Whether it is a question to all who has an address, and by which protocol.
fn asks(head: &[u8], length: usize) -> Option<&'static str> {
    let message = frames::read(&head[..length.min(head.len())])?;
    let is_arp = head[12..14] == [8, 6];
    let has_sender =
        if is_arp { head[28..32] != [0; 4] && head[28..32] != head[38..42] } else { head[22..38] != [0; 16] };
    let is_spoofed = if is_arp { message.mac != head[6..12] } else { false };
    (message.is_question && has_sender && !is_spoofed && head[0] & 1 == 1).then_some(if is_arp {
        "arp"
    } else {
        "nd"
    })
}

/// Where the counters of a host are not what was seen.
fn differences(host: &Host, station: Station, seen: &Tally) -> Vec<String> {
    let counted = match counted(host, station) {
        Ok(counted) => counted,
        Err(error) => return vec![error],
    };
    let keys: std::collections::BTreeSet<&String> = seen.keys().chain(counted.keys()).collect();
    keys.into_iter()
        .filter(|key| seen.get(*key) != counted.get(*key))
        .map(|key| {
            let of = |tally: &Tally| tally.get(key).copied().unwrap_or_default();
            format!("host {} {key}: seen {:?}, counted {:?}", station.host, of(seen), of(&counted))
        })
        .collect()
}

fn counted(host: &Host, station: Station) -> Result<Tally, String> {
    let (Some(plane), Some(underlay)) = (&host.plane, &host.underlay) else {
        return Err("no programs".into());
    };
    let mut tally = Tally::new();
    let number = (station.id().0.as_u128() >> 64) as u64;
    let accounts = plane.read().map_err(|error| error.to_string())?;
    for (_, account) in accounts.iter().filter(|(key, _)| key.port == number) {
        for (at, class) in ["unicast", "broadcast", "multicast", "unknown_unicast"].iter().enumerate() {
            for (place, packets, bytes) in [
                ("from_guest", account.from_packets[at], account.from_bytes[at]),
                ("to_guest", account.to_packets[at], account.to_bytes[at]),
            ] {
                tally.insert(format!("{place} {class}"), (packets, bytes));
            }
        }
        // The first outcome is that a question was seen.
        for (protocol, counts) in ["arp", "nd"].iter().zip(account.neighbours) {
            tally.insert(format!("asked {protocol}"), (counts[0], 0));
        }
    }
    for sample in underlay.read().map_err(|error| error.to_string())? {
        let key = format!("{} {} {}", sample.direction.as_str(), sample.class.as_str(), sample.peer);
        tally.insert(key, (sample.packets, sample.bytes));
    }
    tally.retain(|_, count| *count != (0, 0));
    Ok(tally)
}
