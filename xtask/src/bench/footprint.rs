//! What the idle daemons cost: memory, CPU, time to start, size on disk. The peer is libvirtd, which runs on the
//! same host for the same guests.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use godwit_tests::lab::{Host, Lab, LabOptions};

use super::record::{Metric, Record, cost};
use super::{BenchError, Effort};

const PEER: &str = "libvirtd";
/// The agent's metrics and the coordinator's API; a daemon that answers there is up.
const AGENT_PORT: u16 = 9177;
const COORDINATOR_PORT: u16 = 8774;
const SIGTERM: i32 = 15;

/// What one start of a daemon was like.
#[derive(Clone, Copy)]
struct Footprint {
    rss_mb: f64,
    cpu_percent: f64,
    start_ms: f64,
}

pub(super) fn measure(programs: &Path, effort: Effort<'_>) -> Result<Vec<Record>, BenchError> {
    println!("bench: footprint, {} starts of each daemon", effort.pairs());
    // Another lab may be at its end.
    let patience = Duration::from_secs(60);
    let lab = Lab::start(LabOptions {
        hosts: 1,
        programs: programs.to_path_buf(),
        patience,
        ..LabOptions::default()
    })?;
    lab.join_all()?;
    let host = lab.host(1);
    let coordinator = lab.coordinator();

    let mut agent = Vec::new();
    let mut center = Vec::new();
    for _ in 0..effort.pairs() {
        let started = Instant::now();
        host.kill_agent(SIGTERM)?;
        let killed = started.elapsed();
        host.start_agent()?;
        host.wait("the agent's metrics", || host.listens(AGENT_PORT))?;
        let ours = observe(host, "godwit-agent", started.elapsed() - killed, effort)?;

        host.hold_libvirtd_down()?;
        let started = Instant::now();
        host.release_libvirtd()?;
        let theirs = observe(host, PEER, started.elapsed(), effort)?;
        agent.push((ours, theirs));

        coordinator.kill(SIGTERM)?;
        let started = Instant::now();
        coordinator.start()?;
        coordinator.host().wait("the coordinator's API", || coordinator.host().listens(COORDINATOR_PORT))?;
        center.push((observe(coordinator.host(), "godwit-coordinator", started.elapsed(), effort)?, theirs));
    }

    let mut records = Vec::new();
    for (case, program, pairs) in
        [("agent-idle", "godwit-agent", &agent), ("coordinator-idle", "godwit-coordinator", &center)]
    {
        let mut record = |metric: Metric, value: fn(&Footprint) -> f64| {
            let pairs: Vec<_> = pairs.iter().map(|(ours, theirs)| (value(ours), value(theirs))).collect();
            records.push(Record::measured("footprint", case, metric, PEER, &pairs));
        };
        record(cost("rss_mb"), |footprint| footprint.rss_mb);
        record(cost("cpu_percent"), |footprint| footprint.cpu_percent);
        record(cost("start_ms"), |footprint| footprint.start_ms);
        let sizes = (megabytes(&[programs.join(program)])?, megabytes(&libvirtd_files())?);
        records.push(Record::measured(
            "footprint",
            case,
            cost("binary_mb"),
            "libvirtd and drivers",
            &[sizes],
        ));
    }
    Ok(records)
}

/// Lets a daemon settle, then watches it.
fn observe(host: &Host, daemon: &str, start: Duration, effort: Effort<'_>) -> Result<Footprint, BenchError> {
    let (settle, window) = if effort.quick { (2, 5) } else { (5, 20) };
    std::thread::sleep(Duration::from_secs(settle));
    let folder = host.proc_folder(daemon)?.ok_or_else(|| BenchError::NotRunning {
        daemon: daemon.to_owned(),
        log: host.log_tail(daemon, 20),
    })?;
    let before = cpu_s(&folder)?;
    let started = Instant::now();
    std::thread::sleep(Duration::from_secs(window));
    let cpu_percent = (cpu_s(&folder)? - before) / started.elapsed().as_secs_f64() * 100.0;
    Ok(Footprint { rss_mb: rss_mb(&folder)?, cpu_percent, start_ms: start.as_secs_f64() * 1e3 })
}

fn read(path: &Path) -> Result<String, BenchError> {
    fs::read_to_string(path).map_err(BenchError::io(format!("cannot read {}", path.display())))
}

/// VmRSS of proc_pid_status(5), in units of 1000 kB as `ps` users expect.
fn rss_mb(folder: &Path) -> Result<f64, BenchError> {
    let status = read(&folder.join("status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<f64>().ok()).unwrap_or(0.0);
    Ok(kib * 1024.0 / 1e6)
}

/// Time on a CPU of all threads, in seconds (Documentation/scheduler/sched-stats.rst, /proc/<pid>/schedstat): an
/// idle daemon's is far below a tick, in which proc(5) counts.
fn cpu_s(folder: &Path) -> Result<f64, BenchError> {
    let tasks = folder.join("task");
    let listed = fs::read_dir(&tasks).map_err(BenchError::io(format!("cannot list {}", tasks.display())))?;
    let mut nanoseconds = 0.0;
    for task in listed.flatten() {
        // A thread may end between the two.
        let Ok(line) = fs::read_to_string(task.path().join("schedstat")) else { continue };
        nanoseconds +=
            line.split_whitespace().next().and_then(|field| field.parse::<f64>().ok()).unwrap_or(0.0);
    }
    Ok(nanoseconds / 1e9)
}

fn megabytes(files: &[PathBuf]) -> Result<f64, BenchError> {
    let mut bytes = 0;
    for path in files {
        bytes += fs::metadata(path).map_err(BenchError::io(format!("cannot read {}", path.display())))?.len();
    }
    Ok(bytes as f64 / 1e6)
}

/// libvirtd loads its drivers from a folder of their own.
fn libvirtd_files() -> Vec<PathBuf> {
    let drivers =
        fs::read_dir("/usr/lib/x86_64-linux-gnu/libvirt/connection-driver").into_iter().flatten().flatten();
    drivers.map(|entry| entry.path()).chain(["/usr/sbin/libvirtd".into()]).collect()
}
