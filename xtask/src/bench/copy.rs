//! Copying disk images: `godwit-agent copy` against cp, dd, qemu-img, nbdcopy and rsync, with fio as the disk's limit.
//!
//! The time goes to the moment at which the copy is on the disk; each copy is compared with its source before its time
//! counts. In each round every tool has one turn, and the rounds begin with another one each time.

mod share;
mod stage;
mod tools;

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use super::record::{Record, cost};
use super::report::Report;
use super::{BenchError, Effort, children_cpu_s};
use crate::command;
use stage::{Place, Stage};
use tools::{Task, Tool};

const WALL: super::record::Metric = cost("wall_s");
const CPU: super::record::Metric = cost("cpu_s");

/// Data and holes take turns in steps of this size.
const EXTENT_BYTES: usize = 4 << 20;

/// A copy's cost.
#[derive(Clone, Copy)]
struct Cost {
    wall_s: f64,
    cpu_s: f64,
}

/// What is measured: a task at a place, from the disk or from the page cache.
struct Case<'a> {
    name: String,
    task: Task,
    folder: &'a Path,
    cold: bool,
    source: PathBuf,
    disk_bytes: u64,
    data_bytes: u64,
}

/// At the places that `at` names; without any on this machine's file systems, and on NFS in VMs.
pub(super) fn measure(
    programs: &Path,
    effort: Effort<'_>,
    at: &[(String, PathBuf)],
    disk_mib: Option<u64>,
    report: &mut Report,
) -> Result<(), BenchError> {
    let disk_bytes = disk_mib.unwrap_or(if effort.quick { 512 } else { 2048 }) << 20;
    let stage = Stage::set(at, disk_bytes * 5)?;
    for place in &stage.places {
        match &place.folder {
            Ok(folder) => measure_place(programs, effort, place, folder, disk_bytes, report)?,
            Err(why) => report.add(skipped(effort, place, why))?,
        }
    }
    drop(stage);
    match at {
        [] => share::measure(programs, effort, disk_mib, report),
        _ => Ok(()),
    }
}

/// What is told of a place that is not there.
fn skipped(effort: Effort<'_>, place: &Place, why: &str) -> Vec<Record> {
    let case = format!("{}-sparse", place.name);
    let wanted = is_wanted(effort, place).then_some([WALL, CPU]);
    wanted.into_iter().flatten().map(|metric| Record::skipped("copy", &case, metric, "all", why)).collect()
}

/// Whether any case of a place is asked for.
fn is_wanted(effort: Effort<'_>, place: &Place) -> bool {
    Task::ALL.iter().any(|&task| plan(place, task).any(|planned| effort.wants(&planned.name)))
}

fn measure_place(
    programs: &Path,
    effort: Effort<'_>,
    place: &Place,
    folder: &Path,
    disk_bytes: u64,
    report: &mut Report,
) -> Result<(), BenchError> {
    for task in Task::ALL {
        let planned: Vec<Planned> = plan(place, task).filter(|planned| effort.wants(&planned.name)).collect();
        if planned.is_empty() {
            continue;
        }
        let source = folder.join("source");
        let data_bytes = write_source(&source, task, disk_bytes)?;
        for Planned { name, cold, extra } in planned {
            let case = Case { name, task, folder, cold, source: source.clone(), disk_bytes, data_bytes };
            let mut peers = tools::peers(task, place.is_memory());
            if !extra.is_empty() {
                peers.truncate(2);
            }
            report.add(case.measure(effort, &tools::ours(programs, task, extra), &peers)?)?;
        }
        fs::remove_file(&source).map_err(BenchError::io("cannot remove the source"))?;
    }
    Ok(())
}

/// A case before it has its source.
struct Planned {
    name: String,
    cold: bool,
    /// An option of ours.
    extra: &'static str,
}

/// The cases of a task. Memory is never cold; what digests and verifying cost is seen on one case of a disk.
fn plan(place: &Place, task: Task) -> impl Iterator<Item = Planned> {
    let temperatures: &[(&str, bool)] =
        if place.is_memory() { &[("", false)] } else { &[("cold-", true), ("warm-", false)] };
    temperatures.iter().enumerate().flat_map(move |(index, &(temperature, cold))| {
        let extras: &[&'static str] = if task == Task::Sparse && index == 0 && !place.is_share() {
            &["", "--digests", "--verify"]
        } else {
            &[""]
        };
        extras.iter().map(move |&extra| {
            // "--verify" gives "…-sparse-verify".
            let name = format!("{}-{temperature}{}{}", place.name, task.name(), extra.replace("--", "-"));
            Planned { name, cold, extra }
        })
    })
}

