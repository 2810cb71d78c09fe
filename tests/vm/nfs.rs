//! An NFS server and its clients, each a VM with Debian's kernel.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use godwit_tests::vm::{Vm, VmError, Wire};

/// The server's address.
pub(crate) const SERVER: &str = "10.9.0.1";

/// How long anything may take on a machine that is busy, under emulation.
pub(crate) const PATIENCE: Duration = Duration::from_secs(90);

/// The server's start, at the first boot and after each loss of power: an export on xfs with reflinks, one on ext4, and
/// a small one that is soon full. The state of clients lies on a disk, so that they may
/// claim their locks again. Short leases, so that a restart is not waited for long.
const SERVE: &str = "
modprobe -a nfsd xfs
mountpoint -q /proc/fs/nfsd || mount -t nfsd nfsd /proc/fs/nfsd
# Where Debian's nfsdcld looks for its pipe: without it nothing is known of clients after a restart.
mkdir -p /run/rpc_pipefs
mount -t rpc_pipefs sunrpc /run/rpc_pipefs
blkid /dev/vdc >/dev/null || mkfs.xfs -q -m reflink=1 /dev/vdc
blkid /dev/vdd >/dev/null || mkfs.ext4 -q /dev/vdd
blkid /dev/vde >/dev/null || mkfs.ext4 -q -O ^has_journal -m 0 /dev/vde
mkdir -p /export/xfs /export/ext4 /export/small
mount /dev/vdc /export/xfs
mount /dev/vdd /export/ext4
mount /dev/vde /export/small
mkdir -p /export/ext4/.state /etc/nfs.conf.d
printf '[nfsd]\\nvers3=n\\n[nfsdcld]\\nstoragedir=/export/ext4/.state\\n' > /etc/nfs.conf.d/test.conf
for export in xfs ext4 small; do
  echo \"/export/$export *(rw,sync,no_root_squash,no_subtree_check,insecure)\"
done > /etc/exports
exportfs -ra
nfsdcld
echo 1048576 > /proc/fs/nfsd/max_block_size
";

/// The server's threads begin to serve.
const START_DAEMON: &str = "
# The kernel waits for nfsdcld for a quarter of a second, which under emulation is short; what it takes instead knows
# nobody after a loss of power.
rpc.nfsd -N 3 -G 10 -L 10 4
until dmesg | grep 'NFSD: Using' | tail -n 1 | grep -q nfsdcld; do
  rpc.nfsd 0
  rpc.nfsd -N 3 -G 10 -L 10 4
done
";

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
        let server = Vm::builder("server")
            .memory_mib(640)
            .disk(1 << 30)
            .disk(1 << 30)
            .disk(48 << 20)
            .wire(&wire, "10.9.0.1/24")
            .start()
            .expect("the server starts");
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
        let builder = Vm::builder(&name).cpus(2).memory_mib(1280).deadline(Duration::from_secs(900));
        let builder = files.iter().fold(builder, |builder, (path, name)| builder.file(path, name));
        let builder = builder.program("godwit").program("godwit-agent").program("godwit-coordinator");
        let vm = builder.wire(&self.wire, &format!("10.9.0.1{number}/24")).start();
        Client { vm: vm.expect("the client starts") }
    }

    /// Lets the server export; also after a loss of power.
    pub(crate) fn serve(&self) {
        self.server.shell(SERVE).expect("the server exports");
        self.start_daemon();
        self.server.shell("rpc.mountd -N 3").expect("the server lets mount");
    }

    /// Lets the server's threads serve what is exported; also after they were stopped.
    pub(crate) fn start_daemon(&self) {
        self.server.shell(START_DAEMON).expect("the server serves");
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

    /// Asks for something in a pool's folder as the agent asks its helper.
    pub(crate) fn helper(&self, pool: &str, ask: &str) -> Result<String, VmError> {
        let order = format!("{{\"pool\":\"{pool}\",\"ask\":{ask}}}");
        let mut helper = self.vm.spawn_with(&["godwit-agent", "worker", "pool"], &BTreeMap::new(), &order)?;
        Ok(helper.wait(PATIENCE)?.stdout)
    }
}
