//! An overlay in memory, for fleets that run in one process.

use super::{Changes, HostNetwork, NetworkError, check};
use godwit_protocol::host::{Link, PhysicalNetwork, Underlay};
use godwit_protocol::network::{Carrier, NetworkReported, NetworkWanted};
use godwit_protocol::port::Mac;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// A host's overlay that refuses and counts as the kernel's does, and carries nothing.
#[derive(Debug)]
pub struct FakeNetwork {
    underlay: Underlay,
    links: Vec<Link>,
    networks: Mutex<BTreeMap<u32, NetworkWanted>>,
}

impl FakeNetwork {
    /// A host with these links and this underlay, and no network.
    pub fn new(underlay: Underlay, links: Vec<Link>) -> Self {
        Self { underlay, links, networks: Mutex::default() }
    }

    fn networks(&self) -> MutexGuard<'_, BTreeMap<u32, NetworkWanted>> {
        self.networks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl HostNetwork for FakeNetwork {
    fn ensure(&self, wanted: &NetworkWanted) -> Result<Changes, NetworkError> {
        check(wanted, &self.underlay)?;
        if let Carrier::Flat(physical) | Carrier::Vlan(physical, _) = &wanted.carrier {
            return Err(NetworkError::NoPhysical { physical: physical.clone() });
        }
        let before = self.networks().insert(wanted.vni, wanted.clone());
        Ok(changes(before.as_ref(), wanted))
    }

    fn remove(&self, vni: u32) -> Result<bool, NetworkError> {
        Ok(self.networks().remove(&vni).is_some())
    }

    fn observe(&self) -> Result<Vec<NetworkReported>, NetworkError> {
        let networks = self.networks();
        let reported = networks.values().map(|wanted| {
            let mut forwarding: Vec<_> =
                wanted.forwarding.iter().map(|entry| (entry.mac, entry.vtep)).collect();
            forwarding.sort_unstable();
            let mut flood = wanted.flood.clone();
            flood.sort_unstable();
            flood.dedup();
            let group_ttl = wanted.carrier.group_ttl();
            NetworkReported { vni: wanted.vni, generation: None, forwarding, flood, group_ttl }
        });
        Ok(reported.collect())
    }

    fn links(&self) -> Result<Vec<Link>, NetworkError> {
        Ok(self.links.clone())
    }

    fn underlay(&self) -> Result<Underlay, NetworkError> {
        Ok(self.underlay.clone())
    }

    fn physical_networks(&self) -> Result<Vec<PhysicalNetwork>, NetworkError> {
        Ok(Vec::new())
    }
}

/// What the kernel would have had to change. Ports are put on their bridge by who makes them.
fn changes(before: Option<&NetworkWanted>, wanted: &NetworkWanted) -> Changes {
    // A VXLAN device with another port is another one, without any entry.
    let kept = before.filter(|before| before.udp_port == wanted.udp_port);
    let entries = |network: Option<&NetworkWanted>| -> BTreeMap<Mac, IpAddr> {
        let entries = network.into_iter().flat_map(|network| &network.forwarding);
        entries.map(|entry| (entry.mac, entry.vtep)).collect()
    };
    // The entry of a group is the kernel's own.
    let flood = |network: Option<&NetworkWanted>| -> BTreeSet<IpAddr> {
        let replicated = network.filter(|network| network.carrier == Carrier::Vxlan);
        replicated.into_iter().flat_map(|network| network.flood.iter().copied()).collect()
    };
    let (old, new) = (entries(kept), entries(Some(wanted)));
    let set = new.iter().filter(|(mac, vtep)| old.get(mac) != Some(vtep)).count();
    let gone = old.keys().filter(|mac| !new.contains_key(mac)).count();
    let flood_changes = flood(kept).symmetric_difference(&flood(Some(wanted))).count();
    let links = match before {
        Some(before) if before.mtu == wanted.mtu => {
            u32::from(kept.is_none_or(|kept| kept.carrier != wanted.carrier))
        }
        _ => 2,
    };
    Changes { links, forwarding: (set + gone) as u32, flood: flood_changes as u32, ports: 0 }
}
