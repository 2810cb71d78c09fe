//! Disks that are made larger while it is open whether that stays: the old disk is kept beside the new one, whole, until
//! one of them goes.
//!
//! Cutting a larger disk short again would cut through what its guest has written there, its partition table's copy at
//! the end for one. So a growth that is taken back puts back the old disk, and what was written since goes with the
//! larger one.

use super::base::run;
use super::dir::PATIENCE;
use super::folder::{Ask, Told, is_file, remove_file};
use super::{InstancePaths, Pool, StorageError, io_error};
use crate::datapath::copy::journal;
use crate::datapath::copy::partial;
use crate::datapath::worker::{CopyOrder, Options};
use crate::hypervisor::Cancel;
use godwit_protocol::id::InstanceId;
use godwit_protocol::image::DiskFormat;
use godwit_protocol::operation::Progress;
use godwit_protocol::request::GrowRequest;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::process::Command;

impl Pool {
    /// Makes the disk of an instance that is off larger, and keeps the old one: a reflink where the file system can,
    /// else a copy by a worker process. Both being there already is a success.
    ///
    /// # Errors
    /// [`StorageError::NotFound`] when there is no disk, [`StorageError::NoSpace`], and what the worker says; then the
    /// disk is as it was.
    pub fn grow_disk(
        &self,
        request: &GrowRequest,
        progress: &mut dyn FnMut(Progress),
        cancel: &Cancel,
    ) -> Result<(), StorageError> {
        if self.touch(PATIENCE, Ask::BeginGrowth(request.instance))? != Told::Already(true) {
            let paths = self.instance(request.instance);
            let order = CopyOrder {
                source: paths.disk,
                destination: paths.old_disk,
                // Byte by byte: an overlay stays one.
                format: DiskFormat::Raw,
                size_bytes: None,
                // What an earlier attempt left was of a guest that has run since.
                options: Options { no_resume: true, ..Options::default() },
            };
            let mut report = |done_bytes, total_bytes| progress(Progress::Copy { done_bytes, total_bytes });
            let copied =
                self.while_making(request.instance, cancel, || self.worker.copy(&order, &mut report, cancel));
            self.count(&copied.map_err(|error| self.explain(error, request.size_bytes))?);
        }
        self.touch(PATIENCE, Ask::Grow(request.clone())).map(drop)
    }

    /// Puts the old disk back; none being kept is a success.
    ///
    /// # Errors
    /// [`StorageError::Unreachable`], [`StorageError::Io`].
    pub fn restore_disk(&self, instance: InstanceId) -> Result<(), StorageError> {
        self.touch(PATIENCE, Ask::RestoreDisk(instance)).map(drop)
    }

    /// Removes the old disk; none being kept is a success.
    ///
    /// # Errors
    /// [`StorageError::Unreachable`], [`StorageError::Io`].
    pub fn drop_old_disk(&self, instance: InstanceId) -> Result<(), StorageError> {
        self.touch(PATIENCE, Ask::DropOldDisk(instance)).map(drop)
    }
}

/// Whether the old disk is kept already.
pub(super) fn begin(paths: &InstancePaths) -> Result<bool, StorageError> {
    if !is_file(&paths.disk)? {
        return Err(StorageError::NotFound(paths.disk.clone()));
    }
    if is_file(&paths.old_disk)? {
        return Ok(true);
    }
    remove_unfinished(paths)?;
    Ok(false)
}

/// Makes the disk larger. One that is as large already is left as it is.
pub(super) fn grow(paths: &InstancePaths, request: &GrowRequest) -> Result<(), StorageError> {
    let disk = &paths.disk;
    // The old disk's name is durable before anything of the new one is.
    sync_folder(paths)?;
    let file = open(disk)?;
    match request.format {
        DiskFormat::Raw => {
            let length = file.metadata().map_err(io_error("look at", disk))?.len();
            if length < request.size_bytes {
                file.set_len(request.size_bytes).map_err(io_error("grow", disk))?;
            }
        }
        DiskFormat::Qcow2 => {
            if virtual_size(&file, disk)? < request.size_bytes {
                let mut resize = Command::new("qemu-img");
                resize.args(["resize", "-q", "-f", "qcow2"]).arg(disk).arg(request.size_bytes.to_string());
                run(&mut resize)?;
            }
        }
    }
    file.sync_all().map_err(io_error("sync", disk))
}

/// The size that a guest sees of a qcow2 disk: its header's, for a disk of ours may be an overlay, which an image may
/// not be.
fn virtual_size(file: &File, path: &Path) -> Result<u64, StorageError> {
    let mut head = [0; 32];
    file.read_exact_at(&mut head, 0).map_err(io_error("read", path))?;
    let size = head[24..].try_into().map(u64::from_be_bytes);
    match (head.starts_with(b"QFI\xfb"), size) {
        (true, Ok(size)) => Ok(size),
        _ => Err(StorageError::Invalid(format!("{} is not in qcow2", path.display()))),
    }
}

fn open(path: &Path) -> Result<File, StorageError> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).custom_flags(libc::O_NOFOLLOW);
    options.open(path).map_err(io_error("open", path))
}

/// The old disk takes the disk's place again.
pub(super) fn restore(paths: &InstancePaths) -> Result<(), StorageError> {
    remove_unfinished(paths)?;
    match fs::rename(&paths.old_disk, &paths.disk) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(io_error("rename", &paths.old_disk)(error)),
        Ok(()) => sync_folder(paths),
    }
}

