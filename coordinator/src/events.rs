//! What hosts have told of rare things. It is telemetry: kept in memory only, the oldest dropped first.

use godwit_protocol::event::{EventBatch, EventKind, HostEvent};
use godwit_protocol::id::HostId;
use std::collections::{HashMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Whose the coordinator's own events are. No host has this id.
pub const COORDINATOR: HostId = HostId(uuid::Uuid::nil());

/// Events that are kept, of all hosts together.
pub const MAX_EVENTS: usize = 10_000;

/// The newest events of all hosts.
#[derive(Default)]
pub struct Events {
    kept: Mutex<Kept>,
}

#[derive(Default)]
struct Kept {
    events: VecDeque<(HostId, HostEvent)>,
    /// The agent's run and the next number of it that is news.
    next: HashMap<HostId, (u64, u64)>,
    dropped: u64,
}

impl Kept {
    fn push(&mut self, host: HostId, event: HostEvent) {
        self.events.push_back((host, event));
        if self.events.len() > MAX_EVENTS {
            self.events.pop_front();
            self.dropped += 1;
        }
    }
}

impl Events {
    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps what a host tells, unless it told it before.
    pub fn take(&self, batch: EventBatch) {
        let mut kept = self.kept();
        for event in batch.events {
            let next = kept.next.entry(batch.host).or_insert((batch.run, 0));
            if next.0 != batch.run {
                *next = (batch.run, 0);
            }
            if event.sequence < next.1 {
                continue;
            }
            next.1 = event.sequence + 1;
            kept.push(batch.host, event);
        }
    }

    /// Keeps what the coordinator itself has found at `at_ms`, about the pool `pool`.
    pub fn note(&self, at_ms: u64, kind: EventKind, pool: String, reason: String) {
        let event = HostEvent { reason: Some(reason), ..HostEvent::of_pool(kind, at_ms, pool) };
        self.kept().push(COORDINATOR, event);
    }

    /// The newest events that `wanted` lets through, the newest first.
    pub fn list(
        &self,
        limit: usize,
        wanted: impl Fn(HostId, &HostEvent) -> bool,
    ) -> Vec<(HostId, HostEvent)> {
        let kept = self.kept();
        let found = kept.events.iter().rev().filter(|(host, event)| wanted(*host, event));
        found.take(limit).cloned().collect()
    }

    /// Events that were dropped because too many came.
    pub fn dropped(&self) -> u64 {
        self.kept().dropped
    }

    /// Forgets a host that was removed.
    pub fn forget(&self, host: HostId) {
        let mut kept = self.kept();
        kept.next.remove(&host);
        kept.events.retain(|(of, _)| *of != host);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn batch(host: HostId, run: u64, numbers: std::ops::Range<u64>) -> EventBatch {
        let event = |sequence| HostEvent {
            sequence,
            at_ms: sequence,
            kind: EventKind::Stale,
            vni: 1001,
            tap: None,
            mac: None,
            owner: None,
            address: None,
            peer: None,
            reason: None,
            pool: None,
        };
        EventBatch { host, run, events: numbers.map(event).collect() }
    }

    fn numbers(events: &Events, host: HostId) -> Vec<u64> {
        events.list(MAX_EVENTS, |of, _| of == host).iter().map(|(_, event)| event.sequence).collect()
    }

    #[test]
    fn what_is_told_twice_is_kept_once_and_another_run_begins_anew() {
        let (events, host, other) = (Events::default(), HostId::random(), HostId::random());
        events.take(batch(host, 1, 0..3));
        events.take(batch(host, 1, 1..5));
        events.take(batch(other, 1, 0..1));
        assert_eq!(numbers(&events, host), [4, 3, 2, 1, 0]);
        events.take(batch(host, 2, 0..2));
        assert_eq!(numbers(&events, host), [1, 0, 4, 3, 2, 1, 0]);
        events.forget(host);
        assert_eq!((numbers(&events, host).len(), numbers(&events, other).len()), (0, 1));
    }

    #[test]
    fn the_oldest_go_first() {
        let (events, host) = (Events::default(), HostId::random());
        events.take(batch(host, 1, 0..MAX_EVENTS as u64 + 3));
        assert_eq!(events.dropped(), 3);
        assert_eq!(numbers(&events, host).last(), Some(&3));
    }
}
