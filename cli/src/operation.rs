//! `godwit operation`: what the coordinator does and did.

use crate::App;
use crate::error::Result;
use crate::output::{Column, cell};
use crate::resource::{OPERATION, SERVER};
use clap::Subcommand;

/// What can be done with operations.
#[derive(Subcommand)]
pub(crate) enum Command {
    /// List operations, the newest last
    List {
        /// Only those on this server, by id or name
        #[arg(long)]
        server: Option<String>,
    },
    /// Show one operation
    Show {
        /// Its id
        operation: String,
    },
}

const COLUMNS: &[Column] = &[
    ("id", |operation| cell(&operation["id"])),
    ("verb", |operation| cell(&operation["verb"])),
    ("server", |operation| match operation["server_name"].as_str() {
        Some(_) => cell(&operation["server_name"]),
        None => cell(&operation["server"]),
    }),
    ("phase", |operation| cell(&operation["phase"])),
    ("step", |operation| cell(&operation["step"])),
    ("created", |operation| cell(&operation["created_at"])),
    ("error", |operation| cell(&operation["error"])),
];

impl Command {
    /// Does it.
    pub(crate) fn run(self, app: &App) -> Result<()> {
        match self {
            Command::List { server } => {
                // A deleted server's operations are still there, and its id is all that is left of it.
                let server = server.map(|wanted| match SERVER.find_id(&app.session, &wanted) {
                    Err(error) if error.is_not_found() && is_id(&wanted) => Ok(wanted),
                    other => other,
                });
                let server = server.transpose()?;
                let query = server.as_ref().map(|id| format!("server={id}")).unwrap_or_default();
                let mut operations = OPERATION.list(&app.session, &query)?;
                operations
                    .retain(|operation| server.as_ref().is_none_or(|id| operation["server"] == id.as_str()));
                operations.sort_by_key(|operation| cell(&operation["created_at"]));
                app.output.list(&operations, COLUMNS, "id")
            }
            Command::Show { operation } => {
                app.output.any_object(&OPERATION.find(&app.session, &operation)?, "id")
            }
        }
    }
}

fn is_id(text: &str) -> bool {
    text.len() == 36 && text.chars().all(|c| c.is_ascii_hexdigit() || c == '-')
}
