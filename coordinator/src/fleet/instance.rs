//! Flavors and instances.

use super::Time;
use godwit_protocol::id::{
    HostId, InstanceId, NetworkId, PortId, ProjectId, SecurityGroupId, ServerGroupId, UserId,
};
use godwit_protocol::image::{DiskFormat, ImageSource};
use godwit_protocol::instance::{CpuTopology, InstanceState};
use godwit_protocol::reservation::Reservation;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

/// A size for instances.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Flavor {
    /// Its id, any text.
    pub id: String,
    /// Unique.
    pub name: String,
    /// vCPUs.
    pub vcpus: u32,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// Disk in GiB; 0: as large as the image.
    pub disk_gib: u64,
    /// Seen by every project.
    pub public: bool,
    /// `hw:…` and others.
    pub extra_specs: BTreeMap<String, String>,
    /// For people.
    pub description: Option<String>,
}

/// What the user asked a NIC to be.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum NicRequest {
    /// A new port in this network, perhaps with this address.
    Network(NetworkId, Option<IpAddr>),
    /// This port.
    Port(PortId),
}

/// Where an instance must lie to others.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hints {
    /// The group it is a member of.
    pub group: Option<ServerGroupId>,
    /// Instances of which it must share a host with one, as they lay when it was made.
    pub same_host: Vec<InstanceId>,
    /// Instances whose hosts it must avoid, as they lay when it was made.
    pub different_host: Vec<InstanceId>,
}

/// Where an instance is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum InstanceStatus {
    /// It is being made.
    Building,
    /// It runs, or should.
    Active,
    /// vCPUs are held.
    Paused,
    /// It is switched off.
    Stopped,
    /// It has another flavor or host, and what it had is held until that is confirmed or reverted.
    Resized,
    /// It could not be made, or is not what it should be; the fault says why.
    Error,
}

impl InstanceStatus {
    /// Its name in metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Building => "building",
            Self::Active => "active",
            Self::Paused => "paused",
            Self::Stopped => "stopped",
            Self::Resized => "resized",
            Self::Error => "error",
        }
    }
}

/// What is being done with an instance.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Task {
    /// A place is looked for.
    Placing,
    /// Its disk is copied.
    Copying,
    /// Its ports are made and its networks built.
    Networking,
    /// It is defined and started.
    Spawning,
    /// It starts.
    Starting,
    /// It stops.
    Stopping,
    /// It reboots.
    Rebooting,
    /// It is reset.
    Resetting,
    /// vCPUs are being held.
    Pausing,
    /// vCPUs are being released.
    Resuming,
    /// It moves to another host.
    Migrating,
    /// A place is looked for, for what it is to be.
    ResizePreparing,
    /// It is switched off and leaves.
    ResizeMigrating,
    /// It has left; its networks are built.
    ResizeMigrated,
    /// It is defined and started as what it is to be.
    ResizeFinishing,
    /// It goes back to what it was.
    ResizeReverting,
    /// It is being deleted.
    Deleting,
}

/// Why an instance is in error.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Fault {
    /// For people, host by host where hosts refused.
    pub message: String,
    /// When.
    pub at: Time,
}

/// A user's virtual machine: what is wanted, and what is known of it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Instance {
    /// Its id.
    pub id: InstanceId,
    /// Not unique.
    pub name: String,
    /// For people.
    pub description: Option<String>,
    /// Owner.
    pub project: ProjectId,
    /// Who made it.
    pub user: UserId,
    /// The flavor as it was at creation. Instances of one flavor share it.
    pub flavor: Arc<Flavor>,
    /// The image as it was at creation.
    pub image: ImageSource,
    /// The image's properties at creation.
    pub image_properties: BTreeMap<String, String>,
    /// Size of the disk in bytes.
    pub disk_bytes: u64,
    /// The disk's format, once it is made.
    pub disk_format: Option<DiskFormat>,
    /// CPU topology that the guest sees.
    pub topology: Option<CpuTopology>,
    /// NICs as asked for.
    pub nics: Vec<NicRequest>,
    /// Security groups of the ports that are made for it; none: the project's default group.
    #[serde(default)]
    pub security_groups: Vec<SecurityGroupId>,
    /// Name and text of the SSH key.
    pub key: Option<(String, String)>,
    /// The user's metadata.
    pub metadata: BTreeMap<String, String>,
    /// The user's data, base64 as it came.
    pub user_data: Option<String>,
    /// Where it must run, when the user named a host.
    pub wanted_host: Option<HostId>,
    /// The availability zone that the user asked for.
    #[serde(default)]
    pub wanted_zone: Option<String>,
    /// Where it must lie to other instances.
    #[serde(default)]
    pub hints: Hints,
    /// Where it must not be placed again: hosts that refused this time.
    #[serde(default)]
    pub refused_by: Vec<HostId>,
    /// Where it is in its life.
    pub status: InstanceStatus,
    /// What is being done with it.
    pub task: Option<Task>,
    /// Why it is in error.
    pub fault: Option<Fault>,
    /// Where it is placed.
    pub host: Option<HostId>,
    /// What it holds there.
    pub reservation: Option<Reservation>,
    /// As its host said last.
    pub power: Option<InstanceState>,
    /// It is to go as soon as what runs on it has ended.
    pub delete_wanted: bool,
    /// When.
    pub created_at: Time,
    /// When.
    pub updated_at: Time,
    /// When it first ran.
    pub launched_at: Option<Time>,
}
