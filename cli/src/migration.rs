//! `godwit migration`: moves of servers between hosts, past and present.

use crate::App;
use crate::error::{Error, Result};
use crate::output::{Column, cell};
use crate::resource::{MIGRATION, SERVER, id};
use crate::session::Service;
use clap::Subcommand;
use serde_json::Value;

/// What can be done with migrations.
#[derive(Subcommand)]
pub(crate) enum Command {
    /// List migrations, the newest last
    List {
        /// Only those of this server, by id or name
        #[arg(long)]
        server: Option<String>,
    },
    /// Show one migration with what was measured
    Show {
        /// Its number or id
        migration: String,
    },
    /// Stop a migration; the server goes on where it was
    Cancel {
        /// Its number or id
        migration: String,
    },
}

const COLUMNS: &[Column] = &[
    ("id", |migration| cell(&migration["id"])),
    ("server", |migration| cell(&migration["instance_uuid"])),
    ("kind", |migration| cell(&migration["migration_type"])),
    ("status", |migration| cell(&migration["status"])),
    ("source", |migration| cell(&migration["source_compute"])),
    ("target", |migration| cell(&migration["dest_compute"])),
    ("created", |migration| cell(&migration["created_at"])),
    ("updated", |migration| cell(&migration["updated_at"])),
];

/// How a migration ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ending {
    /// The server is on the target.
    Completed,
    /// It was stopped, or reverted, on request.
    Cancelled,
    /// Anything else.
    Failed,
}

impl Command {
    /// Does it.
    pub(crate) fn run(self, app: &App) -> Result<()> {
        match self {
            Command::List { server } => {
                let query = match server {
                    Some(server) => format!("instance_uuid={}", SERVER.find_id(&app.session, &server)?),
                    None => String::new(),
                };
                let mut migrations = MIGRATION.list(&app.session, &query)?;
                migrations.sort_by_key(number);
                app.output.list(&migrations, COLUMNS, "id")
            }
            Command::Show { migration } => {
                let migration = find(app, &migration)?;
                app.output.any_object(&record(app, &migration), "id")
            }
            Command::Cancel { migration } => {
                let migration = find(app, &migration)?;
                let number = id(&migration)?;
                if ending(&migration).is_some() {
                    return Err(Error::Failed(format!(
                        "migration {number} has ended already: {}",
                        cell(&migration["status"])
                    )));
                }
                let server = cell(&migration["instance_uuid"]);
                app.session.delete(Service::Compute, &format!("/servers/{server}/migrations/{number}"))?;
                app.output.done("cancelling migration", &[migration])
            }
        }
    }
}

/// The ending, in Nova's words for it; none while the migration goes on.
pub(crate) fn ending(migration: &Value) -> Option<Ending> {
    match migration["status"].as_str()? {
        "completed" | "done" | "finished" | "confirmed" => Some(Ending::Completed),
        "cancelled" | "reverted" => Some(Ending::Cancelled),
        "error" | "failed" => Some(Ending::Failed),
        _ => None,
    }
}

/// A server's newest migration.
pub(crate) fn newest(app: &App, server: &str) -> Result<Option<Value>> {
    let migrations = MIGRATION.list(&app.session, &format!("instance_uuid={server}"))?;
    Ok(migrations.into_iter().max_by_key(number))
}

/// Its number; 0 in an answer that has none.
pub(crate) fn number(migration: &Value) -> u64 {
    migration["id"].as_u64().unwrap_or(0)
}

/// The migration as the operator API tells it, with what was measured; else as the compute API does.
pub(crate) fn record(app: &App, migration: &Value) -> Value {
    let key = migration["uuid"].as_str().map(str::to_owned).unwrap_or_else(|| cell(&migration["id"]));
    match app.session.get(Service::Operator, &format!("/migrations/{key}")) {
        Ok(mut answer) if answer["migration"].is_object() => answer["migration"].take(),
        Ok(answer) if answer.is_object() => answer,
        _ => migration.clone(),
    }
}

/// The compute API shows no single migration that has ended: look through the list.
fn find(app: &App, wanted: &str) -> Result<Value> {
    let migrations = MIGRATION.list(&app.session, "")?;
    let found = migrations.into_iter().find(|item| cell(&item["id"]) == wanted || item["uuid"] == wanted);
    found.ok_or_else(|| Error::NotFound { noun: MIGRATION.noun, name: wanted.to_owned() })
}
