//! The data plane of this host's ports: what the programs know, where they are, and what they have counted.

mod collector;
mod events;
#[cfg(test)]
mod tests;

pub use collector::PlaneCollector;
pub use events::EventReader;

use super::ports::Ports;
use super::shared::{Capacity, Version};
use super::tables::{Tables, told};
use super::taps::each_present;
use super::vxlan::{Cost, VxlanTelemetry};
use super::{TelemetryError, monotonic_ns, pins::Pins};
use godwit_ebpf_common::tables::{Account, AccountKey, Lost};
use godwit_protocol::network::NetworkWanted;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The programs on the ports of this host, and the tables that all programs share.
///
/// Dropping it leaves everything in its place: guests go on as they were, and the next agent takes it over.
pub struct DataPlane {
    bpffs: PathBuf,
    capacity: Capacity,
    inner: Mutex<Inner>,
    /// Entries that had no room.
    full: AtomicU64,
    failed: AtomicU64,
}

struct Inner {
    tables: Tables,
    ports: Ports,
}

/// How far the maps are filled, and what does not fit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Filling {
    /// Entries by the map's name in agent.toml.
    pub entries: [(&'static str, usize); 5],
    /// Networks of which some entry has no room.
    pub incomplete: usize,
    /// Ports of which something has no room.
    pub refused: usize,
}

impl DataPlane {
    /// Loads the programs for ports, with everything pinned under `<bpffs>/godwit`. What an agent before has left there
    /// goes on until [`Self::adopt`].
    ///
    /// # Errors
    /// There is no BPF file system, or the kernel refuses; what was there before goes on.
    pub fn open(bpffs: &Path, capacity: Capacity) -> Result<Self, TelemetryError> {
        Self::open_version(bpffs, capacity, &Version::OURS)
    }

    fn open_version(bpffs: &Path, capacity: Capacity, version: &Version) -> Result<Self, TelemetryError> {
        let ports = Ports::open(bpffs, &capacity, version)?;
        let tables = Tables::open(&Pins::open(bpffs)?)?;
        let inner = Mutex::new(Inner { tables, ports });
        Ok(Self {
            bpffs: bpffs.to_owned(),
            capacity,
            inner,
            full: AtomicU64::new(0),
            failed: AtomicU64::new(0),
        })
    }

    /// Takes over from an earlier agent: puts the programs in the place of those that it has attached, those of the
    /// underlay too, without a packet in between, and adds what it has counted in maps of another layout. To be called
    /// when the networks are wanted again: till then the programs know nothing of them if the layout has changed.
    ///
    /// # Errors
    /// The kernel refuses; what the earlier agent has attached goes on.
    pub fn adopt(&self, underlay: Option<&mut VxlanTelemetry>) -> Result<(), TelemetryError> {
        let mut inner = self.inner();
        inner.ports.adopt()?;
        if let Some(underlay) = underlay {
            underlay.adopt()?;
        }
        // Both count in it.
        inner.ports.carry()
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        // A panic in between leaves maps and memory as they were before or after one entry.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Brings the programs' knowledge of a network to the wanted state, and sets up its ports whose taps are there.
    ///
    /// # Errors
    /// The kernel refuses an entry or a program; the others are as wanted.
    pub fn ensure(&self, wanted: &NetworkWanted) -> Result<(), TelemetryError> {
        let mut inner = self.inner();
        let told = told(wanted, inner.tables.get(wanted.vni), true, monotonic_ns());
        let full = inner.tables.set(wanted.vni, told)?;
        if full > 0 {
            self.full.fetch_add(full, Ordering::Relaxed);
            tracing::error!(
                vni = wanted.vni,
                entries = full,
                "the maps have no room for all of a network: its unknown unicast is flooded; raise `capacity` in \
                 agent.toml"
            );
        }
        inner.ports.want(wanted.vni, &wanted.ports);
        // Of this network only: a move must not wait for a look at a thousand taps.
        inner.ports.set_up_network(wanted.vni)
    }

    /// Looks at a network's taps again, because some of them have come.
    ///
    /// # Errors
    /// The kernel refuses an entry or a program; the others are as wanted.
    pub fn set_up(&self, vni: u32) -> Result<(), TelemetryError> {
        self.inner().ports.set_up_network(vni)
    }

    /// Forgets a network, with its counts.
    ///
    /// # Errors
    /// The kernel does not let the maps be changed.
    pub fn remove(&self, vni: u32) -> Result<(), TelemetryError> {
        let mut inner = self.inner();
        inner.ports.want(vni, &[]);
        inner.tables.remove(vni, monotonic_ns())?;
        inner.ports.forget(vni)?;
        inner.ports.forget_gone()?;
        super::vxlan::forget_traffic(&self.bpffs, vni)
    }

    /// Looks at the taps again, because links have come or gone, and forgets who has left long ago.
    pub fn refresh(&self) {
        // Tap by tap: a move waits for one of them, not for a thousand.
        let taps = self.inner().ports.taps();
        let set_up = each_present(taps, |tap, index, ()| self.inner().ports.set_up_tap(tap, index));
        let mut inner = self.inner();
        let forgotten =
            inner.ports.forget_gone().and_then(|()| self.forget_departed(&mut inner, monotonic_ns()));
        if let Err(error) = set_up.and(forgotten) {
            self.failed.fetch_add(1, Ordering::Relaxed);
            tracing::error!(
                error = &error as &dyn std::error::Error,
                "a tap's programs are not in their places"
            );
        }
    }

    fn forget_departed(&self, inner: &mut Inner, now_ns: u64) -> Result<(), TelemetryError> {
        let over = inner.tables.forget_departed(now_ns)?;
        over.into_iter().try_for_each(|vni| super::vxlan::forget_stale(&self.bpffs, vni))
    }

    /// All accounts, summed over CPUs.
    ///
    /// # Errors
    /// The kernel does not let the map be read.
    pub fn read(&self) -> Result<BTreeMap<AccountKey, Account>, TelemetryError> {
        self.inner().ports.read()
    }

    /// What the programs could not write, for each kind.
    ///
    /// # Errors
    /// The kernel does not let the map be read.
    pub fn read_lost(&self) -> Result<[(Lost, u64); Lost::ALL.len()], TelemetryError> {
        self.inner().ports.read_lost()
    }

    /// What each program costs.
    ///
    /// # Errors
    /// The kernel does not tell.
    pub fn read_cost(&self) -> Result<[Cost; 2], TelemetryError> {
        self.inner().ports.read_cost()
    }

    /// Taps that have their programs, and taps that lack one.
    pub fn attached(&self) -> (usize, usize) {
        self.inner().ports.attached()
    }

    /// How far the maps are filled.
    pub fn filling(&self) -> Filling {
        let inner = self.inner();
        let [networks, stations, neighbours] = inner.tables.sizes();
        let [ports, allowed] = inner.ports.sizes();
        Filling {
            entries: [
                ("networks", networks),
                ("stations", stations),
                ("neighbours", neighbours),
                ("ports", ports),
                ("allowed", allowed),
            ],
            incomplete: inner.tables.incomplete(),
            refused: inner.ports.refused(),
        }
    }
}
