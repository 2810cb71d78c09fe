//! The overlay by the kernel's own bridge and VXLAN, set by netlink.

mod forwarding;
mod host;
mod links;
mod message;
mod neighbours;
mod provided;
mod socket;
mod tap;
#[cfg(test)]
mod tests;

pub use socket::KernelError;

use super::{Changes, HostNetwork, NetworkError, check};
use forwarding::Entries;
use godwit_protocol::host::{Link, PhysicalNetwork, Underlay};
use godwit_protocol::network::{
    Carrier, FIRST_PROVIDED, NetworkReported, NetworkWanted, bridge_name, vxlan_name,
};
use godwit_protocol::port::tap_name;
use links::LinkState;
use socket::Conversation;
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The kernel's bridges and VXLAN devices in the network namespace in which it was made.
pub struct Netlink {
    underlay_link: String,
    underlay_address: IpAddr,
    /// Links of the host by the name of their physical network.
    physical: BTreeMap<String, String>,
    stands_in: bool,
    /// For orders.
    conversation: Mutex<Conversation>,
    /// For looks at all that there is, which no order waits for.
    looks: Mutex<Conversation>,
}

/// What the configuration says of the underlay; what it leaves out is found by the routing table.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UnderlayChoice {
    /// The link that VXLAN packets leave by.
    pub link: Option<String>,
    /// The host's VTEP address.
    pub address: Option<IpAddr>,
    /// Where the coordinator is: the underlay is the way to it, or else the default route.
    pub towards: Option<IpAddr>,
}

impl Netlink {
    /// The overlay over the chosen underlay.
    ///
    /// # Errors
    /// The kernel offers no netlink socket, or neither the choice nor the routing table tells the underlay.
    pub fn open(choice: &UnderlayChoice) -> Result<Self, NetworkError> {
        let open = || Conversation::open().map_err(|error| kernel("be asked by netlink", error));
        let mut conversation = open()?;
        let (underlay_link, underlay_address) = choose(&mut conversation, choice)?;
        let (conversation, looks) = (Mutex::new(conversation), Mutex::new(open()?));
        let physical = BTreeMap::new();
        Ok(Self { underlay_link, underlay_address, physical, stands_in: false, conversation, looks })
    }

    /// The same with links for flat and VLAN networks, by the name of their physical network.
    #[must_use]
    pub fn with_physical(mut self, physical: BTreeMap<String, String>) -> Self {
        self.physical = physical;
        self
    }

    /// The same, which stands in for the programs that this kernel does not take: the bridge answers questions for
    /// known neighbours, and unknown unicast does not leave where the policy is to drop it.
    #[must_use]
    pub fn standing_in(self) -> Self {
        Self { stands_in: true, ..self }
    }

    /// Refuses what [`HostNetwork::ensure`] would refuse before it does anything.
    ///
    /// # Errors
    /// As there.
    pub fn check(&self, wanted: &NetworkWanted) -> Result<(), NetworkError> {
        let (_, underlay) = self.find_underlay(&mut self.conversation())?;
        check(wanted, &underlay)
    }

    fn conversation(&self) -> MutexGuard<'_, Conversation> {
        // A panic in between leaves at most half an answer unread, which the next request skips.
        self.conversation.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn looks(&self) -> MutexGuard<'_, Conversation> {
        self.looks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn find_underlay(&self, conversation: &mut Conversation) -> Result<(u32, Underlay), NetworkError> {
        let missing = || NetworkError::NoUnderlay { link: self.underlay_link.clone() };
        let link = links::find(conversation, &self.underlay_link)?.ok_or_else(missing)?;
        let underlay = Underlay { link: link.name, address: self.underlay_address, mtu: link.mtu };
        Ok((link.index, underlay))
    }
}

