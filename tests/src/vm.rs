//! VMs of Debian's own kernel, for what this machine's kernel cannot do: NFS, several NUMA cells, netem, broken disks.
//!
//! ```no_run
//! # use godwit_tests::vm::{Vm, Wire};
//! let wire = Wire::new()?;
//! let server = Vm::builder("server").disk(1 << 30).wire(&wire, "10.9.0.1/24").start()?;
//! let client = Vm::builder("client").cpus(2).program("godwit-agent").wire(&wire, "10.9.0.2/24").start()?;
//! server.exec(&["mkfs.xfs", "-q", "/dev/vdc"])?;
//! client.exec(&["ping", "-c", "1", "10.9.0.1"])?;
//! # Ok::<(), godwit_tests::vm::VmError>(())
//! ```
//!
//! A VM is up about 4 s after its start; commands wait for that by themselves, so that several VMs boot side by side.
//! Disks: `vda` the root, whose content is new at each power-on; `vdb` the job files, mounted at /job and in the PATH;
//! `vdc` and on, those of [`Builder::disk`], which keep theirs until the VM is dropped. Cards are `eth0` and on.
//! Everything is emulated (TCG), so nothing of this machine's own KVM is asked for.
//!
//! Nothing is left behind, however a test ends: each VM's QEMU lives on a socket to this process.

pub mod control;
mod error;
pub mod file_server;
mod image;
mod machine;
mod session;
mod wire;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use control::{Answer, JOB, Output, SETUP, Setup};
pub use error::VmError;
pub use image::VmImage;
use machine::Machine;
use nix::fcntl::{Flock, FlockArg};
pub use session::Running;
use session::Session;
pub use wire::{Station, Wire};

/// Disk-backed on ordinary machines, and short: paths of unix sockets in it must stay below 108 bytes.
const PARENT: &str = "/var/tmp";
const PREFIX: &str = "godwit-vm-";

/// How long a VM may take to come up: on a machine that does something else besides, under emulation.
const UP_WITHIN: Duration = Duration::from_secs(180);

/// Bytes of the job disk beyond its files: inodes and tables.
const JOB_DISK_SLACK: u64 = 16 << 20;

/// How often a condition is looked at that announces itself in no other way.
const POLL: Duration = Duration::from_millis(20);

/// A NUMA cell of a VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cell {
    /// Its CPUs, first to last.
    pub cpus: std::ops::RangeInclusive<u32>,
    /// Its memory.
    pub memory_mib: u64,
}

/// What a VM is to be like.
#[derive(Debug, Clone)]
pub struct Builder {
    name: String,
    cpus: u32,
    memory_mib: u64,
    cells: Vec<Cell>,
    distances: Vec<(usize, usize, u8)>,
    disks: Vec<u64>,
    wires: Vec<(Wire, String)>,
    files: Vec<(PathBuf, String)>,
    kernel_arguments: String,
    release_kernel: bool,
    deadline: Duration,
}

impl Builder {
    /// CPUs; 1 by default.
    pub fn cpus(mut self, cpus: u32) -> Builder {
        self.cpus = cpus;
        self
    }

    /// Memory in MiB; 768 by default. With cells it is the sum of theirs.
    pub fn memory_mib(mut self, memory_mib: u64) -> Builder {
        self.memory_mib = memory_mib;
        self
    }

    /// One more NUMA cell. With cells, the number of CPUs is what they name.
    pub fn cell(mut self, cell: Cell) -> Builder {
        self.cells.push(cell);
        self
    }

    /// The distance between two cells, both ways, as ACPI's SLIT has it: 11 to 254; 20 by default.
    pub fn distance(mut self, one: usize, other: usize, distance: u8) -> Builder {
        self.distances.push((one, other, distance));
        self
    }

    /// One more disk of so many bytes, empty and sparse: `vdc`, then `vdd`, …
    pub fn disk(mut self, bytes: u64) -> Builder {
        self.disks.push(bytes);
        self
    }

