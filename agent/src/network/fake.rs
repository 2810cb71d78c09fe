//! An overlay in memory, for fleets that run in one process.

use super::{Changes, HostNetwork, NetworkError, Orders, check};
use godwit_protocol::host::{Link, Underlay};
use godwit_protocol::id::NetworkId;
use godwit_protocol::network::{NetworkReported, NetworkWanted};
use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// A host's overlay that refuses and counts as the kernel's does, and carries nothing.
#[derive(Debug)]
pub struct FakeNetwork {
    underlay: Underlay,
    links: Vec<Link>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    orders: Orders,
    networks: BTreeMap<u32, NetworkWanted>,
}

impl FakeNetwork {
    /// A host with these links and this underlay, and no network.
    pub fn new(underlay: Underlay, links: Vec<Link>) -> Self {
        Self { underlay, links, state: Mutex::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl HostNetwork for FakeNetwork {
    fn ensure(&self, wanted: &NetworkWanted) -> Result<Changes, NetworkError> {
        check(wanted, &self.underlay)?;
        let mut state = self.state();
        if !state.orders.admit(wanted.network, wanted.vni, wanted.generation) {
            return Ok(Changes::default());
        }
        let before = state.networks.insert(wanted.vni, wanted.clone());
        Ok(changes(before.as_ref(), wanted))
    }

    fn remove(&self, network: NetworkId, vni: u32, generation: u64) -> Result<bool, NetworkError> {
        let mut state = self.state();
        let admitted = state.orders.admit(network, vni, generation);
        Ok(admitted && state.networks.remove(&vni).is_some())
    }

    fn observe(&self) -> Result<Vec<NetworkReported>, NetworkError> {
        let state = self.state();
        let reported = state.networks.values().map(|wanted| {
            let mut forwarding: Vec<_> =
                wanted.forwarding.iter().map(|entry| (entry.mac, entry.vtep)).collect();
            forwarding.sort_unstable();
            let mut flood = wanted.flood.clone();
            flood.sort_unstable();
            flood.dedup();
            NetworkReported { vni: wanted.vni, forwarding, flood }
        });
        Ok(reported.collect())
    }

    fn links(&self) -> Result<Vec<Link>, NetworkError> {
        Ok(self.links.clone())
    }

    fn underlay(&self) -> Result<Underlay, NetworkError> {
        Ok(self.underlay.clone())
    }
}

/// What the kernel would have had to change.
fn changes(before: Option<&NetworkWanted>, wanted: &NetworkWanted) -> Changes {
    let differing = |ours: usize, theirs: usize, common: usize| (ours + theirs - common * 2) as u32;
    let Some(before) = before else {
        return Changes {
            links: 2,
            forwarding: wanted.forwarding.len() as u32,
            flood: wanted.flood.len() as u32,
            ports: wanted.ports.len() as u32,
        };
    };
    let moved_or_new = wanted
        .forwarding
        .iter()
        .filter(|entry| !before.forwarding.iter().any(|old| old.mac == entry.mac && old.vtep == entry.vtep));
    let gone =
        before.forwarding.iter().filter(|old| !wanted.forwarding.iter().any(|entry| entry.mac == old.mac));
    let same_flood = wanted.flood.iter().filter(|vtep| before.flood.contains(vtep)).count();
    let new_ports = wanted.ports.iter().filter(|port| !before.ports.contains(port));
    Changes {
        links: u32::from(before.mtu != wanted.mtu) + u32::from(before.udp_port != wanted.udp_port),
        forwarding: (moved_or_new.count() + gone.count()) as u32,
        flood: differing(wanted.flood.len(), before.flood.len(), same_flood),
        ports: new_ports.count() as u32,
    }
}
