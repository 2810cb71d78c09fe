//! A copy of a disk or image: what is copied, by which way, and when the result may be seen. The destination appears
//! under its name only when it is whole and on stable storage.

mod error;
mod grow;
mod growing;
mod order;
mod passing;
mod verify;

pub use error::CopyError;
pub(super) use error::io_error;
pub(super) use growing::Growing;
use growing::remove;
pub use growing::{journal, partial};
pub use order::{CopyOrder, CopyReport, Options, Phases};

use super::choice::Method;
use super::digests::{self, Digests, Sum, Whole, ZeroDigests};
use super::image::{Image, ImageError, read_header};
use super::journal::{Journal, Stamp, Subject};
use super::kernel::{reflink, set_io_class};
use godwit_protocol::image::DiskFormat;
use passing::{Passing, Prepared};
pub(super) use passing::{goes_direct, set_direct};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

/// Access rights of a copy where none are named.
const PRIVATE: u32 = 0o600;

/// A smaller copy has no journal: it is made anew before a journal is read.
const WORTH_A_JOURNAL_BYTES: u64 = 16 << 20;

/// Copies; `progress` is told the bytes done and in all, holes included, after each chunk.
///
/// # Errors
/// [`CopyError`].
pub fn copy(order: &CopyOrder, progress: &mut (dyn FnMut(u64, u64) + Send)) -> Result<CopyReport, CopyError> {
    let begun = Instant::now();
    if let Some(class) = order.options.io_class {
        set_io_class(class).map_err(io_error("set the I/O priority for", &order.source))?;
    }
    let source = open_source(&order.source)?;
    let metadata = source.metadata().map_err(io_error("look at", &order.source))?;
    let stamp = Stamp::of(&source).map_err(io_error("look at", &order.source))?;
    let plan = Plan::new(order, &source, metadata.len())?;
    let mode = order.options.mode.unwrap_or(PRIVATE);
    let growing = Growing::claim(&order.destination, Some(&metadata), order.options.overwrite, mode)?;
    let copying = Copying { order, source: &source, stamp, plan: &plan, growing: &growing };
    let mut made = match copying.make(begun, progress) {
        Ok(made) => made,
        Err(error) => {
            if order.options.keep_partial && !order.options.no_resume && error.may_go_on() {
                growing.keep();
            }
            return Err(error);
        }
    };
    if Stamp::of(&source).map_err(io_error("look at", &order.source))? != stamp {
        return Err(CopyError::SourceChanged(order.source.clone()));
    }
    let whole = Whole { sha512: made.report.sha512.clone(), md5: made.report.md5.clone() };
    let list = made.journal.as_ref().filter(|_| order.options.digests);
    made.report.digests_root = publish(&order.destination, growing, list, &whole)?;
    Ok(made.report)
}

/// What a copy is before it has its name.
struct Made {
    report: CopyReport,
    journal: Option<Journal>,
}

/// Gives the copy its name, and the list of its digests, where one is wanted, the name beside it; the answer is the
/// list's root.
pub(super) fn publish(
    destination: &Path,
    mut growing: Growing,
    list: Option<&Journal>,
    whole: &Whole,
) -> Result<Option<String>, CopyError> {
    let path = digests::beside(destination);
    let unfinished = &partial(&path);
    // Also what a killed copy left that made a list.
    remove(unfinished)?;
    let mut root = None;
    if let Some(journal) = list {
        let about = growing.file.metadata().map_err(io_error("look at", &growing.path))?;
        let zeros = ZeroDigests::new(digests::DIGEST_CHUNK_BYTES);
        let each = |offset: u64| {
            let length = (about.len() - offset).min(digests::DIGEST_CHUNK_BYTES as u64) as usize;
            verify::noted(journal, &zeros, offset, length)
        };
        let written = digests::write(unfinished, &about, whole, each);
        root = Some(written.map_err(io_error("write", unfinished))?);
    }
    // A list about what was there before must not outlive it.
    remove(&path)?;
    growing.rename().inspect_err(|_| drop(fs::remove_file(unfinished)))?;
    if list.is_some() {
        fs::rename(unfinished, &path).map_err(io_error("rename", unfinished))?;
    }
    growing.settle()?;
    Ok(root)
}

/// Opens what is to be read: a regular file, and no link to one.
///
/// # Errors
/// [`CopyError::NoSource`], [`CopyError::NotRegular`], [`CopyError::Io`].
pub(super) fn open_source(path: &Path) -> Result<File, CopyError> {
    // O_NONBLOCK: opening a FIFO would wait for a writer.
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    let file = match OpenOptions::new().read(true).custom_flags(flags).open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(CopyError::NoSource(path.to_owned()));
        }
        Err(error) if matches!(error.raw_os_error(), Some(libc::ELOOP | libc::ENXIO)) => {
            return Err(CopyError::NotRegular(path.to_owned()));
        }
        Err(error) => return Err(io_error("open", path)(error)),
    };
    match file.metadata().map_err(io_error("look at", path))?.is_file() {
        true => Ok(file),
        false => Err(CopyError::NotRegular(path.to_owned())),
    }
}

