//! One machine of the lab: namespaces, a private set of system folders, and the daemons in it.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::control::{Mount, Reply, Request, Service, Setup};
use super::namespace::{Namespace, line};
use super::underlay::Underlay;
use super::{LabError, cells, folder, until};

/// Where a daemon keeps its files, inside its host.
pub const STATE_FOLDER: &str = "/var/lib/godwit";

/// What every machine of the lab has in common.
#[derive(Debug, Clone)]
pub(super) struct Site {
    /// The lab's folder.
    pub(super) folder: PathBuf,
    /// The folder of the built programs.
    pub(super) programs: PathBuf,
    /// NUMA cells of each host, and the memory of each.
    pub(super) cells: usize,
    pub(super) cell_memory_mib: u64,
    /// libvirt's probing of QEMU, kept from one lab to the next.
    pub(super) capabilities: PathBuf,
}

impl Site {
    pub(super) fn keeper(&self) -> PathBuf {
        self.programs.join("lab-host")
    }
}

/// A machine of the lab. It is a network, mount, PID, UTS and IPC namespace with private /run, /var/lib, /var/log,
/// /var/cache, /etc/libvirt and /sys, and the lab's shared pool at /srv/godwit.
#[derive(Debug)]
pub struct Host {
    name: String,
    address: String,
    uuid: String,
    site: Site,
    /// None while the host is powered off.
    namespace: RwLock<Option<Namespace>>,
    environment: Mutex<BTreeMap<String, String>>,
    has_libvirt: bool,
}

impl Host {
    /// A host that is still off. Number 0 is the coordinator's, which has no libvirt and no cells of its own.
    pub(super) fn new(site: &Site, number: usize) -> Result<Host, LabError> {
        let (name, address) = match number {
            0 => ("c0".to_owned(), "198.18.0.1".to_owned()),
            _ => (format!("h{number}"), format!("198.18.0.{}", 10 + number)),
        };
        let host = Host {
            name,
            address,
            uuid: format!("00000000-0000-4000-8000-{number:012}"),
            site: site.clone(),
            namespace: RwLock::new(None),
            environment: Mutex::default(),
            has_libvirt: number > 0,
        };
        for (private, _) in PRIVATE {
            folder::make(&host.file(private))?;
        }
        folder::make(&host.file("lib/godwit"))?;
        if host.has_libvirt {
            host.write_libvirt()?;
            let cpus = std::thread::available_parallelism().map_or(1, usize::from);
            cells::write_tree(&host.file("node"), site.cells, site.cell_memory_mib, cpus)?;
        }
        Ok(host)
    }

    /// "h1", or "c0" for the coordinator's.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The underlay address.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// A file of this host as seen from outside: `etc`, `lib`, `cache`, `log`, `run` and `node` below it are what
    /// the host shows as /etc/libvirt, /var/lib, /var/cache, /var/log, /run and /sys/devices/system/node.
    pub fn file(&self, path: impl AsRef<Path>) -> PathBuf {
        self.site.folder.join(&self.name).join(path)
    }

    /// The connection to this host's libvirtd that works from outside.
    pub fn libvirt_uri(&self) -> String {
        format!("qemu+unix:///system?socket={}", self.libvirt_socket().display())
    }

    fn libvirt_socket(&self) -> PathBuf {
        self.file("run/libvirt/libvirt-sock")
    }

    /// The host's PID 1 as seen from outside; `/proc/<pid>/root` is the host's file system.
    ///
    /// # Errors
    /// When the host is powered off; so with all below that need it to run.
    pub fn init_process(&self) -> Result<i32, LabError> {
        Ok(self.on()?.process())
    }

    /// Runs a command inside the host to its end, and returns its stdout. Exit codes other than 0 are errors.
    pub fn exec<S: AsRef<OsStr>>(&self, words: &[S]) -> Result<String, LabError> {
        self.on()?.run(words)
    }

    /// Runs a command inside the host to its end, whatever its end.
    pub fn output<S: AsRef<OsStr>>(&self, words: &[S]) -> Result<Output, LabError> {
        self.on()?.output(words)
    }

    /// A command that will run inside the host, for the caller to give it input, output and an environment.
    /// Killing what it spawns kills the command inside.
    pub fn command<S: AsRef<OsStr>>(&self, words: &[S]) -> Result<Command, LabError> {
        Ok(self.on()?.command(words))
    }

