//! Every station asks for every other, or a fixed sample of that, on three hosts: what crosses the underlay. All
//! addresses are known, so nothing would have to.
//!
//! Each question is asked as if by a guest with an empty cache, and each must be answered with the owner's Ethernet
//! address before the figures count.

use crate::frames::{self, Protocol};
use crate::namespaces::{add, batch, join, run};
use crate::ovs::OpenVSwitch;
use crate::site::{Host, MTU, Policy, Programs, Station, VNI, VXLAN_PORT, acquaint, plug, vtep, wanted};
use crate::wire::Wire;
use godwit_agent::telemetry::Capacity;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::sync::Barrier;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

const HOSTS: u8 = 3;

/// Questions of a host that wait for their answers.
const WINDOW: usize = 16;

/// Without an answer for this long, one is lost.
const PATIENCE: Duration = Duration::from_secs(5);

/// Who holds the network together. Dropping it ends it.
enum Side {
    Godwit(#[allow(dead_code, reason = "is kept up")] Vec<Host>),
    Bridges,
    OpenVSwitch(#[allow(dead_code, reason = "is kept up")] Vec<OpenVSwitch>),
}

/// What the switch's ports have taken in.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Crossed {
    packets: u64,
    bytes: u64,
}

pub(crate) fn measure(side: &str, stations: u32, protocol: &str, questions: u32) -> Result<Value, String> {
    let protocol = match protocol {
        "arp" => Protocol::Arp,
        "nd" => Protocol::Nd,
        other => return Err(format!("{other} is neither arp nor nd")),
    };
    if stations < 3 {
        return Err("three hosts want a station each at least".into());
    }
    let all: Vec<Station> =
        (1..=stations).map(|number| Station { number, host: (number % 3) as u8 + 1 }).collect();
    let kept = match side {
        "godwit" => Side::Godwit(by_the_agent(&all, Programs::Telemetry)),
        "suppress" => Side::Godwit(by_the_agent(&all, Programs::None)),
        "flood" => by_bridges(),
        "ovs" => Side::OpenVSwitch(OpenVSwitch::hosts(&all, protocol)?),
        other => return Err(format!("{other} is none of godwit, flood, suppress, ovs")),
    };
    if !matches!(kept, Side::OpenVSwitch(_)) {
        acquaint(HOSTS);
    }
    settled();
    let before = settled();
    let started = Instant::now();
    let asked = ask(&all, protocol, pairs(stations, questions))?;
    let seconds = started.elapsed().as_secs_f64();
    let after = settled();
    Ok(json!({
        "questions": asked,
        "packets": after.packets - before.packets,
        "bytes": after.bytes - before.bytes,
        "seconds": seconds,
    }))
}

/// Who asks for whom, by number: all pairs if they are that few, else the same sample every time.
fn pairs(stations: u32, questions: u32) -> Vec<(u32, u32)> {
    let every = u64::from(stations) * u64::from(stations - 1);
    if u64::from(questions) >= every {
        let of = |asker| (1..=stations).filter(move |owner| *owner != asker).map(move |owner| (asker, owner));
        return (1..=stations).flat_map(of).collect();
    }
    // Numbers without a pattern (Knuth, The Art of Computer Programming, 3.3.4: MMIX).
    let mut state = 1_u64;
    let mut number = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 33) % u64::from(stations)) as u32 + 1
    };
    let mut pairs = Vec::with_capacity(questions as usize);
    while pairs.len() < questions as usize {
        let (asker, owner) = (number(), number());
        if asker != owner {
            pairs.push((asker, owner));
        }
    }
    pairs
}

/// A guest's namespace and tap on each host: behind it are all stations of that host.
fn guest_of(all: &[Station], host: u8) -> (String, Station) {
    let first = all.iter().find(|station| station.host == host);
    (format!("g{host}"), *first.unwrap_or(&all[0]))
}

