//! The overlay of a host whose kernel takes our programs: its links, and what its ports do.

use super::netlink::Netlink;
use super::{Changes, HostNetwork, NetworkError};
use crate::telemetry::plane::DataPlane;
use godwit_protocol::host::{Link, PhysicalNetwork, Underlay};
use godwit_protocol::network::{NetworkReported, NetworkWanted};
use std::collections::BTreeSet;
use std::sync::Arc;

/// Links by netlink, ports by eBPF.
pub struct Overlay {
    links: Netlink,
    plane: Option<Arc<DataPlane>>,
}

impl Overlay {
    /// Links and programs together. Without programs the kernel's own means stand in for them.
    pub fn new(links: Netlink, plane: Option<Arc<DataPlane>>) -> Self {
        Self { links, plane }
    }
}

impl HostNetwork for Overlay {
    fn ensure(&self, wanted: &NetworkWanted) -> Result<Changes, NetworkError> {
        let Some(plane) = &self.plane else { return self.links.ensure(wanted) };
        // First, so that a network that is refused is not known to the programs.
        self.links.check(wanted)?;
        // Before the links, so that no port drops a packet for a station that the links know already.
        plane.ensure(wanted)?;
        let changes = self.links.ensure(wanted)?;
        if changes.ports > 0 {
            plane.set_up(wanted.vni)?;
        }
        Ok(changes)
    }

    fn remove(&self, vni: u32) -> Result<bool, NetworkError> {
        let found = self.links.remove(vni)?;
        if let Some(plane) = &self.plane {
            plane.remove(vni)?;
        }
        Ok(found)
    }

    fn make_taps(&self, wanted: &NetworkWanted, taps: &BTreeSet<String>) -> Result<(), NetworkError> {
        self.links.make_taps(wanted, taps)
    }

    fn open_taps(&self, taps: &BTreeSet<String>) -> Result<(), NetworkError> {
        self.links.open_taps(taps)
    }

    fn unused_taps(&self) -> Result<BTreeSet<String>, NetworkError> {
        self.links.unused_taps()
    }

    fn discard_taps(&self, taps: &BTreeSet<String>) -> Result<(), NetworkError> {
        self.links.discard_taps(taps)
    }

    fn refresh(&self) {
        if let Some(plane) = &self.plane {
            plane.refresh();
        }
    }

    fn observe(&self) -> Result<Vec<NetworkReported>, NetworkError> {
        self.links.observe()
    }

    fn links(&self) -> Result<Vec<Link>, NetworkError> {
        self.links.links()
    }

    fn physical_networks(&self) -> Result<Vec<PhysicalNetwork>, NetworkError> {
        self.links.physical_networks()
    }

    fn underlay(&self) -> Result<Underlay, NetworkError> {
        self.links.underlay()
    }
}
