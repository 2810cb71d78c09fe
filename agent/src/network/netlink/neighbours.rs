//! Neighbours that the kernel's bridge answers for, where no program of ours does (`neigh_suppress`, RFC 9161 in the
//! kernel's way). Of IPv4 only: the bridge has no IPv6, so that the host stays off its guests' networks, and without
//! it the kernel takes no neighbours of IPv6. Solicitations are flooded then.

use super::kernel;
use super::socket::Conversation;
use crate::network::NetworkError;
use godwit_protocol::network::NetworkWanted;
use godwit_protocol::port::Mac;
use rtnetlink::packet_core::{NLM_F_CREATE, NLM_F_REPLACE};
use rtnetlink::packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use rtnetlink::packet_route::route::RouteType;
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};
use std::collections::BTreeMap;
use std::net::IpAddr;

/// Makes the bridge's neighbours those that are at other hosts. Returns how many were changed.
pub(super) fn ensure(
    conversation: &mut Conversation,
    bridge: u32,
    wanted: &NetworkWanted,
) -> Result<u32, NetworkError> {
    let entries = wanted.forwarding.iter();
    let wanted: BTreeMap<IpAddr, Mac> = entries
        .flat_map(|entry| entry.addresses.iter().map(|address| (*address, entry.mac)))
        .filter(|(address, _)| address.is_ipv4())
        .collect();
    let found = collect(conversation, bridge)?;
    let mut changes = 0;
    for (address, mac) in wanted.iter().filter(|(address, mac)| found.get(*address) != Some(*mac)) {
        conversation
            .change(
                RouteNetlinkMessage::NewNeighbour(message(bridge, *address, Some(*mac))),
                NLM_F_CREATE | NLM_F_REPLACE,
            )
            .map_err(|error| kernel(format!("answer for {address}"), error))?;
        changes += 1;
    }
    for address in found.keys().filter(|address| !wanted.contains_key(*address)) {
        match conversation.change(RouteNetlinkMessage::DelNeighbour(message(bridge, *address, None)), 0) {
            Err(error) if error.is(&[libc::ENOENT]) => {}
            result => result.map_err(|error| kernel(format!("no longer answer for {address}"), error))?,
        }
        changes += 1;
    }
    Ok(changes)
}

fn collect(conversation: &mut Conversation, bridge: u32) -> Result<BTreeMap<IpAddr, Mac>, NetworkError> {
    let mut found = BTreeMap::new();
    let mut request = NeighbourMessage::default();
    request.header.family = AddressFamily::Inet;
    let answers = conversation
        .dump(&RouteNetlinkMessage::GetNeighbour(request))
        .map_err(|error| kernel("list neighbours", error))?;
    for answer in answers {
        let RouteNetlinkMessage::NewNeighbour(entry) = answer else { continue };
        if entry.header.ifindex != bridge || entry.header.state != NeighbourState::Permanent {
            continue;
        }
        let (mut address, mut mac) = (None, None);
        for attribute in &entry.attributes {
            match attribute {
                NeighbourAttribute::Destination(NeighbourAddress::Inet(found)) => {
                    address = Some((*found).into());
                }
                NeighbourAttribute::LinkLocalAddress(bytes) => {
                    mac = bytes.as_slice().try_into().ok().map(Mac);
                }
                _ => {}
            }
        }
        found.extend(address.zip(mac));
    }
    Ok(found)
}

fn message(bridge: u32, address: IpAddr, mac: Option<Mac>) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = AddressFamily::Inet;
    message.header.ifindex = bridge;
    message.header.state = NeighbourState::Permanent;
    message.header.kind = RouteType::Unicast;
    message.attributes = vec![NeighbourAttribute::Destination(address.into())];
    message.attributes.extend(mac.map(|mac| NeighbourAttribute::LinkLocalAddress(mac.0.to_vec())));
    message
}
