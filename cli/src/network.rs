//! `godwit network`: networks between servers, and who knows where their ports are.

mod l2;

use crate::error::Result;
use crate::output::{Column, cell};
use crate::resource::{NETWORK, id};
use crate::session::Service;
use crate::subnet::{Range, create_subnet};
use crate::{App, find_all};
use clap::Subcommand;
use serde_json::{Value, json};

/// What can be done with networks.
#[derive(Subcommand)]
pub(crate) enum Command {
    /// Create a network
    Create {
        /// The network's name
        name: String,
        /// Give it a subnet with this range, such as 10.0.0.0/24
        #[arg(long, value_name = "CIDR")]
        subnet: Option<Range>,
        /// Largest packet in bytes [default: what the underlay leaves]
        #[arg(long, value_name = "BYTES", value_parser = clap::value_parser!(u32).range(68..=65535))]
        mtu: Option<u32>,
        /// What carries the network: VXLAN, or a link that hosts name in agent.toml
        #[arg(long, value_name = "TYPE", value_parser = ["vxlan", "flat", "vlan"])]
        provider_network_type: Option<String>,
        /// The name of the link
        #[arg(long, value_name = "NAME", requires = "provider_network_type")]
        provider_physical_network: Option<String>,
        /// The tag of a VLAN, or the VXLAN number
        #[arg(long, value_name = "NUMBER", requires = "provider_network_type")]
        provider_segment: Option<u32>,
    },
    /// List networks
    List,
    /// Show one network
    Show {
        /// Id or name
        network: String,
    },
    /// Delete networks that have no ports any more
    Delete {
        /// Ids or names
        #[arg(required = true)]
        networks: Vec<String>,
    },
    /// Show which host knows which address of the network behind which tunnel
    L2 {
        /// Id or name
        network: String,
    },
}

const COLUMNS: &[Column] = &[
    ("id", |network| cell(&network["id"])),
    ("name", |network| cell(&network["name"])),
    ("status", |network| cell(&network["status"])),
    ("segment", |network| cell(&network["provider:segmentation_id"])),
    ("mtu", |network| cell(&network["mtu"])),
    ("subnets", |network| cell(&network["subnets"])),
];

const ROWS: &[Column] = &[
    ("id", |network| cell(&network["id"])),
    ("name", |network| cell(&network["name"])),
    ("status", |network| cell(&network["status"])),
    ("type", |network| cell(&network["provider:network_type"])),
    ("physical", |network| cell(&network["provider:physical_network"])),
    ("segment", |network| cell(&network["provider:segmentation_id"])),
    ("mtu", |network| cell(&network["mtu"])),
    ("shared", |network| cell(&network["shared"])),
    ("subnets", |network| cell(&network["subnets"]).replace(", ", "\n")),
    ("created", |network| cell(&network["created_at"])),
];

impl Command {
    /// Does it.
    pub(crate) fn run(self, app: &App) -> Result<()> {
        match self {
            Command::Create {
                name,
                subnet,
                mtu,
                provider_network_type,
                provider_physical_network,
                provider_segment,
            } => {
                let mut body = json!({"network": {"name": name, "admin_state_up": true}});
                let wishes = [
                    ("mtu", mtu.map(Value::from)),
                    ("provider:network_type", provider_network_type.map(Value::from)),
                    ("provider:physical_network", provider_physical_network.map(Value::from)),
                    ("provider:segmentation_id", provider_segment.map(Value::from)),
                ];
                for (key, value) in wishes {
                    if let Some(value) = value {
                        body["network"][key] = value;
                    }
                }
                let network = NETWORK.unwrap(app.session.post(Service::Network, "/networks", &body)?);
                let id = id(&network)?;
                let Some(range) = subnet else {
                    return app.output.object(&network, ROWS, "id");
                };
                create_subnet(app, &id, &name, range, json!({})).inspect_err(|_| {
                    if let Err(error) = app.session.delete(Service::Network, &format!("/networks/{id}")) {
                        eprintln!("godwit: network {id} is left behind without a subnet: {error}");
                    }
                })?;
                app.output.object(&NETWORK.get(&app.session, &id)?, ROWS, "id")
            }
            Command::List => app.output.list(&NETWORK.list(&app.session, "")?, COLUMNS, "id"),
            Command::Show { network } => {
                app.output.object(&NETWORK.find(&app.session, &network)?, ROWS, "id")
            }
            Command::Delete { networks } => {
                let networks = find_all(app, &NETWORK, &networks)?;
                for network in &networks {
                    app.session.delete(Service::Network, &format!("/networks/{}", id(network)?))?;
                }
                app.output.done("deleted network", &networks)
            }
            Command::L2 { network } => {
                let id = NETWORK.find_id(&app.session, &network)?;
                let tables = app.session.get(Service::Operator, &format!("/networks/{id}/l2"))?;
                l2::show(app, &tables)
            }
        }
    }
}