    /// Starts a command inside the host, with its stdout and stderr piped to the caller.
    pub fn spawn<S: AsRef<OsStr>>(&self, words: &[S]) -> Result<Running, LabError> {
        let mut command = self.command(words)?;
        Running::start(
            command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()),
            &line(words),
        )
    }

    /// Sets a variable of the environment in which this host's daemon will be started; none removes it.
    pub fn set_environment(&self, key: &str, value: Option<&str>) {
        let mut environment = self.environment.lock().unwrap_or_else(PoisonError::into_inner);
        match value {
            Some(value) => environment.insert(key.to_owned(), value.to_owned()),
            None => environment.remove(key),
        };
    }

    /// Starts the agent. It is not started again when it ends.
    pub fn start_agent(&self) -> Result<(), LabError> {
        self.start_daemon("godwit-agent", &["run", "--dir", STATE_FOLDER])
    }

    /// Sends a signal to the agent; returns when it is gone, if the signal is one to end by.
    pub fn kill_agent(&self, signal: i32) -> Result<(), LabError> {
        self.stop("godwit-agent", signal)
    }

    /// The agent's process as seen from inside the host; none when it does not run.
    pub fn agent_process(&self) -> Result<Option<i32>, LabError> {
        self.process_of("godwit-agent")
    }

    /// Kills libvirtd with SIGKILL. The host's first process starts it again; guests go on.
    pub fn kill_libvirtd(&self) -> Result<(), LabError> {
        let before = self.process_of("libvirtd")?;
        self.ask(&Request::Signal { name: "libvirtd".into(), signal: Signal::SIGKILL as i32 })?;
        self.until("the end of libvirtd", 10, || Ok(self.process_of("libvirtd")? != before))
    }

    /// Ends libvirtd and keeps it down until [`Self::release_libvirtd`].
    pub fn hold_libvirtd_down(&self) -> Result<(), LabError> {
        self.stop("libvirtd", Signal::SIGKILL as i32)
    }

    /// Starts libvirtd again and waits until it answers.
    pub fn release_libvirtd(&self) -> Result<(), LabError> {
        self.start_libvirtd()?;
        self.wait_for_libvirt()
    }

    /// Cuts the power: everything in the host is gone at once, but its disks.
    pub fn power_off(&self) -> Result<(), LabError> {
        let mut namespace = self.namespace.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(mut namespace) = namespace.take() {
            namespace.kill().map_err(LabError::io(format!("cannot power {} off", self.name)))?;
        }
        Ok(())
    }

    /// Boots: /run is empty, libvirtd comes up and is waited for; the agent is the caller's to start.
    pub(super) fn power_on(&self, underlay: &Underlay) -> Result<(), LabError> {
        let mut namespace = self.namespace.write().unwrap_or_else(PoisonError::into_inner);
        if namespace.is_some() {
            return Ok(());
        }
        let run = self.file("run");
        match fs::remove_dir_all(&run) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(LabError::io(format!("cannot empty {}", run.display()))(error));
            }
            _ => {}
        }
        folder::make(&run.join("lock"))?;
        let lock = self.site.folder.join("lock").to_string_lossy().into_owned();
        let new = Namespace::create(
            &self.name,
            &self.site.keeper(),
            "net,mount,uts,ipc,pid",
            &["--lock", &lock],
            &Setup { host_name: Some(self.name.clone()), mounts: self.mounts(), remove_at_end: None },
        )?;
        underlay.plug(&self.name, new.process())?;
        // A machine keeps its hardware address over a boot; others have it in their caches.
        let last: u8 =
            self.address.rsplit('.').next().and_then(|octet| octet.parse().ok()).unwrap_or_default();
        let batch = format!(
            "link set lo up\nlink set eth0 address 02:67:77:00:00:{last:02x} up\naddress add {}/24 dev eth0\n",
            self.address
        );
        let batch_file = self.file("boot.batch");
        folder::write(&batch_file, &batch)?;
        new.run(&["ip", "-batch", &batch_file.to_string_lossy()])?;
        *namespace = Some(new);
        drop(namespace);
        if self.has_libvirt {
            self.start_libvirtd()?;
            self.wait_for_libvirt()?;
        }
        Ok(())
    }

    /// What proc(5) says of a daemon ("godwit-agent", "godwit-coordinator", "libvirtd"), as a folder to read from
    /// outside; none when it does not run.
    pub fn proc_folder(&self, daemon: &str) -> Result<Option<PathBuf>, LabError> {
        let root = Path::new("/proc").join(self.init_process()?.to_string()).join("root/proc");
        Ok(self.process_of(daemon)?.map(|process| root.join(process.to_string())))
    }

    /// Whether something in the host listens on a TCP port (proc_net_tcp(5)).
    pub fn listens(&self, port: u16) -> Result<bool, LabError> {
        let folder = Path::new("/proc").join(self.init_process()?.to_string()).join("net");
        let wanted = format!(":{port:04X}");
        Ok(["tcp", "tcp6"].iter().any(|kind| {
            let table = fs::read_to_string(folder.join(kind)).unwrap_or_default();
            table.lines().any(|line| {
                let fields: Vec<&str> = line.split_whitespace().collect();
                matches!(fields.as_slice(), [_, local, _, "0A", ..] if local.ends_with(&wanted))
            })
        }))
    }

    /// The end of a daemon's log, for a message: at most `lines` lines.
    pub fn log_tail(&self, daemon: &str, lines: usize) -> String {
        let text = fs::read_to_string(self.log_file(daemon)).unwrap_or_default();
        let all: Vec<&str> = text.lines().collect();
        all[all.len().saturating_sub(lines)..].join("\n")
    }

    /// The log of a daemon: "godwit-agent", "godwit-coordinator", "libvirtd".
    pub fn log_file(&self, daemon: &str) -> PathBuf {
        self.file(format!("log/{daemon}.log"))
    }

    pub(super) fn start_daemon(&self, program: &str, arguments: &[&str]) -> Result<(), LabError> {
        let path = self.site.programs.join(program);
        if !path.is_file() {
            return Err(LabError::NotBuilt { path });
        }
        let environment = self.environment.lock().unwrap_or_else(PoisonError::into_inner).clone();
        self.start(program, &path, arguments, environment, false)
    }

    /// Ends a daemon, or only sends signal 0 to it.
    pub(super) fn stop(&self, name: &str, signal: i32) -> Result<(), LabError> {
        self.ask(&Request::Stop { name: name.into(), signal })?;
        let ends =
            [Signal::SIGKILL as i32, Signal::SIGTERM as i32, Signal::SIGINT as i32, Signal::SIGABRT as i32];
        if !ends.contains(&signal) {
            return Ok(());
        }
        self.until(&format!("the end of {name}"), 20, || Ok(self.process_of(name)?.is_none()))
    }

    pub(super) fn process_of(&self, name: &str) -> Result<Option<i32>, LabError> {
        match self.ask(&Request::Status { name: name.into() })? {
            Reply::Process(process) => Ok(process),
            other => Err(LabError::Host { host: self.name.clone(), message: format!("answered {other:?}") }),
        }
    }

    /// Looks at `condition` until it holds, half a minute at most.
    pub fn wait(
        &self,
        what: &str,
        condition: impl FnMut() -> Result<bool, LabError>,
    ) -> Result<(), LabError> {
        self.until(what, 30, condition)
    }

    pub(super) fn until(
        &self,
        what: &str,
        seconds: u64,
        condition: impl FnMut() -> Result<bool, LabError>,
    ) -> Result<(), LabError> {
        until(&self.name, what, Duration::from_secs(seconds), condition)
    }

    /// Keeps libvirt's probing of QEMU for the next lab.
    pub(super) fn save_capabilities(&self) {
        // A lab without it starts a second later, nothing else.
        let _ = folder::copy_tree(&self.file("cache/libvirt/qemu/capabilities"), &self.site.capabilities);
    }

    fn on(&self) -> Result<On<'_>, LabError> {
        let guard = self.namespace.read().unwrap_or_else(PoisonError::into_inner);
        if guard.is_some() { Ok(On { guard }) } else { Err(LabError::PoweredOff { host: self.name.clone() }) }
    }

    fn ask(&self, request: &Request) -> Result<Reply, LabError> {
        self.on()?.ask(request)
    }

    fn start(
        &self,
        name: &str,
        program: &Path,
        arguments: &[&str],
        environment: BTreeMap<String, String>,
        restart: bool,
    ) -> Result<(), LabError> {
        let service = Service {
            name: name.to_owned(),
            program: program.to_path_buf(),
            arguments: arguments.iter().map(|&argument| argument.to_owned()).collect(),
            environment,
            log: Path::new("/var/log").join(format!("{name}.log")),
            restart,
        };
        self.ask(&Request::Start(service)).map(drop)
    }

    fn start_libvirtd(&self) -> Result<(), LabError> {
        self.start("libvirtd", Path::new("/usr/sbin/libvirtd"), &[], BTreeMap::new(), true)
    }

    fn wait_for_libvirt(&self) -> Result<(), LabError> {
        let socket = self.libvirt_socket();
        self.until("an answer of libvirtd", 30, || Ok(UnixStream::connect(&socket).is_ok()))?;
        // The socket is there before the drivers are; the first answer comes when they are.
        self.until("an answer of libvirtd", 30, || {
            let answer = Command::new("virsh").args(["-c", &self.libvirt_uri(), "uri"]).output();
            Ok(answer.is_ok_and(|answer| answer.status.success()))
        })
    }

    fn mounts(&self) -> Vec<Mount> {
        let kernel = |kind: &str, target: &str| Mount::Kernel { kind: kind.into(), target: target.into() };
        let mut mounts = vec![kernel("proc", "/proc"), kernel("sysfs", "/sys"), kernel("bpf", "/sys/fs/bpf")];
        mounts.extend(
            PRIVATE
                .into_iter()
                .filter(|(_, target)| self.has_libvirt || !target.contains("libvirt"))
                .map(|(name, target)| Mount::Bind { source: self.file(name), target: target.into() }),
        );
        mounts.push(Mount::Bind { source: self.site.folder.join("srv"), target: "/srv".into() });
        // Names are looked up here and nowhere else: no host of the lab reaches a name server.
        mounts.push(Mount::Bind { source: self.site.folder.join("hosts"), target: "/etc/hosts".into() });
        if self.has_libvirt {
            mounts.push(Mount::Bind { source: self.file("node"), target: "/sys/devices/system/node".into() });
        }
        mounts
    }

    fn write_libvirt(&self) -> Result<(), LabError> {
        for path in ["lib/libvirt", "cache/libvirt/qemu/capabilities", "log/libvirt"] {
            folder::make(&self.file(path))?;
        }
        folder::copy_tree(&self.site.capabilities, &self.file("cache/libvirt/qemu/capabilities"))
            .map_err(LabError::io("cannot copy libvirt's capability cache"))?;
        folder::write(
            &self.file("etc/libvirtd.conf"),
            &format!(
                "auth_unix_ro = \"none\"\nauth_unix_rw = \"none\"\nunix_sock_rw_perms = \"0700\"\nlisten_tls = 0\n\
                 host_uuid = \"{}\"\nkeepalive_interval = -1\nlog_outputs = \"3:file:/var/log/libvirtd.log\"\n",
                self.uuid
            ),
        )?;
        // No cgroups, mount namespaces or security labels: each would reach outside the lab's own folders.
        folder::write(
            &self.file("etc/qemu.conf"),
            &format!(
                "stdio_handler = \"file\"\nsecurity_driver = \"none\"\nnamespaces = []\ncgroup_controllers = []\n\
                 user = \"root\"\ngroup = \"root\"\ndynamic_ownership = 0\nremember_owner = 0\n\
                 migration_host = \"{}\"\nshared_filesystems = [ \"{}\" ]\n",
                self.address,
                super::POOL
            ),
        )
    }
}

