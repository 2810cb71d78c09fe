//! An NFS server and its clients, each a VM with Debian's kernel.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use serde_json::Value;

use crate::fleet;
pub(crate) use godwit_tests::vm::file_server::ADDRESS as SERVER;
use godwit_tests::vm::{Vm, VmError, Wire, file_server};

/// How long anything may take on a machine that is busy, under emulation.
pub(crate) const PATIENCE: Duration = Duration::from_secs(90);

/// The server and its wire.
pub(crate) struct NfsLab {
    /// Cut it, and the server is away though it runs.
    pub(crate) wire: Wire,
    pub(crate) server: Vm,
}

impl NfsLab {
    /// Starts the server; it boots while the caller goes on to start clients.
    pub(crate) fn start() -> NfsLab {
        let wire = Wire::new().expect("a wire");
        let server = file_server::builder(&wire).start().expect("the server starts");
        NfsLab { wire, server }
    }

    /// Client number `number`, from 1, at 10.9.0.1`number`.
    pub(crate) fn client(&self, number: u32) -> Client {
        let name = format!("client{number}");
        let builder = Vm::builder(&name).cpus(2).memory_mib(1024).program("godwit-agent");
        let vm = builder.wire(&self.wire, &format!("10.9.0.1{number}/24")).start();
        Client { vm: vm.expect("the client starts") }
    }

    /// Client number `number` with what a fleet of one host is made of.
    pub(crate) fn fleet_client(&self, number: u32) -> Client {
        self.fleet_client_with(number, &[])
    }

    /// The same, with files at `/job/NAME`.
    pub(crate) fn fleet_client_with(&self, number: u32, files: &[(&Path, &str)]) -> Client {
        let name = format!("client{number}");
        let builder = fleet::builder(&name).cpus(2).memory_mib(1280).deadline(Duration::from_secs(900));
        let builder = files.iter().fold(builder, |builder, (path, name)| builder.file(path, name));
        let vm = builder.wire(&self.wire, &format!("10.9.0.1{number}/24")).start();
        Client { vm: vm.expect("the client starts") }
    }

    /// Lets the server export; also after a loss of power.
    pub(crate) fn serve(&self) {
        file_server::serve(&self.server).expect("the server exports");
    }

    /// Lets the server's threads serve what is exported; also after they were stopped.
    pub(crate) fn start_daemon(&self) {
        file_server::start_daemon(&self.server).expect("the server serves");
    }
}

/// A VM that mounts.
pub(crate) struct Client {
    pub(crate) vm: Vm,
}

/// A step that must go well.
#[track_caller]
pub(crate) fn ok<T>(result: Result<T, VmError>) -> T {
    match result {
        Ok(value) => value,
        Err(error) => panic!("{error}"),
    }
}

/// Makes a file of `mib` MiB of noise inside, no two of them alike.
#[track_caller]
pub(crate) fn big_file(vm: &Vm, path: &str, mib: u32) {
    let make = "import os, sys\nnoise = os.urandom(1 << 20)\nwith open(sys.argv[1], 'wb') as file:\n\
                \x20   for number in range(int(sys.argv[2])): file.write(number.to_bytes(8, 'big') + noise[8:])";
    ok(vm.exec(&["python3", "-c", make, path, &mib.to_string()]));
}

impl Client {
    #[track_caller]
    pub(crate) fn shell(&self, script: &str) -> String {
        ok(self.vm.shell(script))
    }

    /// Mounts an export by hand, as the agent would.
    #[track_caller]
    pub(crate) fn mount(&self, export: &str, options: &str) -> String {
        let folder = format!("/mnt/{}", export.rsplit('/').next().unwrap_or(export));
        self.shell(&format!(
            "modprobe -a nfs nfsv4; mkdir -p {folder}; \
             mount -t nfs -o vers=4.2,proto=tcp,{options} {SERVER}:{export} {folder}"
        ));
        folder
    }

    /// Copies to an end that is good, and returns the report.
    #[track_caller]
    pub(crate) fn copy(&self, words: &str) -> Value {
        let text = self.shell(&format!("godwit-agent copy --json {words}"));
        serde_json::from_str(&text).expect("is a report")
    }

    /// How many operations of a kind it has sent for a mount, by the kernel's count.
    #[track_caller]
    pub(crate) fn sent(&self, folder: &str, operation: &str) -> u64 {
        let stats = self.shell("cat /proc/self/mountstats");
        // What is before the first "device" is about no mount.
        let mount = stats.split("device ").find(|mount| mount.contains(&format!(" mounted on {folder} ")));
        let mut lines = mount.unwrap_or_default().lines();
        let line = lines.find_map(|line| line.trim().strip_prefix(&format!("{operation}:")));
        line.and_then(|counts| counts.split_whitespace().next()?.parse().ok()).unwrap_or(0)
    }

    /// Asks for something in a pool's folder as the agent asks its helper.
    pub(crate) fn helper(&self, pool: &str, ask: &str) -> Result<String, VmError> {
        let order = format!("{{\"pool\":\"{pool}\",\"ask\":{ask}}}");
        let mut helper = self.vm.spawn_with(&["godwit-agent", "worker", "pool"], &BTreeMap::new(), &order)?;
        Ok(helper.wait(PATIENCE)?.stdout)
    }
}
