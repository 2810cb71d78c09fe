//! The closed set of what a coordinator may ask of an agent, and of what an agent says by itself.

use crate::disk::{
    DiskArrival, DiskAwaited, DiskBase, DiskDeparture, DiskMark, ImageArrival, ImageDeparture,
};
use crate::error::RequestError;
use crate::host::Inventory;
use crate::id::{HostId, ImageId, InstanceId, MigrationId, NetworkId};
use crate::image::{DiskFormat, ImageSource};
use crate::instance::{InstanceReport, InstanceSpec, InstanceState};
use crate::migration::{MigrationOutcome, MigrationSource, MigrationTarget, TargetReady};
use crate::network::{NetworkReported, NetworkWanted};
use crate::operation::Progress;
use crate::reservation::{Drift, Reservation, ReservePlan};
use serde::{Deserialize, Serialize};

/// First message on the channel, from the agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// Versions of the channel that the agent speaks.
    pub versions: Vec<u32>,
    /// Who; the certificate must say the same.
    pub host: HostId,
}

/// The coordinator's answer to [`Hello`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Welcome {
    /// Go on.
    Accepted {
        /// The version chosen.
        version: u32,
        /// Time between heartbeats, in milliseconds.
        heartbeat_ms: u64,
    },
    /// Not this agent, or not this version.
    Rejected {
        /// Why, for the agent's log.
        reason: String,
    },
}

/// A host's whole report. Only the agent raises the generation; older ones are ignored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostReport {
    /// Who.
    pub host: HostId,
    /// Counts up with each report, over restarts.
    pub generation: u64,
    /// What the host is.
    pub inventory: Inventory,
    /// What runs there.
    pub instances: Vec<InstanceReport>,
    /// What is held there.
    pub reservations: Vec<Reservation>,
    /// What is held beside these, by instances that are resized on the same host.
    #[serde(default)]
    pub beside: Vec<Reservation>,
    /// What is not where its reservation says, as last looked at.
    #[serde(default)]
    pub drifts: Vec<Drift>,
    /// What the overlay looks like there.
    pub networks: Vec<NetworkReported>,
}

/// Make `<pool>/instances/<instance>/disk` from an image. Repeating it when the disk is there is a success.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskRequest {
    /// Whose disk.
    pub instance: InstanceId,
    /// From what.
    pub image: ImageSource,
    /// Size that the guest sees, in bytes; at least the image's virtual size.
    pub size_bytes: u64,
}

/// Make the disk of an instance that is off larger, and keep it as it was, whole, until it is known whether the larger
/// one stays. Repeating it when both are there is a success.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GrowRequest {
    /// Whose disk.
    pub instance: InstanceId,
    /// The disk's format.
    pub format: DiskFormat,
    /// Size that the guest is to see, in bytes. A disk that is larger is left so.
    pub size_bytes: u64,
}

/// Everything an agent can be asked. Each may be repeated: the second time changes nothing and answers the same.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AgentRequest {
    /// Send a full report now.
    Report,
    /// Hold exactly this for an instance, or refuse with a [`crate::reservation::Refusal`].
    Reserve(ReservePlan),
    /// Let go of all that an instance holds.
    Release(InstanceId),
    /// Let an instance run by what is held beside, and hold beside what it ran by. It runs by this already: a success.
    Exchange(Reservation),
    /// Let go of what is held beside for an instance.
    ReleaseBeside(InstanceId),
    /// Make an instance's disk.
    CreateDisk(DiskRequest),
    /// Stop making an instance's disk: the request that does so ends with an error, and nothing of the disk stays.
    /// Success where none is made.
    CancelDisk(InstanceId),
    /// Make an instance's disk larger, and keep the old one.
    GrowDisk(GrowRequest),
    /// Put the old disk back that [`AgentRequest::GrowDisk`] kept; none being there is a success.
    RestoreDisk(InstanceId),
    /// Remove the old disk that [`AgentRequest::GrowDisk`] kept.
    DropOldDisk(InstanceId),
    /// Remove an instance's folder on the pool: disk, config drive, console log.
    DeleteDisk(InstanceId),
    /// On the source of a move: mark the disk, so that the target sees whether it is there too.
    MarkDisk(DiskMark),
    /// On the target: wait for the disk, unless it is there.
    AwaitDisk(DiskArrival),
    /// On the source: send the disk.
    SendDisk(Box<DiskDeparture>),
    /// On the host that an instance has left with its disk: remove the instance's folder, unless another host writes to
    /// the disk there.
    LeaveDisk(InstanceId),
    /// Is the image in the pool?
    FindImage(ImageId),
    /// On the target: wait for an image, unless it is there.
    AwaitImage(Box<ImageArrival>),
    /// On the source: send it.
    SendImage(Box<ImageDeparture>),
    /// On the target: prove the image that has come, and give it its name. It has it already: a success.
    SettleImage(Box<ImageArrival>),
    /// Remove what an arrival left; answers as [`AgentRequest::FindImage`].
    DropImage {
        /// Which.
        image: ImageId,
        /// The whole image too, if it is there.
        whole: bool,
    },
    /// Bring a network on this host to the wanted state.
    EnsureNetwork(NetworkWanted),
    /// Take a network off this host.
    RemoveNetwork {
        /// Which.
        network: NetworkId,
        /// Its number.
        vni: u32,
        /// Ordered with [`NetworkWanted::generation`].
        generation: u64,
    },
    /// Write the config drive and define the domain; a defined one is redefined.
    DefineInstance(Box<InstanceSpec>),
    /// Start it; running already is a success.
    StartInstance(InstanceId),
    /// Stop it; stopped already is a success.
    StopInstance {
        /// Which.
        instance: InstanceId,
        /// How long the guest may take to shut down by itself, in milliseconds; then it is switched off.
        grace_ms: u64,
    },
    /// Restart it.
    RebootInstance {
        /// Which.
        instance: InstanceId,
        /// By the reset button; else by asking the guest, then by the button after a minute.
        hard: bool,
    },
    /// Hold or release the vCPUs.
    PauseInstance {
        /// Which.
        instance: InstanceId,
        /// Hold, or release.
        paused: bool,
    },
    /// Switch it off and forget the domain; not being there is a success.
    RemoveInstance(InstanceId),
    /// The last lines of the serial console.
    Console {
        /// Which.
        instance: InstanceId,
        /// How many lines; none: all that is kept, at most 1 MiB.
        lines: Option<u32>,
    },
    /// On the target: get ready.
    PrepareMigration(Box<MigrationTarget>),
    /// On the source: send; answers when the instance runs on the target.
    Migrate(Box<MigrationSource>),
    /// On the source: stop a migration that runs.
    CancelMigration(MigrationId),
    /// On either end: tear down what [`AgentRequest::PrepareMigration`] or [`AgentRequest::Migrate`] set up.
    DiscardMigration {
        /// Which migration.
        migration: MigrationId,
        /// Which instance.
        instance: InstanceId,
    },
    /// What is the domain's state here?
    InstanceState(InstanceId),
    /// Show this certificate (PEM) of the host's own key from now on, in place of one that ends sooner.
    TakeCertificate(String),
}

