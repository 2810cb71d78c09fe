//! Godwit agent.

pub mod telemetry;
