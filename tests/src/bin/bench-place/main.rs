//! Placement, measured as the coordinator does it: on a fleet's records, with its own choice of host, its own change of
//! the records, and its own store. `cargo xtask bench place` runs it beside its peer.
//!
//!     bench-place fleet HOSTS CELLS FILL_PERCENT PLACEMENTS          placements in memory
//!     bench-place durable HOSTS CELLS FILL_PERCENT PLACEMENTS DIR    each on disk before it counts
//!     bench-place dump HOSTS CELLS FILL_PERCENT > CASES              hosts and guests, for both sides
//!     bench-place fit < CASES                                        every guest on every host
//!     bench-place worst                                              16 host cells, 8 guest cells
//!
//! Each prints one JSON object, after it has checked what it measured.

#[path = "../oracle/cases.rs"]
#[allow(dead_code)] // shared with the oracle, which needs all of it
mod cases;
mod check;
mod fit;
mod fleet;

use std::process::ExitCode;

const USAGE: &str =
    "usage: bench-place fleet|durable|dump HOSTS CELLS FILL_PERCENT [PLACEMENTS [DIR]] | fit | worst";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let number = |text: &str| text.parse::<u64>().map_err(|_| format!("{text} is no number; {USAGE}"));
    let size = |hosts: &str, cells: &str, fill: &str| -> Result<fleet::Size, String> {
        Ok(fleet::Size { hosts: number(hosts)?, cells: number(cells)? as u32, fill_percent: number(fill)? })
    };
    let measured = match words[..] {
        ["fleet", hosts, cells, fill, placements] => {
            size(hosts, cells, fill).and_then(|size| fleet::in_memory(size, number(placements)?))
        }
        ["durable", hosts, cells, fill, placements, folder] => size(hosts, cells, fill)
            .and_then(|size| fleet::durable(size, number(placements)?, std::path::Path::new(folder))),
        ["dump", hosts, cells, fill] => size(hosts, cells, fill).and_then(fleet::dump),
        ["fit"] => fit::every_pair(),
        ["worst"] => fit::worst(),
        _ => Err(USAGE.to_owned()),
    };
    match measured {
        Ok(answer) => {
            println!("{answer}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("bench-place: {error}");
            ExitCode::from(2)
        }
    }
}
