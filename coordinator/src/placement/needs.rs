//! What a guest cell needs of a host cell, whatever its vCPUs are called: read once, and held against many.

use super::guest::{CpuPolicy, Guest, PageSize};
use super::pinning::Wanted;

/// The needs of one guest cell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Needs {
    /// vCPUs that float.
    pub(super) shared: u32,
    /// CPUs to itself.
    pub(super) wanted: Wanted,
    pub(super) memory_mib: u64,
    pub(super) page_size: Option<PageSize>,
    policy: Option<CpuPolicy>,
}

impl Needs {
    /// Of guest cell `index`.
    pub(super) fn of(guest: &Guest, index: usize) -> Self {
        let cell = &guest.cells[index];
        let (vcpus, emulator) = (cell.dedicated.len(), guest.emulator_cpus(index));
        Self {
            shared: cell.shared.len(),
            wanted: Wanted { vcpus, emulator, policy: cell.thread_policy },
            memory_mib: cell.memory_mib,
            page_size: cell.page_size,
            policy: cell.cpu_policy,
        }
    }

    /// Whether the policy can pin vCPUs.
    pub(super) fn pins(&self) -> bool {
        matches!(self.policy, Some(CpuPolicy::Dedicated | CpuPolicy::Mixed))
    }

    /// Whether the policy can float vCPUs.
    pub(super) fn floats(&self) -> bool {
        self.policy != Some(CpuPolicy::Dedicated)
    }
}
