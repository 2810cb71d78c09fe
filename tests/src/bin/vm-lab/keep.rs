//! Outside of the VM: starts QEMU, and ends it with the test.

use std::fs::File;
use std::io::{self, Read as _};
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use godwit_tests::lab::control::Channel;
use godwit_tests::vm::control::{KeeperReply, KeeperRequest};
use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const LOOK_EVERY: Duration = Duration::from_millis(10);

/// Serves until stdin closes or the time is up. `folder` goes last.
pub(crate) fn run(folder: &Path, seconds: &str) -> io::Result<()> {
    let seconds: u64 = seconds.parse().map_err(io::Error::other)?;
    let deadline = Instant::now() + Duration::from_secs(seconds);
    // Tells others that the folder is in use.
    let lock = File::open(folder)?;
    let _lock = Flock::lock(lock, FlockArg::LockExclusiveNonblock).map_err(|(_, error)| error)?;
    let mut lifeline = Channel::new(UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?));
    let mut replies = lifeline.sender()?;
    let (sender, requests) = channel();
    std::thread::spawn(move || {
        while let Ok(Some(request)) = lifeline.receive::<KeeperRequest>() {
            if sender.send(request).is_err() {
                return;
            }
        }
    });
    let mut machine = Machine { child: None };
    loop {
        match requests.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(request) => {
                let reply = machine.answer(request).unwrap_or_else(|e| KeeperReply::Failed(e.to_string()));
                // A test that is gone closes its end, which is seen next.
                let _ = replies.send(&reply);
            }
            Err(end) => {
                machine.kill()?;
                if end == RecvTimeoutError::Timeout {
                    eprintln!("vm-lab: a VM was ended after {seconds} s, its deadline");
                    // The test sees a VM that is off; it may still want to know what the console said.
                    while requests.recv().is_ok_and(|_| {
                        replies.send(&KeeperReply::Gone("ended at its deadline".to_owned())).is_ok()
                    }) {}
                }
                return std::fs::remove_dir_all(folder);
            }
        }
    }
}

struct Machine {
    child: Option<Child>,
}

impl Machine {
    fn answer(&mut self, request: KeeperRequest) -> io::Result<KeeperReply> {
        match request {
            KeeperRequest::Start(arguments) => self.start(&arguments),
            KeeperRequest::Kill => self.kill(),
            KeeperRequest::Pause(pause) => {
                if let Some(child) = &self.child {
                    let signal = if pause { Signal::SIGSTOP } else { Signal::SIGCONT };
                    kill(Pid::from_raw(child.id() as i32), signal)?;
                }
                self.wait(Duration::ZERO)
            }
            KeeperRequest::Wait(milliseconds) => self.wait(Duration::from_millis(milliseconds)),
        }
    }

    fn start(&mut self, arguments: &[String]) -> io::Result<KeeperReply> {
        if self.child.is_some() {
            return Err(io::Error::other("it runs already"));
        }
        let mut command = Command::new("/proc/self/exe");
        command.arg("exec").arg("qemu-system-x86_64").args(arguments);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let child = command.spawn()?;
        let reply = KeeperReply::Running(child.id() as i32);
        self.child = Some(child);
        Ok(reply)
    }

    fn kill(&mut self) -> io::Result<KeeperReply> {
        if let Some(child) = &mut self.child {
            child.kill()?;
        }
        self.wait(Duration::MAX)
    }

    /// Waits for QEMU's end, at most for so long.
    fn wait(&mut self, patience: Duration) -> io::Result<KeeperReply> {
        let deadline = Instant::now().checked_add(patience);
        let Some(child) = &mut self.child else { return Ok(KeeperReply::Gone(String::new())) };
        let status = loop {
            match child.try_wait()? {
                Some(status) => break status,
                None if deadline.is_some_and(|deadline| Instant::now() >= deadline) => {
                    return Ok(KeeperReply::Running(child.id() as i32));
                }
                None => std::thread::sleep(LOOK_EVERY),
            }
        };
        let mut said = String::new();
        if let Some(mut stderr) = child.stderr.take() {
            // Whatever can be read: it is for a person.
            let _ = stderr.read_to_string(&mut said);
        }
        self.child = None;
        Ok(KeeperReply::Gone(format!("{} ({status})", said.trim())))
    }
}
