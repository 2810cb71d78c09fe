//! libvirt's QEMU driver: domains, their states, and live migration.

use super::domain_xml::{self, Emulator, domain_name};
use super::events::{Link, said};
use super::raw::{self, JobFigures};
use super::{
    Cancel, DomainContext, Hypervisor, HypervisorError, Listener, MigrationRoute, Virtualization, kvm_proof,
    pins,
};
use godwit_protocol::host::HypervisorInfo;
use godwit_protocol::id::InstanceId;
use godwit_protocol::instance::{InstanceReport, InstanceSpec, InstanceState};
use godwit_protocol::migration::{MigrationOutcome, MigrationProgress};
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::{Duration, Instant};
use virt::connect::Connect;
use virt::domain::{
    Domain, DomainPausedReason, DomainShutoffReason, DomainState, DomainStateReason, MigrateParameters,
};
use virt::enumutil::Enum;
use virt::error::{Error, ErrorNumber};
use virt_sys as sys;

/// How often a domain's state is looked at while a guest shuts down.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// How often a guest is asked again: one that is still booting does not hear the first time.
const ASK_EVERY: Duration = Duration::from_secs(2);

/// How long a guest may take to restart by itself before the button is pressed.
const REBOOT_GRACE: Duration = Duration::from_secs(60);

/// How often a migration's figures are read.
const FIGURES_EVERY: Duration = Duration::from_millis(250);

/// How long libvirt's event with a migration's last figures may lag behind the end of the call.
const FIGURES_LAG: Duration = Duration::from_secs(1);

/// In how many steps the allowed pause rises to its maximum, one for each pass over the memory after the second.
const DOWNTIME_STEPS: u64 = 8;

/// Removes what a domain may have kept beside its description.
const UNDEFINE_FLAGS: sys::virDomainUndefineFlagsValues = sys::VIR_DOMAIN_UNDEFINE_MANAGED_SAVE
    | sys::VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA
    | sys::VIR_DOMAIN_UNDEFINE_NVRAM
    | sys::VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA;

/// libvirtd on this host. It may come and go; guests do not depend on it.
pub struct Libvirt {
    link: Arc<Link>,
    virtualization: Virtualization,
    state_dir: PathBuf,
    found: Mutex<Option<Found>>,
}

/// What the host emulates with.
#[derive(Clone)]
struct Found {
    emulator: Emulator,
    info: HypervisorInfo,
}

impl Libvirt {
    /// The daemon at `uri`, connected to in the background. The proof of KVM is kept in `state_dir`.
    pub fn new(uri: &str, virtualization: Virtualization, state_dir: PathBuf) -> Self {
        Self { link: Link::new(uri), virtualization, state_dir, found: Mutex::default() }
    }

    /// Looked up once: after an upgrade of QEMU the agent is restarted with it.
    fn found(&self) -> Result<Found, HypervisorError> {
        let mut found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        if found.is_none() {
            let connection = self.link.connection()?;
            let unavailable = |error: Error| HypervisorError::Unavailable {
                uri: "QEMU through libvirtd".to_owned(),
                source: said(&error),
            };
            let looked_up =
                self.look_up(&connection).map_err(|error| self.link.explain(error, unavailable))?;
            *found = Some(looked_up);
        }
        Ok(found.clone().expect("it was set just before"))
    }

    fn look_up(&self, connection: &Connect) -> Result<Found, Error> {
        let mut emulator = Emulator::default();
        let capabilities =
            connection.domain_capabilities(None, Some("x86_64"), Some("q35"), Some("qemu"), 0)?;
        // libvirt answers with the machine that the alias stands for, which is what must be pinned.
        if let Some(machine) = text_of(&capabilities, "machine") {
            emulator.machine = machine.to_owned();
        }
        if let Some(path) = text_of(&capabilities, "path") {
            emulator.binary = path.to_owned();
        }
        let version = dotted(connection.hyp_version()?);
        emulator.kvm = match self.virtualization {
            Virtualization::Tcg => false,
            Virtualization::Auto => kvm_proof::prove(&emulator.binary, &version, &self.state_dir),
        };
        let info = HypervisorInfo {
            kind: "QEMU".to_owned(),
            libvirt_version: dotted(connection.lib_version()?),
            version,
            kvm: emulator.kvm,
        };
        Ok(Found { emulator, info })
    }

    /// The domain, none when there is none.
    fn look_for(&self, instance: InstanceId) -> Result<Option<Domain>, HypervisorError> {
        match self.link.connection()?.lookup_domain_by_uuid(instance.0) {
            Ok(domain) => Ok(Some(domain)),
            Err(error) if is(&error, ErrorNumber::NoDomain) => Ok(None),
            Err(error) => Err(self.failed("look up", instance)(error)),
        }
    }

