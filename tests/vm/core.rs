//! The part that `cargo xtask test` runs every time.

mod frame;
mod numa;
mod pools;
mod vlans;
