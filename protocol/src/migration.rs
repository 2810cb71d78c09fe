//! Live migration: what the two hosts are told and what they measured.

use crate::id::{InstanceId, MigrationId};
use crate::instance::InstanceSpec;
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;

/// To the target: get ready to receive.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MigrationTarget {
    /// Which migration.
    pub migration: MigrationId,
    /// The instance, with its reservation on the target.
    pub spec: InstanceSpec,
}

/// From the target: where the source sends, and what the domain will be there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TargetReady {
    /// Address for the encrypted streams.
    pub address: SocketAddr,
    /// Subject name of the target's certificate.
    pub server_name: String,
    /// libvirt's description of the domain with the target's pinning.
    pub domain_xml: String,
    /// Secret that a stream opens with; it names the migration's sockets on the target.
    pub stream_token: String,
}

/// To the source: send.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MigrationSource {
    /// Which migration.
    pub migration: MigrationId,
    /// Which instance.
    pub instance: InstanceId,
    /// What the target said.
    pub target: TargetReady,
    /// Longest pause of the vCPUs, in milliseconds; it may rise in steps up to this.
    pub max_downtime_ms: u64,
    /// Limit in MiB a second; none: as fast as the link.
    pub bandwidth_mib_s: Option<u64>,
}

/// How far a migration is. Bytes, as QEMU counts them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MigrationProgress {
    /// Memory of the guest.
    pub memory_total_bytes: u64,
    /// Sent.
    pub memory_processed_bytes: u64,
    /// Left; it can rise while the guest dirties pages.
    pub memory_remaining_bytes: u64,
    /// Passes over the memory so far.
    pub iterations: u64,
}

/// What a finished migration was.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MigrationOutcome {
    /// From the first byte to the last, in milliseconds.
    pub total_ms: u64,
    /// Pause of the vCPUs by libvirt's count, in milliseconds.
    pub downtime_ms: u64,
    /// The last progress.
    pub progress: MigrationProgress,
}
