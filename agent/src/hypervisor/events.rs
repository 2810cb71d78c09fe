//! The connection to libvirtd: one thread opens it, opens it again whenever it is gone, and passes events on.

use super::library;
use super::raw::{self, Subscription};
use super::{Cause, Event, HypervisorError, Listener};
use godwit_protocol::id::InstanceId;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant};
use virt::connect::Connect;
use virt::error::Error;

/// How often the connection is looked after when nobody asks for it.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// How long a caller waits for a connection. A libvirtd that is held (SIGSTOP, a full host) takes a connection and
/// never answers on it.
const PATIENCE: Duration = Duration::from_secs(5);

/// Seconds between keepalives, and how many may be missed: a libvirtd that hangs is given up after 15 s.
const KEEPALIVE: (i32, u32) = (5, 3);

/// The connection, shared by all callers.
pub(super) struct Link {
    uri: String,
    state: Mutex<State>,
    changed: Condvar,
    listeners: Mutex<Vec<Listener>>,
}

#[derive(Default)]
struct State {
    open: Option<Open>,
    attempts: u64,
    refusal: String,
}

struct Open {
    connection: Connect,
    _lifecycle: Subscription,
}

impl Open {
    /// Asks libvirt's client, not the daemon.
    fn is_alive(&self) -> bool {
        self.connection.is_alive().unwrap_or(false)
    }
}

/// libvirt's own event loop, one for the process: its connections deliver events and keepalives through it.
fn start_event_loop() {
    static STARTED: OnceLock<()> = OnceLock::new();
    STARTED.get_or_init(|| {
        library::load();
        // libvirt prints every error to stderr unless it is told not to; ours are returned.
        virt::error::clear_error_callback();
        if let Err(error) = virt::event::event_register_default_impl() {
            tracing::error!("no events from libvirt: {error}");
            return;
        }
        let looping = || {
            loop {
                if virt::event::event_run_default_impl().is_err() {
                    std::thread::sleep(Duration::from_millis(100));
                }
            }
        };
        if let Err(error) = std::thread::Builder::new().name("libvirt-events".to_owned()).spawn(looping) {
            tracing::error!("no events from libvirt: {error}");
        }
    });
}

impl Link {
    /// A link to the daemon at `uri`; its thread begins to connect, and ends with the link.
    pub(super) fn new(uri: &str) -> Arc<Self> {
        let link = Arc::new(Self {
            uri: uri.to_owned(),
            state: Mutex::default(),
            changed: Condvar::new(),
            listeners: Mutex::default(),
        });
        let weak = Arc::downgrade(&link);
        let spawned = std::thread::Builder::new().name("libvirt".to_owned()).spawn(|| look_after(weak));
        if let Err(error) = spawned {
            tracing::error!("no connection to libvirt: {error}");
        }
        link
    }

    pub(super) fn subscribe(&self, listener: Listener) {
        self.listeners.lock().unwrap_or_else(PoisonError::into_inner).push(listener);
    }

    fn tell(&self, event: Event) {
        for listener in self.listeners.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            listener(event);
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A connection that lives, waited for up to [`PATIENCE`].
    pub(super) fn connection(&self) -> Result<Connect, HypervisorError> {
        let deadline = Instant::now() + PATIENCE;
        let mut state = self.state();
        let seen = state.attempts;
        loop {
            if let Some(open) = state.open.as_ref().filter(|open| open.is_alive()) {
                return Ok(open.connection.clone());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if state.attempts > seen || left.is_zero() {
                let refusal = if state.refusal.is_empty() { "no answer" } else { &state.refusal };
                return Err(HypervisorError::Unavailable { uri: self.uri.clone(), source: refusal.into() });
            }
            self.changed.notify_all();
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// An error of a call: the daemon's absence, or what `otherwise` makes of it.
    pub(super) fn explain(
        &self,
        error: Error,
        otherwise: impl FnOnce(Error) -> HypervisorError,
    ) -> HypervisorError {
        let alive = self.state().open.as_ref().is_some_and(Open::is_alive);
        let of_transport = error.domain().known() == Some(virt::error::ErrorDomain::Rpc);
        if alive && !of_transport {
            return otherwise(error);
        }
        HypervisorError::Unavailable { uri: self.uri.clone(), source: said(&error) }
    }

    fn open(self: &Arc<Self>) -> Result<Open, Error> {
        start_event_loop();
        let connection = Connect::open(Some(&self.uri))?;
        connection.set_keep_alive(KEEPALIVE.0, KEEPALIVE.1)?;
        let link = Arc::downgrade(self);
        let lifecycle = raw::on_lifecycle(
            &connection,
            Box::new(move |uuid| {
                if let Some(link) = link.upgrade() {
                    link.tell(Event::Changed(InstanceId(uuid)));
                }
            }),
        )?;
        Ok(Open { connection, _lifecycle: lifecycle })
    }
}

/// The link's thread.
fn look_after(link: Weak<Link>) {
    while let Some(link) = link.upgrade() {
        let mut state = link.state();
        if state.open.as_ref().is_some_and(Open::is_alive) {
            drop(link.changed.wait_timeout(state, LOOK_EVERY));
            continue;
        }
        let lost = state.open.take();
        drop(state);
        if lost.is_some() {
            tracing::warn!(uri = link.uri, "libvirtd is gone; guests go on");
            drop(lost);
            link.tell(Event::Disconnected);
        }
        let opened = link.open();
        let connected = opened.is_ok();
        state = link.state();
        state.attempts += 1;
        match opened {
            Ok(open) => state.open = Some(open),
            Err(error) => state.refusal = error.message().to_owned(),
        }
        link.changed.notify_all();
        if connected {
            drop(state);
            tracing::info!(uri = link.uri, "libvirtd answers");
            link.tell(Event::Connected);
        } else {
            drop(link.changed.wait_timeout(state, LOOK_EVERY));
        }
    }
}

/// libvirt's words, without the codes that its error prints beside them.
pub(super) fn said(error: &Error) -> Cause {
    error.message().into()
}
