//! Worker processes: the parent's side, which starts, watches and ends one, and the worker's own.
//!
//! A copy runs in a process of its own so that a dead mount can hold that process and never the agent. A worker
//! dies with the agent: an orphan would go on writing to a disk whose fate somebody else decides by then.

use super::copy::{self, CopyReport};
use crate::hypervisor::Cancel;
use godwit_protocol::error::{ErrorKind, RequestError};
use godwit_protocol::image::DiskFormat;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;
use serde::{Deserialize, Serialize};
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::{Child, ChildStdout, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

pub use super::copy::CopyOrder;

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
pub struct CopyArgs {
    /// Regular file to copy
    source: PathBuf,
    /// New file; it appears when the copy is whole
    destination: PathBuf,
    /// Grow the disk to this many bytes
    #[arg(long, value_name = "BYTES")]
    size: Option<u64>,
    /// How the disk's bytes are to be read when it grows
    #[arg(long, default_value = "raw", value_parser = parse_format)]
    format: DiskFormat,
    /// Write progress and result as JSON lines to this file descriptor
    #[arg(long, value_name = "FD")]
    progress_fd: Option<u32>,
    /// Die with this process, which started the worker
    #[arg(long, value_name = "PID")]
    parent: Option<u32>,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

fn parse_format(text: &str) -> Result<DiskFormat, String> {
    [DiskFormat::Raw, DiskFormat::Qcow2]
        .into_iter()
        .find(|format| format.as_str() == text)
        .ok_or_else(|| "neither raw nor qcow2".to_owned())
}

/// The worker's side of a copy. 0 when it was made.
pub(super) fn run_copy(args: &CopyArgs) -> ExitCode {
    if let Some(parent) = args.parent {
        let bound = set_pdeathsig(Signal::SIGKILL).is_ok();
        if !bound || std::os::unix::process::parent_id() != parent {
            eprintln!("the process {parent} that asked for this copy is gone");
            return ExitCode::FAILURE;
        }
    }
    let mut reporter = match Reporter::open(args.progress_fd) {
        Ok(reporter) => reporter,
        Err(error) => {
            eprintln!("the descriptor of --progress-fd cannot be written: {error}");
            return ExitCode::FAILURE;
        }
    };
    let order = CopyOrder {
        source: args.source.clone(),
        destination: args.destination.clone(),
        format: args.format,
        size_bytes: args.size,
    };
    let outcome = copy::copy(&order, &mut |done, total| reporter.progress(done, total));
    let outcome = outcome.map_err(RequestError::from);
    match &outcome {
        Ok(report) if args.json => println!("{}", serde_json::json!(report)),
        Err(error) if args.progress_fd.is_none() => eprintln!("{error}"),
        _ => {}
    }
    let made = outcome.is_ok();
    reporter.write(&Line::Finished(outcome));
    if made { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

struct Reporter {
    pipe: Option<File>,
    last: Option<Instant>,
}

impl Reporter {
    fn open(descriptor: Option<u32>) -> io::Result<Self> {
        // Opened anew, not taken over: at its end, where it is a file.
        let open = |number| OpenOptions::new().append(true).open(format!("/proc/self/fd/{number}"));
        Ok(Self { pipe: descriptor.map(open).transpose()?, last: None })
    }

    fn progress(&mut self, done_bytes: u64, total_bytes: u64) {
        if self.last.is_none_or(|last| last.elapsed() >= REPORT_EVERY) {
            self.last = Some(Instant::now());
            self.write(&Line::Progress { done_bytes, total_bytes });
        }
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
}

impl Default for Worker {
    /// The running program itself, even after its file was replaced by an upgrade.
    fn default() -> Self {
        Self { program: "/proc/self/exe".into() }
    }
}

impl Worker {
    /// Workers of that program, which must know `worker copy`.
    pub fn new(program: PathBuf) -> Self {
        Self { program }
    }

    /// Copies in a worker and waits for it. Cancelled, killed or failed: nothing appears at the destination, though
    /// a killed worker can leave its `.partial`.
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
        command.args(["worker", "copy"]).arg(&order.source).arg(&order.destination);
        command.args(["--format", order.format.as_str()]);
        if let Some(size) = order.size_bytes {
            command.arg("--size").arg(size.to_string());
        }
        command.args(["--progress-fd", "1", "--parent"]).arg(std::process::id().to_string());
        let internal =
            |error| RequestError::new(ErrorKind::Internal, format!("no worker for a copy: {error}"));
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().map_err(internal)?;
        let Some(pipe) = child.stdout.take() else {
            return Err(internal(io::ErrorKind::BrokenPipe.into()));
        };
        let outcome = listen(pipe, progress, cancel);
        if outcome.is_none() && cancel.is_cancelled() {
            // It fails only when the worker is gone already.
            let _ = child.kill();
        }
        let status = reap(child);
        outcome.unwrap_or_else(|| {
            Err(match cancel.is_cancelled() {
                true => RequestError::new(ErrorKind::Cancelled, "the copy was cancelled"),
                false => RequestError::new(ErrorKind::Internal, format!("the copy's worker died ({status})")),
            })
        })
    }
}

/// Reads a worker's lines to its result; none when it is cancelled or ends without one.
fn listen(
    mut pipe: ChildStdout,
    progress: &mut dyn FnMut(u64, u64),
    cancel: &Cancel,
) -> Option<Result<CopyReport, RequestError>> {
    let mut pending = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        if cancel.is_cancelled() {
            return None;
        }
        let mut ready = [PollFd::new(pipe.as_fd(), PollFlags::POLLIN)];
        match poll(&mut ready, PollTimeout::from(LOOK_EVERY_MS)) {
            Ok(0) | Err(nix::errno::Errno::EINTR) => continue,
            Ok(_) => {}
            Err(_) => return None,
        }
        match pipe.read(&mut buffer) {
            Ok(0) => return None,
            Ok(length) => pending.extend_from_slice(&buffer[..length]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(_) => return None,
        }
        while let Some(end) = pending.iter().position(|&byte| byte == b'\n') {
            let line: Vec<u8> = pending.drain(..=end).collect();
            match serde_json::from_slice(&line) {
                Ok(Line::Progress { done_bytes, total_bytes }) => progress(done_bytes, total_bytes),
                Ok(Line::Finished(outcome)) => return Some(outcome),
                Err(_) => return None,
            }
        }
        if pending.len() > MAX_LINE_BYTES {
            return None;
        }
    }
}

/// Waits for a worker's end and says how it was.
fn reap(mut child: Child) -> String {
    let deadline = Instant::now() + REAP_WITHIN;
    loop {
        match child.try_wait() {
            Ok(Some(status)) => return status.to_string(),
            Ok(None) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(2)),
            Ok(None) => {
                let waiting = std::thread::Builder::new().name("reaper".to_owned());
                // Without a thread the zombie stays until the agent ends, which is the smaller harm.
                let _ = waiting.spawn(move || child.wait());
                return "it hangs in the kernel, as on a dead mount".to_owned();
            }
            Err(error) => return error.to_string(),
        }
    }
}
