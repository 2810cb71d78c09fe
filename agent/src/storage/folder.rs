//! What is done on a pool's folder, as data, so that it can be asked of a thread or of a helper process. Everything
//! here may hang with the mount.

use super::lease::{self, LeaseCall};
use super::mount::{self, Share};
use super::{InstancePaths, StorageError, base, grow, images, io_error, moves, pool_mark};
use crate::datapath::copy::{journal, partial};
use crate::datapath::digests::{self, Digests};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use godwit_protocol::disk::{DiskBase, DiskMark};
use godwit_protocol::id::{HostId, ImageId, InstanceId};
use godwit_protocol::image::DiskFormat;
use godwit_protocol::request::GrowRequest;
use nix::sys::statvfs::statvfs;
use serde::{Deserialize, Serialize};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use uuid::Uuid;

/// Most of a console log that is read, in bytes.
const MAX_CONSOLE_BYTES: u64 = 1 << 20;

/// One thing to do in the folder `pool`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Ask {
    /// Mount the share there, unless it is.
    Mount(Share),
    /// Unmount it, unless somebody uses it.
    Unmount,
    /// Sizes.
    Measure,
    /// Is the image there, and the disk? If not the disk, then make its folder, and look at the image's digests.
    BeginDisk { image: ImageId, instance: InstanceId },
    /// Remove what an attempt left.
    AbandonDisk { instance: InstanceId, cancelled: bool },
    /// Make the disk an overlay of the image.
    Overlay(base::Overlay),
    /// The overlay's base, where the disk is one.
    Base(InstanceId),
    /// Give the instance its base, from what the pool has of the image.
    HoldBase { instance: InstanceId, image: ImageId, format: DiskFormat },
    /// What does an image take, and what is there of one that comes?
    FindImage(ImageId),
    /// Remove what an arrival left of an image, and, if `whole`, the image.
    DropImage { image: ImageId, whole: bool },
    /// Is the old disk kept already? If not, is there a disk to be kept?
    BeginGrowth(InstanceId),
    /// Make the disk larger.
    Grow(GrowRequest),
    /// The old disk takes the disk's place again.
    RestoreDisk(InstanceId),
    /// The old disk goes.
    DropOldDisk(InstanceId),
    /// Remove the instance's folder.
    Delete(InstanceId),
    /// Put a mark beside the disk.
    Mark(DiskMark),
    /// Is the mark there?
    SeeMark(DiskMark),
    /// Remove the folder of an instance that has left, unless it is another host's.
    Leave { instance: InstanceId, host: HostId },
    /// Write the config drive, base64.
    ConfigDrive { instance: InstanceId, image: String },
    /// The end of the console's log.
    Console(InstanceId),
    /// Who may write to the disk?
    Lease { instance: InstanceId, call: LeaseCall },
}

/// What came of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Told {
    Done,
    /// To [`Ask::Mount`], [`Ask::BeginDisk`] and [`Ask::BeginGrowth`]: it was there already. To [`Ask::Unmount`]: it is gone.
    /// To [`Ask::HoldBase`]: it is there now.
    Already(bool),
    /// To [`Ask::BeginDisk`]: the disk can be made. The image's digests must be compared, whatever that costs: they are
    /// not about the file as it is now.
    Suspect,
    Sizes(Sizes),
    /// Base64.
    Bytes(String),
    /// To [`Ask::Mark`]: what the disk takes, and what it lies on.
    Marked {
        used_bytes: u64,
        base: Option<DiskBase>,
    },
    /// To [`Ask::FindImage`] and [`Ask::DropImage`].
    Image(images::Found),
    Seen(moves::Seen),
    Base(Option<base::Base>),
    Lease(lease::Lease),
}

/// How large a pool is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Sizes {
    pub(super) total_bytes: u64,
    /// Free for root.
    pub(super) free_bytes: u64,
    /// 0 where the file system makes inodes as it goes.
    pub(super) total_inodes: u64,
    pub(super) free_inodes: u64,
    /// Which pool it is.
    pub(super) mark: Option<Uuid>,
}

