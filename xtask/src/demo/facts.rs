//! What the demo found out, for a person and for a script.

use super::DemoError;
use godwit_tests::lab::Heard;
use serde_json::{Map, Value, json};
use std::time::Instant;

/// Facts with times in seconds since the start.
#[derive(Debug, Default)]
pub(super) struct Facts {
    pub hosts: usize,
    pub servers_on_two_hosts: bool,
    pub guests_ping: bool,
    pub hosts_explained: usize,
    pub left_behind: Vec<String>,
    pub seconds: f64,
    at: Map<String, Value>,
    migration: Option<(Value, Heard)>,
}

impl Facts {
    /// None yet, but of how many hosts.
    pub(super) fn new(hosts: usize) -> Self {
        Self { hosts, ..Self::default() }
    }

    /// Notes when something was reached.
    pub(super) fn at(&mut self, what: &str, started: Instant) {
        self.at.insert(what.to_owned(), json!(round(started.elapsed().as_secs_f64())));
    }

    /// Notes a migration that completed: the operator API's record, and what the pings heard.
    pub(super) fn migrated(&mut self, record: &Value, heard: Heard) {
        self.migration = Some((record.clone(), heard));
    }

    /// One line about the migration.
    pub(super) fn migration_line(&self) -> String {
        let Some((record, heard)) = &self.migration else { return "no migration".to_owned() };
        format!(
            "moved in {} ms, vCPUs paused {} ms by libvirt's count; {} pings sent, {} lost, longest gap {} ms",
            figure(record, "total_ms"),
            figure(record, "downtime_ms"),
            heard.sent,
            heard.lost,
            heard.gap_ms
        )
    }

    /// The file's text.
    pub(super) fn to_json(&self) -> String {
        let migration = self.migration.as_ref().map(|(record, heard)| {
            json!({
                "ok": record["status"] == "completed",
                "total_ms": record["total_ms"],
                "downtime_ms": record["downtime_ms"],
                "pings_sent": heard.sent,
                "pings_lost": heard.lost,
                "gap_ms": heard.gap_ms,
            })
        });
        let facts = json!({
            "hosts": self.hosts,
            "servers_on_two_hosts": self.servers_on_two_hosts,
            "guests_ping": self.guests_ping,
            "migration": migration,
            "refusal": {"hosts_explained": self.hosts_explained},
            "left_behind": self.left_behind,
            "seconds": round(self.seconds),
            "at_seconds": self.at,
        });
        format!("{facts:#}\n")
    }

    /// The end of the demo, for a person.
    pub(super) fn summary(&self) -> String {
        let left = match self.left_behind.as_slice() {
            [] => "nothing is left behind".to_owned(),
            some => format!("LEFT BEHIND:\n  {}", some.join("\n  ")),
        };
        format!("{} hosts; {}; {left}; {:.0} s", self.hosts, self.migration_line(), self.seconds)
    }

    /// Whether all is as it should be.
    pub(super) fn verdict(&self) -> Result<(), DemoError> {
        if !self.left_behind.is_empty() {
            return Err(DemoError::Unexpected(format!("left behind: {}", self.left_behind.join(", "))));
        }
        if self.hosts_explained != self.hosts {
            let text = format!("{} of {} hosts explained their refusal", self.hosts_explained, self.hosts);
            return Err(DemoError::Unexpected(text));
        }
        Ok(())
    }
}

fn round(seconds: f64) -> f64 {
    (seconds * 1000.0).round() / 1000.0
}

fn figure(record: &Value, key: &str) -> String {
    record[key].as_u64().map_or_else(|| "?".to_owned(), |n| n.to_string())
}