    /// One more network card, with an address and its prefix such as "10.9.0.1/24".
    pub fn wire(mut self, wire: &Wire, address: &str) -> Builder {
        self.wires.push((wire.clone(), address.to_owned()));
        self
    }

    /// A file of this machine, inside at `/job/NAME` with its mode.
    pub fn file(mut self, path: &Path, name: &str) -> Builder {
        self.files.push((path.to_path_buf(), name.to_owned()));
        self
    }

    /// A program of the project, as it was built beside the running one.
    pub fn program(self, name: &str) -> Builder {
        let path = crate::programs_folder().join(name);
        self.file(&path, name)
    }

    /// Words added to the kernel's command line.
    pub fn kernel_arguments(mut self, arguments: &str) -> Builder {
        self.kernel_arguments = arguments.to_owned();
        self
    }

    /// Boots the release's own kernel (Linux 6.1) in place of the one from its backports.
    pub fn release_kernel(mut self) -> Builder {
        self.release_kernel = true;
        self
    }

    /// How long the VM may live, whatever the test does; 10 minutes by default.
    pub fn deadline(mut self, deadline: Duration) -> Builder {
        self.deadline = deadline;
        self
    }

    /// Powers the VM on. It boots while the caller goes on.
    ///
    /// # Errors
    /// When the image cannot be built, a program has not been built, or QEMU does not start.
    pub fn start(self) -> Result<Vm, VmError> {
        let image = VmImage::ensure(&crate::target_folder().join("vm"))?;
        let keeper = crate::programs_folder().join("vm-lab");
        let needed = self.files.iter().map(|(path, _)| path).chain([&keeper]);
        if let Some(path) = needed.into_iter().find(|path| !path.is_file()) {
            return Err(VmError::NotBuilt { path: path.clone() });
        }
        let folder = create_folder(&self.name)?;
        // From here on the keeper removes the folder.
        let machine = Machine::keep(&self.name, &keeper, &folder, self.deadline)?;
        self.write_job_disk(&keeper, &folder)?;
        for (number, bytes) in self.disks.iter().enumerate() {
            let disk = File::create(folder.join(format!("disk{number}")));
            disk.and_then(|disk| disk.set_len(*bytes)).map_err(VmError::io("cannot create a disk"))?;
        }
        let arguments = machine::arguments(&self, &image, &folder);
        let mut vm = Vm { name: self.name, arguments, folder, machine, boot: Mutex::new(None) };
        vm.power_on()?;
        Ok(vm)
    }

    fn write_job_disk(&self, keeper: &Path, folder: &Path) -> Result<(), VmError> {
        let job = folder.join("job");
        let failed = |path: &Path| VmError::io(format!("cannot copy {} for the VM", path.display()));
        fs::create_dir(&job).map_err(failed(&job))?;
        let setup = Setup {
            name: self.name.clone(),
            addresses: self.wires.iter().map(|(_, address)| address.clone()).collect(),
        };
        fs::write(job.join(SETUP), serde_json::json!(setup).to_string()).map_err(failed(&job))?;
        let mut bytes = JOB_DISK_SLACK;
        let own = (keeper.to_path_buf(), "vm-lab".to_owned());
        for (path, name) in self.files.iter().chain([&own]) {
            // Of a few bytes more than the file, for its indirect blocks.
            bytes += fs::copy(path, job.join(name)).map_err(failed(path))? * 33 / 32;
        }
        image::make_disk(&job, &folder.join("job.ext4"), bytes)?;
        fs::remove_dir_all(&job).map_err(failed(&job))
    }
}

/// A VM. Dropping it ends it and removes its files.
#[derive(Debug)]
pub struct Vm {
    name: String,
    arguments: Vec<String>,
    folder: PathBuf,
    machine: Machine,
    /// None while it is off.
    boot: Mutex<Option<Boot>>,
}

/// From power-on to power-off.
#[derive(Debug)]
struct Boot {
    session: Session,
    /// None once it is up.
    ready: Option<Receiver<Answer>>,
}