    fn domain(&self, instance: InstanceId) -> Result<Domain, HypervisorError> {
        self.look_for(instance)?.ok_or(HypervisorError::NotFound(instance))
    }

    fn failed(
        &self,
        action: &'static str,
        instance: InstanceId,
    ) -> impl FnOnce(Error) -> HypervisorError + '_ {
        move |error| self.link.explain(error, |error| refused(action, instance, &error))
    }

    /// Asks the guest to go down until it has, `grace` is over or it cannot hear; whether it has.
    fn shut_down(
        &self,
        domain: &Domain,
        instance: InstanceId,
        grace: Duration,
    ) -> Result<bool, HypervisorError> {
        let deadline = Instant::now() + grace;
        let mut ask_at = Instant::now();
        loop {
            match state_of(domain) {
                None | Some(InstanceState::Stopped | InstanceState::Crashed) => return Ok(true),
                Some(InstanceState::Running) if Instant::now() < deadline => {}
                Some(_) => return Ok(false),
            }
            if Instant::now() >= ask_at {
                ask_at = Instant::now() + ASK_EVERY;
                match domain.shutdown() {
                    Err(error) if !is(&error, ErrorNumber::OperationInvalid) => {
                        return Err(self.failed("shut down", instance)(error));
                    }
                    _ => {}
                }
            }
            std::thread::sleep(LOOK_EVERY);
        }
    }

    /// Switches it off; off already is a success.
    fn switch_off(&self, domain: &Domain, instance: InstanceId) -> Result<(), HypervisorError> {
        match domain.destroy() {
            Err(error)
                if !is(&error, ErrorNumber::OperationInvalid) && !is(&error, ErrorNumber::NoDomain) =>
            {
                Err(self.failed("switch off", instance)(error))
            }
            _ => Ok(()),
        }
    }

    fn migrate_parameters(
        &self,
        domain: &Domain,
        route: &MigrationRoute,
    ) -> Result<MigrateParameters, Error> {
        let described = sys::VIR_DOMAIN_XML_SECURE | sys::VIR_DOMAIN_XML_MIGRATABLE;
        let live = domain.xml_desc(described)?;
        let kept = domain.xml_desc(described | sys::VIR_DOMAIN_XML_INACTIVE)?;
        Ok(MigrateParameters {
            uri: Some(format!("unix://{}", route.memory_socket.display())),
            dest_xml: Some(domain_xml::merge(&live, &route.target_xml)),
            persist_xml: Some(domain_xml::merge(&kept, &route.target_xml)),
            bandwidth: route.bandwidth_mib_s,
            ..MigrateParameters::default()
        })
    }
}

/// Flags of every migration. Post-copy is not among them: a broken post-copy is a lost guest.
const MIGRATE_FLAGS: sys::virDomainMigrateFlags = sys::VIR_MIGRATE_LIVE
    | sys::VIR_MIGRATE_PEER2PEER
    | sys::VIR_MIGRATE_PERSIST_DEST
    | sys::VIR_MIGRATE_UNDEFINE_SOURCE
    | sys::VIR_MIGRATE_AUTO_CONVERGE
    | sys::VIR_MIGRATE_ABORT_ON_ERROR;

impl Hypervisor for Libvirt {
    fn info(&self) -> Result<HypervisorInfo, HypervisorError> {
        Ok(self.found()?.info)
    }

    fn list(&self) -> Result<Vec<InstanceReport>, HypervisorError> {
        let connection = self.link.connection()?;
        let domains = connection.list_all_domains(0).map_err(|error| {
            self.link.explain(error, |error| HypervisorError::Unavailable {
                uri: "the list of domains".to_owned(),
                source: said(&error),
            })
        })?;
        let ours = |domain: &Domain| {
            let instance = InstanceId(domain.uuid().ok()?);
            let named = domain.name().ok()? == domain_name(instance);
            // One that vanished since it was listed has no state, and is no longer there.
            named.then_some(InstanceReport { instance, state: state_of(domain)? })
        };
        Ok(domains.iter().filter_map(ours).collect())
    }

    fn state(&self, instance: InstanceId) -> Result<Option<InstanceState>, HypervisorError> {
        Ok(self.look_for(instance)?.as_ref().and_then(state_of))
    }

