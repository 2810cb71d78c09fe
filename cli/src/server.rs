//! `godwit server`: virtual machines.

mod create;
mod migrate;
mod resize;

use crate::error::{Error, Result};
use crate::output::{Column, Format, cell};
use crate::resource::{SERVER, id};
use crate::session::Service;
use crate::wait::{Look, Wait};
use crate::{App, find_all};
use clap::{Args, Subcommand};
use serde_json::{Value, json};
use std::time::{Duration, Instant};

/// What can be done with servers.
#[derive(Subcommand)]
pub(crate) enum Command {
    /// Create a server
    Create(create::Create),
    /// List servers
    List {
        /// Those of all projects
        #[arg(long)]
        all_projects: bool,
    },
    /// Show one server; when it failed, with the reason
    Show {
        /// Id or name
        server: String,
    },
    /// Delete servers and their disks
    Delete {
        /// Ids or names
        #[arg(required = true)]
        servers: Vec<String>,
        #[command(flatten)]
        waiting: Waiting,
    },
    /// Shut a server down, first kindly
    Stop {
        /// Id or name
        server: String,
        #[command(flatten)]
        waiting: Waiting,
    },
    /// Start a server that is stopped
    Start {
        /// Id or name
        server: String,
        #[command(flatten)]
        waiting: Waiting,
    },
    /// Restart a server
    Reboot {
        /// Id or name
        server: String,
        /// Do not ask the guest, reset it
        #[arg(long)]
        hard: bool,
        #[command(flatten)]
        waiting: Waiting,
    },
    /// Print what the server wrote to its serial console
    #[command(visible_alias = "log")]
    Console {
        /// Id or name
        server: String,
        /// Only the last lines [default: all that is kept]
        #[arg(long, value_name = "COUNT")]
        lines: Option<u32>,
    },
    /// Move a server to another host without stopping it, or with --cold switched off
    Migrate(migrate::Migrate),
    /// Give a server another flavor, perhaps on another host; to be confirmed or reverted afterwards
    Resize(resize::Resize),
}

/// Options of commands that can wait for the end.
#[derive(Args)]
pub(crate) struct Waiting {
    /// Wait until it is done
    #[arg(long)]
    pub(crate) wait: bool,
    /// Wait at most this long
    #[arg(
        long,
        value_name = "SECONDS",
        requires = "wait",
        default_value_t = 600,
        value_parser = clap::value_parser!(u64).range(1..=86400),
    )]
    timeout: u64,
}

impl Waiting {
    pub(crate) fn timeout(&self) -> Duration {
        Duration::from_secs(self.timeout)
    }
}

const COLUMNS: &[Column] = &[
    ("id", |server| cell(&server["id"])),
    ("name", |server| cell(&server["name"])),
    ("status", |server| cell(&server["status"])),
    ("host", |server| cell(&server["OS-EXT-SRV-ATTR:host"])),
    ("addresses", |server| addresses(server, ", ")),
    ("flavor", flavor),
];

const ROWS: &[Column] = &[
    ("id", |server| cell(&server["id"])),
    ("name", |server| cell(&server["name"])),
    ("status", |server| cell(&server["status"])),
    ("task", |server| cell(&server["OS-EXT-STS:task_state"])),
    ("host", |server| cell(&server["OS-EXT-SRV-ATTR:host"])),
    ("domain", |server| cell(&server["OS-EXT-SRV-ATTR:instance_name"])),
    ("addresses", |server| addresses(server, "\n")),
    ("flavor", flavor),
    ("image", |server| cell(&server["image"]["id"])),
    ("keypair", |server| cell(&server["key_name"])),
    ("zone", |server| cell(&server["OS-EXT-AZ:availability_zone"])),
    ("created", |server| cell(&server["created"])),
    ("started", |server| cell(&server["OS-SRV-USG:launched_at"])),
    ("fault", |server| fault(server).unwrap_or_default()),
];

