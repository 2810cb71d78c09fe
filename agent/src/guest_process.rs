//! What the kernel tells of a running guest's process: where its threads may run and did, and where its memory is.
//! All of it is read from `/proc`; the hypervisor is not asked.

use crate::hypervisor::domain_xml::domain_name;
use crate::kernel_numbers::parse_list;
use godwit_protocol::id::InstanceId;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// Where libvirt's QEMU driver writes the process number of each guest that runs.
const PIDS: &str = "/run/libvirt/qemu";

/// The processes of this host's guests.
#[derive(Clone, Debug)]
pub struct GuestProcesses {
    proc: PathBuf,
    pids: PathBuf,
}

impl Default for GuestProcesses {
    fn default() -> Self {
        Self::new(Path::new("/proc"), Path::new(PIDS))
    }
}

impl GuestProcesses {
    /// Processes told in files `DOMAIN.pid` of `pids`, read under `proc`.
    pub fn new(proc: &Path, pids: &Path) -> Self {
        Self { proc: proc.to_owned(), pids: pids.to_owned() }
    }

    /// The process of a guest; none when it does not run.
    pub fn find(&self, instance: InstanceId) -> Option<GuestProcess> {
        let text = fs::read_to_string(self.pids.join(format!("{}.pid", domain_name(instance)))).ok()?;
        let pid: u32 = text.trim().parse().ok()?;
        let folder = self.proc.join(pid.to_string());
        // The file outlives a guest that went down while libvirtd was away, and its number may be another's now.
        let command = fs::read(folder.join("cmdline")).ok()?;
        let id = instance.to_string();
        let ours = command.windows(id.len()).any(|window| window == id.as_bytes());
        ours.then_some(GuestProcess { pid, folder })
    }
}

/// One guest's process. It may end at any time; then nothing more is told.
#[derive(Clone, Debug)]
pub struct GuestProcess {
    pid: u32,
    folder: PathBuf,
}

/// One mapping of a process's memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// The cells it is bound to; none: not bound.
    pub bound: Option<BTreeSet<u32>>,
    /// In KiB.
    pub page_kib: u64,
    /// Whether its pages are of a pool of huge pages.
    pub huge: bool,
    /// Pages by cell.
    pub pages: BTreeMap<u32, u64>,
}

impl GuestProcess {
    /// The main thread, which is the emulator's.
    pub fn main_thread(&self) -> u32 {
        self.pid
    }

    /// The threads of vCPUs: vCPU to thread.
    pub fn vcpu_threads(&self) -> BTreeMap<u32, u32> {
        let Ok(tasks) = fs::read_dir(self.folder.join("task")) else { return BTreeMap::new() };
        let threads = tasks.flatten().filter_map(|task| {
            let name = fs::read_to_string(task.path().join("comm")).ok()?;
            // QEMU calls them `CPU 3/KVM` or `CPU 3/TCG`.
            let (vcpu, _) = name.strip_prefix("CPU ")?.split_once('/')?;
            Some((vcpu.parse().ok()?, task.file_name().to_str()?.parse().ok()?))
        });
        threads.collect()
    }

    fn read(&self, thread: u32, file: &str) -> Option<String> {
        fs::read_to_string(self.folder.join(format!("task/{thread}/{file}"))).ok()
    }

    /// The CPUs on which a thread may run.
    pub fn affinity(&self, thread: u32) -> Option<BTreeSet<u32>> {
        let status = self.read(thread, "status")?;
        let list = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"))?;
        parse_list(list)
    }

    /// The CPU on which a thread ran last (proc_pid_stat(5), field 39).
    pub fn last_cpu(&self, thread: u32) -> Option<u32> {
        let stat = self.read(thread, "stat")?;
        // The name, field 2, may hold spaces and brackets.
        let (_, rest) = stat.rsplit_once(')')?;
        rest.split_whitespace().nth(39 - 3)?.parse().ok()
    }

    /// How long a thread wanted to run and could not, in nanoseconds since it began (field 2 of schedstat).
    pub fn run_delay_ns(&self, thread: u32) -> Option<u64> {
        self.read(thread, "schedstat")?.split_whitespace().nth(1)?.parse().ok()
    }

    /// Its memory. The kernel walks all of its pages for this.
    pub fn mappings(&self) -> Option<Vec<Mapping>> {
        let text = fs::read_to_string(self.folder.join("numa_maps")).ok()?;
        Some(text.lines().filter_map(parse_mapping).collect())
    }
}

