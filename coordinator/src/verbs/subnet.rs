//! Making, changing and removing subnets.

use super::network;
use super::{Decision, check_tags, check_text};
use crate::addresses::{self, range};
use crate::error::Error;
use crate::fleet::network::Subnet;
use crate::fleet::{Change, Fleet, Time};
use crate::l2;
use godwit_protocol::id::{NetworkId, ProjectId, SubnetId};
use ipnet::IpNet;
use std::net::IpAddr;

/// Whether a subnet has a gateway.
#[derive(Clone, Copy, Debug, Default)]
pub enum GatewayWish {
    /// The first usable address.
    #[default]
    First,
    /// None.
    None,
    /// This one.
    Address(IpAddr),
}

/// A subnet to be made.
#[derive(Clone, Debug)]
pub struct NewSubnet {
    /// Its network.
    pub network: NetworkId,
    /// Need not be unique.
    pub name: String,
    /// For people.
    pub description: String,
    /// Owner.
    pub project: ProjectId,
    /// The range; the host bits must be zero.
    pub cidr: IpNet,
    /// The gateway.
    pub gateway: GatewayWish,
    /// Ranges for ports, both ends included; none: everything usable but the gateway.
    pub pools: Option<Vec<(IpAddr, IpAddr)>>,
    /// Name servers.
    pub dns: Vec<IpAddr>,
    /// Destination and next hop.
    pub routes: Vec<(IpNet, IpAddr)>,
    /// Whether hosts answer guests that ask for their address; the config drive tells it in any case.
    pub dhcp: bool,
}

/// What changes of a subnet; none: as it is.
#[derive(Clone, Debug, Default)]
pub struct SubnetUpdate {
    /// New name.
    pub name: Option<String>,
    /// New description.
    pub description: Option<String>,
    /// New gateway, or none from now on.
    pub gateway: Option<Option<IpAddr>>,
    /// New ranges for ports.
    pub pools: Option<Vec<(IpAddr, IpAddr)>>,
    /// New name servers.
    pub dns: Option<Vec<IpAddr>>,
    /// New routes.
    pub routes: Option<Vec<(IpNet, IpAddr)>>,
    /// See [`NewSubnet::dhcp`].
    pub dhcp: Option<bool>,
    /// New labels.
    pub tags: Option<Vec<String>>,
}

fn check_cidr(fleet: &Fleet, network: NetworkId, cidr: &IpNet) -> Result<(), Error> {
    if cidr.addr() != cidr.network() {
        return Err(Error::Invalid(format!(
            "{cidr} has host bits set; {} is the subnet that holds this address.",
            cidr.trunc()
        )));
    }
    let address = cidr.network();
    if cidr.prefix_len() == 0 || address.is_multicast() || address.is_loopback() || address.is_unspecified() {
        return Err(Error::Invalid(format!("{cidr} is no range of addresses that hosts can have.")));
    }
    let overlaps = |s: &&Subnet| s.cidr.contains(cidr) || cidr.contains(&s.cidr);
    match addresses::subnets(fleet, network).into_iter().find(overlaps) {
        Some(other) => Err(Error::Invalid(format!(
            "{cidr} overlaps with {}, subnet {} of the same network.",
            other.cidr, other.id
        ))),
        None => Ok(()),
    }
}

fn check_gateway(cidr: &IpNet, gateway: IpAddr) -> Result<(), Error> {
    let link_local = matches!(gateway, IpAddr::V6(a) if a.is_unicast_link_local() && !cidr.addr().is_ipv4());
    if range::is_usable(cidr, gateway) || link_local {
        return Ok(());
    }
    Err(Error::Invalid(format!("The gateway {gateway} is no address that a router can have in {cidr}.")))
}

fn check_pools(cidr: &IpNet, gateway: Option<IpAddr>, pools: &[(IpAddr, IpAddr)]) -> Result<(), Error> {
    for (index, (first, last)) in pools.iter().enumerate() {
        let pool = format!("{first}-{last}");
        if first > last || first.is_ipv4() != last.is_ipv4() {
            return Err(Error::Invalid(format!("The allocation pool {pool} runs backwards.")));
        }
        if !range::is_usable(cidr, *first) || !range::is_usable(cidr, *last) {
            return Err(Error::Invalid(format!("The allocation pool {pool} is not inside {cidr}.")));
        }
        if gateway.is_some_and(|g| *first <= g && g <= *last) {
            return Err(Error::Conflict(format!("The allocation pool {pool} holds the gateway.")));
        }
        if let Some((a, b)) = pools[..index].iter().find(|(a, b)| a <= last && first <= b) {
            return Err(Error::Conflict(format!("The allocation pools {a}-{b} and {pool} overlap.")));
        }
    }
    Ok(())
}

