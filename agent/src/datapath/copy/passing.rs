//! Bytes that pass through this process: which loop moves them, over which chunks, and what is noted of them.

use super::error::{CopyError, io_error};
use super::{CopyReport, Copying};
use crate::datapath::buffer::Buffer;
use crate::datapath::choice::{self, Choice, Facts, Loop, Measured, Method};
use crate::datapath::chunks::{Chunks, Extents};
use crate::datapath::image::{Found, Image};
use crate::datapath::journal::Journal;
use crate::datapath::mounts::Mount;
use crate::datapath::ordered::Ordered;
use crate::datapath::pass::{Extras, Pass, Shape, TransferError};
use crate::datapath::{kernel, known, ring, server_side, threads};
use nix::fcntl::{FcntlArg, OFlag, PosixFadviseAdvice, fcntl, posix_fadvise};
use nix::sys::resource::{UsageWho, getrusage};
use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::time::Instant;

/// The grid of chunks where digests are stored or known, and on network file systems, whose requests are no larger, in
/// bytes.
const CHUNK_BYTES: usize = 1 << 20;

/// The grid on disks: a huge page, so that a request is one piece of memory (docs/decisions/0016).
const DISK_CHUNK_BYTES: usize = 2 << 20;

/// The grid in memory: what a thread reads is still in its CPU's own cache when it writes it.
const MEMORY_CHUNK_BYTES: usize = 512 << 10;

/// Of a source's data, as hundredths: what must be in the page cache so that it is read from there.
const WARM_PERCENT: u64 = 80;

/// Runs of an image that are looked at to see whether it is compressed.
const LOOKS: usize = 64;

/// Whether the file now bypasses the page cache as wanted.
pub(in crate::datapath) fn set_direct(file: &File, direct: bool) -> bool {
    let Ok(flags) = fcntl(file, FcntlArg::F_GETFL) else { return false };
    let mut flags = OFlag::from_bits_retain(flags);
    flags.set(OFlag::O_DIRECT, direct);
    fcntl(file, FcntlArg::F_SETFL(flags)).is_ok()
}

/// Makes a file bypass the page cache, when it takes requests of whole blocks so. The flag alone may be taken by a
/// file system that then wants more.
pub(in crate::datapath) fn goes_direct(file: &File) -> bool {
    let takes = set_direct(file, true) && file.read_at(&mut Buffer::new(0), 0).is_ok();
    if !takes {
        set_direct(file, false);
    }
    takes
}

/// Drops what the page cache holds of a file and need not.
pub(super) fn forget(file: &File) {
    // Only a hint.
    let _ = posix_fadvise(file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED);
}

/// What is known before a byte passes.
pub(super) struct Prepared {
    source: Mount,
    target: Mount,
    warm: bool,
    data_bytes: u64,
    encoded: bool,
    chunk_bytes: usize,
    reads_only: bool,
}

impl Prepared {
    pub(super) fn new(copying: &Copying<'_>) -> Result<Self, CopyError> {
        let look = |file: &File, path| Mount::of(file).map_err(io_error("look at", path));
        let source = look(copying.source, &copying.order.source)?;
        let target = look(&copying.growing.file, &copying.growing.path)?;
        let metadata = copying.source.metadata().map_err(io_error("look at", &copying.order.source))?;
        let data_bytes = (metadata.blocks() * 512).min(metadata.len());
        let in_memory = source.is_memory() && target.is_memory();
        // The kernel counts page by page; of a file that is nowhere else it need not.
        let cached = if source.is_memory() { None } else { kernel::cached_bytes(copying.source) };
        let digested = copying.order.options.digests
            || copying.plan.expected.is_some()
            || !copying.order.options.checksums.is_empty();
        let remote = source.write_bytes().is_some() || target.write_bytes().is_some();
        let chunk_bytes = match (digested || remote, in_memory) {
            (true, _) => CHUNK_BYTES,
            (false, true) => MEMORY_CHUNK_BYTES,
            (false, false) => DISK_CHUNK_BYTES,
        };
        Ok(Self {
            warm: cached.unwrap_or(0) >= data_bytes / 100 * WARM_PERCENT,
            encoded: copying.plan.image.as_ref().is_some_and(is_encoded),
            source,
            target,
            data_bytes,
            chunk_bytes,
            reads_only: false,
        })
    }

