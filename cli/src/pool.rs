//! `godwit pool`: where disks and images lie, as the hosts see it.

use crate::error::Result;
use crate::output::{Column, cell};
use crate::resource::POOL;
use crate::{App, units};
use clap::Subcommand;
use serde_json::Value;

/// What can be done with pools.
#[derive(Subcommand)]
pub(crate) enum Command {
    /// List pools with their room and their hosts
    List,
    /// Show one pool
    Show {
        /// Its id, its name or its folder
        pool: String,
    },
}

const COLUMNS: &[Column] = &[
    ("name", |pool| cell(&pool["name"])),
    ("folder", |pool| cell(&pool["path"])),
    ("kind", |pool| cell(&pool["kind"])),
    ("share", |pool| cell(&pool["source"])),
    ("free", |pool| bytes(&pool["free_bytes"])),
    ("size", |pool| bytes(&pool["total_bytes"])),
    ("id", |pool| cell(&pool["id"])),
    ("reached by", |pool| hosts(pool, true)),
    ("not by", |pool| hosts(pool, false)),
];

impl Command {
    /// Does it.
    pub(crate) fn run(self, app: &App) -> Result<()> {
        match self {
            Command::List => app.output.list(&POOL.list(&app.session, "")?, COLUMNS, "name"),
            Command::Show { pool } => app.output.any_object(&POOL.find(&app.session, &pool)?, "name"),
        }
    }
}

fn bytes(value: &Value) -> String {
    value.as_u64().map(units::bytes).unwrap_or_default()
}

fn hosts(pool: &Value, reachable: bool) -> String {
    let hosts = pool["hosts"].as_array().into_iter().flatten();
    let names = hosts.filter(|host| host["reachable"] == reachable).map(|host| cell(&host["host"]));
    names.collect::<Vec<_>>().join(", ")
}
