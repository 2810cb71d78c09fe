//! A pool: a folder with `images/<id>`, `instances/<id>/{disk,config.iso,console.log}` and `cache/`, that an
//! administrator mounts or that is a share which the agent mounts itself.

use super::base::{Base, Overlay};
use super::folder::{Ask, Told};
use super::helper::Helper;
use super::lease::LeaseCall;
use super::mount::{self, Outage, Share};
use super::watch::Watched;
use super::{Gate, StorageError};
use crate::config_drive;
use crate::datapath::Stalls;
use crate::datapath::copy::{CopyReport, journal, partial};
use crate::datapath::digests;
use crate::datapath::worker::{CopyOrder, Options, Worker};
use crate::hypervisor::Cancel;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use godwit_protocol::error::{ErrorKind, RequestError};
use godwit_protocol::host::PoolReport;
use godwit_protocol::id::{HostId, ImageId, InstanceId};
use godwit_protocol::image::DiskFormat;
use godwit_protocol::instance::InstanceSpec;
use godwit_protocol::operation::Progress;
use godwit_protocol::request::DiskRequest;
use prometheus::{IntCounterVec, Opts, Registry};
use serde::Deserialize;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long a small call may take: a server that restarts is back within this.
pub(super) const PATIENCE: Duration = Duration::from_secs(30);

/// How long mounting may take; it may begin while the server starts.
const MOUNT_PATIENCE: Duration = Duration::from_secs(60);

/// Where an instance's files are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InstancePaths {
    /// The folder.
    pub folder: PathBuf,
    /// Its disk.
    pub disk: PathBuf,
    /// Its disk as it was before it was made larger, while it is not decided which of them stays.
    pub old_disk: PathBuf,
    /// Its config drive.
    pub config_drive: PathBuf,
    /// Its serial console's log.
    pub console: PathBuf,
    /// Who may write to the disk.
    pub lease: PathBuf,
}

impl InstancePaths {
    /// Under `pool`.
    pub fn new(pool: &Path, instance: InstanceId) -> Self {
        let folder = pool.join("instances").join(instance.to_string());
        Self {
            disk: folder.join("disk"),
            old_disk: folder.join("disk-old"),
            config_drive: folder.join("config.iso"),
            console: folder.join("console.log"),
            lease: folder.join("lease"),
            folder,
        }
    }

    /// Where the base of an overlay is held.
    pub(crate) fn base(&self, format: DiskFormat) -> PathBuf {
        self.folder.join(format!("base.{}", format.as_str()))
    }

    /// Every name that may be in the folder.
    pub(super) fn all(&self) -> [PathBuf; 16] {
        let [raw, qcow2] = [DiskFormat::Raw, DiskFormat::Qcow2].map(|format| self.base(format));
        [
            partial(&raw),
            journal(&raw),
            raw,
            partial(&qcow2),
            journal(&qcow2),
            qcow2,
            self.lease.clone(),
            self.disk.clone(),
            partial(&self.disk),
            journal(&self.disk),
            self.old_disk.clone(),
            partial(&self.old_disk),
            journal(&self.old_disk),
            self.config_drive.clone(),
            partial(&self.config_drive),
            self.console.clone(),
        ]
    }
}

/// How an instance's disk is made of an image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Disks {
    /// A copy of its own: a reflink where the file system can, else its bytes.
    #[default]
    Copy,
    /// A reflink where the file system can, else an overlay in qcow2 on the image, which costs nothing at first.
    Overlay,
}

/// What an administrator says of a pool, beside its folder.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PoolPolicy {
    /// The share that the agent mounts there.
    pub share: Option<Share>,
    /// How disks are made.
    pub disks: Disks,
    /// What images that no disk lies on any more may take in `cache/`, in bytes.
    pub cache_bytes: u64,
}

/// Who touches the folder.
#[derive(Clone, Debug)]
enum Reach {
    /// A thread with a deadline: the folder is local, or its mount an administrator's.
    Thread(Gate),
    /// A process that can be left behind.
    Helper(Helper),
}