impl Command {
    /// Does it.
    pub(crate) fn run(self, app: &App) -> Result<()> {
        match self {
            Command::Create(create) => create.run(app),
            Command::List { all_projects } => {
                let query = if all_projects { "all_tenants=True" } else { "" };
                app.output.list(&SERVER.list(&app.session, query)?, COLUMNS, "id")
            }
            Command::Show { server } => app.output.object(&SERVER.find(&app.session, &server)?, ROWS, "id"),
            Command::Delete { servers, waiting } => delete(app, &servers, &waiting),
            Command::Stop { server, waiting } => {
                act(app, &server, &json!({"os-stop": null}), &["SHUTOFF"], "stopping", &waiting)
            }
            Command::Start { server, waiting } => {
                act(app, &server, &json!({"os-start": null}), &["ACTIVE"], "starting", &waiting)
            }
            Command::Reboot { server, hard, waiting } => {
                let kind = if hard { "HARD" } else { "SOFT" };
                act(app, &server, &json!({"reboot": {"type": kind}}), &["ACTIVE"], "rebooting", &waiting)
            }
            Command::Console { server, lines } => {
                let server = SERVER.find_id(&app.session, &server)?;
                let body = match lines {
                    Some(lines) => json!({"os-getConsoleOutput": {"length": lines}}),
                    None => json!({"os-getConsoleOutput": {}}),
                };
                let answer =
                    app.session.post(Service::Compute, &format!("/servers/{server}/action"), &body)?;
                match app.output.format() {
                    Format::Json => app.output.json(&answer),
                    // The guest's own bytes, terminal sequences included: a console shows what it was sent.
                    _ => app.output.text(answer["output"].as_str().unwrap_or_default()),
                }
            }
            Command::Migrate(migrate) => migrate.run(app),
            Command::Resize(resize) => resize.run(app),
        }
    }
}

fn delete(app: &App, names: &[String], waiting: &Waiting) -> Result<()> {
    let servers = find_all(app, &SERVER, names)?;
    for server in &servers {
        app.session.delete(Service::Compute, &format!("/servers/{}", id(server)?))?;
    }
    if waiting.wait {
        for server in &servers {
            wait_gone(app, server, waiting.timeout())?;
        }
    }
    app.output.done(if waiting.wait { "deleted server" } else { "deleting server" }, &servers)
}

fn wait_gone(app: &App, server: &Value, timeout: Duration) -> Result<()> {
    let id = id(server)?;
    let what = format!("server {} is deleted", title(server));
    let bar = app.progress.spinner(&format!("deleting {}", title(server)));
    let mut resting_since: Option<Instant> = None;
    Wait { what: &what, look: format!("godwit server show {id}"), timeout }.run(&bar, || {
        let server = match SERVER.get(&app.session, &id) {
            Ok(server) => server,
            Err(error) if error.is_not_found() => return Ok(Look::Done(())),
            Err(error) => return Err(error),
        };
        // It may have been in ERROR before: only one that stays so without a task was not deleted.
        let rests = server["status"] == "ERROR" && server["OS-EXT-STS:task_state"].is_null();
        if !rests {
            resting_since = None;
        } else if resting_since.get_or_insert_with(Instant::now).elapsed() >= AT_REST {
            return Err(failed(&server, "could not be deleted"));
        }
        Ok(Look::Not(state(&server)))
    })
}

fn act(app: &App, name: &str, action: &Value, wanted: &[&str], doing: &str, waiting: &Waiting) -> Result<()> {
    let server = SERVER.find(&app.session, name)?;
    let id = id(&server)?;
    app.session.post(Service::Compute, &format!("/servers/{id}/action"), action)?;
    if waiting.wait {
        let server = wait_status(app, &server, wanted, doing, waiting.timeout())?;
        return app.output.object(&server, ROWS, "id");
    }
    app.output.done(&format!("{doing} server"), &[server])
}

/// A server that has come to rest elsewhere for this long is not on its way any more.
const AT_REST: Duration = Duration::from_secs(5);

