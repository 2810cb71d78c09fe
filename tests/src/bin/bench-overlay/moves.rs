//! A port moves from host to host while another host sends to it without pause: the time from the order to the last
//! packet that still comes to where it was. The host that sends has many networks.

use crate::frames;
use crate::namespaces::{add, batch, join, within};
use crate::site::{Host, MTU, Policy, Programs, Station, VNI, acquaint, vtep, wanted};
use crate::wire::{Seen, Wire};
use godwit_agent::network::keeper::Keeper;
use godwit_agent::network::wanted::WantedNetworks;
use godwit_agent::telemetry::Capacity;
use godwit_protocol::network::NetworkWanted;
use prometheus::Registry;
use serde_json::{Value, json};
use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// Who sends, who stays where the port may be, and the port, whose host changes.
const SENDER: Station = Station { number: 1, host: 1 };
const RESIDENTS: [Station; 2] = [Station { number: 2, host: 2 }, Station { number: 3, host: 3 }];
const MOVING: u32 = 4;

/// Between packets.
const PAUSE: Duration = Duration::from_micros(50);

/// After this time without a stale packet there is none any more.
const QUIET: Duration = Duration::from_millis(300);

/// A host, and what its agent keeps.
struct Kept {
    host: Host,
    keeper: Keeper,
}

impl Kept {
    fn start(number: u8) -> Self {
        let capacity = Capacity::default();
        let host = Host::start(number, Programs::All, capacity);
        let folder = format!("/run/agent{number}");
        std::fs::create_dir(&folder).expect("is made");
        let wanted = Arc::new(WantedNetworks::open(Path::new(&folder)).expect("opens"));
        let keeper =
            Keeper::new(host.network.clone(), wanted, &Registry::new()).expect("the names are right");
        Self { host, keeper }
    }

    fn ensure(&self, wanted: &NetworkWanted) {
        within(&self.host.name, || self.keeper.ensure(wanted)).expect("the network is as wanted");
    }
}

pub(crate) fn measure(networks: u32, rounds: u32) -> Result<Value, String> {
    let policy = Policy { port_security: true, rules: Some(vec![]) };
    let open = Policy { port_security: true, rules: None };
    let hosts = [1, 2, 3].map(Kept::start);
    acquaint(3);
    hosts[0].host.add_guest("g1", SENDER);
    for (kept, number) in hosts[1..].iter().zip([2, 3]) {
        kept.host.add_guest(&format!("v{number}"), Station { number: MOVING, host: number });
    }
    let take_up = fill(&hosts[0], networks, &policy);
    let told = |at: u8, host: u8| {
        let moving = Station { number: MOVING, host: at };
        wanted(VNI, host, &[SENDER, RESIDENTS[0], RESIDENTS[1], moving], &open)
    };
    for (kept, number) in hosts.iter().zip(1..) {
        kept.ensure(&told(2, number));
    }
    let (mut visible, mut arrived, mut busy) = (Vec::new(), Vec::new(), Vec::new());
    for (round, generation) in (0..2 * rounds).zip(2..) {
        let (from, to) = if round % 2 == 0 { (2, 3) } else { (3, 2) };
        let orders = [1, 2, 3].map(|host| NetworkWanted { generation, ..told(to, host) });
        // In the second half the sending host looks at all its networks just then, as it does now and again.
        let is_busy = round >= rounds;
        let (stale_ms, first_ms) = switch(&hosts, &orders, from, to, is_busy)?;
        if is_busy { &mut busy } else { &mut visible }.push(stale_ms);
        arrived.push(first_ms);
    }
    let looking = Instant::now();
    within("h1", || hosts[0].keeper.check());
    let check_ms = looking.elapsed().as_secs_f64() * 1e3;
    Ok(json!({
        "visible_ms": visible, "visible_busy_ms": busy, "first_ms": arrived, "check_ms": check_ms,
        "take_up_ms": take_up,
    }))
}

/// The last networks of a host, of which the time to take each up is told.
const LAST: usize = 10;