/// A pool. Clones are the same pool.
#[derive(Clone, Debug)]
pub struct Pool {
    path: PathBuf,
    policy: PoolPolicy,
    reach: Reach,
    pub(super) worker: Worker,
    /// What was last seen of it.
    pub(super) watched: Watched,
    /// One mounts at a time; when that failed last.
    mounting: Arc<Mutex<Option<Instant>>>,
    /// Disks that are being made, and what stops them.
    making: Arc<Mutex<HashMap<InstanceId, Cancel>>>,
    copies: IntCounterVec,
    copied_bytes: IntCounterVec,
}

impl Pool {
    /// The pool at `path`, its copies and its state counted in `registry`. Nothing is touched yet.
    ///
    /// # Errors
    /// When `registry` holds such metrics already.
    pub fn new(path: PathBuf, policy: PoolPolicy, registry: &Registry) -> Result<Self, prometheus::Error> {
        let by_method = |name, help| {
            let counter = IntCounterVec::new(Opts::new(name, help), &["method"])?;
            registry.register(Box::new(counter.clone()))?;
            Ok::<_, prometheus::Error>(counter)
        };
        let copies = "Disks copied, by method (reflink, server_side, io_uring, threads, overlay, stream).";
        let bytes = "Bytes of data that disk copies wrote, holes and shared blocks not counted, by method.";
        let reach = match policy.share {
            None => Reach::Thread(Gate::default()),
            Some(_) => Reach::Helper(Helper::new("/proc/self/exe".into())),
        };
        Ok(Self {
            watched: Watched::new(&path, registry)?,
            path,
            policy,
            reach,
            worker: Worker::default().with_stalls(Stalls::new(registry)?),
            mounting: Arc::default(),
            making: Arc::default(),
            copies: by_method("godwit_disk_copies_total", copies)?,
            copied_bytes: by_method("godwit_disk_copy_bytes_total", bytes)?,
        })
    }

    /// The same pool with another program as its worker.
    pub fn with_worker(self, worker: Worker) -> Self {
        let reach = match self.reach {
            Reach::Helper(_) => Reach::Helper(Helper::new(worker.program().to_owned())),
            thread => thread,
        };
        Self { worker, reach, ..self }
    }

