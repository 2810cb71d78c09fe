//! QEMU, through its keeper.

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::control::{KeeperReply, KeeperRequest, PORT};
use super::{Builder, VmError, VmImage};
use crate::lab::control::Channel;

/// How long QEMU may take to open its socket.
const QEMU_WITHIN: Duration = Duration::from_secs(30);

/// The keeper of one VM. Dropping it ends the VM and removes its folder.
#[derive(Debug)]
pub(super) struct Machine {
    vm: String,
    keeper: Child,
    channel: Mutex<Option<Channel>>,
}

impl Machine {
    /// Starts the keeper, which owns `folder` from now on.
    pub(super) fn keep(
        vm: &str,
        program: &Path,
        folder: &Path,
        deadline: Duration,
    ) -> Result<Machine, VmError> {
        let failed = |what: &str| VmError::io(format!("{vm}: {what}"));
        let (ours, theirs) = UnixStream::pair().map_err(failed("cannot make a socket"))?;
        let mut command = Command::new(program);
        command.arg("keep").arg(folder).arg(deadline.as_secs().to_string());
        // A group of its own, so that Ctrl-C reaches this process only, and the VM ends in order.
        command.stdin(Stdio::from(OwnedFd::from(theirs))).process_group(0);
        let keeper = command.spawn().map_err(failed("cannot start vm-lab"))?;
        // The command holds the other end of the socket; while it is there, no end of file would ever come.
        drop(command);
        Ok(Machine { vm: vm.to_owned(), keeper, channel: Mutex::new(Some(Channel::new(ours))) })
    }

    /// Starts QEMU and connects to the port.
    pub(super) fn start(&self, arguments: &[String], folder: &Path) -> Result<UnixStream, VmError> {
        let socket = folder.join("control");
        let _ = fs::remove_file(&socket);
        self.ask(&KeeperRequest::Start(arguments.to_vec()))?;
        let deadline = Instant::now() + QEMU_WITHIN;
        loop {
            if let Ok(stream) = UnixStream::connect(&socket) {
                return Ok(stream);
            }
            if let KeeperReply::Gone(message) = self.ask(&KeeperRequest::Wait(20))? {
                return Err(VmError::Qemu { vm: self.vm.clone(), message });
            }
            if Instant::now() >= deadline {
                let what = "QEMU's start".to_owned();
                return Err(VmError::Late { vm: self.vm.clone(), what, seconds: QEMU_WITHIN.as_secs() });
            }
        }
    }

    pub(super) fn kill(&self) -> Result<(), VmError> {
        self.ask(&KeeperRequest::Kill).map(drop)
    }

    pub(super) fn pause(&self, pause: bool) -> Result<(), VmError> {
        self.ask(&KeeperRequest::Pause(pause)).map(drop)
    }

    /// Waits for QEMU's own end.
    pub(super) fn wait(&self, patience: Duration) -> Result<(), VmError> {
        match self.ask(&KeeperRequest::Wait(patience.as_millis() as u64))? {
            KeeperReply::Gone(_) => Ok(()),
            _ => Err(VmError::Late {
                vm: self.vm.clone(),
                what: "powering off".to_owned(),
                seconds: patience.as_secs(),
            }),
        }
    }

    /// What QEMU said at its end.
    pub(super) fn last_words(&self) -> String {
        match self.ask(&KeeperRequest::Wait(1000)) {
            Ok(KeeperReply::Gone(message)) => message,
            Ok(_) => "it runs, but its port is closed".to_owned(),
            Err(error) => error.to_string(),
        }
    }

