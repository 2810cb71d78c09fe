//! An image whose disk is to be larger than what it was made from.

use super::error::CopyError;
use std::path::Path;
use std::process::{Command, Stdio};

/// What runs `qemu-img` on a file that a user made: it dies with us, and gets at most 30 s of CPU and 2 GiB of
/// address space.
const CONFINED: [&str; 6] =
    ["setpriv", "--pdeathsig=KILL", "prlimit", "--cpu=30", "--as=2147483648", "qemu-img"];

/// Makes a qcow2 image's disk larger.
///
/// # Errors
/// [`CopyError::Grow`].
pub(super) fn grow_qcow2(path: &Path, size_bytes: u64) -> Result<(), CopyError> {
    let output = Command::new(CONFINED[0])
        .args(&CONFINED[1..])
        .args(["resize", "-q", "-f", "qcow2"])
        .arg(path)
        .arg(size_bytes.to_string())
        .stdin(Stdio::null())
        .output()
        .map_err(|error| CopyError::Grow(format!("it does not start, install qemu-utils: {error}")))?;
    if output.status.success() {
        return Ok(());
    }
    Err(CopyError::Grow(String::from_utf8_lossy(&output.stderr).trim().to_owned()))
}
