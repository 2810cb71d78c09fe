//! A pool that is a folder: `images/<id>` and `instances/<id>/{disk,config.iso,console.log}`.

use super::{Gate, StorageError};
use crate::config_drive;
use crate::datapath::Stalls;
use crate::datapath::copy::{CopyReport, journal};
use crate::datapath::worker::{CopyOrder, Options, Worker};
use crate::hypervisor::Cancel;
use godwit_protocol::error::ErrorKind;
use godwit_protocol::host::PoolReport;
use godwit_protocol::id::{ImageId, InstanceId};
use godwit_protocol::image::DiskFormat;
use godwit_protocol::instance::InstanceSpec;
use godwit_protocol::operation::Progress;
use godwit_protocol::request::DiskRequest;
use nix::sys::statvfs::statvfs;
use prometheus::{IntCounterVec, Opts, Registry};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How long a small call may take: a server that restarts is back within this.
const PATIENCE: Duration = Duration::from_secs(30);

/// Most of a console log that is read, in bytes.
const MAX_CONSOLE_BYTES: u64 = 1 << 20;

/// Ending of files that are not whole yet.
pub const PARTIAL: &str = "partial";

/// Where an instance's files are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InstancePaths {
    /// The folder.
    pub folder: PathBuf,
    /// Its disk.
    pub disk: PathBuf,
    /// Its config drive.
    pub config_drive: PathBuf,
    /// Its serial console's log.
    pub console: PathBuf,
}

impl InstancePaths {
    /// Under `pool`.
    pub fn new(pool: &Path, instance: InstanceId) -> Self {
        let folder = pool.join("instances").join(instance.to_string());
        Self {
            disk: folder.join("disk"),
            config_drive: folder.join("config.iso"),
            console: folder.join("console.log"),
            folder,
        }
    }

    /// Every name that may be in the folder.
    fn all(&self) -> [PathBuf; 6] {
        [
            self.disk.clone(),
            partial(&self.disk),
            journal(&self.disk),
            self.config_drive.clone(),
            partial(&self.config_drive),
            self.console.clone(),
        ]
    }
}

/// The name under which a file grows.
pub fn partial(path: &Path) -> PathBuf {
    path.with_extension(match path.extension() {
        Some(extension) => format!("{}.{PARTIAL}", extension.to_string_lossy()),
        None => PARTIAL.to_owned(),
    })
}

/// A pool. Clones are the same pool.
#[derive(Clone, Debug)]
pub struct Pool {
    path: PathBuf,
    gate: Gate,
    worker: Worker,
    copies: IntCounterVec,
    copied_bytes: IntCounterVec,
}

impl Pool {
    /// The pool at `path`, its copies counted in `registry`. Nothing is touched yet.
    ///
    /// # Errors
    /// When `registry` holds such metrics already.
    pub fn new(path: PathBuf, registry: &Registry) -> Result<Self, prometheus::Error> {
        let by_method = |name, help| {
            let counter = IntCounterVec::new(Opts::new(name, help), &["method"])?;
            registry.register(Box::new(counter.clone()))?;
            Ok::<_, prometheus::Error>(counter)
        };
        let copies = "Disks copied, by method (reflink, server_side, io_uring, threads).";
        let bytes = "Bytes of data that disk copies wrote, holes and shared blocks not counted, by method.";
        Ok(Self {
            path,
            gate: Gate::default(),
            worker: Worker::default().with_stalls(Stalls::new(registry)?),
            copies: by_method("godwit_disk_copies_total", copies)?,
            copied_bytes: by_method("godwit_disk_copy_bytes_total", bytes)?,
        })
    }

    /// The same pool with another program as its worker.
    pub fn with_worker(self, worker: Worker) -> Self {
        Self { worker, ..self }
    }

