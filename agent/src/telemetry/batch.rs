//! A hash map read at once: one call of the kernel for thousands of entries, where walking from key to key takes two for
//! each. (BPF_MAP_LOOKUP_BATCH, Linux 5.6.)
//!
//! The kernel reads bucket by bucket, each under its lock: an entry that is there all the time is read once.
#![allow(unsafe_code)]

use super::TelemetryError;
use super::shared::map_error;
use aya::Pod;
use aya::maps::{IterableMap, MapError};
use aya::sys::SyscallError;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

/// Entries that are asked for at a time; a bucket must fit.
const ENTRIES: u32 = 4096;

/// `BPF_MAP_LOOKUP_BATCH` (linux/bpf.h).
const LOOKUP_BATCH: libc::c_long = 24;

/// What the kernel takes of `union bpf_attr` for it.
#[repr(C)]
struct Attributes {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map_fd: u32,
    elem_flags: u64,
    flags: u64,
}

/// Hands every entry of a hash map, with one value, to `take`.
pub(super) fn each<K: Pod, V: Pod, R>(
    map: &impl IterableMap<K, R>,
    name: &'static str,
    mut take: impl FnMut(K, &V),
) -> Result<(), TelemetryError> {
    walk(map.map().fd().as_fd(), 1, |key, values: &[V]| take(key, &values[0]))
        .map_err(|error| failed(name, error))
}

/// Hands every entry of a hash map to `take`, with the values of all CPUs.
pub(super) fn each_per_cpu<K: Pod, V: Pod, R>(
    map: &impl IterableMap<K, R>,
    name: &'static str,
    take: impl FnMut(K, &[V]),
) -> Result<(), TelemetryError> {
    // The kernel keeps each CPU's value in whole words.
    const { assert!(size_of::<V>().is_multiple_of(8)) };
    let cpus = aya::util::nr_cpus().map_err(|(_, error)| failed(name, error))?;
    walk(map.map().fd().as_fd(), cpus, take).map_err(|error| failed(name, error))
}

fn failed(name: &'static str, io_error: io::Error) -> TelemetryError {
    map_error(name, MapError::SyscallError(SyscallError { call: "bpf_map_lookup_batch", io_error }))
}

fn walk<K: Pod, V: Pod>(map: BorrowedFd<'_>, cpus: usize, mut take: impl FnMut(K, &[V])) -> io::Result<()> {
    let (mut at, mut next) = (0_u32, 0_u32);
    let mut is_first = true;
    let mut room = ENTRIES;
    let (mut keys, mut values) = (Vec::<K>::new(), Vec::<V>::new());
    loop {
        keys.clear();
        values.clear();
        keys.reserve_exact(room as usize);
        values.reserve_exact(room as usize * cpus);
        let mut attributes = Attributes {
            in_batch: if is_first { 0 } else { &raw const at as u64 },
            out_batch: &raw mut next as u64,
            keys: keys.as_mut_ptr() as u64,
            values: values.as_mut_ptr() as u64,
            count: room,
            map_fd: map.as_raw_fd() as u32,
            elem_flags: 0,
            flags: 0,
        };
        // SAFETY: all that the attributes point to is valid for the call and has room for `count` entries.
        let done = unsafe {
            libc::syscall(libc::SYS_bpf, LOOKUP_BATCH, &raw mut attributes, size_of::<Attributes>())
        };
        let error = if done < 0 { Some(io::Error::last_os_error()) } else { None };
        match error.as_ref().and_then(io::Error::raw_os_error) {
            // A bucket has more entries than there is room for.
            Some(libc::ENOSPC) => {
                room = room.saturating_mul(2);
                continue;
            }
            None | Some(libc::ENOENT) => {}
            Some(libc::EINTR) => continue,
            Some(_) => return Err(error.unwrap_or_else(io::Error::last_os_error)),
        }
        let count = attributes.count as usize;
        // SAFETY: the kernel has written so many entries, and every bit pattern is a value of these types.
        unsafe {
            keys.set_len(count);
            values.set_len(count * cpus);
        }
        for (key, values) in keys.iter().zip(values.chunks_exact(cpus)) {
            take(*key, values);
        }
        if error.is_some() {
            // It was the last.
            return Ok(());
        }
        (at, is_first) = (next, false);
    }
}
