//! What the lab and the first process of a namespace say to each other: JSON, one message a line, over the
//! socket that is that process's stdin.
//!
//! The socket is also the lifeline: when the lab's end closes, for whatever reason, the namespace ends.

use std::collections::BTreeMap;
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// The first message to a new namespace: what to make of it.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Setup {
    /// Host name, where the UTS namespace is a new one.
    pub host_name: Option<String>,
    /// Mounts, in order.
    pub mounts: Vec<Mount>,
    /// At the end, once every holder of the lock file in it is gone, remove this folder.
    pub remove_at_end: Option<PathBuf>,
}

/// One mount of a namespace.
#[derive(Debug, Serialize, Deserialize)]
pub enum Mount {
    /// Shows `source` at `target`.
    Bind {
        /// An existing folder or file.
        source: PathBuf,
        /// An existing folder or file, covered from now on.
        target: PathBuf,
    },
    /// A kernel file system of this type, which shows what the namespace may see.
    Kernel {
        /// "proc", "sysfs", "bpf".
        kind: String,
        /// An existing folder or file.
        target: PathBuf,
    },
}

/// A program that a host's first process starts and looks after.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Service {
    /// What requests call it.
    pub name: String,
    /// The program.
    pub program: PathBuf,
    /// Its arguments.
    pub arguments: Vec<String>,
    /// Added to the environment.
    pub environment: BTreeMap<String, String>,
    /// Where stdout and stderr are appended.
    pub log: PathBuf,
    /// Start it again whenever it ends.
    pub restart: bool,
}

/// What the lab may ask of a namespace's first process. Each request is answered by one [`Reply`].
#[derive(Debug, Serialize, Deserialize)]
pub enum Request {
    /// Start a service; one of the same name must not be running.
    Start(Service),
    /// Send a signal to a service, and do not start it again.
    Stop {
        /// The service.
        name: String,
        /// As in signal(7); 0 sends none.
        signal: i32,
    },
    /// Send a signal to a service; it is started again if it is one to be restarted.
    Signal {
        /// The service.
        name: String,
        /// As in signal(7).
        signal: i32,
    },
    /// The service's process.
    Status {
        /// The service.
        name: String,
    },
}

/// An answer, or one of the two announcements at the start.
#[derive(Debug, Serialize, Deserialize)]
pub enum Reply {
    /// The namespace's first process, by its number outside. Sent once, before anything else.
    Created {
        /// Process number in the lab's own PID namespace.
        process: i32,
    },
    /// Done.
    Done,
    /// The service's process, by its number inside the namespace; none while it does not run.
    Process(Option<i32>),
    /// Not done, and why.
    Failed(String),
}

/// One end of the conversation.
#[derive(Debug)]
pub struct Channel {
    reader: BufReader<UnixStream>,
}

impl Channel {
    /// A conversation over `stream`.
    pub fn new(stream: UnixStream) -> Channel {
        Channel { reader: BufReader::new(stream) }
    }

    /// Sends one message.
    pub fn send(&mut self, message: &impl Serialize) -> io::Result<()> {
        let mut line = serde_json::to_vec(message)?;
        line.push(b'\n');
        self.reader.get_mut().write_all(&line)
    }

    /// The next message; none when the other end is closed.
    pub fn receive<T: DeserializeOwned>(&mut self) -> io::Result<Option<T>> {
        let mut line = String::new();
        match self.reader.read_line(&mut line)? {
            0 => Ok(None),
            _ => Ok(Some(serde_json::from_str(&line)?)),
        }
    }

    /// A second handle for sending.
    pub fn sender(&self) -> io::Result<Channel> {
        Ok(Channel::new(self.reader.get_ref().try_clone()?))
    }
}
