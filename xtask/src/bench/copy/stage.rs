//! Where copies are measured: folders on file systems of their own, in a mount namespace of this process, so that
//! nothing stays whatever happens.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::statfs::{FsType, statfs};

use super::super::BenchError;
use super::super::scratch::Scratch;
use crate::command;

/// mkfs.xfs makes no file system smaller than 300 MiB.
const SMALLEST_BYTES: u64 = 512 << 20;

/// A folder to copy in.
#[derive(Debug)]
pub(super) struct Place {
    /// The file system's name, with which cases begin.
    pub(super) name: String,
    pub(super) folder: Result<PathBuf, String>,
}

impl Place {
    pub(super) fn new(name: &str, folder: Result<PathBuf, String>) -> Place {
        Place { name: name.to_owned(), folder }
    }

    pub(super) fn is_memory(&self) -> bool {
        self.name == "tmpfs"
    }

    pub(super) fn is_share(&self) -> bool {
        self.name.starts_with("nfs")
    }
}

/// The places, for as long as it lives.
pub(super) struct Stage {
    pub(super) places: Vec<Place>,
    mounted: Vec<PathBuf>,
    _scratch: Vec<Scratch>,
}

impl Drop for Stage {
    fn drop(&mut self) {
        for folder in &self.mounted {
            let _ = command::run(Command::new("umount").arg(folder));
        }
    }
}

impl Stage {
    /// ext4, xfs and tmpfs of this machine; if `at` names folders, those instead.
    pub(super) fn set(at: &[(String, PathBuf)], disk_bytes: u64) -> Result<Stage, BenchError> {
        let name = format!("godwit-bench-copy-{}", std::process::id());
        let base = Scratch::new(command::target_folder().join(&name))?;
        let memory = Scratch::new(Path::new("/dev/shm").join(&name))?;
        let mut stage = Stage { places: Vec::new(), mounted: Vec::new(), _scratch: Vec::new() };
        if at.is_empty() {
            own_mounts()?;
            let ext4 = match file_system(&base.folder)? {
                "ext4" => Ok(base.folder.clone()),
                _ => stage.mount_loop(&base.folder, "ext4", disk_bytes),
            };
            stage.add("ext4", ext4);
            let xfs = stage.mount_loop(&base.folder, "xfs", disk_bytes);
            stage.add("xfs", xfs);
            stage.add("tmpfs", Ok(memory.folder.clone()));
        }
        for (name, folder) in at {
            stage.add(name, Ok(folder.clone()));
        }
        stage._scratch = vec![base, memory];
        Ok(stage)
    }

    fn add(&mut self, name: &str, folder: Result<PathBuf, String>) {
        self.places.push(Place::new(name, folder));
    }

    /// A file system in a file, through a loop device that goes past the page cache: else the copy would be cached twice.
    fn mount_loop(&mut self, base: &Path, kind: &str, bytes: u64) -> Result<PathBuf, String> {
        let (image, folder) = (base.join(format!("{kind}.img")), base.join(kind));
        let make = || -> Result<(), BenchError> {
            let file = fs::File::create(&image).map_err(BenchError::io("cannot make a file"))?;
            file.set_len(bytes.max(SMALLEST_BYTES)).map_err(BenchError::io("cannot make a file"))?;
            fs::create_dir_all(&folder).map_err(BenchError::io("cannot make a folder"))?;
            command::run(Command::new(format!("mkfs.{kind}")).arg("-q").arg(&image))?;
            let device = command::capture(
                Command::new("losetup").args(["--find", "--show", "--direct-io=on"]).arg(&image),
            )?;
            let mounted = command::run(Command::new("mount").arg(device.trim()).arg(&folder));
            // The mount holds the device now, and gives it up when it goes.
            command::run(Command::new("losetup").arg("--detach").arg(device.trim()))?;
            Ok(mounted?)
        };
        make().map_err(|error| error.to_string())?;
        self.mounted.push(folder.clone());
        Ok(folder)
    }
}

/// Mounts from now on are this process's own, and end with it.
fn own_mounts() -> Result<(), BenchError> {
    let failed = || BenchError::io("cannot make a mount namespace");
    unshare(CloneFlags::CLONE_NEWNS).map_err(|error| failed()(error.into()))?;
    let none: Option<&str> = None;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)
        .map_err(|error| failed()(error.into()))
}

fn file_system(folder: &Path) -> Result<&'static str, BenchError> {
    /// As statfs(2) numbers them.
    const EXT4: i64 = 0xef53;
    let found = statfs(folder).map_err(|error| {
        BenchError::io(format!("cannot tell the file system of {}", folder.display()))(error.into())
    })?;
    let FsType(number) = found.filesystem_type();
    Ok(if number == EXT4 { "ext4" } else { "other" })
}