impl Vm {
    /// A VM that will be called `name`: its host name, and part of file names and messages.
    pub fn builder(name: &str) -> Builder {
        Builder {
            name: name.to_owned(),
            cpus: 1,
            memory_mib: 768,
            cells: Vec::new(),
            distances: Vec::new(),
            disks: Vec::new(),
            wires: Vec::new(),
            files: Vec::new(),
            kernel_arguments: String::new(),
            release_kernel: false,
            deadline: Duration::from_secs(600),
        }
    }

    /// Runs a command to its end; anything but exit code 0 is an error. Returns stdout.
    ///
    /// # Errors
    /// [`VmError::Command`], [`VmError::NotStarted`], [`VmError::PoweredOff`]; [`VmError::Late`] after two minutes.
    pub fn exec(&self, words: &[&str]) -> Result<String, VmError> {
        self.spawn(words)?.finish(Duration::from_secs(120))
    }

    /// Runs a script of sh(1) to its end, which stops at the first command that fails. Returns stdout.
    ///
    /// # Errors
    /// As [`Self::exec`].
    pub fn shell(&self, script: &str) -> Result<String, VmError> {
        self.exec(&["sh", "-euc", script])
    }

    /// Runs a command to its end, however that is.
    ///
    /// # Errors
    /// [`VmError::NotStarted`], [`VmError::PoweredOff`]; [`VmError::Late`] after two minutes.
    pub fn output(&self, words: &[&str]) -> Result<Output, VmError> {
        self.spawn(words)?.wait(Duration::from_secs(120))
    }

    /// Starts a command.
    ///
    /// # Errors
    /// [`VmError::PoweredOff`].
    pub fn spawn(&self, words: &[&str]) -> Result<Running, VmError> {
        self.spawn_with(words, &BTreeMap::new(), "")
    }

    /// Starts a command with more in its environment and something to read.
    ///
    /// # Errors
    /// [`VmError::PoweredOff`].
    pub fn spawn_with(
        &self,
        words: &[&str],
        environment: &BTreeMap<String, String>,
        stdin: &str,
    ) -> Result<Running, VmError> {
        self.session()?.start(words, environment, stdin)
    }

    /// Writes a file inside.
    ///
    /// # Errors
    /// As [`Self::exec`].
    pub fn write(&self, path: &str, text: &str) -> Result<(), VmError> {
        let words = ["sh", "-euc", "cat > \"$0\"", path];
        self.spawn_with(&words, &BTreeMap::new(), text)?.finish(Duration::from_secs(60)).map(drop)
    }

    /// Looks at a condition inside until it holds. An error of its own ends the wait.
    ///
    /// # Errors
    /// [`VmError::Late`] after `patience`.
    pub fn until(
        &self,
        what: &str,
        patience: Duration,
        mut condition: impl FnMut(&Vm) -> Result<bool, VmError>,
    ) -> Result<(), VmError> {
        let deadline = Instant::now() + patience;
        while !condition(self)? {
            if Instant::now() >= deadline {
                let seconds = patience.as_secs();
                return Err(VmError::Late { vm: self.name.clone(), what: what.to_owned(), seconds });
            }
            std::thread::sleep(POLL);
        }
        Ok(())
    }

    /// A power loss: what was not on its disks is gone.
    ///
    /// # Errors
    /// When the keeper does not answer.
    pub fn cut_power(&mut self) -> Result<(), VmError> {
        *self.boot() = None;
        self.machine.kill()
    }

    /// Powers it on again, with the disks as they are and a new root.
    ///
    /// # Errors
    /// When QEMU does not start; it may run already.
    pub fn power_on(&mut self) -> Result<(), VmError> {
        let stream = self.machine.start(&self.arguments, &self.folder)?;
        let (session, ready) =
            Session::new(&self.name, stream).map_err(VmError::io("cannot talk to the VM"))?;
        *self.boot() = Some(Boot { session, ready: Some(ready) });
        Ok(())
    }

