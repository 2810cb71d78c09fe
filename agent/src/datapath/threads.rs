//! The loop of threads: each reads a chunk and writes it.

use super::arena::pieces;
use super::chunks::{Chunk, Origin};
use super::pass::{Pass, Run, Shape, TransferError};
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

/// Copies what `pass` hands out, by `threads` threads of which this is one.
///
/// # Errors
/// The first that one of them meets; the others stop at their next chunk.
pub(super) fn transfer(
    pass: &Pass<'_>,
    shape: Shape,
    threads: usize,
    chunk_bytes: usize,
) -> Result<(), TransferError> {
    let failure = Mutex::new(None);
    let mut buffers = pieces(threads, chunk_bytes).map_err(TransferError::Setup)?;
    // Writes to one file through the page cache exclude each other in the kernel, where who waits for the inode's lock
    // spins: a third of the CPU time of a copy in memory.
    let turn = (!shape.target_direct).then(|| Mutex::new(()));
    let turn = turn.as_ref();
    let work = |lane, buffer: &mut [u8]| {
        if let Err(error) = run(pass, shape, turn, (lane, buffer)) {
            pass.stop();
            failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
        }
    };
    std::thread::scope(|scope| {
        let work = &work;
        let mut buffers = buffers.iter_mut().enumerate();
        let own = buffers.next();
        for (lane, buffer) in buffers {
            let thread = std::thread::Builder::new().name("copy".to_owned());
            // With fewer threads it is only slower.
            let _ = thread.spawn_scoped(scope, move || work(lane, buffer));
        }
        if let Some((lane, buffer)) = own {
            work(lane, buffer);
        }
    });
    failure.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
}

fn run(
    pass: &Pass<'_>,
    shape: Shape,
    turn: Option<&Mutex<()>>,
    (lane, buffer): (usize, &mut [u8]),
) -> Result<(), TransferError> {
    let mut runs = Vec::new();
    loop {
        let wait = pass.wait(lane);
        if !wait.is_zero() {
            std::thread::sleep(wait);
            continue;
        }
        let Some(chunk) = pass.next()? else { return Ok(()) };
        let begun = Instant::now();
        read(pass, shape, &chunk, buffer)?;
        let verdict = pass.inspect(&chunk, buffer, &mut runs)?;
        let turn = turn.map(|turn| turn.lock().unwrap_or_else(PoisonError::into_inner));
        for run in &runs {
            write(pass, shape, *run, buffer)?;
        }
        drop(turn);
        pass.done(&chunk, &verdict, &runs, begun.elapsed())?;
    }
}

fn read(pass: &Pass<'_>, shape: Shape, chunk: &Chunk, buffer: &mut [u8]) -> Result<(), TransferError> {
    for part in &chunk.parts {
        let Origin::File(origin) = part.origin else {
            pass.decode(chunk, part, buffer)?;
            continue;
        };
        let mut filled = 0;
        while filled < part.length {
            let length = Shape::padded(shape.source_direct, part.length - filled).min(shape.request_bytes);
            let place = part.at + filled;
            let read = match pass.source.read_at(&mut buffer[place..place + length], origin + filled as u64) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                answer => answer.map_err(TransferError::Read)?,
            };
            if filled + read >= part.length {
                break;
            }
            match Shape::usable(shape.source_direct, read) {
                0 if pass.short_is_zeros() => {
                    buffer[place + read..part.at + part.length].fill(0);
                    break;
                }
                0 => return Err(TransferError::SourceShrank),
                usable => filled += usable,
            }
        }
    }
    Ok(())
}

fn write(pass: &Pass<'_>, shape: Shape, run: Run, buffer: &[u8]) -> Result<(), TransferError> {
    let length = Shape::padded(shape.target_direct, run.length);
    let mut written = 0;
    while written < length {
        let step = (length - written).min(shape.request_bytes);
        let place = run.at + written;
        let answer = match pass.target.write_at(&buffer[place..place + step], run.target + written as u64) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            answer => answer.map_err(TransferError::Write)?,
        };
        match Shape::usable(shape.target_direct, answer) {
            0 => return Err(TransferError::Write(io::Error::from_raw_os_error(libc::ENOSPC))),
            usable => written += usable,
        }
    }
    Ok(())
}
