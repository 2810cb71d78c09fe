//! TCP and small packets between two guests on two hosts, with our programs and without: two pairs of hosts at once,
//! used in turn.

use crate::namespaces::{batch, join, run, within};
use crate::site::{Host, Policy, Programs, Station, VNI, acquaint, wanted};
use godwit_agent::telemetry::Capacity;
use godwit_protocol::port::Mac;
use godwit_protocol::security::{Direction, Family, Remote, Rule};
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::thread;
use std::time::{Duration, Instant};

/// Payload of the smallest frame: 64 bytes with its checksum.
const SMALL: [u8; 18] = [0; 18];

/// Two hosts with a guest each.
struct Pair {
    #[allow(dead_code, reason = "are kept up")]
    hosts: [Host; 2],
    stations: [Station; 2],
}

pub(crate) fn measure(case: &str, pairs: u32, seconds: u32) -> Result<Value, String> {
    let (programs, policy) = match case {
        "telemetry" => (Programs::Telemetry, Policy::default()),
        "groups" => (Programs::All, Policy { port_security: true, rules: Some(anything()) }),
        // How far two alike are apart.
        "nothing" => (Programs::None, Policy::default()),
        other => return Err(format!("{other} is neither telemetry, groups nor nothing")),
    };
    let with = Pair::start(1, programs, &policy);
    let without = Pair::start(3, Programs::None, &Policy::default());
    acquaint(4);
    let time = Duration::from_secs(seconds.into());
    let failed = |error: std::io::Error| error.to_string();
    for pair in [&with, &without] {
        pair.stream(Duration::from_millis(300)).map_err(failed)?;
    }
    let (mut tcp, mut packets) = (Vec::new(), Vec::new());
    for number in 0..pairs {
        // Who is first has a cooler machine.
        let order = if number % 2 == 0 { [&with, &without] } else { [&without, &with] };
        let mut streams = order.map(|pair| pair.stream(time)).into_iter().collect::<Result<Vec<_>, _>>();
        let mut rates = order.map(|pair| pair.small(time)).into_iter().collect::<Result<Vec<_>, _>>();
        if number % 2 == 1 {
            streams.iter_mut().for_each(|both| both.reverse());
            rates.iter_mut().for_each(|both| both.reverse());
        }
        tcp.push(streams.map_err(failed)?);
        packets.push(rates.map_err(failed)?);
    }
    Ok(json!({ "tcp_mib_s": tcp, "packets_per_s": packets }))
}

/// Everything may pass, both ways, as a rule of a group says.
fn anything() -> Vec<Rule> {
    [Direction::Ingress, Direction::Egress]
        .map(|direction| Rule {
            direction,
            family: Family::V4,
            protocol: None,
            ports: None,
            icmp: None,
            remote: Remote::Any,
            stateful: true,
        })
        .to_vec()
}

impl Pair {
    fn start(first: u8, programs: Programs, policy: &Policy) -> Self {
        let stations = [first, first + 1].map(|host| Station { number: host.into(), host });
        let hosts = stations.map(|station| {
            let host = Host::start(station.host, programs, Capacity::default());
            let guest = format!("g{}", station.host);
            host.add_guest(&guest, station);
            host.ensure(&wanted(VNI, station.host, &stations, policy));
            host
        });
        for (own, other) in [(0, 1), (1, 0)].map(|(own, other)| (stations[own], stations[other])) {
            batch(
                &format!("g{}", own.host),
                &[
                    format!("address add {}/8 dev eth0", own.v4()),
                    format!("neighbour replace {} lladdr {} dev eth0", other.v4(), Mac(other.mac())),
                ],
            );
        }
        Self { hosts, stations }
    }

    fn guests(&self) -> [String; 2] {
        self.stations.map(|station| format!("g{}", station.host))
    }

    /// TCP throughput from the first guest to the second, in MiB/s.
    fn stream(&self, time: Duration) -> std::io::Result<f64> {
        let [sender, receiver] = self.guests();
        let listener = within(&receiver, || TcpListener::bind((self.stations[1].v4(), 5001)))?;
        let mut client = within(&sender, || TcpStream::connect((self.stations[1].v4(), 5001)))?;
        let (mut server, _) = listener.accept()?;
        thread::scope(|scope| {
            let receiving = scope.spawn(move || {
                let mut buffer = vec![0; 256 << 10];
                let (started, mut bytes) = (Instant::now(), 0_u64);
                loop {
                    match server.read(&mut buffer)? {
                        0 => return Ok(bytes as f64 / f64::from(1 << 20) / started.elapsed().as_secs_f64()),
                        read => bytes += read as u64,
                    }
                }
            });
            let buffer = vec![0x5a; 256 << 10];
            let ends = Instant::now() + time;
            while Instant::now() < ends {
                client.write_all(&buffer)?;
            }
            drop(client);
            receiving.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// The smallest packets that come to the second guest, a second.
    fn small(&self, time: Duration) -> std::io::Result<f64> {
        let [sender, receiver] = self.guests();
        let address = (self.stations[1].v4(), 5002);
        // Somebody is there, and does not read: an error message would be answered otherwise.
        let _there = within(&receiver, || UdpSocket::bind(address))?;
        let arrived = || -> std::io::Result<u64> {
            let text = run(&format!("ip -n {receiver} -s -j link show dev eth0"));
            let links: Value = serde_json::from_str(&text)?;
            Ok(links[0]["stats64"]["rx"]["packets"].as_u64().unwrap_or(0))
        };
        let before = arrived()?;
        let elapsed = thread::scope(|scope| {
            let sending = scope.spawn(|| {
                join(&sender, || -> std::io::Result<Duration> {
                    let socket = UdpSocket::bind((self.stations[0].v4(), 0))?;
                    socket.connect(address)?;
                    let started = Instant::now();
                    while started.elapsed() < time {
                        for _ in 0..64 {
                            let _ = socket.send(&SMALL);
                        }
                    }
                    Ok(started.elapsed())
                })
            });
            sending.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })?;
        Ok((arrived()? - before) as f64 / elapsed.as_secs_f64())
    }
}
