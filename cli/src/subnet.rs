//! `godwit subnet`: address ranges of networks.

use crate::error::Result;
use crate::output::{Column, cell};
use crate::resource::{NETWORK, SUBNET, id};
use crate::session::Service;
use crate::{App, find_all};
use clap::Subcommand;
use serde_json::{Value, json};
use std::net::IpAddr;
use std::str::FromStr;

/// What can be done with subnets.
#[derive(Subcommand)]
pub(crate) enum Command {
    /// Create a subnet
    Create {
        /// The subnet's name
        name: String,
        /// The network, by id or name
        #[arg(long)]
        network: String,
        /// The range, such as 10.0.0.0/24
        #[arg(long)]
        cidr: Range,
        /// The gateway's address [default: the first of the range]
        #[arg(long)]
        gateway: Option<IpAddr>,
        /// A name server; may be repeated
        #[arg(long, value_name = "ADDRESS")]
        dns: Vec<IpAddr>,
        /// Leave guests that ask by DHCP without an answer
        #[arg(long)]
        no_dhcp: bool,
    },
    /// List subnets
    List,
    /// Delete subnets that have no ports any more
    Delete {
        /// Ids or names
        #[arg(required = true)]
        subnets: Vec<String>,
    },
}

const COLUMNS: &[Column] = &[
    ("id", |subnet| cell(&subnet["id"])),
    ("name", |subnet| cell(&subnet["name"])),
    ("network", |subnet| cell(&subnet["network_id"])),
    ("cidr", |subnet| cell(&subnet["cidr"])),
    ("gateway", |subnet| cell(&subnet["gateway_ip"])),
    ("dhcp", |subnet| cell(&subnet["enable_dhcp"])),
];

/// An address range: an address and the length of its prefix in bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Range {
    address: IpAddr,
    prefix: u8,
}

impl FromStr for Range {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let wrong = || format!("'{text}' is not a range such as 10.0.0.0/24 or fd00::/64");
        let (address, prefix) = text.split_once('/').ok_or_else(wrong)?;
        let address: IpAddr = address.parse().map_err(|_| wrong())?;
        let prefix: u8 = prefix.parse().map_err(|_| wrong())?;
        let longest = if address.is_ipv4() { 32 } else { 128 };
        if prefix > longest { Err(wrong()) } else { Ok(Range { address, prefix }) }
    }
}

impl Command {
    /// Does it.
    pub(crate) fn run(self, app: &App) -> Result<()> {
        match self {
            Command::Create { name, network, cidr, gateway, dns, no_dhcp } => {
                let network = NETWORK.find_id(&app.session, &network)?;
                let more = json!({"gateway_ip": gateway, "dns_nameservers": dns, "enable_dhcp": !no_dhcp});
                let subnet = create_subnet(app, &network, &name, cidr, more)?;
                app.output.object(&subnet, COLUMNS, "id")
            }
            Command::List => app.output.list(&SUBNET.list(&app.session, "")?, COLUMNS, "id"),
            Command::Delete { subnets } => {
                let subnets = find_all(app, &SUBNET, &subnets)?;
                for subnet in &subnets {
                    app.session.delete(Service::Network, &format!("/subnets/{}", id(subnet)?))?;
                }
                app.output.done("deleted subnet", &subnets)
            }
        }
    }
}

/// Creates a subnet of the network with id `network`; what of `more` is null is left to the service.
pub(crate) fn create_subnet(
    app: &App,
    network: &str,
    name: &str,
    range: Range,
    more: Value,
) -> Result<Value> {
    let mut body = json!({"subnet": {
        "network_id": network, "name": name, "cidr": format!("{}/{}", range.address, range.prefix),
        "ip_version": if range.address.is_ipv4() { 4 } else { 6 },
    }});
    for (key, value) in more.as_object().into_iter().flatten().filter(|(_, value)| !value.is_null()) {
        body["subnet"][key] = value.clone();
    }
    Ok(SUBNET.unwrap(app.session.post(Service::Network, "/subnets", &body)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_is_an_address_and_a_prefix_that_fits_it() {
        for text in ["10.0.0.0/24", "0.0.0.0/0", "fd00::/64", "::/128"] {
            assert!(text.parse::<Range>().is_ok(), "{text}");
        }
        for text in ["10.0.0.0", "10.0.0.0/33", "10.0.0/24", "fd00::/129", "/24", "10.0.0.0/-1"] {
            assert!(text.parse::<Range>().is_err(), "{text}");
        }
    }
}
