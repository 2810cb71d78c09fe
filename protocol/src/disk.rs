//! Moving an instance's disk to a host whose pool is another one: what the two hosts are told.

use crate::id::{HostId, InstanceId};
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;
use uuid::Uuid;

/// To the source: put a mark beside the disk, by which the target finds out whether its pool is the same. Each mark is
/// used once, so that no cache of a file system can know its name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskMark {
    /// Whose disk.
    pub instance: InstanceId,
    /// The mark.
    pub mark: Uuid,
}

/// To the target: wait for the disk, unless the mark is seen here and so the disk is there already.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskArrival {
    /// Whose disk.
    pub instance: InstanceId,
    /// The mark that the source has put beside it.
    pub mark: Uuid,
    /// The source; its certificate must say the same.
    pub source: HostId,
    /// Bytes that the disk takes on the source.
    pub used_bytes: u64,
}

/// From the target: where the disk is awaited.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskAwaited {
    /// Address for the encrypted connections.
    pub address: SocketAddr,
    /// The target; its certificate says the same.
    pub target: HostId,
    /// Secret that the connections open with, good for this disk.
    pub token: String,
}

/// To the source: send the disk; answers when it is whole on the target, under its name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskDeparture {
    /// Whose disk.
    pub instance: InstanceId,
    /// What the target said.
    pub awaited: DiskAwaited,
}
