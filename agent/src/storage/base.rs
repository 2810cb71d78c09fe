//! Disks that share an image: an overlay in qcow2 on a base that nobody writes to, where the file system has no
//! reflinks.
//!
//! The pool's cache `cache/<image>.<format>` holds bases. A base is a hard link to the image where that can be, and
//! so costs nothing; else a copy. An instance holds its base by a hard link of its own beside its disk, so neither
//! deleting the image nor clearing the cache takes anything from it, and the number of links tells whether an entry
//! is in use. An entry's last use is its inode's change time, which each new link moves.

use super::folder::{create_folder, is_file, remove_file};
use super::{InstancePaths, StorageError, io_error};
use crate::datapath::copy::partial;
use godwit_protocol::id::{ImageId, InstanceId};
use godwit_protocol::image::DiskFormat;
use serde::{Deserialize, Serialize};
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

/// An overlay to make.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Overlay {
    pub(super) instance: InstanceId,
    pub(super) image: ImageId,
    /// The image's.
    pub(super) format: DiskFormat,
    /// What the guest sees.
    pub(super) size_bytes: u64,
    /// What entries that are not in use may take.
    pub(super) cache_bytes: u64,
}

/// What an overlay lies on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Base {
    /// Beside the disk.
    pub path: PathBuf,
    /// Its format.
    pub format: DiskFormat,
}

/// An instance's base; none when its disk is no overlay.
pub(super) fn of(paths: &InstancePaths) -> Result<Option<Base>, StorageError> {
    for format in [DiskFormat::Raw, DiskFormat::Qcow2] {
        let path = paths.base(format);
        if is_file(&path)? {
            return Ok(Some(Base { path, format }));
        }
    }
    Ok(None)
}

/// Makes the disk, whole or not at all. [`StorageError::Reflinks`] says that the pool can do better: then nothing is
/// made.
pub(super) fn overlay(pool: &Path, order: &Overlay) -> Result<(), StorageError> {
    let paths = InstancePaths::new(pool, order.instance);
    let image = pool.join("images").join(order.image.to_string());
    let growing = partial(&paths.disk);
    remove_file(&growing)?;
    if reflinks(&image, &growing)? {
        return Err(StorageError::Reflinks);
    }
    let base = paths.base(order.format);
    hold(pool, order.instance, order.image, order.format)?;
    let mut create = Command::new("qemu-img");
    create.args(["create", "-q", "-f", "qcow2", "-F", order.format.as_str(), "-b"]);
    create.arg(base.file_name().unwrap_or_default()).arg(&growing).arg(order.size_bytes.to_string());
    // The name of the base is relative to the disk's folder, so that the pool may be mounted elsewhere.
    run(create.current_dir(&paths.folder))?;
    let synced = File::open(&growing).and_then(|file| file.sync_all());
    synced.map_err(io_error("sync", &growing))?;
    fs::rename(&growing, &paths.disk).map_err(io_error("rename", &growing))?;
    let folder = File::open(&paths.folder).and_then(|folder| folder.sync_all());
    folder.map_err(io_error("sync", &paths.folder))?;
    trim(pool, order.cache_bytes)
}

/// Whether `probe` can share the image's blocks. It is removed again.
fn reflinks(image: &Path, probe: &Path) -> Result<bool, StorageError> {
    let mut copy = Command::new("cp");
    copy.args(["--reflink=always", "--"]).arg(image).arg(probe);
    let output = copy.output().map_err(io_error("probe", probe))?;
    remove_file(probe)?;
    Ok(output.status.success())
}

/// Gives an instance that comes with its disk the base that it has left in another pool; false when this pool has not
/// the image's bytes either.
pub(super) fn hold_again(
    pool: &Path,
    instance: InstanceId,
    image: ImageId,
    format: DiskFormat,
) -> Result<bool, StorageError> {
    let paths = InstancePaths::new(pool, instance);
    if is_file(&paths.base(format))? {
        return Ok(true);
    }
    create_folder(&paths.folder)?;
    match hold(pool, instance, image, format) {
        Err(StorageError::NotFound(_)) => Ok(false),
        held => held.map(|()| true),
    }
}

