//! What each program takes for a packet: the kernel runs it again and again on one (BPF_PROG_TEST_RUN, by bpftool),
//! and keeps time itself while new connections pass.

use crate::frames;
use crate::namespaces::{batch, join, run, try_run, within};
use crate::site::{Host, Policy, Programs, Station, VNI, acquaint, vtep, wanted};
use godwit_agent::telemetry::{Capacity, measure_programs};
use godwit_protocol::port::Mac;
use godwit_protocol::security::{Direction, Family, Remote, Rule};
use serde_json::{Map, Value, json};
use std::net::UdpSocket;

/// Runs of a program on one packet.
const REPEAT: u32 = 300_000;

/// Connections that are opened.
const NEW: u16 = 20_000;

const HERE: Station = Station { number: 1, host: 1 };
const THERE: Station = Station { number: 2, host: 2 };

pub(crate) fn measure(case: &str, rules: u32) -> Result<Value, String> {
    let (programs, policy) = match case {
        "telemetry" => (Programs::Telemetry, Policy::default()),
        "security" => (Programs::Telemetry, Policy { port_security: true, rules: None }),
        "groups" => (Programs::All, Policy { port_security: true, rules: Some(these(rules)) }),
        other => return Err(format!("{other} is none of telemetry, security, groups")),
    };
    let all = [HERE, THERE];
    let host = Host::start(1, programs, Capacity::default());
    host.add_guest("g1", HERE);
    host.ensure(&wanted(VNI, 1, &all, &policy));
    let mut answer = Map::new();
    let to_there = frames::ipv4(HERE, THERE, false, 18);
    let to_here = frames::ipv4(THERE, HERE, false, 18);
    let outer = |from, to, frame: &[u8]| frames::vxlan(VNI, vtep(from), vtep(to), frame);
    let (tap, prefix) = (HERE.tap(), if programs == Programs::All { Some("filter_") } else { None });
    for (name, pin, frame) in [
        ("from_guest", format!("tap_{tap}_port_from_guest"), &to_there),
        ("to_guest", format!("tap_{tap}_port_to_guest"), &to_here),
        ("egress", "underlay_egress".to_owned(), &outer(1, 2, &to_there)),
        ("ingress", "underlay_ingress".to_owned(), &outer(2, 1, &to_here)),
    ] {
        answer.insert(name.into(), nanoseconds(&host, &pin, &tap, frame)?.into());
    }
    if let Some(prefix) = prefix {
        // A connection that the guest has opened, both ways.
        for (name, program, frame) in [
            ("filter_from_guest", "filter_from_guest", &to_there),
            ("filter_to_guest", "filter_to_guest", &frames_back(&to_there)),
        ] {
            let pin = format!("{prefix}tap_{tap}_{program}");
            answer.insert(name.into(), nanoseconds(&host, &pin, &tap, frame)?.into());
        }
        answer.insert("filter_new".into(), opening(&host, &tap)?.into());
    }
    Ok(Value::Object(answer))
}

/// The answer to a UDP packet: ports and addresses the other way round.
fn frames_back(frame: &[u8]) -> Vec<u8> {
    let mut back = frames::ipv4(THERE, HERE, false, 18);
    back[34..36].copy_from_slice(&frame[36..38]);
    back[36..38].copy_from_slice(&frame[34..36]);
    back
}

/// So many rules that are about something else, before the one that lets everything out.
fn these(others: u32) -> Vec<Rule> {
    let rule = |direction, protocol, ports, family| Rule {
        direction,
        family,
        protocol,
        ports,
        icmp: None,
        remote: Remote::Any,
        stateful: true,
    };
    let others = (0..others.min(100)).map(|number| {
        let port = 10_000 + number as u16;
        rule(Direction::Egress, Some(6), Some((port, port)), Family::V4)
    });
    others.chain([rule(Direction::Egress, None, None, Family::V4)]).collect()
}

/// The number of the program that a pinned attachment holds.
fn program(host: &Host, pin: &str) -> Result<u64, String> {
    let path = host.bpffs.join("godwit").join(pin);
    // It also looks for who else holds the attachment, and where nobody does it says that it has failed.
    let shown = try_run(&format!("bpftool -j link show pinned {}", path.display()));
    let shown: Value = serde_json::from_slice(&shown.stdout).map_err(|error| error.to_string())?;
    shown["prog_id"].as_u64().ok_or_else(|| format!("{pin} has no program: {shown}"))
}

/// The mean of many runs on a packet, as if it passed the tap.
fn nanoseconds(host: &Host, pin: &str, tap: &str, frame: &[u8]) -> Result<u64, String> {
    let id = program(host, pin)?;
    // `struct __sk_buff`, of which the tap's number is at 40.
    let mut context = [0_u8; 192];
    let index = within(&host.name, || nix::net::if_::if_nametoindex(tap)).map_err(|e| e.to_string())?;
    context[40..44].copy_from_slice(&index.to_ne_bytes());
    std::fs::write("/run/packet", frame).expect("is writable");
    std::fs::write("/run/context", context).expect("is writable");
    let line = format!(
        "ip netns exec {} bpftool -j prog run id {id} data_in /run/packet ctx_in /run/context repeat ",
        host.name
    );
    run(&format!("{line}{}", REPEAT / 20));
    let mut runs: Vec<u64> = (0..3)
        .map(|_| {
            let printed = run(&format!("{line}{REPEAT}"));
            let printed: Value = serde_json::from_str(&printed).unwrap_or_default();
            printed["duration"].as_u64().ok_or_else(|| format!("bpftool says {printed}"))
        })
        .collect::<Result<_, _>>()?;
    runs.sort_unstable();
    Ok(runs[runs.len() / 2])
}

/// What the filter takes for a packet that opens a connection, by the kernel's own clock.
fn opening(host: &Host, tap: &str) -> Result<f64, String> {
    let _measuring =
        measure_programs().map_err(|error| format!("the kernel measures no programs: {error}"))?;
    acquaint(1);
    let (mac, address) = (Mac(THERE.mac()), THERE.v4());
    batch(
        "g1",
        &[
            format!("address add {}/8 dev eth0", HERE.v4()),
            format!("neighbour replace {address} lladdr {mac} dev eth0"),
        ],
    );
    let id = program(host, &format!("filter_tap_{tap}_filter_from_guest"))?;
    let spent = || {
        let shown = run(&format!("bpftool -j prog show id {id}"));
        let shown: Value = serde_json::from_str(&shown).unwrap_or_default();
        (shown["run_time_ns"].as_f64().unwrap_or(0.0), shown["run_cnt"].as_f64().unwrap_or(0.0))
    };
    let before = spent();
    std::thread::scope(|scope| {
        let sending = scope.spawn(|| {
            join("g1", || {
                let socket = UdpSocket::bind((HERE.v4(), 7000)).map_err(|error| error.to_string())?;
                for port in 0..NEW {
                    socket.send_to(&[0; 18], (address, 10_000 + port)).map_err(|error| error.to_string())?;
                }
                Ok::<_, String>(())
            })
        });
        sending.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })?;
    let after = spent();
    let runs = after.1 - before.1;
    if runs < f64::from(NEW) {
        return Err(format!("the filter has seen {runs} packets of {NEW}: {}", json!(shown_drops(host))));
    }
    Ok((after.0 - before.0) / runs)
}

fn shown_drops(host: &Host) -> String {
    run(&format!("ip -n {} -s link", host.name))
}
