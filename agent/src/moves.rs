//! Both ends of what comes to a host whose pool is another one, disks and images: the target's, which waits for it, and
//! the source's, which sends it. The bytes are worker processes' business ([`crate::datapath::disk_stream`]); whether they
//! are needed at all, the pool's ([`Pool::sees_mark`](crate::storage::Pool::sees_mark)).

use crate::datapath::disk_stream::worker::{End, Moved, Stream};
use crate::host::Host;
use crate::hypervisor::Cancel;
use crate::migration::random_token;
use crate::storage::Seen;
use godwit_protocol::disk::{
    DiskArrival, DiskAwaited, DiskDeparture, DiskPart, ImageArrival, ImageDeparture,
};
use godwit_protocol::error::{ErrorKind, RequestError};
use godwit_protocol::id::{HostId, ImageId, InstanceId};
use godwit_protocol::operation::Progress;
use godwit_protocol::request::AgentReply;
use std::collections::HashMap;
use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

/// What comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Cargo {
    /// Of an instance's disk one of its files, one after the other.
    Disk(InstanceId),
    Image(ImageId),
}

impl fmt::Display for Cargo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Disk(instance) => write!(f, "the disk of instance {instance}"),
            Self::Image(image) => write!(f, "image {image}"),
        }
    }
}

/// The moves of this host's disks, and of images.
#[derive(Default)]
pub struct DiskMoves {
    arriving: Mutex<HashMap<Cargo, Arrival>>,
    leaving: Mutex<HashMap<InstanceId, Cancel>>,
}

