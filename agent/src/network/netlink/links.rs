//! Links: reading them, and making the two that each network has.

use super::kernel;
use super::socket::{Conversation, KernelError};
use crate::network::NetworkError;
use godwit_protocol::host::Underlay;
use godwit_protocol::network::{Carrier, NetworkWanted, Unknown, bridge_name, vxlan_name};
use rtnetlink::packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::link::{
    BridgeStpState, InfoBridge, InfoBridgePort, InfoData, InfoKind, InfoPortData, InfoPortKind, InfoVlan,
    InfoVxlan, LinkAttribute, LinkExtentMask, LinkFlags, LinkInfo, LinkMessage,
};
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;

/// The least that a link can have, in bytes.
const SMALLEST_MTU: u32 = 68;

/// What the names of guests' taps begin with, see [`godwit_protocol::port::tap_name`].
const TAP_PREFIX: &str = "gwt";

/// What is to be known of a link. The kernel's messages are cut down to it, see [`super::message`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct LinkState {
    pub(super) index: u32,
    pub(super) name: String,
    pub(super) mtu: u32,
    /// Administratively.
    pub(super) up: bool,
    /// With a carrier.
    pub(super) running: bool,
    pub(super) loopback: bool,
    /// Six bytes on Ethernet.
    pub(super) address: Vec<u8>,
    /// The bridge, by index, that it is a port of.
    pub(super) bridge: Option<u32>,
    /// The link, by index, that it is made over.
    parent: Option<u32>,
    pub(super) kind: Option<InfoKind>,
    /// Settings of a bridge, VXLAN device and port of a bridge, those that matter here.
    settings: Settings,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Settings {
    spanning_tree: bool,
    multicast_snooping: bool,
    vni: Option<u32>,
    local: Option<IpAddr>,
    group: Option<IpAddr>,
    /// 0: the kernel's own choice, which is 1 for a packet to a group.
    ttl: u8,
    tag: Option<u16>,
    udp_port: Option<u16>,
    underlay: Option<u32>,
    vxlan_learning: bool,
    port_learning: bool,
    port_answers: bool,
    port_floods: bool,
}