impl AgentRequest {
    /// Its name in logs, metrics and crash points.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Report => "report",
            Self::Reserve(_) => "reserve",
            Self::Release(_) => "release",
            Self::Exchange(_) => "exchange",
            Self::ReleaseBeside(_) => "release_beside",
            Self::CreateDisk(_) => "create_disk",
            Self::CancelDisk(_) => "cancel_disk",
            Self::GrowDisk(_) => "grow_disk",
            Self::RestoreDisk(_) => "restore_disk",
            Self::DropOldDisk(_) => "drop_old_disk",
            Self::DeleteDisk(_) => "delete_disk",
            Self::MarkDisk(_) => "mark_disk",
            Self::AwaitDisk(_) => "await_disk",
            Self::SendDisk(_) => "send_disk",
            Self::LeaveDisk(_) => "leave_disk",
            Self::FindImage(_) => "find_image",
            Self::AwaitImage(_) => "await_image",
            Self::SendImage(_) => "send_image",
            Self::SettleImage(_) => "settle_image",
            Self::DropImage { .. } => "drop_image",
            Self::EnsureNetwork(_) => "ensure_network",
            Self::RemoveNetwork { .. } => "remove_network",
            Self::DefineInstance(_) => "define_instance",
            Self::StartInstance(_) => "start_instance",
            Self::StopInstance { .. } => "stop_instance",
            Self::RebootInstance { .. } => "reboot_instance",
            Self::PauseInstance { .. } => "pause_instance",
            Self::RemoveInstance(_) => "remove_instance",
            Self::Console { .. } => "console",
            Self::PrepareMigration(_) => "prepare_migration",
            Self::Migrate(_) => "migrate",
            Self::CancelMigration(_) => "cancel_migration",
            Self::DiscardMigration { .. } => "discard_migration",
            Self::InstanceState(_) => "instance_state",
            Self::TakeCertificate(_) => "take_certificate",
        }
    }
}

/// What a request answers when it went well.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AgentReply {
    /// Done; there is nothing to say.
    Done,
    /// To [`AgentRequest::Report`].
    Report(Box<HostReport>),
    /// To [`AgentRequest::CreateDisk`].
    Disk {
        /// Format of the disk that was made.
        format: DiskFormat,
    },
    /// To [`AgentRequest::MarkDisk`].
    DiskMarked {
        /// Bytes that the disk takes, without its base.
        used_bytes: u64,
        /// What it lies on.
        #[serde(default)]
        base: Option<DiskBase>,
    },
    /// To [`AgentRequest::AwaitDisk`]: the pool is the source's, and the disk is there; of a base: it is there, whatever
    /// the pool. To [`AgentRequest::AwaitImage`]: it is there.
    DiskHere,
    /// To [`AgentRequest::AwaitDisk`] and [`AgentRequest::AwaitImage`]: send it.
    DiskAwaited(DiskAwaited),
    /// To [`AgentRequest::FindImage`] and [`AgentRequest::DropImage`].
    Image {
        /// Bytes that it takes; none: it is not there.
        used_bytes: Option<u64>,
    },
    /// To [`AgentRequest::Console`]; bytes that are no UTF-8 are replaced.
    Console(String),
    /// To [`AgentRequest::PrepareMigration`].
    TargetReady(Box<TargetReady>),
    /// To [`AgentRequest::Migrate`].
    Migrated(MigrationOutcome),
    /// To [`AgentRequest::InstanceState`]; none: no such domain here.
    State(Option<InstanceState>),
}

/// One frame of an agent's answer: progress any number of times, then the end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AgentMessage {
    /// It goes on.
    Progress(Progress),
    /// The end.
    Finished(Result<AgentReply, RequestError>),
}

/// Body of `POST /operator/v1/join`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct JoinRequest {
    /// The one-time token.
    pub token: String,
    /// Certificate signing request, PEM. The coordinator takes only its public key.
    pub csr: String,
    /// The host's name, for people.
    pub hostname: String,
}

/// Answer to [`JoinRequest`].
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct JoinReply {
    /// The host's id from now on.
    pub host: HostId,
    /// Its certificate, PEM. Subject alternative name: `<id>.host.godwit`.
    pub certificate: String,
    /// The CA's certificate, PEM.
    pub ca: String,
    /// Where the agent's channel is, `ADDR:PORT`.
    pub agents_address: String,
}
