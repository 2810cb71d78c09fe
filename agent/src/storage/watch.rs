//! Whether a pool answers: a thread looks every second, so that a server that stands still is known before anybody
//! needs it.

use super::folder::Sizes;
use super::{Pool, StorageError};
use godwit_protocol::error::chain;
use prometheus::{IntCounter, IntGauge, IntGaugeVec, Opts, Registry};
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// How often it is looked at. With [`ANSWER_WITHIN`] a stall is told within 3 s.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// A healthy server answers in milliseconds; one that takes longer than this stands still.
const ANSWER_WITHIN: Duration = Duration::from_secs(2);

/// Looks from one attempt at a mount to the next.
const TRY_EVERY: u64 = 10;

/// Most looks from one attempt to unmount a share with stale handles to the next.
const RARELY: u64 = 64;

/// What became of a pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PoolChange {
    /// Its server does not answer any more, or lets no copy through.
    Stalled,
    /// It stood still, and answers again, be it with an error.
    Back,
    /// It can be used now, or not any more, though its server answers; or it is another pool.
    Other,
}

/// Told of each change, from whatever thread saw it; it must not wait.
type OnChange = Arc<dyn Fn(PoolChange) + Send + Sync>;

/// What was last seen of a pool. Clones see the same.
#[derive(Clone)]
pub(super) struct Watched {
    path: PathBuf,
    seen: Arc<Mutex<Seen>>,
    on_change: Arc<OnceLock<OnChange>>,
    bytes: IntGaugeVec,
    inodes: IntGaugeVec,
    reachable: IntGauge,
    stalled: IntGauge,
    stalls: IntCounter,
}

impl fmt::Debug for Watched {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watched").field("path", &self.path).field("seen", &self.seen).finish_non_exhaustive()
    }
}

#[derive(Debug)]
struct Seen {
    /// None before the first answer.
    sizes: Option<Sizes>,
    reachable: bool,
    /// Since when it does not answer.
    stalled_since: Option<Instant>,
    /// Whether copies get no further, though it may answer from memory.
    copies_stalled: bool,
    touched: Instant,
}

impl Seen {
    fn is_stalled(&self) -> bool {
        self.stalled_since.is_some() || self.copies_stalled
    }
}

impl Watched {
    pub(super) fn new(path: &Path, registry: &Registry) -> Result<Self, prometheus::Error> {
        let pool = path.to_string_lossy().into_owned();
        let opts = |name: &str, help: &str| Opts::new(name, help).const_label("pool", &pool);
        let bytes =
            IntGaugeVec::new(opts("godwit_pool_bytes", "Size of the pool, when last seen."), &["what"])?;
        let inodes =
            IntGaugeVec::new(opts("godwit_pool_inodes", "Inodes of the pool, when last seen."), &["what"])?;
        let reachable =
            IntGauge::with_opts(opts("godwit_pool_reachable", "Whether the pool answered when last asked."))?;
        let stalled = IntGauge::with_opts(opts(
            "godwit_pool_stalled",
            "Whether the pool's server stands still, or lets no copy through.",
        ))?;
        let stalls =
            IntCounter::with_opts(opts("godwit_pool_stalls_total", "Times that it began to stand still."))?;
        registry.register(Box::new(bytes.clone()))?;
        registry.register(Box::new(inodes.clone()))?;
        registry.register(Box::new(reachable.clone()))?;
        registry.register(Box::new(stalled.clone()))?;
        registry.register(Box::new(stalls.clone()))?;
        let seen = Seen {
            sizes: None,
            reachable: false,
            stalled_since: None,
            copies_stalled: false,
            touched: Instant::now(),
        };
        Ok(Self {
            path: path.to_owned(),
            seen: Arc::new(Mutex::new(seen)),
            on_change: Arc::default(),
            bytes,
            inodes,
            reachable,
            stalled,
            stalls,
        })
    }

    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Somebody uses the pool now.
    pub(super) fn touched(&self) {
        self.seen().touched = Instant::now();
    }

    /// Whether it does not answer, or lets no copy through.
    pub(super) fn is_stalled(&self) -> bool {
        self.seen().is_stalled()
    }

    /// Whether it does not answer.
    pub(super) fn is_silent(&self) -> bool {
        self.seen().stalled_since.is_some()
    }

    /// The last sizes, and whether it answered when last asked.
    pub(super) fn last(&self) -> (Sizes, bool) {
        let seen = self.seen();
        (seen.sizes.unwrap_or_default(), seen.reachable)
    }

    fn idle(&self) -> Duration {
        self.seen().touched.elapsed()
    }

