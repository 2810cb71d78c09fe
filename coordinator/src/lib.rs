//! Godwit's coordinator: knows what is wanted, places it, drives it. The core is plain state and pure
//! functions; effects (store, agents, API) are at its rim.
#![forbid(unsafe_code)]

pub mod addresses;
pub mod agents;
pub mod api;
pub mod app;
pub mod ca;
pub mod config;
pub mod crash;
pub mod drain;
pub mod drift;
pub mod error;
pub mod events;
pub mod fleet;
pub mod images;
pub mod init;
pub mod inventory_check;
pub mod l2;
pub mod ledger;
pub mod liveness;
pub mod metrics;
pub mod operations;
pub mod placement;
pub mod reconcile;
pub mod renewal;
pub mod store;
pub mod tokens;
pub mod verbs;
