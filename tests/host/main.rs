//! The suite of what needs a real host: root, namespaces, libvirt, QEMU.
//!
//! Run by `cargo xtask test --only host`, which prepares the machine and runs one test at a time: a machine
//! carries one lab.
#![forbid(unsafe_code)]

mod counters;
mod crashes;
mod drains;
mod drift;
mod events;
mod fleet;
mod guest;
mod guests;
mod hypervisor;
mod lab;
mod libvirtd;
mod metrics;
mod migrations;
mod network;
mod races;
mod resizes;
mod storage;
mod trust;
mod tunnels;
mod underlay;
