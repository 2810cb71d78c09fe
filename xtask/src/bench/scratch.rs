//! What a bench makes outside of its own process goes with it: also when it is interrupted or killed.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use super::BenchError;

/// Something that is undone when this is dropped, and when this process ends in any other way.
pub(super) struct Undo {
    /// Does it once its stdin ends.
    keeper: Child,
}

impl Undo {
    /// A line of sh that undoes it; $1 and on are its arguments.
    pub(super) fn by<S: AsRef<OsStr>>(line: &str, arguments: &[S]) -> Result<Undo, BenchError> {
        let mut keeper = Command::new("sh");
        // A group of its own: Ctrl-C does not reach it.
        keeper.arg("-c").arg(format!("read -r _; {line}")).arg("keep").args(arguments).process_group(0);
        let keeper = keeper.stdin(Stdio::piped()).spawn().map_err(BenchError::io("cannot start sh"))?;
        Ok(Undo { keeper })
    }
}

impl Drop for Undo {
    fn drop(&mut self) {
        // This closes its stdin first.
        let _ = self.keeper.wait();
    }
}

/// A folder that goes.
pub(super) struct Scratch {
    pub(super) folder: PathBuf,
    _undo: Undo,
}

impl Scratch {
    pub(super) fn new(folder: PathBuf) -> Result<Scratch, BenchError> {
        let undo = Undo::by("rm -rf -- \"$1\"", &[&folder])?;
        fs::create_dir_all(&folder).map_err(BenchError::io(format!("cannot create {}", folder.display())))?;
        Ok(Scratch { folder, _undo: undo })
    }
}