impl HostNetwork for Netlink {
    fn ensure(&self, wanted: &NetworkWanted) -> Result<Changes, NetworkError> {
        let conversation = &mut *self.conversation();
        let (underlay_index, underlay) = self.find_underlay(conversation)?;
        check(wanted, &underlay)?;
        let (bridge, mut changes) = if wanted.carrier.is_vxlan() {
            ensure_overlay(conversation, wanted, &underlay, underlay_index, self.stands_in)?
        } else {
            let addressed = host::addressed(conversation)?;
            provided::ensure(conversation, wanted, &self.physical, &underlay, &addressed)?
        };
        for port in &wanted.ports {
            // A tap that is not there yet is put on the bridge by who makes it.
            if let Some(tap) = links::find(conversation, &tap_name(port.port))? {
                changes.ports += u32::from(links::ensure_port(conversation, &tap, &bridge)?);
            }
        }
        if !changes.is_empty() {
            tracing::info!(vni = wanted.vni, generation = wanted.generation, ?changes, "network set up");
        }
        Ok(changes)
    }

    fn remove(&self, vni: u32) -> Result<bool, NetworkError> {
        let conversation = &mut *self.conversation();
        let mut found = false;
        for name in [vxlan_name(vni), bridge_name(vni)] {
            if let Some(link) = links::find(conversation, &name)? {
                links::remove(conversation, &link)?;
                found = true;
            }
        }
        if found {
            tracing::info!(vni, "network removed");
        }
        Ok(found)
    }

    fn make_taps(&self, wanted: &NetworkWanted, taps: &BTreeSet<String>) -> Result<(), NetworkError> {
        let conversation = &mut *self.conversation();
        for name in wanted.ports.iter().map(|port| tap_name(port.port)).filter(|name| taps.contains(name)) {
            if links::find(conversation, &name)?.is_some() {
                continue;
            }
            tap::make(&name)?;
            links::isolate(&name, wanted.vni)?;
            if let Some(link) = links::find(conversation, &name)? {
                links::set_mtu(conversation, &link, wanted.mtu)?;
            }
        }
        Ok(())
    }

    fn open_taps(&self, taps: &BTreeSet<String>) -> Result<(), NetworkError> {
        let conversation = &mut *self.conversation();
        for name in taps {
            if let Some(link) = links::find(conversation, name)? {
                links::ensure_up(conversation, &link)?;
            }
        }
        Ok(())
    }

    fn unused_taps(&self) -> Result<BTreeSet<String>, NetworkError> {
        let links = links::collect(&mut self.looks())?;
        Ok(links.into_iter().filter(LinkState::is_unused_tap).map(|link| link.name).collect())
    }

    fn discard_taps(&self, taps: &BTreeSet<String>) -> Result<(), NetworkError> {
        let conversation = &mut *self.conversation();
        for name in taps {
            if let Some(link) = links::find(conversation, name)?.filter(LinkState::is_unused_tap) {
                links::remove(conversation, &link)?;
                tracing::debug!(tap = link.name, "removed");
            }
        }
        Ok(())
    }

    fn observe(&self) -> Result<Vec<NetworkReported>, NetworkError> {
        let conversation = &mut *self.looks();
        let links = links::collect(conversation)?;
        let mut entries = forwarding::collect(conversation, None)
            .map_err(|error| kernel("list forwarding entries", error))?;
        let ours = links.iter().filter_map(|link| {
            let vni = link.vni().filter(|vni| link.name == vxlan_name(*vni))?;
            Some((vni, (entries.remove(&link.index).unwrap_or_default(), link.group_ttl())))
        });
        let mut networks: BTreeMap<u32, (Entries, Option<u8>)> = ours.collect();
        let bridges = links.iter().filter_map(|link| link.name.strip_prefix("gwb")?.parse().ok());
        networks.extend(bridges.filter(|n| *n >= FIRST_PROVIDED).map(|n| (n, Default::default())));
        let reported = networks.into_iter().map(|(vni, (entries, group_ttl))| NetworkReported {
            vni,
            generation: None,
            forwarding: entries.vteps.into_iter().collect(),
            flood: entries.flood.into_iter().collect(),
            group_ttl,
        });
        Ok(reported.collect())
    }

    fn links(&self) -> Result<Vec<Link>, NetworkError> {
        host::collect_links(&mut self.looks(), Path::new("/sys"))
    }

    fn underlay(&self) -> Result<Underlay, NetworkError> {
        self.find_underlay(&mut self.looks()).map(|(_, underlay)| underlay)
    }

