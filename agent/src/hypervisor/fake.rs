//! The simulator's hypervisor: domains in memory, with faults on demand. Several of them share [`Peers`], so that
//! one can migrate to another.

use super::{
    Cancel, DomainContext, Event, Hypervisor, HypervisorError, Listener, MigrationRoute, domain_xml,
};
use godwit_protocol::host::HypervisorInfo;
use godwit_protocol::id::InstanceId;
use godwit_protocol::instance::{InstanceReport, InstanceSpec, InstanceState};
use godwit_protocol::migration::{MigrationOutcome, MigrationProgress};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// The calls that can be told to fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Call {
    /// [`Hypervisor::define`].
    Define,
    /// [`Hypervisor::start`].
    Start,
    /// [`Hypervisor::stop`].
    Stop,
    /// [`Hypervisor::remove`].
    Remove,
    /// [`Hypervisor::prepare`].
    Prepare,
    /// [`Hypervisor::migrate`].
    Migrate,
}

/// Domains on their way between fakes: what each target has prepared.
pub type Peers = Arc<Mutex<BTreeMap<InstanceId, Arc<Mutex<State>>>>>;

/// A hypervisor that runs nothing.
pub struct Fake {
    state: Arc<Mutex<State>>,
    peers: Peers,
}

/// What a [`Fake`] holds.
#[derive(Default)]
pub struct State {
    domains: BTreeMap<InstanceId, InstanceState>,
    pins: BTreeMap<InstanceId, BTreeMap<u32, BTreeSet<u32>>>,
    listeners: Vec<Listener>,
    down: bool,
    failing: BTreeSet<Call>,
}

impl State {
    fn set(&mut self, instance: InstanceId, state: Option<InstanceState>) {
        match state {
            Some(state) => self.domains.insert(instance, state),
            None => self.domains.remove(&instance),
        };
        self.tell(Event::Changed(instance));
    }

    fn tell(&self, event: Event) {
        for listener in &self.listeners {
            listener(event);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Fake {
    /// An empty host among `peers`.
    pub fn new(peers: Peers) -> Self {
        Self { state: Arc::default(), peers }
    }

    /// From now on nothing answers, as if the daemon were dead; or it does again.
    pub fn set_down(&self, down: bool) {
        let mut state = lock(&self.state);
        state.down = down;
        state.tell(if down { Event::Disconnected } else { Event::Connected });
    }

    /// The next `call` fails, once, before it has any effect.
    pub fn fail_next(&self, call: Call) {
        lock(&self.state).failing.insert(call);
    }

    /// A guest runs, its vCPUs told to run on these CPUs.
    pub fn run_pinned(&self, instance: InstanceId, pins: BTreeMap<u32, BTreeSet<u32>>) {
        let mut state = lock(&self.state);
        state.pins.insert(instance, pins);
        state.set(instance, Some(InstanceState::Running));
    }

    /// A guest goes down by itself.
    pub fn crash(&self, instance: InstanceId) {
        lock(&self.state).set(instance, Some(InstanceState::Crashed));
    }

    fn answer(&self) -> Result<MutexGuard<'_, State>, HypervisorError> {
        let state = lock(&self.state);
        if state.down {
            let source = "told to be down".into();
            return Err(HypervisorError::Unavailable { uri: "fake:///".to_owned(), source });
        }
        Ok(state)
    }

    fn attempt(
        &self,
        call: Call,
        action: &'static str,
        instance: InstanceId,
    ) -> Result<MutexGuard<'_, State>, HypervisorError> {
        let mut state = self.answer()?;
        if state.failing.remove(&call) {
            return Err(HypervisorError::Failed { action, instance, source: "told to fail".into() });
        }
        Ok(state)
    }
}

impl Hypervisor for Fake {
    fn info(&self) -> Result<HypervisorInfo, HypervisorError> {
        self.answer().map(|_| HypervisorInfo {
            kind: "fake".to_owned(),
            libvirt_version: "0.0.0".to_owned(),
            version: "0.0.0".to_owned(),
            kvm: false,
        })
    }

    fn list(&self) -> Result<Vec<InstanceReport>, HypervisorError> {
        let state = self.answer()?;
        Ok(state.domains.iter().map(|(&instance, &state)| InstanceReport { instance, state }).collect())
    }

    fn state(&self, instance: InstanceId) -> Result<Option<InstanceState>, HypervisorError> {
        Ok(self.answer()?.domains.get(&instance).copied())
    }

