//! Disks that move to a host whose pool is another one.
//!
//! Whether two hosts have one pool is nowhere written down, and a folder of the same name proves nothing. So the source
//! puts a mark beside the disk, under a name that was never used, and the target looks for it. A mark that is seen
//! proves that the pool is the same. That one is not seen proves the contrary only if no cache of the file system
//! answered: the target therefore asks for a folder of the instance's name to be made, which a file server answers
//! itself, and the mark's name can be in no cache.

use super::dir::{PATIENCE, Pool};
use super::folder::{Ask, Told, create_folder, is_file, remove_file};
use super::lease::{self, LeaseCall};
use super::{InstancePaths, StorageError, base, io_error};
use crate::datapath::copy::partial;
use godwit_protocol::disk::{DiskArrival, DiskBase, DiskMark};
use godwit_protocol::id::{HostId, ImageId, InstanceId};
use godwit_protocol::image::DiskFormat;
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use uuid::Uuid;

/// Whether the disk of another host is in this pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Seen {
    /// It is: both hosts have one pool.
    Here,
    /// It is in another pool.
    Elsewhere {
        /// What an attempt to bring it has left here takes.
        partial_bytes: u64,
    },
}

/// How names of marks begin.
const MARK: &str = "mark-";

impl Pool {
    /// Puts a mark beside the disk, in place of older ones, and tells how many bytes the disk takes, and what it lies on.
    ///
    /// # Errors
    /// [`StorageError::NotFound`] when there is no disk, [`StorageError::Unreachable`], [`StorageError::Io`].
    pub fn mark_disk(&self, mark: &DiskMark) -> Result<(u64, Option<DiskBase>), StorageError> {
        match self.touch(PATIENCE, Ask::Mark(mark.clone()))? {
            Told::Marked { used_bytes, base } => Ok((used_bytes, base)),
            _ => Err(StorageError::Unreachable(self.path().to_owned())),
        }
    }

    /// Whether the mark is seen here: the pool is the one that it was put in.
    ///
    /// # Errors
    /// [`StorageError::Unreachable`], [`StorageError::Io`].
    pub fn sees_mark(&self, arrival: &DiskArrival) -> Result<Seen, StorageError> {
        let mark = DiskMark { instance: arrival.instance, mark: arrival.mark };
        match self.touch(PATIENCE, Ask::SeeMark(mark))? {
            Told::Seen(seen) => Ok(seen),
            _ => Err(StorageError::Unreachable(self.path().to_owned())),
        }
    }

    /// Whether the instance has its base here, be it that the pool has the image's bytes from which it takes it.
    ///
    /// # Errors
    /// [`StorageError::Unreachable`], [`StorageError::Io`].
    pub fn hold_base(
        &self,
        instance: InstanceId,
        image: ImageId,
        format: DiskFormat,
    ) -> Result<bool, StorageError> {
        Ok(self.touch(PATIENCE, Ask::HoldBase { instance, image, format })? == Told::Already(true))
    }

    /// That there is room for a disk that takes `need_bytes`.
    ///
    /// # Errors
    /// [`StorageError::NoSpace`], [`StorageError::Unreachable`].
    pub fn has_room(&self, need_bytes: u64) -> Result<(), StorageError> {
        let have_bytes = self.free_bytes()?;
        match need_bytes <= have_bytes {
            true => Ok(()),
            false => Err(StorageError::NoSpace { pool: self.path().to_owned(), need_bytes, have_bytes }),
        }
    }

    /// Removes the folder of an instance that has moved to another pool, unless another host than `host` may write to
    /// the disk there.
    ///
    /// # Errors
    /// [`StorageError::Held`], and as [`Self::delete_disk`].
    pub fn leave_disk(&self, instance: InstanceId, host: HostId) -> Result<(), StorageError> {
        self.touch(PATIENCE, Ask::Leave { instance, host }).map(drop)
    }
}

pub(super) fn mark(paths: &InstancePaths, mark: Uuid) -> Result<Told, StorageError> {
    if !is_file(&paths.disk)? {
        return Err(StorageError::NotFound(paths.disk.clone()));
    }
    remove_marks(paths)?;
    let path = path(paths, mark);
    File::create_new(&path).and_then(|file| file.sync_all()).map_err(io_error("create", &path))?;
    let folder = File::open(&paths.folder).and_then(|folder| folder.sync_all());
    folder.map_err(io_error("sync", &paths.folder))?;
    let base = base::of(paths)?.map(|base| {
        let used_bytes = used_bytes(&base.path)?;
        Ok::<_, StorageError>(DiskBase { format: base.format, used_bytes })
    });
    Ok(Told::Marked { used_bytes: used_bytes(&paths.disk)?, base: base.transpose()? })
}

