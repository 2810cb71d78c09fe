//! Helper processes: what may hang with a mount is done by a process that the agent can leave behind.
//!
//! The agent's own threads never enter a share: one that waits there for a dead server cannot be ended, and with it
//! the agent could not either. A helper does one thing and ends; a late one is killed with all that it started
//! (mount(8), which would go on and mount when nobody wants it any more), and reaped whenever the kernel lets go of
//! it. The one that looks at a pool each second stays for the next look: starting a process costs more than the look.

use super::StorageError;
use super::folder::{Ask, Told, act};
use godwit_protocol::error::{ErrorKind, RequestError, chain};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};
use std::io::{self, BufRead, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitCode, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Helpers that may be overdue at once. With that many the mount counts as dead, and no further one is started.
const MAX_OVERDUE: usize = 4;

/// A longer answer is no helper's, in bytes.
const MAX_ANSWER_BYTES: usize = 8 << 20;

/// What a helper reads, as JSON, one a line.
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
    /// The one that stays.
    kept: Arc<Mutex<Option<Running>>>,
}

/// A helper that runs.
#[derive(Debug)]
struct Running {
    child: Child,
    stdin: ChildStdin,
    stdout: ChildStdout,
}

impl Helper {
    /// Helpers of that program, which must know `worker pool`.
    pub(super) fn new(program: PathBuf) -> Self {
        Self { program, overdue: Arc::default(), kept: Arc::default() }
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
        // Two looks at once are rare: the second one starts a helper of its own.
        let mut kept = self.kept.try_lock().ok().filter(|_| matches!(ask, Ask::Measure));
        let before = kept.as_mut().and_then(|kept| kept.take());
        match self.listen(before, pool, ask, deadline) {
            Ok(Some((text, running))) => {
                match kept {
                    Some(mut kept) => *kept = Some(running),
                    None => running.end(),
                }
                let answer: Result<Result<Told, RequestError>, _> = serde_json::from_slice(&text);
                Some(match answer {
                    Ok(answer) => answer.map_err(StorageError::Worker),
                    Err(_) => Err(internal(&io::Error::other("its answer is none"))),
                })
            }
            Ok(None) => None,
            Err(error) => Some(Err(internal(&error))),
        }
    }

    /// Asks `before`, or a new helper where there is none or it is gone, and waits for its line; none: it is late, and
    /// left behind.
    fn listen(
        &self,
        before: Option<Running>,
        pool: &Path,
        ask: &Ask,
        deadline: Instant,
    ) -> io::Result<Option<(Vec<u8>, Running)>> {
        let mut order = serde_json::to_vec(&Order { pool: pool.to_owned(), ask: ask.clone() })?;
        order.push(b'\n');
        if let Some(mut running) = before {
            let answer =
                running.stdin.write_all(&order).and_then(|()| read_line(&mut running.stdout, deadline));
            match answer {
                Ok(Some(line)) => return Ok(Some((line, running))),
                Ok(None) => {
                    self.leave(running.child);
                    return Ok(None);
                }
                // Somebody has ended it; another one does as well.
                Err(_) => self.leave(running.child),
            }
        }
        let mut running = self.start(&order)?;
        match read_line(&mut running.stdout, deadline) {
            Ok(Some(line)) => Ok(Some((line, running))),
            other => {
                self.leave(running.child);
                other.map(|_| None)
            }
        }
    }

    fn start(&self, order: &[u8]) -> io::Result<Running> {
        let mut command = Command::new(&self.program);
        // A group of its own, so that what it starts can be ended with it.
        command.args(["worker", "pool"]).stdin(Stdio::piped()).stdout(Stdio::piped()).process_group(0);
        let mut child = command.spawn()?;
        let (Some(mut stdin), Some(stdout)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(io::ErrorKind::BrokenPipe.into());
        };
        // It reads before it touches anything.
        if let Err(error) = stdin.write_all(order) {
            self.leave(child);
            return Err(error);
        }
        Ok(Running { child, stdin, stdout })
    }

    /// Kills a late helper, and reaps it on a thread that waits for the kernel.
    fn leave(&self, mut child: Child) {
        // It fails only when the helper is gone already.
        let _ = killpg(Pid::from_raw(child.id() as i32), Signal::SIGKILL);
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

impl Running {
    /// It has said all, so it ends with its orders.
    fn end(mut self) {
        drop(self.stdin);
        let _ = self.child.wait();
    }
}

fn internal(error: &io::Error) -> StorageError {
    StorageError::Worker(RequestError::new(ErrorKind::Internal, format!("no helper: {error}")))
}

/// The next line that a helper writes; none when it does not come in time.
fn read_line(pipe: &mut ChildStdout, deadline: Instant) -> io::Result<Option<Vec<u8>>> {
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
            Ok(0) => return Err(io::Error::other("it died without an answer")),
            Ok(length) => text.extend_from_slice(&buffer[..length]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
        if text.pop_if(|byte| *byte == b'\n').is_some() {
            return Ok(Some(text));
        }
        if text.len() > MAX_ANSWER_BYTES {
            return Err(io::ErrorKind::InvalidData.into());
        }
    }
}

/// `worker pool`: reads orders from stdin, follows each, and writes what came of it to stdout. It ends with its orders:
/// when whoever gives them is gone.
pub fn run() -> ExitCode {
    for line in io::stdin().lock().lines() {
        let order = line.and_then(|line| serde_json::from_str(&line).map_err(io::Error::from));
        let order: Order = match order {
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
        let line = format!("{}\n", serde_json::json!(answer));
        if io::stdout().write_all(line.as_bytes()).is_err() {
            // Nobody listens any more.
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}