    fn define(&self, spec: &InstanceSpec, _context: &DomainContext) -> Result<(), HypervisorError> {
        let mut state = self.attempt(Call::Define, "define", spec.instance)?;
        let kept = state.domains.get(&spec.instance).copied().unwrap_or(InstanceState::Stopped);
        state.set(spec.instance, Some(kept));
        Ok(())
    }

    fn taps(&self, _instance: InstanceId) -> Result<BTreeSet<String>, HypervisorError> {
        Ok(BTreeSet::new())
    }

    fn start(&self, instance: InstanceId) -> Result<(), HypervisorError> {
        let mut state = self.attempt(Call::Start, "start", instance)?;
        match state.domains.get(&instance) {
            None => Err(HypervisorError::NotFound(instance)),
            Some(InstanceState::Stopped | InstanceState::Crashed) => {
                state.set(instance, Some(InstanceState::Running));
                Ok(())
            }
            Some(_) => Ok(()),
        }
    }

    fn stop(&self, instance: InstanceId, _grace: Duration) -> Result<(), HypervisorError> {
        let mut state = self.attempt(Call::Stop, "stop", instance)?;
        if !state.domains.contains_key(&instance) {
            return Err(HypervisorError::NotFound(instance));
        }
        state.set(instance, Some(InstanceState::Stopped));
        Ok(())
    }

    fn reboot(&self, instance: InstanceId, _hard: bool) -> Result<(), HypervisorError> {
        self.start(instance)
    }

    fn pause(&self, instance: InstanceId, paused: bool) -> Result<(), HypervisorError> {
        let mut state = self.answer()?;
        match state.domains.get(&instance) {
            None => Err(HypervisorError::NotFound(instance)),
            Some(InstanceState::Running | InstanceState::Paused) => {
                let wanted = if paused { InstanceState::Paused } else { InstanceState::Running };
                state.set(instance, Some(wanted));
                Ok(())
            }
            Some(_) => Err(HypervisorError::Conflict(format!("instance {instance} does not run"))),
        }
    }

    fn remove(&self, instance: InstanceId) -> Result<(), HypervisorError> {
        self.attempt(Call::Remove, "remove", instance)?.set(instance, None);
        Ok(())
    }

    fn discard_incoming(&self, instance: InstanceId) -> Result<(), HypervisorError> {
        let mut state = self.answer()?;
        if state.domains.get(&instance) == Some(&InstanceState::Incoming) {
            state.set(instance, None);
        }
        let mut peers = lock(&self.peers);
        if peers.get(&instance).is_some_and(|target| Arc::ptr_eq(target, &self.state)) {
            peers.remove(&instance);
        }
        Ok(())
    }

    fn prepare(&self, spec: &InstanceSpec, context: &DomainContext) -> Result<String, HypervisorError> {
        let state = self.attempt(Call::Prepare, "prepare", spec.instance)?;
        if state.domains.contains_key(&spec.instance) {
            return Err(HypervisorError::Conflict(format!("instance {} is here already", spec.instance)));
        }
        lock(&self.peers).insert(spec.instance, self.state.clone());
        Ok(domain_xml::describe(spec, context, &domain_xml::Emulator::default()))
    }

    fn migrate(
        &self,
        instance: InstanceId,
        _route: &MigrationRoute,
        progress: &mut dyn FnMut(MigrationProgress),
        cancel: &Cancel,
    ) -> Result<MigrationOutcome, HypervisorError> {
        let state = match self.attempt(Call::Migrate, "migrate", instance)?.domains.get(&instance) {
            None => return Err(HypervisorError::NotFound(instance)),
            Some(&state @ (InstanceState::Running | InstanceState::Paused)) => state,
            Some(_) => return Err(HypervisorError::Conflict(format!("instance {instance} does not run"))),
        };
        progress(MigrationProgress::default());
        if cancel.is_cancelled() {
            return Err(HypervisorError::Cancelled);
        }
        let Some(target) = lock(&self.peers).remove(&instance) else {
            return Err(HypervisorError::Failed {
                action: "migrate",
                instance,
                source: "no target waits for it".into(),
            });
        };
        lock(&self.state).set(instance, None);
        lock(&target).set(instance, Some(state));
        Ok(MigrationOutcome::default())
    }

    fn vcpu_pins(
        &self,
        instance: InstanceId,
    ) -> Result<Option<BTreeMap<u32, BTreeSet<u32>>>, HypervisorError> {
        let state = self.answer()?;
        let runs = state.domains.get(&instance) == Some(&InstanceState::Running);
        Ok(runs.then(|| state.pins.get(&instance).cloned().unwrap_or_default()))
    }

    fn subscribe(&self, listener: Listener) {
        lock(&self.state).listeners.push(listener);
    }
}
