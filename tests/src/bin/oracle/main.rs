//! Answers placement and topology vectors with the product's own code, so that it can be compared with other
//! systems that the field trusts.
//!
//!     oracle placement < cases.json > results.json
//!     oracle topology --sysfs-root DIR > result.json
//!
//! Cases that are refused are answers too: the exit status is 0 unless the input cannot be read at all.

mod cases;
mod placement;
mod topology;

use std::io::{Read, Write};
use std::path::Path;
use std::process::ExitCode;

const USAGE: &str = "usage: oracle placement < cases.json | oracle topology --sysfs-root DIR";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let answer = match arguments[..] {
        ["placement"] => placement_answers(),
        ["topology", "--sysfs-root", root] => topology::answer(Path::new(root)),
        _ => Err(USAGE.to_owned()),
    };
    let written = answer.and_then(|answer| {
        writeln!(std::io::stdout(), "{answer}").map_err(|error| format!("cannot write the answer: {error}"))
    });
    match written {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("oracle: {error}");
            ExitCode::from(2)
        }
    }
}

fn placement_answers() -> Result<serde_json::Value, String> {
    let mut text = String::new();
    std::io::stdin().read_to_string(&mut text).map_err(|error| format!("cannot read the cases: {error}"))?;
    let input: serde_json::Value =
        serde_json::from_str(&text).map_err(|error| format!("the cases are not JSON: {error}"))?;
    let cases = input.get("cases").unwrap_or(&input).as_array().ok_or("`cases` is not a list")?;
    Ok(serde_json::json!({ "results": cases.iter().map(placement::answer).collect::<Vec<_>>() }))
}

#[cfg(test)]
mod tests;