/// Does it.
///
/// # Errors
/// Each of [`StorageError`] but those of workers.
pub(super) fn act(pool: &Path, ask: &Ask) -> Result<Told, StorageError> {
    let paths = |instance: &InstanceId| InstancePaths::new(pool, *instance);
    match ask {
        Ask::Mount(share) => mount::ensure(share, pool).map(Told::Already),
        Ask::Unmount => mount::unmount(pool).map(Told::Already),
        Ask::Measure => measure(pool).map(Told::Sizes),
        Ask::BeginDisk { image, instance } => {
            begin_disk(&pool.join("images").join(image.to_string()), &paths(instance))
        }
        Ask::AbandonDisk { instance, cancelled } => abandon_disk(&paths(instance), *cancelled).map(done),
        Ask::Overlay(overlay) => base::overlay(pool, overlay).map(done),
        Ask::Base(instance) => base::of(&paths(instance)).map(Told::Base),
        Ask::HoldBase { instance, image, format } => {
            base::hold_again(pool, *instance, *image, *format).map(Told::Already)
        }
        Ask::FindImage(image) => images::find(pool, *image).map(Told::Image),
        Ask::DropImage { image, whole } => images::discard(pool, *image, *whole).map(Told::Image),
        Ask::BeginGrowth(instance) => grow::begin(&paths(instance)).map(Told::Already),
        Ask::Grow(request) => grow::grow(&paths(&request.instance), request).map(done),
        Ask::RestoreDisk(instance) => grow::restore(&paths(instance)).map(done),
        Ask::DropOldDisk(instance) => grow::drop_old(&paths(instance)).map(done),
        Ask::Delete(instance) => delete(&paths(instance)).map(done),
        Ask::Mark(mark) => moves::mark(&paths(&mark.instance), mark.mark),
        Ask::SeeMark(mark) => moves::sees(&paths(&mark.instance), mark.mark).map(Told::Seen),
        Ask::Leave { instance, host } => moves::leave(&paths(instance), *host).map(done),
        Ask::ConfigDrive { instance, image } => {
            let image = STANDARD.decode(image).map_err(|e| StorageError::Invalid(e.to_string()))?;
            let paths = paths(instance);
            create_folder(&paths.folder)?;
            // Whoever is defined has arrived.
            moves::remove_marks(&paths)?;
            write_whole(&paths.config_drive, &image).map(done)
        }
        Ask::Console(instance) => {
            read_tail(&paths(instance).console).map(|tail| Told::Bytes(STANDARD.encode(tail)))
        }
        Ask::Lease { instance, call } => lease::act(&paths(instance), call).map(Told::Lease),
    }
}

fn done(_: ()) -> Told {
    Told::Done
}

fn measure(pool: &Path) -> Result<Sizes, StorageError> {
    let stat = statvfs(pool).map_err(|error| io_error("measure", pool)(error.into()))?;
    let block = stat.fragment_size();
    Ok(Sizes {
        total_bytes: stat.blocks() * block,
        free_bytes: stat.blocks_free() * block,
        total_inodes: stat.files(),
        free_inodes: stat.files_free(),
        mark: pool_mark::ensure(pool),
    })
}

/// Whether the disk is there already; else its folder is ready.
fn begin_disk(source: &Path, paths: &InstancePaths) -> Result<Told, StorageError> {
    if is_file(&paths.disk)? {
        // The worker may have been killed, with the agent, just after it gave the disk its name.
        remove_file(&journal(&paths.disk))?;
        return Ok(Told::Already(true));
    }
    if !is_file(source)? {
        return Err(StorageError::NotFound(source.to_owned()));
    }
    create_folder(&paths.folder)?;
    let file = File::open(source).map_err(io_error("open", source))?;
    let suspect = is_file(&digests::beside(source))? && Digests::of_file(source, &file).is_none();
    Ok(if suspect { Told::Suspect } else { Told::Already(false) })
}

/// Whether a regular file is at `path`.
pub(super) fn is_file(path: &Path) -> Result<bool, StorageError> {
    match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_file() => Ok(true),
        Ok(metadata) => {
            Err(StorageError::Unexpected { path: path.to_owned(), found: kind(&metadata), wanted: "a file" })
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(io_error("look at", path)(error)),
    }
}

fn kind(metadata: &fs::Metadata) -> &'static str {
    match metadata.mode() & libc::S_IFMT {
        libc::S_IFLNK => "a symbolic link",
        libc::S_IFDIR => "a folder",
        libc::S_IFREG => "a file",
        _ => "a special file",
    }
}

