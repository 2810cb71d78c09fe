//! `godwit-agent stream`: a disk from one host to another, by hand or by script, with the hosts' own certificates.

use super::{CONNECTIONS, DiskStreamError, PORT, ReceiveOrder, Receiver, SendOrder, send};
use crate::datapath::command::{Bar, parse_bytes, say, size};
use crate::datapath::kernel::keep_freed_memory;
use crate::identity;
use godwit_protocol::error::chain;
use std::error::Error;
use std::io::Read;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// What more `--help` says.
pub const AFTER_HELP: &str = "\
Start the receiver first; it waits for one sender that knows the token and has a certificate of the same CA. What broke
goes on where it was when both commands are given again. A file that has the destination's name is the older copy: only
chunks that differ are sent.

Exit status: 0 the disk is there, 1 it failed, 2 wrong command line, 3 the bytes are not what they should be.

Example:
  here   godwit-agent stream receive --listen 198.18.0.2:8777 --token - /srv/disk.raw
  there  godwit-agent stream send --to 198.18.0.2:8777 --host HOST-ID --token - disk.raw";

/// One of the two ends.
#[derive(Clone, Debug, clap::Subcommand)]
pub enum StreamCommand {
    /// Wait for a disk
    #[command(after_help = AFTER_HELP)]
    Receive(ReceiveArgs),
    /// Send a disk
    #[command(after_help = AFTER_HELP)]
    Send(SendArgs),
}

/// What both ends are told.
#[derive(Clone, Debug, clap::Args)]
struct Common {
    /// The secret that both ends know, or - to read it from standard input
    #[arg(long, env = "GODWIT_STREAM_TOKEN", hide_env_values = true)]
    token: String,
    /// The agent's folder, with the host's certificate
    #[arg(long, value_name = "DIR", default_value = "/var/lib/godwit")]
    dir: PathBuf,
    /// Print the report as JSON
    #[arg(long)]
    json: bool,
    /// Show no progress and print no report
    #[arg(short, long)]
    quiet: bool,
}

/// `stream receive`.
#[derive(Clone, Debug, clap::Args)]
pub struct ReceiveArgs {
    /// Name of the disk here; it appears when all of it is here
    destination: PathBuf,
    /// Address of this host to listen on
    #[arg(long, value_name = "ADDR:PORT", value_parser = parse_address)]
    listen: SocketAddr,
    /// Take the disk from this host only, named by its id
    #[arg(long, value_name = "HOST-ID")]
    host: Option<String>,
    /// Seconds to wait for the sender
    #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    wait: u64,
    /// Fail where the destination is there already
    #[arg(short = 'n', long)]
    no_clobber: bool,
    /// Leave the digests of the disk's chunks in DESTINATION.blake3
    #[arg(long)]
    digests: bool,
    #[command(flatten)]
    common: Common,
}

/// `stream send`.
#[derive(Clone, Debug, clap::Args)]
pub struct SendArgs {
    /// The disk: a regular file
    source: PathBuf,
    /// Where the receiver listens
    #[arg(long, value_name = "ADDR:PORT", value_parser = parse_address)]
    to: SocketAddr,
    /// The receiver's host, by its id
    #[arg(long, value_name = "HOST-ID")]
    host: String,
    /// Connections at once
    #[arg(long, value_name = "COUNT", default_value_t = CONNECTIONS as u64, value_parser = clap::value_parser!(u64).range(1..=16))]
    connections: u64,
    /// Most bytes a second, such as 200M
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes)]
    bandwidth: Option<u64>,
    #[command(flatten)]
    common: Common,
}

fn parse_address(text: &str) -> Result<SocketAddr, String> {
    let wrong = |_| format!("an address and port such as 198.18.0.2:{PORT}; the port may be left out");
    text.parse().or_else(|_| text.parse().map(|address| SocketAddr::new(address, PORT)).map_err(wrong))
}

