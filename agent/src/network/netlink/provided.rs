//! Networks that a link of the host carries, untagged or with a VLAN's tag.

use super::links::{self, LinkState};
use super::socket::Conversation;
use crate::network::{Changes, NetworkError};
use godwit_protocol::host::Underlay;
use godwit_protocol::network::{Carrier, NetworkWanted, bridge_name, vxlan_name};
use rtnetlink::packet_route::link::{InfoData, InfoKind, InfoVlan, LinkAttribute, LinkInfo};
use std::collections::BTreeMap;

/// Brings such a network to the wanted state, but for its ports; returns its bridge and what was changed. `links`
/// are the host's links by the name of their physical network, `addressed` those that have addresses of the host.
pub(super) fn ensure(
    conversation: &mut Conversation,
    wanted: &NetworkWanted,
    links: &BTreeMap<String, String>,
    underlay: &Underlay,
    addressed: &[u32],
) -> Result<(LinkState, Changes), NetworkError> {
    let (physical, tag) = match &wanted.carrier {
        Carrier::Vlan(physical, tag) => (physical, Some(*tag)),
        Carrier::Flat(physical) => (physical, None),
        Carrier::Vxlan | Carrier::VxlanGroup { .. } => {
            return Err(NetworkError::Invalid { vni: wanted.vni, reason: "it is on no link".into() });
        }
    };
    let name = links.get(physical).ok_or_else(|| NetworkError::NoPhysical { physical: physical.clone() })?;
    let parent = links::find(conversation, name)?
        .ok_or_else(|| NetworkError::NoLink { physical: physical.clone(), link: name.clone() })?;
    if wanted.mtu > parent.mtu {
        let (vni, mtu, need, have) = (wanted.vni, wanted.mtu, wanted.mtu, parent.mtu);
        return Err(NetworkError::MtuTooLarge { vni, mtu, need, have, link: parent.name });
    }
    let own = links::find(conversation, &bridge_name(wanted.vni))?.map(|bridge| bridge.index);
    if tag.is_none() {
        refuse_used(&parent, physical, underlay, addressed, own)?;
    }
    let mut changed = links::ensure_up(conversation, &parent)?;
    let carrier = match tag {
        None => parent,
        Some(tag) => {
            let (link, is_changed) = ensure_vlan(conversation, wanted, &parent, tag)?;
            changed |= is_changed;
            link
        }
    };
    let (bridge, bridge_changed) = links::ensure_bridge(conversation, wanted)?;
    changed |= bridge_changed;
    changed |= links::ensure_port(conversation, &carrier, &bridge)?;
    changed |= links::ensure_up(conversation, &carrier)?;
    changed |= links::ensure_up(conversation, &bridge)?;
    Ok((bridge, Changes { links: u32::from(changed), ..Changes::default() }))
}

/// A link that is taken into a bridge carries the host's own packets no longer. `own` is the network's bridge.
fn refuse_used(
    link: &LinkState,
    physical: &str,
    underlay: &Underlay,
    addressed: &[u32],
    own: Option<u32>,
) -> Result<(), NetworkError> {
    let reason = if link.name == underlay.link {
        "it is the underlay; use another link, or a VLAN"
    } else if addressed.contains(&link.index) {
        "it has addresses of the host; take them off, or use a VLAN"
    } else if link.bridge.is_some() && link.bridge != own {
        "it is a port of another bridge or bond; use another link"
    } else {
        return Ok(());
    };
    Err(NetworkError::LinkTaken {
        physical: physical.to_owned(),
        link: link.name.clone(),
        reason: reason.to_owned(),
    })
}

fn ensure_vlan(
    conversation: &mut Conversation,
    wanted: &NetworkWanted,
    parent: &LinkState,
    tag: u16,
) -> Result<(LinkState, bool), NetworkError> {
    let name = vxlan_name(wanted.vni);
    match links::find(conversation, &name)? {
        Some(link) if link.is_vlan(parent.index, tag) => {
            if link.mtu == wanted.mtu {
                return Ok((link, false));
            }
            links::set_mtu(conversation, &link, wanted.mtu)?;
            return Ok((link, true));
        }
        Some(link) => links::remove(conversation, &link)?,
        None => {}
    }
    let info = vec![LinkInfo::Kind(InfoKind::Vlan), LinkInfo::Data(InfoData::Vlan(vec![InfoVlan::Id(tag)]))];
    let attributes = vec![
        LinkAttribute::Link(parent.index),
        LinkAttribute::Mtu(wanted.mtu),
        LinkAttribute::LinkInfo(info),
    ];
    let link = links::create(conversation, &name, attributes).map_err(|error| match error {
        NetworkError::Kernel { source, .. } if source.is(&[libc::EOPNOTSUPP, libc::ENODEV]) => {
            NetworkError::NoVlans { source }
        }
        other => other,
    })?;
    links::isolate(&name, wanted.vni)?;
    Ok((link, true))
}
