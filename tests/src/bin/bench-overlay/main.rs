//! The overlay, measured and judged with the agent's own code on real links in namespaces. `cargo xtask bench overlay`
//! runs it beside its peers.
//!
//!     bench-overlay known godwit|flood|suppress|ovs STATIONS arp|nd QUESTIONS   what crosses the underlay
//!     bench-overlay exact ROUNDS SEED                             counters against captures, in random mixes
//!     bench-overlay cost telemetry|security|groups RULES          nanoseconds of each program
//!     bench-overlay traffic telemetry|groups|nothing PAIRS SECONDS  throughput with and without programs
//!     bench-overlay moves NETWORKS ROUNDS                         from a move to the last stale packet
//!     bench-overlay scrape NETWORKS PEERS ROUNDS                  time and size of a scrape
//!
//! Each prints one JSON object. All that it makes is in namespaces of its own, and goes when it ends.

mod cost;
mod exact;
mod frames;
mod known;
mod moves;
mod namespaces;
mod ovs;
mod scrape;
mod site;
mod traffic;
mod wire;

use serde_json::Value;
use std::process::ExitCode;

const USAGE: &str = "usage: bench-overlay known godwit|flood|suppress|ovs STATIONS arp|nd QUESTIONS \
     | exact ROUNDS SEED | cost telemetry|security|groups RULES | traffic telemetry|groups|nothing PAIRS SECONDS \
     | moves NETWORKS ROUNDS | scrape NETWORKS PEERS ROUNDS";

/// Before the arguments of the process that is in its namespaces.
const INSIDE: &str = "--inside";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words.split_first() {
        Some((&INSIDE, words)) => {
            namespaces::settle();
            match measure(words) {
                Ok(answer) => {
                    println!("{answer}");
                    ExitCode::SUCCESS
                }
                Err(error) => fail(&error),
            }
        }
        // A word that nobody knows is told before anything is made.
        Some(_) if is_known(&words) => namespaces::run_inside(INSIDE, &arguments),
        _ => fail(USAGE),
    }
}

fn fail(error: &str) -> ExitCode {
    eprintln!("bench-overlay: {error}");
    ExitCode::from(2)
}

fn is_known(words: &[&str]) -> bool {
    let expected = match words[0] {
        "known" => 5,
        "exact" | "cost" | "moves" => 3,
        "traffic" | "scrape" => 4,
        _ => 0,
    };
    words.len() == expected
}

fn measure(words: &[&str]) -> Result<Value, String> {
    let number = |text: &str| match text.parse::<u32>() {
        Ok(number) if number > 0 => Ok(number),
        _ => Err(format!("{text} is no number from 1 on; {USAGE}")),
    };
    match *words {
        ["known", side, stations, protocol, questions] => {
            known::measure(side, number(stations)?, protocol, number(questions)?)
        }
        ["exact", rounds, seed] => exact::judge(number(rounds)?, seed.parse().map_err(|_| USAGE)?),
        ["cost", case, rules] => cost::measure(case, rules.parse().map_err(|_| USAGE)?),
        ["traffic", case, pairs, seconds] => traffic::measure(case, number(pairs)?, number(seconds)?),
        ["moves", networks, rounds] => moves::measure(number(networks)?, number(rounds)?),
        ["scrape", networks, peers, rounds] => {
            scrape::measure(number(networks)?, number(peers)?, number(rounds)?)
        }
        _ => Err(USAGE.to_owned()),
    }
}
