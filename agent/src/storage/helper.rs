//! Helper processes: what may hang with a mount is done by a process that the agent can leave behind.
//!
//! The agent's own threads never enter a share: one that waits there for a dead server cannot be ended, and with it
//! the agent could not either. A helper does one thing and ends; a late one is killed, and reaped whenever the kernel
//! lets go of it.

use super::StorageError;
use super::folder::{Ask, Told, act};
use crate::hypervisor::chain;
use godwit_protocol::error::{ErrorKind, RequestError};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::{Deserialize, Serialize};
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// Helpers that may be overdue at once. With that many the mount counts as dead, and no further one is started.
const MAX_OVERDUE: usize = 4;

/// A longer answer is no helper's, in bytes.
const MAX_ANSWER_BYTES: usize = 8 << 20;

/// What a helper reads.
#[derive(Debug, Serialize, Deserialize)]
struct Order {
    pool: PathBuf,
    ask: Ask,
}

/// Starts helpers. Clones count together.
#[derive(Clone, Debug)]
pub(super) struct Helper {
    program: PathBuf,
    overdue: Arc<AtomicUsize>,
}

impl Helper {
    /// Helpers of that program, which must know `worker pool`.
    pub(super) fn new(program: PathBuf) -> Self {
        Self { program, overdue: Arc::default() }
    }

    /// What a helper says; none when it does not within `deadline`, or when too many hang already.
    ///
    /// # Errors
    /// The helper's own; [`ErrorKind::Internal`] when it does not start or dies.
    pub(super) fn ask(
        &self,
        pool: &Path,
        deadline: Duration,
        ask: &Ask,
    ) -> Option<Result<Told, StorageError>> {
        if self.overdue.load(Ordering::Relaxed) >= MAX_OVERDUE {
            return None;
        }
        let deadline = Instant::now() + deadline;
        let internal = |error: io::Error| {
            StorageError::Worker(RequestError::new(ErrorKind::Internal, format!("no helper: {error}")))
        };
        let mut child = match self.start(pool, ask) {
            Ok(child) => child,
            Err(error) => return Some(Err(internal(error))),
        };
        match listen(&mut child, deadline) {
            Ok(Some(text)) => {
                // It has said all, so it ends.
                let _ = child.wait();
                let answer: Result<Result<Told, RequestError>, _> = serde_json::from_slice(&text);
                Some(match answer {
                    Ok(answer) => answer.map_err(StorageError::Worker),
                    Err(_) => Err(internal(io::Error::other("it died without an answer"))),
                })
            }
            Ok(None) => {
                self.leave(child);
                None
            }
            Err(error) => {
                self.leave(child);
                Some(Err(internal(error)))
            }
        }
    }

    fn start(&self, pool: &Path, ask: &Ask) -> io::Result<Child> {
        let mut command = Command::new(&self.program);
        command.args(["worker", "pool"]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn()?;
        let order = serde_json::to_vec(&Order { pool: pool.to_owned(), ask: ask.clone() })?;
        // It reads before it touches anything.
        let written = child.stdin.take().map(|mut stdin| stdin.write_all(&order));
        if let Some(Err(error)) = written {
            let _ = child.kill();
            let _ = child.wait();
            return Err(error);
        }
        Ok(child)
    }

    /// Kills a late helper, and reaps it on a thread that waits for the kernel.
    fn leave(&self, mut child: Child) {
        // It fails only when the helper is gone already.
        let _ = child.kill();
        if matches!(child.try_wait(), Ok(Some(_))) {
            return;
        }
        self.overdue.fetch_add(1, Ordering::Relaxed);
        let overdue = self.overdue.clone();
        let reaping = std::thread::Builder::new().name("reaper".to_owned()).spawn(move || {
            let _ = child.wait();
            overdue.fetch_sub(1, Ordering::Relaxed);
        });
        if let Err(error) = reaping {
            tracing::warn!("a helper cannot be reaped: {error}");
        }
    }
}

/// All that a helper writes; none when it is not done in time.
fn listen(child: &mut Child, deadline: Instant) -> io::Result<Option<Vec<u8>>> {
    let mut pipe = child.stdout.take().ok_or(io::ErrorKind::BrokenPipe)?;
    let mut text = Vec::new();
    let mut buffer = [0; 16 << 10];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        // Rounded up, so that the last wait is not one of nothing.
        let left_ms = u16::try_from(left.as_millis() + 1).unwrap_or(u16::MAX);
        let mut ready = [PollFd::new(pipe.as_fd(), PollFlags::POLLIN)];
        match poll(&mut ready, PollTimeout::from(left_ms)) {
            Ok(0) if Instant::now() >= deadline => return Ok(None),
            Ok(0) | Err(nix::errno::Errno::EINTR) => continue,
            Ok(_) => {}
            Err(error) => return Err(error.into()),
        }
        match pipe.read(&mut buffer) {
            Ok(0) => return Ok(Some(text)),
            Ok(length) => text.extend_from_slice(&buffer[..length]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
        if text.len() > MAX_ANSWER_BYTES {
            return Err(io::ErrorKind::InvalidData.into());
        }
    }
}

/// `worker pool`: reads an order from stdin, follows it, and writes what came of it to stdout.
pub fn run() -> ExitCode {
    let mut text = Vec::new();
    let read = io::stdin().read_to_end(&mut text);
    let order: Order = match read.and_then(|_| serde_json::from_slice(&text).map_err(io::Error::from)) {
        Ok(order) => order,
        Err(error) => {
            eprintln!("`worker pool` is started by the agent: {error}");
            return ExitCode::FAILURE;
        }
    };
    let answer = act(&order.pool, &order.ask).map_err(|error| {
        let text = chain(&error);
        RequestError { message: text, ..RequestError::from(error) }
    });
    // Nobody listens any more when this fails.
    let written = io::stdout().write_all(serde_json::json!(answer).to_string().as_bytes());
    if written.is_ok() && answer.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
