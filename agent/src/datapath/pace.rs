//! How fast a copy may go: a limit of bytes a second, and making room for other work on the same mount. Pure.

use std::time::{Duration, Instant};

/// What may be sent at once after a pause, as time at the limit's rate.
const BURST: Duration = Duration::from_millis(100);

/// Longest wait at a time, so that whoever waits can show that it lives.
pub(super) const LONGEST_WAIT: Duration = Duration::from_millis(500);

/// A limit of bytes a second.
#[derive(Debug)]
pub(super) struct Limit {
    bytes_per_s: f64,
    /// When the next byte may go.
    free_at: Instant,
}

impl Limit {
    pub(super) fn new(bytes_per_s: u64, now: Instant) -> Self {
        Self { bytes_per_s: bytes_per_s.max(1) as f64, free_at: now }
    }

    /// How long from `now` until the next bytes may go.
    pub(super) fn wait(&self, now: Instant) -> Duration {
        self.free_at.saturating_duration_since(now)
    }

    /// Accounts for bytes that go now.
    pub(super) fn take(&mut self, bytes: u64, now: Instant) {
        // What was not used is not saved up beyond the burst.
        let earliest = now.checked_sub(BURST).unwrap_or(now);
        self.free_at = self.free_at.max(earliest) + Duration::from_secs_f64(bytes as f64 / self.bytes_per_s);
    }
}

/// Chunks after which a verdict is made.
const WINDOW: usize = 32;

/// A chunk that takes this many times the quickest window's time says that others are at work.
const SLOW: f64 = 2.0;

/// Windows after which the quickest one is forgotten: the disk may have changed.
const MEMORY: u32 = 256;

/// Makes room when chunks take longer than they did, as LEDBAT (RFC 6817) does on networks: half the lanes when other
/// work slows the mount down, one more at a time when it does not.
#[derive(Debug)]
pub(super) struct Courtesy {
    most: usize,
    lanes: usize,
    sum: Duration,
    count: usize,
    /// Time that a chunk takes for each lane at work, in the quickest window.
    quickest: f64,
    age: u32,
}

impl Courtesy {
    /// With `most` lanes when nobody else is at work.
    pub(super) fn new(most: usize) -> Self {
        let most = most.max(1);
        Self { most, lanes: most, sum: Duration::ZERO, count: 0, quickest: f64::INFINITY, age: 0 }
    }

    /// How many lanes may be at work.
    pub(super) fn lanes(&self) -> usize {
        self.lanes
    }

    /// A chunk took this long.
    pub(super) fn observe(&mut self, took: Duration) {
        self.sum += took;
        self.count += 1;
        if self.count < WINDOW {
            return;
        }
        // Lanes share the disk, so that a chunk of many lanes takes longer by itself.
        let each = self.sum.as_secs_f64() / self.count as f64 / self.lanes as f64;
        (self.sum, self.count) = (Duration::ZERO, 0);
        self.age += 1;
        if self.age > MEMORY {
            (self.quickest, self.age) = (f64::INFINITY, 0);
        }
        self.quickest = self.quickest.min(each);
        self.lanes = match each > self.quickest * SLOW {
            true => (self.lanes / 2).max(1),
            false => (self.lanes + 1).min(self.most),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_lets_no_more_through_than_it_says() {
        let begin = Instant::now();
        let mut limit = Limit::new(1_000_000, begin);
        let mut now = begin;
        let mut sent = 0_u64;
        while now < begin + Duration::from_secs(10) {
            match limit.wait(now) {
                Duration::ZERO => {
                    limit.take(70_000, now);
                    sent += 70_000;
                }
                wait => now += wait,
            }
        }
        assert!((9_900_000..=10_200_000).contains(&sent), "{sent}");
    }

    #[test]
    fn a_pause_is_not_made_up_for() {
        let begin = Instant::now();
        let mut limit = Limit::new(1_000, begin);
        let late = begin + Duration::from_secs(60);
        limit.take(1_000, late);
        assert!(limit.wait(late) >= Duration::from_millis(899));
    }

    #[test]
    fn others_are_given_room_and_it_is_taken_back_when_they_are_gone() {
        let mut courtesy = Courtesy::new(16);
        let windows = |courtesy: &mut Courtesy, count: usize, each: Duration| {
            for _ in 0..count * WINDOW {
                courtesy.observe(each * courtesy.lanes() as u32);
            }
        };
        windows(&mut courtesy, 4, Duration::from_millis(1));
        assert_eq!(courtesy.lanes(), 16);
        windows(&mut courtesy, 8, Duration::from_millis(5));
        assert_eq!(courtesy.lanes(), 1);
        windows(&mut courtesy, 20, Duration::from_millis(1));
        assert_eq!(courtesy.lanes(), 16);
    }

    #[test]
    fn a_disk_that_stays_slow_is_the_new_measure_after_a_while() {
        let mut courtesy = Courtesy::new(8);
        for _ in 0..WINDOW {
            courtesy.observe(Duration::from_millis(1));
        }
        for _ in 0..WINDOW * (MEMORY as usize + 20) {
            courtesy.observe(Duration::from_millis(40) * courtesy.lanes() as u32);
        }
        assert_eq!(courtesy.lanes(), 8);
    }
}
