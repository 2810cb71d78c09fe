//! Copies that get no further: a mount that lets nothing through is seen within seconds, though nobody can ask it.

use prometheus::{IntCounter, IntGauge, Registry};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// A worker that says nothing for this long is stalled; one that waits by itself says so.
const STALLED_AFTER: Duration = Duration::from_secs(4);

/// Counts the stalled copies of a pool. Clones count together.
#[derive(Clone, Debug)]
pub struct Stalls {
    now: IntGauge,
    total: IntCounter,
}

impl Stalls {
    /// Counts that nobody reads.
    pub fn unregistered() -> Self {
        let now = IntGauge::new("godwit_copies_stalled", "Copies that get no further at the moment.");
        let total = IntCounter::new("godwit_copy_stalls_total", "Times that a copy got no further for 4 s.");
        match (now, total) {
            (Ok(now), Ok(total)) => Self { now, total },
            _ => unreachable!("the names are right"),
        }
    }

    /// Counts in `registry`.
    ///
    /// # Errors
    /// When `registry` holds such metrics already.
    pub fn new(registry: &Registry) -> Result<Self, prometheus::Error> {
        let stalls = Self::unregistered();
        registry.register(Box::new(stalls.now.clone()))?;
        registry.register(Box::new(stalls.total.clone()))?;
        Ok(stalls)
    }

    /// Whether a copy is stalled now.
    pub(super) fn any(&self) -> bool {
        self.now.get() > 0
    }

    /// Watches one copy.
    pub(super) fn watch(&self, destination: &Path, now: Instant) -> Watch {
        Watch { stalls: self.clone(), destination: destination.to_owned(), heard: now, stalled: false }
    }
}

/// Watches a copy by what its worker says.
pub(super) struct Watch {
    stalls: Stalls,
    destination: PathBuf,
    heard: Instant,
    stalled: bool,
}

impl Watch {
    /// The worker said something.
    pub(super) fn hear(&mut self, now: Instant) {
        if self.stalled {
            self.end();
            let waited_ms = now.saturating_duration_since(self.heard).as_millis() as u64;
            tracing::info!(destination = ?self.destination, waited_ms, "a stalled copy goes on");
        }
        self.heard = now;
    }

    /// Whether it stalls; the first time that it does is an event.
    pub(super) fn look(&mut self, now: Instant) -> bool {
        if !self.stalled && now.saturating_duration_since(self.heard) >= STALLED_AFTER {
            self.stalled = true;
            self.stalls.now.inc();
            self.stalls.total.inc();
            tracing::warn!(destination = ?self.destination, "a copy is stalled: its mount lets nothing through");
        }
        self.stalled
    }

    fn end(&mut self) {
        if std::mem::take(&mut self.stalled) {
            self.stalls.now.dec();
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.end();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_silent_worker_is_stalled_once_until_it_speaks() {
        let registry = Registry::new();
        let stalls = Stalls::new(&registry).unwrap();
        let begin = Instant::now();
        let mut watch = stalls.watch(Path::new("disk"), begin);
        assert!(!watch.look(begin + STALLED_AFTER / 2));
        assert!(watch.look(begin + STALLED_AFTER) && watch.look(begin + STALLED_AFTER * 9));
        assert_eq!((stalls.now.get(), stalls.total.get()), (1, 1));
        watch.hear(begin + STALLED_AFTER * 10);
        assert_eq!((stalls.now.get(), stalls.total.get()), (0, 1));
        assert!(watch.look(begin + STALLED_AFTER * 11));
        drop(watch);
        assert_eq!((stalls.now.get(), stalls.total.get()), (0, 2));
    }
}