    fn ask(&self, request: &KeeperRequest) -> Result<KeeperReply, VmError> {
        let mut channel = self.channel.lock().unwrap_or_else(PoisonError::into_inner);
        let gone = || VmError::PoweredOff { vm: self.vm.clone() };
        let channel = channel.as_mut().ok_or_else(gone)?;
        let reply = channel.send(request).and_then(|()| channel.receive());
        match reply.map_err(VmError::io(format!("{}: vm-lab does not answer", self.vm)))? {
            Some(KeeperReply::Failed(message)) => Err(VmError::Qemu { vm: self.vm.clone(), message }),
            Some(reply) => Ok(reply),
            None => Err(gone()),
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // The lifeline; the keeper ends when all is gone.
        *self.channel.lock().unwrap_or_else(PoisonError::into_inner) = None;
        let _ = self.keeper.wait();
    }
}

/// QEMU's command line.
pub(super) fn arguments(builder: &Builder, image: &VmImage, folder: &Path) -> Vec<String> {
    let mut line = Line(Vec::new());
    let file = |name: &str| folder.join(name).display().to_string();
    line.add("-machine", "q35");
    line.add("-accel", "tcg,thread=multi");
    line.add("-cpu", "max");
    cells(builder, &mut line);
    line.0.extend(["-nodefaults", "-no-user-config", "-no-reboot"].map(str::to_owned));
    line.add("-display", "none");
    let [release, its_initramfs] = &image.release;
    let (kernel, initramfs) =
        if builder.release_kernel { (release, its_initramfs) } else { (&image.kernel, &image.initramfs) };
    line.add("-kernel", &kernel.display().to_string());
    line.add("-initrd", &initramfs.display().to_string());
    let kernel = "console=ttyS0 quiet loglevel=4 panic=-1 mitigations=off nokaslr tsc=reliable no_timer_check \
                  random.trust_cpu=on";
    line.add("-append", &format!("{kernel} {}", builder.kernel_arguments));
    line.add("-serial", &format!("file:{}", file("console")));
    // QEMU writes to a copy of its own that has no name, so that VMs share the root.
    let root = image.root.display();
    line.disk(&format!("file={root},snapshot=on,file.locking=off"));
    line.disk(&format!("file={},read-only=on", file("job.ext4")));
    for number in 0..builder.disks.len() {
        line.disk(&format!("file={},discard=unmap", file(&format!("disk{number}"))));
    }
    line.add("-device", "virtio-serial-pci");
    line.add("-chardev", &format!("socket,id=control,path={},server=on,wait=off", file("control")));
    line.add("-device", &format!("virtserialport,chardev=control,name={PORT}"));
    line.add("-device", "virtio-rng-pci");
    for (number, (wire, _)) in builder.wires.iter().enumerate() {
        let path = wire.path().display();
        line.add(
            "-netdev",
            &format!("stream,id=n{number},server=off,addr.type=unix,addr.path={path},reconnect-ms=100"),
        );
        let address = wire.new_address();
        line.add("-device", &format!("virtio-net-pci,netdev=n{number},romfile=,mac={address},host_mtu=9000"));
    }
    line.0
}

fn cells(builder: &Builder, line: &mut Line) {
    if builder.cells.is_empty() {
        line.add("-smp", &builder.cpus.to_string());
        line.add("-m", &builder.memory_mib.to_string());
        return;
    }
    let cpus: u32 = builder.cells.iter().map(|cell| cell.cpus.clone().count() as u32).sum();
    let memory: u64 = builder.cells.iter().map(|cell| cell.memory_mib).sum();
    line.add(
        "-smp",
        &format!("{cpus},sockets={},cores={}", builder.cells.len(), cpus / builder.cells.len() as u32),
    );
    line.add("-m", &memory.to_string());
    for (number, cell) in builder.cells.iter().enumerate() {
        line.add("-object", &format!("memory-backend-ram,id=m{number},size={}M", cell.memory_mib));
        let (first, last) = (cell.cpus.start(), cell.cpus.end());
        line.add("-numa", &format!("node,nodeid={number},cpus={first}-{last},memdev=m{number}"));
    }
    for (one, other, distance) in &builder.distances {
        line.add("-numa", &format!("dist,src={one},dst={other},val={distance}"));
    }
}

struct Line(Vec<String>);

impl Line {
    fn add(&mut self, option: &str, value: &str) {
        self.0.extend([option.to_owned(), value.to_owned()]);
    }

    fn disk(&mut self, file: &str) {
        let number = self.0.iter().filter(|word| *word == "-drive").count();
        self.add("-drive", &format!("if=none,id=d{number},format=raw,{file}"));
        self.add("-device", &format!("virtio-blk-pci,drive=d{number}"));
    }
}
