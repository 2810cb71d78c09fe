//! Networks whose ports let pass what their security groups allow.

use super::{Changes, HostNetwork, NetworkError};
use crate::telemetry::filter::PortFilter;
use godwit_protocol::host::{Link, PhysicalNetwork, Underlay};
use godwit_protocol::network::{NetworkReported, NetworkWanted};
use std::collections::BTreeSet;
use std::sync::Arc;

/// A host's networks, and the filter of their ports.
pub struct Filtered<N> {
    networks: N,
    filter: Option<Arc<PortFilter>>,
}

impl<N: HostNetwork> Filtered<N> {
    /// Both together. Without a filter a network whose ports have rules is refused.
    pub fn new(networks: N, filter: Option<Arc<PortFilter>>) -> Self {
        Self { networks, filter }
    }
}

impl<N: HostNetwork> HostNetwork for Filtered<N> {
    fn ensure(&self, wanted: &NetworkWanted) -> Result<Changes, NetworkError> {
        match &self.filter {
            // Before the links, so that no port is on a bridge without its filter.
            Some(filter) => filter.ensure(wanted)?,
            None if wanted.ports.iter().any(|port| port.rules.is_some()) => {
                return Err(NetworkError::NoFilter { vni: wanted.vni });
            }
            None => {}
        }
        let changes = self.networks.ensure(wanted)?;
        if let Some(filter) = self.filter.as_ref().filter(|_| changes.ports > 0) {
            filter.set_up(wanted.vni)?;
        }
        Ok(changes)
    }

    fn remove(&self, vni: u32) -> Result<bool, NetworkError> {
        let found = self.networks.remove(vni)?;
        if let Some(filter) = &self.filter {
            filter.remove(vni)?;
        }
        Ok(found)
    }

    fn make_taps(&self, wanted: &NetworkWanted, taps: &BTreeSet<String>) -> Result<(), NetworkError> {
        self.networks.make_taps(wanted, taps)
    }

    fn open_taps(&self, taps: &BTreeSet<String>) -> Result<(), NetworkError> {
        self.networks.open_taps(taps)
    }

    fn unused_taps(&self) -> Result<BTreeSet<String>, NetworkError> {
        self.networks.unused_taps()
    }

    fn discard_taps(&self, taps: &BTreeSet<String>) -> Result<(), NetworkError> {
        self.networks.discard_taps(taps)
    }

    fn refresh(&self) {
        self.networks.refresh();
        if let Some(filter) = &self.filter {
            filter.refresh();
        }
    }

    fn observe(&self) -> Result<Vec<NetworkReported>, NetworkError> {
        self.networks.observe()
    }

    fn links(&self) -> Result<Vec<Link>, NetworkError> {
        self.networks.links()
    }

    fn underlay(&self) -> Result<Underlay, NetworkError> {
        self.networks.underlay()
    }

    fn physical_networks(&self) -> Result<Vec<PhysicalNetwork>, NetworkError> {
        self.networks.physical_networks()
    }
}
