//! The lab and the test guest: what the suites, the demo and the benchmarks run on.
//!
//! This library imports none of Godwit's crates. It starts their programs, as a user would.
#![forbid(unsafe_code)]

pub mod guest_image;
pub mod lab;
pub mod vm;

use std::path::{Path, PathBuf};

/// The folder of built programs that the running one belongs to, such as target/debug.
pub fn programs_folder() -> PathBuf {
    let program = std::env::current_exe().unwrap_or_default();
    // target/debug/xtask, or target/debug/deps/host-0123456789abcdef
    let folder = program.ancestors().skip(1).find(|folder| !folder.ends_with("deps"));
    folder.unwrap_or(Path::new("/")).to_path_buf()
}

/// Cargo's target folder: the one that the running program was built into.
pub fn target_folder() -> PathBuf {
    programs_folder().parent().unwrap_or(Path::new("/")).to_path_buf()
}
