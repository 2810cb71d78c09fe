//! Making, changing and removing networks.

use super::{Decision, check_tags, check_text};
use crate::addresses::{self, range};
use crate::error::Error;
use crate::fleet::network::{Network, Port, Segment, Subnet};
use crate::fleet::{Change, Fleet, Time};
use godwit_protocol::id::{HostId, NetworkId, ProjectId};
use godwit_protocol::network::FIRST_PROVIDED;
use std::collections::BTreeMap;
use std::ops::RangeInclusive;

/// MTU of a network as long as no host has said what its underlay takes.
const UNKNOWN_MTU: u32 = 1450;

/// The smallest MTU that IPv6 allows (RFC 8200) and that guests are given.
const MIN_MTU: u32 = 1280;

/// The tags that a network may have (IEEE 802.1Q: 0 is no VLAN, 4095 is reserved).
pub const VLANS: RangeInclusive<u16> = 1..=4094;

/// A network to be made.
#[derive(Clone, Debug)]
pub struct NewNetwork {
    /// Need not be unique.
    pub name: String,
    /// For people.
    pub description: String,
    /// Owner.
    pub project: ProjectId,
    /// Ports may be made by every project.
    pub shared: bool,
    /// Must be true.
    pub admin_state_up: bool,
    /// What is to carry it.
    pub carrier: Wish,
    /// In bytes; none: the most that all hosts' underlays take.
    pub mtu: Option<u32>,
    /// Whether its ports have port security when they do not say.
    pub port_security: bool,
}

/// What is to carry a network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wish {
    /// VXLAN by this number; none: one of the range.
    Vxlan(Option<u32>),
    /// The whole link of a physical network.
    Flat {
        /// Its name.
        physical: String,
    },
    /// A VLAN on the link of a physical network.
    Vlan {
        /// Its name.
        physical: String,
        /// The VLAN's number; none: one of the range that the configuration has for the physical network.
        tag: Option<u16>,
    },
}

/// The numbers that networks get which do not name one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Numbers {
    /// Of VXLAN.
    pub vnis: RangeInclusive<u32>,
    /// Of VLANs, by physical network.
    pub vlans: BTreeMap<String, RangeInclusive<u16>>,
}

/// What changes of a network; none: as it is.
#[derive(Clone, Debug, Default)]
pub struct NetworkUpdate {
    /// New name.
    pub name: Option<String>,
    /// New description.
    pub description: Option<String>,
    /// Shared from now on, or not.
    pub shared: Option<bool>,
    /// Must not be false.
    pub admin_state_up: Option<bool>,
    /// New MTU in bytes; guests learn of it when they are made anew.
    pub mtu: Option<u32>,
    /// Port security of its later ports.
    pub port_security: Option<bool>,
    /// New labels.
    pub tags: Option<Vec<String>>,
}

/// The host whose underlay takes the least, with the MTU that an overlay may have there.
fn tightest(fleet: &Fleet) -> Option<(&str, u32)> {
    let of = |host| {
        let host: &crate::fleet::host::Host = host;
        let underlay = &host.inventory.as_ref()?.underlay;
        Some((host.name.as_str(), addresses::overlay_mtu(underlay)))
    };
    fleet.hosts.values().filter_map(of).min_by_key(|(_, mtu)| *mtu)
}

fn check_mtu(fleet: &Fleet, mtu: u32, physical: Option<&str>) -> Result<u32, Error> {
    if mtu < MIN_MTU {
        return Err(Error::Invalid(format!("An MTU of {mtu} is too small; at least {MIN_MTU} is needed.")));
    }
    if let Some(physical) = physical {
        return match link_mtu(fleet, physical) {
            Some(most) if mtu > most => Err(Error::Invalid(format!(
                "An MTU of {mtu} is too large: a host's link of physical network {physical} has {most}."
            ))),
            _ => Ok(mtu),
        };
    }
    match tightest(fleet) {
        Some((host, most)) if mtu > most => Err(Error::Invalid(format!(
            "An MTU of {mtu} is too large: the underlay of host {host} leaves room for {most}. Ask for {most} or \
             less, or raise that link's MTU to {} or more.",
            mtu + 50
        ))),
        None if mtu > 65_485 => {
            Err(Error::Invalid(format!("An MTU of {mtu} is too large; 65485 is the limit.")))
        }
        _ => Ok(mtu),
    }
}

