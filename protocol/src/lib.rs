//! What Godwit's agent and coordinator say to each other: the nouns, the requests, the frames and the
//! QUIC channel they travel on. It imports nothing of ours, and only [`quic`] does I/O.
#![forbid(unsafe_code)]

pub mod digests;
pub mod disk;
pub mod error;
pub mod event;
pub mod frame;
pub mod host;
pub mod id;
pub mod image;
pub mod instance;
pub mod migration;
pub mod network;
pub mod operation;
pub mod port;
pub mod quic;
pub mod request;
pub mod reservation;
pub mod security;
pub mod volume;

/// The channel's version: offered in the hello, the current and the previous one are accepted.
pub const VERSION: u32 = 1;
