//! The lab and the test guest: what the suites, the demo and the benchmarks run on.
//!
//! This library imports none of Godwit's crates. It starts their programs, as a user would.
#![forbid(unsafe_code)]

pub mod guest_image;
pub mod lab;

use std::path::{Path, PathBuf};

/// Cargo's target folder: the one that this program, or test, was built into.
pub fn target_folder() -> PathBuf {
    let program = std::env::current_exe().unwrap_or_default();
    // target/debug/xtask, target/debug/deps/host-0123456789abcdef
    let profile = program.ancestors().skip(1).find(|folder| !folder.ends_with("deps"));
    profile.and_then(Path::parent).unwrap_or(Path::new("target")).to_path_buf()
}
