//! Godwit agent.
fn main() {}
