//! bpf-linker, which Debian does not carry: built by cargo against the LLVM that rustc-web brings.

use std::io;
use std::path::Path;
use std::process::Command;

use super::SetupError;
use crate::command;

const VERSION: &str = "0.13.0";
/// Debian's LLVM 22. The Rust toolchain's own copy would do too, but goes away when the toolchain is updated.
const LLVM: &str = "/usr/lib/x86_64-linux-gnu/libLLVM.so.22.1";

/// Whether a bpf-linker that starts (its LLVM is found) is where the agent's build looks.
pub(crate) fn is_installed() -> bool {
    let in_cargo_home = std::env::home_dir().map(|home| home.join(".cargo/bin/bpf-linker"));
    command::succeeds(Command::new("bpf-linker").arg("--version"))
        || in_cargo_home.is_some_and(|path| command::succeeds(Command::new(path).arg("--version")))
}

/// Builds and installs it with `cargo install`, into cargo's own folder of programs.
pub(crate) fn install() -> Result<(), SetupError> {
    if !Path::new(LLVM).exists() {
        return Err(SetupError::NoLlvm { path: LLVM.to_owned() });
    }
    // The build looks for PREFIX/lib/libLLVM.so, a name that only LLVM's development package has.
    let prefix = command::target_folder().join("tools/llvm-22");
    let library = prefix.join("lib/libLLVM.so");
    let prepare = |path: &Path| -> io::Result<()> {
        std::fs::create_dir_all(path.parent().unwrap_or(path))?;
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        std::os::unix::fs::symlink(LLVM, path)
    };
    prepare(&library).map_err(|source| SetupError::Folder { path: library.display().to_string(), source })?;
    println!("setup: building bpf-linker {VERSION}, about a minute");
    command::run(
        command::cargo()
            .args(["install", "bpf-linker", "--version", VERSION, "--locked", "--force", "--quiet"])
            .args(["--no-default-features", "--features", "llvm-22"])
            .env("LLVM_PREFIX", &prefix)
            // Settings meant for the workspace's own build must not leak into this one.
            .env_remove("CARGO_TARGET_DIR")
            .env_remove("RUSTFLAGS"),
    )?;
    Ok(())
}
