//! Godwit client.
fn main() {}