    /// The same pool, whose workers remember in `file` what probes of mounts found.
    pub fn with_known(self, file: PathBuf) -> Self {
        Self { worker: self.worker.with_known(file), ..self }
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where an image is.
    pub fn image(&self, image: ImageId) -> PathBuf {
        self.path.join("images").join(image.to_string())
    }

    /// Where an instance's files are.
    pub fn instance(&self, instance: InstanceId) -> InstancePaths {
        InstancePaths::new(&self.path, instance)
    }

    /// What the administrator says of it.
    pub(super) fn policy(&self) -> &PoolPolicy {
        &self.policy
    }

    /// Its sizes; a folder that does not answer within `deadline` is reported as unreachable, with the sizes that it
    /// had. A share that is unmounted for want of use has those too; it is not mounted for a report, which with a server
    /// that is away would take long.
    pub fn report(&self, deadline: Duration) -> PoolReport {
        if !self.watched.is_silent() && self.is_mounted() {
            self.measure(deadline);
        }
        let name = self.path.file_name().map_or_else(|| "pool".into(), |name| name.to_string_lossy());
        let share = self.policy.share.as_ref();
        let (sizes, reachable) = self.watched.last();
        PoolReport {
            name: name.into_owned(),
            path: self.path.to_string_lossy().into_owned(),
            kind: if share.is_some() { "nfs" } else { "dir" }.to_owned(),
            source: share.map(ToString::to_string),
            total_bytes: sizes.total_bytes,
            free_bytes: sizes.free_bytes,
            total_inodes: sizes.total_inodes,
            free_inodes: sizes.free_inodes,
            reachable,
            mark: sizes.mark,
        }
    }

    /// Whether a guest is to stop at an error of its disk: where the server may come back.
    pub fn stops_guests(&self) -> bool {
        self.policy.share.as_ref().is_some_and(|share| share.on_outage == Outage::Softerr)
    }

    /// Looks at its sizes, and remembers them or that there is no answer.
    pub(super) fn measure(&self, deadline: Duration) {
        let seen = match self.reach(deadline, Ask::Measure) {
            Ok(Told::Sizes(sizes)) => Ok(sizes),
            Ok(_) => Err(StorageError::Unreachable(self.path.clone())),
            Err(error) => Err(error),
        };
        self.watched.saw(seen);
    }

    /// Bytes free for root.
    pub(super) fn free_bytes(&self) -> Result<u64, StorageError> {
        match self.touch(PATIENCE, Ask::Measure)? {
            Told::Sizes(sizes) => Ok(sizes.free_bytes),
            _ => Err(StorageError::Unreachable(self.path.clone())),
        }
    }

    /// Whether it is there to be touched; the mount itself is not asked.
    pub(super) fn is_mounted(&self) -> bool {
        let share = self.policy.share.as_ref();
        share.is_none_or(|share| mount::is_mounted(share, &self.path).unwrap_or(false))
    }

    /// Makes sure that it is mounted, for somebody who will use it past us: QEMU.
    ///
    /// # Errors
    /// [`StorageError::WrongMount`], [`StorageError::Mount`], [`StorageError::Unreachable`].
    pub fn ensure(&self) -> Result<(), StorageError> {
        self.watched.touched();
        let Some(share) = &self.policy.share else { return Ok(()) };
        let begun = Instant::now();
        let mut failed = self.mounting.lock().unwrap_or_else(PoisonError::into_inner);
        if mount::is_mounted(share, &self.path)? {
            return Ok(());
        }
        // Who has waited for an attempt that failed does not begin another: with a server that is away, each takes long.
        if failed.is_some_and(|at| at >= begun) {
            return Err(StorageError::Unreachable(self.path.clone()));
        }
        self.ask(MOUNT_PATIENCE, Ask::Mount(share.clone()))
            .inspect_err(|_| *failed = Some(Instant::now()))?;
        tracing::info!("mounted {share} at {}", self.path.display());
        Ok(())
    }

    /// Unmounts a share that nobody uses; it comes back with its next use.
    pub(super) fn unmount(&self) -> Result<(), StorageError> {
        let _one = self.mounting.lock().unwrap_or_else(PoisonError::into_inner);
        if self.ask(PATIENCE, Ask::Unmount)? == Told::Already(true) {
            tracing::info!("unmounted {}, which nobody used", self.path.display());
        }
        Ok(())
    }

    /// Does one thing in the folder, as part of an instance's life.
    pub(super) fn touch(&self, deadline: Duration, ask: Ask) -> Result<Told, StorageError> {
        self.watched.touched();
        self.reach(deadline, ask)
    }

    fn reach(&self, deadline: Duration, ask: Ask) -> Result<Told, StorageError> {
        if !self.is_mounted() {
            self.ensure()?;
        }
        self.ask(deadline, ask)
    }

    fn ask(&self, deadline: Duration, ask: Ask) -> Result<Told, StorageError> {
        let answer = match &self.reach {
            Reach::Thread(gate) => {
                let path = self.path.clone();
                gate.run(deadline, move || super::folder::act(&path, &ask))
            }
            Reach::Helper(helper) => helper.ask(&self.path, deadline, &ask),
        };
        answer.unwrap_or_else(|| Err(StorageError::Unreachable(self.path.clone())))
    }

    /// Makes an instance's disk from an image, by a worker process. A disk that is there already is a success;
    /// after an error or a cancel nothing of it is there.
    ///
    /// # Errors
    /// [`StorageError::NotFound`] for the image, [`StorageError::NoSpace`], [`StorageError::Invalid`] when the
    /// image is larger than the disk or no image of its format, and what the worker says.
    pub fn create_disk(
        &self,
        request: &DiskRequest,
        progress: &mut dyn FnMut(Progress),
        cancel: &Cancel,
    ) -> Result<DiskFormat, StorageError> {
        self.while_making(request.instance, cancel, || self.make_disk(request, progress, cancel))
    }

    /// Does what [`Self::cancel_disk`] stops.
    pub(super) fn while_making<T>(
        &self,
        instance: InstanceId,
        cancel: &Cancel,
        make: impl FnOnce() -> T,
    ) -> T {
        self.making().insert(instance, cancel.clone());
        let made = make();
        self.making().remove(&instance);
        made
    }

    fn making(&self) -> MutexGuard<'_, HashMap<InstanceId, Cancel>> {
        self.making.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Stops the making of an instance's disk, where one is made; it ends as one that was cancelled.
    pub fn cancel_disk(&self, instance: InstanceId) {
        if let Some(cancel) = self.making().get(&instance) {
            cancel.cancel();
        }
    }

    fn make_disk(
        &self,
        request: &DiskRequest,
        progress: &mut dyn FnMut(Progress),
        cancel: &Cancel,
    ) -> Result<DiskFormat, StorageError> {
        let format = request.image.format;
        if request.size_bytes < request.image.virtual_size_bytes {
            return Err(StorageError::Invalid(format!(
                "a disk of {} bytes is too small for image {} of {} bytes",
                request.size_bytes, request.image.image, request.image.virtual_size_bytes
            )));
        }
        let (image, instance) = (request.image.image, request.instance);
        let begun = self.touch(PATIENCE, Ask::BeginDisk { image, instance })?;
        if begun == Told::Already(true) {
            // An overlay that is there tells its own format.
            return Ok(if self.base(instance)?.is_some() { DiskFormat::Qcow2 } else { format });
        }
        if self.policy.disks == Disks::Overlay && self.overlay(request)? {
            return Ok(DiskFormat::Qcow2);
        }
        // Fresh digests are compared wherever the bytes pass; those of an image that was touched since, always.
        let expect = (begun == Told::Suspect).then(|| digests::beside(&self.image(image)));
        let copied = self.check_space(request).and_then(|()| {
            let order = CopyOrder {
                source: self.image(image),
                destination: self.instance(instance).disk,
                format,
                size_bytes: Some(request.size_bytes),
                options: Options { expect, ..Options::default() },
            };
            let mut report = |done_bytes, total_bytes| progress(Progress::Copy { done_bytes, total_bytes });
            self.worker
                .copy(&order, &mut report, cancel)
                .map_err(|error| self.explain(error, request.size_bytes))
        });
        match &copied {
            Ok(report) => self.count(report),
            // Whoever gave it up deletes the instance's folder, when the pool answers again.
            Err(_) if cancel.is_cancelled() && self.watched.is_stalled() => {}
            Err(_) => {
                let cancelled = cancel.is_cancelled();
                self.touch(PATIENCE, Ask::AbandonDisk { instance, cancelled })?;
            }
        }
        copied.map(|_| format)
    }

    /// Makes the disk an overlay; false when the pool has reflinks, which are better.
    fn overlay(&self, request: &DiskRequest) -> Result<bool, StorageError> {
        let order = Overlay {
            instance: request.instance,
            image: request.image.image,
            format: request.image.format,
            size_bytes: request.size_bytes,
            cache_bytes: self.policy.cache_bytes,
        };
        match self.touch(PATIENCE, Ask::Overlay(order)) {
            Ok(_) => {
                self.copies.with_label_values(&["overlay"]).inc();
                Ok(true)
            }
            Err(error) if error.says_reflinks() => Ok(false),
            Err(error) => {
                self.touch(PATIENCE, Ask::AbandonDisk { instance: request.instance, cancelled: false })?;
                Err(error)
            }
        }
    }

    /// What the instance's disk lies on; none when it is no overlay.
    ///
    /// # Errors
    /// [`StorageError::Unreachable`], [`StorageError::Io`].
    pub fn base(&self, instance: InstanceId) -> Result<Option<Base>, StorageError> {
        match self.touch(PATIENCE, Ask::Base(instance))? {
            Told::Base(base) => Ok(base),
            _ => Ok(None),
        }
    }

    /// Makes the disk this host's to write to.
    ///
    /// # Errors
    /// [`StorageError::Held`] when it is another host's.
    pub fn claim(&self, instance: InstanceId, host: HostId) -> Result<(), StorageError> {
        self.touch(PATIENCE, Ask::Lease { instance, call: LeaseCall::Claim(host) }).map(drop)
    }

    /// Gives the disk back; not having it is a success.
    ///
    /// # Errors
    /// [`StorageError::Unreachable`], [`StorageError::Io`].
    pub fn release(&self, instance: InstanceId, host: HostId) -> Result<(), StorageError> {
        self.touch(PATIENCE, Ask::Lease { instance, call: LeaseCall::Release(host) }).map(drop)
    }

    /// Gives the disk to the host that the instance has moved to.
    ///
    /// # Errors
    /// [`StorageError::Held`] when it is a third host's.
    pub fn hand_over(&self, instance: InstanceId, from: HostId, to: HostId) -> Result<(), StorageError> {
        self.touch(PATIENCE, Ask::Lease { instance, call: LeaseCall::HandOver(from, to) }).map(drop)
    }

    pub(super) fn count(&self, report: &CopyReport) {
        let method = [report.method.as_str()];
        self.copies.with_label_values(&method).inc();
        self.copied_bytes.with_label_values(&method).inc_by(report.data_bytes);
    }

    /// Counts a disk that came from another host.
    pub fn count_arrival(&self, received_bytes: u64) {
        self.copies.with_label_values(&["stream"]).inc();
        self.copied_bytes.with_label_values(&["stream"]).inc_by(received_bytes);
    }

    /// The program of workers.
    pub fn program(&self) -> &Path {
        self.worker.program()
    }

    fn check_space(&self, request: &DiskRequest) -> Result<(), StorageError> {
        let have_bytes = self.free_bytes()?;
        if request.size_bytes <= have_bytes {
            return Ok(());
        }
        Err(StorageError::NoSpace { pool: self.path.clone(), need_bytes: request.size_bytes, have_bytes })
    }

    /// A worker's "no space", with figures.
    pub(super) fn explain(&self, error: RequestError, need_bytes: u64) -> StorageError {
        if error.kind != ErrorKind::NoSpace {
            return StorageError::Worker(error);
        }
        match self.free_bytes() {
            Ok(have_bytes) => StorageError::NoSpace { pool: self.path.clone(), need_bytes, have_bytes },
            Err(_) => StorageError::Worker(error),
        }
    }

    /// Removes an instance's folder: the names that are ours, then the folder. Symbolic links are removed, never
    /// followed; not being there is a success.
    ///
    /// # Errors
    /// [`StorageError::Unexpected`] when the folder is none or holds something else, which is left alone.
    pub fn delete_disk(&self, instance: InstanceId) -> Result<(), StorageError> {
        self.touch(PATIENCE, Ask::Delete(instance)).map(drop)
    }

    /// Writes an instance's config drive, whole or not at all; an older one is replaced.
    ///
    /// # Errors
    /// [`StorageError::Invalid`] when it cannot be built, [`StorageError::Unreachable`], [`StorageError::Io`].
    pub fn write_config_drive(&self, spec: &InstanceSpec) -> Result<(), StorageError> {
        let image = config_drive::build(spec)
            .map_err(|error| StorageError::Invalid(godwit_protocol::error::chain(&error)))?;
        let image = STANDARD.encode(image);
        self.touch(PATIENCE, Ask::ConfigDrive { instance: spec.instance, image }).map(drop)
    }

    /// The last `lines` of the serial console, all of the last MiB when none are named. Bytes that are no UTF-8
    /// are replaced; a guest that never ran has said nothing.
    ///
    /// # Errors
    /// [`StorageError::Unreachable`], [`StorageError::Io`].
    pub fn console(&self, instance: InstanceId, lines: Option<u32>) -> Result<String, StorageError> {
        let tail = match self.touch(PATIENCE, Ask::Console(instance))? {
            Told::Bytes(tail) => STANDARD.decode(tail).map_err(|e| StorageError::Invalid(e.to_string()))?,
            _ => Vec::new(),
        };
        let text = String::from_utf8_lossy(&tail);
        Ok(match lines {
            Some(lines) => last_lines(&text, lines as usize).to_owned(),
            None => text.into_owned(),
        })
    }
}

/// The last `count` lines; a last line without its end counts.
fn last_lines(text: &str, count: usize) -> &str {
    if count == 0 {
        return "";
    }
    let body = text.strip_suffix('\n').unwrap_or(text);
    match body.rmatch_indices('\n').nth(count - 1) {
        Some((position, _)) => &text[position + 1..],
        None => text,
    }
}

#[cfg(test)]
mod tests;
