//! `godwit port`: attachments to networks.

use crate::error::Result;
use crate::output::{Column, cell};
use crate::resource::{HOST, NETWORK, PORT, SECURITY_GROUP, id};
use crate::session::Service;
use crate::{App, find_all};
use clap::Subcommand;
use serde_json::{Value, json};
use std::net::IpAddr;

/// What can be done with ports.
#[derive(Subcommand)]
pub(crate) enum Command {
    /// Create a port
    Create {
        /// The network, by id or name
        network: String,
        /// The port's name
        #[arg(long, default_value = "")]
        name: String,
        /// Bind it to a host without a server, for a router or a machine of your own there
        #[arg(long)]
        host: Option<String>,
        /// An address of the network's subnets [default: a free one]; may be repeated
        #[arg(long, value_name = "ADDRESS")]
        fixed_ip: Vec<IpAddr>,
        /// Let pass what this security group allows, by id or name; may be repeated [default: the project's default
        /// group]
        #[arg(long, value_name = "GROUP")]
        security_group: Vec<String>,
        /// Let it send from this address or range too; may be repeated
        #[arg(long, value_name = "ADDRESS")]
        allowed_address: Vec<String>,
        /// Let it send from any address, and everything pass
        #[arg(long, conflicts_with_all = ["security_group", "allowed_address"])]
        no_port_security: bool,
    },
    /// List ports
    List,
    /// Show one port
    Show {
        /// Id or name
        port: String,
    },
    /// Delete ports
    Delete {
        /// Ids or names
        #[arg(required = true)]
        ports: Vec<String>,
    },
}

const COLUMNS: &[Column] = &[
    ("id", |port| cell(&port["id"])),
    ("name", |port| cell(&port["name"])),
    ("mac", |port| cell(&port["mac_address"])),
    ("addresses", |port| addresses(port, ", ")),
    ("status", |port| cell(&port["status"])),
    ("host", |port| cell(&port["binding:host_id"])),
];

const ROWS: &[Column] = &[
    ("id", |port| cell(&port["id"])),
    ("name", |port| cell(&port["name"])),
    ("network", |port| cell(&port["network_id"])),
    ("mac", |port| cell(&port["mac_address"])),
    ("addresses", |port| addresses(port, "\n")),
    ("status", |port| cell(&port["status"])),
    ("port security", |port| cell(&port["port_security_enabled"])),
    ("security groups", |port| cell(&port["security_groups"]).replace(", ", "\n")),
    ("host", |port| cell(&port["binding:host_id"])),
    ("device", |port| cell(&port["device_id"])),
    ("device owner", |port| cell(&port["device_owner"])),
    ("created", |port| cell(&port["created_at"])),
];

impl Command {
    /// Does it.
    pub(crate) fn run(self, app: &App) -> Result<()> {
        match self {
            Command::Create {
                network,
                name,
                host,
                fixed_ip,
                security_group,
                allowed_address,
                no_port_security,
            } => {
                let network = NETWORK.find_id(&app.session, &network)?;
                let mut body = json!({"port": {"network_id": network, "name": name, "admin_state_up": true}});
                if let Some(host) = host {
                    // The network service takes any text for a host; a misspelt one would never be bound.
                    let host = HOST.find(&app.session, &host)?;
                    body["port"]["binding:host_id"] = host["name"].clone();
                }
                if !fixed_ip.is_empty() {
                    let addresses = fixed_ip.iter().map(|address| json!({"ip_address": address}));
                    body["port"]["fixed_ips"] = addresses.collect();
                }
                if !security_group.is_empty() {
                    let find = |group: &String| SECURITY_GROUP.find_id(&app.session, group).map(Value::from);
                    body["port"]["security_groups"] =
                        security_group.iter().map(find).collect::<Result<_>>()?;
                }
                if !allowed_address.is_empty() {
                    let pairs = allowed_address.iter().map(|address| json!({"ip_address": address}));
                    body["port"]["allowed_address_pairs"] = pairs.collect();
                }
                if no_port_security {
                    body["port"]["port_security_enabled"] = json!(false);
                }
                let port = PORT.unwrap(app.session.post(Service::Network, "/ports", &body)?);
                app.output.object(&port, ROWS, "id")
            }
            Command::List => app.output.list(&PORT.list(&app.session, "")?, COLUMNS, "id"),
            Command::Show { port } => app.output.object(&PORT.find(&app.session, &port)?, ROWS, "id"),
            Command::Delete { ports } => {
                let ports = find_all(app, &PORT, &ports)?;
                for port in &ports {
                    app.session.delete(Service::Network, &format!("/ports/{}", id(port)?))?;
                }
                app.output.done("deleted port", &ports)
            }
        }
    }
}

fn addresses(port: &Value, separator: &str) -> String {
    let fixed = port["fixed_ips"].as_array().into_iter().flatten();
    fixed.map(|fixed| cell(&fixed["ip_address"])).collect::<Vec<_>>().join(separator)
}
