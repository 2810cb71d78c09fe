//! Godwit's agent: it alone knows what runs on its host.
//!
//! [`daemon`] puts the parts together. [`uplink`] takes the coordinator's requests to [`calls`], which orders them;
//! [`agent`] does them. [`report`] tells what the host is by [`host`], [`instances`] and [`reservations`].

pub mod agent;
pub mod calls;
pub mod config;
pub mod config_drive;
pub mod crash;
pub mod daemon;
pub mod datapath;
pub mod drift;
pub mod events;
pub mod guest_process;
pub mod host;
pub mod huge_pages;
pub mod hypervisor;
pub mod identity;
pub mod instances;
pub mod inventory;
pub mod join;
mod kernel_numbers;
pub mod locality;
pub mod metrics;
pub mod migration;
pub mod moves;
pub mod network;
pub mod report;
pub mod reservations;
pub mod state;
pub mod storage;
pub mod telemetry;
pub mod uplink;
