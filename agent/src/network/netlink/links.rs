//! Links: reading them, and making the two that each network has.

use super::kernel;
use super::socket::{Conversation, KernelError};
use crate::network::NetworkError;
use godwit_protocol::host::Underlay;
use godwit_protocol::network::{NetworkWanted, bridge_name, vxlan_name};
use rtnetlink::packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::link::{
    BridgeStpState, InfoBridge, InfoBridgePort, InfoData, InfoKind, InfoPortData, InfoPortKind, InfoVxlan,
    LinkAttribute, LinkFlags, LinkInfo, LinkMessage,
};
use std::fs;
use std::io;
use std::net::IpAddr;
use std::path::Path;

/// The least that a link can have, in bytes.
const SMALLEST_MTU: u32 = 68;

/// What is to be known of a link.
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
    udp_port: Option<u16>,
    underlay: Option<u32>,
    vxlan_learning: bool,
    port_learning: bool,
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
            kind: None,
            settings: Settings::default(),
        };
        for attribute in &message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => link.name.clone_from(name),
                LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
                LinkAttribute::Address(address) => link.address.clone_from(address),
                LinkAttribute::Controller(index) => link.bridge = Some(*index),
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
                        InfoVxlan::Port(port) => self.settings.udp_port = Some(*port),
                        InfoVxlan::Link(index) => self.settings.underlay = Some(*index),
                        InfoVxlan::Learning(on) => self.settings.vxlan_learning = *on,
                        _ => {}
                    }
                }
            }
            LinkInfo::PortData(InfoPortData::BridgePort(data)) => {
                for setting in data {
                    if let InfoBridgePort::Learning(on) = setting {
                        self.settings.port_learning = *on;
                    }
                }
            }
            _ => {}
        }
    }

    /// The VNI, if it is a VXLAN device.
    pub(super) fn vni(&self) -> Option<u32> {
        self.settings.vni
    }
}

/// A link by its name; none if there is none.
pub(super) fn find(conversation: &mut Conversation, name: &str) -> Result<Option<LinkState>, NetworkError> {
    let mut request = LinkMessage::default();
    request.attributes = vec![LinkAttribute::IfName(name.to_owned())];
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
    let request = RouteNetlinkMessage::GetLink(LinkMessage::default());
    let answers = conversation.dump(&request).map_err(|error| kernel("list links", error))?;
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
            create(conversation, &name, vec![LinkAttribute::Mtu(SMALLEST_MTU), settings()])?
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

/// The network's VXLAN device, as wanted and on the bridge, but for being up, and whether it had to be changed for
/// that.
pub(super) fn ensure_vxlan(
    conversation: &mut Conversation,
    wanted: &NetworkWanted,
    underlay: &Underlay,
    underlay_index: u32,
    bridge: &LinkState,
) -> Result<(LinkState, bool), NetworkError> {
    let name = vxlan_name(wanted.vni);
    let mut changed = false;
    let found = find(conversation, &name)?;
    let reason = found.as_ref().and_then(|link| vxlan_mismatch(link, wanted, underlay, underlay_index));
    let vxlan = match (found, reason) {
        (Some(link), None) => link,
        (found, reason) => {
            replace(conversation, found, reason.unwrap_or_default())?;
            let data = vec![
                InfoVxlan::Id(wanted.vni),
                match underlay.address {
                    IpAddr::V4(address) => InfoVxlan::Local(address),
                    IpAddr::V6(address) => InfoVxlan::Local6(address),
                },
                InfoVxlan::Link(underlay_index),
                InfoVxlan::Port(wanted.udp_port),
                InfoVxlan::Learning(false),
            ];
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
        set(conversation, &vxlan, vec![LinkAttribute::Mtu(wanted.mtu)])?;
        changed = true;
    }
    if vxlan.bridge != Some(bridge.index) {
        set(conversation, &vxlan, vec![LinkAttribute::Controller(bridge.index)])?;
        changed = true;
    }
    if vxlan.bridge != Some(bridge.index) || vxlan.settings.port_learning {
        let port = vec![
            LinkInfo::PortKind(InfoPortKind::Bridge),
            LinkInfo::PortData(InfoPortData::BridgePort(vec![InfoBridgePort::Learning(false)])),
        ];
        set(conversation, &vxlan, vec![LinkAttribute::LinkInfo(port)])?;
        changed = true;
    }
    Ok((vxlan, changed))
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
    let mut message = LinkMessage::default();
    message.header.index = link.index;
    message.header.flags = LinkFlags::Up;
    message.header.change_mask = LinkFlags::Up;
    change(conversation, message, format!("set link {} up", link.name))?;
    Ok(true)
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

fn create(
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
fn isolate(link: &str, vni: u32) -> Result<(), NetworkError> {
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
