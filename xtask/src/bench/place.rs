//! Placement: fleets of 100 to 10,000 hosts, empty to nearly full, in memory and on disk, against Nova's own fit on
//! the same hosts and guests. Each side's answers are checked before its time counts.
//!
//! Nova looks at every host for each guest; its figure for a fleet is what that takes, with the hosts of the file again
//! and again. What its scheduler does beside that is not counted.

use std::fs;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value;

use super::record::{Metric, Record, cost};
use super::report::Report;
use super::{BenchError, Effort};
use crate::command::{self, CommandError};
use crate::setup::nova;

const PEER: &str = "nova-34";
const PER_SECOND: Metric = Metric { name: "placements_per_s", less_is_better: false };
const P99: Metric = cost("p99_us");
const MEMORY: Metric = cost("rss_mb");

/// What a fleet of 10,000 hosts with 200,000 instances may take.
const MEMORY_LIMIT_MB: f64 = 512.0;

/// The most hosts that the peer has of its own; it sees them again and again.
const PEER_HOSTS: u64 = 50;

/// Its search by permutations is stopped after this.
const WORST_LIMIT_S: u64 = 30;

const SIGALRM: i32 = 14;

/// Hosts, cells of each, percent full.
type Size = (u64, u32, u64);

struct Scratch(PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

struct Bench<'a> {
    programs: &'a Path,
    scratch: Scratch,
}

pub(super) fn measure(programs: &Path, effort: Effort<'_>, report: &mut Report) -> Result<(), BenchError> {
    let folder = command::target_folder().join(format!("tmp/bench-place-{}", std::process::id()));
    fs::create_dir_all(&folder).map_err(BenchError::io(format!("cannot make {}", folder.display())))?;
    let bench = Bench { programs, scratch: Scratch(folder) };
    bench.write("peer.py", include_str!("place/peer.py"))?;
    report.add(bench.worst(effort)?)?;
    let fits: &[Size] = if effort.quick {
        &[(1, 2, 50), (1, 8, 50)]
    } else {
        &[(1, 2, 0), (1, 2, 50), (1, 2, 90), (1, 4, 50), (1, 8, 50)]
    };
    for &size in fits {
        report.add(bench.fit(size, effort)?)?;
    }
    for size in sizes(effort) {
        report.add(bench.fleet(size, effort)?)?;
    }
    Ok(())
}

fn sizes(effort: Effort<'_>) -> Vec<Size> {
    if effort.quick {
        return vec![(100, 2, 0), (1_000, 4, 50), (10_000, 2, 90), (10_000, 8, 90)];
    }
    let fills = [0, 50, 90];
    let of = |hosts: u64| [2, 4, 8].into_iter().flat_map(move |cells| fills.map(|fill| (hosts, cells, fill)));
    [100, 1_000, 10_000].into_iter().flat_map(of).collect()
}

