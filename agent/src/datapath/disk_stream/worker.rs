//! Disk streams of the agent: each end is a worker process, for the pool that it reads or writes may hang. The agent
//! tells it the token on stdin, and hears from it by lines of JSON on stdout.

use super::{CONNECTIONS, DiskStreamError, PORT, ReceiveOrder, Receiver, SendOrder, send};
use crate::datapath::worker::{Lines, Next, live_with, reap};
use crate::hypervisor::Cancel;
use crate::identity;
use godwit_protocol::error::{ErrorKind, RequestError, chain};
use godwit_protocol::id::HostId;
use godwit_protocol::quic::{Identity, host_name};
use serde::{Deserialize, Serialize};
use std::io::{self, BufRead, Write};
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Ports that receivers of one host share, from [`PORT`] on: so many disks come at once.
const PORTS: u16 = 16;

/// How long a receiver waits for its sender.
const WAIT: Duration = Duration::from_secs(60);

/// How long a worker may take to begin.
const BEGIN_WITHIN: Duration = Duration::from_secs(20);

/// Least time between two reports of progress.
const REPORT_EVERY: Duration = Duration::from_millis(250);

/// `worker send FILE`, `worker receive FILE`.
#[derive(Clone, Debug, clap::Args)]
pub struct WorkerArgs {
    /// The disk, or what is to become it
    disk: PathBuf,
    /// Of a sender: where the receiver listens. Of a receiver: this host's address
    #[arg(long)]
    address: SocketAddr,
    /// The other host
    #[arg(long)]
    host: HostId,
    /// The agent's folder, with the host's certificate
    #[arg(long)]
    dir: PathBuf,
    /// Die with this process, which started the worker
    #[arg(long)]
    parent: u32,
}

/// A line of a worker.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Said {
    /// A receiver waits here.
    Listening(SocketAddr),
    /// It goes on.
    Progress { done_bytes: u64, total_bytes: u64 },
    /// The end.
    Finished(Result<Moved, RequestError>),
}

/// What a stream has moved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Moved {
    /// Size of the disk in bytes.
    pub size_bytes: u64,
    /// Bytes that were on the way.
    pub moved_bytes: u64,
    /// Bytes that were there from an attempt that broke.
    pub resumed_bytes: u64,
    /// Bytes that were there in an older copy.
    pub same_bytes: u64,
}

impl From<DiskStreamError> for RequestError {
    /// What may be otherwise with the next attempt is `Unavailable`: it goes on where this one ended.
    fn from(error: DiskStreamError) -> Self {
        use DiskStreamError as E;
        let text = chain(&error);
        let kind = match error {
            E::File(error) => return error.into(),
            E::Tls { .. }
            | E::Version(_)
            | E::Socket { .. }
            | E::Broken(_)
            | E::Refused(_)
            | E::Peer(_)
            | E::Nobody(_)
            | E::Spoiled { .. } => ErrorKind::Unavailable,
            E::Digest { .. } => ErrorKind::Damaged,
            E::Identity(_) | E::Name(_) | E::Frame(_) | E::Nonsense(_) => ErrorKind::Internal,
        };
        RequestError::new(kind, text)
    }
}

/// Writes lines for the agent.
struct Teller {
    last: Mutex<Option<Instant>>,
}

impl Teller {
    fn say(&self, said: &Said) {
        // Nobody listens any more: the agent is gone, and this process goes with it.
        let _ = io::stdout().write_all(format!("{}\n", serde_json::json!(said)).as_bytes());
    }

    fn progress(&self, done_bytes: u64, total_bytes: u64) {
        let Ok(mut last) = self.last.lock() else { return };
        if last.is_none_or(|last| last.elapsed() >= REPORT_EVERY) {
            *last = Some(Instant::now());
            self.say(&Said::Progress { done_bytes, total_bytes });
        }
    }
}

