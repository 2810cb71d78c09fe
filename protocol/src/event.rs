//! What a host tells of rare things, one by one. It is telemetry: bounded everywhere, the oldest dropped first.

use crate::id::HostId;
use crate::port::Mac;
use crate::request::HostReport;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::net::IpAddr;

/// Most events in one batch.
pub const MAX_BATCH: usize = 256;

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EventKind {
    /// Somebody claimed an address that somebody else is known to have.
    Conflict,
    /// A guest sent from what is not its own; the packet was dropped.
    Spoof,
    /// Another host sent here for a station that has left.
    Stale,
    /// Another host sent for a network that is not here.
    UnknownVni,
    /// A pool's server does not answer any more.
    PoolStalled,
    /// A pool that stood still answers again.
    PoolBack,
    /// An image's data on the pool is not what was uploaded; the coordinator's own word.
    ImageDamaged,
}

impl EventKind {
    /// Every kind; those that the programs in the kernel tell of come first, in the order of their numbers there.
    pub const ALL: [Self; 7] = [
        Self::Conflict,
        Self::Spoof,
        Self::Stale,
        Self::UnknownVni,
        Self::PoolStalled,
        Self::PoolBack,
        Self::ImageDamaged,
    ];

    /// Its name.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Conflict => "conflict",
            Self::Spoof => "spoof",
            Self::Stale => "stale",
            Self::UnknownVni => "unknown_vni",
            Self::PoolStalled => "pool_stalled",
            Self::PoolBack => "pool_back",
            Self::ImageDamaged => "image_damaged",
        }
    }
}

impl fmt::Display for EventKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// One event. What does not apply is none.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostEvent {
    /// Counts up by one with each event of a run of the agent, dropped ones included.
    pub sequence: u64,
    /// When, in milliseconds since 1970.
    pub at_ms: u64,
    /// What happened.
    pub kind: EventKind,
    /// VXLAN network identifier; 0 of what is about no network.
    pub vni: u32,
    /// The tap of the port on the host.
    pub tap: Option<String>,
    /// The Ethernet address that sent, or that left.
    pub mac: Option<Mac>,
    /// The one that is known to have the address.
    pub owner: Option<Mac>,
    /// The IP address in question.
    pub address: Option<IpAddr>,
    /// The other host's VTEP.
    pub peer: Option<IpAddr>,
    /// Of a spoof: in what way, as in the metric `godwit_port_drops_total`. Of a damaged image: which, and how.
    pub reason: Option<String>,
    /// The folder of the pool.
    #[serde(default)]
    pub pool: Option<String>,
}

impl HostEvent {
    /// What became at `at_ms` of the pool in the folder `pool`. Its number is given when it is queued.
    pub fn of_pool(kind: EventKind, at_ms: u64, pool: String) -> Self {
        Self {
            sequence: 0,
            at_ms,
            kind,
            vni: 0,
            tap: None,
            mac: None,
            owner: None,
            address: None,
            peer: None,
            reason: None,
            pool: Some(pool),
        }
    }
}

/// Events in their order. A batch may be told twice; its events have the same numbers then.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EventBatch {
    /// Who.
    pub host: HostId,
    /// Which run of the agent: another after each start.
    pub run: u64,
    /// At most [`MAX_BATCH`].
    pub events: Vec<HostEvent>,
}

/// What an agent says by itself, on a stream of its own. Tagged from outside: serde reads the other kinds of enum through
/// a buffer in which JSON's keys cannot be numbers, and a report has maps by CPU and by cell.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AgentNote {
    /// What happened.
    Events(EventBatch),
    /// What the host is.
    Report(Box<HostReport>),
}
