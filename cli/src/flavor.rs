//! `godwit flavor`: sizes and hardware of servers.

use crate::error::Result;
use crate::http::encode;
use crate::output::{Column, cell};
use crate::resource::{FLAVOR, id};
use crate::session::Service;
use crate::{App, find_all, units};
use clap::Subcommand;
use serde_json::{Map, Value, json};

/// What can be done with flavors.
#[derive(Subcommand)]
pub(crate) enum Command {
    /// Create a flavor
    Create {
        /// The flavor's name
        name: String,
        /// Virtual CPUs
        #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
        vcpus: u32,
        /// Memory: MiB, or with a unit such as 512M or 2G
        #[arg(long, value_parser = units::memory_mib)]
        memory: u64,
        /// Disk: GiB, or with a unit such as 10G; 0 is the image's own size
        #[arg(long, value_parser = units::disk_gib)]
        disk: u64,
        /// An extra spec such as hw:numa_nodes=2; may be repeated
        #[arg(long, value_name = "KEY=VALUE", value_parser = units::property)]
        property: Vec<(String, String)>,
    },
    /// List flavors
    List,
    /// Show one flavor
    Show {
        /// Id or name
        flavor: String,
    },
    /// Change the extra specs of a flavor; servers that exist keep what they have
    #[command(group(clap::ArgGroup::new("change").required(true).multiple(true)))]
    Set {
        /// Id or name
        flavor: String,
        /// An extra spec to set; may be repeated
        #[arg(long, value_name = "KEY=VALUE", value_parser = units::property, group = "change")]
        property: Vec<(String, String)>,
        /// An extra spec to take away; may be repeated
        #[arg(long, value_name = "KEY", group = "change")]
        unset: Vec<String>,
    },
    /// Delete flavors
    Delete {
        /// Ids or names
        #[arg(required = true)]
        flavors: Vec<String>,
    },
}

const COLUMNS: &[Column] = &[
    ("id", |flavor| cell(&flavor["id"])),
    ("name", |flavor| cell(&flavor["name"])),
    ("vcpus", |flavor| cell(&flavor["vcpus"])),
    ("memory", |flavor| scaled(&flavor["ram"], 20)),
    ("disk", |flavor| scaled(&flavor["disk"], 30)),
    ("properties", |flavor| properties(flavor, ", ")),
];

const ROWS: &[Column] = &[
    ("id", |flavor| cell(&flavor["id"])),
    ("name", |flavor| cell(&flavor["name"])),
    ("vcpus", |flavor| cell(&flavor["vcpus"])),
    ("memory", |flavor| scaled(&flavor["ram"], 20)),
    ("disk", |flavor| scaled(&flavor["disk"], 30)),
    ("public", |flavor| cell(&flavor["os-flavor-access:is_public"])),
    ("properties", |flavor| properties(flavor, "\n")),
];

impl Command {
    /// Does it.
    pub(crate) fn run(self, app: &App) -> Result<()> {
        match self {
            Command::Create { name, vcpus, memory, disk, property } => {
                let flavor = json!({"flavor": {
                    "id": null, "name": name, "vcpus": vcpus, "ram": memory, "disk": disk, "swap": 0,
                    "OS-FLV-EXT-DATA:ephemeral": 0, "os-flavor-access:is_public": true,
                }});
                let flavor = FLAVOR.unwrap(app.session.post(Service::Compute, "/flavors", &flavor)?);
                let id = id(&flavor)?;
                // A flavor without the hardware asked for would start servers that are not what was meant.
                set(app, &id, property).inspect_err(|_| {
                    if let Err(error) = app.session.delete(Service::Compute, &format!("/flavors/{id}")) {
                        eprintln!("godwit: flavor {id} is left behind without its properties: {error}");
                    }
                })?;
                app.output.object(&FLAVOR.get(&app.session, &id)?, ROWS, "id")
            }
            Command::List => app.output.list(&FLAVOR.list(&app.session, "")?, COLUMNS, "id"),
            Command::Show { flavor } => app.output.object(&FLAVOR.find(&app.session, &flavor)?, ROWS, "id"),
            Command::Set { flavor, property, unset } => {
                let id = FLAVOR.find_id(&app.session, &flavor)?;
                set(app, &id, property)?;
                for key in unset {
                    let path = format!("/flavors/{}/os-extra_specs/{}", encode(&id), encode(&key));
                    app.session.delete(Service::Compute, &path)?;
                }
                app.output.object(&FLAVOR.get(&app.session, &id)?, ROWS, "id")
            }
            Command::Delete { flavors } => {
                let flavors = find_all(app, &FLAVOR, &flavors)?;
                for flavor in &flavors {
                    app.session.delete(Service::Compute, &format!("/flavors/{}", encode(&id(flavor)?)))?;
                }
                app.output.done("deleted flavor", &flavors)
            }
        }
    }
}

fn set(app: &App, id: &str, properties: Vec<(String, String)>) -> Result<()> {
    if properties.is_empty() {
        return Ok(());
    }
    let specs: Map<String, Value> =
        properties.into_iter().map(|(key, value)| (key, Value::from(value))).collect();
    let path = format!("/flavors/{}/os-extra_specs", encode(id));
    app.session.post(Service::Compute, &path, &json!({"extra_specs": specs})).map(|_| ())
}

/// `count` in units of 2^shift bytes.
fn scaled(count: &Value, shift: u32) -> String {
    count.as_u64().and_then(|count| count.checked_mul(1 << shift)).map(units::bytes).unwrap_or_default()
}

fn properties(flavor: &Value, separator: &str) -> String {
    let specs = flavor["extra_specs"].as_object().into_iter().flatten();
    specs.map(|(key, value)| format!("{key}={}", cell(value))).collect::<Vec<_>>().join(separator)
}