/// Gives the instance its base.
fn hold(pool: &Path, instance: InstanceId, image: ImageId, format: DiskFormat) -> Result<(), StorageError> {
    let base = &InstancePaths::new(pool, instance).base(format);
    let folder = pool.join("cache");
    let entry = folder.join(format!("{image}.{}", format.as_str()));
    let image = &pool.join("images").join(image.to_string());
    // Another host may clear the entry away between the two links.
    for _ in 0..8 {
        remove_file(base)?;
        if fs::hard_link(&entry, base).is_ok() {
            return Ok(());
        }
        create_folder(&folder)?;
        match fs::hard_link(image, &entry) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(StorageError::NotFound(image.to_owned()));
            }
            // The image lies on another file system, or has too many links.
            Err(_) => fill(image, &entry, instance)?,
            Ok(()) => {}
        }
    }
    fs::hard_link(&entry, base).map_err(io_error("link", base))
}

/// Copies an image into the cache, whole or not at all.
fn fill(image: &Path, entry: &Path, instance: InstanceId) -> Result<(), StorageError> {
    let growing = entry.with_extension(instance.to_string());
    let mut copy = Command::new("cp");
    copy.args(["--reflink=auto", "--sparse=always", "--"]).arg(image).arg(&growing);
    let made = run(&mut copy).and_then(|()| {
        let readable = fs::Permissions::from_mode(0o444);
        fs::set_permissions(&growing, readable).map_err(io_error("protect", &growing))?;
        let synced = File::open(&growing).and_then(|file| file.sync_all());
        synced.map_err(io_error("sync", &growing))?;
        fs::rename(&growing, entry).map_err(io_error("rename", &growing))
    });
    made.inspect_err(|_| drop(remove_file(&growing)))
}

pub(super) fn run(command: &mut Command) -> Result<(), StorageError> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command.output().map_err(io_error("run", OsStr::new(&program).as_ref()))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    match said.contains("No space left") || said.contains("quota exceeded") {
        true => Err(io_error("write", Path::new(&program))(io::Error::from_raw_os_error(libc::ENOSPC))),
        false => Err(StorageError::Invalid(format!("{program}: {said}"))),
    }
}

/// An entry of the cache that nobody uses and that costs something.
struct Idle {
    path: PathBuf,
    bytes: u64,
    used: (i64, i64),
}

/// Removes entries that nobody uses, the least recently used first, until the rest takes at most `limit` bytes.
fn trim(pool: &Path, limit: u64) -> Result<(), StorageError> {
    let mut idle = idle(pool)?;
    let mut bytes: u64 = idle.iter().map(|entry| entry.bytes).sum();
    idle.sort_by_key(|entry| entry.used);
    for entry in idle {
        if bytes <= limit {
            break;
        }
        remove_file(&entry.path)?;
        bytes -= entry.bytes;
    }
    Ok(())
}

