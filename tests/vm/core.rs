//! The part that `cargo xtask test` runs every time.

mod frame;
mod numa;
mod outage;
mod pools;
mod vlans;
