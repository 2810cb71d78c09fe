//! The io_uring loop: a number of lanes, each with a registered buffer, read a chunk and write it. The only file
//! that names `tokio_uring`.

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use std::cell::RefCell;
use std::fs::File;
use std::io;
use tokio_uring::buf::BoundedBuf;
use tokio_uring::buf::fixed::{FixedBuf, FixedBufRegistry};

/// Alignment of offsets, lengths and buffers in direct I/O, in bytes; no common disk wants more.
pub(super) const BLOCK_BYTES: usize = 4096;

/// Largest chunk in bytes.
pub(super) const CHUNK_BYTES: usize = 1 << 20;

/// Lanes, the most first: fewer where the locked-memory limit of an ordinary user forbids more.
const LANES: [u64; 3] = [32, 8, 2];

/// A piece of data to copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Chunk {
    /// Where it begins in both files.
    pub(super) offset: u64,
    /// Its length, 1 to [`CHUNK_BYTES`].
    pub(super) length: usize,
}

/// What stops a transfer.
#[derive(Debug)]
pub(super) enum TransferError {
    /// The kernel has no io_uring for us.
    Setup(io::Error),
    /// The source.
    Read(io::Error),
    /// The source ended before its size at the start.
    SourceShrank,
    /// The destination.
    Write(io::Error),
}

/// Copies all `chunks` of a file of `size_bytes` from `source` to `destination`; `copied` is told the length of each
/// that is done.
pub(super) fn transfer(
    source: File,
    destination: File,
    size_bytes: u64,
    direct: bool,
    chunks: impl Iterator<Item = io::Result<Chunk>>,
    copied: impl FnMut(u64),
) -> Result<(), TransferError> {
    let runtime = start_ring().map_err(TransferError::Setup)?;
    runtime.block_on(async {
        let transfer = Transfer {
            source: tokio_uring::fs::File::from_std(source),
            destination: tokio_uring::fs::File::from_std(destination),
            direct,
            chunks: RefCell::new(chunks),
            copied: RefCell::new(copied),
        };
        let registry = register_buffers(size_bytes).map_err(TransferError::Setup)?;
        let buffers = (0..).map_while(|index| registry.check_out(index));
        let mut lanes: FuturesUnordered<_> = buffers.map(|buffer| transfer.run_lane(buffer)).collect();
        while let Some(lane) = lanes.next().await {
            // The rest is dropped here; the ring waits for what the kernel still holds.
            lane?;
        }
        Ok(())
    })
}

/// A ring whose completions are handled by this thread when it asks for them. Kernels before 6.0 refuse the flags
/// and work without.
fn start_ring() -> io::Result<tokio_uring::Runtime> {
    let entries = (LANES[0] * 2) as u32;
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

fn register_buffers(size_bytes: u64) -> io::Result<FixedBufRegistry<Vec<u8>>> {
    let mut refusal = io::ErrorKind::OutOfMemory.into();
    let useful = size_bytes.div_ceil(CHUNK_BYTES as u64).max(1);
    for lanes in LANES {
        let lanes = lanes.min(useful);
        // One block more than a chunk, so that an aligned chunk fits wherever the allocator puts it.
        let registry =
            FixedBufRegistry::new((0..lanes).map(|_| vec![0; CHUNK_BYTES + BLOCK_BYTES]).collect::<Vec<_>>());
        match registry.register() {
            Ok(()) => return Ok(registry),
            Err(error) => refusal = error,
        }
    }
    Err(refusal)
}

struct Transfer<C, P> {
    source: tokio_uring::fs::File,
    destination: tokio_uring::fs::File,
    direct: bool,
    chunks: RefCell<C>,
    copied: RefCell<P>,
}

impl<C, P> Transfer<C, P>
where
    C: Iterator<Item = io::Result<Chunk>>,
    P: FnMut(u64),
{
    async fn run_lane(&self, mut buffer: FixedBuf) -> Result<(), TransferError> {
        let start = buffer.as_ptr().align_offset(BLOCK_BYTES);
        loop {
            let Some(chunk) = self.chunks.borrow_mut().next() else { return Ok(()) };
            let chunk = chunk.map_err(TransferError::Read)?;
            buffer = self.read(buffer, start, chunk).await?;
            buffer = self.write(buffer, start, chunk).await?;
            (self.copied.borrow_mut())(chunk.length as u64);
        }
    }

    /// Length of an operation on `length` bytes: whole blocks in direct I/O. What a write puts beyond the
    /// source's end is cut off at the end of the copy.
    fn padded(&self, length: usize) -> usize {
        if self.direct { length.next_multiple_of(BLOCK_BYTES) } else { length }
    }

    /// How much of `length` bytes counts as done, so that what follows stays aligned.
    fn usable(&self, length: usize) -> usize {
        if self.direct { length - length % BLOCK_BYTES } else { length }
    }

    async fn read(
        &self,
        mut buffer: FixedBuf,
        start: usize,
        chunk: Chunk,
    ) -> Result<FixedBuf, TransferError> {
        let mut filled = 0;
        loop {
            let range = start + filled..start + self.padded(chunk.length);
            let (answer, slice) =
                self.source.read_fixed_at(buffer.slice(range), chunk.offset + filled as u64).await;
            buffer = slice.into_inner();
            let read = answer.map_err(TransferError::Read)?;
            if filled + read >= chunk.length {
                return Ok(buffer);
            }
            match self.usable(read) {
                0 => return Err(TransferError::SourceShrank),
                usable => filled += usable,
            }
        }
    }

    async fn write(
        &self,
        mut buffer: FixedBuf,
        start: usize,
        chunk: Chunk,
    ) -> Result<FixedBuf, TransferError> {
        let length = self.padded(chunk.length);
        let mut written = 0;
        while written < length {
            let range = start + written..start + length;
            let (answer, slice) =
                self.destination.write_fixed_at(buffer.slice(range), chunk.offset + written as u64).await;
            buffer = slice.into_inner();
            match self.usable(answer.map_err(TransferError::Write)?) {
                0 => return Err(TransferError::Write(io::Error::from_raw_os_error(libc::ENOSPC))),
                usable => written += usable,
            }
        }
        Ok(buffer)
    }
}
