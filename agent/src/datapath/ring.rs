//! The loop of io_uring: a number of lanes on one thread, each with a registered buffer, read a chunk and write it.
//! The only file that names `tokio_uring`.

use super::arena::{Piece, pieces};
use super::chunks::{Chunk, Origin};
use super::pass::{Pass, Run, Shape, TransferError};
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use std::fs::File;
use std::io;
use std::time::Instant;
use tokio_uring::buf::fixed::{FixedBuf, FixedBufRegistry};
use tokio_uring::buf::{BoundedBuf, IoBuf, IoBufMut};

/// Copies what `pass` hands out with at most `depth` chunks under way.
///
/// # Errors
/// The first that a lane meets.
pub(super) fn transfer(
    pass: &Pass<'_>,
    shape: Shape,
    depth: usize,
    chunk_bytes: usize,
) -> Result<(), TransferError> {
    let runtime = start_ring(depth).map_err(TransferError::Setup)?;
    runtime.block_on(async {
        let source = pass.source.try_clone().map_err(TransferError::Read)?;
        let target = pass.target.try_clone().map_err(TransferError::Write)?;
        let files = Files { source: from_std(source), target: from_std(target), pass, shape };
        let useful = pass.size_bytes().div_ceil(chunk_bytes as u64).max(1);
        let lanes = depth.min(usize::try_from(useful).unwrap_or(depth));
        let registry = register_buffers(lanes, chunk_bytes).map_err(TransferError::Setup)?;
        let buffers = (0..).map_while(|index| registry.check_out(index));
        let lanes = buffers.enumerate().map(|(lane, buffer)| files.run_lane(lane, buffer));
        let mut lanes: FuturesUnordered<_> = lanes.collect();
        while let Some(lane) = lanes.next().await {
            // The rest is dropped here; the ring waits for what the kernel still holds.
            lane?;
        }
        Ok(())
    })
}

fn from_std(file: File) -> tokio_uring::fs::File {
    tokio_uring::fs::File::from_std(file)
}

/// A ring whose completions are handled by this thread when it asks for them. Kernels before 6.0 refuse the flags
/// and work without.
fn start_ring(depth: usize) -> io::Result<tokio_uring::Runtime> {
    let entries = (depth * 2).next_power_of_two() as u32;
    let mut flags = tokio_uring::uring_builder();
    flags.setup_coop_taskrun().setup_single_issuer();
    let mut builder = tokio_uring::builder();
    match tokio_uring::Runtime::new(builder.entries(entries).uring_builder(&flags)) {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            tokio_uring::Runtime::new(tokio_uring::builder().entries(entries))
        }
        answer => answer,
    }
}

/// As many buffers as wanted, or fewer where the locked-memory limit of an ordinary user forbids more.
fn register_buffers(lanes: usize, chunk_bytes: usize) -> io::Result<FixedBufRegistry<Piece>> {
    let mut lanes = lanes;
    loop {
        let registry = FixedBufRegistry::new(pieces(lanes, chunk_bytes)?);
        match registry.register() {
            Ok(()) => return Ok(registry),
            Err(_) if lanes > 1 => lanes /= 2,
            Err(error) => return Err(error),
        }
    }
}

// SAFETY: a piece's memory stays where it is as long as the piece lives, and all of it is initialised.
unsafe impl IoBuf for Piece {
    fn stable_ptr(&self) -> *const u8 {
        self.start().as_ptr()
    }

    fn bytes_init(&self) -> usize {
        self.len()
    }

    fn bytes_total(&self) -> usize {
        self.len()
    }
}

// SAFETY: as above, and nobody else has the piece's memory.
unsafe impl IoBufMut for Piece {
    fn stable_mut_ptr(&mut self) -> *mut u8 {
        self.start().as_ptr()
    }

    unsafe fn set_init(&mut self, _: usize) {}
}

struct Files<'a, 'p> {
    source: tokio_uring::fs::File,
    target: tokio_uring::fs::File,
    pass: &'a Pass<'p>,
    shape: Shape,
}

impl Files<'_, '_> {
    async fn run_lane(&self, lane: usize, mut buffer: FixedBuf) -> Result<(), TransferError> {
        let mut runs = Vec::new();
        loop {
            let wait = self.pass.wait(lane);
            if !wait.is_zero() {
                tokio::time::sleep(wait).await;
                continue;
            }
            let Some(chunk) = self.pass.next()? else { return Ok(()) };
            let begun = Instant::now();
            buffer = self.read(buffer, &chunk).await?;
            let verdict = self.pass.inspect(&chunk, &mut buffer, &mut runs)?;
            for run in &runs {
                buffer = self.write(buffer, *run).await?;
            }
            self.pass.done(&chunk, &verdict, &runs, begun.elapsed())?;
        }
    }

    async fn read(&self, mut buffer: FixedBuf, chunk: &Chunk) -> Result<FixedBuf, TransferError> {
        let direct = self.shape.source_direct;
        for part in &chunk.parts {
            let Origin::File(origin) = part.origin else {
                self.pass.decode(chunk, part, &mut buffer)?;
                continue;
            };
            let mut filled = 0;
            while filled < part.length {
                let length = Shape::padded(direct, part.length - filled).min(self.shape.request_bytes);
                let place = part.at + filled;
                let slice = buffer.slice(place..place + length);
                let (answer, slice) = self.source.read_fixed_at(slice, origin + filled as u64).await;
                buffer = slice.into_inner();
                let read = match answer {
                    Err(error) if is_interrupted(&error) => continue,
                    answer => answer.map_err(TransferError::Read)?,
                };
                if filled + read >= part.length {
                    break;
                }
                match Shape::usable(direct, read) {
                    0 if self.pass.short_is_zeros() => {
                        buffer[place + read..part.at + part.length].fill(0);
                        break;
                    }
                    0 => return Err(TransferError::SourceShrank),
                    usable => filled += usable,
                }
            }
        }
        Ok(buffer)
    }

    async fn write(&self, mut buffer: FixedBuf, run: Run) -> Result<FixedBuf, TransferError> {
        let direct = self.shape.target_direct;
        let length = Shape::padded(direct, run.length);
        let mut written = 0;
        while written < length {
            let step = (length - written).min(self.shape.request_bytes);
            let place = run.at + written;
            let slice = buffer.slice(place..place + step);
            let (answer, slice) = self.target.write_fixed_at(slice, run.target + written as u64).await;
            buffer = slice.into_inner();
            let answer = match answer {
                Err(error) if is_interrupted(&error) => continue,
                answer => answer.map_err(TransferError::Write)?,
            };
            match Shape::usable(direct, answer) {
                0 => return Err(TransferError::Write(io::Error::from_raw_os_error(libc::ENOSPC))),
                usable => written += usable,
            }
        }
        Ok(buffer)
    }
}

/// The kernel may hand a request back unfinished.
fn is_interrupted(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN))
}
