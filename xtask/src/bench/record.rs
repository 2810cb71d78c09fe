//! One comparison: medians of alternating pairs, as a line of a table and of JSON.

use serde_json::{Value, json};

/// What was measured, by whose words, and whether more is better.
#[derive(Debug, Clone, Copy)]
pub(super) struct Metric {
    /// With its unit last: `wall_s`, `rss_mb`.
    pub(super) name: &'static str,
    /// Whether the smaller value is the better one; throughputs are the other way round.
    pub(super) less_is_better: bool,
}

/// A cost: less is better.
pub(super) const fn cost(name: &'static str) -> Metric {
    Metric { name, less_is_better: true }
}

/// Ours against one peer's.
#[derive(Debug)]
pub(super) struct Record {
    bench: &'static str,
    case: String,
    metric: &'static str,
    peer: String,
    outcome: Outcome,
    /// Where it was measured: kernel and number of CPUs.
    env: Value,
}

#[derive(Debug)]
enum Outcome {
    Measured { ours: f64, theirs: f64, ratio: f64, pairs: usize, spread: f64 },
    Skipped(String),
}

impl Record {
    /// From pairs of (ours, theirs), at least one.
    pub(super) fn measured(
        bench: &'static str,
        case: &str,
        metric: Metric,
        peer: &str,
        pairs: &[(f64, f64)],
    ) -> Record {
        let ours = median(pairs.iter().map(|pair| pair.0));
        let theirs = median(pairs.iter().map(|pair| pair.1));
        // Below 1 always means that Godwit is better.
        let better = |(ours, theirs): (f64, f64)| match metric.less_is_better {
            _ if ours == theirs => 1.0,
            true => ours / theirs,
            false => theirs / ours,
        };
        let ratio = better((ours, theirs));
        let ratios = pairs.iter().map(|pair| better(*pair));
        let spread = ratios.map(|one| (one - ratio).abs() / ratio).fold(0.0, f64::max);
        let outcome = Outcome::Measured { ours, theirs, ratio, pairs: pairs.len(), spread };
        Record::new(bench, case, metric.name, peer, outcome)
    }

    /// A case that cannot run here, and why.
    pub(super) fn skipped(bench: &'static str, case: &str, metric: Metric, peer: &str, why: &str) -> Record {
        Record::new(bench, case, metric.name, peer, Outcome::Skipped(why.to_owned()))
    }

    fn new(bench: &'static str, case: &str, metric: &'static str, peer: &str, outcome: Outcome) -> Record {
        let env = json!({
            "kernel": std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim(),
            "cpus": std::thread::available_parallelism().map_or(1, usize::from),
        });
        Record { bench, case: case.to_owned(), metric, peer: peer.to_owned(), outcome, env }
    }

    /// What [`Self::to_json`] said on another machine, about one of `metrics`; none of anything else.
    pub(super) fn from_json(bench: &'static str, metrics: &[Metric], line: &Value) -> Option<Record> {
        let text = |key: &str| line[key].as_str();
        let number = |key: &str| line[key].as_f64();
        let metric = metrics.iter().find(|metric| text("metric") == Some(metric.name))?.name;
        let outcome = match text("skipped") {
            Some(why) => Outcome::Skipped(why.to_owned()),
            None => Outcome::Measured {
                ours: number("ours")?,
                theirs: number("theirs")?,
                ratio: number("ratio")?,
                pairs: usize::try_from(line["pairs"].as_u64()?).ok()?,
                spread: number("spread")?,
            },
        };
        let (case, peer) = (text("case")?.to_owned(), text("peer")?.to_owned());
        let record = Record { bench, case, metric, peer, outcome, env: line["env"].clone() };
        (text("bench") == Some(bench)).then_some(record)
    }

    /// One line, for scripts.
    pub(super) fn to_json(&self) -> Value {
        let mut value = json!({
            "bench": self.bench,
            "case": self.case,
            "metric": self.metric,
            "peer": self.peer,
            "env": self.env,
        });
        match &self.outcome {
            Outcome::Skipped(why) => value["skipped"] = json!(why),
            Outcome::Measured { ours, theirs, ratio, pairs, spread } => {
                for (key, number) in
                    [("ours", ours), ("theirs", theirs), ("ratio", ratio), ("spread", spread)]
                {
                    value[key] = json!(rounded(*number));
                }
                value["pairs"] = json!(pairs);
            }
        }
        value
    }
}