fn idle(pool: &Path) -> Result<Vec<Idle>, StorageError> {
    let folder = pool.join("cache");
    let mut idle = Vec::new();
    for entry in fs::read_dir(&folder).map_err(io_error("read", &folder))?.flatten() {
        // Another host may have removed it.
        let Ok(metadata) = entry.metadata() else { continue };
        if metadata.is_file() && metadata.nlink() == 1 {
            let used = (metadata.ctime(), metadata.ctime_nsec());
            idle.push(Idle { path: entry.path(), bytes: metadata.blocks() * 512, used });
        }
    }
    Ok(idle)
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Fixture {
        folder: tempfile::TempDir,
    }

    impl Fixture {
        fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            fs::create_dir(folder.path().join("images")).unwrap();
            Self { folder }
        }

        fn image(&self, bytes: &[u8]) -> ImageId {
            let image = ImageId::random();
            fs::write(self.folder.path().join("images").join(image.to_string()), bytes).unwrap();
            image
        }

        fn make(&self, image: ImageId, cache_bytes: u64) -> InstancePaths {
            let instance = InstanceId::random();
            let paths = InstancePaths::new(self.folder.path(), instance);
            create_folder(&paths.folder).unwrap();
            let order =
                Overlay { instance, image, format: DiskFormat::Raw, size_bytes: 1 << 20, cache_bytes };
            overlay(self.folder.path(), &order).unwrap();
            paths
        }

        /// File times move in steps.
        fn wait_for_a_later_time_than(&self, image: ImageId) {
            let time = |path: &Path| fs::metadata(path).map(|m| (m.ctime(), m.ctime_nsec())).unwrap();
            let entry = time(&self.folder.path().join("cache").join(format!("{image}.raw")));
            let clock = self.folder.path().join("clock");
            while {
                fs::write(&clock, b"x").unwrap();
                time(&clock) <= entry
            } {
                std::thread::yield_now();
            }
        }

        fn cached(&self) -> usize {
            fs::read_dir(self.folder.path().join("cache")).unwrap().count()
        }
    }

    #[test]
    fn an_overlay_reads_its_image_and_outlives_it() {
        let fixture = Fixture::new();
        let image = fixture.image(&[7; 65536]);
        let paths = fixture.make(image, 0);
        assert_eq!(of(&paths).unwrap().unwrap().format, DiskFormat::Raw);
        fs::remove_file(fixture.folder.path().join("images").join(image.to_string())).unwrap();
        let raw = fixture.folder.path().join("raw");
        let mut convert = Command::new("qemu-img");
        run(convert.args(["convert", "-f", "qcow2", "-O", "raw"]).arg(&paths.disk).arg(&raw)).unwrap();
        let bytes = fs::read(&raw).unwrap();
        assert_eq!(bytes.len(), 1 << 20);
        assert!(bytes[..65536].iter().all(|byte| *byte == 7) && bytes[65536..].iter().all(|byte| *byte == 0));
        assert!(!partial(&paths.disk).exists());
    }

    #[test]
    fn the_cache_lets_go_of_the_least_recently_used_first_and_never_of_one_in_use() {
        let fixture = Fixture::new();
        let pool = fixture.folder.path();
        let images: Vec<ImageId> = (0..3).map(|_| fixture.image(&vec![1; 1 << 20])).collect();
        let used: Vec<InstancePaths> = images.iter().map(|image| fixture.make(*image, 0)).collect();
        for image in &images {
            fs::remove_file(pool.join("images").join(image.to_string())).unwrap();
        }
        trim(pool, 0).unwrap();
        assert_eq!(fixture.cached(), 3, "all are in use");
        // The second is used last.
        for index in [0, 2, 1] {
            fs::remove_file(used[index].base(DiskFormat::Raw)).unwrap();
            fixture.wait_for_a_later_time_than(images[index]);
        }
        trim(pool, 2 << 20).unwrap();
        let entry = |index: usize| pool.join("cache").join(format!("{}.raw", images[index]));
        assert!(!entry(0).exists() && entry(1).exists() && entry(2).exists());
        trim(pool, 1 << 20).unwrap();
        assert!(entry(1).exists() && !entry(2).exists());
        trim(pool, 0).unwrap();
        assert_eq!(fixture.cached(), 0);
    }

    #[test]
    fn an_image_that_is_gone_leaves_no_disk() {
        let fixture = Fixture::new();
        let instance = InstanceId::random();
        let paths = InstancePaths::new(fixture.folder.path(), instance);
        create_folder(&paths.folder).unwrap();
        let image = ImageId::random();
        let order = Overlay { instance, image, format: DiskFormat::Raw, size_bytes: 1 << 20, cache_bytes: 0 };
        assert!(matches!(overlay(fixture.folder.path(), &order), Err(StorageError::NotFound(_))));
        assert!(!paths.disk.exists() && !paths.base(DiskFormat::Raw).exists());
    }
}