fn choose_vni(
    fleet: &Fleet,
    wanted: Option<u32>,
    range: &RangeInclusive<u32>,
    luck: u32,
) -> Result<u32, Error> {
    let holder = |vni| fleet.networks.values().find(|n| n.vni == vni);
    match wanted {
        Some(vni) if !(1..=0xff_ffff).contains(&vni) => {
            Err(Error::Invalid(format!("{vni} is no VXLAN number; they go from 1 to 16777215.")))
        }
        Some(vni) => match holder(vni) {
            Some(network) => {
                Err(Error::Conflict(format!("The VXLAN number {vni} is taken by network {}.", network.id)))
            }
            None => Ok(vni),
        },
        None => range::free_vni(range, luck, |vni| holder(vni).is_some()).ok_or_else(|| {
            Error::Exhausted(format!(
                "All VXLAN numbers from {} to {} are taken; delete a network, or widen vni_range in \
                 coordinator.toml.",
                range.start(),
                range.end()
            ))
        }),
    }
}

/// The segment that is wished for, on a VLAN of the range if none is named.
fn choose_segment(fleet: &Fleet, wish: &Wish, numbers: &Numbers, luck: u32) -> Result<Segment, Error> {
    let (physical, tag) = match wish {
        Wish::Vxlan(_) => return Ok(Segment::Vxlan),
        Wish::Flat { physical } => return Ok(Segment::Flat { physical: physical.clone() }),
        Wish::Vlan { physical, tag } => (physical.clone(), *tag),
    };
    if let Some(tag) = tag {
        return Ok(Segment::Vlan { physical, tag });
    }
    let Some(range) = numbers.vlans.get(&physical) else {
        return Err(Error::Invalid(format!(
            "Invalid input for operation: Physical network {physical} requires segmentation_id to be specified when \
             creating a provider network. An operator can name a range for it in vlan_ranges of coordinator.toml."
        )));
    };
    let (first, last) = (*range.start(), *range.end());
    let is_taken = |tag: u32| {
        fleet.networks.values().any(|n| {
            matches!(&n.segment, Segment::Vlan { physical: on, tag: of } if *on == physical && u32::from(*of) == tag)
        })
    };
    let free = range::free_vni(&(first.into()..=last.into()), luck, is_taken);
    match free.and_then(|tag| u16::try_from(tag).ok()) {
        Some(tag) => Ok(Segment::Vlan { physical, tag }),
        None => Err(Error::Exhausted(format!(
            "All VLANs from {first} to {last} on physical network {physical} are taken; delete a network, or widen \
             its range in vlan_ranges of coordinator.toml."
        ))),
    }
}

/// The number of a network that a provider's link carries: one above all of VXLAN's.
fn provided_number(fleet: &Fleet, luck: u32) -> Result<u32, Error> {
    let holder = |number| fleet.networks.values().any(|n| n.vni == number);
    range::free_vni(&(FIRST_PROVIDED..=FIRST_PROVIDED + 0xff_ffff), luck, holder)
        .ok_or_else(|| Error::Exhausted("There are too many provider networks.".into()))
}

/// That no other network is on the same segment, and that a host has it.
fn check_segment(fleet: &Fleet, segment: &Segment) -> Result<(), Error> {
    let Some(physical) = segment.physical() else { return Ok(()) };
    let kind = if matches!(segment, Segment::Flat { .. }) { "flat" } else { "VLAN" };
    if link_mtu(fleet, physical).is_none() {
        return Err(Error::Invalid(format!(
            "Invalid input for operation: physical_network '{physical}' unknown for {kind} provider network. No host \
             has it: name its link in physical_networks of agent.toml."
        )));
    }
    let holder = fleet.networks.values().find(|n| n.segment == *segment);
    match (holder, segment) {
        (None, _) => Ok(()),
        (Some(other), Segment::Vlan { tag, .. }) => Err(Error::Conflict(format!(
            "Unable to create the network. The VLAN {tag} on physical network {physical} is in use by network {}.",
            other.id
        ))),
        (Some(other), _) => Err(Error::Conflict(format!(
            "Unable to create the flat network. Physical network {physical} is in use by network {}.",
            other.id
        ))),
    }
}

/// That a host can have a network.
///
/// # Errors
/// It lacks the network's link.
pub fn check_on(fleet: &Fleet, network: &Network, host: HostId) -> Result<(), Error> {
    let inventory = fleet.hosts.get(&host).and_then(|h| h.inventory.as_ref());
    match (network.segment.physical(), inventory) {
        (Some(physical), Some(inventory))
            if inventory.physical_networks.iter().all(|found| found.name != physical) =>
        {
            Err(Error::Conflict(format!(
                "Host {} lacks physical network {physical}, which carries network {}.",
                inventory.hostname, network.id
            )))
        }
        _ => Ok(()),
    }
}