impl Bench<'_> {
    /// One guest on one host, again and again.
    fn fit(&self, (_, cells, fill): Size, effort: Effort<'_>) -> Result<Vec<Record>, BenchError> {
        let case = format!("1-host-{cells}-cells-{fill}-full");
        println!("bench: place {case}");
        let cases = self.dump((PEER_HOSTS, cells, fill))?;
        let (mut per_s, mut p99) = (Vec::new(), Vec::new());
        for _ in 0..effort.pairs() {
            let ours = self.ours(&["fit"], Some(&cases))?;
            let theirs = self.theirs(&["fit", &text(&cases)])?;
            if ours["answers"] != theirs["answers"] {
                return Err(BenchError::Wrong { case, tool: "one of the two".to_owned() });
            }
            per_s.push((number(&ours, "fits_per_s")?, number(&theirs, "per_s")?));
            p99.push((number(&ours, "p99_us")?, number(&theirs, "p99_us")?));
        }
        Ok(vec![
            Record::measured("place", &case, PER_SECOND, PEER, &per_s),
            Record::measured("place", &case, P99, PEER, &p99),
        ])
    }

    fn fleet(&self, size: Size, effort: Effort<'_>) -> Result<Vec<Record>, BenchError> {
        let (hosts, cells, fill) = size;
        let case = format!("{hosts}-hosts-{cells}-cells-{fill}-full");
        println!("bench: place {case}");
        let words = [hosts.to_string(), cells.to_string(), fill.to_string()];
        let placements = if effort.quick { "5000" } else { "20000" };
        let cases = self.dump((hosts.min(PEER_HOSTS), cells, fill))?;
        let mut pairs: [Vec<(f64, f64)>; 5] = Default::default();
        for pair in 0..effort.pairs() {
            let arguments: Vec<&str> = words.iter().map(String::as_str).chain([placements]).collect();
            let ours = self.ours(&[&["fleet"], &arguments[..]].concat(), None)?;
            let folder = self.scratch.0.join(format!("state-{pair}"));
            fs::create_dir_all(&folder)
                .map_err(BenchError::io(format!("cannot make {}", folder.display())))?;
            let durable = self.ours(&[&["durable"], &arguments[..], &[&text(&folder)]].concat(), None);
            let _ = fs::remove_dir_all(&folder);
            let durable = durable?;
            let theirs = self.theirs(&["fleet", &text(&cases), &words[0]])?;
            for (at, (run, metric)) in [
                (&ours, "placements_per_s"),
                (&durable, "placements_per_s"),
                (&ours, "p99_us"),
                (&durable, "p99_us"),
            ]
            .into_iter()
            .enumerate()
            {
                let key = if metric == "p99_us" { "p99_us" } else { "per_s" };
                pairs[at].push((number(run, metric)?, number(&theirs, key)?));
            }
            pairs[4].push((number(&ours, "rss_mb")?, MEMORY_LIMIT_MB));
        }
        let on_disk = format!("{case}-durable");
        Ok(vec![
            Record::measured("place", &case, PER_SECOND, PEER, &pairs[0]),
            Record::measured("place", &on_disk, PER_SECOND, PEER, &pairs[1]),
            Record::measured("place", &case, P99, PEER, &pairs[2]),
            Record::measured("place", &on_disk, P99, PEER, &pairs[3]),
            Record::measured("place", &case, MEMORY, "limit:512 MB", &pairs[4]),
        ])
    }

    /// Eight guest cells on sixteen host cells: the peer tries permutations, and is stopped after a while, so that its
    /// figure is the least that it would have taken.
    fn worst(&self, effort: Effort<'_>) -> Result<Vec<Record>, BenchError> {
        println!("bench: place 16x8");
        let limit = if effort.quick { WORST_LIMIT_S / 3 } else { WORST_LIMIT_S };
        let mut refused = Vec::new();
        let mut found = Vec::new();
        for _ in 0..effort.pairs() {
            let ours = self.ours(&["worst"], None)?;
            for (at, key, pairs) in [(0, "refused_us", &mut refused), (1, "found_us", &mut found)] {
                let case = serde_json::json!({ "host": ours["hosts"][at], "guest": ours["guest"] });
                let file = self.write("worst.json", &case.to_string())?;
                let theirs = self.theirs(&["worst", &text(&file), &limit.to_string()]);
                // An alarm ended it: it had not found out yet.
                let theirs = match theirs {
                    Ok(answer) if answer["answer"] == (at == 1) => number(&answer, "us")?,
                    Ok(_) => {
                        return Err(BenchError::Wrong { case: "16x8".to_owned(), tool: PEER.to_owned() });
                    }
                    Err(BenchError::Command(CommandError::Failed { status, .. }))
                        if status.signal() == Some(SIGALRM) =>
                    {
                        limit as f64 * 1e6
                    }
                    Err(error) => return Err(error),
                };
                pairs.push((number(&ours, key)?, theirs));
            }
        }
        Ok(vec![
            Record::measured("place", "16x8-no-fit", P99, PEER, &refused),
            Record::measured("place", "16x8-fit", P99, PEER, &found),
        ])
    }

    fn dump(&self, (hosts, cells, fill): Size) -> Result<PathBuf, BenchError> {
        let words = [hosts.to_string(), cells.to_string(), fill.to_string()];
        let cases = self.ours(&["dump", &words[0], &words[1], &words[2]], None)?;
        self.write("cases.json", &cases.to_string())
    }

    fn write(&self, name: &str, text: &str) -> Result<PathBuf, BenchError> {
        let path = self.scratch.0.join(name);
        fs::write(&path, text).map_err(BenchError::io(format!("cannot write {}", path.display())))?;
        Ok(path)
    }

    fn ours(&self, arguments: &[&str], input: Option<&Path>) -> Result<Value, BenchError> {
        let mut command = Command::new(self.programs.join("bench-place"));
        command.args(arguments);
        if let Some(path) = input {
            let file =
                fs::File::open(path).map_err(BenchError::io(format!("cannot read {}", path.display())))?;
            command.stdin(Stdio::from(file));
        }
        answer(&mut command)
    }

    fn theirs(&self, arguments: &[&str]) -> Result<Value, BenchError> {
        answer(Command::new(nova::python()).arg(self.scratch.0.join("peer.py")).args(arguments))
    }
}

fn answer(command: &mut Command) -> Result<Value, BenchError> {
    let text = command::capture(command)?;
    serde_json::from_str(&text).map_err(|error| BenchError::Io {
        what: format!("an answer is no JSON: {}", text.trim()),
        source: error.into(),
    })
}

fn number(answer: &Value, key: &str) -> Result<f64, BenchError> {
    answer[key].as_f64().ok_or_else(|| BenchError::Io {
        what: format!("an answer has no number {key}"),
        source: std::io::ErrorKind::InvalidData.into(),
    })
}

fn text(path: &Path) -> String {
    path.display().to_string()
}
