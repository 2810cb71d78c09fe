//! `godwit status`: hosts, versions and health in one view.

use crate::App;
use crate::error::Result;
use crate::host;
use crate::output::{Format, cell};
use crate::session::Service;
use serde_json::{Value, json};

/// Prints it.
pub(crate) fn run(app: &App) -> Result<()> {
    let mut status = app.session.get(Service::Operator, "/status")?;
    let hosts = match status["hosts"].take() {
        Value::Array(hosts) => hosts,
        _ => Vec::new(),
    };
    match app.output.format() {
        Format::Json => {
            status["hosts"] = Value::Array(hosts);
            app.output.json(&status)
        }
        Format::Ids => app.output.list(&hosts, host::COLUMNS, "id"),
        Format::Table => {
            let mut rows = json!({"client_version": env!("CARGO_PKG_VERSION")});
            for (name, value) in status.as_object().into_iter().flatten() {
                rows[name] = match value {
                    Value::Object(counts) => Value::from(counted(counts)),
                    other => other.clone(),
                };
            }
            app.output.any_object(&rows, "version")?;
            app.output.text("\n")?;
            app.output.table(&hosts, host::COLUMNS)
        }
    }
}

/// `{"ACTIVE": 2, "ERROR": 1}` as `2 ACTIVE, 1 ERROR`.
fn counted(counts: &serde_json::Map<String, Value>) -> String {
    counts.iter().map(|(name, count)| format!("{} {name}", cell(count))).collect::<Vec<_>>().join(", ")
}