    fn physical_networks(&self) -> Result<Vec<PhysicalNetwork>, NetworkError> {
        let conversation = &mut *self.looks();
        let mut found = Vec::new();
        for (name, link) in &self.physical {
            if let Some(state) = links::find(conversation, link)? {
                found.push(PhysicalNetwork { name: name.clone(), link: link.clone(), mtu: state.mtu });
            }
        }
        Ok(found)
    }
}

/// Bridge, VXLAN device and entries of an overlay network.
fn ensure_overlay(
    conversation: &mut Conversation,
    wanted: &NetworkWanted,
    underlay: &Underlay,
    underlay_index: u32,
    stands_in: bool,
) -> Result<(LinkState, Changes), NetworkError> {
    let mut changes = Changes::default();
    let (bridge, mut bridge_changed) = links::ensure_bridge(conversation, wanted)?;
    let (vxlan, mut vxlan_changed) =
        links::ensure_vxlan(conversation, wanted, underlay, underlay_index, &bridge, stands_in)?;
    if stands_in {
        changes.forwarding += neighbours::ensure(conversation, bridge.index, wanted)?;
    }
    let entries = Entries {
        vteps: wanted.forwarding.iter().map(|entry| (entry.mac, entry.vtep)).collect(),
        bridged: wanted.forwarding.iter().map(|entry| entry.mac).collect(),
        flood: wanted.flood.iter().copied().collect(),
    };
    let out_of = matches!(wanted.carrier, Carrier::VxlanGroup { .. }).then_some(underlay_index);
    let (addresses, flood) = forwarding::ensure(conversation, vxlan.index, &entries, out_of)?;
    changes.forwarding += addresses;
    changes.flood = flood;
    // Only now may packets pass: every entry is there.
    vxlan_changed |= links::ensure_up(conversation, &vxlan)?;
    bridge_changed |= links::ensure_up(conversation, &bridge)?;
    changes.links = u32::from(bridge_changed) + u32::from(vxlan_changed);
    Ok((bridge, changes))
}

fn choose(
    conversation: &mut Conversation,
    choice: &UnderlayChoice,
) -> Result<(String, IpAddr), NetworkError> {
    let links = links::collect(conversation)?;
    let inventory = host::collect_links(conversation, Path::new("/sys"))?;
    let find = |name: &str| inventory.iter().find(|found| found.name == name);
    if let Some(link) = &choice.link {
        let address = match (find(link), choice.address) {
            (Some(found), address) => own_address(found, address)?,
            // It may come still.
            (None, Some(address)) => address,
            (None, None) => return Err(NetworkError::NoUnderlay { link: link.clone() }),
        };
        return Ok((link.clone(), address));
    }
    let no_route = || NetworkError::NoRoute { towards: choice.towards };
    // An address that the default route leads to, and nothing is sent: any that is not this network's own.
    let anywhere = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1));
    let (index, source) =
        host::route(conversation, choice.towards.unwrap_or(anywhere))?.ok_or_else(no_route)?;
    let link = links.into_iter().find(|link| link.index == index).ok_or_else(no_route)?;
    let address = match (find(&link.name), choice.address) {
        (Some(found), Some(_)) => own_address(found, choice.address)?,
        (_, address) => address.unwrap_or(source),
    };
    Ok((link.name, address))
}

/// The address of a link that is wanted, or its only one; IPv4 before IPv6.
fn own_address(link: &Link, wanted: Option<IpAddr>) -> Result<IpAddr, NetworkError> {
    let is_usable = |address: &IpAddr| match address {
        IpAddr::V4(_) => true,
        IpAddr::V6(address) => !address.is_unicast_link_local(),
    };
    let usable: Vec<IpAddr> = link.addresses.iter().copied().filter(is_usable).collect();
    let of_v4 = usable.iter().any(IpAddr::is_ipv4);
    let candidates: Vec<IpAddr> = match wanted {
        Some(wanted) => usable.iter().copied().filter(|address| *address == wanted).collect(),
        None => usable.iter().copied().filter(|address| address.is_ipv4() == of_v4).collect(),
    };
    match candidates[..] {
        [address] => Ok(address),
        _ => {
            let have = usable.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
            Err(NetworkError::UnderlayAddress { link: link.name.clone(), have, wanted })
        }
    }
}

fn kernel(action: impl Into<String>, source: KernelError) -> NetworkError {
    NetworkError::Kernel { action: action.into(), source }
}