/// How the disk changes on its way.
struct Plan {
    /// The image to read from, when its bytes are not copied as they are.
    image: Option<Image>,
    /// The destination is a new image.
    makes_image: bool,
    /// Bytes of the source: of its file, or of its disk when the format changes.
    source_bytes: u64,
    /// Bytes of the disk that is written.
    disk_bytes: u64,
    /// An image whose bytes are copied as they are grows afterwards, to this many bytes.
    grows_to: Option<u64>,
    /// What the source should be, if that is known.
    expected: Option<Digests>,
}

impl Plan {
    fn new(order: &CopyOrder, source: &File, file_bytes: u64) -> Result<Self, CopyError> {
        let options = &order.options;
        let to = options.to.unwrap_or(order.format);
        // An image whose disk is wanted, or that becomes another format.
        let converts = options.to.is_some_and(|to| to != order.format);
        let image = match (converts, order.format) {
            (true, DiskFormat::Qcow2) => Some(Image::open(source).map_err(|error| explain(order, error))?),
            _ => None,
        };
        let source_bytes = image.as_ref().map_or(file_bytes, Image::size_bytes);
        let grown = plan_growth(order, source, source_bytes, converts)?;
        let as_it_is = !converts && to == DiskFormat::Qcow2;
        let expected = match (&options.expect, converts) {
            (Some(path), false) => Some(expect(path, file_bytes)?),
            (Some(_), true) => {
                let why = "digests are of a file's bytes: they cannot be expected of a disk that changes its format";
                return Err(CopyError::Contradiction(why));
            }
            (None, false) => Digests::of_file(&order.source, source),
            (None, true) => None,
        };
        if options.digests && (to == DiskFormat::Qcow2 && (converts || grown.is_some())) {
            let why = "the digests of a new or grown qcow2 image are not known while its bytes pass; leave them out";
            return Err(CopyError::Contradiction(why));
        }
        if options.verify && as_it_is && grown.is_some() {
            let why = "a qcow2 image that grows changes its own bytes, so that it cannot be verified";
            return Err(CopyError::Contradiction(why));
        }
        Ok(Self {
            image,
            makes_image: converts && to == DiskFormat::Qcow2,
            source_bytes,
            disk_bytes: if as_it_is { source_bytes } else { grown.unwrap_or(source_bytes) },
            grows_to: grown.filter(|_| as_it_is),
            expected,
        })
    }

    /// Whether the destination's file is to hold the source's bytes as they are.
    fn is_plain(&self) -> bool {
        self.image.is_none() && !self.makes_image
    }

    fn conversion(&self) -> String {
        format!("{} to {} of {}", self.image.is_some(), self.makes_image, self.disk_bytes)
    }
}

fn explain(order: &CopyOrder, error: ImageError) -> CopyError {
    match error {
        ImageError::Header(source) => CopyError::Header { path: order.source.clone(), source },
        ImageError::Tables(source) => io_error("read the tables of", &order.source)(source),
    }
}

fn expect(path: &Path, file_bytes: u64) -> Result<Digests, CopyError> {
    let wrong = |source| CopyError::Expect { path: path.to_owned(), source };
    let digests = Digests::open(path).map_err(wrong)?;
    match digests.head.size_bytes {
        theirs if theirs == file_bytes => Ok(digests),
        theirs => Err(wrong(digests::DigestsError::Size { theirs, ours: file_bytes })),
    }
}

/// The size to grow to, where that is more than the source has; the source's head is checked on the way.
fn plan_growth(
    order: &CopyOrder,
    source: &File,
    source_bytes: u64,
    converts: bool,
) -> Result<Option<u64>, CopyError> {
    let Some(wanted_bytes) = order.size_bytes else { return Ok(None) };
    let have_bytes = match order.format {
        DiskFormat::Qcow2 if !converts => {
            read_header(source).map_err(|error| explain(order, error))?.virtual_size_bytes
        }
        _ => source_bytes,
    };
    if wanted_bytes < have_bytes {
        return Err(CopyError::TooSmall { wanted_bytes, have_bytes });
    }
    Ok((wanted_bytes > have_bytes).then_some(wanted_bytes))
}

/// A copy under way.
struct Copying<'a> {
    order: &'a CopyOrder,
    source: &'a File,
    stamp: Stamp,
    plan: &'a Plan,
    growing: &'a Growing,
}

