//! Forwarding entries: which port of the bridge an address is behind, and which host's VTEP.

use super::kernel;
use super::socket::{Conversation, KernelError};
use crate::network::NetworkError;
use godwit_protocol::port::Mac;
use rtnetlink::packet_core::{NLM_F_APPEND, NLM_F_CREATE, NLM_F_REPLACE};
use rtnetlink::packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

/// The address whose destinations get what has no entry of its own.
const FLOOD: Mac = Mac([0; 6]);

/// NUD_NOARP: it does not age.
const NO_ARP: u16 = 0x40;
/// NUD_REACHABLE: the VXLAN driver takes no entry that is neither this nor permanent, and permanent would
/// make the bridge take it for an address of the host itself.
const REACHABLE: u16 = 0x02;

/// What one VXLAN device and its port on the bridge have.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Entries {
    /// The VTEP of each address.
    pub(super) vteps: BTreeMap<Mac, IpAddr>,
    /// Addresses that the bridge knows to be behind the VXLAN device.
    pub(super) bridged: BTreeSet<Mac>,
    /// VTEPs that broadcast goes to.
    pub(super) flood: BTreeSet<IpAddr>,
}

/// The entries of one device, or of all, by the device's index.
pub(super) fn collect(
    conversation: &mut Conversation,
    index: Option<u32>,
) -> Result<BTreeMap<u32, Entries>, KernelError> {
    let mut request = NeighbourMessage::default();
    request.header.family = AddressFamily::Bridge;
    request.header.ifindex = index.unwrap_or(0);
    let mut devices = BTreeMap::<u32, Entries>::new();
    for answer in conversation.dump(&RouteNetlinkMessage::GetNeighbour(request))? {
        let RouteNetlinkMessage::NewNeighbour(entry) = answer else { continue };
        take(&entry, devices.entry(entry.header.ifindex).or_default());
    }
    Ok(devices)
}

fn take(entry: &NeighbourMessage, entries: &mut Entries) {
    let (mut mac, mut vtep, mut bridged) = (None, None, false);
    for attribute in &entry.attributes {
        match attribute {
            NeighbourAttribute::LinkLocalAddress(bytes) => mac = bytes.as_slice().try_into().ok().map(Mac),
            NeighbourAttribute::Destination(address) => vtep = ip(address),
            NeighbourAttribute::Controller(_) => bridged = true,
            _ => {}
        }
    }
    // Of the bridge's own entries only those are ours that do not age and are not addresses of the host.
    let fixed = u16::from(entry.header.state) & NO_ARP != 0;
    match (mac, vtep) {
        (Some(FLOOD), Some(vtep)) => drop(entries.flood.insert(vtep)),
        (Some(mac), Some(vtep)) => drop(entries.vteps.insert(mac, vtep)),
        (Some(mac), None) if bridged && fixed => drop(entries.bridged.insert(mac)),
        _ => {}
    }
}

fn ip(address: &NeighbourAddress) -> Option<IpAddr> {
    match address {
        NeighbourAddress::Inet(address) => Some((*address).into()),
        NeighbourAddress::Inet6(address) => Some((*address).into()),
        NeighbourAddress::Other(bytes) => <[u8; 4]>::try_from(bytes.as_slice())
            .map(IpAddr::from)
            .or_else(|_| <[u8; 16]>::try_from(bytes.as_slice()).map(IpAddr::from))
            .ok(),
        _ => None,
    }
}

/// Changes the entries of a VXLAN device into the wanted ones; returns how many were changed for addresses
/// and how many for broadcast. What is new comes before what is stale goes, and an address moves from one
/// VTEP to another in one step. `out_of` is the link that broadcast to a group leaves by.
pub(super) fn ensure(
    conversation: &mut Conversation,
    device: u32,
    wanted: &Entries,
    out_of: Option<u32>,
) -> Result<(u32, u32), NetworkError> {
    let found = collect(conversation, Some(device))
        .map_err(|error| kernel("list forwarding entries", error))?
        .remove(&device)
        .unwrap_or_default();
    let (mut addresses, mut flood) = (0, 0);
    for (mac, vtep) in &wanted.vteps {
        if found.vteps.get(mac) != Some(vtep) || !found.bridged.contains(mac) {
            // Both at once: the bridge's entry sends it to the device, the device's to the host.
            let both = NeighbourFlags::Own | NeighbourFlags::Controller;
            let entry = message(device, *mac, Some(*vtep), both);
            conversation
                .change(RouteNetlinkMessage::NewNeighbour(entry), NLM_F_CREATE | NLM_F_REPLACE)
                .map_err(|error| kernel(format!("forward {mac} to {vtep}"), error))?;
            addresses += 1;
        }
    }
    for vtep in wanted.flood.difference(&found.flood) {
        let mut entry = message(device, FLOOD, Some(*vtep), NeighbourFlags::Own);
        entry.attributes.extend(out_of.map(NeighbourAttribute::IfIndex));
        conversation
            .change(RouteNetlinkMessage::NewNeighbour(entry), NLM_F_CREATE | NLM_F_APPEND)
            .map_err(|error| kernel(format!("send broadcast to {vtep}"), error))?;
        flood += 1;
    }
    for vtep in found.flood.difference(&wanted.flood) {
        remove(conversation, message(device, FLOOD, Some(*vtep), NeighbourFlags::Own))?;
        flood += 1;
    }
    for mac in found.bridged.iter().filter(|mac| !wanted.vteps.contains_key(mac)) {
        remove(conversation, message(device, *mac, None, NeighbourFlags::Controller))?;
        addresses += 1;
    }
    for (mac, vtep) in found.vteps.iter().filter(|(mac, _)| !wanted.vteps.contains_key(mac)) {
        remove(conversation, message(device, *mac, Some(*vtep), NeighbourFlags::Own))?;
        addresses += u32::from(!found.bridged.contains(mac));
    }
    Ok((addresses, flood))
}

fn remove(conversation: &mut Conversation, entry: NeighbourMessage) -> Result<(), NetworkError> {
    match conversation.change(RouteNetlinkMessage::DelNeighbour(entry), 0) {
        // Gone already: a guest's own packet has moved it to another port.
        Err(error) if error.is(&[libc::ENOENT]) => Ok(()),
        result => result.map_err(|error| kernel("remove a stale forwarding entry", error)),
    }
}

fn message(device: u32, mac: Mac, vtep: Option<IpAddr>, flags: NeighbourFlags) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = AddressFamily::Bridge;
    message.header.ifindex = device;
    message.header.state = NeighbourState::Other(NO_ARP | REACHABLE);
    message.header.flags = flags;
    message.attributes = vec![NeighbourAttribute::LinkLocalAddress(mac.0.to_vec())];
    message.attributes.extend(vtep.map(|vtep| NeighbourAttribute::Destination(vtep.into())));
    message
}
