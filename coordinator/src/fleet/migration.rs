//! Migrations: moves of instances from host to host, and resizes, which may stay where they are.

use super::Time;
use super::instance::Flavor;
use godwit_protocol::id::{HostId, InstanceId, MigrationId, ProjectId, UserId};
use godwit_protocol::instance::CpuTopology;
use godwit_protocol::migration::{MigrationOutcome, TargetReady};
use godwit_protocol::reservation::Reservation;
use serde::{Deserialize, Serialize};
use std::sync::Arc;

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
    /// A resize: the instance is on the target, and its place on the source is still held.
    Finished,
    /// A resize: the place on the source is being let go of.
    Confirming,
    /// A resize: the instance is on its way back.
    Reverting,
    /// The instance runs on the target.
    Completed,
    /// A resize: nothing is left of what was before.
    Confirmed,
    /// A resize: the instance is as it was before.
    Reverted,
    /// It runs on the source as before.
    Failed,
    /// It was stopped on request; the instance runs on the source.
    Cancelled,
}

/// How an instance moves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MigrationKind {
    /// While it runs.
    #[default]
    Live,
    /// Switched off, with the flavor that it has.
    Cold,
    /// Switched off, to another flavor.
    Resize,
}

/// What an instance's flavor makes of it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Shape {
    /// The flavor.
    pub flavor: Arc<Flavor>,
    /// Size of the disk in bytes.
    pub disk_bytes: u64,
    /// CPU topology that the guest sees.
    pub topology: Option<CpuTopology>,
}

/// What a resize, or a move of an instance that is switched off, changes, and what it would go back to.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Resize {
    /// Before.
    pub old: Shape,
    /// After.
    pub new: Shape,
    /// What it held on the source, and holds until it is confirmed.
    pub old_reservation: Reservation,
    /// Whether it ran when it was asked for.
    pub ran: bool,
}

impl Migration {
    /// Whether something moves: not a resize that waits for its owner's word.
    pub fn is_moving(&self) -> bool {
        self.status.is_running() && self.status != MigrationStatus::Finished
    }
}

impl Resize {
    /// Whether the disk is made larger.
    pub fn grows(&self) -> bool {
        self.new.disk_bytes > self.old.disk_bytes
    }
}

impl MigrationStatus {
    /// Whether it has not ended: it holds places on two hosts, or two on one.
    pub fn is_running(self) -> bool {
        matches!(
            self,
            Self::Queued
                | Self::Preparing
                | Self::Running
                | Self::Finished
                | Self::Confirming
                | Self::Reverting
        )
    }
}

/// A migration, or a resize, of one instance.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Migration {
    /// Its id.
    pub id: MigrationId,
    /// A small number, which clients use.
    pub number: u64,
    /// How it moves.
    #[serde(default)]
    pub kind: MigrationKind,
    /// What changes, unless it moves while it runs.
    #[serde(default)]
    pub resize: Option<Resize>,
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
    /// Whether the disk goes to another pool: it is on both from when the target waits for it.
    #[serde(default)]
    pub disk_moves: bool,
    /// Where it is.
    pub status: MigrationStatus,
    /// What it was, when completed.
    pub outcome: Option<MigrationOutcome>,
    /// When the target was seen to run it, or the record was moved there.
    pub switched_at: Option<Time>,
    /// Why it failed.
    pub error: Option<String>,
    /// When.
    pub created_at: Time,
    /// When.
    pub updated_at: Time,
}
