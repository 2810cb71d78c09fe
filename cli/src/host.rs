//! `godwit host`: the machines that servers run on, and how new ones join.

mod drain;

use crate::error::Result;
use crate::http::encode;
use crate::output::{Column, Format, cell};
use crate::resource::{HOST, id};
use crate::session::Service;
use crate::{App, units};
use clap::Subcommand;
use serde_json::{Value, json};

/// What can be done with hosts.
#[derive(Subcommand)]
pub(crate) enum Command {
    /// List hosts
    List,
    /// Show one host with all that it reports
    Show {
        /// Id or name
        host: String,
    },
    /// Make a token that lets one new host join, once
    Token {
        /// How long it is good for [default: 24 hours]
        #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..))]
        ttl: Option<u64>,
    },
    /// Let new servers be placed on a host
    Enable {
        /// Id or name
        host: String,
    },
    /// Place no new servers on a host; those there go on
    Disable {
        /// Id or name
        host: String,
        /// Why, for others to read
        #[arg(long)]
        reason: Option<String>,
    },
    /// Move all servers of a host away, live, and place no new ones on it
    Drain(drain::Drain),
    /// Stop draining a host; servers that have left do not come back by themselves
    Undrain {
        /// Id or name
        host: String,
    },
    /// List what does not run where it was reserved; none is as it should be
    Drift,
    /// Forget a host without servers; it may not connect any more
    Remove {
        /// Id or name
        host: String,
    },
}

pub(crate) const COLUMNS: &[Column] = &[
    ("name", |host| cell(&host["name"])),
    ("state", |host| cell(&host["state"])),
    ("placement", |host| match (host["enabled"].as_bool(), host["draining"].as_bool()) {
        (Some(_), Some(true)) => "draining".into(),
        (Some(true), _) => "enabled".into(),
        (Some(false), _) => "disabled".into(),
        (None, _) => String::new(),
    }),
    ("address", |host| cell(&host["address"])),
    ("servers", |host| cell(&host["instances"])),
    ("vcpus", |host| used(&host["vcpus_used"], &host["vcpus"], cell)),
    ("memory", |host| used(&host["memory_used_bytes"], &host["memory_bytes"], bytes)),
    ("cells", |host| match &host["cells"] {
        Value::Array(cells) => cells.len().to_string(),
        other => cell(other),
    }),
    ("hypervisor", |host| cell(&host["hypervisor"])),
    ("agent", |host| cell(&host["agent_version"])),
];

const DRIFT_COLUMNS: &[Column] = &[
    ("host", |drift| cell(&drift["host"])),
    ("server", |drift| match drift["server_name"].as_str() {
        Some(_) => cell(&drift["server_name"]),
        None => cell(&drift["server"]),
    }),
    ("what", |drift| match (drift["aspect"]["vcpu"].as_u64(), drift["aspect"]["cell"].as_u64()) {
        (Some(vcpu), _) => format!("{} {vcpu}", cell(&drift["kind"])),
        (_, Some(of)) => format!("{} of cell {of}", cell(&drift["kind"])),
        _ => cell(&drift["kind"]),
    }),
    ("wanted", |drift| cell(&drift["wanted"])),
    ("found", |drift| cell(&drift["found"])),
];

impl Command {
    /// Does it.
    pub(crate) fn run(self, app: &App) -> Result<()> {
        match self {
            Command::List => app.output.list(&HOST.list(&app.session, "")?, COLUMNS, "id"),
            Command::Show { host } => app.output.any_object(&HOST.find(&app.session, &host)?, "id"),
            Command::Token { ttl } => token(app, ttl),
            Command::Enable { host } => set_enabled(app, &host, true, None),
            Command::Disable { host, reason } => set_enabled(app, &host, false, reason),
            Command::Drain(drain) => drain.run(app),
            Command::Undrain { host } => {
                let host = HOST.find(&app.session, &host)?;
                app.session.delete(Service::Operator, &format!("/hosts/{}/drain", encode(&id(&host)?)))?;
                app.output.done("no longer draining host", &[host])
            }
            Command::Drift => {
                let answer = app.session.get(Service::Operator, "/drifts")?;
                let drifts = answer["drifts"].as_array().cloned().unwrap_or_default();
                app.output.list(&drifts, DRIFT_COLUMNS, "server")
            }
            Command::Remove { host } => {
                let host = HOST.find(&app.session, &host)?;
                app.session.delete(Service::Operator, &format!("/hosts/{}", encode(&id(&host)?)))?;
                app.output.done("removed host", &[host])
            }
        }
    }
}

fn token(app: &App, ttl: Option<u64>) -> Result<()> {
    let body = ttl.map_or_else(|| json!({}), |seconds| json!({"ttl_seconds": seconds}));
    let answer = app.session.post(Service::Operator, "/join-tokens", &body)?;
    let token = cell(&answer["token"]);
    match app.output.format() {
        Format::Json => app.output.json(&answer),
        Format::Ids => app.output.text(&format!("{token}\n")),
        Format::Table => app.output.text(&format!(
            "Good for one host, until {}. On that host, as root:\n  godwit-agent join {} {token}\n",
            cell(&answer["expires_at"]),
            app.session.root_url(),
        )),
    }
}

fn set_enabled(app: &App, wanted: &str, enabled: bool, reason: Option<String>) -> Result<()> {
    let host = HOST.find(&app.session, wanted)?;
    let path = format!("/hosts/{}", encode(&id(&host)?));
    app.session.put(Service::Operator, &path, &json!({"enabled": enabled, "reason": reason}))?;
    app.output.done(if enabled { "enabled host" } else { "disabled host" }, &[host])
}

fn used(used: &Value, total: &Value, write: fn(&Value) -> String) -> String {
    match (used.is_null(), total.is_null()) {
        (_, true) => String::new(),
        (true, false) => write(total),
        (false, false) => format!("{}/{}", write(used), write(total)),
    }
}

fn bytes(value: &Value) -> String {
    value.as_u64().map(units::bytes).unwrap_or_default()
}
