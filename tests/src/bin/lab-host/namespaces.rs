//! Making namespaces and entering them.
//!
//! A PID namespace takes in children only, so each of these processes starts a child and waits for it.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Command, ExitCode, ExitStatus};

use godwit_tests::lab::control::{Channel, Reply};
use nix::fcntl::{Flock, FlockArg};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::prctl;
use nix::sys::signal::Signal;

/// Makes the namespaces named in `kinds` ("net,mount,uts,ipc,pid"), starts `lab-host init` in them with this
/// process's stdin, and waits until all that was in them is gone. `--inside PID` starts from the namespaces of
/// that process; `--lock FILE` holds a shared lock meanwhile.
pub(crate) fn create(kinds: &str, options: &[&str]) -> io::Result<ExitCode> {
    let program = std::env::current_exe()?;
    let mut lock = None;
    for option in options.chunks(2) {
        match option {
            ["--inside", process] => join(process)?,
            ["--lock", path] => {
                let file = File::open(path)?;
                lock = Some(Flock::lock(file, FlockArg::LockShared).map_err(|(_, error)| error)?);
            }
            _ => return Err(io::Error::other(format!("what is {option:?}?"))),
        }
    }
    let mut flags = CloneFlags::empty();
    for kind in kinds.split(',') {
        flags |= match kind {
            "net" => CloneFlags::CLONE_NEWNET,
            "mount" => CloneFlags::CLONE_NEWNS,
            "uts" => CloneFlags::CLONE_NEWUTS,
            "ipc" => CloneFlags::CLONE_NEWIPC,
            "pid" => CloneFlags::CLONE_NEWPID,
            _ => return Err(io::Error::other(format!("no namespace is called {kind}"))),
        };
    }
    unshare(flags)?;
    if flags.contains(CloneFlags::CLONE_NEWNS) {
        // Without this, mounts made here would show outside, and outlive the lab.
        mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)?;
    }
    let mut child = Command::new(program).arg("init").spawn()?;
    let lifeline = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
    Channel::new(lifeline).send(&Reply::Created { process: child.id() as i32 })?;
    // The wait ends when the first process and, if it was PID 1, all others of its namespace have ended.
    let status = child.wait()?;
    drop(lock);
    Ok(exit_code(status))
}

/// Runs `command` inside the namespaces of `process`, with this process's stdin and output. The command dies
/// when this process does.
pub(crate) fn enter(process: &str, command: &[&str]) -> io::Result<ExitCode> {
    let program = std::env::current_exe()?;
    join(process)?;
    let status = Command::new(program).arg("exec").args(command).status()?;
    Ok(exit_code(status))
}

/// Becomes `command`, which is killed when its parent ends.
pub(crate) fn exec(command: &[&str]) -> io::Result<ExitCode> {
    prctl::set_pdeathsig(Signal::SIGKILL)?;
    let error = Command::new(command[0]).args(&command[1..]).exec();
    Err(io::Error::new(error.kind(), format!("cannot start {}: {error}", command[0])))
}

/// Moves this process into the namespaces of `process`, and its future children into its PID namespace.
fn join(process: &str) -> io::Result<()> {
    let folder = PathBuf::from("/proc").join(process).join("ns");
    let kinds = [
        ("ipc", CloneFlags::CLONE_NEWIPC),
        ("uts", CloneFlags::CLONE_NEWUTS),
        ("net", CloneFlags::CLONE_NEWNET),
        ("pid", CloneFlags::CLONE_NEWPID),
        ("mnt", CloneFlags::CLONE_NEWNS),
    ];
    let opened: Vec<(File, CloneFlags)> = kinds
        .into_iter()
        .map(|(name, flag)| Ok((File::open(folder.join(name))?, flag)))
        .collect::<io::Result<_>>()
        .map_err(|error| io::Error::new(error.kind(), format!("the host is not running: {error}")))?;
    for (file, flag) in opened {
        setns(file, flag)?;
    }
    Ok(())
}

fn exit_code(status: ExitStatus) -> ExitCode {
    let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
    ExitCode::from(u8::try_from(code).unwrap_or(1))
}
