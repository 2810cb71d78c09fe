//! `godwit network l2`: what each host should forward, against what its kernel says it does.

use crate::App;
use crate::error::Result;
use crate::output::{Column, Format, cell};
use serde_json::Value;
use std::collections::BTreeSet;

const ROWS: &[Column] = &[
    ("network", |tables| cell(&tables["network"])),
    ("name", |tables| cell(&tables["name"])),
    ("vni", |tables| cell(&tables["vni"])),
    ("mtu", |tables| cell(&tables["mtu"])),
    ("udp port", |tables| cell(&tables["udp_port"])),
    ("generation", |tables| cell(&tables["generation"])),
];

const COLUMNS: &[Column] = &[
    ("host", |host| cell(&host["host"])),
    ("vtep", |host| cell(&host["vtep"])),
    ("agrees", |host| if host["agrees"] == true { "yes".into() } else { "no".into() }),
    ("ports here", |host| {
        let ports = items(&host["wanted"]["ports"])
            .map(|port| format!("{} {}", cell(&port["mac"]), cell(&port["addresses"])));
        ports.collect::<Vec<_>>().join("\n")
    }),
    ("ports elsewhere", |host| {
        compare(&host["wanted"]["forwarding"], &host["reported"]["forwarding"], entry)
    }),
    ("broadcast goes to", |host| compare(&host["wanted"]["flood"], &host["reported"]["flood"], cell)),
];

/// Prints the tables that the operator API answers with.
pub(super) fn show(app: &App, tables: &Value) -> Result<()> {
    app.output.object(tables, ROWS, "network")?;
    if app.output.format() == Format::Table {
        let hosts = tables["hosts"].as_array().map(Vec::as_slice).unwrap_or_default();
        app.output.text("\n")?;
        app.output.table(hosts, COLUMNS)?;
    }
    Ok(())
}

fn items(list: &Value) -> impl Iterator<Item = &Value> {
    list.as_array().into_iter().flatten()
}

fn entry(forwarding: &Value) -> String {
    format!("{} at {}", cell(&forwarding["mac"]), cell(&forwarding["vtep"]))
}

/// One line for each that is wanted or reported, marked where the two differ.
fn compare(wanted: &Value, reported: &Value, write: fn(&Value) -> String) -> String {
    let wanted: BTreeSet<String> = items(wanted).map(write).collect();
    let reported: BTreeSet<String> = items(reported).map(write).collect();
    let line = |line: &String| match (wanted.contains(line), reported.contains(line)) {
        (true, false) => format!("{line} (missing)"),
        (false, true) => format!("{line} (not wanted)"),
        _ => line.clone(),
    };
    wanted.union(&reported).map(line).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_differs_is_marked() {
        let wanted = json!([{"mac": "a", "vtep": "1"}, {"mac": "b", "vtep": "1"}]);
        let reported = json!([{"mac": "b", "vtep": "1"}, {"mac": "c", "vtep": "2"}]);
        assert_eq!(compare(&wanted, &reported, entry), "a at 1 (missing)\nb at 1\nc at 2 (not wanted)");
        assert_eq!(compare(&json!(["x"]), &Value::Null, cell), "x (missing)");
    }
}
