//! The cases on NFS, for machines whose kernel has none: a file server and its client, each a VM with Debian's kernel,
//! and this very program in the client. All of it is emulated: how tools compare means something there, a time on its
//! own does not.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use godwit_tests::vm::{Vm, VmError, Wire, file_server};
use serde_json::{Value, json};

use super::super::record::Record;
use super::super::report::Report;
use super::super::scratch::Scratch;
use super::super::{BenchError, Effort};
use super::stage::Place;
use super::{CPU, WALL, is_wanted, skipped};
use crate::command;

/// Places by the names with which their cases begin, and what the server exports.
const SHARES: [(&str, &str); 2] = [("nfs42-xfs", "/export/xfs"), ("nfs42-ext4", "/export/ext4")];

/// What the peers are, beside what every Debian has. They are this machine's own, as in the other cases.
const PEERS: [&str; 6] = ["fio", "nbdcopy", "nbdkit", "qemu-img", "qemu-nbd", "rsync"];

/// How long the VMs may live.
const DEADLINE: Duration = Duration::from_secs(3 * 60 * 60);

/// How often is looked whether there is something to tell.
const LOOK: Duration = Duration::from_secs(2);

/// Where the figures lie inside.
const RECORDS: &str = "/tmp/records";

pub(super) fn measure(
    programs: &Path,
    effort: Effort<'_>,
    disk_mib: Option<u64>,
    report: &mut Report,
) -> Result<(), BenchError> {
    let places = SHARES.map(|(name, export)| Place::new(name, Ok(folder(export))));
    let wanted: Vec<&Place> = places.iter().filter(|place| is_wanted(effort, place)).collect();
    if wanted.is_empty() {
        return Ok(());
    }
    println!("bench: copy on NFS in two VMs; they are emulated: compare tools there, not times");
    match Pair::start(programs) {
        Ok(pair) => pair.measure(effort, &wanted, disk_mib, report),
        Err(error) => {
            let mut why = format!("no VMs with NFS: {error}");
            crate::causes(&error).for_each(|cause| why += &format!(": {cause}"));
            report.add(wanted.iter().flat_map(|place| skipped(effort, place, &why)).collect())
        }
    }
}

/// Where an export is mounted.
fn folder(export: &str) -> PathBuf {
    Path::new("/mnt").join(export.rsplit('/').next().unwrap_or(export))
}

/// The two VMs.
struct Pair {
    client: Vm,
    _server: Vm,
    _wire: Wire,
}

impl Pair {
    fn start(programs: &Path) -> Result<Pair, BenchError> {
        let failed = |what: &str| BenchError::io(what.to_owned());
        let folder = command::target_folder().join(format!("godwit-bench-share-{}", std::process::id()));
        let scratch = Scratch::new(folder)?;
        let libraries = scratch.folder.join("libraries.tar");
        let wire = Wire::new()?;
        let server = file_server::builder(&wire).deadline(DEADLINE).start()?;
        let own = std::env::current_exe().map_err(failed("cannot tell this program's name"))?;
        let mut client = Vm::builder("client").cpus(2).memory_mib(1024).deadline(DEADLINE);
        let peers: Vec<PathBuf> = PEERS.iter().filter_map(|name| find(name)).collect();
        for (peer, name) in peers.iter().filter_map(|peer| Some((peer, peer.file_name()?.to_str()?))) {
            client = client.file(peer, name);
        }
        pack_libraries(&peers, &libraries)?;
        let client = client
            .file(&own, "xtask")
            .file(&programs.join("godwit-agent"), "godwit-agent")
            .file(&libraries, "libraries.tar")
            .wire(&wire, "10.9.0.11/24")
            .start()?;
        file_server::serve(&server)?;
        // What the VM has already stays.
        client
            .shell("tar -x --skip-old-files -f /job/libraries.tar -C /; ldconfig; modprobe -a nfs nfsv4")?;
        for (_, export) in SHARES {
            mount(&client, export)?;
        }
        Ok(Pair { client, _server: server, _wire: wire })
    }

