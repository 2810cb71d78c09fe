//! The first process of a VM: sets it up, starts the one that serves the test, and reaps what others leave.

use std::io;
use std::path::Path;
use std::process::{Command, Stdio};

use godwit_tests::vm::control::{JOB, SETUP, Setup};
use nix::mount::{MsFlags, mount};
use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::wait::{WaitStatus, wait};

const MOUNTS: [(&str, &str); 9] = [
    ("devpts", "/dev/pts"),
    ("tmpfs", "/dev/shm"),
    ("tmpfs", "/run"),
    ("tmpfs", "/tmp"),
    ("cgroup2", "/sys/fs/cgroup"),
    ("bpf", "/sys/fs/bpf"),
    ("tracefs", "/sys/kernel/tracing"),
    ("debugfs", "/sys/kernel/debug"),
    ("hugetlbfs", "/dev/hugepages"),
];

/// Does not return while the VM is on.
pub(crate) fn run() -> io::Result<()> {
    let error = match set_up().and_then(|()| serve()) {
        Ok(()) => "the process that serves the test has ended".to_owned(),
        Err(error) => error.to_string(),
    };
    // On the console, where the test looks when a VM is gone.
    eprintln!("vm-lab: {error}; the VM powers off");
    power_off()
}

/// Powers off; what is mounted has been synced.
pub(crate) fn power_off() -> io::Result<()> {
    nix::unistd::sync();
    reboot(RebootMode::RB_POWER_OFF)?;
    Ok(())
}

fn set_up() -> io::Result<()> {
    for (kind, target) in MOUNTS {
        std::fs::create_dir_all(target)?;
        let flags = MsFlags::MS_NOSUID;
        mount(Some(kind), target, Some(kind), flags, None::<&str>)
            .map_err(|error| io::Error::other(format!("cannot mount {target}: {error}")))?;
    }
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_SHARED, None::<&str>)?;
    let text = std::fs::read_to_string(Path::new(JOB).join(SETUP))?;
    let setup: Setup = serde_json::from_str(&text)?;
    std::fs::write("/proc/sys/kernel/hostname", &setup.name)?;
    std::fs::write("/etc/hostname", format!("{}\n", setup.name))?;
    std::fs::write("/etc/hosts", format!("127.0.0.1 localhost {}\n", setup.name))?;
    command(&["ip", "link", "set", "lo", "up"])?;
    command(&["modprobe", "-a", "virtio_rng", "virtio_net"])?;
    for (number, address) in setup.addresses.iter().enumerate() {
        let link = format!("eth{number}");
        command(&["ip", "address", "add", address, "dev", &link])?;
        // The wire has no limit of its own below this, and large frames are cheap where every packet is emulated.
        command(&["ip", "link", "set", &link, "mtu", "9000", "up"])?;
    }
    Ok(())
}

fn command(words: &[&str]) -> io::Result<()> {
    let status = Command::new(words[0]).args(&words[1..]).env("PATH", super::serve::PATH).status()?;
    if status.success() { Ok(()) } else { Err(io::Error::other(format!("{words:?} failed ({status})"))) }
}

/// Starts the serving process and waits for its end, and for that of every orphan.
fn serve() -> io::Result<()> {
    let mut server = Command::new("/proc/self/exe");
    let server = server.arg("serve").stdin(Stdio::null()).spawn()?;
    loop {
        match wait()? {
            WaitStatus::Exited(process, _) | WaitStatus::Signaled(process, ..)
                if process.as_raw() == server.id() as i32 =>
            {
                return Ok(());
            }
            _ => {}
        }
    }
}
