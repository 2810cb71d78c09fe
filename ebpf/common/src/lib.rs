//! What Godwit's eBPF programs and its agent share: the layout of the maps, and the parsing of packets, which
//! is written over [`packet::Frame`] so that the same code runs in the kernel and in tests.
#![no_std]
#![deny(unsafe_code)]
#![warn(missing_docs)]

pub mod answer;
pub mod filter;
pub mod guest;
pub mod packet;
pub mod port;
pub mod tables;
pub mod underlay;