    /// Runs this program's own cases inside, and tells of them.
    fn measure(
        &self,
        effort: Effort<'_>,
        places: &[&Place],
        disk_mib: Option<u64>,
        report: &mut Report,
    ) -> Result<(), BenchError> {
        let words = own_line(effort, places, disk_mib);
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let mut running = self.client.spawn(&words)?;
        let (begun, mut told, mut kept) = (Instant::now(), 0, 0);
        let output = loop {
            let output = match running.wait(LOOK) {
                Err(VmError::Late { .. }) if begun.elapsed() < DEADLINE => running.look()?,
                answer => answer?,
            };
            let cases: Vec<&str> =
                output.stdout.lines().filter(|line| line.starts_with("bench: copy ")).collect();
            let has_ended = output.code.is_some() || output.signal.is_some();
            // Another case under way means that there are figures of the one before.
            if cases.len() > told || has_ended {
                kept += self.take_records(kept, report)?;
                cases[told..].iter().for_each(|case| println!("{case}"));
                told = cases.len();
            }
            if has_ended {
                break output;
            }
        };
        if output.success() {
            return Ok(());
        }
        let why = output.stderr.trim();
        report.add(places.iter().flat_map(|place| skipped(effort, place, why)).collect())
    }

    /// Keeps the figures that lie inside, but for so many; how many those were.
    fn take_records(&self, but: usize, report: &mut Report) -> Result<usize, BenchError> {
        let lines = self.client.output(&["cat", RECORDS])?.stdout;
        // One that is being written is taken the next time.
        let whole = lines.lines().skip(but).map_while(|line| serde_json::from_str::<Value>(line).ok());
        let records: Vec<Record> =
            whole.map_while(|line| Record::from_json("copy", &[WALL, CPU], &line)).collect();
        let count = records.len();
        report.add(records)?;
        Ok(count)
    }
}

/// This program's own line inside.
fn own_line(effort: Effort<'_>, places: &[&Place], disk_mib: Option<u64>) -> Vec<String> {
    let disk_mib = disk_mib.unwrap_or(if effort.quick { 32 } else { 128 });
    let line = format!("/job/xtask bench copy --programs /job --disk-mib {disk_mib} --json {RECORDS}");
    let mut words: Vec<String> = line.split(' ').map(str::to_owned).collect();
    words.extend(effort.quick.then(|| "--quick".to_owned()));
    for Place { name, folder } in places {
        let folder = folder.iter().map(|folder| format!("{name}={}", folder.display()));
        words.extend(folder.flat_map(|at| ["--at".to_owned(), at]));
    }
    words.extend(effort.only.iter().flat_map(|text| ["--only".to_owned(), text.clone()]));
    words
}

/// Mounts an export as the agent does.
fn mount(client: &Vm, export: &str) -> Result<(), BenchError> {
    let folder = folder(export);
    client.shell(&format!("mkdir -p {}", folder.display()))?;
    let share = json!({ "server": file_server::ADDRESS, "export": export, "version": "4.2" });
    let order = json!({ "pool": folder, "ask": { "mount": share } }).to_string();
    let mut helper = client.spawn_with(&["godwit-agent", "worker", "pool"], &BTreeMap::new(), &order)?;
    let said = helper.finish(Duration::from_secs(120))?;
    if said.contains("\"already\":false") {
        return Ok(());
    }
    Err(BenchError::NotRunning { daemon: format!("the mount of {export}"), log: said })
}

/// A program of this machine.
fn find(name: &str) -> Option<PathBuf> {
    let path = command::capture(Command::new("which").arg(name)).ok()?;
    Some(PathBuf::from(path.trim()))
}

/// Packs what the peers are linked with, and what they load.
fn pack_libraries(peers: &[PathBuf], archive: &Path) -> Result<(), BenchError> {
    let mut files = BTreeSet::new();
    for peer in peers {
        let linked = command::capture(Command::new("ldd").arg(peer))?;
        files.extend(linked.lines().filter_map(library).map(str::to_owned));
        if peer.ends_with("nbdkit") {
            let told = command::capture(Command::new(peer).arg("--dump-config"))?;
            let plugins = told.lines().find_map(|line| line.strip_prefix("plugindir="));
            files.extend(plugins.map(|folder| format!("{folder}/nbdkit-file-plugin.so")));
        }
    }
    let mut tar = Command::new("tar");
    tar.args(["--create", "--dereference", "--directory=/", "--file"]).arg(archive);
    Ok(command::run(tar.args(files.iter().map(|file| file.trim_start_matches('/'))))?)
}

/// The file of a line of ldd(1).
fn library(line: &str) -> Option<&str> {
    let path = line.split_once(" => ")?.1.split_whitespace().next()?;
    path.starts_with('/').then_some(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_library_is_where_ldd_says() {
        assert_eq!(library("\tlibz.so.1 => /lib/libz.so.1 (0x00007f)"), Some("/lib/libz.so.1"));
        assert_eq!(library("\tlibz.so.1 => not found"), None);
        assert_eq!(library("\tlinux-vdso.so.1 (0x00007ffd)"), None);
        assert_eq!(library("\tstatically linked"), None);
    }
}
