//! One guest on one host: every pair of a list, and the worst case.

use std::io::Read as _;
use std::time::{Duration, Instant};

use godwit_coordinator::placement::cell::{Cell, PagePool};
use godwit_coordinator::placement::fit::{Order, fit};
use godwit_coordinator::placement::guest::{CpuPolicy, Guest, GuestCell};
use serde_json::{Value, json};

use crate::cases;

/// Repetitions of each pair: all pairs together take as long as the peer's, so that both are disturbed alike by what else
/// the machine does.
const ROUNDS: u32 = 400;

/// Every guest on every host of the cases on stdin: the answers, and what one took.
pub(crate) fn every_pair() -> Result<Value, String> {
    let mut text = String::new();
    std::io::stdin().read_to_string(&mut text).map_err(|error| error.to_string())?;
    let input: Value = serde_json::from_str(&text).map_err(|error| error.to_string())?;
    let list = |key: &str| input[key].as_array().cloned().ok_or(format!("no list of {key}"));
    let bad = |error: cases::BadInput| format!("{} has no usable value", error.0);
    let wrap = |key: &str, value: Value| json!({ key: value });
    let hosts: Vec<Vec<Cell>> = list("hosts")?
        .into_iter()
        .map(|host| cases::host(&wrap("host", host)).map_err(bad))
        .collect::<Result<_, _>>()?;
    let guests: Vec<Guest> = list("guests")?
        .into_iter()
        .map(|guest| cases::guest(&wrap("guest", guest)).map_err(bad))
        .collect::<Result<_, _>>()?;
    let limits = cases::limits(&input).map_err(bad)?;
    let mut answers = Vec::with_capacity(hosts.len() * guests.len());
    let mut times = Vec::with_capacity(answers.capacity());
    for host in &hosts {
        for guest in &guests {
            let started = Instant::now();
            for _ in 1..ROUNDS {
                std::hint::black_box(fit(host, guest, limits.as_ref(), Order::Spread).is_ok());
            }
            answers.push(fit(host, guest, limits.as_ref(), Order::Spread).is_ok());
            times.push(started.elapsed() / ROUNDS);
        }
    }
    let sum: Duration = times.iter().sum();
    times.sort_unstable();
    Ok(json!({
        "fits_per_s": times.len() as f64 / sum.as_secs_f64().max(1e-9),
        "p99_us": times[times.len() * 99 / 100].as_secs_f64() * 1e6,
        "answers": answers,
    }))
}

/// Eight guest cells on sixteen host cells, of which seven fit, and of which eight fit; both answers are known.
pub(crate) fn worst() -> Result<Value, String> {
    let mut host: Vec<Cell> = (0..16).map(cell).collect();
    let guest =
        Guest { cells: (0..8).map(guest_cell).collect(), emulator_policy: None, isolated_emulator_cpus: 1 };
    for cell in &mut host[7..] {
        cell.pinned_cpus = (16 * cell.id + 1..16 * cell.id + 16).collect();
    }
    let refused = times(&host, &guest, false)?;
    host[15].pinned_cpus = Default::default();
    let found = times(&host, &guest, true)?;
    let cells = |host: &[Cell]| cases::host_json(host);
    let (with_room, mut without) = (cells(&host), host.clone());
    without[15].pinned_cpus = (16 * 15 + 1..16 * 16).collect();
    Ok(json!({
        "refused_us": refused, "found_us": found,
        "hosts": [cells(&without), with_room], "guest": cases::guest_json(&guest),
    }))
}

fn times(host: &[Cell], guest: &Guest, expected: bool) -> Result<f64, String> {
    let mut times = Vec::new();
    for round in 0..1_020 {
        let started = Instant::now();
        let answer = fit(host, guest, None, Order::Spread);
        // The first rounds warm the caches up.
        if round >= 20 {
            times.push(started.elapsed());
        }
        let distinct = answer.as_ref().map_or(8, |placed| {
            placed.iter().map(|cell| cell.host).collect::<std::collections::BTreeSet<_>>().len()
        });
        if answer.is_ok() != expected || distinct != 8 {
            return Err(format!("the answer is {answer:?}"));
        }
    }
    times.sort_unstable();
    Ok(times[times.len() * 99 / 100].as_secs_f64() * 1e6)
}

fn cell(id: u32) -> Cell {
    let cpus = 16 * id..16 * id + 16;
    Cell {
        id,
        memory_mib: 65_536,
        dedicated_cpus: cpus.clone().collect(),
        cores: cpus.step_by(2).map(|cpu| [cpu, cpu + 1].into_iter().collect()).collect(),
        page_pools: vec![PagePool { size_kib: 4, total: 65_536 * 256, used: 0, reserved: 0 }],
        ..Cell::default()
    }
}

fn guest_cell(index: u32) -> GuestCell {
    GuestCell {
        shared: Default::default(),
        dedicated: (4 * index..4 * index + 4).collect(),
        memory_mib: 1024,
        page_size: None,
        cpu_policy: Some(CpuPolicy::Dedicated),
        thread_policy: None,
    }
}
