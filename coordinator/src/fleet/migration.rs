//! Live migrations.

use super::Time;
use godwit_protocol::id::{HostId, InstanceId, MigrationId, ProjectId, UserId};
use godwit_protocol::migration::{MigrationOutcome, TargetReady};
use godwit_protocol::reservation::Reservation;
use serde::{Deserialize, Serialize};

/// Where a migration is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MigrationStatus {
    /// Accepted.
    Queued,
    /// The target gets ready.
    Preparing,
    /// Memory is sent.
    Running,
    /// The instance runs on the target.
    Completed,
    /// It runs on the source as before.
    Failed,
    /// It was stopped on request; the instance runs on the source.
    Cancelled,
}

impl MigrationStatus {
    /// Whether it has not ended.
    pub fn is_running(self) -> bool {
        matches!(self, Self::Queued | Self::Preparing | Self::Running)
    }
}

/// A migration of one instance.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Migration {
    /// Its id.
    pub id: MigrationId,
    /// A small number, which clients use.
    pub number: u64,
    /// What moves.
    pub instance: InstanceId,
    /// The instance's owner.
    pub project: ProjectId,
    /// Who asked.
    pub user: UserId,
    /// From.
    pub source: HostId,
    /// Where the user wants it.
    pub wanted_target: Option<HostId>,
    /// Targets that refused.
    #[serde(default)]
    pub refused_by: Vec<HostId>,
    /// To, once placed.
    pub target: Option<HostId>,
    /// What it holds on the target.
    pub reservation: Option<Reservation>,
    /// What the target said when it was ready.
    pub ready: Option<TargetReady>,
    /// Where it is.
    pub status: MigrationStatus,
    /// What it was, when completed.
    pub outcome: Option<MigrationOutcome>,
    /// When the target was seen to run it.
    pub switched_at: Option<Time>,
    /// Why it failed.
    pub error: Option<String>,
    /// When.
    pub created_at: Time,
    /// When.
    pub updated_at: Time,
}