/// Something that is awaited.
struct Arrival {
    cancel: Cancel,
    thread: JoinHandle<()>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl DiskMoves {
    /// On the target: waits for the disk, in place of an attempt before, unless it is there. Who does not come within a
    /// minute is not waited for. A base is there too when the pool has the bytes of its image.
    ///
    /// # Errors
    /// No room on the pool, no pool, no free port.
    pub fn await_disk(&self, host: &Arc<Host>, wanted: &DiskArrival) -> Result<AgentReply, RequestError> {
        let pool = &host.pool;
        let instance = wanted.instance;
        self.stop_arrival(instance);
        let partial_bytes = match pool.sees_mark(wanted)? {
            Seen::Here => return Ok(AgentReply::DiskHere),
            Seen::Elsewhere { partial_bytes } => partial_bytes,
        };
        if let DiskPart::Base { format, image } = wanted.part
            && pool.hold_base(instance, image, format)?
        {
            return Ok(AgentReply::DiskHere);
        }
        pool.has_room(wanted.used_bytes.saturating_sub(partial_bytes))?;
        self.receive(host, Cargo::Disk(instance), &part(host, instance, wanted.part), wanted.source)
    }

    /// The same for an image, which does not get its name yet.
    ///
    /// # Errors
    /// As [`Self::await_disk`].
    pub fn await_image(&self, host: &Arc<Host>, wanted: &ImageArrival) -> Result<AgentReply, RequestError> {
        let cargo = Cargo::Image(wanted.image);
        self.stop(cargo);
        match host.pool.find_or_await(wanted)? {
            Some(_) => Ok(AgentReply::DiskHere),
            None => self.receive(host, cargo, &host.pool.incoming(wanted.image), wanted.source),
        }
    }

    /// Waits for what is to become `file`.
    fn receive(
        &self,
        host: &Arc<Host>,
        cargo: Cargo,
        file: &Path,
        source: HostId,
    ) -> Result<AgentReply, RequestError> {
        let internal = |error: std::io::Error| RequestError::new(ErrorKind::Internal, error.to_string());
        let token = random_token().map_err(internal)?;
        let end = End {
            program: host.pool.program(),
            dir: &host.config.dir,
            disk: file,
            address: SocketAddr::new(host.migration_listen.ip(), 0),
            peer: source,
            token: &token,
        };
        let (stream, address) = Stream::receive(end)?;
        let cancel = Cancel::default();
        let (taking, stopped) = (host.clone(), cancel.clone());
        let take = move || take(&taking, cargo, stream, &stopped);
        let thread = std::thread::Builder::new().name("disk-arrival".to_owned()).spawn(take);
        let thread = thread.map_err(internal)?;
        let mut arriving = lock(&self.arriving);
        arriving.retain(|_, arrival| !arrival.thread.is_finished());
        arriving.insert(cargo, Arrival { cancel, thread });
        Ok(AgentReply::DiskAwaited(DiskAwaited { address, target: host.id, token }))
    }

    /// On the source: sends one of the files of a disk, and returns when it has its name on the target.
    ///
    /// # Errors
    /// [`ErrorKind::Unavailable`] when the connection or the target broke, [`ErrorKind::Cancelled`]; the disk here is as
    /// it was.
    pub fn send_disk(
        &self,
        host: &Host,
        departure: &DiskDeparture,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Moved, RequestError> {
        let instance = departure.instance;
        let cancel = Cancel::default();
        lock(&self.leaving).insert(instance, cancel.clone());
        let file = part(host, instance, departure.part);
        let sent = send(host, &file, &departure.awaited, progress, &cancel);
        lock(&self.leaving).remove(&instance);
        sent
    }

    /// On the source: sends an image, and returns when all of it is on the target.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] when it is not in this host's pool, and as [`Self::send_disk`].
    pub fn send_image(
        &self,
        host: &Host,
        departure: &ImageDeparture,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Moved, RequestError> {
        // It ends when the target ceases to wait.
        send(host, &host.pool.image(departure.image), &departure.awaited, progress, &Cancel::default())
    }

    /// Stops what moves of an instance's disk; nothing moving is a success.
    pub fn cancel(&self, instance: InstanceId) {
        if let Some(cancel) = lock(&self.leaving).get(&instance) {
            cancel.cancel();
        }
        if let Some(arrival) = lock(&self.arriving).get(&Cargo::Disk(instance)) {
            arrival.cancel.cancel();
        }
    }

    /// The same on the target, and waits until nobody writes any more.
    pub fn stop_arrival(&self, instance: InstanceId) {
        self.stop(Cargo::Disk(instance));
    }

    /// The same for an image.
    pub fn stop_image(&self, image: ImageId) {
        self.stop(Cargo::Image(image));
    }

    fn stop(&self, cargo: Cargo) {
        let arrival = lock(&self.arriving).remove(&cargo);
        if let Some(arrival) = arrival {
            arrival.cancel.cancel();
            // One that panicked writes no more either.
            let _ = arrival.thread.join();
        }
    }
}

/// A file of an instance's disk.
fn part(host: &Host, instance: InstanceId, part: DiskPart) -> PathBuf {
    let paths = host.pool.instance(instance);
    match part {
        DiskPart::Disk => paths.disk,
        DiskPart::Base { format, .. } => paths.base(format),
    }
}

fn send(
    host: &Host,
    file: &Path,
    awaited: &DiskAwaited,
    progress: &mut dyn FnMut(Progress),
    cancel: &Cancel,
) -> Result<Moved, RequestError> {
    let end = End {
        program: host.pool.program(),
        dir: &host.config.dir,
        disk: file,
        address: awaited.address,
        peer: awaited.target,
        token: &awaited.token,
    };
    let mut report = |done_bytes, total_bytes| progress(Progress::Copy { done_bytes, total_bytes });
    let sent = Stream::send(end).and_then(|stream| stream.finish(&mut report, cancel));
    sent.inspect(|moved| tracing::info!(?moved, "{} was sent to host {}", file.display(), awaited.target))
}

/// Waits for an arrival's end. What came of something that did not arrive whole is kept for the next attempt, and goes
/// when there is none.
fn take(host: &Host, cargo: Cargo, stream: Stream, cancel: &Cancel) {
    match stream.finish(&mut |_, _| {}, cancel) {
        Ok(moved) => {
            host.pool.count_arrival(moved.moved_bytes);
            tracing::info!(?moved, "{cargo} has arrived");
        }
        Err(error) => tracing::warn!(%error, "{cargo} has not arrived"),
    }
}
