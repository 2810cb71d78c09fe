//! Keeps the host's networks as they are wanted: remembers what is, and repairs what somebody has changed by hand.

use super::wanted::WantedNetworks;
use super::{Changes, HostNetwork, NetworkError};
use crate::state::StateError;
use godwit_protocol::error::{ErrorKind, RequestError};
use godwit_protocol::network::{NetworkReported, NetworkWanted};
use godwit_protocol::port::tap_name;
use prometheus::{IntCounterVec, Opts, Registry};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The one who changes the host's networks.
pub struct Keeper {
    network: Arc<dyn HostNetwork>,
    wanted: Arc<WantedNetworks>,
    repairs: IntCounterVec,
    /// One changes them at a time: what is repaired is what is wanted then.
    turn: Mutex<()>,
}

impl Keeper {
    /// Of this host's networks.
    ///
    /// # Errors
    /// When `registry` holds such metrics already.
    pub fn new(
        network: Arc<dyn HostNetwork>,
        wanted: Arc<WantedNetworks>,
        registry: &Registry,
    ) -> Result<Self, prometheus::Error> {
        let repairs = IntCounterVec::new(
            Opts::new(
                "godwit_network_repairs_total",
                "What somebody else had changed of the networks and was put right, by kind.",
            ),
            &["kind"],
        )?;
        for kind in ["links", "forwarding", "flood", "ports"] {
            repairs.with_label_values(&[kind]);
        }
        registry.register(Box::new(repairs.clone()))?;
        Ok(Self { network, wanted, repairs, turn: Mutex::new(()) })
    }

    /// Brings a network to the wanted state and keeps it there.
    ///
    /// # Errors
    /// See [`HostNetwork::ensure`]; or it cannot be remembered.
    pub fn ensure(&self, wanted: &NetworkWanted) -> Result<Changes, RequestError> {
        let _turn = self.turn();
        let before = self.wanted.get(wanted.vni);
        self.wanted.keep(wanted).map_err(not_kept)?;
        let changes = self.network.ensure(wanted)?;
        let own: BTreeSet<String> = ports(wanted).collect();
        // Of this network only: no order looks at all links of the host.
        self.discard(before.iter().flat_map(ports).filter(|tap| !own.contains(tap)).collect());
        Ok(changes)
    }

    /// Has the taps that a guest is about to open in their networks, with all that applies to them in its place.
    ///
    /// # Errors
    /// See [`HostNetwork::ensure`]; or no network has such a port.
    pub fn open_taps(&self, taps: &BTreeSet<String>) -> Result<(), RequestError> {
        let _turn = self.turn();
        let mut unknown = taps.clone();
        for wanted in self.wanted.all() {
            let own: BTreeSet<String> = ports(&wanted).filter(|tap| taps.contains(tap)).collect();
            unknown.retain(|tap| !own.contains(tap));
            if own.is_empty() {
                continue;
            }
            self.network.make_taps(&wanted, &own)?;
            self.network.ensure(&wanted)?;
            self.network.open_taps(&own)?;
        }
        match unknown.pop_first() {
            Some(tap) => Err(NetworkError::UnknownTap { tap }.into()),
            None => Ok(()),
        }
    }

    /// Removes those of these taps that are no wanted port's. While QEMU has one open it stays, until the next look.
    fn discard(&self, mut taps: BTreeSet<String>) {
        if taps.is_empty() {
            return;
        }
        let wanted = self.wanted.taps();
        taps.retain(|tap| !wanted.contains(tap));
        if let Err(error) = self.network.discard_taps(&taps) {
            tracing::error!("a tap is left: {}", godwit_protocol::error::chain(&error));
        }
    }

    /// Takes a network off this host for good.
    ///
    /// # Errors
    /// See [`HostNetwork::remove`]; or it cannot be forgotten.
    pub fn remove(&self, vni: u32) -> Result<bool, RequestError> {
        let _turn = self.turn();
        let before = self.wanted.get(vni);
        self.wanted.forget(vni).map_err(not_kept)?;
        let found = self.network.remove(vni)?;
        self.discard(before.iter().flat_map(ports).collect());
        Ok(found)
    }

    /// Brings everything to what was wanted last, as an agent that starts must.
    pub fn restore(&self) {
        let _turn = self.turn();
        for wanted in self.wanted.all() {
            if let Err(error) = self.network.ensure(&wanted) {
                tracing::error!(
                    vni = wanted.vni,
                    "a network is not as wanted: {}",
                    godwit_protocol::error::chain(&error)
                );
            }
        }
    }

    /// Looks at what the kernel has, and repairs what differs from what is wanted. Orders need not wait for the look,
    /// only for a repair.
    pub fn check(&self) {
        self.network.refresh();
        match self.network.unused_taps() {
            Ok(unused) => {
                // A tap that is wanted meanwhile must be known to be.
                let _turn = self.turn();
                self.discard(unused);
            }
            Err(error) => {
                tracing::error!("taps are not looked at: {}", godwit_protocol::error::chain(&error))
            }
        }
        let found = match self.network.observe() {
            Ok(found) => found,
            Err(error) => {
                return tracing::error!(
                    "networks are not looked at: {}",
                    godwit_protocol::error::chain(&error)
                );
            }
        };
        let found: BTreeMap<u32, NetworkReported> = found.into_iter().map(|n| (n.vni, n)).collect();
        let differs =
            |wanted: &NetworkWanted| !found.get(&wanted.vni).is_some_and(|found| agrees(wanted, found));
        for vni in self.wanted.all().iter().filter(|wanted| differs(wanted)).map(|wanted| wanted.vni) {
            let _turn = self.turn();
            // It may have become another since, or none.
            let Some(wanted) = self.wanted.get(vni) else { continue };
            match self.network.ensure(&wanted) {
                Ok(changes) => self.count(vni, changes),
                Err(error) => {
                    let error = godwit_protocol::error::chain(&error);
                    tracing::error!(vni, "a network cannot be repaired: {error}");
                }
            }
        }
    }

    fn count(&self, vni: u32, changes: Changes) {
        let Changes { links, forwarding, flood, ports } = changes;
        if changes.is_empty() {
            return;
        }
        tracing::warn!(vni, ?changes, "a network was not as wanted, and is again");
        for (kind, count) in
            [("links", links), ("forwarding", forwarding), ("flood", flood), ("ports", ports)]
        {
            self.repairs.with_label_values(&[kind]).inc_by(count.into());
        }
    }

    /// What the kernel has, with the generation of what was wanted last.
    ///
    /// # Errors
    /// The kernel does not tell.
    pub fn report(&self) -> Result<Vec<NetworkReported>, NetworkError> {
        let mut found = self.network.observe()?;
        for network in &mut found {
            network.generation = self.wanted.generation(network.vni);
        }
        Ok(found)
    }

    fn turn(&self) -> MutexGuard<'_, ()> {
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The taps of a network's ports.
fn ports(wanted: &NetworkWanted) -> impl Iterator<Item = String> {
    wanted.ports.iter().map(|port| tap_name(port.port))
}

fn agrees(wanted: &NetworkWanted, found: &NetworkReported) -> bool {
    let forwarding: BTreeSet<_> = wanted.forwarding.iter().map(|f| (f.mac, f.vtep)).collect();
    let flood: BTreeSet<_> = wanted.flood.iter().copied().collect();
    forwarding == found.forwarding.iter().copied().collect()
        && flood == found.flood.iter().copied().collect()
        && wanted.carrier.group_ttl() == found.group_ttl
}

fn not_kept(error: StateError) -> RequestError {
    RequestError::new(ErrorKind::Unavailable, godwit_protocol::error::chain(&error))
}
