//! What became of entries of the filter's maps. Which connections had to make place for others no program sees: it is what
//! came without what was removed and what is there.

use super::ENTRIES_PIN;
use crate::telemetry::TelemetryError;
use crate::telemetry::pins::Pins;
use crate::telemetry::shared::{self, map_error};
use aya::maps::{MapData, MapError, PerCpuArray, PerCpuValues};
use aya::sys::SyscallError;
use godwit_ebpf_common::filter::{CONNECTIONS_MAP, ENTRIES_MAP, Entries};

/// The pinned counts. Of some the agent is the only writer.
pub(super) struct Census {
    map: PerCpuArray<MapData, u64>,
    /// While connections are in two tables nobody can tell how many had to go.
    pins: Pins,
}

impl Census {
    pub(super) fn open(pins: &Pins) -> Result<Self, TelemetryError> {
        Ok(Self { map: shared::open(pins, ENTRIES_PIN, ENTRIES_MAP)?, pins: pins.clone() })
    }

    /// Counts the connections that were there before anybody counted, once.
    pub(super) fn begin(&mut self, there: u64) -> Result<(), TelemetryError> {
        let is_begun = self.get(Entries::Opened)? > 0 || self.get(Entries::Carried)? > 0;
        if is_begun { Ok(()) } else { self.add(Entries::Carried, there) }
    }

    /// So many of a kind, over all CPUs.
    pub(super) fn get(&self, kind: Entries) -> Result<u64, TelemetryError> {
        let values = self.map.get(&(kind as u32), 0).map_err(|source| map_error(ENTRIES_MAP, source))?;
        Ok(values.iter().sum())
    }

    /// Adds to a kind that no program writes.
    pub(super) fn add(&mut self, kind: Entries, more: u64) -> Result<(), TelemetryError> {
        if more == 0 {
            return Ok(());
        }
        let failed = |source| map_error(ENTRIES_MAP, source);
        let mut values = self.map.get(&(kind as u32), 0).map_err(failed)?.to_vec();
        values[0] += more;
        let values = PerCpuValues::try_from(values).map_err(|io_error| {
            failed(MapError::SyscallError(SyscallError { call: "bpf_map_update_elem", io_error }))
        })?;
        self.map.set(kind as u32, values, 0).map_err(failed)
    }

    /// Connections that came, to be read before those that are there are counted.
    pub(super) fn came(&self) -> Result<u64, TelemetryError> {
        Ok(self.get(Entries::Opened)? + self.get(Entries::Carried)?)
    }

    /// Connections that had to make place for others, when so many had come and so many are there. What came or went
    /// meanwhile makes it too low rather than too high until the next look; it never falls.
    pub(super) fn evicted(&mut self, came: u64, there: u64) -> Result<u64, TelemetryError> {
        let told = self.get(Entries::Evicted)?;
        if !self.pins.asides(super::CONNECTIONS_PIN, CONNECTIONS_MAP)?.is_empty() {
            return Ok(told);
        }
        let removed = self.get(Entries::Closed)? + self.get(Entries::Forgotten)?;
        let evicted = came.saturating_sub(removed + there);
        self.add(Entries::Evicted, evicted.saturating_sub(told))?;
        Ok(evicted.max(told))
    }
}
