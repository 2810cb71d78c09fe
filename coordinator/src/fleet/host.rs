//! Hosts and the tokens they join with.

use super::Time;
use godwit_protocol::host::Inventory;
use godwit_protocol::id::{HostId, UserId};
use godwit_protocol::request::HostReport;
use serde::{Deserialize, Serialize};

/// A machine with an agent.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Host {
    /// Its id.
    pub id: HostId,
    /// A small number for old clients.
    pub number: u64,
    /// Unique.
    pub name: String,
    /// New instances may be placed there.
    pub enabled: bool,
    /// Why not.
    pub disabled_reason: Option<String>,
    /// Its instances are being moved away; nothing new is placed there meanwhile.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drain: Option<Drain>,
    /// What it is, as it said last.
    pub inventory: Option<Inventory>,
    /// When it joined.
    pub joined_at: Time,
    /// Digest of the public key in its certificate, hexadecimal SHA-256: a replaced certificate is refused.
    pub key_digest: String,
}

impl Host {
    /// Whether new instances may be placed there, as far as people say.
    pub fn is_open(&self) -> bool {
        self.enabled && self.drain.is_none()
    }

    /// Why not, for people.
    pub fn closed_reason(&self) -> Option<&str> {
        let drained = self.drain.as_ref().map(|_| "its servers are being moved away (godwit host drain)");
        self.disabled_reason.as_deref().or(drained)
    }
}

/// That a host is to be emptied.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Drain {
    /// Since when.
    pub since: Time,
    /// Instances that are on their way at once, at least 1.
    pub at_once: u32,
    /// Who wants it; the migrations are theirs.
    pub user: UserId,
}

/// What a host said last. Not durable.
#[derive(Clone, Debug)]
pub struct Observed {
    /// The newest report.
    pub report: Option<HostReport>,
    /// When the newest sign of life came.
    pub seen_at: Time,
    /// Whether its channel is open.
    pub connected: bool,
    /// When it was last sent what made it differ from what is wanted.
    pub repaired_at: Option<Time>,
    /// Whether it is about to be sent that again.
    pub repair_due: bool,
    /// Why its newest inventory was not taken in.
    pub contradiction: Option<String>,
}

impl Observed {
    /// A host that was just heard of.
    pub fn at(now: Time) -> Self {
        Self {
            report: None,
            seen_at: now,
            connected: false,
            repaired_at: None,
            repair_due: false,
            contradiction: None,
        }
    }
}

/// A one-time token to join with.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct JoinToken {
    /// SHA-256 of the token, hexadecimal; the token itself is kept nowhere.
    pub hash: String,
    /// After this it is worth nothing.
    pub expires_at: Time,
    /// Who used it.
    pub used_by: Option<HostId>,
}