/// The old disk goes.
pub(super) fn drop_old(paths: &InstancePaths) -> Result<(), StorageError> {
    remove_unfinished(paths)?;
    remove_file(&paths.old_disk)
}

/// What a copy that was cut off has left.
fn remove_unfinished(paths: &InstancePaths) -> Result<(), StorageError> {
    remove_file(&journal(&paths.old_disk))?;
    remove_file(&partial(&paths.old_disk))
}

fn sync_folder(paths: &InstancePaths) -> Result<(), StorageError> {
    let synced = File::open(&paths.folder).and_then(|folder| folder.sync_all());
    synced.map_err(io_error("sync", &paths.folder))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::folder::create_folder;

    const MIB: u64 = 1 << 20;

    fn paths(folder: &tempfile::TempDir) -> InstancePaths {
        let paths = InstancePaths::new(folder.path(), InstanceId::random());
        create_folder(&paths.folder).unwrap();
        paths
    }

    fn grown(paths: &InstancePaths, format: DiskFormat) -> Result<(), StorageError> {
        let name = paths.folder.file_name().unwrap().to_str().unwrap();
        let instance = name.parse().unwrap();
        grow(paths, &GrowRequest { instance, format, size_bytes: 8 * MIB })
    }

    fn seen_by_a_guest(disk: &Path, format: &str) -> Vec<u8> {
        let raw = disk.with_extension("raw");
        let mut convert = Command::new("qemu-img");
        run(convert.args(["convert", "-f", format, "-O", "raw"]).arg(disk).arg(&raw)).unwrap();
        let bytes = fs::read(&raw).unwrap();
        fs::remove_file(raw).unwrap();
        bytes
    }

    #[test]
    fn a_raw_disk_keeps_what_is_in_it_and_is_put_back_as_it_was() {
        let folder = tempfile::tempdir().unwrap();
        let paths = paths(&folder);
        fs::write(&paths.disk, vec![7; MIB as usize]).unwrap();
        assert!(!begin(&paths).unwrap());
        fs::copy(&paths.disk, &paths.old_disk).unwrap();
        assert!(begin(&paths).unwrap(), "what is kept is not copied again");
        for _ in 0..2 {
            grown(&paths, DiskFormat::Raw).unwrap();
            let bytes = fs::read(&paths.disk).unwrap();
            assert_eq!(bytes.len() as u64, 8 * MIB);
            assert!(
                bytes[..MIB as usize].iter().all(|b| *b == 7)
                    && bytes[MIB as usize..].iter().all(|b| *b == 0)
            );
        }
        fs::write(&paths.disk, b"what the guest wrote since").unwrap();
        fs::write(partial(&paths.old_disk), b"half").unwrap();
        for _ in 0..2 {
            restore(&paths).unwrap();
            assert_eq!(fs::read(&paths.disk).unwrap(), vec![7; MIB as usize]);
            assert_eq!(fs::read_dir(&paths.folder).unwrap().count(), 1);
        }
    }

    #[test]
    fn an_overlay_grows_on_its_base_and_the_old_disk_goes_when_the_new_one_stays() {
        let folder = tempfile::tempdir().unwrap();
        let paths = paths(&folder);
        let base = paths.base(DiskFormat::Raw);
        fs::write(&base, vec![5; MIB as usize]).unwrap();
        let mut create = Command::new("qemu-img");
        create.args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b", "base.raw"]);
        run(create.arg(&paths.disk).arg(MIB.to_string()).current_dir(&paths.folder)).unwrap();
        fs::copy(&paths.disk, &paths.old_disk).unwrap();
        for _ in 0..2 {
            grown(&paths, DiskFormat::Qcow2).unwrap();
        }
        let bytes = seen_by_a_guest(&paths.disk, "qcow2");
        assert_eq!(bytes.len() as u64, 8 * MIB);
        assert!(
            bytes[..MIB as usize].iter().all(|b| *b == 5) && bytes[MIB as usize..].iter().all(|b| *b == 0)
        );
        assert_eq!(seen_by_a_guest(&paths.old_disk, "qcow2"), vec![5; MIB as usize]);
        for _ in 0..2 {
            drop_old(&paths).unwrap();
        }
        assert!(!paths.old_disk.exists() && paths.disk.exists());
        restore(&paths).unwrap();
        assert_eq!(
            seen_by_a_guest(&paths.disk, "qcow2").len() as u64,
            8 * MIB,
            "there is nothing to put back"
        );
    }

    #[test]
    fn no_link_is_followed_and_no_disk_of_another_format_is_touched() {
        let folder = tempfile::tempdir().unwrap();
        let paths = paths(&folder);
        assert!(matches!(begin(&paths), Err(StorageError::NotFound(_))));
        let outside = folder.path().join("outside");
        fs::write(&outside, b"precious").unwrap();
        std::os::unix::fs::symlink(&outside, &paths.disk).unwrap();
        assert!(matches!(begin(&paths), Err(StorageError::Unexpected { .. })));
        assert!(grown(&paths, DiskFormat::Raw).is_err());
        assert_eq!(fs::read(&outside).unwrap(), b"precious");
        fs::remove_file(&paths.disk).unwrap();
        fs::write(&paths.disk, [1; 64]).unwrap();
        assert!(matches!(grown(&paths, DiskFormat::Qcow2), Err(StorageError::Invalid(_))));
        assert_eq!(fs::read(&paths.disk).unwrap(), [1; 64]);
    }
}
