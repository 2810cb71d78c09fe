//! Worker processes: the parent's side, which starts, watches and ends one, and the worker's own.
//!
//! A copy runs in a process of its own so that a dead mount can hold that process and never the agent. A worker
//! dies with the agent: an orphan would go on writing to a disk whose fate somebody else decides by then.

use super::command::{CopyArgs, say};
use super::copy::{self, CopyReport, journal, partial};
use super::stalls::{Stalls, Watch};
use crate::hypervisor::Cancel;
use godwit_protocol::error::{ErrorKind, RequestError};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

pub use super::copy::{CopyOrder, Options};

/// Least time between two reports of progress.
const REPORT_EVERY: Duration = Duration::from_millis(250);

/// How often the parent looks whether it was cancelled.
const LOOK_EVERY_MS: u16 = 100;

/// How long a killed worker may take to go; one that a dead mount holds is then left to a thread that waits for it.
const REAP_WITHIN: Duration = Duration::from_secs(2);

/// A line longer than this is no worker's, in bytes.
const MAX_LINE_BYTES: usize = 64 << 10;

/// A line that a worker writes for its parent, as JSON.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Line {
    /// It goes on.
    Progress {
        /// Bytes done.
        done_bytes: u64,
        /// Bytes in all.
        total_bytes: u64,
    },
    /// The end.
    Finished(Result<CopyReport, RequestError>),
}

/// `worker copy SRC DST`.
#[derive(Clone, Debug, clap::Args)]
pub struct WorkerArgs {
    #[command(flatten)]
    copy: CopyArgs,
    /// Die with this process, which started the worker
    #[arg(long, value_name = "PID")]
    parent: Option<u32>,
}