/// Prints records as a table.
pub(super) fn print_table(records: &[Record]) {
    let Some(first) = records.first() else { return };
    println!("\n{}", first.bench);
    println!(
        "  {:<24} {:<16} {:>10}   {:<28} {:>10} {:>6} {:>7}",
        "case", "metric", "godwit", "peer", "theirs", "ratio", "spread"
    );
    for Record { case, metric, peer, outcome, .. } in records {
        match outcome {
            Outcome::Skipped(why) => {
                println!("  {case:<24} {metric:<16} {:>10}   {peer:<28} skipped: {why}", "")
            }
            Outcome::Measured { ours, theirs, ratio, spread, .. } => println!(
                "  {case:<24} {metric:<16} {ours:>10.3}   {peer:<28} {theirs:>10.3} {ratio:>6.2} {:>6.0}%",
                spread * 100.0
            ),
        }
    }
    println!(
        "  a ratio below 1 means that Godwit is better; spread: how far a pair's ratio was off, at most"
    );
}

/// Four significant digits are more than any of these figures carries.
fn rounded(number: f64) -> f64 {
    if number == 0.0 || !number.is_finite() {
        return 0.0;
    }
    let scale = 10f64.powi(3 - number.abs().log10().floor() as i32);
    (number * scale).round() / scale
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => 0.0,
        odd if odd % 2 == 1 => values[odd / 2],
        even => f64::midpoint(values[even / 2 - 1], values[even / 2]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn below_one_is_better_for_costs_and_for_throughputs() {
        let pairs = [(1.0, 2.0), (1.1, 2.0), (9.0, 2.0)];
        let record = Record::measured("copy", "c", cost("wall_s"), "cp", &pairs).to_json();
        assert_eq!(record["ours"], 1.1);
        assert_eq!(record["ratio"], 0.55);
        let more = Metric { name: "throughput_mib_s", less_is_better: false };
        assert_eq!(Record::measured("stream", "c", more, "x", &[(200.0, 100.0)]).to_json()["ratio"], 0.5);
    }

    #[test]
    fn a_line_has_the_keys_that_scripts_rely_on() {
        let keys = |record: &Record| {
            let value = record.to_json();
            let mut keys: Vec<String> = value.as_object().expect("is an object").keys().cloned().collect();
            keys.sort();
            keys
        };
        let measured = Record::measured("copy", "c", cost("wall_s"), "cp", &[(1.0, 2.0)]);
        assert_eq!(
            keys(&measured),
            ["bench", "case", "env", "metric", "ours", "pairs", "peer", "ratio", "spread", "theirs"]
        );
        let skipped = Record::skipped("copy", "c", cost("wall_s"), "cp", "why");
        assert_eq!(keys(&skipped), ["bench", "case", "env", "metric", "peer", "skipped"]);
        assert_eq!(skipped.to_json()["skipped"], "why");
    }

    #[test]
    fn what_another_machine_measured_is_told_as_it_told_it() {
        let wall = cost("wall_s");
        let mut measured = Record::measured("copy", "c", wall, "cp", &[(1.0, 2.0), (3.0, 2.0)]).to_json();
        measured["env"]["kernel"] = json!("another");
        for line in [measured, Record::skipped("copy", "c", wall, "cp", "why").to_json()] {
            let again = Record::from_json("copy", &[wall], &line).expect("is a record");
            assert_eq!(again.to_json(), line);
            assert!(Record::from_json("copy", &[cost("cpu_s")], &line).is_none());
            assert!(Record::from_json("stream", &[wall], &line).is_none());
        }
        assert!(
            Record::from_json("copy", &[wall], &json!({ "bench": "copy", "metric": "wall_s" })).is_none()
        );
    }

    #[test]
    fn the_spread_is_the_worst_pairs_distance() {
        let record =
            Record::measured("copy", "c", cost("wall_s"), "cp", &[(1.0, 1.0), (1.0, 1.0), (1.5, 1.0)]);
        assert_eq!(record.to_json()["spread"], 0.5);
        assert_eq!(rounded(0.0), 0.0);
        assert_eq!(rounded(1234.56), 1235.0);
    }
}
