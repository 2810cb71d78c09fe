//! Godwit coordinator.
