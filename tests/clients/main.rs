//! The suite of the unmodified OpenStack clients: what they print, and what the hosts then carry.
//!
//! Run by `cargo xtask test --only clients`, which prepares the machine and runs one test at a time: a machine
//! carries one lab.
#![forbid(unsafe_code)]

mod fields;
mod fleet;
mod groups;
mod guests;
mod images;
mod networks;
mod refusals;
mod servers;
mod stage;