fn by_the_agent(all: &[Station], programs: Programs) -> Vec<Host> {
    // One tap sends for all stations of its host, which port security is there to forbid.
    let policy = Policy::default();
    (1..=HOSTS)
        .map(|number| {
            let host = Host::start(number, programs, Capacity::default());
            let (guest, station) = guest_of(all, number);
            host.add_guest(&guest, station);
            host.ensure(&wanted(VNI, number, all, &policy));
            host
        })
        .collect()
}

/// Bridge and VXLAN device as the kernel makes them: flooding to all hosts, and learning.
fn by_bridges() -> Side {
    for number in 1..=HOSTS {
        let (name, guest) = (plug(number), format!("g{number}"));
        add(&guest);
        let local = vtep(number);
        let mut lines = vec![
            format!("link add name br mtu {MTU} type bridge"),
            format!(
                "link add name vx mtu {MTU} type vxlan id {VNI} dstport {VXLAN_PORT} local {local} dev eth0"
            ),
            format!("link add name tap mtu {MTU} type veth peer name eth0 mtu {MTU} netns {guest}"),
        ];
        lines.extend(["vx", "tap"].map(|link| format!("link set dev {link} master br up")));
        lines.push("link set dev br up".into());
        batch(&name, &lines);
        run(&format!("ip -n {guest} link set eth0 up"));
        for other in (1..=HOSTS).filter(|other| *other != number) {
            run(&format!("bridge -n {name} fdb append 00:00:00:00:00:00 dev vx dst {}", vtep(other)));
        }
    }
    Side::Bridges
}

/// The counts, once nothing moves any more.
fn settled() -> Crossed {
    let mut last = crossed();
    let mut quiet = 0;
    while quiet < 3 {
        thread::sleep(Duration::from_millis(50));
        let now = crossed();
        quiet = if now == last { quiet + 1 } else { 0 };
        last = now;
    }
    last
}

/// What the switch has taken in from all hosts.
fn crossed() -> Crossed {
    let mut sum = Crossed { packets: 0, bytes: 0 };
    for host in 1..=HOSTS {
        let text = run(&format!("ip -s -j link show dev h{host}"));
        let links: Value = serde_json::from_str(&text).expect("ip prints JSON");
        let taken = &links[0]["stats64"]["rx"];
        sum.packets += taken["packets"].as_u64().expect("is a count");
        sum.bytes += taken["bytes"].as_u64().expect("is a count");
    }
    sum
}

/// All hosts ask at once; each also answers for its own stations.
fn ask(all: &[Station], protocol: Protocol, pairs: Vec<(u32, u32)>) -> Result<usize, String> {
    let asked = pairs.len();
    let mut by_host: BTreeMap<u8, Vec<(Station, Station)>> = (1..=HOSTS).map(|host| (host, vec![])).collect();
    for (asker, owner) in pairs {
        let (asker, owner) = (all[asker as usize - 1], all[owner as usize - 1]);
        by_host.entry(asker.host).or_default().push((asker, owner));
    }
    let busy = AtomicUsize::new(by_host.len());
    // Nobody asks before all can answer.
    let ready = Barrier::new(by_host.len());
    let results = thread::scope(|scope| {
        let asking: Vec<_> = by_host
            .into_iter()
            .map(|(host, pairs)| {
                let (guest, _) = guest_of(all, host);
                let (busy, ready) = (&busy, &ready);
                scope.spawn(move || {
                    let outcome = join(&guest, || {
                        let asker = Asker::new(host, all, protocol);
                        ready.wait();
                        asker?.run(pairs, busy)
                    });
                    if outcome.is_err() {
                        // The others need not wait for this one.
                        busy.store(0, Ordering::Relaxed);
                    }
                    outcome
                })
            })
            .collect();
        asking.into_iter().map(|thread| thread.join()).collect::<Vec<_>>()
    });
    for result in results {
        result.unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
    }
    Ok(asked)
}

/// The guests of one host.
struct Asker<'a> {
    host: u8,
    all: &'a [Station],
    protocol: Protocol,
    wire: Wire,
}