impl Case<'_> {
    fn measure(&self, effort: Effort<'_>, ours: &Tool, peers: &[Tool]) -> Result<Vec<Record>, BenchError> {
        println!("bench: copy {}", self.name);
        // The first run of each warms up whatever there is to warm up, and shows whether it runs at all.
        self.copy(ours)?;
        let mut records = Vec::new();
        let mut runs: Vec<(&Tool, Vec<Cost>)> = vec![(ours, Vec::new())];
        for peer in peers {
            match self.copy(peer) {
                Ok(_) => runs.push((peer, Vec::new())),
                Err(error) => {
                    let why = error.to_string();
                    let skip = |metric| Record::skipped("copy", &self.name, metric, &peer.name, &why);
                    records.extend([WALL, CPU].map(skip));
                }
            }
        }
        for round in 0..effort.pairs() {
            let count = runs.len();
            // Whoever goes second may profit from the first, so they take turns at that too.
            for turn in 0..count {
                let (tool, costs) = &mut runs[(turn + round) % count];
                costs.push(self.copy(tool)?);
            }
        }
        let (_, mine) = &runs[0];
        for (peer, theirs) in &runs[1..] {
            let pairs = |value: fn(&Cost) -> f64| -> Vec<(f64, f64)> {
                mine.iter().zip(theirs).map(|(mine, theirs)| (value(mine), value(theirs))).collect()
            };
            records.push(Record::measured("copy", &self.name, WALL, &peer.name, &pairs(|cost| cost.wall_s)));
            records.push(Record::measured("copy", &self.name, CPU, &peer.name, &pairs(|cost| cost.cpu_s)));
        }
        Ok(records)
    }

    /// One copy: prepared, timed to the end of its fsync, compared, removed.
    fn copy(&self, tool: &Tool) -> Result<Cost, BenchError> {
        let target = self.folder.join("copy");
        command::run(&mut Command::new("sync"))?;
        if self.cold {
            fs::write("/proc/sys/vm/drop_caches", "1")
                .map_err(BenchError::io("cannot drop the page cache"))?;
        } else {
            read_through(&self.source)?;
        }
        let before = children_cpu_s()?;
        let started = Instant::now();
        let mut line = Command::new("sh");
        line.args(["-c", &tool.line, "copy"]).arg(&self.source).arg(&target);
        line.arg(self.data_bytes.to_string())
            .arg(self.folder.join("probes"))
            .arg(self.disk_bytes.to_string());
        let ran = command::run(line.stdin(Stdio::null()).stdout(Stdio::null()));
        let wall_s = started.elapsed().as_secs_f64();
        let cpu_s = children_cpu_s()? - before;
        let same = tool.is_limit || (ran.is_ok() && self.is_same(&target));
        for left in ["copy", "copy.blake3", "copy.partial", "copy.partial.journal"] {
            match fs::remove_file(self.folder.join(left)) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(BenchError::io("cannot remove a copy")(error));
                }
                _ => {}
            }
        }
        ran?;
        if same {
            Ok(Cost { wall_s, cpu_s })
        } else {
            Err(BenchError::Wrong { case: self.name.clone(), tool: tool.name.clone() })
        }
    }

    fn is_same(&self, target: &Path) -> bool {
        let (from, to) = self.task.formats();
        if from == to {
            return command::succeeds(Command::new("cmp").arg(&self.source).arg(target));
        }
        let mut compare = Command::new("qemu-img");
        compare.args(["compare", "-q", "-f", from, "-F", to]).arg(&self.source).arg(target);
        command::succeeds(&mut compare)
    }
}

/// Brings a file into the page cache.
fn read_through(path: &Path) -> Result<(), BenchError> {
    let failed = BenchError::io(format!("cannot read {}", path.display()));
    let read = File::open(path).and_then(|mut file| std::io::copy(&mut file, &mut std::io::sink()));
    read.map(drop).map_err(failed)
}

/// Random data, with holes in turns but for a full disk; how many bytes of data it has.
fn write_source(path: &Path, task: Task, bytes: u64) -> Result<u64, BenchError> {
    let raw = path.with_extension("raw");
    let failed = || BenchError::io(format!("cannot write {}", path.display()));
    let mut random = File::open("/dev/urandom").map_err(failed())?;
    let mut file = File::create(&raw).map_err(failed())?;
    file.set_len(bytes).map_err(failed())?;
    let mut data = vec![0; EXTENT_BYTES];
    let step = if task == Task::Full { EXTENT_BYTES } else { 2 * EXTENT_BYTES };
    let mut data_bytes = 0;
    for offset in (0..bytes).step_by(step) {
        random.read_exact(&mut data).map_err(failed())?;
        file.write_all_at(&data, offset).map_err(failed())?;
        data_bytes += data.len() as u64;
    }
    file.flush().and_then(|()| file.sync_all()).map_err(failed())?;
    if task == Task::FromQcow2 {
        command::run(
            Command::new("qemu-img").args(["convert", "-f", "raw", "-O", "qcow2"]).arg(&raw).arg(path),
        )?;
        fs::remove_file(&raw).map_err(failed())?;
    } else {
        fs::rename(&raw, path).map_err(failed())?;
    }
    Ok(data_bytes)
}
