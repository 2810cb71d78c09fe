//! Events that the coordinator has not taken yet: numbered, bounded, the oldest dropped first.

use godwit_protocol::event::{EventBatch, EventKind, HostEvent, MAX_BATCH};
use godwit_protocol::id::HostId;
use prometheus::{IntCounter, IntCounterVec, Opts, Registry};
use std::collections::VecDeque;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};
use tokio::sync::Notify;

/// Events that wait while the coordinator is away.
const MAX_WAITING: usize = 4096;

/// The queue from the kernel's ring, and from who watches the pool, to the uplink.
pub struct Events {
    host: HostId,
    run: u64,
    waiting: Mutex<Waiting>,
    added: Notify,
    seen: IntCounterVec,
    dropped: IntCounter,
}

#[derive(Default)]
struct Waiting {
    events: VecDeque<HostEvent>,
    next: u64,
}

impl Events {
    /// An empty queue of `host`, counted in `registry`.
    ///
    /// # Errors
    /// When `registry` holds such metrics already.
    pub fn new(host: HostId, registry: &Registry) -> Result<Self, prometheus::Error> {
        let seen =
            IntCounterVec::new(Opts::new("godwit_events_seen_total", "Rare events, by kind."), &["kind"])?;
        let dropped = IntCounter::new(
            "godwit_events_dropped_total",
            "Events that the coordinator was not told of, because too many waited.",
        )?;
        registry.register(Box::new(seen.clone()))?;
        registry.register(Box::new(dropped.clone()))?;
        let run = uuid::Uuid::new_v4().as_u128() as u64 >> 1;
        Ok(Self { host, run, waiting: Mutex::default(), added: Notify::new(), seen, dropped })
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Numbers events and queues them.
    pub fn push(&self, events: Vec<HostEvent>) {
        if events.is_empty() {
            return;
        }
        let mut waiting = self.waiting();
        for mut event in events {
            self.seen.with_label_values(&[event.kind.as_str()]).inc();
            event.sequence = waiting.next;
            waiting.next += 1;
            waiting.events.push_back(event);
            if waiting.events.len() > MAX_WAITING {
                waiting.events.pop_front();
                self.dropped.inc();
            }
        }
        drop(waiting);
        self.added.notify_one();
    }

    /// Queues what became just now of the pool in the folder `pool`.
    pub fn push_pool(&self, kind: EventKind, pool: &Path) {
        let pool = pool.to_string_lossy().into_owned();
        self.push(vec![HostEvent::of_pool(kind, unix_ms(), pool)]);
    }

    /// The oldest events, which stay until [`Self::taken`]; waits until there are some.
    pub async fn next(&self) -> EventBatch {
        loop {
            let events: Vec<_> = self.waiting().events.iter().take(MAX_BATCH).cloned().collect();
            if !events.is_empty() {
                return EventBatch { host: self.host, run: self.run, events };
            }
            self.added.notified().await;
        }
    }

    /// That the coordinator has a batch.
    pub fn taken(&self, batch: &EventBatch) {
        let last = batch.events.last().map_or(0, |event| event.sequence);
        let mut waiting = self.waiting();
        while waiting.events.front().is_some_and(|event| event.sequence <= last) {
            waiting.events.pop_front();
        }
    }
}

/// Now, in milliseconds since 1970.
pub(crate) fn unix_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(vni: u32) -> HostEvent {
        HostEvent {
            sequence: 0,
            at_ms: 1,
            kind: EventKind::Spoof,
            vni,
            tap: None,
            mac: None,
            owner: None,
            address: None,
            peer: None,
            reason: None,
            pool: None,
        }
    }

    fn queue() -> (Events, Registry) {
        let registry = Registry::new();
        (Events::new(HostId::random(), &registry).unwrap(), registry)
    }

    #[tokio::test]
    async fn a_batch_stays_until_it_is_taken_and_then_the_next_one_comes() {
        let (events, _) = queue();
        events.push((0..300).map(event).collect());
        let first = events.next().await;
        assert_eq!(first.events.len(), MAX_BATCH);
        assert_eq!(events.next().await, first, "told again after a broken connection");
        events.taken(&first);
        let second = events.next().await;
        assert_eq!(
            second.events.iter().map(|event| event.sequence).collect::<Vec<_>>(),
            (256..300).collect::<Vec<_>>()
        );
        assert_eq!(second.run, first.run);
    }

    #[tokio::test]
    async fn the_oldest_go_when_too_many_wait_and_their_numbers_are_missing() {
        let (events, registry) = queue();
        events.push((0..MAX_WAITING as u32 + 10).map(event).collect());
        assert_eq!(events.next().await.events[0].sequence, 10);
        let text = prometheus::TextEncoder::new().encode_to_string(&registry.gather()).unwrap();
        assert!(text.contains("godwit_events_dropped_total 10"), "{text}");
        assert!(text.contains(r#"godwit_events_seen_total{kind="spoof"} 4106"#), "{text}");
    }

    #[tokio::test]
    async fn what_comes_while_a_batch_is_on_its_way_is_not_taken_with_it() {
        let (events, _) = queue();
        events.push(vec![event(1)]);
        let batch = events.next().await;
        events.push(vec![event(2)]);
        events.taken(&batch);
        assert_eq!(events.next().await.events[0].vni, 2);
    }
}
