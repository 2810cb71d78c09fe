//! `godwit`: the command line client. It speaks HTTP to the coordinator and knows nothing else of it.

#![forbid(unsafe_code)]

mod cloud;
mod error;
mod event;
mod flavor;
mod host;
mod http;
mod image;
mod keypair;
mod migration;
mod network;
mod operation;
mod output;
mod placement;
mod pool;
mod port;
mod progress;
mod resource;
mod security_group;
mod server;
mod session;
mod status;
mod subnet;
mod units;
mod wait;

use clap::{Args, CommandFactory, Parser, Subcommand};
use cloud::Surroundings;
use error::Result;
use output::{Format, Output};
use progress::Progress;
use session::Session;
use std::path::PathBuf;
use std::process::ExitCode;

/// Runs virtual machines on a group of hosts and moves them without a stop.
#[derive(Parser)]
#[command(name = "godwit", version, arg_required_else_help = true, after_help = AFTER_HELP)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    noun: Noun,
}

const AFTER_HELP: &str = "Exit codes: 0 done, 1 failed, 2 usage, 3 not found, 4 cannot reach or log in, \
    5 timed out waiting.\nThe cloud is taken from --os-cloud or OS_CLOUD and clouds.yaml, or from OS_AUTH_URL and \
    the other OS_* variables.";

/// Keeps the options of all commands apart from a command's own.
const HEADING: &str = "Global options";

#[derive(Args)]
struct Global {
    /// The cloud in clouds.yaml to talk to [default: $OS_CLOUD, or the only one]
    #[arg(long, global = true, value_name = "NAME", help_heading = HEADING)]
    os_cloud: Option<String>,
    /// Print JSON, and nothing else, on standard output
    #[arg(long, global = true, conflicts_with = "quiet", help_heading = HEADING)]
    json: bool,
    /// Print ids only, and no progress
    #[arg(long, short, global = true, help_heading = HEADING)]
    quiet: bool,
    /// Print each HTTP request on standard error
    #[arg(long, short, global = true, help_heading = HEADING)]
    verbose: bool,
}

#[derive(Subcommand)]
enum Noun {
    /// Images that servers start from
    #[command(subcommand)]
    Image(image::Command),
    /// Sizes and hardware of servers
    #[command(subcommand)]
    Flavor(flavor::Command),
    /// SSH public keys put into servers
    #[command(subcommand)]
    Keypair(keypair::Command),
    /// Networks between servers
    #[command(subcommand)]
    Network(network::Command),
    /// Address ranges of networks
    #[command(subcommand)]
    Subnet(subnet::Command),
    /// Attachments to networks
    #[command(subcommand)]
    Port(port::Command),
    /// What may pass at ports
    #[command(subcommand)]
    SecurityGroup(security_group::Command),
    /// Virtual machines
    #[command(subcommand)]
    Server(server::Command),
    /// Machines that servers run on
    #[command(subcommand)]
    Host(host::Command),
    /// Where disks and images lie
    #[command(subcommand)]
    Pool(pool::Command),
    /// Moves of servers between hosts
    #[command(subcommand)]
    Migration(migration::Command),
    /// What the coordinator does and did
    #[command(subcommand)]
    Operation(operation::Command),
    /// What hosts saw that should not be
    #[command(subcommand)]
    Event(event::Command),
    /// Where a server would fit, and why not elsewhere
    #[command(subcommand)]
    Placement(placement::Command),
    /// Hosts, versions and health in one view
    Status,
    /// Print the completion script of a shell
    Completion {
        /// For which shell
        shell: clap_complete::Shell,
    },
}

/// What every command works with.
struct App {
    session: Session,
    output: Output,
    progress: Progress,
}

fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if error.is_broken_pipe() => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("godwit: {error}");
            error.exit_code()
        }
    }
}

fn run(Cli { global, noun }: Cli) -> Result<()> {
    let format = match (global.json, global.quiet) {
        (true, _) => Format::Json,
        (_, true) => Format::Ids,
        _ => Format::Table,
    };
    let output = Output::new(format);
    if let Noun::Completion { shell } = noun {
        let mut script = Vec::new();
        clap_complete::generate(shell, &mut Cli::command(), "godwit", &mut script);
        return output.text(&String::from_utf8_lossy(&script));
    }
    let cloud = cloud::choose(
        global.os_cloud.as_deref(),
        &Surroundings { variable: &|name| std::env::var(name).ok(), folders: clouds_folders() },
    )?;
    let app = App {
        session: Session::new(cloud, global.verbose)?,
        output,
        progress: Progress { shown: !global.quiet },
    };
    match noun {
        Noun::Image(command) => command.run(&app),
        Noun::Flavor(command) => command.run(&app),
        Noun::Keypair(command) => command.run(&app),
        Noun::Network(command) => command.run(&app),
        Noun::Subnet(command) => command.run(&app),
        Noun::Port(command) => command.run(&app),
        Noun::SecurityGroup(command) => command.run(&app),
        Noun::Server(command) => command.run(&app),
        Noun::Host(command) => command.run(&app),
        Noun::Pool(command) => command.run(&app),
        Noun::Migration(command) => command.run(&app),
        Noun::Operation(command) => command.run(&app),
        Noun::Event(command) => command.run(&app),
        Noun::Placement(command) => command.run(&app),
        Noun::Status => status::run(&app),
        Noun::Completion { .. } => unreachable!("answered above, without a cloud"),
    }
}

fn clouds_folders() -> Vec<PathBuf> {
    let home = std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".config"));
    let config = std::env::var_os("XDG_CONFIG_HOME").map(PathBuf::from).or(home);
    let mut folders = vec![PathBuf::from(".")];
    folders.extend(config.map(|folder| folder.join("openstack")));
    folders.push(PathBuf::from("/etc/openstack"));
    folders
}

/// Finds all of `names` before anything is done to one of them.
fn find_all(app: &App, resource: &resource::Resource, names: &[String]) -> Result<Vec<serde_json::Value>> {
    names.iter().map(|name| resource.find(&app.session, name)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
