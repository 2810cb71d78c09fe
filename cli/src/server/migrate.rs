//! `godwit server migrate`: a migration, live or cold, watched to its end.

use super::{Waiting, reason, resize, title};
use crate::App;
use crate::error::{Error, Result};
use crate::migration::{self, Ending};
use crate::output::{Format, cell};
use crate::resource::{SERVER, id};
use crate::session::Service;
use crate::wait::{Look, Wait};
use clap::Args;
use indicatif::ProgressBar;
use serde_json::{Value, json};

/// Which server goes where.
#[derive(Args)]
pub(crate) struct Migrate {
    /// Id or name
    server: String,
    /// The target [default: the best that fits]
    #[arg(long)]
    host: Option<String>,
    /// Switch it off, move it, and start it there if it ran; to be confirmed or reverted afterwards
    #[arg(long)]
    cold: bool,
    #[command(flatten)]
    waiting: Waiting,
}

impl Migrate {
    /// Starts the migration and, if asked, waits until it has ended.
    pub(super) fn run(self, app: &App) -> Result<()> {
        let server = SERVER.find(&app.session, &self.server)?;
        let server_id = id(&server)?;
        if self.cold {
            // What is not asked for is not sent: older services know of no host here.
            let action = json!({"migrate": self.host.map(|host| json!({"host": host}))});
            return resize::change(app, &server, &action, "migrating", &self.waiting);
        }
        let before = migration::newest(app, &server_id)?.map_or(0, |migration| migration::number(&migration));
        let action = json!({"os-migrateLive": {"host": self.host, "block_migration": "auto"}});
        app.session.post(Service::Compute, &format!("/servers/{server_id}/action"), &action)?;
        if !self.waiting.wait {
            return app.output.done("migrating server", &[server]);
        }
        let migration = self.watch(app, &server, &server_id, before)?;
        let record = migration::record(app, &migration);
        let moved = SERVER.get(&app.session, &server_id)?;
        match migration::ending(&migration) {
            Some(Ending::Completed) => report(app, &moved, &record),
            Some(Ending::Cancelled) => Err(Error::Failed(format!(
                "the migration of {} was cancelled; it runs on {}",
                title(&moved),
                cell(&moved["OS-EXT-SRV-ATTR:host"])
            ))),
            _ => {
                let reason = reason(Some(&record), &moved, &server_id);
                Err(Error::Failed(format!(
                    "the migration of {} failed, it is {} on {}: {reason}",
                    title(&moved),
                    cell(&moved["status"]),
                    cell(&moved["OS-EXT-SRV-ATTR:host"]),
                )))
            }
        }
    }

    /// Waits for the end of the migration that is newer than number `before`.
    fn watch(&self, app: &App, server: &Value, server_id: &str, before: u64) -> Result<Value> {
        let what = format!("server {} is migrated", title(server));
        let look = format!("godwit migration list --server {server_id}");
        let bar = app.progress.bytes(&format!("migrating {}", title(server)), Some(0));
        let migration = Wait { what: &what, look, timeout: self.waiting.timeout() }.run(&bar, || {
            let Some(migration) =
                migration::newest(app, server_id)?.filter(|migration| migration::number(migration) > before)
            else {
                return Ok(Look::Not("accepted".into()));
            };
            if migration::ending(&migration).is_some() {
                return Ok(Look::Done(migration));
            }
            show_progress(app, server_id, migration::number(&migration), &bar);
            Ok(Look::Not(cell(&migration["status"])))
        })?;
        // The record ends an instant before the server's own state does.
        let bar = app.progress.spinner(&format!("migrating {}", title(server)));
        let look = format!("godwit server show {server_id}");
        Wait { what: &what, look, timeout: self.waiting.timeout() }.run(&bar, || {
            let server = SERVER.get(&app.session, server_id)?;
            if server["status"] != "MIGRATING" && server["OS-EXT-STS:task_state"].is_null() {
                return Ok(Look::Done(()));
            }
            Ok(Look::Not(super::state(&server)))
        })?;
        Ok(migration)
    }
}

/// Moves the bar to how much of the memory is on the target. The migration may end at any moment, so an
/// answer without it says nothing.
fn show_progress(app: &App, server: &str, migration: u64, bar: &ProgressBar) {
    if bar.is_hidden() {
        return;
    }
    let path = format!("/servers/{server}/migrations/{migration}");
    let Ok(answer) = app.session.get(Service::Compute, &path) else { return };
    let migration = answer.get("migration").unwrap_or(&answer);
    let total = migration["memory_total_bytes"].as_u64().unwrap_or(0);
    let remaining = migration["memory_remaining_bytes"].as_u64().unwrap_or(total);
    bar.set_length(total);
    bar.set_position(total.saturating_sub(remaining));
}

fn report(app: &App, server: &Value, record: &Value) -> Result<()> {
    match app.output.format() {
        Format::Json => app.output.json(record),
        Format::Ids => app.output.text(&format!("{}\n", cell(&record["id"]))),
        Format::Table => {
            let mut line = format!("migrated {} to {}", title(server), cell(&server["OS-EXT-SRV-ATTR:host"]));
            for (field, words) in
                [("total_ms", "in all"), ("downtime_ms", "of them paused"), ("gap_ms", "without packets")]
            {
                if let Some(ms) = record[field].as_f64() {
                    line.push_str(&format!(", {ms:.0} ms {words}"));
                }
            }
            app.output.text(&format!("{line}\n"))
        }
    }
}
