//! The fleet and its store as one: reading, and changing durably.

use crate::fleet::{Change, Fleet, Time};
use crate::store::{Store, StoreError};
use std::path::Path;
use std::sync::{PoisonError, RwLock};

/// The fleet, with every change on disk before it is answered.
pub struct Ledger {
    fleet: RwLock<Fleet>,
    store: Store,
}

impl Ledger {
    /// Opens the state at `path`.
    ///
    /// # Errors
    /// When the store does not open or read.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        let (store, fleet) = Store::open(path)?;
        Ok(Self { fleet: RwLock::new(fleet), store })
    }

    /// Looks at the fleet.
    pub fn read<T>(&self, look: impl FnOnce(&Fleet) -> T) -> T {
        look(&self.fleet.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Decides on a change, in order with all others, and returns when it is durable. `decide` sees the fleet as
    /// it is, and returns what changes beside its answer; an error changes nothing.
    ///
    /// # Errors
    /// What `decide` says, or the store.
    pub async fn change<T, E: From<StoreError>>(
        &self,
        decide: impl FnOnce(&Fleet) -> Result<(Vec<Change>, T), E>,
    ) -> Result<T, E> {
        let (durable, answer) = {
            let mut fleet = self.fleet.write().unwrap_or_else(PoisonError::into_inner);
            let (changes, answer) = decide(&fleet)?;
            if changes.is_empty() {
                return Ok(answer);
            }
            let durable = self.store.queue(&changes)?;
            for change in changes {
                fleet.apply(change);
            }
            (durable, answer)
        };
        durable.await.map_err(|_| E::from(StoreError::Stopped))?;
        Ok(answer)
    }

    /// Transactions that the store has committed in this process's life.
    pub fn commits(&self) -> u64 {
        self.store.commits()
    }

    /// Changes what is not durable: what hosts said.
    pub fn observe<T>(&self, note: impl FnOnce(&mut Fleet) -> T) -> T {
        note(&mut self.fleet.write().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Now, to the microsecond, as clients print it.
pub fn now() -> Time {
    let now = Time::now_utc();
    now.replace_nanosecond(now.nanosecond() / 1000 * 1000).unwrap_or(now)
}
