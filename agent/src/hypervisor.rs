//! What runs guests: the trait, and what its two implementations share. [`libvirt`] is the real one,
//! [`fake`] the simulator's.

pub mod domain_xml;
mod events;
pub mod fake;
mod kvm_proof;
mod library;
pub mod libvirt;
pub mod pins;
mod raw;

use crate::storage::Base;
use godwit_protocol::error::{ErrorKind, RequestError};
use godwit_protocol::host::{Cell, HypervisorInfo};
use godwit_protocol::id::InstanceId;
use godwit_protocol::instance::{InstanceReport, InstanceSpec, InstanceState};
use godwit_protocol::migration::{MigrationOutcome, MigrationProgress};
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// What a hypervisor does for the agent. All calls block, some for minutes: none belongs on an async thread.
pub trait Hypervisor: Send + Sync {
    /// Versions, and whether KVM was proven. The proof runs once and is cached.
    ///
    /// # Errors
    /// [`HypervisorError::Unavailable`].
    fn info(&self) -> Result<HypervisorInfo, HypervisorError>;

    /// Every domain of ours, with its state.
    ///
    /// # Errors
    /// [`HypervisorError::Unavailable`].
    fn list(&self) -> Result<Vec<InstanceReport>, HypervisorError>;

    /// A domain's state; none when there is no such domain.
    ///
    /// # Errors
    /// [`HypervisorError::Unavailable`].
    fn state(&self, instance: InstanceId) -> Result<Option<InstanceState>, HypervisorError>;

    /// Defines the domain; one that is defined already is redefined. A running one keeps running as it is.
    ///
    /// # Errors
    /// [`HypervisorError::Rejected`] when the hypervisor does not take the description.
    fn define(&self, spec: &InstanceSpec, context: &DomainContext) -> Result<(), HypervisorError>;

    /// The taps that must be there before a defined domain starts.
    ///
    /// # Errors
    /// [`HypervisorError::NotFound`].
    fn taps(&self, instance: InstanceId) -> Result<BTreeSet<String>, HypervisorError>;

    /// Starts a defined domain; running already is a success, and a paused one stays paused.
    ///
    /// # Errors
    /// [`HypervisorError::NotFound`], [`HypervisorError::Failed`].
    fn start(&self, instance: InstanceId) -> Result<(), HypervisorError>;

    /// Asks the guest to shut down, and after `grace` switches it off. Stopped already is a success.
    ///
    /// # Errors
    /// [`HypervisorError::NotFound`], [`HypervisorError::Failed`].
    fn stop(&self, instance: InstanceId, grace: Duration) -> Result<(), HypervisorError>;

    /// Restarts it: `hard` by the reset button, else by asking the guest, and by the button when a minute later it
    /// has not gone down. A stopped one is started.
    ///
    /// # Errors
    /// [`HypervisorError::NotFound`], [`HypervisorError::Failed`].
    fn reboot(&self, instance: InstanceId, hard: bool) -> Result<(), HypervisorError>;

    /// Holds or releases the vCPUs; already so is a success.
    ///
    /// # Errors
    /// [`HypervisorError::NotFound`], [`HypervisorError::Conflict`] when it does not run.
    fn pause(&self, instance: InstanceId, paused: bool) -> Result<(), HypervisorError>;

    /// Switches it off and forgets the domain; not being there is a success.
    ///
    /// # Errors
    /// [`HypervisorError::Unavailable`], [`HypervisorError::Failed`].
    fn remove(&self, instance: InstanceId) -> Result<(), HypervisorError>;

    /// Removes a domain that arrived by a broken migration: not one that runs, nor one that is defined here.
    ///
    /// # Errors
    /// [`HypervisorError::Unavailable`], [`HypervisorError::Failed`].
    fn discard_incoming(&self, instance: InstanceId) -> Result<(), HypervisorError>;

    /// On a migration's target: the description of the domain with this host's pinning.
    ///
    /// # Errors
    /// [`HypervisorError::Conflict`] when the domain runs here already.
    fn prepare(&self, spec: &InstanceSpec, context: &DomainContext) -> Result<String, HypervisorError>;

    /// On a migration's source: sends the domain through the sockets of `route` and returns when it runs on the
    /// target and is forgotten here. After an error it runs here as before. `progress` is called about four times
    /// a second.
    ///
    /// # Errors
    /// [`HypervisorError::NotFound`] when it is not here (any more), [`HypervisorError::Conflict`] when it does not
    /// run, [`HypervisorError::Cancelled`], [`HypervisorError::Failed`].
    fn migrate(
        &self,
        instance: InstanceId,
        route: &MigrationRoute,
        progress: &mut dyn FnMut(MigrationProgress),
        cancel: &Cancel,
    ) -> Result<MigrationOutcome, HypervisorError>;