    /// The bytes are in place; they are only looked at.
    pub(super) fn reading_only(copying: &Copying<'_>) -> Result<Self, CopyError> {
        Ok(Self { reads_only: true, ..Self::new(copying)? })
    }
}

/// Whether an image's data is compressed, as far as its front tells.
fn is_encoded(image: &Image) -> bool {
    let mut position = 0;
    for _ in 0..LOOKS {
        // A table that does not read is told of when it is its turn.
        let Ok((found, length)) = image.look(position) else { return false };
        match found {
            Found::Encoded => return true,
            Found::End => return false,
            Found::At(_) | Found::Zeros => position += length,
        }
    }
    false
}

/// A pass and what it needs.
pub(super) struct Passing<'a> {
    copying: &'a Copying<'a>,
    prepared: Prepared,
}

impl<'a> Passing<'a> {
    pub(super) fn new(copying: &'a Copying<'a>, prepared: Prepared) -> Self {
        Self { copying, prepared }
    }

    /// Moves the bytes. The answer's journal holds what was noted.
    pub(super) fn run(
        self,
        progress: &mut (dyn FnMut(u64, u64) + Send),
    ) -> Result<(CopyReport, Option<Journal>), CopyError> {
        if let Some(done) = self.leave_to_server(progress)? {
            return Ok(done);
        }
        let options = &self.copying.order.options;
        let ordered = (!options.checksums.is_empty()).then(|| Ordered::new(&options.checksums));
        if ordered.is_some() && options.method == Some(Method::IoUring) {
            let why = "digests of the whole want the bytes in order, which a ring does not give; use threads";
            return Err(CopyError::Contradiction(why));
        }
        let journal = self.open_journal(ordered.is_some())?;
        let target = self.open_target(journal.as_ref())?;
        let mut report = self.move_bytes(journal.as_ref(), ordered.as_ref(), target.clone(), progress)?;
        if let Some(ordered) = ordered {
            let whole = ordered.finish(self.copying.plan.disk_bytes);
            (report.sha512, report.md5) = (whole.sha512, whole.md5);
        }
        Ok((report, journal))
    }

    /// The journal of this copy, and the file as it must be to go on with it.
    fn open_journal(&self, ordered: bool) -> Result<Option<Journal>, CopyError> {
        let copying = self.copying;
        let path = super::journal(&copying.order.destination);
        let wanted = copying.wants_journal();
        let subject = copying.subject(self.prepared.chunk_bytes)?;
        // Digests of the whole need all of the bytes to pass.
        let goes_on = wanted && !copying.order.options.no_resume && !ordered && !self.prepared.reads_only;
        if goes_on
            && let Some(journal) = copying.growing.noted(&subject)?
            && self.has_tables(&journal)
        {
            return Ok(Some(journal));
        }
        if !self.prepared.reads_only {
            copying.growing.clear()?;
        }
        match wanted {
            true => Journal::create(&path, &subject).map(Some).map_err(io_error("write", &path)),
            false => Ok(None),
        }
    }

    /// Whether a new image that an earlier attempt began has its tables, where there is to be one.
    fn has_tables(&self, journal: &Journal) -> bool {
        let growing = &self.copying.growing.file;
        !self.copying.plan.makes_image || (journal.is_ready() && Image::reopen(growing).is_ok())
    }

