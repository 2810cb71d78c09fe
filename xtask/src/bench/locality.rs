//! What it costs the agent to tell where guests are, against the limit of one hundredth of a core at 200 guests.

use std::path::Path;
use std::process::Command;

use serde::Deserialize;

use super::record::{Record, cost};
use super::{BenchError, Effort};
use crate::command;

const GUESTS: u32 = 200;

/// Percent of a core.
const LIMIT: f64 = 1.0;

/// What `locality-cost` prints.
#[derive(Deserialize)]
struct Cost {
    core_percent: f64,
}

pub(super) fn measure(programs: &Path, effort: Effort<'_>) -> Result<Vec<Record>, BenchError> {
    println!("bench: locality, {GUESTS} processes in the place of guests");
    let scrapes = if effort.quick { "4" } else { "20" };
    let mut pairs = Vec::new();
    for _ in 0..effort.pairs() {
        let mut measuring = Command::new(programs.join("locality-cost"));
        let printed = command::capture(measuring.args([&GUESTS.to_string(), scrapes]))?;
        let read = serde_json::from_str(&printed).map_err(std::io::Error::other);
        let Cost { core_percent } = read.map_err(BenchError::io("locality-cost prints no figures"))?;
        pairs.push((core_percent, LIMIT));
    }
    let case = format!("{GUESTS}-guests");
    Ok(vec![Record::measured("locality", &case, cost("cpu_percent"), "limit:1% of a core", &pairs)])
}
