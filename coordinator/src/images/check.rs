//! What QEMU itself says of a qcow2 file, asked under limits: a crafted file must cost neither memory nor time.

use super::format::FormatError;
use crate::error::Error;
use serde::Deserialize;
use std::io::ErrorKind;
use std::path::Path;
use std::process::Output;
use std::time::Duration;
use tokio::process::Command;
use tokio::time::timeout;

/// Address space of the tool, in bytes; Nova found 1 GiB to be enough for every real image.
const ADDRESS_SPACE_BYTES: u64 = 1 << 30;
/// CPU time of the tool, in seconds.
const CPU_SECONDS: u64 = 60;
/// Wall-clock time of the tool: reading the metadata of a large image from a slow share.
const WALL: Duration = Duration::from_secs(600);
/// Exit code of `qemu-img check` for clusters that are allocated but not used: waste, no damage.
const ONLY_LEAKS: i32 = 3;

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Info {
    virtual_size: u64,
    backing_filename: Option<String>,
}

/// Checks a qcow2 file that passed the header's gate: its tables are consistent and its size is `virtual_size`.
///
/// # Errors
/// [`Error::Invalid`] when it is corrupt, [`Error::Unavailable`] when the tool is missing or does not end.
pub(super) async fn check(path: &Path, virtual_size: u64) -> Result<(), Error> {
    let output = qemu_img("check", path).await?;
    if !matches!(output.status.code(), Some(0 | ONLY_LEAKS)) {
        return Err(corrupt(&output));
    }
    let output = qemu_img("info", path).await?;
    let info = serde_json::from_slice::<Info>(&output.stdout).map_err(|_| corrupt(&output))?;
    if info.backing_filename.is_some() {
        return Err(refused(&FormatError::BackingFile));
    }
    if info.virtual_size != virtual_size {
        return Err(refused(&FormatError::Invalid("size of the disk")));
    }
    Ok(())
}

/// The refusal of a file's content.
pub(super) fn refused(why: &FormatError) -> Error {
    Error::Invalid(format!("The image is not accepted: {why}."))
}

fn corrupt(output: &Output) -> Error {
    // qemu-img names the file first; its path is not the user's business.
    let text = String::from_utf8_lossy(&output.stderr);
    let said = text.lines().find(|line| !line.trim().is_empty()).unwrap_or("its tables are not consistent");
    let said = said.rsplit_once(".partial': ").map_or(said, |(_, reason)| reason).trim_end_matches('.');
    Error::Invalid(format!(
        "The image is not accepted: the qcow2 file is corrupt ({said}). Make it anew, or repair it with \
         `qemu-img check -r all`."
    ))
}

/// `prlimit` sets the limits in the child, before the tool runs.
async fn qemu_img(command: &str, path: &Path) -> Result<Output, Error> {
    let mut child = Command::new("prlimit");
    child
        .arg(format!("--as={ADDRESS_SPACE_BYTES}"))
        .arg(format!("--cpu={CPU_SECONDS}"))
        .args(["--core=0", "qemu-img", command, "--output=json", "-f", "qcow2"])
        .arg(path)
        .env_clear()
        .env("PATH", std::env::var_os("PATH").unwrap_or_default())
        .env("LC_ALL", "C")
        .stdin(std::process::Stdio::null())
        .kill_on_drop(true);
    match timeout(WALL, child.output()).await {
        // prlimit's own exit codes for a program that is not there.
        Ok(Ok(output)) if matches!(output.status.code(), Some(126 | 127)) => Err(missing("qemu-img")),
        Ok(Ok(output)) => Ok(output),
        Ok(Err(error)) if error.kind() == ErrorKind::NotFound => Err(missing("prlimit")),
        Ok(Err(source)) => Err(Error::Pool { what: "The image could not be checked.".into(), source }),
        Err(_) => Err(Error::Unavailable(
            "The check of the image did not end in ten minutes; is the pool slow?".into(),
        )),
    }
}

fn missing(program: &str) -> Error {
    Error::Unavailable(format!(
        "Images cannot be checked: {program} is missing on the coordinator. Install qemu-utils and util-linux there."
    ))
}
