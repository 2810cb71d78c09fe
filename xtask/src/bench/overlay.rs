//! The overlay: what crosses the underlay beside its peers, what our programs add to a packet, how soon a move is
//! everywhere, and what a scrape takes. `bench-overlay` measures each on real links, in namespaces that go with it.

use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::Value;

use super::record::{Metric, Record, cost};
use super::report::Report;
use super::{BenchError, Effort};
use crate::command;

const CROSSING: Metric = cost("known_crossing_packets");
const CROSSING_BYTES: Metric = cost("known_crossing_bytes");
const NANOSECONDS: Metric = cost("ns_per_packet");
const TCP: Metric = Metric { name: "tcp_throughput_mib_s", less_is_better: false };
const SMALL: Metric = Metric { name: "packets_per_s", less_is_better: false };
const VISIBLE: Metric = cost("move_visible_ms");
const TAKE_UP: Metric = cost("take_up_ms");
const SCRAPE: Metric = cost("scrape_ms");
const SCRAPE_SIZE: Metric = cost("scrape_mb");
const EXACT: Metric = Metric { name: "exact_rounds", less_is_better: false };

/// What telemetry and suppression may add to a packet, and what port security and security groups may with them.
const TELEMETRY_NS: f64 = 100.0;
const SECURITY_NS: f64 = 250.0;

const VISIBLE_MS: f64 = 100.0;
const SCRAPE_MS: f64 = 50.0;

/// Who else answers, or does not.
const PEERS: [(&str, &str); 3] = [
    ("flood", "bridge-flood-and-learn"),
    ("suppress", "bridge-neigh-suppress"),
    ("ovs", "openvswitch-responder"),
];

/// A single measurement may take so long, in seconds. The longest is [`Bench::moves`] among 1,000 networks.
const PATIENCE_S: &str = "900";

/// What coreutils' `timeout` ends with when it had to end something.
const TIMED_OUT: i32 = 124;

struct Bench<'a> {
    programs: &'a Path,
    effort: Effort<'a>,
}

pub(super) fn measure(programs: &Path, effort: Effort<'_>, report: &mut Report) -> Result<(), BenchError> {
    let bench = Bench { programs, effort };
    bench.exact(report)?;
    bench.known(report)?;
    bench.cost(report)?;
    bench.traffic(report)?;
    bench.moves(report)?;
    bench.scrape(report)
}