impl Copying<'_> {
    /// Makes the copy and brings it to stable storage, all but its name.
    fn make(&self, begun: Instant, progress: &mut (dyn FnMut(u64, u64) + Send)) -> Result<Made, CopyError> {
        let mut phases = Phases { prepare_ms: millis(begun), ..Phases::default() };
        let transfer = Instant::now();
        let mut made = match self.clone_blocks()? {
            true => self.look_at_clone(progress)?,
            false => self.pass_bytes(progress)?,
        };
        phases.transfer_ms = millis(transfer);
        if let Some(size_bytes) = self.plan.grows_to {
            grow::grow_qcow2(&self.growing.path, size_bytes)?;
        }
        let sync = Instant::now();
        self.growing.sync()?;
        phases.sync_ms = millis(sync);
        if self.order.options.verify {
            let verify = Instant::now();
            made.report.verified = self.verify(&made, progress)?;
            phases.verify_ms = millis(verify);
        }
        made.report.phases = phases;
        Ok(made)
    }

    /// Whether the blocks are now shared.
    fn clone_blocks(&self) -> Result<bool, CopyError> {
        let forced = self.order.options.method;
        let no = |why| match forced {
            Some(Method::Reflink) => {
                let (method, path) = (Method::Reflink, self.order.source.clone());
                Err(CopyError::Method { method, path, why })
            }
            _ => Ok(false),
        };
        if !self.plan.is_plain() {
            return no("the bytes change with the format");
        }
        if forced.is_some_and(|method| method != Method::Reflink) {
            return Ok(false);
        }
        let cloned = reflink(self.source, &self.growing.file);
        match cloned.map_err(io_error("clone", &self.order.source))? {
            true => {
                self.growing.resize(self.plan.disk_bytes)?;
                Ok(true)
            }
            false => no("the file system, or this pair of files, shares no blocks"),
        }
    }

    /// A clone has passed no bytes: what is asked about them is read from it.
    fn look_at_clone(&self, progress: &mut (dyn FnMut(u64, u64) + Send)) -> Result<Made, CopyError> {
        let options = &self.order.options;
        let mut report = self.report(Method::Reflink, "the blocks are shared".to_owned());
        let mut journal = None;
        if options.digests || options.verify || !options.checksums.is_empty() || options.expect.is_some() {
            let (looked, noted) = Passing::new(self, Prepared::reading_only(self)?).run(progress)?;
            report = CopyReport {
                method: Method::Reflink,
                reason: "the blocks are shared; their bytes were only read".to_owned(),
                written_bytes: 0,
                ..looked
            };
            journal = noted;
        }
        progress(self.plan.disk_bytes, self.plan.disk_bytes);
        Ok(Made { report, journal })
    }

    fn pass_bytes(&self, progress: &mut (dyn FnMut(u64, u64) + Send)) -> Result<Made, CopyError> {
        let (report, journal) = Passing::new(self, Prepared::new(self)?).run(progress)?;
        if self.plan.is_plain() || !self.plan.makes_image {
            // Whole blocks were written.
            self.growing.resize(self.plan.disk_bytes)?;
        }
        Ok(Made { report, journal })
    }

    /// Reads the copy again; false where nothing was noted to compare it with.
    fn verify(&self, made: &Made, progress: &mut (dyn FnMut(u64, u64) + Send)) -> Result<bool, CopyError> {
        let Some(journal) = &made.journal else { return Ok(false) };
        let Some(sum) = journal.digests else { return Ok(false) };
        let path = &self.order.destination;
        // What the page cache holds is what was written, whatever the disk has.
        passing::forget(&self.growing.file);
        let image = match self.plan.makes_image {
            true => Some(Image::reopen(&self.growing.file).map_err(io_error("read", path))?),
            false => None,
        };
        let about = (journal, sum, self.plan.disk_bytes);
        let direct = image.is_none() && passing::set_direct(&self.growing.file, true);
        let verified = verify::verify((&self.growing.file, path), image.as_ref(), about, progress);
        if direct {
            passing::set_direct(&self.growing.file, false);
        }
        verified.map(|()| true)
    }

    fn report(&self, method: Method, reason: String) -> CopyReport {
        CopyReport {
            method,
            reason,
            depth: 0,
            direct: (false, false),
            size_bytes: self.plan.source_bytes,
            data_bytes: 0,
            written_bytes: 0,
            resumed_bytes: 0,
            checked: false,
            verified: false,
            digests_root: None,
            sha512: None,
            md5: None,
            phases: Phases::default(),
        }
    }

    /// Whether a record is made of each chunk.
    fn wants_journal(&self) -> bool {
        let options = &self.order.options;
        self.sum().is_some() || (!options.no_resume && self.plan.disk_bytes >= WORTH_A_JOURNAL_BYTES)
    }

    /// The digest of each chunk that the record holds, if any.
    fn sum(&self) -> Option<Sum> {
        let options = &self.order.options;
        let stored = options.digests.then_some(Sum::Blake3);
        stored.or(options.verify.then_some(Sum::Xxh3))
    }

    fn subject(&self, chunk_bytes: usize) -> Result<Subject, CopyError> {
        let target = self.growing.file.metadata().map_err(io_error("look at", &self.growing.path))?;
        let conversion = self.plan.conversion();
        Ok(Subject::new(self.stamp, target.ino(), conversion, chunk_bytes, self.sum()))
    }
}

fn millis(since: Instant) -> u64 {
    let elapsed: Duration = since.elapsed();
    elapsed.as_millis() as u64
}

#[cfg(test)]
mod tests;
