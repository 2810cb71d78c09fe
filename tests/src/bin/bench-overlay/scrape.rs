//! A scrape of a host with many networks, over the agent's own server of metrics: every kind of traffic has passed,
//! with each of so many peers, in both directions.

use crate::frames::{self, BROADCAST};
use crate::namespaces::{add, batch, join, within};
use crate::site::{Host, MTU, Policy, Programs, Station, VNI, vtep, wanted};
use crate::wire::Wire;
use godwit_agent::config::MetricsListen;
use godwit_agent::metrics::{Exposition, Metrics};
use godwit_agent::telemetry::Capacity;
use godwit_agent::telemetry::plane::PlaneCollector;
use godwit_agent::telemetry::vxlan::VxlanCollector;
use prometheus::Registry;
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::net::IpAddr;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Instant;

const SOCKET: &str = "/run/metrics.sock";

pub(crate) fn measure(networks: u32, peers: u32, rounds: u32) -> Result<Value, String> {
    let host = Host::start(1, Programs::Telemetry, Capacity::default());
    let (Some(plane), Some(underlay)) = (&host.plane, &host.underlay) else {
        return Err("the host has no programs".into());
    };
    let of = |number: u32| {
        [Station { number: 2 * number + 2, host: 1 }, Station { number: 2 * number + 3, host: 2 }]
    };
    for number in 0..networks {
        let told = wanted(VNI + number, 1, &of(number), &Policy::default());
        within("h1", || plane.ensure(&told)).map_err(|error| error.to_string())?;
    }
    add("guests");
    let lines: Vec<String> = (0..networks)
        .flat_map(|number| {
            let tap = of(number)[0].tap();
            [
                format!("link add {tap} mtu {MTU} type veth peer name o{number} mtu {MTU} netns guests"),
                format!("link set {tap} up"),
            ]
        })
        .collect();
    batch("h1", &lines);
    let ups: Vec<String> = (0..networks).map(|number| format!("link set o{number} up")).collect();
    batch("guests", &ups);
    within("h1", || plane.refresh());
    let failed = |error: std::io::Error| error.to_string();
    for number in 0..networks {
        let frame = frames::ipv4(of(number)[0], of(number)[1], false, 18);
        within("guests", || Wire::open(Some(&format!("o{number}")), 1)?.send(&frame)).map_err(failed)?;
    }
    // What comes is put on the cable's other end, what leaves on the host's.
    let (cable, own) = (Wire::open(Some("h1"), 1), within("h1", || Wire::open(Some("eth0"), 1)));
    let (cable, own) = (cable.map_err(failed)?, own.map_err(failed)?);
    for (number, peer) in (0..networks).flat_map(|number| (0..peers).map(move |peer| (number, peer))) {
        let peer = IpAddr::from([198, 18, 1 + (peer >> 8) as u8, peer as u8]);
        let [here, there] = of(number);
        for class in 0..4 {
            let frame = |from: Station, to: Station| {
                let mut frame = frames::ipv4(from, to, false, 18);
                match class {
                    1 => frame[..6].copy_from_slice(&BROADCAST),
                    2 => frame[..6].copy_from_slice(&[1, 0, 0x5e, 0, 0, 0xfb]),
                    3 => frame[..6].copy_from_slice(&[0xfa, 0x16, 0x3e, 0xff, 0xff, 0xff]),
                    _ => {}
                }
                frame
            };
            let vni = VNI + number;
            cable.send(&frames::vxlan(vni, peer, vtep(1), &frame(there, here))).map_err(failed)?;
            own.send(&frames::vxlan(vni, vtep(1), peer, &frame(here, there))).map_err(failed)?;
        }
    }
    let texts: Vec<Arc<dyn Exposition>> =
        vec![Arc::new(VxlanCollector::new(underlay.clone())), Arc::new(PlaneCollector::new(plane.clone()))];
    let expected = networks as usize * peers as usize * 8;
    join("h1", || scrapes(texts, rounds, expected))
}

fn scrapes(texts: Vec<Arc<dyn Exposition>>, rounds: u32, expected: usize) -> Result<Value, String> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|error| error.to_string())?;
    let listen = MetricsListen::Unix(SOCKET.into());
    let metrics =
        runtime.block_on(Metrics::bind(&listen, Registry::new())).map_err(|error| error.to_string())?;
    runtime.spawn(metrics.with(texts).serve());
    let (mut times, mut bytes, mut series, mut grown) = (Vec::new(), 0, 0, 0.0_f64);
    for round in 0..=rounds {
        let before = resident_mb()?;
        let started = Instant::now();
        let text = scrape(bytes).map_err(|error| error.to_string())?;
        let elapsed = started.elapsed().as_secs_f64() * 1e3;
        // What the scraper holds is not the agent's.
        let own = resident_mb()? - before - text.len() as f64 / f64::from(1 << 20);
        let text = std::str::from_utf8(&text).map_err(|error| error.to_string())?;
        // The first is a warm-up.
        if round > 0 {
            times.push(elapsed);
        } else {
            grown = own.max(0.0);
        }
        let lines = text.lines().filter(|line| line.starts_with("godwit_"));
        (bytes, series) = (text.len(), lines.clone().count());
        let counted = lines.filter(|line| line.starts_with("godwit_vxlan_packets_total{")).count();
        if counted < expected {
            return Err(format!("the scrape shows {counted} kinds of traffic of {expected}"));
        }
    }
    Ok(json!({ "scrape_ms": times, "bytes": bytes, "series": series, "grown_mb": grown }))
}

/// By HTTP/1.0: what comes is the text as it is, until its end.
fn scrape(room: usize) -> std::io::Result<Vec<u8>> {
    let mut stream = UnixStream::connect(SOCKET)?;
    stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n")?;
    // As scrapers do, which know the size of the last one.
    let mut text = Vec::with_capacity(room + room / 8);
    stream.read_to_end(&mut text)?;
    Ok(text)
}

/// Resident memory of this process.
fn resident_mb() -> Result<f64, String> {
    let status = std::fs::read_to_string("/proc/self/status").map_err(|error| error.to_string())?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<f64>().ok());
    kib.map(|kib| kib / 1024.0).ok_or_else(|| "the kernel does not tell the resident memory".into())
}
