//! What runs here, as the hypervisor tells it. It is asked, never remembered for it; only while it does not answer
//! does its last word stand, for guests outlive the daemon that looks after them.

use crate::hypervisor::Hypervisor;
use crate::reservations::Reservations;
use godwit_protocol::error::RequestError;
use godwit_protocol::host::HypervisorInfo;
use godwit_protocol::id::InstanceId;
use godwit_protocol::instance::{InstanceReport, InstanceState};
use prometheus::{IntGauge, IntGaugeVec, Opts, Registry};
use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};

const STATES: [(InstanceState, &str); 5] = [
    (InstanceState::Running, "running"),
    (InstanceState::Paused, "paused"),
    (InstanceState::Stopped, "stopped"),
    (InstanceState::Crashed, "crashed"),
    (InstanceState::Incoming, "incoming"),
];

/// What the hypervisor is and what it runs.
type Word = (HypervisorInfo, Vec<InstanceReport>);

/// The instances of this host.
pub struct Instances {
    hypervisor: Arc<dyn Hypervisor>,
    reservations: Arc<Reservations>,
    known: Mutex<Option<Word>>,
    strangers: Mutex<BTreeSet<InstanceId>>,
    count: IntGaugeVec,
    answers: IntGauge,
}

impl Instances {
    /// Those that `hypervisor` runs, counted in `registry`.
    ///
    /// # Errors
    /// When `registry` holds such metrics already.
    pub fn new(
        hypervisor: Arc<dyn Hypervisor>,
        reservations: Arc<Reservations>,
        registry: &Registry,
    ) -> Result<Self, prometheus::Error> {
        let count = IntGaugeVec::new(
            Opts::new("godwit_instances", "Instances on this host by state, as last read."),
            &["state"],
        )?;
        let answers =
            IntGauge::new("godwit_hypervisor_up", "Whether the hypervisor answered when last asked.")?;
        registry.register(Box::new(count.clone()))?;
        registry.register(Box::new(answers.clone()))?;
        let (known, strangers) = (Mutex::default(), Mutex::default());
        Ok(Self { hypervisor, reservations, known, strangers, count, answers })
    }

    /// What the hypervisor is and every instance with its state, by instance. While the hypervisor does not answer,
    /// what it said last.
    ///
    /// # Errors
    /// `Unavailable` when it has not answered since the agent started: then nobody knows.
    pub fn read(&self) -> Result<Word, RequestError> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let asked = self.hypervisor.info().and_then(|info| Ok((info, self.hypervisor.list()?)));
        self.answers.set(asked.is_ok().into());
        let (info, mut instances) = match (asked, &*known) {
            (Ok(asked), _) => asked,
            (Err(error), Some(last)) => {
                tracing::debug!("the hypervisor's last word stands: {error}");
                return Ok(last.clone());
            }
            (Err(error), None) => return Err(error.into()),
        };
        instances.sort_by_key(|i| i.instance);
        if known.is_none() {
            tracing::info!(instances = instances.len(), "adopted what runs");
        }
        self.look_for_strangers(&instances);
        for (state, name) in STATES {
            let count = instances.iter().filter(|i| i.state == state).count();
            self.count.with_label_values(&[name]).set(count as i64);
        }
        *known = Some((info.clone(), instances.clone()));
        Ok((info, instances))
    }

    /// A domain that holds nothing is told of and left alone: it may be worth more than the table.
    fn look_for_strangers(&self, instances: &[InstanceReport]) {
        let holders: BTreeSet<_> = self.reservations.list().iter().map(|r| r.instance).collect();
        let now: BTreeSet<_> =
            instances.iter().map(|i| i.instance).filter(|i| !holders.contains(i)).collect();
        let mut before = self.strangers.lock().unwrap_or_else(PoisonError::into_inner);
        for instance in now.difference(&before) {
            tracing::warn!(%instance, "it is here and holds no reservation; it is reported and left alone");
        }
        *before = now;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hypervisor::fake::Fake;

    #[test]
    fn while_the_hypervisor_is_silent_its_last_word_stands_and_before_it_spoke_nothing_is_said() {
        let dir = tempfile::tempdir().unwrap();
        let reservations = Arc::new(Reservations::open(dir.path()).unwrap());
        let fake = Arc::new(Fake::new(Arc::default()));
        let registry = Registry::new();
        let instances = Instances::new(fake.clone(), reservations, &registry).unwrap();
        fake.set_down(true);
        let error = instances.read().unwrap_err();
        assert!(error.is_transient(), "{error}");
        fake.set_down(false);
        let instance = InstanceId::random();
        fake.crash(instance);
        let (_, before) = instances.read().unwrap();
        assert_eq!(before, [InstanceReport { instance, state: InstanceState::Crashed }]);
        fake.set_down(true);
        assert_eq!(instances.read().unwrap().1, before);
        let text = prometheus::TextEncoder::new().encode_to_string(&registry.gather()).unwrap();
        assert!(text.contains("godwit_hypervisor_up 0"), "{text}");
        assert!(text.contains(r#"godwit_instances{state="crashed"} 1"#), "{text}");
    }
}
