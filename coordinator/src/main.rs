//! Godwit coordinator.
fn main() {}
