//! What a step has at hand, and how it fails.

use super::place::{self, Sought};
use crate::app::Shared;
use crate::error::Error;
use crate::fleet::instance::{Instance, Task};
use crate::fleet::operation::{Operation, Verb};
use crate::fleet::{Change, Fleet};
use crate::ledger::now;
use crate::liveness::LOST_AFTER;
use crate::placement::Refusal;
use crate::store::StoreError;
use godwit_protocol::error::{ErrorKind, RequestError};
use godwit_protocol::id::{HostId, InstanceId, OperationId};
use godwit_protocol::request::{AgentReply, AgentRequest};
use std::time::{Duration, Instant};

/// Between two tries.
const PAUSE: Duration = Duration::from_millis(500);

/// Why a step did not do its work.
#[derive(Debug, thiserror::Error)]
pub enum StepError {
    /// The user stopped it.
    #[error("It was cancelled.")]
    Cancelled,
    /// No host takes it, and why.
    #[error("{0}")]
    NoPlace(#[from] Refusal),
    /// No host takes it; [`super::place::why_not`] says why.
    #[error("no host can take the instance")]
    NoRoom(Box<Sought>),
    /// A host said no, or did not answer in time.
    #[error("Host {host}: {error}")]
    Host {
        /// Its name.
        host: String,
        /// What it said.
        #[source]
        error: RequestError,
    },
    /// What the user asked for cannot be.
    #[error("{0}")]
    Request(#[from] Error),
    /// The store.
    #[error("the state database failed")]
    Store(#[from] StoreError),
    /// As an earlier life of the process journaled it.
    #[error("{0}")]
    Failed(String),
}

/// For how long something that breaks is tried again while nothing moves.
pub(super) struct Patience {
    least: Duration,
    moved: Instant,
}

impl Patience {
    /// `host_patience_seconds` from now on.
    pub(super) fn new(context: &Context) -> Self {
        let least = Duration::from_secs(context.app.config.host_patience_seconds);
        Self { least, moved: Instant::now() }
    }

    /// It moves.
    pub(super) fn renew(&mut self) {
        self.moved = Instant::now();
    }

    /// Whether it is worth another try.
    pub(super) fn lasts(&self) -> bool {
        self.moved.elapsed() < self.least
    }
}

/// A running operation, to its steps.
pub struct Context {
    /// The coordinator.
    pub app: Shared,
    /// The operation.
    pub operation: OperationId,
    /// What it does.
    pub verb: Verb,
    /// To what.
    pub instance: InstanceId,
}

impl Context {
    /// For an operation as it is in the journal.
    pub fn new(app: &Shared, operation: &Operation) -> Self {
        Self { app: app.clone(), operation: operation.id, verb: operation.verb, instance: operation.instance }
    }

    /// Whether the user wants it stopped.
    pub fn is_cancelled(&self) -> bool {
        self.app.ledger.read(|fleet| fleet.operations.get(&self.operation).is_some_and(|o| o.cancel))
    }

    /// Between two tries of something that must be.
    pub async fn pause(&self) {
        tokio::time::sleep(PAUSE).await;
    }

    /// The instance as it is.
    ///
    /// # Errors
    /// When its record is gone.
    pub fn instance(&self) -> Result<Instance, StepError> {
        let instance = self.app.ledger.read(|fleet| fleet.instances.get(&self.instance).cloned());
        instance.ok_or_else(|| Error::not_found("Instance", self.instance).into())
    }

    /// Changes the instance's record.
    ///
    /// # Errors
    /// When it is gone.
    pub async fn update(&self, change: impl FnOnce(&mut Instance)) -> Result<(), StepError> {
        self.change(|fleet| {
            let mut instance = self.in_fleet(fleet)?.clone();
            change(&mut instance);
            instance.updated_at = now();
            Ok((vec![instance.into()], ()))
        })
        .await
    }

    /// Changes the fleet durably.
    ///
    /// # Errors
    /// What `decide` says, or the store.
    pub async fn change<T>(
        &self,
        decide: impl FnOnce(&Fleet) -> Result<(Vec<Change>, T), StepError>,
    ) -> Result<T, StepError> {
        self.app.ledger.change(decide).await
    }

    /// Changes the fleet by what [`super::place::choose`] says. After a restart it is too early to say that no host has
    /// room while some have not been heard of yet, though they may be well: they are waited for, until they count
    /// as lost.
    ///
    /// # Errors
    /// As [`Self::change`]; [`StepError::Cancelled`].
    pub async fn place<T>(
        &self,
        decide: impl Fn(&Fleet) -> Result<(Vec<Change>, T), StepError>,
    ) -> Result<T, StepError> {
        loop {
            let sought = match self.change(&decide).await {
                Err(StepError::NoRoom(sought)) => sought,
                other => return other,
            };
            // Out of the ledger's lock: others go on meanwhile.
            let refusal = place::why_not(&self.app.ledger, &self.app.config, &sought).await?;
            if self.is_cancelled() {
                return Err(StepError::Cancelled);
            }
            match refusal {
                Some(refusal) if !self.hosts_may_come() => return Err(refusal.into()),
                Some(_) => self.pause().await,
                // A host takes it by now.
                None => self.pause().await,
            }
        }
    }

    /// Whether it is too early to say what hosts there are.
    pub(super) fn hosts_may_come(&self) -> bool {
        let patience = Duration::from_millis(self.app.config.heartbeat_ms) * LOST_AFTER;
        let unheard = |fleet: &Fleet| fleet.hosts.keys().any(|host| !fleet.observed.contains_key(host));
        self.app.agents.age() < patience && self.app.ledger.read(unheard)
    }

    /// Shows what is being done with the instance.
    ///
    /// # Errors
    /// When it is gone.
    pub async fn show(&self, task: Task) -> Result<(), StepError> {
        self.update(|instance| instance.task = Some(task)).await
    }

    /// The instance in a fleet.
    ///
    /// # Errors
    /// When it is gone.
    pub fn in_fleet<'a>(&self, fleet: &'a Fleet) -> Result<&'a Instance, StepError> {
        Ok(fleet.instances.get(&self.instance).ok_or_else(|| Error::not_found("Instance", self.instance))?)
    }

    /// Asks a host, again and again while it does not answer, for `host_patience_seconds`.
    ///
    /// # Errors
    /// [`StepError::Host`], or [`StepError::Cancelled`].
    pub async fn ask(&self, host: HostId, request: AgentRequest) -> Result<AgentReply, StepError> {
        let deadline = Instant::now() + Duration::from_secs(self.app.config.host_patience_seconds);
        loop {
            let call = self.app.agents.call_with(host, request.clone(), |progress| {
                self.app.operations.tell(self.instance, Some(progress));
            });
            match call.await {
                Ok(reply) => return Ok(reply),
                Err(error) if error.is_transient() && Instant::now() < deadline => {
                    if self.is_cancelled() {
                        return Err(StepError::Cancelled);
                    }
                    self.pause().await;
                }
                Err(error) => return Err(self.host_error(host, error)),
            }
        }
    }

    /// Asks a host until it has answered: for undoing and for going on past the point of no return. A host that
    /// was removed from the fleet has nothing left to undo.
    ///
    /// # Errors
    /// [`StepError::Host`] for anything but silence.
    pub async fn insist(&self, host: HostId, request: AgentRequest) -> Result<(), StepError> {
        loop {
            match self.app.agents.call(host, request.clone()).await {
                Ok(_) => return Ok(()),
                Err(error) if error.kind == ErrorKind::NotFound => return Ok(()),
                Err(error) if error.is_transient() => {
                    if !self.app.ledger.read(|fleet| fleet.hosts.contains_key(&host)) {
                        return Ok(());
                    }
                    self.pause().await;
                }
                Err(error) => return Err(self.host_error(host, error)),
            }
        }
    }

    /// A host's error with its name.
    pub fn host_error(&self, host: HostId, error: RequestError) -> StepError {
        StepError::Host { host: self.host_name(host), error }
    }

    /// A host as people know it; its id when it is gone.
    pub fn host_name(&self, host: HostId) -> String {
        let name = self.app.ledger.read(|fleet| fleet.hosts.get(&host).map(|h| h.name.clone()));
        name.unwrap_or_else(|| host.to_string())
    }
}