    /// The same pool, whose workers remember in `file` what probes of mounts found.
    pub fn with_known(self, file: PathBuf) -> Self {
        Self { worker: self.worker.with_known(file), ..self }
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where an image is.
    pub fn image(&self, image: ImageId) -> PathBuf {
        self.path.join("images").join(image.to_string())
    }

    /// Where an instance's files are.
    pub fn instance(&self, instance: InstanceId) -> InstancePaths {
        InstancePaths::new(&self.path, instance)
    }

    /// Its sizes; a folder that does not answer within `deadline` is reported as unreachable.
    pub fn report(&self, deadline: Duration) -> PoolReport {
        let sizes = self.sizes(deadline).ok();
        let name = self.path.file_name().map_or_else(|| "pool".into(), |name| name.to_string_lossy());
        PoolReport {
            name: name.into_owned(),
            path: self.path.to_string_lossy().into_owned(),
            total_bytes: sizes.map_or(0, |(total, _)| total),
            free_bytes: sizes.map_or(0, |(_, free)| free),
            reachable: sizes.is_some(),
        }
    }

    /// Bytes in all and free for root.
    fn sizes(&self, deadline: Duration) -> Result<(u64, u64), StorageError> {
        let path = self.path.clone();
        self.touch(deadline, move || {
            let stat = statvfs(&path).map_err(|error| io_error("measure", &path)(error.into()))?;
            let block = stat.fragment_size();
            Ok((stat.blocks() * block, stat.blocks_free() * block))
        })
    }

    fn touch<T: Send + 'static>(
        &self,
        deadline: Duration,
        work: impl FnOnce() -> Result<T, StorageError> + Send + 'static,
    ) -> Result<T, StorageError> {
        self.gate.run(deadline, work).unwrap_or_else(|| Err(StorageError::Unreachable(self.path.clone())))
    }

    /// Makes an instance's disk from an image, by a worker process. A disk that is there already is a success;
    /// after an error or a cancel nothing of it is there.
    ///
    /// # Errors
    /// [`StorageError::NotFound`] for the image, [`StorageError::NoSpace`], [`StorageError::Invalid`] when the
    /// image is larger than the disk or no image of its format, and what the worker says.
    pub fn create_disk(
        &self,
        request: &DiskRequest,
        progress: &mut dyn FnMut(Progress),
        cancel: &Cancel,
    ) -> Result<DiskFormat, StorageError> {
        let format = request.image.format;
        if request.size_bytes < request.image.virtual_size_bytes {
            return Err(StorageError::Invalid(format!(
                "a disk of {} bytes is too small for image {} of {} bytes",
                request.size_bytes, request.image.image, request.image.virtual_size_bytes
            )));
        }
        let source = self.image(request.image.image);
        let paths = self.instance(request.instance);
        let (begin_source, begin_paths) = (source.clone(), paths.clone());
        if self.touch(PATIENCE, move || begin_disk(&begin_source, &begin_paths))? {
            return Ok(format);
        }
        let copied = self.check_space(request).and_then(|()| {
            let order = CopyOrder {
                source,
                destination: paths.disk.clone(),
                format,
                size_bytes: Some(request.size_bytes),
                options: Options::default(),
            };
            let mut report = |done_bytes, total_bytes| progress(Progress::Copy { done_bytes, total_bytes });
            self.worker.copy(&order, &mut report, cancel).map_err(|error| self.explain(error, request))
        });
        match &copied {
            Ok(report) => self.count(report),
            Err(_) => {
                let cancelled = cancel.is_cancelled();
                self.touch(PATIENCE, move || abandon_disk(&paths, cancelled))?;
            }
        }
        copied.map(|_| format)
    }

    fn count(&self, report: &CopyReport) {
        let method = [report.method.as_str()];
        self.copies.with_label_values(&method).inc();
        self.copied_bytes.with_label_values(&method).inc_by(report.data_bytes);
    }

    fn check_space(&self, request: &DiskRequest) -> Result<(), StorageError> {
        let (_, have_bytes) = self.sizes(PATIENCE)?;
        if request.size_bytes <= have_bytes {
            return Ok(());
        }
        Err(StorageError::NoSpace { pool: self.path.clone(), need_bytes: request.size_bytes, have_bytes })
    }