/// Folders of the host that cover the machine's own.
const PRIVATE: [(&str, &str); 5] = [
    ("etc", "/etc/libvirt"),
    ("lib", "/var/lib"),
    ("cache", "/var/cache"),
    ("log", "/var/log"),
    ("run", "/run"),
];

/// The folders that a host covers, so that nothing a host needs may lie below them.
pub(super) fn covered_folders() -> impl Iterator<Item = &'static str> {
    PRIVATE.into_iter().map(|(_, target)| target).chain(["/srv", "/sys", "/proc"])
}

/// Proof that the host is on.
struct On<'a> {
    guard: RwLockReadGuard<'a, Option<Namespace>>,
}

impl std::ops::Deref for On<'_> {
    type Target = Namespace;

    fn deref(&self) -> &Namespace {
        match self.guard.as_ref() {
            Some(namespace) => namespace,
            None => unreachable!("checked when the guard was taken, and no writer can come between"),
        }
    }
}

/// A command that runs inside a host; killed when dropped.
#[derive(Debug)]
pub struct Running {
    child: Option<Child>,
    line: String,
}

impl Running {
    pub(super) fn start(command: &mut Command, line: &str) -> Result<Running, LabError> {
        let child = command.spawn().map_err(LabError::io(format!("cannot start {line}")))?;
        Ok(Running { child: Some(child), line: line.to_owned() })
    }

