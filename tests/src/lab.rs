//! A lab: several hosts and a coordinator on one machine.
//!
//! Each host `h1`, `h2`, … at 198.18.0.11, … and the coordinator's host `c0` at 198.18.0.1 is a set of namespaces
//! with its own libvirtd and its own agent. The underlay between them is a bridge in a namespace of its own;
//! nothing of the lab shows in the machine's own network, and no packet leaves it. All files lie in one folder
//! under /var/tmp.
//!
//! Nothing is left behind, however the lab ends: every namespace lives on a socket to this process, and its end,
//! be it a return, a panic, Ctrl-C or SIGKILL, ends them; what then remains is the folder, which the underlay's
//! process removes last.

mod cells;
pub mod control;
mod coordinator;
mod error;
mod folder;
mod host;
mod leftovers;
mod lock;
mod namespace;
mod pings;
mod probe;
mod underlay;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Mutex;
use std::time::{Duration, Instant};

pub use coordinator::{Coordinator, URL};
pub use error::LabError;
pub use host::{Host, Running, STATE_FOLDER};
use host::{Site, locked};
use lock::LabLock;
use namespace::line;
pub use pings::{Heard, Pings};
pub use probe::{Probe, ProbePort, tap_name};
use underlay::Underlay;

/// The shared folder of images and instances, as every host sees it.
pub const POOL: &str = "/srv/godwit";

/// How often a condition is looked at that announces itself in no other way.
const POLL: Duration = Duration::from_millis(20);

/// What a lab is to be like.
#[derive(Debug, Clone)]
pub struct LabOptions {
    /// Hosts besides the coordinator's: 1 to 99.
    pub hosts: usize,
    /// NUMA cells that each host shows; the machine's CPUs are dealt out to them.
    pub cells_per_host: usize,
    /// Memory that each cell shows.
    pub cell_memory_mib: u64,
    /// The folder of the built programs; by default that of the running one.
    pub programs: PathBuf,
    /// Lines added to each host's agent.toml.
    pub agent_settings: String,
    /// Lines put before all others of coordinator.toml.
    pub coordinator_settings: String,
    /// How long to wait for the end of another lab on this machine; not at all by default.
    pub patience: Duration,
}

impl Default for LabOptions {
    fn default() -> LabOptions {
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        LabOptions {
            hosts: 3,
            cells_per_host: 2,
            cell_memory_mib: 4096,
            programs: crate::programs_folder(),
            // The cells are made up, so no memory can be bound to them; and every CPU serves both kinds of guests.
            agent_settings: format!(
                "memory_binding = \"none\"\nshared_cpus = \"0-{last}\"\ndedicated_cpus = \"0-{last}\"\n",
                last = cpus - 1
            ),
            coordinator_settings: String::new(),
            patience: Duration::ZERO,
        }
    }
}

/// A running lab. Dropping it ends it.
#[derive(Debug)]
pub struct Lab {
    // Dropped in this order: hosts first, then the underlay, whose end removes the folder, then the lock.
    hosts: Vec<Host>,
    coordinator: Coordinator,
    underlay: Underlay,
    baseline: Mutex<BTreeSet<String>>,
    folder: PathBuf,
    options: LabOptions,
    keeper: PathBuf,
    _lock: LabLock,
}

impl Lab {
    /// Builds a lab: all hosts are on, their libvirtd answer; neither coordinator nor agents are started.
    ///
    /// # Errors
    /// [`LabError::AlreadyRunning`] when this machine carries a lab already; [`LabError::NotBuilt`] when lab-host
    /// has not been built (`cargo build -p godwit-tests --bins`); otherwise what failed.
    pub fn start(options: LabOptions) -> Result<Lab, LabError> {
        if !nix::unistd::geteuid().is_root() {
            return Err(LabError::NotRoot);
        }
        let programs = options.programs.clone();
        if host::covered_folders().any(|covered| programs.starts_with(covered)) {
            return Err(LabError::Hidden { path: programs });
        }
        let keeper = programs.join("lab-host");
        if !keeper.is_file() {
            return Err(LabError::NotBuilt { path: keeper });
        }
        let lock = LabLock::take(options.patience)?;
        let folder = folder::create()?;
        let underlay = Underlay::create(&keeper, &folder)?;
        let site = Site {
            folder: folder.clone(),
            programs: programs.clone(),
            cells: options.cells_per_host.max(1),
            cell_memory_mib: options.cell_memory_mib,
            capabilities: crate::target_folder().join("lab/capabilities"),
        };
        folder::make(&folder.join("srv/godwit"))?;
        let hosts =
            (1..=options.hosts).map(|number| Host::new(&site, number)).collect::<Result<Vec<_>, _>>()?;
        for host in &hosts {
            folder::write(&host.file("lib/godwit/agent.toml"), &options.agent_settings)?;
        }
        let coordinator = Coordinator::new(Host::new(&site, 0)?, programs);
        let mut names = "127.0.0.1 localhost\n".to_owned();
        for host in hosts.iter().chain([coordinator.host()]) {
            names.push_str(&format!("{} {}\n", host.address(), host.name()));
        }
        folder::write(&folder.join("hosts"), &names)?;
        let lab = Lab {
            hosts,
            coordinator,
            underlay,
            baseline: Mutex::default(),
            folder,
            options,
            keeper,
            _lock: lock,
        };
        lab.on_all(|host| host.power_on(&lab.underlay))?;
        Ok(lab)
    }

    /// The hosts, without the coordinator's.
    pub fn hosts(&self) -> &[Host] {
        &self.hosts
    }

    /// Host number `number`, from 1: `host(1)` is h1.
    ///
    /// # Panics
    /// When there is no such host.
    pub fn host(&self, number: usize) -> &Host {
        &self.hosts[number - 1]
    }