    /// Makes the destination ready for data: sized, or a new image with room for what is data in the source.
    fn open_target(&self, journal: Option<&Journal>) -> Result<Option<Image>, CopyError> {
        let (plan, growing) = (self.copying.plan, self.copying.growing);
        if !plan.makes_image {
            growing.resize(plan.disk_bytes)?;
            return Ok(None);
        }
        let told = |error| io_error("write the tables of", &growing.path)(error);
        if journal.is_some_and(|journal| journal.resumed) {
            return Image::reopen(&growing.file).map(Some).map_err(told);
        }
        let image = Image::create(&growing.file, plan.disk_bytes).map_err(told)?;
        let mut extents = self.extents()?;
        while let Some(extent) = extents.find().map_err(io_error("read", &self.copying.order.source))? {
            image.allocate(extent.offset, extent.length).map_err(told)?;
        }
        image.flush().map_err(told)?;
        if let Some(journal) = journal {
            journal.set_ready().map_err(io_error("keep the journal of", &self.copying.order.destination))?;
        }
        Ok(Some(image))
    }

    fn extents(&self) -> Result<Extents, CopyError> {
        let path = &self.copying.order.source;
        Ok(match &self.copying.plan.image {
            Some(image) => Extents::Image { image: image.clone(), position: 0 },
            None => {
                let file = self.copying.source.try_clone().map_err(io_error("read", path))?;
                Extents::File { file, position: 0, size_bytes: self.copying.plan.source_bytes }
            }
        })
    }

