//! Security groups and their rules.

use super::Time;
use godwit_protocol::id::{ProjectId, SecurityGroupId, SecurityRuleId};
use godwit_protocol::security::{Direction, Family, Remote};
use serde::{Deserialize, Serialize};

/// A named set of rules that ports can have.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SecurityGroup {
    /// Its id.
    pub id: SecurityGroupId,
    /// Not unique, but for `default`.
    pub name: String,
    /// For people.
    pub description: String,
    /// Owner.
    pub project: ProjectId,
    /// Whether it is the one that the project's ports have when none is named.
    pub is_default: bool,
    /// Whether answers to what the rules let pass do so too.
    pub stateful: bool,
    /// Labels.
    #[serde(default)]
    pub tags: Vec<String>,
    /// Counts up with each change by users.
    pub revision: u64,
    /// When.
    pub created_at: Time,
    /// When.
    pub updated_at: Time,
}

/// Something that may pass at ports that have the group. Rules are made and removed, never changed.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SecurityRule {
    /// Its id.
    pub id: SecurityRuleId,
    /// Its group.
    pub group: SecurityGroupId,
    /// Owner.
    pub project: ProjectId,
    /// For people.
    pub description: String,
    /// Which way the connection is opened.
    pub direction: Direction,
    /// Of which family.
    pub family: Family,
    /// IANA's number of the protocol; none: any.
    pub protocol: Option<u8>,
    /// The protocol as its user wrote it.
    pub protocol_text: Option<String>,
    /// Destination ports, or type and code of ICMP, by the protocol.
    pub range: (Option<u16>, Option<u16>),
    /// Where the other end is.
    pub remote: Remote,
    /// When.
    pub created_at: Time,
}
