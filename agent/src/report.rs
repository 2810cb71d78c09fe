//! Reports: the whole state of the host, told when it differs from what was told last.

use crate::state::State;
use godwit_protocol::error::{ErrorKind, RequestError};
use godwit_protocol::host::{Cell, Heartbeat, Inventory};
use godwit_protocol::request::HostReport;
use sha2::{Digest, Sha256};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError};
use tokio::sync::{Mutex, Notify};

/// Free space of a pool is told anew when it moved by this much, in bytes.
const FREE_STEP_BYTES: u64 = 64 << 20;

/// Free inodes of a pool are told anew when they moved by this many.
const FREE_STEP_INODES: u64 = 4096;

/// Reads the host. It blocks. The generation it fills in is replaced.
pub type Collect = Arc<dyn Fn() -> Result<HostReport, RequestError> + Send + Sync>;

/// What was told of the host's cells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Told {
    /// Nothing since the agent started.
    Never,
    /// What they are, from this generation on.
    Since(u64),
    /// What they are not any more.
    Otherwise,
}

/// Makes reports, and knows the newest one's generation.
pub struct Reporter {
    state: Arc<State>,
    collect: Collect,
    newest: Mutex<Option<HostReport>>,
    generation: AtomicU64,
    inventory_digest: AtomicU64,
    cells: std::sync::Mutex<Option<(u64, Vec<Cell>)>>,
    changed: Notify,
}

impl Reporter {
    /// Reports of what `collect` reads.
    pub fn new(state: Arc<State>, collect: Collect) -> Self {
        Self {
            state,
            collect,
            newest: Mutex::default(),
            generation: AtomicU64::new(0),
            inventory_digest: AtomicU64::new(0),
            cells: std::sync::Mutex::default(),
            changed: Notify::new(),
        }
    }

    /// Something on the host may have changed. Calls from any thread; many of them are one.
    pub fn mark_changed(&self) {
        self.changed.notify_one();
    }

    /// Waits for [`Self::mark_changed`], also for one that came before.
    pub async fn wait_changed(&self) {
        self.changed.notified().await;
    }

    /// Reads the host. The report has a new generation when it differs from the newest one or `always` is set; else
    /// there is none.
    ///
    /// # Errors
    /// [`ErrorKind::Unavailable`] while the host cannot be read whole: no report is better than one that leaves
    /// running guests out.
    pub async fn next(&self, always: bool) -> Result<Option<HostReport>, RequestError> {
        // Held from the reading to the generation: a report with a higher generation was read later.
        let mut newest = self.newest.lock().await;
        let collect = self.collect.clone();
        let internal = |e: &dyn std::error::Error| RequestError::new(ErrorKind::Internal, e.to_string());
        let mut report = tokio::task::spawn_blocking(move || collect()).await.map_err(|e| internal(&e))??;
        if let Some(newest) = newest.as_ref().filter(|_| !always) {
            report.generation = newest.generation;
            if without_noise(&report) == without_noise(newest) {
                return Ok(None);
            }
        }
        let unavailable = |e| RequestError::new(ErrorKind::Unavailable, godwit_protocol::error::chain(&e));
        report.generation = self.state.next_generation().map_err(unavailable)?;
        self.note_cells(&report);
        self.inventory_digest.store(digest(&report.inventory), Ordering::Release);
        self.generation.store(report.generation, Ordering::Release);
        *newest = Some(report.clone());
        Ok(Some(report))
    }

    fn note_cells(&self, report: &HostReport) {
        let mut cells = self.cells.lock().unwrap_or_else(PoisonError::into_inner);
        let same = |told: &[Cell]| as_built(told) == as_built(&report.inventory.cells);
        let generation = match &*cells {
            Some((generation, told)) if same(told) => *generation,
            _ => report.generation,
        };
        *cells = Some((generation, report.inventory.cells.clone()));
    }

    /// Since when the host's cells are told as they are in `now`.
    pub fn told_cells(&self, now: &[Cell]) -> Told {
        let cells = self.cells.lock().unwrap_or_else(PoisonError::into_inner);
        match &*cells {
            None => Told::Never,
            Some((generation, told)) if as_built(told) == as_built(now) => Told::Since(*generation),
            Some(_) => Told::Otherwise,
        }
    }

    /// The host's cells as they were told last; empty before the first report.
    pub fn cells(&self) -> Vec<Cell> {
        let cells = self.cells.lock().unwrap_or_else(PoisonError::into_inner);
        cells.as_ref().map(|(_, cells)| cells.clone()).unwrap_or_default()
    }

    /// The sign of life. It reads three numbers and waits for nothing.
    pub fn heartbeat(&self) -> Heartbeat {
        Heartbeat {
            host: self.state.host(),
            generation: self.generation.load(Ordering::Acquire),
            inventory_digest: self.inventory_digest.load(Ordering::Acquire),
        }
    }
}

/// The cells without what others take of them: a plan is not out of date for a page, and the veto counts pages itself.
fn as_built(cells: &[Cell]) -> Vec<Cell> {
    let mut cells = cells.to_vec();
    cells.iter_mut().flat_map(|cell| &mut cell.page_pools).for_each(|pool| pool.taken = 0);
    cells
}

/// The report with its volatile figures made coarse.
fn without_noise(report: &HostReport) -> HostReport {
    let mut report = report.clone();
    for pool in &mut report.inventory.pools {
        pool.free_bytes /= FREE_STEP_BYTES;
        pool.free_inodes /= FREE_STEP_INODES;
    }
    report
}

/// A digest of the inventory that does not depend on volatile figures.
pub fn digest(inventory: &Inventory) -> u64 {
    let mut inventory = Inventory { cells: as_built(&inventory.cells), ..inventory.clone() };
    for pool in &mut inventory.pools {
        pool.free_bytes = 0;
        pool.free_inodes = 0;
    }
    // Maps with keys that are no strings would be the only reason to fail, and there are none.
    let hash = Sha256::digest(serde_json::to_vec(&inventory).unwrap_or_default());
    hash.iter().take(8).fold(0, |number, byte| number << 8 | u64::from(*byte))
}
