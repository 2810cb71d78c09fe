//! How far a long request is.

use crate::migration::MigrationProgress;
use serde::{Deserialize, Serialize};

/// Sent by an agent while it works on a request, at most four times a second.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Progress {
    /// A disk is being copied.
    Copy {
        /// Bytes done.
        done_bytes: u64,
        /// Bytes in all.
        total_bytes: u64,
    },
    /// Memory is being sent.
    Migration(MigrationProgress),
}
