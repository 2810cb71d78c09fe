//! `godwit-agent`: the daemon on each host.
#![forbid(unsafe_code)]

use clap::{Parser, Subcommand};
use godwit_agent::config::Config;
use godwit_agent::datapath::WorkerCommand;
use godwit_agent::datapath::command::CopyArgs;
use godwit_agent::datapath::disk_stream::command::StreamCommand;
use godwit_agent::{daemon, datapath, host, inventory, join};
use godwit_protocol::error::chain;
use godwit_protocol::host::{Cell, CoreKind, Cpu};
use std::collections::BTreeMap;
use std::error::Error;
use std::io::{IsTerminal, Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use tracing_subscriber::EnvFilter;

/// What is logged unless RUST_LOG says otherwise. The netlink crate warns of every attribute that is newer than itself.
const DEFAULT_LOG: &str = "info,netlink_packet_route=error";

/// Godwit's agent: runs virtual machines on this host as the coordinator asks, and tells it what runs
#[derive(Parser)]
#[command(
    version,
    max_term_width = 110,
    after_help = "\
Exit status: 0 when it went well, 1 when it failed, 2 for a wrong command line.
RUST_LOG sets what is logged to stderr, for example RUST_LOG=debug."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Make this host one of the fleet, with a one-time token of the coordinator
    ///
    /// The token names the coordinator's CA: nothing is sent to a server that does not prove to be of that CA. The
    /// host makes its own key, which never leaves it, and is given a certificate.
    Join {
        /// The coordinator, such as https://198.18.0.1:8774
        url: String,
        /// The token, or - to read it from standard input
        token: String,
        #[command(flatten)]
        dir: Dir,
        /// Join as a new host though this one has joined before
        #[arg(long)]
        force: bool,
    },
    /// Run the agent until SIGTERM; guests and networks stay when it stops
    Run {
        #[command(flatten)]
        dir: Dir,
    },
    /// Show cells, CPUs, cores, caches, memory, pages and network devices' cells as the kernel tells them
    Inventory {
        /// Read another machine's tree, with sys/ and proc/ under this folder
        #[arg(long, value_name = "DIR", default_value = "/")]
        sysfs_root: PathBuf,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Copy a disk or image the cheapest way there is, sparse, resumable, whole or not at all; needs no daemon
    #[command(after_help = datapath::command::AFTER_HELP)]
    Copy(CopyArgs),
    /// Bring a disk from one host to another over TLS: data only, on several connections, resumable
    #[command(subcommand)]
    Stream(StreamCommand),
    /// Move bytes; the agent starts such processes itself
    #[command(hide = true, subcommand)]
    Worker(WorkerCommand),
}

#[derive(clap::Args)]
struct Dir {
    /// The agent's folder: agent.toml, its identity and its state
    #[arg(long, value_name = "DIR", default_value = "/var/lib/godwit")]
    dir: PathBuf,
}

fn main() -> ExitCode {
    let outcome = match Cli::parse().command {
        Command::Join { url, token, dir, force } => join_fleet(&url, token, &dir.dir, force),
        Command::Run { dir } => run(&dir.dir),
        Command::Inventory { sysfs_root, json } => show_inventory(&sysfs_root, json),
        Command::Copy(args) => return datapath::command::run(&args),
        Command::Stream(command) => return datapath::disk_stream::command::run(&command),
        Command::Worker(command) => return datapath::run(command),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("godwit-agent: {}", chain(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}

fn join_fleet(url: &str, token: String, dir: &Path, force: bool) -> Result<(), Box<dyn Error>> {
    let token = if token == "-" {
        let mut text = String::new();
        std::io::stdin().take(4096).read_to_string(&mut text)?;
        text
    } else {
        token
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let host = runtime.block_on(join::join(dir, url, &token, force))?;
    // The host has joined, whoever hears of it.
    datapath::command::say(&format_args!(
        "Joined as host {host}. Start the agent: godwit-agent run --dir {}",
        dir.display()
    ));
    Ok(())
}

fn run(dir: &Path) -> Result<(), Box<dyn Error>> {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(DEFAULT_LOG));
    let ansi = std::io::stderr().is_terminal();
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(ansi).init();
    Ok(daemon::run(Config::load(dir)?)?)
}

fn show_inventory(root: &Path, json: bool) -> Result<(), Box<dyn Error>> {
    let page_kib = if root == Path::new("/") { host::page_kib() } else { inventory::ORDINARY_PAGE_KIB };
    let cells = inventory::read_cells(root, page_kib)?;
    let model = inventory::cpu_model(root)?;
    let links = inventory::link_cells(root)?;
    let mut out = std::io::stdout().lock();
    if json {
        let all = serde_json::json!({ "cpu_model": model, "cells": cells, "link_cells": links });
        writeln!(out, "{all:#}")?;
        return Ok(());
    }
    writeln!(out, "CPU: {}", if model.is_empty() { "unknown" } else { &model })?;
    for cell in &cells {
        let cpus: Vec<u32> = cell.cpus.iter().map(|c| c.id).collect();
        writeln!(out, "cell {}: CPUs {}, {} MiB", cell.id, ranges(&cpus), cell.memory_bytes >> 20)?;
        for (what, groups) in [
            ("cores", groups(cell, |cpu| cpu.siblings.first().copied())),
            ("clusters", groups(cell, |cpu| cpu.cluster)),
            ("L3 caches", groups(cell, |cpu| cpu.l3)),
        ] {
            if groups.iter().any(|group| group.len() > 1) {
                let groups: Vec<String> = groups.iter().map(|group| ranges(group)).collect();
                writeln!(out, "  {what} {}", groups.join("  "))?;
            }
        }
        for kind in CoreKind::ALL {
            let cpus = cell.cpus.iter().filter(|cpu| cpu.kind == Some(kind)).map(|cpu| cpu.id);
            let cpus: Vec<u32> = cpus.collect();
            if !cpus.is_empty() {
                writeln!(out, "  CPUs of kind {} {}", kind.name(), ranges(&cpus))?;
            }
        }
        for pool in &cell.page_pools {
            let taken = if pool.taken > 0 { format!(", {} in use", pool.taken) } else { String::new() };
            writeln!(out, "  {} pages of {} KiB{taken}", pool.total, pool.size_kib)?;
        }
        let distances: Vec<String> =
            cell.distances.iter().map(|(other, distance)| format!("{other}: {distance}")).collect();
        if !distances.is_empty() {
            writeln!(out, "  distances {}", distances.join(", "))?;
        }
        let here: Vec<&str> =
            links.iter().filter(|(_, at)| **at == Some(cell.id)).map(|(link, _)| link.as_str()).collect();
        if !here.is_empty() {
            writeln!(out, "  links {}", here.join(", "))?;
        }
    }
    Ok(())
}

/// A cell's CPUs by what they have in common; those that have nothing are in no group.
fn groups(cell: &Cell, common: impl Fn(&Cpu) -> Option<u32>) -> Vec<Vec<u32>> {
    let mut groups = BTreeMap::<u32, Vec<u32>>::new();
    for cpu in &cell.cpus {
        if let Some(group) = common(cpu) {
            groups.entry(group).or_default().push(cpu.id);
        }
    }
    groups.into_values().collect()
}

/// `0-3,8`, from numbers in rising order.
fn ranges(numbers: &[u32]) -> String {
    let runs = numbers.chunk_by(|a, b| a + 1 == *b);
    let text: Vec<String> = runs
        .map(|run| match run {
            [one] => one.to_string(),
            [first, .., last] => format!("{first}-{last}"),
            [] => String::new(),
        })
        .collect();
    if text.is_empty() { "none".to_owned() } else { text.join(",") }
}
