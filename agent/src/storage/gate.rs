//! A way to touch a mount that may be dead: the call runs on a thread of its own, and whoever asked stops waiting
//! at a deadline. The thread stays behind until the mount answers; nothing can end it before.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::time::Duration;

/// Calls that may be overdue at once. With that many the mount counts as dead, and no further call is begun.
const MAX_OVERDUE: usize = 4;

/// Bounds how long and how often a mount is waited for. Clones count together.
#[derive(Clone, Debug, Default)]
pub struct Gate {
    overdue: Arc<AtomicUsize>,
}

impl Gate {
    /// What `work` returns; none when it does not within `deadline`, or when too many calls hang already.
    pub fn run<T: Send + 'static>(
        &self,
        deadline: Duration,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Option<T> {
        if self.overdue.load(Ordering::Relaxed) >= MAX_OVERDUE {
            return None;
        }
        // Of capacity 0: a send succeeds only while somebody waits for it, so that each call counts as either
        // answered or overdue.
        let (sender, receiver) = mpsc::sync_channel(0);
        let overdue = self.overdue.clone();
        let spawned = std::thread::Builder::new().name("pool".to_owned()).spawn(move || {
            if sender.send(work()).is_err() {
                overdue.fetch_sub(1, Ordering::Relaxed);
            }
        });
        spawned.ok()?;
        match receiver.recv_timeout(deadline) {
            Ok(answer) => Some(answer),
            Err(mpsc::RecvTimeoutError::Disconnected) => None,
            Err(mpsc::RecvTimeoutError::Timeout) => {
                self.overdue.fetch_add(1, Ordering::Relaxed);
                None
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Condvar, Mutex};
    use std::time::Instant;

    #[test]
    fn a_call_that_hangs_is_left_behind_and_four_of_them_shut_the_gate() {
        let gate = Gate::default();
        let mount = Arc::new((Mutex::new(false), Condvar::new()));
        for _ in 0..MAX_OVERDUE {
            let mount = mount.clone();
            let answer = gate.run(Duration::from_millis(20), move || {
                let guard = mount.0.lock().unwrap();
                drop(mount.1.wait_while(guard, |answers| !*answers).unwrap());
            });
            assert_eq!(answer, None);
        }
        assert_eq!(gate.run(Duration::from_secs(60), || 1), None);
        *mount.0.lock().unwrap() = true;
        mount.1.notify_all();
        let deadline = Instant::now() + Duration::from_secs(10);
        while gate.run(Duration::from_secs(1), || 1) != Some(1) {
            assert!(Instant::now() < deadline, "the gate stays shut after the mount answers again");
            std::thread::yield_now();
        }
    }

    #[test]
    fn a_call_that_panics_is_no_answer() {
        assert_eq!(Gate::default().run(Duration::from_secs(10), || -> u8 { panic!("on purpose") }), None);
    }
}