    fn define(&self, spec: &InstanceSpec, context: &DomainContext) -> Result<(), HypervisorError> {
        let mut emulator = self.found()?.emulator;
        if let Some(domain) = self.look_for(spec.instance)? {
            let kept = domain.xml_desc(sys::VIR_DOMAIN_XML_INACTIVE);
            let kept = kept.map_err(self.failed("look up", spec.instance))?;
            // A guest keeps its hardware when QEMU is upgraded between two definitions.
            if let Some(machine) = attribute_of(&kept, "machine") {
                emulator.machine = machine.to_owned();
            }
        }
        let xml = domain_xml::describe(spec, context, &emulator);
        let defined = self.link.connection()?.define_domain_xml_flags(&xml, sys::VIR_DOMAIN_DEFINE_VALIDATE);
        let rejected = |error| HypervisorError::Rejected { instance: spec.instance, source: said(&error) };
        defined.map(drop).map_err(|error| self.link.explain(error, rejected))
    }

    fn taps(&self, instance: InstanceId) -> Result<BTreeSet<String>, HypervisorError> {
        let kept = self.domain(instance)?.xml_desc(sys::VIR_DOMAIN_XML_INACTIVE);
        Ok(domain_xml::taps(&kept.map_err(self.failed("look up", instance))?))
    }

    fn start(&self, instance: InstanceId) -> Result<(), HypervisorError> {
        let domain = self.domain(instance)?;
        match domain.create() {
            Err(error)
                if is(&error, ErrorNumber::OperationInvalid) && domain.is_active().unwrap_or(false) =>
            {
                Ok(())
            }
            answer => answer.map_err(self.failed("start", instance)),
        }
    }

    fn stop(&self, instance: InstanceId, grace: Duration) -> Result<(), HypervisorError> {
        let domain = self.domain(instance)?;
        if self.shut_down(&domain, instance, grace)? {
            return Ok(());
        }
        self.switch_off(&domain, instance)
    }

    fn reboot(&self, instance: InstanceId, hard: bool) -> Result<(), HypervisorError> {
        let domain = self.domain(instance)?;
        if !domain.is_active().map_err(self.failed("restart", instance))? {
            return self.start(instance);
        }
        if !hard && self.shut_down(&domain, instance, REBOOT_GRACE)? {
            return self.start(instance);
        }
        domain.reset().map(drop).map_err(self.failed("reset", instance))
    }

    fn pause(&self, instance: InstanceId, paused: bool) -> Result<(), HypervisorError> {
        let domain = self.domain(instance)?;
        match (state_of(&domain), paused) {
            (Some(InstanceState::Running), false) | (Some(InstanceState::Paused), true) => Ok(()),
            (Some(InstanceState::Running), true) => {
                domain.suspend().map(drop).map_err(self.failed("pause", instance))
            }
            (Some(InstanceState::Paused), false) => {
                domain.resume().map(drop).map_err(self.failed("resume", instance))
            }
            _ => Err(HypervisorError::Conflict(format!("instance {instance} does not run"))),
        }
    }

    fn remove(&self, instance: InstanceId) -> Result<(), HypervisorError> {
        let Some(domain) = self.look_for(instance)? else { return Ok(()) };
        self.switch_off(&domain, instance)?;
        match domain.undefine_flags(UNDEFINE_FLAGS) {
            // A domain that was never defined is gone once it is off.
            Err(error)
                if !is(&error, ErrorNumber::NoDomain) && !is(&error, ErrorNumber::OperationInvalid) =>
            {
                Err(self.failed("undefine", instance)(error))
            }
            _ => Ok(()),
        }
    }

    fn discard_incoming(&self, instance: InstanceId) -> Result<(), HypervisorError> {
        let Some(domain) = self.look_for(instance)? else { return Ok(()) };
        match state_of(&domain) {
            Some(InstanceState::Incoming) => self.switch_off(&domain, instance),
            _ => Ok(()),
        }
    }

    fn prepare(&self, spec: &InstanceSpec, context: &DomainContext) -> Result<String, HypervisorError> {
        self.discard_incoming(spec.instance)?;
        match self.state(spec.instance)? {
            None | Some(InstanceState::Stopped | InstanceState::Crashed) => {
                Ok(domain_xml::describe(spec, context, &self.found()?.emulator))
            }
            Some(_) => {
                Err(HypervisorError::Conflict(format!("instance {} runs here already", spec.instance)))
            }
        }
    }

