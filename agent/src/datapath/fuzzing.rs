//! Where cargo-fuzz comes in: bytes of strangers, and what is done with them first. Only in builds of `tests/fuzz`.

use super::disk_stream::read_as_stream;
use super::image::{Found, Image};
use std::fs::File;
use std::io::Write;

/// Runs of an image that are looked at; tables of a few bytes can claim many.
const MAX_RUNS: usize = 4096;

/// Bytes that are decoded of each compressed run.
const LOOK_BYTES: usize = 4096;

/// Reads what a file that claims to be qcow2 holds, as a copy of it would.
///
/// # Panics
/// When the image says something of bytes that its disk does not have.
pub fn read_qcow2(bytes: &[u8]) {
    let Some(file) = in_memory(bytes) else { return };
    let Ok(image) = Image::open(&file) else { return };
    let size_bytes = image.size_bytes();
    let mut position = 0;
    for _ in 0..MAX_RUNS {
        let Ok((found, length)) = image.look(position) else { return };
        if found == Found::End {
            return;
        }
        assert!(
            length > 0 && length <= size_bytes - position,
            "{length} bytes at {position} of {size_bytes}"
        );
        if found == Found::Encoded {
            let mut decoded = [0; LOOK_BYTES];
            let wanted = usize::try_from(length).map_or(LOOK_BYTES, |length| length.min(LOOK_BYTES));
            let _ = image.read(&mut decoded[..wanted], position);
        }
        position += length;
    }
}

fn in_memory(bytes: &[u8]) -> Option<File> {
    let memory = nix::sys::memfd::memfd_create("image", nix::sys::memfd::MFdFlags::MFD_CLOEXEC).ok()?;
    let mut file = File::from(memory);
    file.write_all(bytes).ok()?;
    Some(file)
}

/// Reads what a peer may send before and while a disk comes.
pub fn read_disk_stream(bytes: &[u8]) {
    read_as_stream(bytes);
}