    /// Takes in what a look saw, and tells of a change.
    pub(super) fn saw(&self, outcome: Result<Sizes, StorageError>) {
        self.tell_of(self.take(outcome));
    }

    /// Takes in whether copies get no further, and tells of a change.
    fn saw_copies(&self, stalled: bool) {
        self.tell_of(self.take_copies(stalled));
    }

    fn tell_of(&self, change: Option<PoolChange>) {
        if let (Some(change), Some(on_change)) = (change, self.on_change.get()) {
            on_change(change);
        }
    }

    fn take_copies(&self, stalled: bool) -> Option<PoolChange> {
        let mut seen = self.seen();
        if seen.copies_stalled == stalled {
            return None;
        }
        let was_stalled = seen.is_stalled();
        seen.copies_stalled = stalled;
        self.tell(&seen);
        self.turn(was_stalled, &seen)
    }

    /// The begin or the end of a stall.
    fn turn(&self, was_stalled: bool, seen: &Seen) -> Option<PoolChange> {
        match (was_stalled, seen.is_stalled()) {
            (false, true) => {
                self.stalls.inc();
                Some(PoolChange::Stalled)
            }
            (true, false) => Some(PoolChange::Back),
            _ => None,
        }
    }

    fn take(&self, outcome: Result<Sizes, StorageError>) -> Option<PoolChange> {
        let pool = self.path.display();
        let mut seen = self.seen();
        let (was_reachable, was_silent, was_stalled) =
            (seen.reachable, seen.stalled_since.is_some(), seen.is_stalled());
        let mut is_another = false;
        match outcome {
            Ok(sizes) => {
                if let Some(since) = seen.stalled_since.take() {
                    tracing::info!(
                        "the pool {pool} answers again after {:.1} s",
                        since.elapsed().as_secs_f64()
                    );
                }
                is_another = seen.sizes.is_some_and(|before| before.mark != sizes.mark);
                seen.sizes = Some(sizes);
                seen.reachable = true;
            }
            Err(StorageError::Unreachable(_)) => {
                seen.reachable = false;
                if !was_silent {
                    seen.stalled_since = Some(Instant::now());
                    tracing::warn!("the pool {pool} does not answer; is its server there?");
                }
            }
            Err(error) => {
                // An answer, though no good one: a stall has an end.
                seen.reachable = false;
                seen.stalled_since = None;
                if was_reachable || was_silent {
                    tracing::warn!("the pool {pool} cannot be used: {}", chain(&error));
                }
            }
        }
        self.tell(&seen);
        let other = seen.reachable != was_reachable || is_another;
        self.turn(was_stalled, &seen).or(other.then_some(PoolChange::Other))
    }

    fn tell(&self, seen: &Seen) {
        let sizes = seen.sizes.unwrap_or_default();
        let signed = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
        for (gauge, what, number) in [
            (&self.bytes, "total", sizes.total_bytes),
            (&self.bytes, "free", sizes.free_bytes),
            (&self.inodes, "total", sizes.total_inodes),
            (&self.inodes, "free", sizes.free_inodes),
        ] {
            gauge.with_label_values(&[what]).set(signed(number));
        }
        self.reachable.set(i64::from(seen.reachable));
        self.stalled.set(i64::from(seen.is_stalled()));
    }
}

/// When something that fails is tried again: at once, then after two looks, four, and so on.
#[derive(Debug, Default)]
struct BackOff {
    /// Looks until the next attempt.
    left: u64,
    /// Looks from the last attempt to the next.
    step: u64,
}

impl BackOff {
    /// Whether this look is one to try at.
    fn is_due(&mut self) -> bool {
        self.left = self.left.saturating_sub(1);
        if self.left > 0 {
            return false;
        }
        self.step = (self.step * 2).clamp(1, RARELY);
        self.left = self.step;
        true
    }
}

impl Pool {
    /// Looks at the pool from now on, for as long as the process lives, and tells of each change. Unmounts a share
    /// that nobody uses.
    ///
    /// # Errors
    /// When there can be no thread.
    pub fn watch(&self, on_change: OnChange) -> std::io::Result<()> {
        // It is called once; a second listener would not be told.
        let _ = self.watched.on_change.set(on_change);
        let pool = self.clone();
        let looking = std::thread::Builder::new().name("pool-watch".to_owned());
        looking.spawn(move || {
            let mut stale = BackOff::default();
            for looks in 0_u64.. {
                std::thread::sleep(LOOK_EVERY);
                // A share that cannot be mounted is tried again, but not as often. One that was unmounted for want of
                // use is left so.
                let wanted = pool.is_mounted() || !pool.watched.last().1 && looks % TRY_EVERY == 0;
                if wanted {
                    pool.look(&mut stale);
                }
            }
        })?;
        Ok(())
    }

