//! The host's own links, for the inventory and to find the underlay.

use super::kernel;
use super::links::{self, LinkState};
use super::socket::Conversation;
use crate::network::NetworkError;
use godwit_protocol::host::Link;
use godwit_protocol::port::Mac;
use rtnetlink::packet_route::address::{AddressAttribute, AddressMessage};
use rtnetlink::packet_route::link::InfoKind;
use rtnetlink::packet_route::route::{RouteAddress, RouteAttribute, RouteMessage};
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};
use std::collections::BTreeMap;
use std::fs;
use std::net::IpAddr;
use std::path::Path;

/// The host's links in the order of their names.
pub(super) fn collect_links(
    conversation: &mut Conversation,
    sysfs: &Path,
) -> Result<Vec<Link>, NetworkError> {
    let mut addresses = collect_addresses(conversation)?;
    let own = links::collect(conversation)?.into_iter().filter(is_own);
    let mut found: Vec<Link> = own
        .map(|link| Link {
            mac: <[u8; 6]>::try_from(link.address.as_slice())
                .map(|mac| Mac(mac).to_string())
                .unwrap_or_default(),
            mtu: link.mtu,
            up: link.up && link.running,
            addresses: addresses.remove(&link.index).unwrap_or_default(),
            cell: cell(sysfs, &link.name),
            name: link.name,
        })
        .collect();
    found.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(found)
}

/// Whether a link is the host's: not loopback, no tap, nothing of the overlay's, no port of a network's
/// bridge.
fn is_own(link: &LinkState) -> bool {
    let guest = matches!(link.kind, Some(InfoKind::Tun | InfoKind::Vxlan | InfoKind::MacVtap));
    let named = ["gwb", "gwv", "gwt"].iter().any(|prefix| link.name.starts_with(prefix));
    !(link.loopback || guest || named)
}

/// The NUMA cell of the device behind a link; a link without one, or a machine without cells, has none.
fn cell(sysfs: &Path, link: &str) -> Option<u32> {
    let node = fs::read_to_string(sysfs.join("class/net").join(link).join("device/numa_node")).ok()?;
    node.trim().parse().ok()
}

fn collect_addresses(conversation: &mut Conversation) -> Result<BTreeMap<u32, Vec<IpAddr>>, NetworkError> {
    let request = RouteNetlinkMessage::GetAddress(AddressMessage::default());
    let answers = conversation.dump(&request).map_err(|error| kernel("list addresses", error))?;
    let mut addresses = BTreeMap::<u32, Vec<IpAddr>>::new();
    for answer in answers {
        let RouteNetlinkMessage::NewAddress(message) = answer else { continue };
        // On a point-to-point link the first is the peer's.
        let local = message.attributes.iter().find_map(|attribute| match attribute {
            AddressAttribute::Local(address) => Some(*address),
            _ => None,
        });
        let plain = message.attributes.iter().find_map(|attribute| match attribute {
            AddressAttribute::Address(address) => Some(*address),
            _ => None,
        });
        addresses.entry(message.header.index).or_default().extend(local.or(plain));
    }
    Ok(addresses)
}

/// Links, by index, that have addresses other than those that every link gives itself.
pub(super) fn addressed(conversation: &mut Conversation) -> Result<Vec<u32>, NetworkError> {
    let is_given = |address: &IpAddr| match address {
        IpAddr::V4(_) => true,
        IpAddr::V6(address) => !address.is_unicast_link_local(),
    };
    let all = collect_addresses(conversation)?;
    Ok(all
        .into_iter()
        .filter(|(_, addresses)| addresses.iter().any(is_given))
        .map(|(link, _)| link)
        .collect())
}

/// The link and source address of packets to `towards`, by the routing table.
pub(super) fn route(
    conversation: &mut Conversation,
    towards: IpAddr,
) -> Result<Option<(u32, IpAddr)>, NetworkError> {
    let mut request = RouteMessage::default();
    request.header.address_family = family(towards);
    request.header.destination_prefix_length = if towards.is_ipv4() { 32 } else { 128 };
    request.attributes = vec![RouteAttribute::Destination(match towards {
        IpAddr::V4(address) => RouteAddress::Inet(address),
        IpAddr::V6(address) => RouteAddress::Inet6(address),
    })];
    let answers = match conversation.get(RouteNetlinkMessage::GetRoute(request)) {
        Ok(answers) => answers,
        Err(error) if error.is(&[libc::ENETUNREACH, libc::EHOSTUNREACH]) => return Ok(None),
        Err(error) => return Err(kernel(format!("look for the route to {towards}"), error)),
    };
    let (mut index, mut source) = (None, None);
    for answer in answers {
        let RouteNetlinkMessage::NewRoute(message) = answer else { continue };
        for attribute in message.attributes {
            match attribute {
                RouteAttribute::Oif(link) => index = Some(link),
                RouteAttribute::PrefSource(RouteAddress::Inet(address)) => source = Some(address.into()),
                RouteAttribute::PrefSource(RouteAddress::Inet6(address)) => source = Some(address.into()),
                _ => {}
            }
        }
    }
    Ok(index.zip(source))
}

fn family(address: IpAddr) -> AddressFamily {
    if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 }
}
