//! Operations as they are journaled.

use super::Time;
use godwit_protocol::id::{InstanceId, MigrationId, OperationId};
use serde::{Deserialize, Serialize};

/// What an operation does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verb {
    /// Make an instance.
    CreateInstance,
    /// Delete it.
    DeleteInstance,
    /// Start it.
    StartInstance,
    /// Stop it.
    StopInstance,
    /// Reboot it.
    RebootInstance {
        /// By the reset button.
        hard: bool,
    },
    /// Hold or release its vCPUs.
    PauseInstance {
        /// Hold.
        paused: bool,
    },
    /// Move it while it runs.
    LiveMigrate {
        /// The migration's record.
        migration: MigrationId,
    },
    /// Move it while it is switched off.
    MigrateInstance {
        /// The migration's record.
        migration: MigrationId,
    },
    /// Give it another flavor.
    ResizeInstance {
        /// The migration's record.
        migration: MigrationId,
    },
    /// Let go of what it was before.
    ConfirmResize {
        /// The migration's record.
        migration: MigrationId,
    },
    /// Make it what it was before.
    RevertResize {
        /// The migration's record.
        migration: MigrationId,
    },
}

impl Verb {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::CreateInstance => "create_instance",
            Self::DeleteInstance => "delete_instance",
            Self::StartInstance => "start_instance",
            Self::StopInstance => "stop_instance",
            Self::RebootInstance { .. } => "reboot_instance",
            Self::PauseInstance { .. } => "pause_instance",
            Self::LiveMigrate { .. } => "live_migrate",
            Self::MigrateInstance { .. } => "migrate_instance",
            Self::ResizeInstance { .. } => "resize_instance",
            Self::ConfirmResize { .. } => "confirm_resize",
            Self::RevertResize { .. } => "revert_resize",
        }
    }
}

/// Which way an operation goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Forward.
    Running,
    /// Backward, after a failure or a cancellation.
    Undoing,
    /// It did what it should.
    Succeeded,
    /// It did not; everything is undone.
    Failed,
}

impl Phase {
    /// Its name in the API and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Undoing => "undoing",
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
        }
    }
}

/// An operation in the journal.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Operation {
    /// Its id.
    pub id: OperationId,
    /// What it does.
    pub verb: Verb,
    /// To what.
    pub instance: InstanceId,
    /// Which way it goes.
    pub phase: Phase,
    /// Forward: the first step not known to be done. Backward: steps below it are still to be undone.
    pub cursor: usize,
    /// The name of the step at the cursor, for people.
    pub step: String,
    /// It is to stop at the next step and undo, unless it is past its point of no return.
    pub cancel: bool,
    /// Why it failed.
    pub error: Option<String>,
    /// When it was asked for.
    pub created_at: Time,
    /// When it last went on.
    pub updated_at: Time,
}

impl Operation {
    /// Whether it has not ended.
    pub fn is_running(&self) -> bool {
        matches!(self.phase, Phase::Running | Phase::Undoing)
    }
}
