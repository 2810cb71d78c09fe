//! A set of namespaces held by a process, and programs run inside it.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::LabError;
use super::control::{Channel, Reply, Request, Setup};

/// Longer than any answer takes; the first process only ever starts programs and sends signals.
const PATIENCE: Duration = Duration::from_secs(20);

/// Namespaces that live until this is dropped, or until this process ends in whatever way.
#[derive(Debug)]
pub(super) struct Namespace {
    name: String,
    keeper: PathBuf,
    process: i32,
    channel: Mutex<Option<Channel>>,
    creator: Child,
}

impl Namespace {
    /// Makes namespaces of the given kinds ("net,mount,uts,ipc,pid"), set up as `setup` says. `keeper` is the
    /// program lab-host; `options` are passed on to it.
    pub(super) fn create(
        name: &str,
        keeper: &Path,
        kinds: &str,
        options: &[&str],
        setup: &Setup,
    ) -> Result<Namespace, LabError> {
        let failed = |what: &str| LabError::io(format!("{name}: {what}"));
        let (ours, theirs) = UnixStream::pair().map_err(failed("cannot make a socket"))?;
        ours.set_read_timeout(Some(PATIENCE)).map_err(failed("cannot set a timeout"))?;
        let mut command = Command::new(keeper);
        command.arg("create").arg(kinds).args(options).stdin(Stdio::from(OwnedFd::from(theirs)));
        // A group of its own, so that Ctrl-C reaches this process only, and the rest ends in order.
        command.stdout(Stdio::null()).process_group(0);
        let creator = command.spawn().map_err(failed("cannot start lab-host"))?;
        // From here on the namespace's destructor ends what was started.
        let mut namespace = Namespace {
            name: name.to_owned(),
            keeper: keeper.to_path_buf(),
            process: 0,
            channel: Mutex::new(None),
            creator,
        };
        // The command holds the other end of the socket; while it is there, no end of file would ever come.
        drop(command);
        let mut channel = Channel::new(ours);
        channel.send(setup).map_err(failed("cannot talk to lab-host"))?;
        let mut ready = false;
        while namespace.process == 0 || !ready {
            match channel.receive().map_err(failed("lab-host does not answer"))? {
                Some(Reply::Created { process }) => namespace.process = process,
                Some(Reply::Done) => ready = true,
                Some(Reply::Failed(message)) => {
                    return Err(LabError::Host { host: name.to_owned(), message });
                }
                Some(Reply::Process(_)) | None => {
                    return Err(LabError::Host {
                        host: name.to_owned(),
                        message: "lab-host ended".to_owned(),
                    });
                }
            }
        }
        namespace.channel = Mutex::new(Some(channel));
        Ok(namespace)
    }

    /// The first process, by its number in this process's PID namespace.
    pub(super) fn process(&self) -> i32 {
        self.process
    }

    /// Asks the first process.
    pub(super) fn ask(&self, request: &Request) -> Result<Reply, LabError> {
        let mut channel = self.channel();
        let channel = channel.as_mut().ok_or_else(|| LabError::PoweredOff { host: self.name.clone() })?;
        let asked = channel.send(request).and_then(|()| channel.receive());
        match asked.map_err(LabError::io(format!("{}: lab-host does not answer", self.name)))? {
            Some(Reply::Failed(message)) => Err(LabError::Host { host: self.name.clone(), message }),
            Some(reply) => Ok(reply),
            None => Err(LabError::PoweredOff { host: self.name.clone() }),
        }
    }

    /// A command that will run inside these namespaces and die with this process's child that it becomes.
    pub(super) fn command<S: AsRef<std::ffi::OsStr>>(&self, words: &[S]) -> Command {
        let mut command = Command::new(&self.keeper);
        command.arg("enter").arg(self.process.to_string()).arg("--").args(words);
        let path = std::env::var("PATH").unwrap_or_default();
        command.env("PATH", format!("{path}:/usr/local/sbin:/usr/sbin:/sbin")).env("LC_ALL", "C.UTF-8");
        command
    }

    /// Runs a command inside these namespaces to its end.
    pub(super) fn output<S: AsRef<std::ffi::OsStr>>(&self, words: &[S]) -> Result<Output, LabError> {
        self.command(words).stdin(Stdio::null()).output().map_err(LabError::io(format!(
            "{}: cannot start {}",
            self.name,
            line(words)
        )))
    }

    /// Like [`Self::output`]; anything but exit code 0 is an error. Returns stdout.
    pub(super) fn run<S: AsRef<std::ffi::OsStr>>(&self, words: &[S]) -> Result<String, LabError> {
        let output = self.output(words)?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        Err(LabError::Command {
            host: self.name.clone(),
            command: line(words),
            status: output.status,
            stderr: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
        })
    }

    /// Kills the first process, and with a PID namespace all others; returns when all are gone.
    pub(super) fn kill(&mut self) -> io::Result<()> {
        if self.process != 0 {
            // It may have ended by itself, and is not waited for by anyone but its creator.
            let _ = kill(Pid::from_raw(self.process), Signal::SIGKILL);
        }
        self.end()
    }

    /// Closes the lifeline, and returns when all that was in the namespaces is gone.
    fn end(&mut self) -> io::Result<()> {
        *self.channel() = None;
        self.creator.wait().map(drop)
    }

    fn channel(&self) -> MutexGuard<'_, Option<Channel>> {
        self.channel.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        // Nothing can be done about a failure here: the process is gone, or not ours.
        let _ = self.end();
    }
}

pub(super) fn line<S: AsRef<std::ffi::OsStr>>(words: &[S]) -> String {
    words.iter().map(|word| word.as_ref().to_string_lossy()).collect::<Vec<_>>().join(" ")
}