impl<'a> Asker<'a> {
    fn new(host: u8, all: &'a [Station], protocol: Protocol) -> Result<Self, String> {
        let wire = Wire::open(Some("eth0"), 20).map_err(|error| error.to_string())?;
        Ok(Self { host, all, protocol, wire })
    }

    fn run(&self, pairs: Vec<(Station, Station)>, busy: &AtomicUsize) -> Result<(), String> {
        let mut questions = pairs.into_iter().peekable();
        let mut waiting: Vec<(u32, u32)> = Vec::with_capacity(WINDOW);
        let mut progress = Instant::now();
        let mut is_done = false;
        loop {
            while waiting.len() < WINDOW
                && let Some((asker, owner)) = questions.next()
            {
                self.send(&frames::question(self.protocol, asker, owner))?;
                // A neighbour behind the same tap sees the question before any switch does.
                if owner.host != self.host {
                    waiting.push((asker.number, owner.number));
                }
                progress = Instant::now();
            }
            if !is_done && waiting.is_empty() && questions.peek().is_none() {
                is_done = true;
                let _ = busy.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |busy| busy.checked_sub(1));
            }
            if is_done && busy.load(Ordering::Relaxed) == 0 {
                return Ok(());
            }
            let seen = self.wire.receive().map_err(|error| error.to_string())?;
            let message = seen
                .filter(|seen| !seen.is_outgoing)
                .and_then(|seen| frames::read(&seen.head[..seen.length.min(seen.head.len())]));
            if let Some(message) = message {
                if message.is_question {
                    self.reply(&message)?;
                } else if self.take(&message, &mut waiting)? {
                    progress = Instant::now();
                }
            } else if !waiting.is_empty() && progress.elapsed() > PATIENCE {
                return Err(format!("host {}: {} questions were not answered", self.host, waiting.len()));
            }
        }
    }

    fn station(&self, number: u32) -> Option<Station> {
        self.all.get(usize::try_from(number).ok()?.checked_sub(1)?).copied()
    }

    fn reply(&self, message: &frames::Message) -> Result<(), String> {
        let (Some(owner), Some(asker)) = (self.station(message.target), self.station(message.sender)) else {
            return Ok(());
        };
        if owner.host == self.host {
            self.send(&frames::answer(self.protocol, owner, asker))?;
        }
        Ok(())
    }

    /// Takes an answer: whether one was waited for.
    fn take(&self, message: &frames::Message, waiting: &mut Vec<(u32, u32)>) -> Result<bool, String> {
        // By ARP the answer's target is who asked; by neighbour discovery it is who was asked for.
        let owner = if self.protocol == Protocol::Arp { message.sender } else { message.target };
        let at = waiting.iter().position(|(asker, of)| {
            *of == owner && (self.protocol == Protocol::Nd || *asker == message.target)
        });
        let Some(at) = at else { return Ok(false) };
        waiting.swap_remove(at);
        match self.station(owner) {
            Some(station) if station.mac() == message.mac => Ok(true),
            _ => Err(format!("the answer for station {owner} gives {:x?}", message.mac)),
        }
    }

    fn send(&self, frame: &[u8]) -> Result<(), String> {
        loop {
            match self.wire.send(frame) {
                // The link's queue is full for a moment.
                Err(error) if error.raw_os_error() == Some(nix::libc::ENOBUFS) => thread::yield_now(),
                result => return result.map_err(|error| format!("a frame cannot be sent: {error}")),
            }
        }
    }
}

/// The tap of a host's guest, for those who make their own switch.
pub(crate) fn add_plain_guest(all: &[Station], host: u8) -> &'static str {
    let (guest, _) = guest_of(all, host);
    add(&guest);
    run(&format!(
        "ip -n h{host} link add name tap mtu {MTU} type veth peer name eth0 mtu {MTU} netns {guest}"
    ));
    run(&format!("ip -n h{host} link set dev tap up"));
    run(&format!("ip -n {guest} link set eth0 up"));
    "tap"
}

/// Hosts of the comparison.
pub(crate) fn hosts() -> impl Iterator<Item = u8> {
    1..=HOSTS
}
