//! An NFS server in a VM: Debian's own, serving version 4 from three exports.

use super::{Builder, Vm, VmError, Wire};

/// Its address on its wire.
pub const ADDRESS: &str = "10.9.0.1";

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

/// The server before it is powered on; it serves after [`serve`].
pub fn builder(wire: &Wire) -> Builder {
    Vm::builder("server")
        .memory_mib(640)
        .disk(1 << 30)
        .disk(1 << 30)
        .disk(48 << 20)
        .wire(wire, &format!("{ADDRESS}/24"))
}

/// Lets it export `/export/xfs`, `/export/ext4` and `/export/small`; also after a loss of power.
///
/// # Errors
/// As [`Vm::exec`].
pub fn serve(server: &Vm) -> Result<(), VmError> {
    server.shell(SERVE)?;
    start_daemon(server)?;
    server.shell("rpc.mountd -N 3").map(drop)
}

/// Lets its threads serve what is exported; also after they were stopped.
///
/// # Errors
/// As [`Vm::exec`].
pub fn start_daemon(server: &Vm) -> Result<(), VmError> {
    server.shell(START_DAEMON).map(drop)
}
