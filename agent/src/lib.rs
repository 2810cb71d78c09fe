//! Godwit agent.

pub mod calls;
pub mod config;
pub mod crash;
pub mod hypervisor;
pub mod join;
pub mod network;
pub mod report;
pub mod reservations;
pub mod state;
pub mod storage;
pub mod telemetry;
pub mod uplink;
pub mod config_drive;
pub mod datapath;
