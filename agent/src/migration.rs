//! Both halves of a live migration: the target's, which waits for streams, and the source's, which sends them.
//!
//! QEMU and libvirt speak to unix sockets only; [`crate::datapath::stream`] carries those between the hosts. A
//! socket's path is the same on both: the source listens on it, and on the target QEMU does.

use crate::datapath::stream::{Carried, Destination, Session, Sockets, StreamError, Streams};
use crate::hypervisor::{Cancel, DomainContext, Hypervisor, HypervisorError, MigrationRoute};
use godwit_protocol::error::{ErrorKind, RequestError, chain};
use godwit_protocol::id::{HostId, InstanceId, MigrationId};
use godwit_protocol::migration::{MigrationOutcome, MigrationSource, MigrationTarget, TargetReady};
use godwit_protocol::operation::Progress;
use godwit_protocol::quic::{Identity, host_name};
use prometheus::{IntCounterVec, Opts, Registry};
use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Read};
use std::net::SocketAddr;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Bytes of a stream's secret.
const TOKEN_BYTES: usize = 32;

/// Users that QEMU runs as on common distributions, when it does not run as root.
const QEMU_USERS: [&str; 2] = ["libvirt-qemu", "qemu"];

/// Where libvirtd listens when its URI does not say: the one daemon, or QEMU's own.
const LIBVIRT_SOCKETS: [&str; 2] = ["/run/libvirt/libvirt-sock", "/run/libvirt/virtqemud-sock"];

/// What migrations need to know of the host.
#[derive(Clone, Debug)]
pub struct MigrationSettings {
    /// The host's certificate and key.
    pub identity: Arc<Identity>,
    /// The host's id, which is in its certificate.
    pub host: HostId,
    /// Where streams of other hosts are accepted.
    pub listen: SocketAddr,
    /// How libvirtd is reached.
    pub libvirt_uri: String,
    /// Folder for the sockets, the same path on all hosts; `/run/godwit/migrations`.
    pub folder: PathBuf,
}