/// The largest MTU that every host's link of a physical network takes.
fn link_mtu(fleet: &Fleet, physical: &str) -> Option<u32> {
    let inventories = fleet.hosts.values().filter_map(|h| h.inventory.as_ref());
    inventories.flat_map(|i| &i.physical_networks).filter(|p| p.name == physical).map(|p| p.mtu).min()
}

/// Taking a whole network down is not built; a switch that does nothing would be a lie.
fn check_up(up: bool) -> Result<(), Error> {
    if up {
        return Ok(());
    }
    Err(Error::Invalid("A network cannot be taken down here: admin_state_up must be true.".into()))
}

/// Makes a network. `luck` is a random number.
///
/// # Errors
/// Bad texts or MTU; no free number; a wanted number that is taken.
pub fn create(fleet: &Fleet, new: NewNetwork, numbers: &Numbers, luck: u32, now: Time) -> Decision<Network> {
    check_text("name", &new.name)?;
    check_text("description", &new.description)?;
    check_up(new.admin_state_up)?;
    let segment = choose_segment(fleet, &new.carrier, numbers, luck)?;
    check_segment(fleet, &segment)?;
    let mtu = match (new.mtu, segment.physical()) {
        (Some(mtu), physical) => check_mtu(fleet, mtu, physical)?,
        (None, Some(physical)) => link_mtu(fleet, physical).unwrap_or(1500).max(MIN_MTU),
        (None, None) => tightest(fleet).map_or(UNKNOWN_MTU, |(_, most)| most).max(MIN_MTU),
    };
    let vni = match new.carrier {
        Wish::Vxlan(vni) => choose_vni(fleet, vni, &numbers.vnis, luck)?,
        _ => provided_number(fleet, luck)?,
    };
    let network = Network {
        id: NetworkId::random(),
        name: new.name,
        description: new.description,
        project: new.project,
        vni,
        segment,
        mtu,
        port_security: new.port_security,
        shared: new.shared,
        admin_state_up: true,
        tags: Vec::new(),
        generation: 1,
        revision: 1,
        created_at: now,
        updated_at: now,
    };
    Ok((vec![network.clone().into()], network))
}

/// Changes a network. Hosts are to be told when the MTU changed.
///
/// # Errors
/// No such network; bad texts or MTU.
pub fn update(fleet: &Fleet, id: NetworkId, update: NetworkUpdate, now: Time) -> Decision<Network> {
    let mut network = find(fleet, id)?.clone();
    if let Some(name) = update.name {
        check_text("name", &name)?;
        network.name = name;
    }
    if let Some(description) = update.description {
        check_text("description", &description)?;
        network.description = description;
    }
    if let Some(mtu) = update.mtu {
        network.mtu = check_mtu(fleet, mtu, network.segment.physical())?;
        network.generation += 1;
    }
    if let Some(tags) = update.tags {
        check_tags(&tags)?;
        network.tags = tags;
    }
    if update.shared == Some(false)
        && let Some(port) = fleet.ports.values().find(|p| p.network == id && p.project != network.project)
    {
        return Err(Error::Conflict(format!(
            "Network {id} must stay shared: port {} belongs to another project.",
            port.id
        )));
    }
    network.shared = update.shared.unwrap_or(network.shared);
    network.port_security = update.port_security.unwrap_or(network.port_security);
    check_up(update.admin_state_up.unwrap_or(true))?;
    network.revision += 1;
    network.updated_at = now;
    Ok((vec![network.clone().into()], network))
}

/// Removes a network and its subnets.
///
/// # Errors
/// No such network; it has ports.
pub fn delete(fleet: &Fleet, id: NetworkId) -> Decision<()> {
    let network = find(fleet, id)?;
    let ports: Vec<&Port> = fleet.ports.values().filter(|p| p.network == id).collect();
    if let Some(port) = ports.first() {
        return Err(Error::Conflict(format!(
            "Network {id} is in use: it has {} port(s), {} among them.",
            ports.len(),
            port.id
        )));
    }
    let subnets = fleet.subnets.values().filter(|s| s.network == id).map(Change::gone::<Subnet>);
    Ok((subnets.chain([Change::gone(network)]).collect(), ()))
}

/// The network of that id.
///
/// # Errors
/// There is none.
pub fn find(fleet: &Fleet, id: NetworkId) -> Result<&Network, Error> {
    fleet.networks.get(&id).ok_or_else(|| Error::not_found("Network", id))
}
