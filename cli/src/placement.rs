//! `godwit placement`: where a server would fit, why not elsewhere, and how many of it there is room for.

use crate::App;
use crate::error::{Error, Result};
use crate::output::{Column, Format, cell};
use crate::resource::{FLAVOR, IMAGE, NETWORK};
use crate::session::Service;
use clap::Subcommand;
use serde_json::{Value, json};
use std::path::PathBuf;

/// What can be asked of placement.
#[derive(Subcommand)]
pub(crate) enum Command {
    /// Say for each host whether a server would fit, by which rule not, need against have, and what would make room
    Explain {
        /// The flavor, by id or name
        #[arg(long)]
        flavor: String,
        /// The image, by id or name; its properties count too
        #[arg(long)]
        image: Option<String>,
        /// A network of the server, by id or name
        #[arg(long)]
        network: Option<String>,
        /// The availability zone
        #[arg(long, value_name = "ZONE")]
        availability_zone: Option<String>,
        /// The server group, by id or name
        #[arg(long, value_name = "GROUP")]
        server_group: Option<String>,
    },
    /// Say how many more servers of a flavor fit, and where: in this fleet as it is, or in a described one
    Simulate {
        /// The flavor, by id or name
        #[arg(long)]
        flavor: String,
        /// The image, by id or name; its properties count too
        #[arg(long)]
        image: Option<String>,
        /// The availability zone
        #[arg(long, value_name = "ZONE")]
        availability_zone: Option<String>,
        /// Place no more than this
        #[arg(long, value_name = "COUNT")]
        most: Option<u64>,
        /// A JSON file that describes a fleet which is not there yet
        #[arg(long, value_name = "FILE")]
        fleet: Option<PathBuf>,
    },
}

const HOSTS: &[Column] = &[
    ("host", |host| cell(&host["host"])),
    ("fits", |host| match host["fits"].as_bool() {
        Some(true) => "yes".into(),
        _ => "no".into(),
    }),
    ("rule", |host| cell(&host["rule"])),
    ("need", |host| cell(&host["need"])),
    ("have", |host| cell(&host["have"])),
    ("message", |host| cell(&host["message"])),
];

const COUNTS: &[Column] = &[("host", |host| cell(&host["host"])), ("count", |host| cell(&host["count"]))];

impl Command {
    /// Does it.
    pub(crate) fn run(self, app: &App) -> Result<()> {
        match self {
            Self::Explain { flavor, image, network, availability_zone, server_group } => {
                let mut body = subject(app, &flavor, image.as_deref())?;
                if let Some(network) = network {
                    body["network"] = json!(NETWORK.find_id(&app.session, &network)?);
                }
                set(&mut body, "availability_zone", availability_zone.map(Value::from));
                set(&mut body, "server_group", server_group.map(Value::from));
                explain(app, &body)
            }
            Self::Simulate { flavor, image, availability_zone, most, fleet } => {
                let mut body = subject(app, &flavor, image.as_deref())?;
                set(&mut body, "availability_zone", availability_zone.map(Value::from));
                set(&mut body, "most", most.map(Value::from));
                set(&mut body, "fleet", fleet.map(|path| described(&path)).transpose()?);
                simulate(app, &body)
            }
        }
    }
}

fn subject(app: &App, flavor: &str, image: Option<&str>) -> Result<Value> {
    let mut body = json!({"flavor": FLAVOR.find_id(&app.session, flavor)?});
    if let Some(image) = image {
        body["image"] = json!(IMAGE.find_id(&app.session, image)?);
    }
    Ok(body)
}

fn set(body: &mut Value, key: &str, value: Option<Value>) {
    if let Some(value) = value {
        body[key] = value;
    }
}

fn described(path: &std::path::Path) -> Result<Value> {
    let text = std::fs::read_to_string(path).map_err(Error::file(path))?;
    serde_json::from_str(&text)
        .map_err(|error| Error::Usage(format!("{} is not JSON: {error}", path.display())))
}

fn explain(app: &App, body: &Value) -> Result<()> {
    let answer = app.session.post(Service::Operator, "/placement/explain", body)?;
    let hosts = answer["hosts"].as_array().map(Vec::as_slice).unwrap_or_default();
    match app.output.format() {
        Format::Json => app.output.json(&answer),
        Format::Ids => {
            let fitting: Vec<Value> = hosts.iter().filter(|host| host["fits"] == true).cloned().collect();
            app.output.list(&fitting, HOSTS, "host")
        }
        Format::Table => {
            app.output.table(hosts, HOSTS)?;
            for change in answer["changes"].as_array().into_iter().flatten() {
                app.output.text(&format!("{}\n", cell(&change["message"])))?;
            }
            Ok(())
        }
    }
}

fn simulate(app: &App, body: &Value) -> Result<()> {
    let answer = app.session.post(Service::Operator, "/placement/simulate", body)?;
    let hosts = answer["hosts"].as_array().map(Vec::as_slice).unwrap_or_default();
    match app.output.format() {
        Format::Json => app.output.json(&answer),
        Format::Ids => app.output.list(hosts, COUNTS, "host"),
        Format::Table => {
            app.output.table(hosts, COUNTS)?;
            let placed = cell(&answer["placed"]);
            match answer["stopped_by"].as_str() {
                Some(reason) => app.output.text(&format!("{placed} fit; for one more, {reason}\n")),
                None => app.output.text(&format!("{placed} fit, and perhaps more\n")),
            }
        }
    }
}
