//! Copying a raw disk image of which half is data: the agent's copy worker against cp and qemu-img.
//!
//! The time goes to the moment at which the copy is on the disk; each copy is compared with its source.

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::statfs::{FsType, statfs};
use nix::sys::time::TimeValLike as _;

use super::record::{Record, cost};
use super::{BenchError, Effort};
use crate::command;

const WALL: super::record::Metric = cost("wall_s");
const CPU: super::record::Metric = cost("cpu_s");

/// Data and holes take turns in steps of this size.
const EXTENT_BYTES: usize = 4 << 20;

/// A tool that copies $1 to $2, as a line of sh.
struct Tool {
    name: &'static str,
    line: &'static str,
}

const PEERS: [Tool; 3] = [
    Tool { name: "cp", line: "cp --reflink=auto \"$1\" \"$2\"" },
    Tool { name: "qemu-img", line: "qemu-img convert -f raw -O raw \"$1\" \"$2\"" },
    Tool {
        name: "qemu-img -m16 -W none",
        line: "qemu-img convert -m 16 -W -t none -T none -f raw -O raw \"$1\" \"$2\"",
    },
];

/// A copy's cost.
#[derive(Clone, Copy)]
struct Cost {
    wall_s: f64,
    cpu_s: f64,
}

/// A folder that is removed when dropped.
struct Scratch(PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

pub(super) fn measure(programs: &Path, effort: Effort) -> Result<Vec<Record>, BenchError> {
    let mut records = Vec::new();
    for (folder, cold) in
        [(command::target_folder(), true), (command::target_folder(), false), ("/dev/shm".into(), false)]
    {
        let folder = Scratch(folder.join(format!("godwit-bench-copy-{}", std::process::id())));
        fs::create_dir_all(&folder.0)
            .map_err(BenchError::io(format!("cannot create {}", folder.0.display())))?;
        let kind = file_system(&folder.0)?;
        let case = match (kind, cold) {
            ("tmpfs", _) => "tmpfs-sparse".to_owned(),
            (kind, true) => format!("{kind}-cold-sparse"),
            (kind, false) => format!("{kind}-warm-sparse"),
        };
        records.extend(measure_case(programs, effort, &case, &folder.0, cold)?);
    }
    Ok(records)
}

fn measure_case(
    programs: &Path,
    effort: Effort,
    case: &str,
    folder: &Path,
    cold: bool,
) -> Result<Vec<Record>, BenchError> {
    let bytes = if effort.quick { 512 << 20 } else { 2 << 30 };
    let source = folder.join("source");
    write_source(&source, bytes)?;
    let ours = format!("\"{}\" worker copy \"$1\" \"$2\"", programs.join("godwit-agent").display());
    let run = |name: &str, line: &str| copy(case, name, line, &source, &folder.join("copy"), cold);
    run("godwit", &ours)?;
    let mut records = Vec::new();
    for peer in PEERS {
        println!("bench: copy {case} against {}", peer.name);
        // The first run of each warms up whatever there is to warm up.
        if let Err(error) = run(peer.name, peer.line) {
            let why = error.to_string();
            records.extend([WALL, CPU].map(|metric| Record::skipped("copy", case, metric, peer.name, &why)));
            continue;
        }
        let mut pairs = Vec::new();
        for number in 0..effort.pairs() {
            // Whoever goes second may profit from the first, so they take turns at that too.
            pairs.push(if number % 2 == 0 {
                let first = run("godwit", &ours)?;
                (first, run(peer.name, peer.line)?)
            } else {
                let first = run(peer.name, peer.line)?;
                (run("godwit", &ours)?, first)
            });
        }
        let wall: Vec<_> = pairs.iter().map(|(ours, theirs)| (ours.wall_s, theirs.wall_s)).collect();
        let cpu: Vec<_> = pairs.iter().map(|(ours, theirs)| (ours.cpu_s, theirs.cpu_s)).collect();
        records.push(Record::measured("copy", case, WALL, peer.name, &wall));
        records.push(Record::measured("copy", case, CPU, peer.name, &cpu));
    }
    Ok(records)
}

/// One copy: prepared, timed to the end of its fsync, compared, removed.
fn copy(
    case: &str,
    name: &str,
    line: &str,
    source: &Path,
    target: &Path,
    cold: bool,
) -> Result<Cost, BenchError> {
    command::run(&mut Command::new("sync"))?;
    if cold {
        fs::write("/proc/sys/vm/drop_caches", "1").map_err(BenchError::io("cannot drop the page cache"))?;
    }
    let script = format!("{line} && exec sync \"$2\"");
    let before = children_cpu_s()?;
    let started = Instant::now();
    command::run(
        Command::new("sh").args(["-c", &script, "copy"]).arg(source).arg(target).stdout(Stdio::null()),
    )?;
    let wall_s = started.elapsed().as_secs_f64();
    let cpu_s = children_cpu_s()? - before;
    let same = command::succeeds(Command::new("cmp").arg(source).arg(target));
    fs::remove_file(target).map_err(BenchError::io(format!("cannot remove {}", target.display())))?;
    if same {
        Ok(Cost { wall_s, cpu_s })
    } else {
        Err(BenchError::Wrong { case: case.to_owned(), tool: name.to_owned() })
    }
}

/// User and system time of all children that have ended.
fn children_cpu_s() -> Result<f64, BenchError> {
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN)
        .map_err(|error| BenchError::io("cannot read the children's CPU time")(error.into()))?;
    Ok((usage.user_time().num_microseconds() + usage.system_time().num_microseconds()) as f64 / 1e6)
}

/// Random data and holes in turns.
fn write_source(path: &Path, bytes: u64) -> Result<(), BenchError> {
    let failed = || BenchError::io(format!("cannot write {}", path.display()));
    let mut random = File::open("/dev/urandom").map_err(failed())?;
    let mut file = File::create(path).map_err(failed())?;
    file.set_len(bytes).map_err(failed())?;
    let mut data = vec![0; EXTENT_BYTES];
    for offset in (0..bytes).step_by(2 * EXTENT_BYTES) {
        random.read_exact(&mut data).map_err(failed())?;
        file.write_all_at(&data, offset).map_err(failed())?;
    }
    file.flush().and_then(|()| file.sync_all()).map_err(failed())
}

fn file_system(folder: &Path) -> Result<&'static str, BenchError> {
    /// As statfs(2) numbers them.
    const NAMES: [(i64, &str); 4] =
        [(0xef53, "ext4"), (0x5846_5342, "xfs"), (0x9123_683e, "btrfs"), (0x0102_1994, "tmpfs")];
    let found = statfs(folder).map_err(|error| {
        BenchError::io(format!("cannot tell the file system of {}", folder.display()))(error.into())
    })?;
    let FsType(number) = found.filesystem_type();
    Ok(NAMES.iter().find(|(known, _)| *known == number).map_or("other", |(_, name)| name))
}