    /// Writes everything to its disks and powers it off.
    ///
    /// # Errors
    /// [`VmError::Late`] when it is not off after a minute.
    pub fn power_off(&mut self) -> Result<(), VmError> {
        self.session()?.power_off()?;
        self.machine.wait(Duration::from_secs(60))?;
        *self.boot() = None;
        Ok(())
    }

    /// Stops all of the VM at once, or lets it go on: a machine that hangs.
    ///
    /// # Errors
    /// When the keeper does not answer.
    pub fn pause(&self, pause: bool) -> Result<(), VmError> {
        self.machine.pause(pause)
    }

    /// What the kernel and the first process wrote to the console since the last power-on.
    pub fn console(&self) -> String {
        String::from_utf8_lossy(&fs::read(self.folder.join("console")).unwrap_or_default()).into_owned()
    }

    fn boot(&self) -> MutexGuard<'_, Option<Boot>> {
        self.boot.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The conversation, once the VM is up.
    fn session(&self) -> Result<Session, VmError> {
        let mut boot = self.boot();
        let vm = self.name.clone();
        let Some(boot) = boot.as_mut() else { return Err(VmError::PoweredOff { vm }) };
        if let Some(ready) = &boot.ready {
            match ready.recv_timeout(UP_WITHIN) {
                Ok(_) => {}
                Err(RecvTimeoutError::Timeout) => {
                    let what = format!("coming up; its console says\n{}", tail(&self.console()));
                    return Err(VmError::Late { vm, what, seconds: UP_WITHIN.as_secs() });
                }
                Err(RecvTimeoutError::Disconnected) => {
                    let said = self.machine.last_words();
                    return Err(VmError::Qemu { vm, message: format!("{said}\n{}", tail(&self.console())) });
                }
            }
        }
        boot.ready = None;
        Ok(boot.session.clone())
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- console of {}\n{}", self.name, tail(&self.console()));
        }
    }
}

/// The last lines of a console.
fn tail(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(40)..].join("\n")
}

/// Makes a VM's folder. Removes what VMs left whose keepers were killed.
fn create_folder(name: &str) -> Result<PathBuf, VmError> {
    static NUMBER: std::sync::atomic::AtomicUsize = std::sync::atomic::AtomicUsize::new(0);
    let parent = Path::new(PARENT);
    for entry in fs::read_dir(parent).map_err(VmError::io("cannot list /var/tmp"))?.flatten() {
        if entry.file_name().to_string_lossy().starts_with(PREFIX) {
            remove_stale(&entry.path());
        }
    }
    let number = NUMBER.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    let folder = parent.join(format!("{PREFIX}{}-{number}-{name}", std::process::id()));
    fs::create_dir(&folder).map_err(VmError::io(format!("cannot create {}", folder.display())))?;
    Ok(folder)
}

/// Removes a folder that no keeper holds. One that is a moment old may have none yet, but its process lives.
fn remove_stale(folder: &Path) {
    let name = folder.file_name().unwrap_or_default().to_string_lossy();
    let process = name.strip_prefix(PREFIX).and_then(|rest| rest.split('-').next());
    if process.is_some_and(|process| Path::new("/proc").join(process).exists()) {
        return;
    }
    let Ok(file) = File::open(folder) else { return };
    if Flock::lock(file, FlockArg::LockExclusiveNonblock).is_ok() {
        // Another test may be removing it too.
        let _ = fs::remove_dir_all(folder);
    }
}

/// Where a job file is inside.
pub fn inside(name: &str) -> String {
    format!("{JOB}/{name}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_of_a_process_that_is_gone_is_removed_and_that_of_a_living_one_is_not() {
        // No process has this number: it is above the kernel's own limit.
        let stale = Path::new(PARENT).join(format!("{PREFIX}4194305-0-x"));
        fs::create_dir_all(&stale).expect("is made");
        fs::write(stale.join("disk0"), b"x").expect("is written");
        let first = create_folder("t").expect("is made");
        let second = create_folder("t").expect("is made");
        assert!(!stale.exists());
        assert!(first.is_dir() && second.is_dir());
        fs::remove_dir(first).and_then(|()| fs::remove_dir(second)).expect("are removed");
    }
}
