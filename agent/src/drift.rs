//! What is reserved against what runs: the CPUs that libvirt was told, those that the kernel lets the threads have,
//! and the cells that memory is bound to. A difference is told and nothing is moved: it may be somebody's will.

use crate::guest_process::{GuestProcess, GuestProcesses, Mapping};
use crate::hypervisor::pins::Pins;
use crate::hypervisor::{Hypervisor, HypervisorError, MemoryBinding};
use crate::reservations::Reservations;
use godwit_protocol::host::Cell;
use godwit_protocol::id::InstanceId;
use godwit_protocol::instance::{InstanceState, Tuning};
use godwit_protocol::reservation::{Aspect, Drift, Reservation};
use prometheus::{IntGaugeVec, Opts, Registry};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How often threads are looked at.
pub const LOOK_EVERY: Duration = Duration::from_secs(10);

/// Every so many looks libvirt is asked as well, which costs more than all threads together.
pub const ASK_EVERY: u32 = 6;

/// After this long a difference is looked at again, for a guest that is just starting sets its threads up one by one.
const LOOK_AGAIN: Duration = Duration::from_millis(500);

/// What is not where its reservation says.
pub struct Drifts {
    hypervisor: Arc<dyn Hypervisor>,
    reservations: Arc<Reservations>,
    processes: GuestProcesses,
    memory_binding: MemoryBinding,
    known: Mutex<BTreeMap<InstanceId, Vec<Drift>>>,
    /// The processes whose memory was looked at: each once, for a process keeps what it was bound to.
    looked_at: Mutex<BTreeMap<InstanceId, u32>>,
    count: IntGaugeVec,
}

impl Drifts {
    /// Of the instances that `hypervisor` runs, counted in `registry`.
    ///
    /// # Errors
    /// When `registry` holds such a metric already.
    pub fn new(
        hypervisor: Arc<dyn Hypervisor>,
        reservations: Arc<Reservations>,
        processes: GuestProcesses,
        memory_binding: MemoryBinding,
        registry: &Registry,
    ) -> Result<Self, prometheus::Error> {
        let count = IntGaugeVec::new(
            Opts::new(
                "godwit_placement_drifts",
                "What runs elsewhere than its reservation says, as last looked at.",
            ),
            &["kind"],
        )?;
        registry.register(Box::new(count.clone()))?;
        Ok(Self {
            hypervisor,
            reservations,
            processes,
            memory_binding,
            known: Mutex::default(),
            looked_at: Mutex::default(),
            count,
        })
    }

    /// All that is known, by instance.
    pub fn list(&self) -> Vec<Drift> {
        self.lock().values().flatten().cloned().collect()
    }

    /// Looks at the threads of every instance that holds something, and asks libvirt only about those that are
    /// elsewhere or were; returns whether anything is new.
    pub fn check_threads(&self, cells: &[Cell]) -> bool {
        let mut changed = false;
        for reservation in self.reservations.list() {
            let Some(process) = self.processes.find(reservation.instance) else { continue };
            if self.is_new(reservation.instance, &process) {
                // One that arrived by a migration, or was here before the agent.
                changed |= self.check(reservation.instance, cells, true);
                continue;
            }
            let seen = Seen::read(&process, false);
            let found = compare(&reservation, cells, self.memory_binding, &BTreeMap::new(), &seen);
            if !found.is_empty() || self.lock().contains_key(&reservation.instance) {
                changed |= self.check(reservation.instance, cells, false);
            }
        }
        changed
    }

    /// Looks at every instance that runs; returns whether anything is new. What libvirt cannot be asked about stays
    /// as it was.
    pub fn check_all(&self, cells: &[Cell]) -> bool {
        let Ok(instances) = self.hypervisor.list() else { return false };
        let runs = |state| matches!(state, InstanceState::Running | InstanceState::Paused);
        let running: BTreeSet<InstanceId> =
            instances.iter().filter(|i| runs(i.state)).map(|i| i.instance).collect();
        let mut changed = self.forget_all_but(&running);
        for instance in running {
            changed |= self.check(instance, cells, false);
        }
        changed
    }

    /// Looks at one instance, and with `memory` at its memory too, which takes long for a large guest. Returns
    /// whether anything is new.
    pub fn check(&self, instance: InstanceId, cells: &[Cell], memory: bool) -> bool {
        let look = || self.look(instance, cells, memory);
        let found = match look() {
            Ok(found) if found.is_empty() => found,
            Ok(_) => {
                std::thread::sleep(LOOK_AGAIN);
                match look() {
                    Ok(found) => found,
                    Err(_) => return false,
                }
            }
            Err(error) => {
                tracing::debug!(%instance, "cannot be looked at: {error}");
                return false;
            }
        };
        self.note(instance, found, memory)
    }

    fn is_new(&self, instance: InstanceId, process: &GuestProcess) -> bool {
        let mut looked_at = self.looked_at.lock().unwrap_or_else(PoisonError::into_inner);
        looked_at.insert(instance, process.main_thread()) != Some(process.main_thread())
    }

    fn look(
        &self,
        instance: InstanceId,
        cells: &[Cell],
        memory: bool,
    ) -> Result<Vec<Drift>, HypervisorError> {
        let Some(told) = self.hypervisor.vcpu_pins(instance)? else { return Ok(vec![]) };
        let Some(reservation) = self.reservations.get(instance) else {
            let (wanted, found) = ("nothing without a reservation".to_owned(), "it runs".to_owned());
            return Ok(vec![Drift { instance, aspect: Aspect::Unreserved, wanted, found }]);
        };
        let seen = self.processes.find(instance).map(|process| Seen::read(&process, memory));
        Ok(compare(&reservation, cells, self.memory_binding, &told, &seen.unwrap_or_default()))
    }

