//! The receiver's socket.

use std::io::{self, BufReader, Read, Write};
use std::net::TcpStream;

/// Bytes that are taken from a socket at once, as far as they are there.
const READ_BYTES: usize = 1 << 20;

/// A socket that is read in large pieces: rustls asks for one record of TLS at a time, and each such read of 16 KiB
/// would be a call and an acknowledgement to the sender.
pub(super) struct Socket {
    reader: BufReader<TcpStream>,
}

impl Socket {
    pub(super) fn new(stream: TcpStream) -> Self {
        Self { reader: BufReader::with_capacity(READ_BYTES, stream) }
    }

    /// Itself, for all but reading.
    pub(super) fn stream(&self) -> &TcpStream {
        self.reader.get_ref()
    }
}

impl Read for Socket {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.reader.read(buffer)
    }
}

impl Write for Socket {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.reader.get_mut().write(bytes)
    }

    fn write_vectored(&mut self, slices: &[io::IoSlice<'_>]) -> io::Result<usize> {
        self.reader.get_mut().write_vectored(slices)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.reader.get_mut().flush()
    }
}