/// Does what one end was asked for.
pub fn run(command: &StreamCommand) -> ExitCode {
    keep_freed_memory();
    let (outcome, common) = match command {
        StreamCommand::Receive(args) => (run_receive(args), &args.common),
        StreamCommand::Send(args) => (run_send(args), &args.common),
    };
    match outcome {
        Ok(report) if common.json => say(&report),
        Ok(_) if common.quiet => {}
        Ok(report) => say(&sentence(&report)),
        Err(error) => {
            eprintln!("godwit-agent: {}", chain(error.as_ref()));
            let damaged = matches!(
                error.downcast_ref(),
                Some(DiskStreamError::Digest { .. } | DiskStreamError::Spoiled { .. })
            );
            return ExitCode::from(if damaged { 3 } else { 1 });
        }
    }
    ExitCode::SUCCESS
}

/// A report, and how long it took.
type Told = serde_json::Value;

fn sentence(report: &Told) -> String {
    let bytes = |name: &str| report[name].as_u64().unwrap_or(0);
    let moved = bytes("sent_bytes") + bytes("received_bytes");
    let mut text = format!("{}, {} on the way", size(bytes("size_bytes")), size(moved));
    for (name, what) in [("resumed_bytes", "of an earlier attempt"), ("same_bytes", "as in the older copy")] {
        if bytes(name) > 0 {
            text += &format!(", {} {what}", size(bytes(name)));
        }
    }
    format!("{text}, in {:.2} s", report["wall_s"].as_f64().unwrap_or(0.0))
}

fn token(text: &str) -> Result<String, Box<dyn Error>> {
    if text != "-" {
        return Ok(text.to_owned());
    }
    let mut token = String::new();
    std::io::stdin().take(4096).read_to_string(&mut token)?;
    match token.trim() {
        "" => Err("standard input has no token".into()),
        token => Ok(token.to_owned()),
    }
}

/// The name in the certificate of a host.
fn name_of(host: &str) -> Result<String, Box<dyn Error>> {
    let id = host.parse().map_err(|_| format!("'{host}' is no id of a host; `godwit host list` has them"))?;
    Ok(godwit_protocol::quic::host_name(id))
}

fn timed<R: serde::Serialize>(report: R, begun: Instant) -> Result<Told, Box<dyn Error>> {
    let mut told = serde_json::to_value(report)?;
    told["wall_s"] = begun.elapsed().as_secs_f64().into();
    Ok(told)
}

fn run_receive(args: &ReceiveArgs) -> Result<Told, Box<dyn Error>> {
    let common = &args.common;
    let order = ReceiveOrder {
        destination: args.destination.clone(),
        token: token(&common.token)?,
        sender: args.host.as_deref().map(name_of).transpose()?,
        wait: Duration::from_secs(args.wait),
        no_clobber: args.no_clobber,
        digests: args.digests,
        make_folder: false,
    };
    let receiver = Receiver::bind(&identity::read(&common.dir)?, args.listen)?;
    if !common.quiet {
        eprintln!("listening on {}", receiver.address());
    }
    let bar = Mutex::new(Bar::new(!common.quiet && !common.json));
    let begun = Instant::now();
    let outcome = receiver.receive(&order, &|done, total| {
        if let Ok(mut bar) = bar.lock() {
            bar.show(done, total);
        }
    });
    if let Ok(bar) = bar.lock() {
        bar.clear();
    }
    timed(outcome?, begun)
}

fn run_send(args: &SendArgs) -> Result<Told, Box<dyn Error>> {
    let common = &args.common;
    let order = SendOrder {
        source: args.source.clone(),
        address: args.to,
        server_name: name_of(&args.host)?,
        token: token(&common.token)?,
        connections: args.connections as usize,
        bandwidth_bytes: args.bandwidth,
    };
    let mut bar = Bar::new(!common.quiet && !common.json);
    let begun = Instant::now();
    let outcome = send(&identity::read(&common.dir)?, &order, &mut |done, total| bar.show(done, total));
    bar.clear();
    timed(outcome?, begun)
}
