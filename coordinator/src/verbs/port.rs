//! Making, changing and removing ports.

use super::security_group::{self, Decision, SecurityError, check_groups};
use super::{check_tags, check_text, network};
use crate::addresses::{self, AddressWish};
use crate::error::Error;
use crate::fleet::network::Port;
use crate::fleet::{Change, Fleet, Time};
use crate::l2;
use godwit_protocol::id::{HostId, NetworkId, PortId, ProjectId, SecurityGroupId};
use godwit_protocol::port::Mac;
use ipnet::IpNet;

/// Allowed address pairs of a port, at most.
const MAX_PAIRS: usize = 10;

/// A port to be made.
#[derive(Clone, Debug)]
pub struct NewPort {
    /// Its network.
    pub network: NetworkId,
    /// May be empty.
    pub name: String,
    /// For people.
    pub description: String,
    /// Owner.
    pub project: ProjectId,
    /// Its Ethernet address; none: a new one.
    pub mac: Option<Mac>,
    /// Its addresses; none: one of each family that the network has.
    pub addresses: Option<Vec<AddressWish>>,
    /// What clients call the device.
    pub device_id: String,
    /// What clients call the device's kind.
    pub device_owner: String,
    /// An external port of this host.
    pub host: Option<HostId>,
    /// See [`Port::port_security`]; none: as the network says.
    pub port_security: Option<bool>,
    /// See [`Port::allowed_pairs`]; without an Ethernet address: the port's.
    pub allowed_pairs: Vec<(Option<Mac>, IpNet)>,
    /// Its groups; none: the project's default group.
    pub security_groups: Option<Vec<SecurityGroupId>>,
}

/// What changes of a port; none: as it is.
#[derive(Clone, Debug, Default)]
pub struct PortUpdate {
    /// New name.
    pub name: Option<String>,
    /// New description.
    pub description: Option<String>,
    /// New addresses.
    pub addresses: Option<Vec<AddressWish>>,
    /// New Ethernet address.
    pub mac: Option<Mac>,
    /// What clients call the device.
    pub device_id: Option<String>,
    /// What clients call the device's kind.
    pub device_owner: Option<String>,
    /// An external port of this host from now on, or of none.
    pub host: Option<Option<HostId>>,
    /// Port security, on or off.
    pub port_security: Option<bool>,
    /// New pairs.
    pub allowed_pairs: Option<Vec<(Option<Mac>, IpNet)>>,
    /// New groups.
    pub security_groups: Option<Vec<SecurityGroupId>>,
    /// New labels.
    pub tags: Option<Vec<String>>,
}

fn choose_mac(fleet: &Fleet, network: NetworkId, wanted: Option<Mac>) -> Result<Mac, Error> {
    match wanted {
        Some(mac) if mac.0[0] & 1 == 1 || mac == Mac([0; 6]) => {
            Err(Error::Invalid(format!("{mac} is no address that a NIC can have.")))
        }
        Some(mac) => match fleet.ports.values().find(|p| p.network == network && p.mac == mac) {
            Some(port) => Err(Error::Conflict(format!(
                "The MAC address {mac} is in use on network {network}, by port {}.",
                port.id
            ))),
            None => Ok(mac),
        },
        None => Ok(addresses::free_mac(fleet, &[])),
    }
}

fn check_host(fleet: &Fleet, network: NetworkId, host: Option<HostId>) -> Result<(), Error> {
    match host {
        Some(id) if !fleet.hosts.contains_key(&id) => Err(Error::not_found("Host", id)),
        Some(id) => network::check_on(fleet, network::find(fleet, network)?, id),
        None => Ok(()),
    }
}

/// Pairs with every Ethernet address filled in.
fn pairs(port: Mac, wanted: Vec<(Option<Mac>, IpNet)>) -> Result<Vec<(Mac, IpNet)>, Error> {
    if wanted.len() > MAX_PAIRS {
        return Err(Error::Invalid(format!(
            "Exceeded maximum amount of allowed address pairs: {} are given, {MAX_PAIRS} are the limit.",
            wanted.len()
        )));
    }
    let mut pairs: Vec<(Mac, IpNet)> = Vec::with_capacity(wanted.len());
    for (mac, range) in wanted {
        let mac = mac.unwrap_or(port);
        if mac.0[0] & 1 == 1 || mac == Mac([0; 6]) {
            return Err(Error::Invalid(format!("{mac} is no address that a NIC can have.")));
        }
        if pairs.contains(&(mac, range.trunc())) {
            return Err(Error::Invalid(format!(
                "Request contains duplicate address pair: mac_address {mac} ip_address {range}."
            )));
        }
        pairs.push((mac, range.trunc()));
    }
    Ok(pairs)
}

/// Without port security there is nothing that pairs and groups could mean.
fn check_security(port: &Port) -> Result<(), Error> {
    if port.port_security {
        return Ok(());
    }
    if !port.allowed_pairs.is_empty() {
        return Err(Error::Conflict(
            "Port Security must be enabled in order to have allowed address pairs.".into(),
        ));
    }
    if port.security_groups.as_ref().is_some_and(|groups| !groups.is_empty()) {
        let text = "Port has security group associated. Cannot disable port security until security group is removed.";
        return Err(Error::Conflict(text.into()));
    }
    Ok(())
}