    fn pass<'p>(
        &'p self,
        extras: Extras<'p>,
        target: Option<Image>,
        chunk_bytes: usize,
        progress: &'p mut (dyn FnMut(u64, u64) + Send),
    ) -> Result<Pass<'p>, CopyError> {
        let disk_bytes = self.copying.plan.disk_bytes;
        let chunks = Chunks::new(self.extents()?, target, disk_bytes, chunk_bytes);
        let files = (self.copying.source, &self.copying.growing.file);
        Ok(Pass::new(files, (chunks, self.copying.plan.source_bytes, chunk_bytes), extras, progress))
    }

    /// Lets the file server copy, where it can and nothing else wants to see the bytes.
    fn leave_to_server(
        &self,
        progress: &mut (dyn FnMut(u64, u64) + Send),
    ) -> Result<Option<(CopyReport, Option<Journal>)>, CopyError> {
        let (copying, prepared) = (self.copying, &self.prepared);
        let options = &copying.order.options;
        let forced = options.method == Some(Method::ServerSide);
        let no = |why| match forced {
            true => {
                let (method, path) = (Method::ServerSide, copying.order.source.clone());
                Err(CopyError::Method { method, path, why })
            }
            false => Ok(None),
        };
        if options.method.is_some_and(|method| method != Method::ServerSide) || prepared.reads_only {
            return Ok(None);
        }
        if prepared.source.device != prepared.target.device || !prepared.target.copies_on_server() {
            return no("the files are not on one mount whose server copies by itself (NFS 4.2, SMB, Ceph)");
        }
        let looks = copying.sum().is_some()
            || !options.checksums.is_empty()
            || copying.plan.expected.is_some()
            || !copying.plan.is_plain();
        if looks {
            return no("what is asked for needs the bytes to pass through this process");
        }
        let grid = server_side::CHUNK_BYTES;
        let part = Passing { copying, prepared: Prepared { chunk_bytes: grid, ..prepared.clone() } };
        let journal = part.open_journal(false)?;
        copying.growing.resize(copying.plan.disk_bytes)?;
        let extras =
            Extras { journal: journal.as_ref(), limit: options.bandwidth_bytes, ..Extras::default() };
        let pass = part.pass(extras, None, grid, progress)?;
        let outcome = server_side::transfer(&pass, &prepared.target).map_err(|error| self.explain(error))?;
        let counts = pass.counts();
        drop(pass);
        match outcome {
            server_side::Outcome::NotByServer => no("its server does not copy by itself"),
            server_side::Outcome::Copied => {
                let reason = format!("the server of {} copies by itself", prepared.target.origin);
                let mut report = copying.report(Method::ServerSide, reason);
                (report.data_bytes, report.written_bytes) = (counts.read_bytes, counts.written_bytes);
                report.resumed_bytes = counts.resumed_bytes;
                Ok(Some((report, journal)))
            }
        }
    }

    fn move_bytes(
        &self,
        journal: Option<&Journal>,
        ordered: Option<&Ordered>,
        target: Option<Image>,
        progress: &mut (dyn FnMut(u64, u64) + Send),
    ) -> Result<CopyReport, CopyError> {
        let (copying, prepared) = (self.copying, &self.prepared);
        let options = &copying.order.options;
        let plan = copying.plan;
        let extras = Extras {
            image: plan.image.as_ref(),
            journal,
            expected: plan.expected.as_ref().map(|expected| (expected, plan.source_bytes)),
            ordered,
            limit: options.bandwidth_bytes,
            courtesy: options.polite.then_some(choice::MOST_UNDER_WAY),
            remember_zeros: target.is_some(),
            reads_only: prepared.reads_only,
        };
        let pass = self.pass(extras, target.clone(), prepared.chunk_bytes, progress)?;
        let shape = self.shape();
        let (used, reason) = Mover { passing: self, pass: &pass, shape }.choose_and_run(ordered.is_some())?;
        set_direct(copying.source, false);
        set_direct(&copying.growing.file, false);
        let (counts, zeros) = (pass.counts(), pass.zeros());
        drop(pass);
        drop(target);
        if plan.makes_image {
            self.give_back(&zeros)?;
        }
        let mut report = copying.report(used.method, reason);
        report.depth = used.depth;
        report.direct = (shape.source_direct, shape.target_direct);
        (report.data_bytes, report.written_bytes) = (counts.read_bytes, counts.written_bytes);
        report.resumed_bytes = counts.resumed_bytes;
        report.checked = plan.expected.is_some();
        Ok(report)
    }

    /// Room in a new image for what turned out to be zeros.
    fn give_back(&self, zeros: &[(u64, u64)]) -> Result<(), CopyError> {
        let growing = self.copying.growing;
        let told = |error| io_error("write the tables of", &growing.path)(error);
        let mut image = Image::reopen(&growing.file).map_err(told)?;
        for &(start, end) in zeros {
            let start = start.next_multiple_of(Image::CLUSTER_BYTES);
            let end = match end == self.copying.plan.disk_bytes {
                true => end,
                false => end / Image::CLUSTER_BYTES * Image::CLUSTER_BYTES,
            };
            if start < end {
                image.discard(start, end - start).map_err(told)?;
            }
        }
        image.flush().map_err(told)
    }

    /// How the files are opened at first.
    fn shape(&self) -> Shape {
        let (prepared, plan) = (&self.prepared, self.copying.plan);
        let aligned = plan.image.as_ref().is_none_or(Image::has_whole_blocks);
        let few = prepared.data_bytes < choice::SMALL_BYTES;
        let may = !few && aligned;
        let source_direct = may && !prepared.warm && !prepared.source.is_memory();
        let target_direct = may && !prepared.reads_only && !prepared.target.is_memory();
        let source_direct = source_direct && goes_direct(self.copying.source);
        let target_direct = target_direct && goes_direct(&self.copying.growing.file);
        let limit = [prepared.source.write_bytes(), prepared.target.write_bytes()];
        let request_bytes = limit.into_iter().flatten().fold(prepared.chunk_bytes, usize::min);
        Shape { source_direct, target_direct, request_bytes: request_bytes / 4096 * 4096 }
    }

    fn explain(&self, error: TransferError) -> CopyError {
        let order = self.copying.order;
        match error {
            TransferError::Setup(source) => CopyError::NoRing(source),
            TransferError::Read(source) => io_error("read", &order.source)(source),
            TransferError::SourceShrank => CopyError::SourceChanged(order.source.clone()),
            TransferError::Write(source) => io_error("write", &self.copying.growing.path)(source),
            TransferError::Journal(source) => io_error("keep the journal of", &order.destination)(source),
            TransferError::Digest(offset) => CopyError::Damaged { path: order.source.clone(), offset },
        }
    }
}

