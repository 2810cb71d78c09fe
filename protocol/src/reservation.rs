//! Reservations: exactly what an instance holds on a host. A placement is an answer; this is the fact.

use crate::id::InstanceId;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// What one instance holds on one host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reservation {
    /// Whose.
    pub instance: InstanceId,
    /// vCPUs in all.
    pub vcpus: u32,
    /// Memory in bytes in all.
    pub memory_bytes: u64,
    /// Guest cells. Empty: the guest has no NUMA topology; it floats over all shared CPUs and takes memory from
    /// wherever there is some.
    pub cells: Vec<ReservedCell>,
    /// CPUs for the emulator's threads, when it has its own.
    pub emulator_cpus: Vec<u32>,
    /// CPUs that nothing may run on, because a sibling is pinned to a vCPU that wants its core alone.
    #[serde(default)]
    pub idle_cpus: Vec<u32>,
}

/// What one guest cell holds of one host cell.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReservedCell {
    /// The guest's cell, counted from 0.
    pub guest: u32,
    /// The host's cell.
    pub host: u32,
    /// vCPUs of this guest cell that float over the host cell's shared CPUs.
    pub shared_vcpus: Vec<u32>,
    /// Pinned vCPUs: vCPU to host CPU.
    pub pinning: BTreeMap<u32, u32>,
    /// In bytes.
    pub memory_bytes: u64,
    /// Page size in KiB, when the instance asked for one.
    pub page_size_kib: Option<u64>,
}

impl Reservation {
    /// All host CPUs that this reservation has for itself.
    pub fn pinned_cpus(&self) -> impl Iterator<Item = u32> + '_ {
        let pins = self.cells.iter().flat_map(|cell| cell.pinning.values());
        pins.chain(&self.emulator_cpus).chain(&self.idle_cpus).copied()
    }
}