/// A line of `numa_maps` (numa(7)): address, policy, then words.
fn parse_mapping(line: &str) -> Option<Mapping> {
    let mut words = line.split_whitespace();
    let (_address, policy) = (words.next()?, words.next()?);
    // `bind:0-1`, and with flags `bind=static:0`.
    let bound = policy.strip_prefix("bind").and_then(|rest| parse_list(rest.rsplit_once(':')?.1));
    let mut mapping = Mapping { bound, page_kib: 4, huge: false, pages: BTreeMap::new() };
    for word in words {
        match word.split_once('=') {
            None if word == "huge" => mapping.huge = true,
            Some(("kernelpagesize_kB", size)) => mapping.page_kib = size.parse().ok()?,
            Some((key, pages)) => {
                if let Some(cell) = key.strip_prefix('N').and_then(|cell| cell.parse().ok()) {
                    mapping.pages.insert(cell, pages.parse().ok()?);
                }
            }
            None => {}
        }
    }
    Some(mapping)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::process::{Child, Command};

    /// A tree of `/proc` with one guest: its threads, each with vCPU, CPU it ran on last and CPUs it may run on.
    pub(crate) fn write_guest(
        root: &Path,
        instance: InstanceId,
        pid: u32,
        vcpus: &[(u32, u32, &str)],
        numa_maps: &str,
    ) {
        let folder = root.join(format!("proc/{pid}"));
        let thread = |tid: u32, comm: &str, cpu: u32, allowed: &str| {
            let task = folder.join(format!("task/{tid}"));
            fs::create_dir_all(&task).unwrap();
            fs::write(task.join("comm"), format!("{comm}\n")).unwrap();
            let zeros = "0 ".repeat(35);
            fs::write(task.join("stat"), format!("{tid} ({comm}) S {zeros}{cpu} 0 0\n")).unwrap();
            fs::write(task.join("schedstat"), "1000 2000000000 7\n").unwrap();
            fs::write(task.join("status"), format!("Name:\t{comm}\nCpus_allowed_list:\t{allowed}\n"))
                .unwrap();
        };
        thread(pid, "qemu-system-x86", 0, "0");
        for (vcpu, cpu, allowed) in vcpus {
            thread(pid + 1 + vcpu, &format!("CPU {vcpu}/TCG"), *cpu, allowed);
        }
        fs::write(folder.join("cmdline"), format!("qemu\0-uuid\0{instance}\0")).unwrap();
        fs::write(folder.join("numa_maps"), numa_maps).unwrap();
        fs::create_dir_all(root.join("run")).unwrap();
        fs::write(root.join(format!("run/{}.pid", domain_name(instance))), format!("{pid}\n")).unwrap();
    }

    pub(crate) fn processes(root: &Path) -> GuestProcesses {
        GuestProcesses::new(&root.join("proc"), &root.join("run"))
    }

    #[test]
    fn a_guest_is_read_as_the_kernel_writes_it() {
        let root = tempfile::tempdir().unwrap();
        let instance = InstanceId::random();
        let maps = "55d0 default file=/usr/bin/qemu mapped=3 N0=1 N1=2 kernelpagesize_kB=4\n\
                    7f00 bind:1 file=/dev/hugepages/a huge anon=64 dirty=64 N1=64 kernelpagesize_kB=2048\n\
                    7f01 bind=static:0-1 anon=9 dirty=9 N0=9 kernelpagesize_kB=4\n\n";
        write_guest(root.path(), instance, 100, &[(0, 3, "3"), (1, 2, "2,4-5")], maps);
        let process = processes(root.path()).find(instance).unwrap();
        assert_eq!(process.main_thread(), 100);
        let threads = process.vcpu_threads();
        assert_eq!(threads, BTreeMap::from([(0, 101), (1, 102)]));
        assert_eq!(process.affinity(102), Some(BTreeSet::from([2, 4, 5])));
        assert_eq!(process.last_cpu(101), Some(3));
        assert_eq!(process.run_delay_ns(101), Some(2_000_000_000));
        let mappings = process.mappings().unwrap();
        assert_eq!(mappings.len(), 3);
        assert_eq!((mappings[0].bound.clone(), mappings[0].pages.clone()), (None, [(0, 1), (1, 2)].into()));
        assert!(mappings[1].huge && mappings[1].page_kib == 2048);
        assert_eq!(mappings[1].bound, Some(BTreeSet::from([1])));
        assert_eq!(mappings[2].bound, Some(BTreeSet::from([0, 1])));
        assert!(processes(root.path()).find(InstanceId::random()).is_none());
        fs::write(root.path().join("proc/100/cmdline"), "another\0").unwrap();
        assert!(processes(root.path()).find(instance).is_none(), "the number is another process's now");
    }

    /// Ends the process with the test.
    struct Ended(Child);

    impl Drop for Ended {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    #[test]
    fn a_real_process_can_be_read() {
        let instance = InstanceId::random();
        let run = tempfile::tempdir().unwrap();
        let mut command = Command::new("sh");
        command.args(["-c", "read x", &instance.to_string()]).stdin(std::process::Stdio::piped());
        let child = Ended(command.spawn().unwrap());
        let pid = child.0.id();
        fs::write(run.path().join(format!("{}.pid", domain_name(instance))), pid.to_string()).unwrap();
        let processes = GuestProcesses::new(Path::new("/proc"), run.path());
        // Until the program is loaded it is still ours under another name.
        let process = loop {
            if let Some(process) = processes.find(instance) {
                break process;
            }
        };
        let allowed = process.affinity(pid).unwrap();
        assert!(allowed.contains(&process.last_cpu(pid).unwrap()));
        assert!(process.run_delay_ns(pid).is_some());
        let pages: u64 = process.mappings().unwrap().iter().flat_map(|m| m.pages.values()).sum();
        assert!(pages > 0);
    }
}