    fn migrate(
        &self,
        instance: InstanceId,
        route: &MigrationRoute,
        progress: &mut dyn FnMut(MigrationProgress),
        cancel: &Cancel,
    ) -> Result<MigrationOutcome, HypervisorError> {
        let began = Instant::now();
        let domain = self.domain(instance)?;
        if !matches!(state_of(&domain), Some(InstanceState::Running | InstanceState::Paused)) {
            return Err(HypervisorError::Conflict(format!("instance {instance} does not run")));
        }
        let connection = self.link.connection()?;
        let failed = |error: Error| match connection.is_alive() {
            // Then it is the target's daemon that an error of transport tells of.
            Ok(true) => refused("migrate", instance, &error),
            _ => self.failed("migrate", instance)(error),
        };
        let (last_figures, completed) = mpsc::channel();
        let watched = raw::on_job_completed(
            &connection,
            &domain,
            // Whoever waits may have given up; then nobody wants the figures.
            Box::new(move |figures| {
                let _ = last_figures.send(figures);
            }),
        );
        let _watched = watched.map_err(failed)?;
        let mut downtime = Downtime::new(route.max_downtime_ms);
        downtime.allow(&domain, 0);
        let parameters = self.migrate_parameters(&domain, route).map_err(failed)?;
        let target = format!("qemu+unix:///system?socket={}", route.libvirt_socket.display());
        let mut last = JobFigures::default();
        std::thread::scope(|scope| {
            let (sender, ended) = mpsc::channel();
            let (domain, target) = (&domain, &target);
            let call = move || {
                let answer = domain.migrate_to_uri3(Some(target), parameters, MIGRATE_FLAGS);
                // The receiver waits below for as long as this thread runs.
                let _ = sender.send(answer);
            };
            scope.spawn(call);
            loop {
                match ended.recv_timeout(FIGURES_EVERY) {
                    Ok(answer) => return answer,
                    Err(_) if cancel.is_cancelled() => {
                        // Refused before the job has begun and after its point of no return; asked again until
                        // the call is over.
                        let _ = raw::abort_job(domain);
                    }
                    Err(_) => {}
                }
                // The domain can be gone at any moment; then there are no newer figures.
                if let Ok(figures) = raw::job_figures(domain)
                    && figures.memory_total_bytes > 0
                {
                    last = figures;
                    downtime.allow(domain, figures.iterations);
                    progress(figures.into());
                }
            }
        })
        .map_err(failed)?;
        let total = began.elapsed();
        let figures = completed.recv_timeout(FIGURES_LAG).unwrap_or(last);
        progress(figures.into());
        Ok(MigrationOutcome {
            total_ms: total.as_millis() as u64,
            downtime_ms: figures.downtime_ms,
            progress: figures.into(),
        })
    }

    fn vcpu_pins(
        &self,
        instance: InstanceId,
    ) -> Result<Option<BTreeMap<u32, BTreeSet<u32>>>, HypervisorError> {
        let Some(domain) = self.look_for(instance)? else { return Ok(None) };
        if !domain.is_active().map_err(self.failed("look up", instance))? {
            return Ok(None);
        }
        Ok(Some(pins::told(&domain.xml_desc(0).map_err(self.failed("look up", instance))?)))
    }

    fn subscribe(&self, listener: Listener) {
        self.link.subscribe(listener);
    }
}

impl From<JobFigures> for MigrationProgress {
    fn from(figures: JobFigures) -> Self {
        Self {
            memory_total_bytes: figures.memory_total_bytes,
            memory_processed_bytes: figures.memory_processed_bytes,
            memory_remaining_bytes: figures.memory_remaining_bytes,
            iterations: figures.iterations,
        }
    }
}

/// The allowed pause, which rises while a guest dirties its memory faster than it is sent.
struct Downtime {
    max_ms: u64,
    allowed_ms: u64,
}

impl Downtime {
    fn new(max_ms: u64) -> Self {
        Self { max_ms: max_ms.max(1), allowed_ms: 0 }
    }

    /// The pause after that many passes: a small one suits a quiet guest, which needs no more.
    fn after(&self, iterations: u64) -> u64 {
        let step = iterations.saturating_sub(1).clamp(1, DOWNTIME_STEPS);
        (self.max_ms.saturating_mul(step) / DOWNTIME_STEPS).max(1)
    }

    fn allow(&mut self, domain: &Domain, iterations: u64) {
        let wanted_ms = self.after(iterations);
        // A failure leaves the smaller pause, which is tried to be raised at the next figures.
        if wanted_ms > self.allowed_ms && domain.migrate_set_max_downtime(wanted_ms, 0).is_ok() {
            self.allowed_ms = wanted_ms;
        }
    }
}