impl LinkState {
    fn read(message: &LinkMessage) -> Self {
        let flags = message.header.flags;
        let mut link = Self {
            index: message.header.index,
            name: String::new(),
            mtu: 0,
            up: flags.contains(LinkFlags::Up),
            running: flags.contains(LinkFlags::LowerUp),
            loopback: flags.contains(LinkFlags::Loopback),
            address: Vec::new(),
            bridge: None,
            parent: None,
            kind: None,
            settings: Settings::default(),
        };
        for attribute in &message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => link.name.clone_from(name),
                LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
                LinkAttribute::Address(address) => link.address.clone_from(address),
                LinkAttribute::Controller(index) => link.bridge = Some(*index),
                LinkAttribute::Link(index) => link.parent = Some(*index),
                LinkAttribute::LinkInfo(infos) => infos.iter().for_each(|info| link.read_info(info)),
                _ => {}
            }
        }
        link
    }

    fn read_info(&mut self, info: &LinkInfo) {
        match info {
            LinkInfo::Kind(kind) => self.kind = Some(kind.clone()),
            LinkInfo::Data(InfoData::Bridge(data)) => {
                for setting in data {
                    match setting {
                        InfoBridge::StpState(state) => {
                            self.settings.spanning_tree = *state != BridgeStpState::Disabled;
                        }
                        InfoBridge::MulticastSnooping(on) => self.settings.multicast_snooping = *on,
                        _ => {}
                    }
                }
            }
            LinkInfo::Data(InfoData::Vxlan(data)) => {
                for setting in data {
                    match setting {
                        InfoVxlan::Id(vni) => self.settings.vni = Some(*vni),
                        InfoVxlan::Local(address) => self.settings.local = Some((*address).into()),
                        InfoVxlan::Local6(address) => self.settings.local = Some((*address).into()),
                        InfoVxlan::Group(group) => self.settings.group = some_group((*group).into()),
                        InfoVxlan::Group6(group) => self.settings.group = some_group((*group).into()),
                        InfoVxlan::Ttl(ttl) => self.settings.ttl = *ttl,
                        InfoVxlan::Port(port) => self.settings.udp_port = Some(*port),
                        InfoVxlan::Link(index) => self.settings.underlay = Some(*index),
                        InfoVxlan::Learning(on) => self.settings.vxlan_learning = *on,
                        _ => {}
                    }
                }
            }
            LinkInfo::Data(InfoData::Vlan(data)) => {
                for setting in data {
                    if let InfoVlan::Id(tag) = setting {
                        self.settings.tag = Some(*tag);
                    }
                }
            }
            LinkInfo::PortData(InfoPortData::BridgePort(data)) => {
                for setting in data {
                    match setting {
                        InfoBridgePort::Learning(on) => self.settings.port_learning = *on,
                        InfoBridgePort::NeighSupress(on) => self.settings.port_answers = *on,
                        InfoBridgePort::UnicastFlood(on) => self.settings.port_floods = *on,
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }

    /// Whether it is a guest's tap that nobody has open.
    pub(super) fn is_unused_tap(&self) -> bool {
        self.kind == Some(InfoKind::Tun) && self.name.starts_with(TAP_PREFIX) && !self.running
    }

    /// The VNI, if it is a VXLAN device.
    pub(super) fn vni(&self) -> Option<u32> {
        self.settings.vni
    }

    /// Hops that a packet to its group may take, if it is a VXLAN device that has one.
    pub(super) fn group_ttl(&self) -> Option<u8> {
        self.settings.group.map(|_| self.settings.ttl.max(1))
    }

    /// Whether it is a VLAN with this tag over that link.
    pub(super) fn is_vlan(&self, parent: u32, tag: u16) -> bool {
        self.kind == Some(InfoKind::Vlan) && self.parent == Some(parent) && self.settings.tag == Some(tag)
    }
}

fn some_group(group: IpAddr) -> Option<IpAddr> {
    Some(group).filter(|group| !group.is_unspecified())
}

/// Asks for links without their counters, which the kernel would have to sum over CPUs.
fn without_counts() -> LinkAttribute {
    LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats])
}

/// A link by its name; none if there is none.
pub(super) fn find(conversation: &mut Conversation, name: &str) -> Result<Option<LinkState>, NetworkError> {
    let mut request = LinkMessage::default();
    request.attributes = vec![LinkAttribute::IfName(name.to_owned()), without_counts()];
    match conversation.get(RouteNetlinkMessage::GetLink(request)) {
        Ok(answers) => Ok(answers.iter().find_map(|answer| match answer {
            RouteNetlinkMessage::NewLink(message) => Some(LinkState::read(message)),
            _ => None,
        })),
        Err(error) if error.is(&[libc::ENODEV]) => Ok(None),
        Err(error) => Err(kernel(format!("look for link {name}"), error)),
    }
}

/// All links.
pub(super) fn collect(conversation: &mut Conversation) -> Result<Vec<LinkState>, NetworkError> {
    let mut request = LinkMessage::default();
    request.attributes = vec![without_counts()];
    let answers = conversation
        .dump(&RouteNetlinkMessage::GetLink(request))
        .map_err(|error| kernel("list links", error))?;
    let links = answers.iter().filter_map(|answer| match answer {
        RouteNetlinkMessage::NewLink(message) => Some(LinkState::read(message)),
        _ => None,
    });
    Ok(links.collect())
}

/// Removes a link; it being gone is a success.
pub(super) fn remove(conversation: &mut Conversation, link: &LinkState) -> Result<(), NetworkError> {
    let mut message = LinkMessage::default();
    message.header.index = link.index;
    match conversation.change(RouteNetlinkMessage::DelLink(message), 0) {
        Err(error) if error.is(&[libc::ENODEV]) => Ok(()),
        result => result.map_err(|error| kernel(format!("remove link {}", link.name), error)),
    }
}

/// The network's bridge, as wanted but for being up, and whether it had to be changed for that.
pub(super) fn ensure_bridge(
    conversation: &mut Conversation,
    wanted: &NetworkWanted,
) -> Result<(LinkState, bool), NetworkError> {
    let name = bridge_name(wanted.vni);
    let settings = || {
        let data = vec![InfoBridge::StpState(BridgeStpState::Disabled), InfoBridge::MulticastSnooping(false)];
        LinkAttribute::LinkInfo(vec![
            LinkInfo::Kind(InfoKind::Bridge),
            LinkInfo::Data(InfoData::Bridge(data)),
        ])
    };
    let mut changed = false;
    let bridge = match find(conversation, &name)? {
        Some(link) if link.kind == Some(InfoKind::Bridge) => link,
        other => {
            replace(conversation, other, "it is no bridge")?;
            changed = true;
            // The MTU that a bridge is made with follows its ports; one that is set later is kept.
            let attributes = vec![
                LinkAttribute::Mtu(SMALLEST_MTU),
                LinkAttribute::Address(own_address().to_vec()),
                settings(),
            ];
            create(conversation, &name, attributes)?
        }
    };
    let mut attributes = Vec::new();
    if bridge.settings.spanning_tree || bridge.settings.multicast_snooping {
        attributes.push(settings());
    }
    if bridge.mtu != wanted.mtu {
        attributes.push(LinkAttribute::Mtu(wanted.mtu));
    }
    if !attributes.is_empty() {
        set(conversation, &bridge, attributes)?;
        changed = true;
    }
    if !bridge.up {
        isolate(&name, wanted.vni)?;
    }
    Ok((bridge, changed))
}

/// An Ethernet address for a bridge, locally administered. One that is not given follows the ports, and the kernel drops
/// all neighbours of a device whose address changes, the permanent ones too.
fn own_address() -> [u8; 6] {
    let [a, b, c, d, e, ..] = *uuid::Uuid::new_v4().as_bytes();
    [0x02, a, b, c, d, e]
}

/// The network's VXLAN device, as wanted and on the bridge, but for being up, and whether it had to be changed for
/// that.
pub(super) fn ensure_vxlan(
    conversation: &mut Conversation,
    wanted: &NetworkWanted,
    underlay: &Underlay,
    underlay_index: u32,
    bridge: &LinkState,
    stands_in: bool,
) -> Result<(LinkState, bool), NetworkError> {
    let name = vxlan_name(wanted.vni);
    let mut changed = false;
    let found = find(conversation, &name)?;
    let reason = found.as_ref().and_then(|link| vxlan_mismatch(link, wanted, underlay, underlay_index));
    let vxlan = match (found, reason) {
        (Some(link), None) if has_group(&link, wanted) => link,
        (Some(link), None) => {
            changed = true;
            regroup(conversation, link, wanted, underlay)?
        }
        (found, reason) => {
            replace(conversation, found, reason.unwrap_or_default())?;
            let mut data = vec![
                InfoVxlan::Id(wanted.vni),
                match underlay.address {
                    IpAddr::V4(address) => InfoVxlan::Local(address),
                    IpAddr::V6(address) => InfoVxlan::Local6(address),
                },
                InfoVxlan::Link(underlay_index),
                InfoVxlan::Port(wanted.udp_port),
                InfoVxlan::Learning(false),
            ];
            data.extend(group(wanted, underlay));
            let info = vec![LinkInfo::Kind(InfoKind::Vxlan), LinkInfo::Data(InfoData::Vxlan(data))];
            changed = true;
            create(conversation, &name, vec![LinkAttribute::Mtu(wanted.mtu), LinkAttribute::LinkInfo(info)])?
        }
    };
    if !vxlan.up {
        // Before it is anybody's port, since addresses are given when a link comes up.
        isolate(&name, wanted.vni)?;
    }
    if vxlan.mtu != wanted.mtu {
        set_mtu(conversation, &vxlan, wanted.mtu)?;
        changed = true;
    }
    if vxlan.bridge != Some(bridge.index) {
        set(conversation, &vxlan, vec![LinkAttribute::Controller(bridge.index)])?;
        changed = true;
    }
    // Programs at the ports decide what is flooded; without them it is the bridge.
    let floods = !stands_in || wanted.unknown_unicast == Unknown::Flood || !wanted.floating.is_empty();
    let is = (vxlan.settings.port_learning, vxlan.settings.port_answers, vxlan.settings.port_floods);
    if vxlan.bridge != Some(bridge.index) || is != (false, stands_in, floods) {
        let settings = vec![
            InfoBridgePort::Learning(false),
            InfoBridgePort::NeighSupress(stands_in),
            InfoBridgePort::UnicastFlood(floods),
        ];
        let port = vec![
            LinkInfo::PortKind(InfoPortKind::Bridge),
            LinkInfo::PortData(InfoPortData::BridgePort(settings)),
        ];
        set(conversation, &vxlan, vec![LinkAttribute::LinkInfo(port)])?;
        changed = true;
    }
    Ok((vxlan, changed))
}

/// The group that broadcast goes to, if it is not replicated, and the kernel's figure for its hops: none of its own
/// where the usual one will do, since the figure is that of packets to single hosts too.
fn wanted_group(wanted: &NetworkWanted) -> (Option<IpAddr>, u8) {
    match wanted.carrier {
        Carrier::VxlanGroup { group, ttl } => (Some(group), if ttl == 1 { 0 } else { ttl }),
        _ => (None, 0),
    }
}

fn has_group(link: &LinkState, wanted: &NetworkWanted) -> bool {
    (link.settings.group, link.settings.ttl) == wanted_group(wanted)
}

/// What makes a device send its broadcast to the network's group, or to none. The kernel joins it while the device is
/// up, and makes and removes the entry for it.
fn group(wanted: &NetworkWanted, underlay: &Underlay) -> Vec<InfoVxlan> {
    let (group, ttl) = wanted_group(wanted);
    let address = match (group, underlay.address) {
        (Some(IpAddr::V4(group)), _) => InfoVxlan::Group(group),
        (Some(IpAddr::V6(group)), _) => InfoVxlan::Group6(group),
        (None, IpAddr::V4(_)) => InfoVxlan::Group(Ipv4Addr::UNSPECIFIED),
        (None, IpAddr::V6(_)) => InfoVxlan::Group6(Ipv6Addr::UNSPECIFIED),
    };
    vec![address, InfoVxlan::Ttl(ttl)]
}

/// Gives a device another group, or takes it away. Entries stay, so all that the network's hosts know of one another
/// goes on; but the kernel joins and leaves groups as a device goes up and down, which takes a few milliseconds.
fn regroup(
    conversation: &mut Conversation,
    link: LinkState,
    wanted: &NetworkWanted,
    underlay: &Underlay,
) -> Result<LinkState, NetworkError> {
    tracing::info!(link = link.name, group = ?wanted_group(wanted).0, "broadcast takes another way");
    set_up(conversation, &link, false)?;
    let info =
        vec![LinkInfo::Kind(InfoKind::Vxlan), LinkInfo::Data(InfoData::Vxlan(group(wanted, underlay)))];
    set(conversation, &link, vec![LinkAttribute::LinkInfo(info)])?;
    if link.up {
        set_up(conversation, &link, true)?;
    }
    Ok(link)
}

/// Why a link is not the VXLAN device that is wanted, in what can only be set when one is made.
fn vxlan_mismatch(
    link: &LinkState,
    wanted: &NetworkWanted,
    underlay: &Underlay,
    underlay_index: u32,
) -> Option<&'static str> {
    let settings = &link.settings;
    if link.kind != Some(InfoKind::Vxlan) {
        Some("it is no VXLAN device")
    } else if settings.vni != Some(wanted.vni) {
        Some("it has another VNI")
    } else if settings.local != Some(underlay.address) {
        Some("it has another local address")
    } else if settings.udp_port != Some(wanted.udp_port) {
        Some("it has another UDP port")
    } else if settings.underlay != Some(underlay_index) {
        Some("it is on another underlay link")
    } else if settings.vxlan_learning {
        Some("it learns")
    } else {
        None
    }
}

