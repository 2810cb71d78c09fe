//! The lab's folder: all files of all its hosts.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};

use super::LabError;

/// Disk-backed on ordinary machines, and short: paths of unix sockets in it must stay below 108 bytes.
const PARENT: &str = "/var/tmp";
const PREFIX: &str = "godwit-lab-";

/// Makes a new folder with its lock file. Removes what labs left that were killed together with their cleaner;
/// the caller holds the lab's lock, so whatever is found is such.
pub(super) fn create() -> Result<PathBuf, LabError> {
    let parent = Path::new(PARENT);
    for entry in fs::read_dir(parent).map_err(LabError::io("cannot list /var/tmp"))?.flatten() {
        if entry.file_name().to_string_lossy().starts_with(PREFIX) {
            remove_stale(&entry.path())?;
        }
    }
    let folder = parent.join(format!("{PREFIX}{}", std::process::id()));
    fs::create_dir_all(&folder).map_err(LabError::io(format!("cannot create {}", folder.display())))?;
    File::create(folder.join("lock")).map_err(LabError::io("cannot create the lab's lock file"))?;
    Ok(folder)
}

fn remove_stale(folder: &Path) -> Result<(), LabError> {
    // A lab that was killed a moment ago may still be ending: its processes hold the lock until then.
    if let Ok(file) = File::open(folder.join("lock")) {
        let _lock = Flock::lock(file, FlockArg::LockExclusive)
            .map_err(|(_, error)| LabError::io("cannot wait for the end of an older lab")(error.into()))?;
    }
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(LabError::io(format!("cannot remove {}", folder.display()))(error))
        }
        _ => Ok(()),
    }
}

/// Makes a folder with its parents.
pub(super) fn make(path: &Path) -> Result<(), LabError> {
    fs::create_dir_all(path).map_err(LabError::io(format!("cannot create {}", path.display())))
}

/// Writes a file.
pub(super) fn write(path: &Path, text: &str) -> Result<(), LabError> {
    fs::write(path, text).map_err(LabError::io(format!("cannot write {}", path.display())))
}

/// Copies the files of `source` over those of `target`, folders and all; what is missing at the source is fine.
pub(super) fn copy_tree(source: &Path, target: &Path) -> std::io::Result<()> {
    let Ok(entries) = fs::read_dir(source) else { return Ok(()) };
    fs::create_dir_all(target)?;
    for entry in entries {
        let entry = entry?;
        let to = target.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            copy_tree(&entry.path(), &to)?;
        } else {
            fs::copy(entry.path(), to)?;
        }
    }
    Ok(())
}