impl Bench<'_> {
    /// What `bench-overlay` prints; or why it cannot run here.
    fn run(&self, words: &[&str]) -> Result<Result<Value, String>, BenchError> {
        // It removes what it made when it is asked to end; in the foreground Ctrl-C reaches it too.
        let mut command = Command::new("timeout");
        command
            .args(["--foreground", "--kill-after=30", PATIENCE_S])
            .arg(self.programs.join("bench-overlay"));
        command.args(words).stderr(Stdio::piped());
        let line = format!("bench-overlay {}", words.join(" "));
        let output = command.output().map_err(BenchError::io(format!("cannot start {line}")))?;
        let said = String::from_utf8_lossy(&output.stderr);
        if output.status.code() == Some(TIMED_OUT) {
            return Err(BenchError::TooLong { line, seconds: PATIENCE_S });
        }
        if !output.status.success() {
            if let Some((_, why)) = said.split_once("skip: ") {
                return Ok(Err(why.trim().to_owned()));
            }
            eprint!("{said}");
            return Err(command::CommandError::Failed { line, status: output.status }.into());
        }
        let read = serde_json::from_slice(&output.stdout).map_err(std::io::Error::other);
        Ok(Ok(read.map_err(BenchError::io(format!("{line} prints no figures")))?))
    }

    /// The same where there is no reason not to.
    fn figures(&self, words: &[&str]) -> Result<Value, BenchError> {
        let tool = || words.join(" ");
        self.run(words)?.map_err(|why| BenchError::Wrong { case: why, tool: tool() })
    }

    /// Counters are captures, in random mixes of packets.
    fn exact(&self, report: &mut Report) -> Result<(), BenchError> {
        if !self.effort.wants("counters") {
            return Ok(());
        }
        let rounds = if self.effort.quick { 20 } else { 100 };
        let seed = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        let seed = seed.map_or(1, |since| since.as_secs()).to_string();
        println!("bench: overlay, {rounds} random mixes of packets, seed {seed}");
        let found = self.figures(&["exact", &rounds.to_string(), &seed])?;
        let pair = (number(&found["exact"]), f64::from(rounds));
        report.add(vec![Record::measured("overlay", "counters", EXACT, "limit:rounds", &[pair])])
    }

    fn known(&self, report: &mut Report) -> Result<(), BenchError> {
        let sample = if self.effort.quick { "10000" } else { "30000" };
        let mut cases = vec![("500", "arp", sample), ("5000", "arp", sample), ("500", "nd", sample)];
        if !self.effort.quick {
            cases.push(("500", "arp", "249500"));
        }
        for (stations, protocol, questions) in cases {
            let is_whole = questions == "249500";
            let name = format!("{stations}-known-{protocol}{}", if is_whole { "-all-to-all" } else { "" });
            if !self.effort.wants(&name) {
                continue;
            }
            println!("bench: overlay {name}, {questions} questions");
            // The counts are the same every time.
            let pairs = if is_whole || self.effort.quick { 1 } else { 3 };
            let words = |side| ["known", side, stations, protocol, questions];
            let mut ours = Vec::new();
            let mut theirs: [Result<Vec<Value>, String>; 3] = [const { Ok(Vec::new()) }; 3];
            for _ in 0..pairs {
                ours.push(self.figures(&words("godwit"))?);
                for ((side, _), found) in PEERS.iter().zip(&mut theirs) {
                    let Ok(values) = found else { continue };
                    match self.run(&words(side))? {
                        Ok(value) => values.push(value),
                        Err(why) => *found = Err(why),
                    }
                }
            }
            let mut records = Vec::new();
            for ((_, peer), found) in PEERS.iter().zip(theirs) {
                for (metric, key) in [(CROSSING, "packets"), (CROSSING_BYTES, "bytes")] {
                    records.push(match &found {
                        Err(why) => Record::skipped("overlay", &name, metric, peer, why),
                        Ok(values) => {
                            let pairs = ours.iter().zip(values);
                            let pairs: Vec<_> =
                                pairs.map(|(o, t)| (number(&o[key]), number(&t[key]))).collect();
                            Record::measured("overlay", &name, metric, peer, &pairs)
                        }
                    });
                }
            }
            report.add(records)?;
        }
        Ok(())
    }

    /// By way: what a packet meets on its way out of a host, or into it.
    fn cost(&self, report: &mut Report) -> Result<(), BenchError> {
        let cases: [(&str, &str, &str, f64); 5] = [
            ("telemetry", "telemetry", "0", TELEMETRY_NS),
            ("port-security", "security", "0", SECURITY_NS),
            ("groups-0-rules", "groups", "0", SECURITY_NS),
            ("groups-10-rules", "groups", "10", SECURITY_NS),
            ("groups-100-rules", "groups", "100", SECURITY_NS),
        ];
        for (case, words, rules, limit) in cases {
            if !self.effort.wants(case) {
                continue;
            }
            println!("bench: overlay, nanoseconds of each program, {case}");
            let mut records = Vec::new();
            let runs: Vec<Value> = (0..self.effort.pairs())
                .map(|_| self.figures(&["cost", words, rules]))
                .collect::<Result<_, _>>()?;
            let limit_name = format!("limit:{limit} ns");
            let mut record = |way: &str, parts: &[&str]| {
                let sum = |run: &Value| parts.iter().map(|part| number(&run[*part])).sum::<f64>();
                let pairs: Vec<_> = runs.iter().map(|run| (sum(run), limit)).collect();
                let name = format!("{case}-{way}");
                records.push(Record::measured("overlay", &name, NANOSECONDS, &limit_name, &pairs));
            };
            if words == "groups" {
                record("tap-out", &["from_guest", "filter_from_guest"]);
                record("tap-in", &["to_guest", "filter_to_guest"]);
                record("new-connection", &["filter_new"]);
            } else {
                record("tap-out", &["from_guest"]);
                record("tap-in", &["to_guest"]);
                record("underlay-out", &["egress"]);
                record("underlay-in", &["ingress"]);
            }
            report.add(records)?;
        }
        Ok(())
    }

    /// Short turns and many: a machine's speed drifts by more than the programs cost. "nothing" tells how far two pairs
    /// of hosts are apart that are alike.
    fn traffic(&self, report: &mut Report) -> Result<(), BenchError> {
        let pairs = if self.effort.quick { "8" } else { "24" };
        for case in ["nothing", "telemetry", "groups"] {
            if !self.effort.wants(case) {
                continue;
            }
            println!("bench: overlay traffic with {case} and without");
            let found = self.figures(&["traffic", case, pairs, "1"])?;
            for (metric, key) in [(TCP, "tcp_mib_s"), (SMALL, "packets_per_s")] {
                let pairs: Vec<_> =
                    list(&found[key]).iter().map(|pair| (number(&pair[0]), number(&pair[1]))).collect();
                report.add(vec![Record::measured("overlay", case, metric, "no-programs", &pairs)])?;
            }
        }
        Ok(())
    }

    fn moves(&self, report: &mut Report) -> Result<(), BenchError> {
        let sizes: &[&str] = if self.effort.quick { &["10", "100"] } else { &["10", "100", "1000"] };
        for networks in sizes {
            let case = format!("{networks}-networks");
            if !self.effort.wants(&case) {
                continue;
            }
            println!("bench: overlay, a port moves among {networks} networks");
            let found = self.figures(&["moves", networks, if self.effort.quick { "4" } else { "10" }])?;
            let times: Vec<_> =
                list(&found["take_up_ms"]).iter().map(|ms| (number(ms), number(ms))).collect();
            // There is no bar for it: it is beside itself.
            let mut records = vec![Record::measured("overlay", &case, TAKE_UP, "limit:none", &times)];
            for (name, key) in [("", "visible_ms"), ("-while-checking", "visible_busy_ms")] {
                let pairs: Vec<_> = list(&found[key]).iter().map(|ms| (number(ms), VISIBLE_MS)).collect();
                let case = format!("{case}{name}");
                records.push(Record::measured("overlay", &case, VISIBLE, "limit:100 ms", &pairs));
            }
            report.add(records)?;
        }
        Ok(())
    }

    fn scrape(&self, report: &mut Report) -> Result<(), BenchError> {
        let (networks, peers) = if self.effort.quick { ("250", "8") } else { ("1000", "8") };
        let case = format!("{networks}-networks-{peers}-peers");
        if !self.effort.wants(&case) {
            return Ok(());
        }
        println!("bench: overlay, scrapes of {networks} networks with {peers} peers");
        let found = self.figures(&["scrape", networks, peers, &self.effort.pairs().to_string()])?;
        let times: Vec<_> = list(&found["scrape_ms"]).iter().map(|ms| (number(ms), SCRAPE_MS)).collect();
        let size = number(&found["bytes"]) / 1e6;
        report.add(vec![
            Record::measured("overlay", &case, SCRAPE, "limit:50 ms", &times),
            // There is no bar for it: it is beside itself.
            Record::measured("overlay", &case, SCRAPE_SIZE, "limit:none", &[(size, size)]),
        ])
    }
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or(f64::NAN)
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}