/// Puts a link on a bridge, unless it is its port already. Says whether it was not.
pub(super) fn ensure_port(
    conversation: &mut Conversation,
    link: &LinkState,
    bridge: &LinkState,
) -> Result<bool, NetworkError> {
    if link.bridge == Some(bridge.index) {
        return Ok(false);
    }
    set(conversation, link, vec![LinkAttribute::Controller(bridge.index)])?;
    Ok(true)
}

/// Sets a link up, unless it is. Says whether it was not.
pub(super) fn ensure_up(conversation: &mut Conversation, link: &LinkState) -> Result<bool, NetworkError> {
    if link.up {
        return Ok(false);
    }
    set_up(conversation, link, true)?;
    Ok(true)
}

fn set_up(conversation: &mut Conversation, link: &LinkState, up: bool) -> Result<(), NetworkError> {
    let mut message = LinkMessage::default();
    message.header.index = link.index;
    message.header.flags = if up { LinkFlags::Up } else { LinkFlags::empty() };
    message.header.change_mask = LinkFlags::Up;
    change(conversation, message, format!("set link {} {}", link.name, if up { "up" } else { "down" }))
}

fn replace(
    conversation: &mut Conversation,
    found: Option<LinkState>,
    reason: &str,
) -> Result<(), NetworkError> {
    let Some(link) = found else { return Ok(()) };
    tracing::warn!(link = link.name, reason, "a link that has a network's name is replaced");
    remove(conversation, &link)
}