/// The state as the fleet knows it; none when the domain vanished.
fn state_of(domain: &Domain) -> Option<InstanceState> {
    let (state, reason) = domain.state().ok()?;
    let reason = match reason {
        Enum::Known(reason) => Some(reason),
        Enum::Unknown(_) => None,
    };
    Some(match state.known()? {
        DomainState::Paused if is_in_migration(reason) => {
            // Held by a migration. Only the source is defined: its guest runs as far as its user can tell, for
            // the target goes on with it or it does. What is not defined is the arriving half.
            match domain.is_persistent().ok()? {
                true => InstanceState::Running,
                false => InstanceState::Incoming,
            }
        }
        DomainState::Paused | DomainState::PMSuspended => InstanceState::Paused,
        DomainState::Running | DomainState::Blocked | DomainState::Shutdown | DomainState::NoState => {
            InstanceState::Running
        }
        DomainState::Crashed => InstanceState::Crashed,
        DomainState::Shutoff => match reason {
            Some(DomainStateReason::Shutoff(reason))
                if matches!(
                    reason.known(),
                    Some(DomainShutoffReason::Crashed | DomainShutoffReason::Failed)
                ) =>
            {
                InstanceState::Crashed
            }
            _ => InstanceState::Stopped,
        },
    })
}

fn is_in_migration(reason: Option<DomainStateReason>) -> bool {
    let Some(DomainStateReason::Paused(reason)) = reason else { return false };
    matches!(reason.known(), Some(DomainPausedReason::Migration | DomainPausedReason::StartingUp))
}

/// What an error means when the daemon lives.
fn refused(action: &'static str, instance: InstanceId, error: &Error) -> HypervisorError {
    match error.code().known() {
        Some(ErrorNumber::NoDomain) => HypervisorError::NotFound(instance),
        Some(ErrorNumber::OperationAborted) => HypervisorError::Cancelled,
        _ => HypervisorError::Failed { action, instance, source: said(error) },
    }
}

fn is(error: &Error, code: ErrorNumber) -> bool {
    error.code().known() == Some(code)
}

/// The text of the first element of that name.
fn text_of<'a>(xml: &'a str, name: &str) -> Option<&'a str> {
    let start = xml.find(&format!("<{name}>"))? + name.len() + 2;
    let length = xml[start..].find('<')?;
    Some(&xml[start..start + length])
}

/// The value of the first attribute of that name, as libvirt writes it.
fn attribute_of<'a>(xml: &'a str, name: &str) -> Option<&'a str> {
    let start = xml.find(&format!(" {name}='"))? + name.len() + 3;
    let length = xml[start..].find('\'')?;
    Some(&xml[start..start + length])
}

/// 11003000 as 11.3.0.
fn dotted(version: u32) -> String {
    format!("{}.{}.{}", version / 1_000_000, version / 1000 % 1000, version % 1000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_and_attributes_are_found_in_what_libvirt_writes() {
        let xml = "<a><machine>pc-q35-10.0</machine><type arch='x86_64' machine='pc-q35-9.2'>hvm</type></a>";
        assert_eq!(text_of(xml, "machine"), Some("pc-q35-10.0"));
        assert_eq!(attribute_of(xml, "machine"), Some("pc-q35-9.2"));
        assert_eq!((text_of(xml, "path"), attribute_of(xml, "path")), (None, None));
    }

    #[test]
    fn versions_read_as_people_write_them() {
        assert_eq!(dotted(11_003_000), "11.3.0");
        assert_eq!(dotted(10_000_002), "10.0.2");
    }

    #[test]
    fn the_allowed_pause_rises_in_steps_to_its_maximum() {
        let downtime = Downtime::new(800);
        let allowed: Vec<u64> = [0, 1, 2, 3, 5, 9, 100].into_iter().map(|n| downtime.after(n)).collect();
        assert_eq!(allowed, [100, 100, 100, 200, 400, 800, 800]);
        assert_eq!(Downtime::new(0).after(50), 1);
    }

    #[test]
    fn a_dead_daemon_is_unavailable_and_named() {
        let folder = tempfile::tempdir().unwrap();
        let uri = format!("qemu+unix:///system?socket={}/none.sock", folder.path().display());
        let libvirt = Libvirt::new(&uri, Virtualization::Tcg, folder.path().to_owned());
        let error = libvirt.list().unwrap_err();
        assert!(matches!(error, HypervisorError::Unavailable { .. }), "{error}");
        let error = godwit_protocol::error::RequestError::from(error);
        assert!(error.is_transient() && error.message.contains(&uri), "{error}");
    }
}
