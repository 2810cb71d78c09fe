//! `godwit security-group`: what may pass at ports.

use crate::error::Result;
use crate::output::{Column, cell};
use crate::resource::{SECURITY_GROUP, id};
use crate::session::Service;
use crate::{App, find_all};
use clap::{Args, Subcommand, ValueEnum};
use serde_json::{Value, json};

/// What can be done with security groups.
#[derive(Subcommand)]
pub(crate) enum Command {
    /// Create a group; all may go out of its ports, and nothing in
    Create {
        /// The group's name
        name: String,
        /// Remember no connections: answers need rules of their own
        #[arg(long)]
        stateless: bool,
    },
    /// List groups
    List,
    /// Show one group with its rules
    Show {
        /// Id or name
        group: String,
    },
    /// Delete groups that no port has any more
    Delete {
        /// Ids or names
        #[arg(required = true)]
        groups: Vec<String>,
    },
    /// Let something pass
    Allow(Allow),
    /// Delete rules
    Forbid {
        /// Rules' ids
        #[arg(required = true)]
        rules: Vec<String>,
    },
}

/// Which way a connection is opened.
#[derive(Clone, Copy, ValueEnum)]
enum Direction {
    /// To the server
    Ingress,
    /// From it
    Egress,
}

/// What is to pass.
#[derive(Args)]
pub(crate) struct Allow {
    /// The group, by id or name
    group: String,
    /// Which way it is opened
    #[arg(long, value_enum, default_value = "ingress")]
    direction: Direction,
    /// By name or number: tcp, udp, icmp, … [default: any]
    #[arg(long)]
    protocol: Option<String>,
    /// A port, or the first and the last with a colon; for ICMP its type, or type and code
    #[arg(long, value_name = "FIRST[:LAST]")]
    port: Option<String>,
    /// Only from or to this range [default: anywhere]
    #[arg(long, value_name = "CIDR", conflicts_with = "remote_group")]
    remote: Option<String>,
    /// Only from or to ports that have this group, by id or name
    #[arg(long, value_name = "GROUP")]
    remote_group: Option<String>,
    /// IPv6 [default: IPv4, or as --remote says]
    #[arg(long)]
    ipv6: bool,
}

const COLUMNS: &[Column] = &[
    ("id", |group| cell(&group["id"])),
    ("name", |group| cell(&group["name"])),
    ("stateful", |group| cell(&group["stateful"])),
    ("rules", |group| group["security_group_rules"].as_array().map_or(0, Vec::len).to_string()),
];

const ROWS: &[Column] = &[
    ("id", |group| cell(&group["id"])),
    ("name", |group| cell(&group["name"])),
    ("description", |group| cell(&group["description"])),
    ("stateful", |group| cell(&group["stateful"])),
    ("rules", |group| {
        let rules = group["security_group_rules"].as_array().into_iter().flatten();
        rules.map(|rule| format!("{} {}", cell(&rule["id"]), describe(rule))).collect::<Vec<_>>().join("\n")
    }),
];

const RULE: &[Column] = &[("id", |rule| cell(&rule["id"])), ("lets pass", describe)];

/// A rule in a few words.
fn describe(rule: &Value) -> String {
    let mut words = vec![cell(&rule["direction"]), cell(&rule["ethertype"])];
    words.push(rule["protocol"].as_str().unwrap_or("any").to_owned());
    if !rule["port_range_min"].is_null() {
        let (first, last) = (cell(&rule["port_range_min"]), cell(&rule["port_range_max"]));
        words.push(if first == last || rule["port_range_max"].is_null() {
            first
        } else {
            format!("{first}:{last}")
        });
    }
    if let Some(range) = rule["remote_ip_prefix"].as_str() {
        words.push(range.to_owned());
    }
    if let Some(group) = rule["remote_group_id"].as_str() {
        words.push(format!("group {group}"));
    }
    words.join(" ")
}

impl Command {
    /// Does it.
    pub(crate) fn run(self, app: &App) -> Result<()> {
        match self {
            Command::Create { name, stateless } => {
                let body = json!({"security_group": {"name": name, "stateful": !stateless}});
                let made = app.session.post(Service::Network, "/security-groups", &body)?;
                app.output.object(&SECURITY_GROUP.unwrap(made), ROWS, "id")
            }
            Command::List => app.output.list(&SECURITY_GROUP.list(&app.session, "")?, COLUMNS, "id"),
            Command::Show { group } => {
                app.output.object(&SECURITY_GROUP.find(&app.session, &group)?, ROWS, "id")
            }
            Command::Delete { groups } => {
                let groups = find_all(app, &SECURITY_GROUP, &groups)?;
                for group in &groups {
                    app.session.delete(Service::Network, &format!("/security-groups/{}", id(group)?))?;
                }
                app.output.done("deleted security group", &groups)
            }
            Command::Allow(allow) => {
                let made = app.session.post(Service::Network, "/security-group-rules", &allow.body(app)?)?;
                app.output.object(&made["security_group_rule"], RULE, "id")
            }
            Command::Forbid { rules } => {
                let mut gone = Vec::new();
                for rule in rules {
                    let path = format!("/security-group-rules/{rule}");
                    let found = app.session.get(Service::Network, &path)?["security_group_rule"].clone();
                    app.session.delete(Service::Network, &path)?;
                    gone.push(found);
                }
                app.output.done("deleted rule", &gone)
            }
        }
    }
}

impl Allow {
    fn body(&self, app: &App) -> Result<Value> {
        let is_v6 = self.ipv6 || self.remote.as_ref().is_some_and(|remote| remote.contains(':'));
        let mut rule = json!({
            "security_group_id": SECURITY_GROUP.find_id(&app.session, &self.group)?,
            "direction": match self.direction { Direction::Ingress => "ingress", Direction::Egress => "egress" },
            "ethertype": if is_v6 { "IPv6" } else { "IPv4" },
            "protocol": self.protocol,
            "remote_ip_prefix": self.remote,
        });
        if let Some(group) = &self.remote_group {
            rule["remote_group_id"] = json!(SECURITY_GROUP.find_id(&app.session, group)?);
        }
        if let Some(port) = &self.port {
            let is_icmp = self.protocol.as_ref().is_some_and(|protocol| protocol.contains("icmp"));
            // A lone port is a range of one; a lone type of ICMP is with any code.
            let (first, last) = match port.split_once(':') {
                Some((first, last)) => (first, Some(last)),
                None => (port.as_str(), (!is_icmp).then_some(port.as_str())),
            };
            rule["port_range_min"] = json!(first);
            rule["port_range_max"] = json!(last);
        }
        Ok(json!({"security_group_rule": rule}))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rule_is_told_in_a_few_words() {
        let rule = json!({"direction": "ingress", "ethertype": "IPv4", "protocol": "tcp", "port_range_min": 22,
            "port_range_max": 22, "remote_ip_prefix": "10.0.0.0/8", "remote_group_id": null});
        assert_eq!(describe(&rule), "ingress IPv4 tcp 22 10.0.0.0/8");
        let rule =
            json!({"direction": "egress", "ethertype": "IPv6", "protocol": null, "remote_group_id": "g"});
        assert_eq!(describe(&rule), "egress IPv6 any group g");
    }
}