/// Why a migration was not made or prepared.
#[derive(Debug, thiserror::Error)]
pub enum MigrationError {
    /// The hypervisor's reason.
    #[error(transparent)]
    Hypervisor(#[from] HypervisorError),
    /// The hypervisor failed because a stream did: worth another try.
    #[error("{failure}")]
    Broken {
        /// Of the streams.
        failure: String,
        /// Of the hypervisor.
        #[source]
        source: HypervisorError,
    },
    /// Streams cannot be had.
    #[error(transparent)]
    Stream(#[from] StreamError),
    /// The sockets' folder cannot be made or removed.
    #[error("cannot {action} {path}")]
    Folder {
        /// `create` or `remove`.
        action: &'static str,
        /// Which.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// It is under way already.
    #[error("migration {0} is under way")]
    UnderWay(MigrationId),
    /// It does not run here.
    #[error("migration {0} does not run on this host")]
    NotRunning(MigrationId),
}

impl From<MigrationError> for RequestError {
    fn from(error: MigrationError) -> Self {
        let text = chain(&error);
        let kind = match error {
            MigrationError::Hypervisor(error) => return error.into(),
            // Not worth the same request again: the other end has dropped what it was prepared for.
            MigrationError::Broken { .. } | MigrationError::Stream(_) => ErrorKind::Internal,
            MigrationError::Folder { .. } => ErrorKind::Internal,
            MigrationError::UnderWay(_) => ErrorKind::Conflict,
            MigrationError::NotRunning(_) => ErrorKind::NotFound,
        };
        RequestError::new(kind, text)
    }
}

/// The migrations of this host.
pub struct Migrations {
    settings: MigrationSettings,
    hypervisor: Arc<dyn Hypervisor>,
    /// Started at the first migration: an idle host keeps neither thread nor port for it.
    streams: Mutex<Option<Arc<Streams>>>,
    carried: IntCounterVec,
    incoming: Mutex<HashMap<MigrationId, Incoming>>,
    outgoing: Mutex<HashMap<MigrationId, Cancel>>,
}

/// What a target has prepared. Dropped in this order: no stream reaches for a socket that is gone.
struct Incoming {
    ready: TargetReady,
    _session: Session,
    _folder: SocketFolder,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Migrations {
    /// Migrations of the guests of `hypervisor`, their bytes counted in `registry`. Sockets that a killed agent
    /// left are removed: their streams died with it.
    ///
    /// # Errors
    /// When `registry` holds such metrics already.
    pub fn new(
        settings: MigrationSettings,
        hypervisor: Arc<dyn Hypervisor>,
        registry: &Registry,
    ) -> Result<Self, prometheus::Error> {
        let help = "Bytes of migration streams, before encryption, by direction (sent, received).";
        let carried =
            IntCounterVec::new(Opts::new("godwit_migration_stream_bytes_total", help), &["direction"])?;
        registry.register(Box::new(carried.clone()))?;
        if let Err(error) = remove_folder(&settings.folder) {
            tracing::warn!("sockets of an earlier run stay: {}", chain(&error));
        }
        Ok(Self {
            settings,
            hypervisor,
            streams: Mutex::default(),
            carried,
            incoming: Mutex::default(),
            outgoing: Mutex::default(),
        })
    }

    /// On the target: makes sure that the instance can come, and waits for its streams. Repeated, it answers the
    /// same.
    ///
    /// # Errors
    /// [`MigrationError::Hypervisor`] when the instance runs here already, [`MigrationError::Stream`].
    pub fn prepare(
        &self,
        target: &MigrationTarget,
        context: &DomainContext,
    ) -> Result<TargetReady, MigrationError> {
        let mut incoming = lock(&self.incoming);
        if let Some(prepared) = incoming.get(&target.migration) {
            return Ok(prepared.ready.clone());
        }
        let domain_xml = self.hypervisor.prepare(&target.spec, context)?;
        let streams = self.streams()?;
        let folder = SocketFolder::create(self.folder(target.migration))?;
        let stream_token = random_token().map_err(folder_error("draw a secret for", &folder.0))?;
        let sockets = Sockets { libvirt: self.libvirt_socket(), memory: folder.sockets().memory };
        let session = streams.await_streams(stream_token.clone(), sockets);
        let ready = TargetReady {
            address: streams.address(),
            server_name: host_name(self.settings.host),
            domain_xml,
            stream_token,
        };
        let prepared = Incoming { ready: ready.clone(), _session: session, _folder: folder };
        incoming.insert(target.migration, prepared);
        Ok(ready)
    }

    /// On the source: sends the instance and returns when it runs on the target. After an error it runs here as
    /// before, unless it is not here at all, which [`ErrorKind::NotFound`] says: ask the target then.
    ///
    /// # Errors
    /// [`MigrationError::Hypervisor`], [`MigrationError::Broken`], [`MigrationError::Stream`],
    /// [`MigrationError::UnderWay`].
    pub fn migrate(
        &self,
        source: &MigrationSource,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<MigrationOutcome, MigrationError> {
        let cancel = Cancel::default();
        if lock(&self.outgoing).contains_key(&source.migration) {
            return Err(MigrationError::UnderWay(source.migration));
        }
        lock(&self.outgoing).insert(source.migration, cancel.clone());
        let outcome = self.send(source, progress, &cancel);
        lock(&self.outgoing).remove(&source.migration);
        outcome
    }

    fn send(
        &self,
        source: &MigrationSource,
        progress: &mut dyn FnMut(Progress),
        cancel: &Cancel,
    ) -> Result<MigrationOutcome, MigrationError> {
        let folder = SocketFolder::create(self.folder(source.migration))?;
        let sockets = folder.sockets();
        let destination = Destination {
            address: source.target.address,
            server_name: source.target.server_name.clone(),
            token: source.target.stream_token.clone(),
        };
        let session = self.streams()?.send_streams(&sockets, destination)?;
        let route = MigrationRoute {
            libvirt_socket: sockets.libvirt,
            memory_socket: sockets.memory,
            target_xml: source.target.domain_xml.clone(),
            max_downtime_ms: source.max_downtime_ms,
            bandwidth_mib_s: source.bandwidth_mib_s,
        };
        let mut report = |figures| progress(Progress::Migration(figures));
        let outcome = self.hypervisor.migrate(source.instance, &route, &mut report, cancel);
        let failure = session.failure();
        outcome.map_err(|source| match (failure, source) {
            (Some(failure), source @ HypervisorError::Failed { .. }) => {
                MigrationError::Broken { failure, source }
            }
            (_, source) => source.into(),
        })
    }

    /// On the source: asks a migration that runs to stop; [`Self::migrate`] then answers.
    ///
    /// # Errors
    /// [`MigrationError::NotRunning`].
    pub fn cancel(&self, migration: MigrationId) -> Result<(), MigrationError> {
        let outgoing = lock(&self.outgoing);
        outgoing.get(&migration).ok_or(MigrationError::NotRunning(migration))?.cancel();
        Ok(())
    }

    /// On either end: takes down what the migration has set up here. A guest that runs goes on.
    ///
    /// # Errors
    /// [`MigrationError::Hypervisor`], [`MigrationError::Folder`]; it may be repeated.
    pub fn discard(&self, migration: MigrationId, instance: InstanceId) -> Result<(), MigrationError> {
        if let Some(cancel) = lock(&self.outgoing).get(&migration) {
            cancel.cancel();
        }
        lock(&self.incoming).remove(&migration);
        remove_folder(&self.folder(migration))?;
        Ok(self.hypervisor.discard_incoming(instance)?)
    }

    fn streams(&self) -> Result<Arc<Streams>, StreamError> {
        let mut streams = lock(&self.streams);
        if let Some(streams) = &*streams {
            return Ok(streams.clone());
        }
        let carried = Carried {
            sent: self.carried.with_label_values(&["sent"]),
            received: self.carried.with_label_values(&["received"]),
        };
        let started = Arc::new(Streams::start(&self.settings.identity, self.settings.listen, carried)?);
        Ok(streams.insert(started).clone())
    }

    fn folder(&self, migration: MigrationId) -> PathBuf {
        self.settings.folder.join(migration.to_string())
    }

    fn libvirt_socket(&self) -> PathBuf {
        let uri = &self.settings.libvirt_uri;
        if let Some((_, path)) = uri.split_once("socket=") {
            return path.split('&').next().unwrap_or(path).into();
        }
        let there = LIBVIRT_SOCKETS.iter().find(|path| Path::new(path).exists());
        there.unwrap_or(&LIBVIRT_SOCKETS[0]).into()
    }
}

fn folder_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> MigrationError {
    let path = path.to_owned();
    move |source| MigrationError::Folder { action, path, source }
}

/// One migration's folder, which goes with it. Only root and QEMU may enter: what connects to its sockets is on its
/// way into a guest's memory.
struct SocketFolder(PathBuf);

impl SocketFolder {
    fn create(path: PathBuf) -> Result<Self, MigrationError> {
        let folder = Self(path);
        folder.make().map_err(folder_error("create", &folder.0))?;
        Ok(folder)
    }

    fn make(&self) -> io::Result<()> {
        if let Some(parent) = self.0.parent() {
            fs::create_dir_all(parent)?;
        }
        match fs::DirBuilder::new().mode(0o700).create(&self.0) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        let qemu = QEMU_USERS.iter().find_map(|name| nix::unistd::User::from_name(name).ok().flatten());
        match qemu.filter(|_| nix::unistd::geteuid().is_root()) {
            Some(qemu) => std::os::unix::fs::chown(&self.0, Some(qemu.uid.as_raw()), None),
            None => Ok(()),
        }
    }

    fn sockets(&self) -> Sockets {
        Sockets { libvirt: self.0.join("libvirt.sock"), memory: self.0.join("memory.sock") }
    }
}

impl Drop for SocketFolder {
    fn drop(&mut self) {
        // A folder that stays is removed at the agent's next start.
        if let Err(error) = remove_folder(&self.0) {
            tracing::warn!("{}", chain(&error));
        }
    }
}

fn remove_folder(folder: &Path) -> Result<(), MigrationError> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(folder_error("remove", folder)(error)),
        _ => Ok(()),
    }
}

/// A secret to open streams with.
pub(crate) fn random_token() -> io::Result<String> {
    let mut bytes = [0; TOKEN_BYTES];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(hex::encode(bytes))
}

#[cfg(test)]
mod tests;