/// Waits until the server has one of `wanted` as its status and nothing more to do.
fn wait_status(app: &App, server: &Value, wanted: &[&str], doing: &str, timeout: Duration) -> Result<Value> {
    let id = id(server)?;
    let right = |status: &Value| wanted.iter().any(|wanted| status == wanted);
    let wanted = wanted.join(" or ");
    let what = format!("server {} becomes {wanted}", title(server));
    let bar = app.progress.spinner(&format!("{doing} {}", title(server)));
    let mut resting_since: Option<Instant> = None;
    Wait { what: &what, look: format!("godwit server show {id}"), timeout }.run(&bar, || {
        let server = SERVER.get(&app.session, &id)?;
        if !server["OS-EXT-STS:task_state"].is_null() {
            resting_since = None;
        } else if server["status"] == "ERROR" {
            return Err(failed(&server, "failed"));
        } else if right(&server["status"]) {
            return Ok(Look::Done(server));
        } else if matches!(server["status"].as_str(), Some("ACTIVE" | "SHUTOFF" | "PAUSED"))
            && resting_since.get_or_insert_with(Instant::now).elapsed() >= AT_REST
        {
            return Err(Error::Failed(format!(
                "server {} is {} instead of {wanted}; for the reason: godwit operation list --server {id}",
                title(&server),
                cell(&server["status"]),
            )));
        }
        Ok(Look::Not(state(&server)))
    })
}

/// The error for a server that failed, with the service's reason whole.
fn failed(server: &Value, how: &str) -> Error {
    let reason = fault(server).unwrap_or_else(|| "the service gave no reason".into());
    Error::Failed(format!("server {} ({}) {how}: {reason}", title(server), cell(&server["id"])))
}

fn fault(server: &Value) -> Option<String> {
    let message = server["fault"]["message"].as_str()?;
    match server["fault"]["details"].as_str().map(str::trim) {
        Some(details) if !details.is_empty() && details != message => Some(format!("{message}\n{details}")),
        _ => Some(message.to_owned()),
    }
}

/// Why a migration or a resize of the server failed, as far as the caller may know; `record` is the migration's.
fn reason(record: Option<&Value>, server: &Value, id: &str) -> String {
    let told = record.and_then(|record| record["error"].as_str().map(str::to_owned));
    told.or_else(|| fault(server))
        .unwrap_or_else(|| format!("for the reason see: godwit operation list --server {id}"))
}

fn state(server: &Value) -> String {
    match server["OS-EXT-STS:task_state"].as_str() {
        Some(task) => format!("{}, {task}", cell(&server["status"])),
        None => cell(&server["status"]),
    }
}

fn title(server: &Value) -> String {
    cell(&server["name"])
}

fn flavor(server: &Value) -> String {
    cell(&server["flavor"]["original_name"])
}

fn addresses(server: &Value, separator: &str) -> String {
    let networks = server["addresses"].as_object().into_iter().flatten();
    let lines = networks.map(|(network, ports)| {
        let addresses = ports.as_array().into_iter().flatten().map(|port| cell(&port["addr"]));
        format!("{network}={}", addresses.collect::<Vec<_>>().join(","))
    });
    lines.collect::<Vec<_>>().join(separator)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_is_told_whole_and_once() {
        let server = json!({"fault": {"message": "no host fits:\nh1: cells\nh2: memory", "details": ""}});
        assert_eq!(fault(&server).unwrap(), "no host fits:\nh1: cells\nh2: memory");
        let server = json!({"fault": {"message": "m", "details": "m"}});
        assert_eq!(fault(&server).unwrap(), "m");
        let server = json!({"fault": {"message": "m", "details": "d"}});
        assert_eq!(fault(&server).unwrap(), "m\nd");
        assert_eq!(fault(&json!({})), None);
    }

    #[test]
    fn addresses_are_grouped_by_network() {
        let server = json!({"addresses": {"a": [{"addr": "10.0.0.3"}, {"addr": "fd00::3"}], "b": [{"addr": "10.1.0.3"}]}});
        assert_eq!(addresses(&server, ", "), "a=10.0.0.3,fd00::3, b=10.1.0.3");
    }
}