/// Networks of a host, each with a port there and one elsewhere. Milliseconds that the last took.
fn fill(kept: &Kept, networks: u32, policy: &Policy) -> Vec<f64> {
    add("others");
    let of = |number: u32| {
        [Station { number: 8 + 2 * number, host: 1 }, Station { number: 9 + 2 * number, host: 2 }]
    };
    let lines: Vec<String> = (1..networks)
        .flat_map(|number| {
            let tap = of(number)[0].tap();
            [
                format!("link add {tap} mtu {MTU} type veth peer name o{number} mtu {MTU} netns others"),
                format!("link set {tap} up"),
            ]
        })
        .collect();
    batch(&kept.host.name, &lines);
    let ups: Vec<String> = (1..networks).map(|number| format!("link set o{number} up")).collect();
    batch("others", &ups);
    let mut times: Vec<f64> = (1..networks)
        .map(|number| {
            let network = wanted(VNI + number, 1, &of(number), policy);
            let started = Instant::now();
            kept.ensure(&network);
            started.elapsed().as_secs_f64() * 1e3
        })
        .collect();
    times.split_off(times.len().saturating_sub(LAST))
}

/// One move. Milliseconds from the order to the last packet where the port was, and to the first where it is.
fn switch(
    hosts: &[Kept; 3],
    orders: &[NetworkWanted; 3],
    from: u8,
    to: u8,
    is_busy: bool,
) -> Result<(f64, f64), String> {
    let stop = AtomicBool::new(false);
    let moving = Station { number: MOVING, host: to };
    let frame = frames::ipv4(SENDER, moving, false, 100);
    thread::scope(|scope| {
        let sending = scope.spawn(|| {
            join("g1", || {
                let wire = Wire::open(Some("eth0"), 1).map_err(|error| error.to_string())?;
                while !stop.load(Ordering::Relaxed) {
                    let _ = wire.send(&frame);
                    thread::sleep(PAUSE);
                }
                Ok::<_, String>(())
            })
        });
        let [old, new] = [from, to].map(|host| {
            let stop = &stop;
            scope.spawn(move || join(&format!("h{host}"), || arrivals(host, moving, stop)))
        });
        thread::sleep(Duration::from_millis(100));
        if is_busy {
            scope.spawn(|| join("h1", || hosts[0].keeper.check()));
            thread::sleep(Duration::from_millis(1));
        }
        let ordered = Instant::now();
        let telling: Vec<_> = hosts
            .iter()
            .zip(orders)
            .map(|(kept, order)| scope.spawn(move || join(&kept.host.name, || kept.keeper.ensure(order))))
            .collect();
        for told in telling {
            let told = told.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            told.map_err(|error| error.to_string())?;
        }
        thread::sleep(QUIET);
        stop.store(true, Ordering::Relaxed);
        let joined = |thread: thread::ScopedJoinHandle<'_, Result<_, String>>| {
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        };
        sending.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        let ((_, last), (first, _)) = (joined(old)?, joined(new)?);
        let since =
            |at: Option<Instant>| at.map(|at| at.saturating_duration_since(ordered).as_secs_f64() * 1e3);
        match (since(last), since(first)) {
            (Some(last), Some(first)) if last < QUIET.as_secs_f64() * 1e3 + 5_000.0 => Ok((last, first)),
            (last, first) => Err(format!(
                "no packet came to the port before or after its move: last {last:?} ms, first {first:?} ms"
            )),
        }
    })
}

/// When the first and the last packet for a station came to this host.
fn arrivals(
    host: u8,
    station: Station,
    stop: &AtomicBool,
) -> Result<(Option<Instant>, Option<Instant>), String> {
    let wire = Wire::open(Some("eth0"), 5).map_err(|error| error.to_string())?;
    let IpAddr::V4(address) = vtep(host) else { return Err("the underlay is not IPv4".into()) };
    let address = address.octets();
    let (mut first, mut last) = (None, None);
    while !stop.load(Ordering::Relaxed) {
        let seen = wire.receive().map_err(|error| error.to_string())?;
        // The switch floods what is for hosts that say nothing: outer destination, and behind all headers the inner one.
        let is_one = |seen: &Seen| {
            !seen.is_outgoing && seen.head[30..34] == address && seen.head[50..56] == station.mac()
        };
        if seen.is_some_and(|seen| is_one(&seen)) {
            last = Some(Instant::now());
            first = first.or(last);
        }
    }
    Ok((first, last))
}
