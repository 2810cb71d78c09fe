//! Instances as the hosts run them.

use crate::id::InstanceId;
use crate::image::DiskFormat;
use crate::port::GuestPort;
use crate::reservation::Reservation;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// All that a host must know to define and start an instance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InstanceSpec {
    /// Which; also the domain's UUID.
    pub instance: InstanceId,
    /// The user's name for it.
    pub name: String,
    /// What it holds on the host it is sent to.
    pub reservation: Reservation,
    /// Sockets, cores and threads that the guest sees; none: one core a socket.
    pub topology: Option<CpuTopology>,
    /// How its threads and memory are treated.
    #[serde(default)]
    pub tuning: Tuning,
    /// Format of `<pool>/instances/<id>/disk`.
    pub disk_format: DiskFormat,
    /// NICs in order.
    pub ports: Vec<GuestPort>,
    /// What the config drive says.
    pub config_drive: ConfigDrive,
}

/// How an instance's threads and memory are treated, beside where they are.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tuning {
    /// The emulator's threads float over the host's shared CPUs; else they stay on the vCPUs' CPUs, or on CPUs of
    /// their own where the reservation has some.
    pub emulator_shares: bool,
    /// vCPUs that run in real time.
    pub realtime_vcpus: BTreeSet<u32>,
    /// The guest's memory is never swapped out.
    pub locked_memory: bool,
}

/// A guest's CPU topology; the product is the number of vCPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuTopology {
    /// Sockets.
    pub sockets: u32,
    /// Cores a socket.
    pub cores: u32,
    /// Threads a core.
    pub threads: u32,
}

/// What the guest reads from its config drive, beside its ports.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConfigDrive {
    /// Host name inside the guest.
    pub hostname: String,
    /// SSH public keys by name.
    pub public_keys: BTreeMap<String, String>,
    /// The user's metadata.
    pub metadata: BTreeMap<String, String>,
    /// The user's data, decoded.
    pub user_data: Option<Vec<u8>>,
    /// Availability zone.
    pub availability_zone: String,
}

/// A domain's state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum InstanceState {
    /// vCPUs run.
    Running,
    /// vCPUs are held.
    Paused,
    /// Defined, not running.
    Stopped,
    /// The guest or QEMU went down by itself.
    Crashed,
    /// It arrives by a migration and does not run yet.
    Incoming,
}

/// An instance as its host reports it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InstanceReport {
    /// Which.
    pub instance: InstanceId,
    /// Its state.
    pub state: InstanceState,
}