    fn look(&self, stale: &mut BackOff) {
        self.watched.saw_copies(self.worker.has_stalled_copy());
        self.measure(ANSWER_WITHIN);
        let is_stale = self.policy().share.is_some()
            && !self.watched.is_silent()
            && !self.watched.last().1
            && self.is_mounted();
        if !is_stale {
            *stale = BackOff::default();
        } else if stale.is_due() {
            // The server answers, but not for this mount: its handles are stale, as after a new file system there. A
            // new mount has new ones. Somebody who uses it keeps it, and is not to be asked each second.
            drop(self.unmount());
        }
        let idle_seconds = self.policy().share.as_ref().map_or(0, |share| share.idle_seconds);
        if idle_seconds > 0 && self.watched.idle() > Duration::from_secs(idle_seconds) {
            // Asked again only after as long, also when somebody uses it: a guest, as a rule.
            self.watched.touched();
            if let Err(error) = self.unmount() {
                tracing::warn!("{}", chain(&error));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stall_begins_once_and_ends_with_an_answer_and_the_last_sizes_stay() {
        let registry = Registry::new();
        let watched = Watched::new(Path::new("/p"), &registry).unwrap();
        let sizes = Sizes { total_bytes: 9, free_bytes: 5, total_inodes: 3, free_inodes: 1, mark: None };
        assert_eq!(watched.take(Ok(sizes)), Some(PoolChange::Other));
        assert_eq!(watched.take(Ok(sizes)), None);
        let late = || Err(StorageError::Unreachable("/p".into()));
        assert_eq!(watched.take(late()), Some(PoolChange::Stalled));
        assert_eq!(watched.take(late()), None);
        assert!(watched.is_silent());
        assert_eq!(watched.last(), (sizes, false));
        assert_eq!((watched.stalls.get(), watched.stalled.get()), (1, 1));
        assert_eq!(watched.take(Ok(sizes)), Some(PoolChange::Back));
        assert_eq!((watched.stalls.get(), watched.stalled.get(), watched.reachable.get()), (1, 0, 1));
        assert_eq!(watched.take(Err(StorageError::NotFound("/p".into()))), Some(PoolChange::Other));
        assert!(!watched.is_silent());
        assert_eq!(watched.last(), (sizes, false));
    }

    #[test]
    fn a_pool_whose_copies_get_no_further_stands_still_though_it_answers() {
        let watched = Watched::new(Path::new("/p"), &Registry::new()).unwrap();
        watched.take(Ok(Sizes::default()));
        assert_eq!(watched.take_copies(true), Some(PoolChange::Stalled));
        assert_eq!((watched.take_copies(true), watched.take(Ok(Sizes::default()))), (None, None));
        assert_eq!((watched.stalled.get(), watched.reachable.get(), watched.is_silent()), (1, 1, false));
        // One stall, however it is seen, from its begin to its end.
        let late = || Err(StorageError::Unreachable("/p".into()));
        assert_eq!(watched.take(late()), Some(PoolChange::Other));
        assert_eq!(watched.take_copies(false), None);
        assert_eq!(watched.take(Ok(Sizes::default())), Some(PoolChange::Back));
        assert_eq!((watched.stalls.get(), watched.stalled.get()), (1, 0));
    }

    #[test]
    fn a_share_that_cannot_be_unmounted_is_asked_less_and_less_often() {
        let mut stale = BackOff::default();
        let asked: Vec<u64> = (0..300).filter(|_| stale.is_due()).collect();
        assert_eq!(asked, [0, 1, 3, 7, 15, 31, 63, 127, 191, 255]);
    }

    #[test]
    fn whoever_sees_a_change_tells_of_it() {
        let watched = Watched::new(Path::new("/p"), &Registry::new()).unwrap();
        let told = Arc::new(Mutex::new(Vec::new()));
        let heard = told.clone();
        let listen: OnChange = Arc::new(move |change| heard.lock().unwrap().push(change));
        assert!(watched.on_change.set(listen).is_ok());
        let other = watched.clone();
        other.saw(Err(StorageError::Unreachable("/p".into())));
        watched.saw(Err(StorageError::Unreachable("/p".into())));
        watched.saw(Ok(Sizes::default()));
        assert_eq!(*told.lock().unwrap(), [PoolChange::Stalled, PoolChange::Back]);
    }
}
