//! Images on their way to other pools: one flight for each image and pool, however many wait for it.

use crate::fleet::image::ImageCopy;
use godwit_protocol::id::InstanceId;
use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

/// All flights of this process.
#[derive(Default)]
pub struct Flights(Mutex<HashMap<String, Weak<Flight>>>);

/// An image's way to a pool.
#[derive(Default)]
pub struct Flight {
    /// Who has it brings the image, or removes it; one at a time.
    pub turn: tokio::sync::Mutex<()>,
    waiting: Mutex<BTreeSet<InstanceId>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Flights {
    /// The flight of a copy. It is gone when nobody holds it.
    pub fn of(&self, copy: &ImageCopy) -> Arc<Flight> {
        let mut flights = lock(&self.0);
        flights.retain(|_, flight| flight.strong_count() > 0);
        let key = copy.map_key();
        if let Some(flight) = flights.get(&key).and_then(Weak::upgrade) {
            return flight;
        }
        let flight = Arc::<Flight>::default();
        flights.insert(key, Arc::downgrade(&flight));
        flight
    }
}

impl Flight {
    /// Counts an instance among those who wait, until the answer is dropped.
    pub fn join(&self, instance: InstanceId) -> Waiting<'_> {
        lock(&self.waiting).insert(instance);
        Waiting { flight: self, instance }
    }

    /// Who waits, the one whose turn it is included.
    pub fn waiting(&self) -> Vec<InstanceId> {
        lock(&self.waiting).iter().copied().collect()
    }
}

/// That an instance waits for an image.
pub struct Waiting<'a> {
    flight: &'a Flight,
    instance: InstanceId,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        lock(&self.flight.waiting).remove(&self.instance);
    }
}