    /// The child process, to read its output from.
    pub fn child(&mut self) -> Option<&mut Child> {
        self.child.as_mut()
    }

    /// Sends a signal to the command itself.
    pub fn signal(&self, signal: i32) -> Result<(), LabError> {
        let failed = || LabError::io(format!("cannot send signal {signal} to {}", self.line));
        let signal = Signal::try_from(signal).map_err(|error| failed()(error.into()))?;
        // The child has entered the host and waits for the one process that it started there.
        let entered = self.child.as_ref().map_or(0, Child::id);
        let children =
            fs::read_to_string(format!("/proc/{entered}/task/{entered}/children")).map_err(failed())?;
        for process in children.split_whitespace().filter_map(|word| word.parse().ok()) {
            kill(Pid::from_raw(process), signal).map_err(|error| failed()(error.into()))?;
        }
        Ok(())
    }

    /// Waits for the end of the command and returns what it wrote.
    pub fn finish(mut self) -> Result<Output, LabError> {
        let failed = LabError::io(format!("cannot wait for {}", self.line));
        match self.child.take() {
            Some(child) => child.wait_with_output().map_err(failed),
            None => Err(failed(std::io::ErrorKind::NotFound.into())),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// A guard over a mutex that a panicking test may have poisoned.
pub(super) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