fn run(
    args: &WorkerArgs,
    work: impl FnOnce(&Identity, String, &Teller) -> Result<Moved, RequestError>,
) -> ExitCode {
    if !live_with(args.parent) {
        return ExitCode::FAILURE;
    }
    let teller = Teller { last: Mutex::default() };
    let begin = || {
        let internal = |text: String| RequestError::new(ErrorKind::Internal, text);
        let mut token = String::new();
        io::stdin().lock().read_line(&mut token).map_err(|error| internal(chain(&error)))?;
        let identity = identity::read(&args.dir).map_err(|error| internal(chain(&error)))?;
        Ok((identity, token.trim_end().to_owned()))
    };
    let outcome = begin().and_then(|(identity, token)| work(&identity, token, &teller));
    let done = outcome.is_ok();
    teller.say(&Said::Finished(outcome));
    if done { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// The sender's process.
pub fn run_send(args: &WorkerArgs) -> ExitCode {
    run(args, |identity, token, teller| {
        let order = SendOrder {
            source: args.disk.clone(),
            address: args.address,
            server_name: host_name(args.host),
            token,
            connections: CONNECTIONS,
            bandwidth_bytes: None,
        };
        let report = send(identity, &order, &mut |done, total| teller.progress(done, total))?;
        Ok(Moved {
            size_bytes: report.size_bytes,
            moved_bytes: report.sent_bytes,
            resumed_bytes: report.resumed_bytes,
            same_bytes: report.same_bytes,
        })
    })
}

/// The receiver's process.
pub fn run_receive(args: &WorkerArgs) -> ExitCode {
    run(args, |identity, token, teller| {
        let receiver = bind(identity, args.address.ip())?;
        teller.say(&Said::Listening(receiver.address()));
        let order = ReceiveOrder {
            destination: args.disk.clone(),
            token,
            sender: Some(host_name(args.host)),
            wait: WAIT,
            no_clobber: false,
            digests: false,
            make_folder: true,
        };
        let report = receiver.receive(&order, &|done, total| teller.progress(done, total))?;
        Ok(Moved {
            size_bytes: report.size_bytes,
            moved_bytes: report.received_bytes,
            resumed_bytes: report.resumed_bytes,
            same_bytes: report.same_bytes,
        })
    })
}

/// The first port that no other receiver has.
fn bind(identity: &Identity, address: IpAddr) -> Result<Receiver, DiskStreamError> {
    let mut port = PORT;
    loop {
        match Receiver::bind(identity, SocketAddr::new(address, port)) {
            Err(DiskStreamError::Socket { source, .. })
                if source.kind() == io::ErrorKind::AddrInUse && port + 1 < PORT + PORTS =>
            {
                port += 1;
            }
            bound => return bound,
        }
    }
}

/// One end, as the agent starts it.
#[derive(Clone, Copy, Debug)]
pub struct End<'a> {
    /// The agent's program.
    pub program: &'a Path,
    /// The agent's folder.
    pub dir: &'a Path,
    /// The disk.
    pub disk: &'a Path,
    /// Of a sender: where the receiver listens. Of a receiver: this host's address, with any port.
    pub address: SocketAddr,
    /// The other host.
    pub peer: HostId,
    /// The secret of this disk.
    pub token: &'a str,
}

/// A worker that sends or receives. Its process dies with the agent.
pub struct Stream {
    child: Child,
    lines: Lines,
}

impl Stream {
    /// Starts a sender.
    ///
    /// # Errors
    /// [`ErrorKind::Internal`] when there can be no process.
    pub fn send(end: End<'_>) -> Result<Self, RequestError> {
        Self::start("send", end)
    }

    /// Starts a receiver; its address is where it waits.
    ///
    /// # Errors
    /// [`ErrorKind::Internal`] when there can be no process, and the worker's own: no port is free, for one.
    pub fn receive(end: End<'_>) -> Result<(Self, SocketAddr), RequestError> {
        let mut stream = Self::start("receive", end)?;
        let deadline = Instant::now() + BEGIN_WITHIN;
        let error = loop {
            match stream.lines.next() {
                Next::Line(Said::Listening(address)) => return Ok((stream, address)),
                Next::Line(Said::Finished(Err(error))) => break error,
                Next::Nothing if Instant::now() < deadline => {}
                _ => break internal("it does not begin to listen"),
            }
        };
        stream.end();
        Err(error)
    }

    fn start(what: &str, end: End<'_>) -> Result<Self, RequestError> {
        let failed = |error: io::Error| internal(&chain(&error));
        let mut command = Command::new(end.program);
        command.args(["worker", what, "--address"]).arg(end.address.to_string());
        command.arg("--host").arg(end.peer.to_string()).arg("--dir").arg(end.dir);
        command.arg("--parent").arg(std::process::id().to_string()).arg("--").arg(end.disk);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().map_err(failed)?;
        let (Some(mut stdin), Some(pipe)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(failed(io::ErrorKind::BrokenPipe.into()));
        };
        let stream = Self { child, lines: Lines { pipe, pending: Vec::new() } };
        // Its arguments are for everybody on the host to read.
        if let Err(error) = stdin.write_all(format!("{}\n", end.token).as_bytes()) {
            stream.end();
            return Err(failed(error));
        }
        Ok(stream)
    }

    /// Waits for its end, or ends it when it is cancelled. What has arrived stays for another attempt.
    ///
    /// # Errors
    /// The worker's own; [`ErrorKind::Cancelled`]; [`ErrorKind::Internal`] when it dies.
    pub fn finish(
        mut self,
        progress: &mut dyn FnMut(u64, u64),
        cancel: &Cancel,
    ) -> Result<Moved, RequestError> {
        let outcome = loop {
            if cancel.is_cancelled() {
                self.end();
                return Err(RequestError::new(ErrorKind::Cancelled, "the move of the disk was cancelled"));
            }
            match self.lines.next() {
                Next::Nothing | Next::Line(Said::Listening(_)) => {}
                Next::Line(Said::Progress { done_bytes, total_bytes }) => progress(done_bytes, total_bytes),
                Next::Line(Said::Finished(outcome)) => break Some(outcome),
                Next::End => break None,
            }
        };
        let status = reap(self.child, None, None);
        outcome.unwrap_or_else(|| Err(internal(&format!("it died ({status})"))))
    }

    fn end(mut self) {
        // It fails only when the worker is gone already.
        let _ = self.child.kill();
        reap(self.child, None, None);
    }
}

fn internal(why: &str) -> RequestError {
    RequestError::new(ErrorKind::Internal, format!("the worker that moves a disk: {why}"))
}
