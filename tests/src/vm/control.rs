//! What a test and the first process of a VM say to each other: JSON, one message a line, over a virtio-serial
//! port. Any number of commands may run at once; each has a number that the test gives it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// The port's name.
pub const PORT: &str = "godwit.control";

/// Where the disk of job files is mounted inside.
pub const JOB: &str = "/job";

/// The file in [`JOB`] that tells the first process what it is to set up.
pub const SETUP: &str = "setup.json";

/// What the first process sets up.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Setup {
    /// Host name.
    pub name: String,
    /// For each network card `eth0`, `eth1`, …, its address with prefix, such as "10.9.0.1/24".
    pub addresses: Vec<String>,
}

/// A message to the VM.
#[derive(Debug, Serialize, Deserialize)]
pub struct Request {
    /// The command that it is about.
    pub command: u64,
    /// What is wanted.
    pub ask: Ask,
}

/// What is wanted of a command.
#[derive(Debug, Serialize, Deserialize)]
pub enum Ask {
    /// Start it. Answered by [`Answer::Ended`] or [`Answer::NotStarted`] at its end.
    Start {
        /// Program and arguments.
        words: Vec<String>,
        /// Added to the environment.
        environment: BTreeMap<String, String>,
        /// What it reads.
        stdin: String,
    },
    /// What it has written so far. Answered by [`Answer::Written`].
    Look,
    /// Send it and the processes of its group a signal. Not answered.
    Signal(i32),
    /// Write everything to the disks and power off. Not answered.
    PowerOff,
}

/// A message from the VM.
#[derive(Debug, Serialize, Deserialize)]
pub struct Reply {
    /// The command that it is about; 0 for [`Answer::Ready`].
    pub command: u64,
    /// What is told.
    pub answer: Answer,
}

/// What is told of a command.
#[derive(Debug, Serialize, Deserialize)]
pub enum Answer {
    /// The VM is up. Sent once.
    Ready,
    /// The command could not be started.
    NotStarted(String),
    /// It ended.
    Ended(Output),
    /// What it has written so far.
    Written(Output),
}

/// What a command wrote, and how it ended. Bytes that are no UTF-8 are replaced.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Output {
    /// Exit code; none while it runs or when a signal ended it.
    pub code: Option<i32>,
    /// The signal that ended it.
    pub signal: Option<i32>,
    /// What it wrote to stdout.
    pub stdout: String,
    /// What it wrote to stderr.
    pub stderr: String,
}

impl Output {
    /// Whether it ended with exit code 0.
    pub fn success(&self) -> bool {
        self.code == Some(0)
    }

    /// "exit code 1", "signal 9".
    pub fn status(&self) -> String {
        match (self.code, self.signal) {
            (Some(code), _) => format!("exit code {code}"),
            (None, Some(signal)) => format!("signal {signal}"),
            (None, None) => "still running".to_owned(),
        }
    }
}

/// What a VM's keeper is asked, on its stdin. When that closes, for whatever reason, the keeper ends the VM and
/// removes its folder.
#[derive(Debug, Serialize, Deserialize)]
pub enum KeeperRequest {
    /// Start QEMU with these arguments. Answered.
    Start(Vec<String>),
    /// SIGKILL it: a power loss. Answered when it is gone; it may have ended before.
    Kill,
    /// Stop or continue all its threads. Answered.
    Pause(bool),
    /// Wait at most so many milliseconds for its end. Answered with [`KeeperReply::Running`] when it goes on.
    Wait(u64),
}

/// A keeper's answer.
#[derive(Debug, Serialize, Deserialize)]
pub enum KeeperReply {
    /// QEMU runs, as this process.
    Running(i32),
    /// QEMU is gone, and what it said.
    Gone(String),
    /// Not done, and why.
    Failed(String),
}
