//! `godwit status`: hosts, versions and health in one view.

use crate::App;
use crate::error::Result;
use crate::host;
use crate::output::Format;
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
            status["client_version"] = json!(env!("CARGO_PKG_VERSION"));
            app.output.any_object(&status, "version")?;
            app.output.text("\n")?;
            app.output.table(&hosts, host::COLUMNS)
        }
    }
}