fn check_routes(cidr: &IpNet, dns: &[IpAddr], routes: &[(IpNet, IpAddr)]) -> Result<(), Error> {
    if dns.len() > 5 {
        return Err(Error::Invalid(format!("{} name servers are too many; 5 are allowed.", dns.len())));
    }
    if routes.len() > 20 {
        return Err(Error::Invalid(format!("{} routes are too many; 20 are allowed.", routes.len())));
    }
    let v4 = cidr.addr().is_ipv4();
    match routes.iter().find(|(to, via)| to.addr().is_ipv4() != v4 || via.is_ipv4() != v4) {
        Some((to, via)) => {
            Err(Error::Invalid(format!("The route to {to} by {via} is of another family than {cidr}.")))
        }
        None => Ok(()),
    }
}

/// Makes a subnet.
///
/// # Errors
/// No such network; a range that overlaps, a gateway or pool outside of it.
pub fn create(fleet: &Fleet, new: NewSubnet, now: Time) -> Decision<Subnet> {
    check_text("name", &new.name)?;
    check_text("description", &new.description)?;
    network::find(fleet, new.network)?;
    check_cidr(fleet, new.network, &new.cidr)?;
    let gateway = match new.gateway {
        GatewayWish::First => Some(range::usable(&new.cidr).0),
        GatewayWish::None => None,
        GatewayWish::Address(address) => Some(address),
    };
    if let Some(gateway) = gateway {
        check_gateway(&new.cidr, gateway)?;
    }
    let pools = new.pools.unwrap_or_else(|| range::default_pools(&new.cidr, gateway));
    check_pools(&new.cidr, gateway, &pools)?;
    check_routes(&new.cidr, &new.dns, &new.routes)?;
    let subnet = Subnet {
        id: SubnetId::random(),
        network: new.network,
        name: new.name,
        description: new.description,
        project: new.project,
        cidr: new.cidr,
        gateway,
        pools,
        dns: new.dns,
        routes: new.routes,
        dhcp: new.dhcp,
        tags: Vec::new(),
        revision: 1,
        created_at: now,
        updated_at: now,
    };
    Ok((vec![subnet.clone().into()], subnet))
}

/// Changes a subnet. Hosts are to be told; guests learn of it when they next ask by DHCP, or are made anew.
///
/// # Errors
/// No such subnet; a gateway that a port has; pools that do not fit.
pub fn update(fleet: &Fleet, id: SubnetId, update: SubnetUpdate, now: Time) -> Decision<Subnet> {
    let before = find(fleet, id)?;
    let mut subnet = before.clone();
    if let Some(name) = update.name {
        check_text("name", &name)?;
        subnet.name = name;
    }
    if let Some(description) = update.description {
        check_text("description", &description)?;
        subnet.description = description;
    }
    if let Some(gateway) = update.gateway.filter(|g| *g != subnet.gateway) {
        if let Some(address) = gateway {
            check_gateway(&subnet.cidr, address)?;
            if addresses::taken(fleet, subnet.network).contains(&address) {
                return Err(Error::Conflict(format!("The gateway {address} is an address of a port.")));
            }
        }
        subnet.gateway = gateway;
    }
    subnet.pools = update.pools.unwrap_or(subnet.pools);
    check_pools(&subnet.cidr, subnet.gateway, &subnet.pools)?;
    subnet.dns = update.dns.unwrap_or(subnet.dns);
    subnet.routes = update.routes.unwrap_or(subnet.routes);
    check_routes(&subnet.cidr, &subnet.dns, &subnet.routes)?;
    subnet.dhcp = update.dhcp.unwrap_or(subnet.dhcp);
    if let Some(tags) = update.tags {
        check_tags(&tags)?;
        subnet.tags = tags;
    }
    subnet.revision += 1;
    subnet.updated_at = now;
    let touched = (told(before) != told(&subnet)).then(|| l2::touched(fleet, subnet.network)).flatten();
    Ok((std::iter::once(subnet.clone().into()).chain(touched).collect(), subnet))
}

/// What hosts are told of a subnet.
fn told(subnet: &Subnet) -> impl PartialEq + '_ {
    (subnet.gateway, &subnet.dns, &subnet.routes, subnet.dhcp)
}

/// Removes a subnet.
///
/// # Errors
/// No such subnet; ports have addresses of it.
pub fn delete(fleet: &Fleet, id: SubnetId) -> Decision<()> {
    let subnet = find(fleet, id)?;
    match fleet.ports.values().find(|p| p.fixed_ips.iter().any(|ip| ip.subnet == id)) {
        Some(port) => {
            Err(Error::Conflict(format!("Subnet {id} is in use: port {} has an address of it.", port.id)))
        }
        None => Ok((vec![Change::gone(subnet)], ())),
    }
}

/// The subnet of that id.
///
/// # Errors
/// There is none.
pub fn find(fleet: &Fleet, id: SubnetId) -> Result<&Subnet, Error> {
    fleet.subnets.get(&id).ok_or_else(|| Error::not_found("Subnet", id))
}
