//! OpenStack Nova in a virtual environment of Python's: the peer of placement's benchmark.

use std::path::PathBuf;
use std::process::Command;

use super::SetupError;
use crate::command;

const VERSION: &str = "34.0.0";

fn folder() -> PathBuf {
    command::target_folder().join("tools/nova-34")
}

/// The Python that has Nova.
pub(crate) fn python() -> PathBuf {
    folder().join("bin/python")
}

/// Whether Nova's model of the hardware can be imported.
pub(crate) fn is_installed() -> bool {
    command::succeeds(Command::new(python()).args(["-c", "import nova.virt.hardware"]))
}

/// Installs it with pip, from the index that this machine is set up for.
pub(crate) fn install() -> Result<(), SetupError> {
    println!("setup: installing Nova {VERSION} into {}, about two minutes", folder().display());
    command::run(Command::new("python3").args(["-m", "venv", "--clear"]).arg(folder()))?;
    let package = format!("nova=={VERSION}");
    command::run(Command::new(python()).args([
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        &package,
    ]))?;
    Ok(())
}
