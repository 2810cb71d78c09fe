//! Reservations: exactly what an instance holds on a host. A placement is an answer; this is the fact.

use crate::id::InstanceId;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// A plan to hold: exact cells, CPUs and pages, and what the plan was made from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReservePlan {
    /// What to hold.
    pub reservation: Reservation,
    /// Generation of the host's report that the plan was made from. A host whose cells have changed since refuses.
    pub generation: u64,
    /// Hold it beside what the instance holds here already, until [`crate::request::AgentRequest::Exchange`] says
    /// which of the two it runs by.
    #[serde(default)]
    pub beside: bool,
}

/// Why a host does not hold what it is asked to. The coordinator decides by this.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "rule")]
pub enum Refusal {
    /// Its cells are not those that the plan was made from; its newest report tells them.
    Stale {
        /// The plan's generation.
        planned: u64,
        /// The first generation with the cells as they are; none: no report tells them yet.
        changed: Option<u64>,
    },
    /// It has no such cell.
    NoCell {
        /// The cell.
        cell: u32,
    },
    /// The CPU is not online, or not in the cell that should have it.
    NoCpu {
        /// The CPU.
        cpu: u32,
    },
    /// The CPU is not for pinning.
    NotDedicated {
        /// The CPU.
        cpu: u32,
    },
    /// Another instance has the CPU for itself.
    CpuTaken {
        /// The CPU.
        cpu: u32,
        /// Who has it.
        holder: InstanceId,
    },
    /// Too many floating vCPUs.
    SharedCpus {
        /// vCPUs there would be.
        need: u64,
        /// vCPUs there may be.
        have: u64,
    },
    /// The cell has no pages of that size.
    NoPageSize {
        /// The cell.
        cell: u32,
        /// In KiB.
        size_kib: u64,
    },
    /// Too few pages are free.
    Pages {
        /// The cell.
        cell: u32,
        /// In KiB.
        size_kib: u64,
        /// Pages needed.
        need: u64,
        /// Pages free.
        have: u64,
    },
    /// Too little memory is free.
    Memory {
        /// The cell; none: the whole host.
        cell: Option<u32>,
        /// In bytes.
        need: u64,
        /// In bytes.
        have: u64,
    },
}

/// Something of a running instance that is not where its reservation says.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Drift {
    /// Whose.
    pub instance: InstanceId,
    /// What is elsewhere.
    pub aspect: Aspect,
    /// Where it should be, such as `CPUs 2-3`.
    pub wanted: String,
    /// Where it is.
    pub found: String,
}

/// What can be elsewhere than a reservation says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum Aspect {
    /// What the hypervisor was told of a vCPU's CPUs.
    VcpuPin {
        /// The vCPU.
        vcpu: u32,
    },
    /// What the kernel lets a vCPU's thread run on.
    VcpuThread {
        /// The vCPU.
        vcpu: u32,
    },
    /// What the kernel lets the emulator's main thread run on.
    EmulatorThread,
    /// Guest memory that is bound elsewhere, or not at all.
    Memory {
        /// The host's cell that should have it.
        cell: u32,
    },
    /// Huge pages that others have taken from under a reservation whose guest does not run.
    HugePages {
        /// The host's cell that should have them.
        cell: u32,
    },
    /// The instance runs and holds nothing.
    Unreserved,
    /// The host holds something else for the instance than the coordinator knows.
    Reservation,
}

impl Aspect {
    /// Its name in metrics and the API.
    pub fn name(self) -> &'static str {
        match self {
            Self::VcpuPin { .. } => "vcpu_pin",
            Self::VcpuThread { .. } => "vcpu_thread",
            Self::EmulatorThread => "emulator_thread",
            Self::Memory { .. } => "memory",
            Self::HugePages { .. } => "huge_pages",
            Self::Unreserved => "unreserved",
            Self::Reservation => "reservation",
        }
    }
}

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
