//! The suite of what needs another kernel than this machine's: NFS, several NUMA cells, broken disks, delays.
//!
//! Run by `cargo xtask test --only vm`, which prepares the machine. `cargo xtask test` runs what is in [`core`].
#![forbid(unsafe_code)]

mod core;
mod faults;
mod fleet;
mod held;
mod meanwhile;
mod nfs;
mod overlays;
mod release;
mod shares;