pub(super) fn create_folder(folder: &Path) -> Result<(), StorageError> {
    let mut builder = fs::DirBuilder::new();
    builder.recursive(true).mode(0o755).create(folder).map_err(io_error("create", folder))
}

/// Removes what an attempt left; a folder that holds more stays.
fn abandon_disk(paths: &InstancePaths, cancelled: bool) -> Result<(), StorageError> {
    remove_file(&journal(&paths.disk))?;
    remove_file(&partial(&paths.disk))?;
    if cancelled {
        // The worker may have finished just as it was given up; there was no disk before.
        remove_file(&paths.disk)?;
    }
    if !is_file(&paths.disk)? {
        remove_file(&paths.base(DiskFormat::Raw))?;
        remove_file(&paths.base(DiskFormat::Qcow2))?;
    }
    match fs::remove_dir(&paths.folder) {
        Err(error) if !matches!(error.raw_os_error(), Some(libc::ENOTEMPTY | libc::ENOENT)) => {
            Err(io_error("remove", &paths.folder)(error))
        }
        _ => Ok(()),
    }
}

pub(super) fn remove_file(path: &Path) -> Result<(), StorageError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(io_error("remove", path)(error)),
        _ => Ok(()),
    }
}

pub(super) fn delete(paths: &InstancePaths) -> Result<(), StorageError> {
    let unexpected =
        |found, wanted| Err(StorageError::Unexpected { path: paths.folder.clone(), found, wanted });
    match fs::symlink_metadata(&paths.folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(io_error("look at", &paths.folder)(error)),
        Ok(metadata) if !metadata.is_dir() => return unexpected(kind(&metadata), "a folder"),
        Ok(_) => {}
    }
    for path in paths.all() {
        remove_file(&path)?;
    }
    remove_old_consoles(paths)?;
    moves::remove_marks(paths)?;
    match fs::remove_dir(&paths.folder) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) if error.raw_os_error() == Some(libc::ENOTEMPTY) => {
            unexpected("a folder with foreign files in it", "an instance's")
        }
        Err(error) => Err(io_error("remove", &paths.folder)(error)),
    }
}

/// Where libvirt's log daemon writes the console, it keeps older parts as `console.log.0` and so on.
fn remove_old_consoles(paths: &InstancePaths) -> Result<(), StorageError> {
    let entries = fs::read_dir(&paths.folder).map_err(io_error("read", &paths.folder))?;
    for entry in entries {
        let path = entry.map_err(io_error("read", &paths.folder))?.path();
        let number = path.extension().and_then(|number| number.to_str());
        let numbered = number.is_some_and(|number| number.bytes().all(|byte| byte.is_ascii_digit()));
        if numbered && path.with_extension("") == paths.console {
            remove_file(&path)?;
        }
    }
    Ok(())
}

pub(super) fn write_whole(path: &Path, bytes: &[u8]) -> Result<(), StorageError> {
    let growing = partial(path);
    let write = || {
        remove_file(&growing)?;
        let mut options = OpenOptions::new();
        options.write(true).create_new(true).mode(0o644).custom_flags(libc::O_NOFOLLOW);
        let mut file = options.open(&growing).map_err(io_error("create", &growing))?;
        file.write_all(bytes).and_then(|()| file.sync_all()).map_err(io_error("write", &growing))?;
        fs::rename(&growing, path).map_err(io_error("rename", &growing))?;
        let folder = path.parent().unwrap_or(path);
        File::open(folder).and_then(|folder| folder.sync_all()).map_err(io_error("sync", folder))
    };
    write().inspect_err(|_| {
        // The first error is the one to tell; what is left is removed with the instance's folder.
        let _ = fs::remove_file(&growing);
    })
}

fn read_tail(path: &Path) -> Result<Vec<u8>, StorageError> {
    let mut options = OpenOptions::new();
    options.read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK);
    let mut file = match options.open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(io_error("open", path)(error)),
    };
    let mut tail = Vec::new();
    file.metadata()
        .and_then(|metadata| file.seek(SeekFrom::Start(metadata.len().saturating_sub(MAX_CONSOLE_BYTES))))
        .and_then(|_| file.take(MAX_CONSOLE_BYTES).read_to_end(&mut tail))
        .map_err(io_error("read", path))?;
    Ok(tail)
}