    /// The CPUs that the hypervisor was told for each vCPU of a domain that runs; none when it does not run. vCPUs
    /// that it was told nothing of are left out.
    ///
    /// # Errors
    /// [`HypervisorError::Unavailable`].
    fn vcpu_pins(
        &self,
        instance: InstanceId,
    ) -> Result<Option<BTreeMap<u32, BTreeSet<u32>>>, HypervisorError>;

    /// Calls `listener` for each later event, from a thread of the hypervisor's own; it must not block.
    fn subscribe(&self, listener: Listener);
}

/// Takes events.
pub type Listener = Arc<dyn Fn(Event) + Send + Sync>;

/// What a hypervisor says by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// The state of an instance may have changed; ask for it.
    Changed(InstanceId),
    /// The hypervisor answers (again); anything may have changed.
    Connected,
    /// It does not answer any more. Guests go on.
    Disconnected,
}

/// What a domain's description needs to know of the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DomainContext {
    /// The pool's folder.
    pub pool: PathBuf,
    /// The host's cells, with their shared CPUs and distances.
    pub cells: Vec<Cell>,
    /// Whether a guest's memory is bound to its cells.
    pub memory_binding: MemoryBinding,
    /// What the disk lies on, where it is an overlay.
    pub base: Option<Base>,
    /// Whether the guest stops at a disk error and does not see it: on a share whose server may come back.
    pub stop_on_error: bool,
}

/// Whether a guest's memory is bound to the host's cells.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Deserialize, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum MemoryBinding {
    /// Strictly: a guest whose cell is full does not start.
    #[default]
    Strict,
    /// Not at all, for labs whose kernel has not the cells that are described.
    None,
}

/// Whether guests may use KVM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Deserialize, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Virtualization {
    /// KVM where it is proven to work, else emulation.
    #[default]
    Auto,
    /// Emulation.
    Tcg,
}

/// How a migration leaves its source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MigrationRoute {
    /// Unix socket on the source that leads to the target's libvirt.
    pub libvirt_socket: PathBuf,
    /// Unix socket on both hosts for QEMU's stream.
    pub memory_socket: PathBuf,
    /// The domain as the target described it.
    pub target_xml: String,
    /// Longest pause of the vCPUs, in milliseconds; it rises in steps up to this.
    pub max_downtime_ms: u64,
    /// Limit in MiB a second; none: as fast as it goes.
    pub bandwidth_mib_s: Option<u64>,
}

/// Stops a long call from another thread. Clones are the same handle.
#[derive(Clone, Debug, Default)]
pub struct Cancel(Arc<AtomicBool>);

impl Cancel {
    /// Asks the call to stop. It may still succeed if it was past its point of no return.
    pub fn cancel(&self) {
        self.0.store(true, Ordering::Release);
    }

    /// Whether somebody asked.
    pub fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

/// Why a hypervisor did not do it.
#[derive(Debug, thiserror::Error)]
pub enum HypervisorError {
    /// The daemon does not answer. It is asked again at the next call.
    #[error("libvirtd does not answer on {uri}; start it, guests are not affected")]
    Unavailable {
        /// Where it was expected.
        uri: String,
        /// What it said.
        #[source]
        source: Cause,
    },
    /// No such domain here.
    #[error("instance {0} has no domain on this host")]
    NotFound(InstanceId),
    /// The domain's state does not allow it.
    #[error("{0}")]
    Conflict(String),
    /// The description is not taken.
    #[error("the hypervisor rejects the description of instance {instance}")]
    Rejected {
        /// Whose.
        instance: InstanceId,
        /// What it said.
        #[source]
        source: Cause,
    },
    /// It was cancelled.
    #[error("cancelled")]
    Cancelled,
    /// Anything else.
    #[error("cannot {action} instance {instance}")]
    Failed {
        /// `start`, `stop`, …
        action: &'static str,
        /// Which.
        instance: InstanceId,
        /// What it said.
        #[source]
        source: Cause,
    },
}

/// What the hypervisor itself said.
pub type Cause = Box<dyn std::error::Error + Send + Sync>;

impl From<HypervisorError> for RequestError {
    fn from(error: HypervisorError) -> Self {
        let kind = match &error {
            HypervisorError::Unavailable { .. } => ErrorKind::Unavailable,
            HypervisorError::NotFound(_) => ErrorKind::NotFound,
            HypervisorError::Conflict(_) => ErrorKind::Conflict,
            HypervisorError::Rejected { .. } => ErrorKind::Invalid,
            HypervisorError::Cancelled => ErrorKind::Cancelled,
            HypervisorError::Failed { .. } => ErrorKind::Internal,
        };
        RequestError::new(kind, godwit_protocol::error::chain(&error))
    }
}
