//! promtool, which checks metrics, alert rules and their tests. Debian has it in the package of the Prometheus server,
//! whose installation starts the server; so the package is unpacked here and not installed.

use std::path::PathBuf;
use std::process::Command;

use super::SetupError;
use crate::command;

const PACKAGE: &str = "prometheus";

/// Whether there is one, in the PATH or where this puts it.
pub(crate) fn is_installed() -> bool {
    [PathBuf::from("promtool"), folder().join("promtool")]
        .into_iter()
        .any(|path| command::succeeds(Command::new(path).arg("--version")))
}

/// Brings the package from the machine's own apt sources, and keeps the one program of it.
pub(crate) fn install() -> Result<(), SetupError> {
    let (folder, unpacked) = (folder(), folder().join("promtool.partial"));
    let failed = |source| SetupError::Folder { path: folder.display().to_string(), source };
    match std::fs::remove_dir_all(&unpacked) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(failed(error)),
        _ => {}
    }
    std::fs::create_dir_all(&unpacked).map_err(failed)?;
    println!("setup: unpacking promtool from Debian's package {PACKAGE}");
    let download = || {
        let mut command = Command::new("apt-get");
        command.args(["download", "-q=2", PACKAGE]).current_dir(&unpacked);
        command
    };
    if !command::succeeds(&mut download()) {
        command::run(Command::new("apt-get").args(["update", "-q=2"]))?;
        command::run(&mut download())?;
    }
    let package = std::fs::read_dir(&unpacked).map_err(failed)?.flatten().map(|entry| entry.path()).next();
    command::run(Command::new("dpkg-deb").arg("--extract").args(package).arg(unpacked.join("tree")))?;
    std::fs::rename(unpacked.join("tree/usr/bin/promtool"), folder.join("promtool")).map_err(failed)?;
    std::fs::remove_dir_all(&unpacked).map_err(failed)
}

fn folder() -> PathBuf {
    command::target_folder().join("tools")
}