/// What a file takes; one that is not there takes nothing.
pub(super) fn used_bytes(path: &Path) -> Result<u64, StorageError> {
    match fs::symlink_metadata(path) {
        // In units of 512, whatever the file system's are.
        Ok(metadata) => Ok(metadata.blocks() * 512),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(0),
        Err(error) => Err(io_error("look at", path)(error)),
    }
}

pub(super) fn sees(paths: &InstancePaths, mark: Uuid) -> Result<Seen, StorageError> {
    if let Some(all) = paths.folder.parent() {
        create_folder(all)?;
    }
    match fs::create_dir(&paths.folder) {
        Ok(()) => {
            fs::remove_dir(&paths.folder).map_err(io_error("remove", &paths.folder))?;
            Ok(Seen::Elsewhere { partial_bytes: 0 })
        }
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            Ok(match is_file(&path(paths, mark))? {
                true => Seen::Here,
                false => Seen::Elsewhere { partial_bytes: used_bytes(&partial(&paths.disk))? },
            })
        }
        Err(error) => Err(io_error("create", &paths.folder)(error)),
    }
}

fn path(paths: &InstancePaths, mark: Uuid) -> PathBuf {
    paths.folder.join(format!("{MARK}{mark}"))
}

/// Removes all marks; a folder that is not there has none.
pub(super) fn remove_marks(paths: &InstancePaths) -> Result<(), StorageError> {
    let entries = match fs::read_dir(&paths.folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(io_error("read", &paths.folder)(error)),
    };
    for entry in entries {
        let entry = entry.map_err(io_error("read", &paths.folder))?;
        if entry.file_name().to_str().is_some_and(|name| name.starts_with(MARK)) {
            remove_file(&entry.path())?;
        }
    }
    Ok(())
}

pub(super) fn leave(paths: &InstancePaths, host: HostId) -> Result<(), StorageError> {
    if paths.lease.exists() {
        // It is nobody's by now, or it becomes ours: a lease of somebody else says that the disk is in use.
        lease::act(paths, &LeaseCall::Claim(host))?;
    }
    super::folder::delete(paths)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool() -> (tempfile::TempDir, InstancePaths) {
        let folder = tempfile::tempdir().unwrap();
        let paths = InstancePaths::new(folder.path(), InstanceId::random());
        (folder, paths)
    }

    fn disk(paths: &InstancePaths) {
        create_folder(&paths.folder).unwrap();
        fs::write(&paths.disk, vec![1; 8192]).unwrap();
    }

    #[test]
    fn a_mark_is_seen_in_the_pool_that_it_was_put_in_and_in_no_other() {
        let (_one, here) = pool();
        disk(&here);
        let (other, _) = pool();
        let there = InstancePaths::new(other.path(), "00000000-0000-4000-8000-000000000001".parse().unwrap());
        let (first, second) = (Uuid::new_v4(), Uuid::new_v4());
        let told = mark(&here, first).unwrap();
        assert!(matches!(told, Told::Marked { used_bytes, base: None } if used_bytes >= 8192), "{told:?}");
        let elsewhere = |partial_bytes| Seen::Elsewhere { partial_bytes };
        assert_eq!(sees(&here, first).unwrap(), Seen::Here);
        assert_eq!(sees(&there, first).unwrap(), elsewhere(0));
        assert!(!there.folder.exists(), "looking leaves nothing");
        // Also where something is left of an earlier time.
        disk(&there);
        fs::rename(&there.disk, partial(&there.disk)).unwrap();
        assert_eq!(sees(&there, first).unwrap(), elsewhere(8192));
        mark(&here, second).unwrap();
        assert_eq!(sees(&here, first).unwrap(), elsewhere(0), "an older mark is gone");
        assert_eq!(sees(&here, second).unwrap(), Seen::Here);
        crate::storage::folder::delete(&here).unwrap();
        assert!(!here.folder.exists(), "a mark keeps no folder");
        assert!(matches!(mark(&here, first), Err(StorageError::NotFound(_))));
    }

    #[test]
    fn a_disk_that_another_host_writes_to_is_not_left() {
        let (_folder, paths) = pool();
        disk(&paths);
        let (here, there) = (HostId::random(), HostId::random());
        lease::act(&paths, &LeaseCall::Claim(there)).unwrap();
        assert!(matches!(leave(&paths, here), Err(StorageError::Held { host, .. }) if host == there));
        assert!(paths.disk.exists());
        lease::act(&paths, &LeaseCall::Release(there)).unwrap();
        leave(&paths, here).unwrap();
        assert!(!paths.folder.exists());
        leave(&paths, here).unwrap();
    }
}