pub(super) fn create(
    conversation: &mut Conversation,
    name: &str,
    attributes: Vec<LinkAttribute>,
) -> Result<LinkState, NetworkError> {
    let mut message = LinkMessage::default();
    message.attributes = vec![LinkAttribute::IfName(name.to_owned())];
    message.attributes.extend(attributes);
    let action = || format!("make link {name}");
    conversation
        .change(RouteNetlinkMessage::NewLink(message), NLM_F_CREATE | NLM_F_EXCL)
        .map_err(|error| kernel(action(), error))?;
    let gone = || KernelError::from(io::Error::from_raw_os_error(libc::ENODEV));
    find(conversation, name)?.ok_or_else(|| kernel(action(), gone()))
}

/// Gives a link another MTU, in bytes.
pub(super) fn set_mtu(
    conversation: &mut Conversation,
    link: &LinkState,
    mtu: u32,
) -> Result<(), NetworkError> {
    set(conversation, link, vec![LinkAttribute::Mtu(mtu)])
}

fn set(
    conversation: &mut Conversation,
    link: &LinkState,
    attributes: Vec<LinkAttribute>,
) -> Result<(), NetworkError> {
    let mut message = LinkMessage::default();
    message.header.index = link.index;
    message.attributes = attributes;
    change(conversation, message, format!("set up link {}", link.name))
}

fn change(conversation: &mut Conversation, message: LinkMessage, action: String) -> Result<(), NetworkError> {
    let request = RouteNetlinkMessage::NewLink(message);
    conversation.change(request, 0).map_err(|error| kernel(action, error))
}

/// Keeps the host's own protocols off a network's links. Otherwise guests would find the host on their
/// network: it would answer ARP there for all of its addresses, and take packets for them, those of the
/// underlay included.
pub(super) fn isolate(link: &str, vni: u32) -> Result<(), NetworkError> {
    let settings = [
        // No answer to ARP for any address of the host, and no packet accepted unless there were a route back
        // by this link, which there never is.
        ("ipv4", "arp_ignore", "8"),
        ("ipv4", "rp_filter", "1"),
        ("ipv6", "disable_ipv6", "1"),
    ];
    for (family, setting, value) in settings {
        let path = format!("/proc/sys/net/{family}/conf/{link}/{setting}");
        if family == "ipv6" && !Path::new("/proc/sys/net/ipv6").exists() {
            continue;
        }
        fs::write(&path, value).map_err(|source| NetworkError::Setting { path, source })?;
        tracing::trace!(vni, link, setting, value, "kept the host off the network");
    }
    Ok(())
}