/// Makes a port. Hosts are to be told when it is on one.
///
/// # Errors
/// No such network, host or group; addresses that are taken, out of range or used up.
pub fn create(fleet: &Fleet, new: NewPort, now: Time) -> Decision<Port> {
    check_text("name", &new.name)?;
    check_text("description", &new.description)?;
    check_text("device_id", &new.device_id)?;
    check_text("device_owner", &new.device_owner)?;
    let network = network::find(fleet, new.network)?;
    check_host(fleet, new.network, new.host)?;
    let port_security = new.port_security.unwrap_or(network.port_security);
    let (mut changes, groups) = match new.security_groups {
        Some(groups) => (vec![], groups),
        None if !port_security => (vec![], vec![]),
        None => {
            let (made, group) = security_group::ensure_default(fleet, new.project, now);
            (made, vec![group])
        }
    };
    if changes.is_empty() {
        check_groups(fleet, &groups)?;
    }
    let mac = choose_mac(fleet, new.network, new.mac)?;
    let taken = addresses::taken(fleet, new.network);
    let fixed_ips = addresses::choose(fleet, new.network, new.addresses.as_deref(), taken)?;
    let port = Port {
        id: PortId::random(),
        network: new.network,
        name: new.name,
        description: new.description,
        project: new.project,
        mac,
        fixed_ips,
        instance: None,
        device_id: new.device_id,
        device_owner: new.device_owner,
        index: 0,
        owned_by_instance: false,
        host: new.host,
        target_host: None,
        admin_state_up: true,
        port_security,
        allowed_pairs: pairs(mac, new.allowed_pairs)?,
        security_groups: Some(groups),
        tags: Vec::new(),
        revision: 1,
        created_at: now,
        updated_at: now,
    };
    check_security(&port)?;
    changes.push(port.clone().into());
    changes.extend(port.host.and_then(|_| l2::touched(fleet, port.network)));
    Ok((changes, port))
}

/// Changes a port. The answer says whether hosts are to be told.
///
/// # Errors
/// As [`create`]; addresses, device and host of an instance's port stay as they are.
pub fn update(fleet: &Fleet, id: PortId, update: PortUpdate, now: Time) -> Decision<(Port, bool)> {
    let old = find(fleet, id)?;
    let mut port = old.clone();
    if let Some(instance) = port.instance
        && (update.addresses.is_some()
            || update.mac.is_some_and(|mac| mac != port.mac)
            || update.host.is_some_and(|host| host != port.host)
            || update.device_id.as_ref().is_some_and(|d| *d != instance.to_string())
            || update.device_owner.as_ref().is_some_and(|o| *o != port.device_owner))
    {
        return Err(SecurityError::from(Error::Conflict(format!(
            "Port {id} is a NIC of instance {instance}: its addresses, device and host cannot be changed."
        ))));
    }
    if let Some(name) = update.name {
        check_text("name", &name)?;
        port.name = name;
    }
    if let Some(description) = update.description {
        check_text("description", &description)?;
        port.description = description;
    }
    if let Some(wishes) = update.addresses {
        let mut others = addresses::taken(fleet, port.network);
        for own in &port.fixed_ips {
            others.remove(&own.address);
        }
        port.fixed_ips = addresses::choose(fleet, port.network, Some(&wishes), others)?;
    }
    if let Some(mac) = update.mac.filter(|mac| *mac != port.mac) {
        port.mac = choose_mac(fleet, port.network, Some(mac))?;
    }
    if let Some(device_id) = update.device_id {
        check_text("device_id", &device_id)?;
        port.device_id = device_id;
    }
    if let Some(device_owner) = update.device_owner {
        check_text("device_owner", &device_owner)?;
        port.device_owner = device_owner;
    }
    if let Some(host) = update.host {
        check_host(fleet, port.network, host)?;
        port.host = host;
    }
    secure(fleet, &mut port, update.port_security, update.allowed_pairs, update.security_groups)?;
    if let Some(tags) = update.tags {
        check_tags(&tags)?;
        port.tags = tags;
    }
    let is_same = |a: &Port, b: &Port| {
        (a.mac, &a.fixed_ips, a.port_security, &a.allowed_pairs, &a.security_groups)
            == (b.mac, &b.fixed_ips, b.port_security, &b.allowed_pairs, &b.security_groups)
    };
    let tell = port.host != old.host || (port.host.is_some() && !is_same(&port, old));
    port.revision += 1;
    port.updated_at = now;
    let touched = if tell { l2::touched(fleet, port.network) } else { None };
    Ok((std::iter::once(port.clone().into()).chain(touched).collect(), (port, tell)))
}

fn secure(
    fleet: &Fleet,
    port: &mut Port,
    port_security: Option<bool>,
    allowed_pairs: Option<Vec<(Option<Mac>, IpNet)>>,
    groups: Option<Vec<SecurityGroupId>>,
) -> Result<(), SecurityError> {
    port.port_security = port_security.unwrap_or(port.port_security);
    if let Some(wanted) = allowed_pairs {
        port.allowed_pairs = pairs(port.mac, wanted)?;
    }
    if let Some(groups) = groups {
        check_groups(fleet, &groups)?;
        port.security_groups = Some(groups);
    }
    Ok(check_security(port)?)
}

/// Removes a port. The answer is what it was.
///
/// # Errors
/// No such port; it is an instance's NIC.
pub fn delete(fleet: &Fleet, id: PortId) -> Decision<Port> {
    let port = find(fleet, id)?.clone();
    if let Some(instance) = port.instance {
        let text = format!("Port {id} is a NIC of instance {instance}; delete the instance to be rid of it.");
        return Err(Error::Conflict(text).into());
    }
    let touched = port.host.and_then(|_| l2::touched(fleet, port.network));
    Ok((std::iter::once(Change::gone(&port)).chain(touched).collect(), port))
}

/// The port of that id.
///
/// # Errors
/// There is none.
pub fn find(fleet: &Fleet, id: PortId) -> Result<&Port, Error> {
    fleet.ports.get(&id).ok_or_else(|| Error::not_found("Port", id))
}