    /// The coordinator.
    pub fn coordinator(&self) -> &Coordinator {
        &self.coordinator
    }

    /// The folder of all of the lab's files; `srv/godwit` in it is the pool.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The pool as seen from outside.
    pub fn pool(&self) -> PathBuf {
        self.folder.join("srv/godwit")
    }

    /// Turns a host on again. Its libvirtd is waited for; its agent is the caller's to start.
    pub fn power_on(&self, host: &Host) -> Result<(), LabError> {
        host.power_on(&self.underlay)
    }

    /// Pulls a host's cable out of the underlay.
    pub fn cut_link(&self, host: &Host) -> Result<(), LabError> {
        self.underlay.set_link(host.name(), false)
    }

    /// Puts a host's cable back.
    pub fn heal_link(&self, host: &Host) -> Result<(), LabError> {
        self.underlay.set_link(host.name(), true)
    }

    /// Starts a capture on the underlay: its bridge is called "underlay", the port of host h1 "to-h1".
    pub fn capture(&self, words: &[&str]) -> Result<Running, LabError> {
        let mut command = self.underlay.command(words);
        Running::start(
            command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()),
            &line(words),
        )
    }

    /// Attaches a stand-in for a guest to a network's bridge on a host; it is gone when dropped.
    pub fn probe(&self, host: &Host, port: &ProbePort) -> Result<Probe, LabError> {
        Probe::attach(&self.keeper, host, port)
    }

    /// Makes and starts the coordinator, lets all hosts join, starts their agents, and waits until all are up and
    /// have reported what they have.
    pub fn join_all(&self) -> Result<(), LabError> {
        self.coordinator.init()?;
        self.coordinator.set(&self.options.coordinator_settings)?;
        self.coordinator.start()?;
        self.on_agents(|host| self.join(host))?;
        let deadline = Duration::from_secs(60);
        until("c0", "all hosts being ready", deadline, || {
            Ok(self.coordinator.hosts_ready()?.len() == self.hosts.len())
        })?;
        self.set_baseline()
    }

    /// Lets one host join, and starts its agent.
    pub fn join(&self, host: &Host) -> Result<(), LabError> {
        let token = self.coordinator.join_token()?;
        let agent = self.options.programs.join("godwit-agent");
        if !agent.is_file() {
            return Err(LabError::NotBuilt { path: agent });
        }
        host.exec(&[&*agent.to_string_lossy(), "join", URL, &token, "--dir", STATE_FOLDER])?;
        host.start_agent()
    }

    /// What is there now counts as belonging to the lab: [`Self::leftovers`] no longer names it.
    pub fn set_baseline(&self) -> Result<(), LabError> {
        *locked(&self.baseline) = leftovers::everything(self)?;
        Ok(())
    }

    /// What is there beyond the baseline, as lines such as "h1: domain instance-0a1b2c3d": domains, links, QEMU and
    /// worker processes, pinned BPF objects, files of the pool. Hosts that are off are passed over.
    pub fn leftovers(&self) -> Result<Vec<String>, LabError> {
        let now = leftovers::everything(self)?;
        Ok(now.difference(&locked(&self.baseline)).cloned().collect())
    }

    /// Runs `work` for the coordinator's host and all others at once; the first error counts.
    fn on_all(&self, work: impl Fn(&Host) -> Result<(), LabError> + Sync) -> Result<(), LabError> {
        at_once(self.hosts.iter().chain([self.coordinator.host()]), work)
    }

    fn on_agents(&self, work: impl Fn(&Host) -> Result<(), LabError> + Sync) -> Result<(), LabError> {
        at_once(self.hosts.iter(), work)
    }

    /// The end of each daemon's log, for a person who looks for the cause of a failure.
    pub fn logs(&self) -> String {
        let mut text = String::new();
        for host in self.hosts.iter().chain([self.coordinator.host()]) {
            for daemon in ["godwit-coordinator", "godwit-agent", "libvirtd"] {
                let tail = host.log_tail(daemon, 40);
                if !tail.is_empty() {
                    text.push_str(&format!("--- {} {daemon}\n{tail}\n", host.name()));
                }
            }
        }
        text
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.logs());
        }
        if let Some(host) = self.hosts.first() {
            host.save_capabilities();
        }
        // All at once: each takes the kernel a moment.
        let _ = self.on_all(|host| host.power_off());
    }
}

fn at_once<'a>(
    hosts: impl Iterator<Item = &'a Host>,
    work: impl Fn(&Host) -> Result<(), LabError> + Sync,
) -> Result<(), LabError> {
    let work = &work;
    std::thread::scope(|scope| {
        let threads: Vec<_> = hosts.map(|host| scope.spawn(move || work(host))).collect();
        let results: Vec<_> = threads.into_iter().map(|thread| thread.join()).collect();
        results.into_iter().try_for_each(|result| match result {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        })
    })
}

/// Looks at `condition` until it holds. An error of its own ends the wait.
pub fn until(
    host: &str,
    what: &str,
    patience: Duration,
    mut condition: impl FnMut() -> Result<bool, LabError>,
) -> Result<(), LabError> {
    let deadline = Instant::now() + patience;
    while !condition()? {
        if Instant::now() >= deadline {
            let seconds = patience.as_secs();
            return Err(LabError::Late { host: host.to_owned(), what: what.to_owned(), seconds });
        }
        std::thread::sleep(POLL);
    }
    Ok(())
}

/// A command that a person types to get a shell inside a host.
pub fn shell_command(host: &Host) -> Result<String, LabError> {
    Ok(format!("nsenter --target {} --all", host.init_process()?))
}
