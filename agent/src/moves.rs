//! Both ends of a disk's move to a host whose pool is another one: the target's, which waits for the disk, and the
//! source's, which sends it. The bytes are worker processes' business ([`crate::datapath::disk_stream`]); whether they
//! are needed at all, the pool's ([`Pool::sees_mark`](crate::storage::Pool::sees_mark)).

use crate::datapath::disk_stream::worker::{End, Moved, Stream};
use crate::host::Host;
use crate::hypervisor::Cancel;
use crate::migration::random_token;
use crate::storage::Seen;
use godwit_protocol::disk::{DiskArrival, DiskAwaited, DiskDeparture};
use godwit_protocol::error::{ErrorKind, RequestError};
use godwit_protocol::id::InstanceId;
use godwit_protocol::operation::Progress;
use godwit_protocol::request::AgentReply;
use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

/// The moves of this host's disks.
#[derive(Default)]
pub struct DiskMoves {
    arriving: Mutex<HashMap<InstanceId, Arrival>>,
    leaving: Mutex<HashMap<InstanceId, Cancel>>,
}

/// A disk that is awaited.
struct Arrival {
    cancel: Cancel,
    thread: JoinHandle<()>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl DiskMoves {
    /// On the target: waits for the disk, in place of an attempt before, unless it is there. Who does not come within a
    /// minute is not waited for.
    ///
    /// # Errors
    /// No room on the pool, no pool, no free port.
    pub fn await_disk(&self, host: &Arc<Host>, wanted: &DiskArrival) -> Result<AgentReply, RequestError> {
        let pool = &host.pool;
        let instance = wanted.instance;
        self.stop_arrival(instance);
        match pool.sees_mark(wanted)? {
            Seen::Here => return Ok(AgentReply::DiskHere),
            Seen::Elsewhere { partial_bytes } => {
                pool.has_room(wanted.used_bytes.saturating_sub(partial_bytes))?;
            }
        }
        let internal = |error: std::io::Error| RequestError::new(ErrorKind::Internal, error.to_string());
        let token = random_token().map_err(internal)?;
        let end = End {
            program: pool.program(),
            dir: &host.config.dir,
            disk: &pool.instance(instance).disk,
            address: SocketAddr::new(host.migration_listen.ip(), 0),
            peer: wanted.source,
            token: &token,
        };
        let (stream, address) = Stream::receive(end)?;
        let cancel = Cancel::default();
        let (taking, stopped) = (host.clone(), cancel.clone());
        let take = move || take(&taking, instance, stream, &stopped);
        let thread = std::thread::Builder::new().name("disk-arrival".to_owned()).spawn(take);
        let thread = thread.map_err(internal)?;
        let mut arriving = lock(&self.arriving);
        arriving.retain(|_, arrival| !arrival.thread.is_finished());
        arriving.insert(instance, Arrival { cancel, thread });
        Ok(AgentReply::DiskAwaited(DiskAwaited { address, target: host.id, token }))
    }

    /// On the source: sends the disk, and returns when it has its name on the target.
    ///
    /// # Errors
    /// [`ErrorKind::Unavailable`] when the connection or the target broke, [`ErrorKind::Cancelled`],
    /// [`ErrorKind::Conflict`] for a disk that is not whole by itself; the disk here is as it was.
    pub fn send_disk(
        &self,
        host: &Host,
        departure: &DiskDeparture,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Moved, RequestError> {
        let (instance, awaited) = (departure.instance, &departure.awaited);
        if host.pool.base(instance)?.is_some() {
            let text = "the disk is an overlay on an image of this pool, without which it is nothing: such a disk \
                        moves only within its pool. Choose a host of the pool, or make the server anew where \
                        agent.toml says disks = \"copy\"";
            return Err(RequestError::new(ErrorKind::Conflict, text));
        }
        let cancel = Cancel::default();
        lock(&self.leaving).insert(instance, cancel.clone());
        let end = End {
            program: host.pool.program(),
            dir: &host.config.dir,
            disk: &host.pool.instance(instance).disk,
            address: awaited.address,
            peer: awaited.target,
            token: &awaited.token,
        };
        let mut report = |done_bytes, total_bytes| progress(Progress::Copy { done_bytes, total_bytes });
        let sent = Stream::send(end).and_then(|stream| stream.finish(&mut report, &cancel));
        lock(&self.leaving).remove(&instance);
        sent.inspect(|moved| tracing::info!(%instance, ?moved, "a disk was sent to host {}", awaited.target))
    }

    /// Stops what moves of an instance's disk; nothing moving is a success.
    pub fn cancel(&self, instance: InstanceId) {
        if let Some(cancel) = lock(&self.leaving).get(&instance) {
            cancel.cancel();
        }
        if let Some(arrival) = lock(&self.arriving).get(&instance) {
            arrival.cancel.cancel();
        }
    }

    /// The same on the target, and waits until nobody writes any more.
    pub fn stop_arrival(&self, instance: InstanceId) {
        let arrival = lock(&self.arriving).remove(&instance);
        if let Some(arrival) = arrival {
            arrival.cancel.cancel();
            // One that panicked writes no more either.
            let _ = arrival.thread.join();
        }
    }
}

/// Waits for an arrival's end. What came of a disk that did not arrive whole is kept for the next attempt, and goes with
/// the instance's folder when there is none.
fn take(host: &Host, instance: InstanceId, stream: Stream, cancel: &Cancel) {
    match stream.finish(&mut |_, _| {}, cancel) {
        Ok(moved) => {
            host.pool.count_arrival(moved.moved_bytes);
            tracing::info!(%instance, ?moved, "a disk has arrived");
        }
        Err(error) => tracing::warn!(%instance, %error, "a disk has not arrived"),
    }
}