    fn note(&self, instance: InstanceId, found: Vec<Drift>, memory: bool) -> bool {
        let mut known = self.lock();
        let mut next = found;
        if !memory {
            // Not looked at this time.
            let kept = known.get(&instance).into_iter().flatten();
            next.extend(kept.filter(|drift| matches!(drift.aspect, Aspect::Memory { .. })).cloned());
        }
        next.sort();
        let before = known.remove(&instance).unwrap_or_default();
        for drift in next.iter().filter(|drift| !before.contains(drift)) {
            let (what, wanted, found) = (drift.aspect.name(), &drift.wanted, &drift.found);
            tracing::error!(%instance, what, wanted, found, "it does not run where its reservation says");
        }
        let changed = before != next;
        if changed && next.is_empty() {
            tracing::info!(%instance, "it runs where its reservation says again");
        }
        if !next.is_empty() {
            known.insert(instance, next);
        }
        self.count_all(&known);
        changed
    }

    fn forget_all_but(&self, running: &BTreeSet<InstanceId>) -> bool {
        let mut looked_at = self.looked_at.lock().unwrap_or_else(PoisonError::into_inner);
        looked_at.retain(|instance, _| running.contains(instance));
        drop(looked_at);
        let mut known = self.lock();
        let before = known.len();
        known.retain(|instance, _| running.contains(instance));
        self.count_all(&known);
        known.len() != before
    }

    fn count_all(&self, known: &BTreeMap<InstanceId, Vec<Drift>>) {
        self.count.reset();
        for kind in ["vcpu_pin", "vcpu_thread", "emulator_thread", "memory", "unreserved"] {
            self.count.with_label_values(&[kind]);
        }
        for drift in known.values().flatten() {
            self.count.with_label_values(&[drift.aspect.name()]).inc();
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<InstanceId, Vec<Drift>>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What the kernel tells of a guest.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Seen {
    /// CPUs that vCPUs' threads may run on.
    vcpus: BTreeMap<u32, BTreeSet<u32>>,
    emulator: Option<BTreeSet<u32>>,
    /// None: not looked at.
    memory: Option<Vec<Mapping>>,
}

impl Seen {
    fn read(process: &GuestProcess, memory: bool) -> Self {
        let threads = process.vcpu_threads();
        let vcpus = threads.iter().filter_map(|(vcpu, thread)| Some((*vcpu, process.affinity(*thread)?)));
        Self {
            vcpus: vcpus.collect(),
            emulator: process.affinity(process.main_thread()),
            memory: memory.then(|| process.mappings()).flatten(),
        }
    }
}

/// What of `seen`, and of what libvirt was told, is not as the reservation says.
fn compare(
    reservation: &Reservation,
    cells: &[Cell],
    binding: MemoryBinding,
    told: &BTreeMap<u32, BTreeSet<u32>>,
    seen: &Seen,
) -> Vec<Drift> {
    let instance = reservation.instance;
    // How the emulator's threads float is not part of a reservation; where they must not be is.
    let pins = Pins::of(reservation, &Tuning::default(), cells);
    let online: BTreeSet<u32> = cells.iter().flat_map(|cell| &cell.cpus).map(|cpu| cpu.id).collect();
    let mut drifts = Vec::new();
    let mut differs = |aspect, wanted: &BTreeSet<u32>, found: &BTreeSet<u32>| {
        let differ = !wanted.is_empty() && wanted.intersection(&online).ne(found.intersection(&online));
        if differ {
            drifts.push(Drift { instance, aspect, wanted: cpus(wanted), found: cpus(found) });
        }
    };
    for (&vcpu, wanted) in &pins.vcpus {
        if let Some(found) = told.get(&vcpu) {
            differs(Aspect::VcpuPin { vcpu }, wanted, found);
        }
        if let Some(found) = seen.vcpus.get(&vcpu) {
            differs(Aspect::VcpuThread { vcpu }, wanted, found);
        }
    }
    if let Some(found) = &seen.emulator
        && !pins.allows_emulator(found, cells)
    {
        let (wanted, found) = (cpus(&pins.emulator), cpus(found));
        drifts.push(Drift { instance, aspect: Aspect::EmulatorThread, wanted, found });
    }
    if let (MemoryBinding::Strict, Some(mappings)) = (binding, &seen.memory) {
        drifts.extend(unbound(reservation, mappings));
    }
    drifts
}

/// Cells of a reservation that no memory is bound to.
fn unbound(reservation: &Reservation, mappings: &[Mapping]) -> Vec<Drift> {
    let bound: BTreeSet<&BTreeSet<u32>> = mappings.iter().filter_map(|m| m.bound.as_ref()).collect();
    let cells: BTreeSet<u32> = reservation.cells.iter().map(|cell| cell.host).collect();
    let missing = cells.into_iter().filter(|cell| !bound.contains(&BTreeSet::from([*cell])));
    let drift = |cell| Drift {
        instance: reservation.instance,
        aspect: Aspect::Memory { cell },
        wanted: format!("memory bound to cell {cell}"),
        found: match bound.is_empty() {
            true => "no memory that is bound".to_owned(),
            false => format!("memory bound to {bound:?}"),
        },
    };
    missing.map(drift).collect()
}

fn cpus(set: &BTreeSet<u32>) -> String {
    format!("CPUs {}", crate::hypervisor::domain_xml::List(set))
}

#[cfg(test)]
mod tests;