    /// A worker's "no space", with figures.
    fn explain(&self, error: godwit_protocol::error::RequestError, request: &DiskRequest) -> StorageError {
        match (error.kind, self.sizes(PATIENCE)) {
            (ErrorKind::NoSpace, Ok((_, have_bytes))) => {
                StorageError::NoSpace { pool: self.path.clone(), need_bytes: request.size_bytes, have_bytes }
            }
            _ => StorageError::Worker(error),
        }
    }

    /// Removes an instance's folder: the names that are ours, then the folder. Symbolic links are removed, never
    /// followed; not being there is a success.
    ///
    /// # Errors
    /// [`StorageError::Unexpected`] when the folder is none or holds something else, which is left alone.
    pub fn delete_disk(&self, instance: InstanceId) -> Result<(), StorageError> {
        let paths = self.instance(instance);
        self.touch(PATIENCE, move || delete(&paths))
    }

    /// Writes an instance's config drive, whole or not at all; an older one is replaced.
    ///
    /// # Errors
    /// [`StorageError::Invalid`] when it cannot be built, [`StorageError::Unreachable`], [`StorageError::Io`].
    pub fn write_config_drive(&self, spec: &InstanceSpec) -> Result<(), StorageError> {
        let image = config_drive::build(spec)
            .map_err(|error| StorageError::Invalid(crate::hypervisor::chain(&error)))?;
        let paths = self.instance(spec.instance);
        self.touch(PATIENCE, move || {
            create_folder(&paths.folder)?;
            write_whole(&paths.config_drive, &image)
        })
    }

    /// The last `lines` of the serial console, all of the last MiB when none are named. Bytes that are no UTF-8
    /// are replaced; a guest that never ran has said nothing.
    ///
    /// # Errors
    /// [`StorageError::Unreachable`], [`StorageError::Io`].
    pub fn console(&self, instance: InstanceId, lines: Option<u32>) -> Result<String, StorageError> {
        let path = self.instance(instance).console;
        let tail = self.touch(PATIENCE, move || read_tail(&path))?;
        let text = String::from_utf8_lossy(&tail);
        Ok(match lines {
            Some(lines) => last_lines(&text, lines as usize).to_owned(),
            None => text.into_owned(),
        })
    }
}

fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StorageError {
    let path = path.to_owned();
    move |source| StorageError::Io { action, path, source }
}

/// Whether the disk is there already; else its folder is ready.
fn begin_disk(source: &Path, paths: &InstancePaths) -> Result<bool, StorageError> {
    if is_file(&paths.disk)? {
        return Ok(true);
    }
    if !is_file(source)? {
        return Err(StorageError::NotFound(source.to_owned()));
    }
    create_folder(&paths.folder)?;
    Ok(false)
}

/// Whether a regular file is at `path`.
fn is_file(path: &Path) -> Result<bool, StorageError> {
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

fn create_folder(folder: &Path) -> Result<(), StorageError> {
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
    match fs::remove_dir(&paths.folder) {
        Err(error) if !matches!(error.raw_os_error(), Some(libc::ENOTEMPTY | libc::ENOENT)) => {
            Err(io_error("remove", &paths.folder)(error))
        }
        _ => Ok(()),
    }
}

fn remove_file(path: &Path) -> Result<(), StorageError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(io_error("remove", path)(error)),
        _ => Ok(()),
    }
}

fn delete(paths: &InstancePaths) -> Result<(), StorageError> {
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

fn write_whole(path: &Path, bytes: &[u8]) -> Result<(), StorageError> {
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

/// The last `count` lines; a last line without its end counts.
fn last_lines(text: &str, count: usize) -> &str {
    if count == 0 {
        return "";
    }
    let body = text.strip_suffix('\n').unwrap_or(text);
    match body.rmatch_indices('\n').nth(count - 1) {
        Some((position, _)) => &text[position + 1..],
        None => text,
    }
}

#[cfg(test)]
mod tests;