/// The worker's side of a copy. 0 when it was made. Unlike the command it never replaces a file, and leaves nothing
/// when it fails: the agent asks again for all of it.
pub(super) fn run_copy(args: &WorkerArgs) -> ExitCode {
    if !args.parent.is_none_or(live_with) {
        return ExitCode::FAILURE;
    }
    let copy = &args.copy;
    let mut reporter = match Reporter::open(copy.progress_fd) {
        Ok(reporter) => reporter,
        Err(error) => {
            eprintln!("the descriptor of --progress-fd cannot be written: {error}");
            return ExitCode::FAILURE;
        }
    };
    let mut order = copy.order();
    order.options.overwrite = false;
    order.options.keep_partial = false;
    order.options.mode = None;
    let outcome = copy::copy(&order, &mut |done, total| reporter.progress(done, total));
    let outcome = outcome.map_err(RequestError::from);
    match &outcome {
        Ok(report) if copy.json => say(&serde_json::json!(report)),
        Err(error) if copy.progress_fd.is_none() => eprintln!("{error}"),
        _ => {}
    }
    let made = outcome.is_ok();
    reporter.finish(outcome);
    if made { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Binds this process's life to that of `parent`, which started it. False when that is gone already.
pub(super) fn live_with(parent: u32) -> bool {
    let bound = set_pdeathsig(Signal::SIGKILL).is_ok() && std::os::unix::process::parent_id() == parent;
    if !bound {
        eprintln!("the process {parent} that asked for this work is gone");
    }
    bound
}

/// Writes lines for whoever started the process.
pub(super) struct Reporter {
    pipe: Option<File>,
    last: Option<Instant>,
}

impl Reporter {
    /// To that descriptor; none: nothing is written.
    pub(super) fn open(descriptor: Option<u32>) -> io::Result<Self> {
        // Opened anew, not taken over: at its end, where it is a file.
        let open = |number| OpenOptions::new().append(true).open(format!("/proc/self/fd/{number}"));
        Ok(Self { pipe: descriptor.map(open).transpose()?, last: None })
    }

    /// Tells how far it is, if that was not told just now.
    pub(super) fn progress(&mut self, done_bytes: u64, total_bytes: u64) {
        if self.last.is_none_or(|last| last.elapsed() >= REPORT_EVERY) {
            self.last = Some(Instant::now());
            self.write(&Line::Progress { done_bytes, total_bytes });
        }
    }

    /// Tells the end.
    pub(super) fn finish(&mut self, outcome: Result<CopyReport, RequestError>) {
        self.write(&Line::Finished(outcome));
    }

    fn write(&mut self, line: &Line) {
        let Some(pipe) = &mut self.pipe else { return };
        let text = format!("{}\n", serde_json::json!(line));
        if pipe.write_all(text.as_bytes()).is_err() {
            // Nobody listens any more; the copy itself is not worse for it.
            self.pipe = None;
        }
    }
}

/// Starts workers.
#[derive(Clone, Debug)]
pub struct Worker {
    program: PathBuf,
    stalls: Stalls,
    known: Option<PathBuf>,
}

impl Default for Worker {
    /// The running program itself, even after its file was replaced by an upgrade.
    fn default() -> Self {
        Self::new("/proc/self/exe".into())
    }
}

impl Worker {
    /// Workers of that program, which must know `worker copy`.
    pub fn new(program: PathBuf) -> Self {
        Self { program, stalls: Stalls::unregistered(), known: None }
    }

    /// Counts stalled copies in `stalls`.
    pub fn with_stalls(self, stalls: Stalls) -> Self {
        Self { stalls, ..self }
    }

    /// Whether a copy gets no further.
    pub(crate) fn has_stalled_copy(&self) -> bool {
        self.stalls.any()
    }

    /// Remembers in `file` what probes of mounts found.
    pub fn with_known(self, file: PathBuf) -> Self {
        Self { known: Some(file), ..self }
    }

    /// The program.
    pub fn program(&self) -> &Path {
        &self.program
    }

    /// Copies in a worker and waits for it. Cancelled, killed or failed: nothing appears at the destination, though
    /// a killed worker can leave its `.partial`. A worker that a dead mount holds is left behind when it is cancelled,
    /// and what it leaves is removed when the mount lets it go.
    ///
    /// # Errors
    /// The worker's own; [`ErrorKind::Cancelled`]; [`ErrorKind::Internal`] when it does not start or dies.
    pub fn copy(
        &self,
        order: &CopyOrder,
        progress: &mut dyn FnMut(u64, u64),
        cancel: &Cancel,
    ) -> Result<CopyReport, RequestError> {
        let mut command = Command::new(&self.program);
        command.args(["worker", "copy"]).args(self.arguments(order));
        command.args(["--progress-fd", "1", "--parent"]).arg(std::process::id().to_string());
        command.arg("--").arg(&order.source).arg(&order.destination);
        let internal =
            |error| RequestError::new(ErrorKind::Internal, format!("no worker for a copy: {error}"));
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().map_err(internal)?;
        let Some(pipe) = child.stdout.take() else {
            return Err(internal(io::ErrorKind::BrokenPipe.into()));
        };
        let mut watch = self.stalls.watch(&order.destination, Instant::now());
        let outcome = self.listen(pipe, &mut watch, progress, cancel);
        let cancelled = outcome.is_none() && cancel.is_cancelled();
        if cancelled {
            // It fails only when the worker is gone already.
            let _ = child.kill();
        }
        let discard = cancelled.then(|| self.discard(order));
        let status = reap(child, discard, Some(watch));
        outcome.unwrap_or_else(|| {
            Err(match cancel.is_cancelled() {
                true => RequestError::new(ErrorKind::Cancelled, "the copy was cancelled"),
                false => RequestError::new(ErrorKind::Internal, format!("the copy's worker died ({status})")),
            })
        })
    }

    /// What removes what an abandoned worker left: another one, for it touches the mount.
    fn discard(&self, order: &CopyOrder) -> Command {
        let mut command = Command::new(&self.program);
        command.args(["worker", "discard", "--parent"]).arg(std::process::id().to_string());
        command.arg("--").arg(&order.destination).stdin(Stdio::null()).stdout(Stdio::null());
        command
    }

    /// An order as arguments of a worker.
    fn arguments(&self, order: &CopyOrder) -> Vec<OsString> {
        let options = &order.options;
        let mut arguments: Vec<OsString> = Vec::new();
        let mut value = |name: &str, value: Option<OsString>| {
            if let Some(value) = value {
                arguments.extend([name.into(), value]);
            }
        };
        let number = |number: Option<u64>| number.map(|number| number.to_string().into());
        value("--from", Some(order.format.as_str().into()));
        value("--to", options.to.map(|to| to.as_str().into()));
        value("--size", number(order.size_bytes));
        value("--method", options.method.map(|method| method.as_str().into()));
        value("--expect", options.expect.clone().map(Into::into));
        value("--bandwidth", number(options.bandwidth_bytes));
        value("--probes", options.known.clone().or_else(|| self.known.clone()).map(Into::into));
        for checksum in &options.checksums {
            value("--checksum", Some(checksum.as_str().into()));
        }
        value("--io-class", options.io_class.map(|class| class.as_str().into()));
        for (flag, wanted) in [
            ("--verify", options.verify),
            ("--digests", options.digests),
            ("--polite", options.polite),
            ("--no-resume", options.no_resume),
        ] {
            if wanted {
                arguments.push(flag.into());
            }
        }
        arguments
    }

    /// Reads a worker's lines to its result; none when it is cancelled or ends without one.
    fn listen(
        &self,
        pipe: ChildStdout,
        watch: &mut Watch,
        progress: &mut dyn FnMut(u64, u64),
        cancel: &Cancel,
    ) -> Option<Result<CopyReport, RequestError>> {
        let mut lines = Lines { pipe, pending: Vec::new() };
        loop {
            if cancel.is_cancelled() {
                return None;
            }
            match lines.next() {
                Next::Nothing => {
                    watch.look(Instant::now());
                }
                Next::Line(line) => {
                    watch.hear(Instant::now());
                    match line {
                        Line::Progress { done_bytes, total_bytes } => progress(done_bytes, total_bytes),
                        Line::Finished(outcome) => return Some(outcome),
                    }
                }
                Next::End => return None,
            }
        }
    }
}

/// A worker's lines.
pub(super) struct Lines {
    pub(super) pipe: ChildStdout,
    pub(super) pending: Vec<u8>,
}

/// What comes next of them.
pub(super) enum Next<L> {
    /// Nothing for now.
    Nothing,
    Line(L),
    /// The worker is gone, or is none.
    End,
}

impl Lines {
    pub(super) fn next<L: DeserializeOwned>(&mut self) -> Next<L> {
        loop {
            if let Some(end) = self.pending.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = self.pending.drain(..=end).collect();
                return serde_json::from_slice(&line).map_or(Next::End, Next::Line);
            }
            if self.pending.len() > MAX_LINE_BYTES {
                return Next::End;
            }
            let mut ready = [PollFd::new(self.pipe.as_fd(), PollFlags::POLLIN)];
            match poll(&mut ready, PollTimeout::from(LOOK_EVERY_MS)) {
                Ok(0) | Err(nix::errno::Errno::EINTR) => return Next::Nothing,
                Ok(_) => {}
                Err(_) => return Next::End,
            }
            let mut buffer = [0; 4096];
            match self.pipe.read(&mut buffer) {
                Ok(0) => return Next::End,
                Ok(length) => self.pending.extend_from_slice(&buffer[..length]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return Next::End,
            }
        }
    }
}

/// Waits for a worker's end and says how it was. One that hangs in the kernel is waited for by a thread, which then runs
/// `discard`. That thread itself never enters a mount: the agent could not end while it is there. What stalled is stalled
/// until the worker is gone.
pub(super) fn reap(mut child: Child, discard: Option<Command>, watch: Option<Watch>) -> String {
    let deadline = Instant::now() + REAP_WITHIN;
    loop {
        match child.try_wait() {
            Ok(Some(status)) => return status.to_string(),
            Ok(None) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(2)),
            Ok(None) => {
                let waiting = std::thread::Builder::new().name("reaper".to_owned());
                // Without a thread the zombie stays until the agent ends, which is the smaller harm.
                let _ = waiting.spawn(move || {
                    let ended = child.wait();
                    drop(watch);
                    if let (Some(mut discard), Ok(_)) = (discard, ended)
                        && let Err(error) = discard.status()
                    {
                        tracing::warn!("what an abandoned copy left stays: {error}");
                    }
                });
                return "it hangs in the kernel, as on a dead mount".to_owned();
            }
            Err(error) => return error.to_string(),
        }
    }
}

/// `worker discard DST`.
#[derive(Clone, Debug, clap::Args)]
pub struct DiscardArgs {
    /// Name that the copy was to have
    destination: PathBuf,
    /// Die with this process, which started the worker
    #[arg(long, value_name = "PID")]
    parent: u32,
}

/// Removes what an abandoned worker left of a copy that was never asked for again.
pub(super) fn run_discard(args: &DiscardArgs) -> ExitCode {
    if !live_with(args.parent) {
        return ExitCode::FAILURE;
    }
    discard(&args.destination);
    ExitCode::SUCCESS
}

/// A copy that began since holds the lock of the growing file, and keeps it.
fn discard(destination: &Path) {
    let growing = partial(destination);
    let Ok(file) = OpenOptions::new().write(true).custom_flags(libc::O_NOFOLLOW).open(&growing) else {
        return;
    };
    if file.try_lock().is_err() {
        return;
    }
    let same = |a: &fs::Metadata, b: &fs::Metadata| (a.dev(), a.ino()) == (b.dev(), b.ino());
    let ours = file.metadata();
    let named = fs::symlink_metadata(&growing);
    if let (Ok(ours), Ok(named)) = (ours, named)
        && same(&ours, &named)
    {
        // Whoever looks next finds what is left, and begins anew.
        let _ = fs::remove_file(journal(destination));
        let _ = fs::remove_file(&growing);
    }
}