impl Clone for Prepared {
    fn clone(&self) -> Self {
        Self { source: self.source.clone(), target: self.target.clone(), ..*self }
    }
}

/// Runs the loops over a pass.
struct Mover<'a, 'p> {
    passing: &'a Passing<'a>,
    pass: &'a Pass<'p>,
    shape: Shape,
}

impl Mover<'_, '_> {
    fn choose_and_run(&self, ordered: bool) -> Result<(Loop, String), CopyError> {
        let (copying, prepared) = (self.passing.copying, &self.passing.prepared);
        let options = &copying.order.options;
        let passes = format!("{} {}", self.shape.source_direct, self.shape.target_direct);
        let key = known::key(&prepared.source, &prepared.target, &passes);
        let facts = Facts {
            forced: options.method,
            probe: options.probe,
            ordered,
            encoded: prepared.encoded,
            summed: copying.sum().is_some() || copying.plan.expected.is_some(),
            source: &prepared.source,
            target: &prepared.target,
            data_bytes: prepared.data_bytes,
            cpus: std::thread::available_parallelism().map_or(1, usize::from),
            // A limit makes all ways alike.
            known: options
                .known
                .as_deref()
                .filter(|_| !options.probe)
                .and_then(|file| known::find(file, &key)),
        };
        let (used, reason) = match choice::choose(&facts) {
            Choice::Use(used, why) => (used, why.to_owned()),
            Choice::Probe if options.bandwidth_bytes.is_some() || options.polite => {
                (choice::RING, "a copy that holds itself back tells nothing in a probe".to_owned())
            }
            Choice::Probe => {
                let found = self.probe()?;
                if let Some(file) = &options.known {
                    known::remember(file, key, found);
                }
                (found, "the best in a probe of these mounts".to_owned())
            }
        };
        self.pass.allow(None);
        match self.run(used) {
            Err(TransferError::Setup(_)) if used.method == Method::IoUring && options.method.is_none() => {
                self.run(choice::THREADS).map_err(|error| self.passing.explain(error))?;
                Ok((choice::THREADS, "the kernel gives no io_uring".to_owned()))
            }
            Err(error) => Err(self.passing.explain(error)),
            Ok(()) => Ok((used, reason)),
        }
    }

    /// Lets each candidate move a part of the bytes, and says which did best.
    fn probe(&self) -> Result<Loop, CopyError> {
        let mut measured = Vec::new();
        for candidate in choice::CANDIDATES {
            self.pass.allow(Some(choice::probe_bytes(self.passing.prepared.data_bytes)));
            let (begun, cpu_s) = (Instant::now(), cpu_s());
            match self.run(candidate) {
                Err(TransferError::Setup(_)) => continue,
                answer => answer.map_err(|error| self.passing.explain(error))?,
            }
            measured.push(Measured {
                candidate,
                wall_s: begun.elapsed().as_secs_f64(),
                cpu_s: self::cpu_s() - cpu_s,
            });
        }
        Ok(choice::best(&measured).unwrap_or(choice::THREADS))
    }

    fn run(&self, used: Loop) -> Result<(), TransferError> {
        let chunk_bytes = self.passing.prepared.chunk_bytes;
        match used.method {
            Method::IoUring => ring::transfer(self.pass, self.shape, used.depth, chunk_bytes),
            _ => threads::transfer(self.pass, self.shape, used.depth, chunk_bytes),
        }
    }
}

/// CPU time of this process so far, in seconds.
fn cpu_s() -> f64 {
    let Ok(usage) = getrusage(UsageWho::RUSAGE_SELF) else { return 0.0 };
    let seconds = |time: nix::sys::time::TimeVal| time.tv_sec() as f64 + time.tv_usec() as f64 / 1e6;
    seconds(usage.user_time()) + seconds(usage.system_time())
}
