//! An Ethernet switch between VMs: a unix socket that QEMU's `-netdev stream` connects to, with no network of this
//! machine behind it. It lives as long as its handle, so a VM may lose its power and come back to it.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::VmError;

/// QEMU's own limit of a frame, with room to spare.
const MAX_FRAME_BYTES: usize = 128 << 10;

/// A switch that all VMs of a test plug into. Frames go to all other ports.
#[derive(Debug, Clone)]
pub struct Wire {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    path: PathBuf,
    ports: Ports,
    ended: Arc<AtomicBool>,
    /// Hardware addresses given out.
    addresses: AtomicU32,
}

#[derive(Debug, Clone, Default)]
struct Ports {
    cut: Arc<AtomicBool>,
    lost: Arc<AtomicUsize>,
    number: Arc<AtomicUsize>,
    sockets: Arc<Mutex<Vec<(usize, UnixStream)>>>,
}

impl Wire {
    /// A switch with no ports yet.
    ///
    /// # Errors
    /// When there can be no socket in the machine's folder for temporary files.
    pub fn new() -> Result<Wire, VmError> {
        static NUMBER: AtomicUsize = AtomicUsize::new(0);
        let name = format!("godwit-wire-{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        let path = Path::new(super::PARENT).join(name);
        // A process of this number may have been killed in the midst of its work.
        let _ = std::fs::remove_file(&path);
        let listener = UnixListener::bind(&path).map_err(VmError::io("cannot make a wire"))?;
        let (ports, ended) = (Ports::default(), Arc::new(AtomicBool::new(false)));
        let (accepting, stop) = (ports.clone(), ended.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                if stop.load(Ordering::Relaxed) {
                    return;
                }
                accepting.plug(stream);
            }
        });
        Ok(Wire { inner: Arc::new(Inner { path, ports, ended, addresses: AtomicU32::new(1) }) })
    }

    /// Loses every frame from now on, or no longer: a cable that is pulled, without a link that goes down.
    pub fn cut(&self, cut: bool) {
        self.inner.ports.cut.store(cut, Ordering::Relaxed);
    }

    /// A port of the test's own, to send and receive whole frames.
    ///
    /// # Errors
    /// When the switch takes no port.
    pub fn station(&self) -> Result<Station, VmError> {
        let before = self.inner.ports.number.load(Ordering::Acquire);
        let stream = UnixStream::connect(self.path()).map_err(VmError::io("cannot plug into a wire"))?;
        // Frames are lost until the switch has taken the port in.
        while self.inner.ports.number.load(Ordering::Acquire) == before {
            std::thread::yield_now();
        }
        drop(self.inner.ports.sockets());
        Ok(Station { stream })
    }

    pub(super) fn path(&self) -> &Path {
        &self.inner.path
    }

    /// A hardware address that no other card on this wire has.
    pub(super) fn new_address(&self) -> String {
        let number = self.inner.addresses.fetch_add(1, Ordering::Relaxed);
        format!("52:54:00:90:{:02x}:{:02x}", (number >> 8) & 0xff, number & 0xff)
    }
}

/// A port of a wire that a test speaks through.
#[derive(Debug)]
pub struct Station {
    stream: UnixStream,
}

impl Station {
    /// Sends a frame from its destination address to the end of its payload.
    ///
    /// # Errors
    /// When the wire is gone.
    pub fn send(&mut self, frame: &[u8]) -> io::Result<()> {
        let length = u32::try_from(frame.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
        self.stream.write_all(&[&length.to_be_bytes(), frame].concat())
    }

    /// The next frame; a wait longer than `patience` is an error.
    ///
    /// # Errors
    /// No frame came, or the wire is gone.
    pub fn receive(&mut self, patience: std::time::Duration) -> io::Result<Vec<u8>> {
        self.stream.set_read_timeout(Some(patience))?;
        let mut length = [0; 4];
        self.stream.read_exact(&mut length)?;
        let mut frame = vec![0; u32::from_be_bytes(length) as usize];
        self.stream.read_exact(&mut frame)?;
        Ok(frame)
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
        // Wakes the accepting thread, which then sees the end.
        let _ = UnixStream::connect(&self.path);
        let _ = std::fs::remove_file(&self.path);
        for (_, socket) in self.ports.sockets().drain(..) {
            let _ = socket.shutdown(Shutdown::Both);
        }
    }
}

impl Ports {
    fn sockets(&self) -> MutexGuard<'_, Vec<(usize, UnixStream)>> {
        self.sockets.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a new port in. It leaves when its VM does.
    fn plug(&self, stream: UnixStream) {
        let Ok(writer) = stream.try_clone() else { return };
        // A VM that stands still does not hold the others up: its frames are lost, as on a full switch.
        let _ = writer.set_write_timeout(Some(std::time::Duration::from_millis(200)));
        let mut sockets = self.sockets();
        let number = self.number.fetch_add(1, Ordering::AcqRel);
        sockets.push((number, writer));
        drop(sockets);
        let ports = self.clone();
        std::thread::spawn(move || {
            // It ends with the VM, by whatever error.
            let _ = ports.forward(number, stream);
            ports.unplug(number);
        });
    }

    fn unplug(&self, number: usize) {
        self.sockets().retain(|(other, socket)| {
            let keep = *other != number;
            if !keep {
                let _ = socket.shutdown(Shutdown::Both);
            }
            keep
        });
    }

    /// Each frame is preceded by its length, 32 bits in network order (QEMU, net/stream.c).
    fn forward(&self, number: usize, mut stream: UnixStream) -> io::Result<()> {
        let mut frame = vec![0; 4];
        loop {
            frame.resize(4, 0);
            stream.read_exact(&mut frame)?;
            let length = u32::from_be_bytes([frame[0], frame[1], frame[2], frame[3]]) as usize;
            if length > MAX_FRAME_BYTES {
                return Err(io::ErrorKind::InvalidData.into());
            }
            frame.resize(4 + length, 0);
            stream.read_exact(&mut frame[4..])?;
            if self.cut.load(Ordering::Relaxed) {
                self.lost.fetch_add(1, Ordering::Relaxed);
                continue;
            }
            let mut stuck = Vec::new();
            for (other, socket) in self.sockets().iter_mut().filter(|(other, _)| *other != number) {
                if socket.write_all(&frame).is_err() {
                    stuck.push(*other);
                }
            }
            // Half a frame may have been written: only a new connection begins at a frame's start.
            stuck.into_iter().for_each(|other| self.unplug(other));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, Instant};

    fn port(wire: &Wire, ports: usize) -> UnixStream {
        let stream = UnixStream::connect(wire.path()).expect("the wire takes a port");
        stream.set_read_timeout(Some(Duration::from_secs(10))).expect("is a socket");
        wait(|| wire.inner.ports.sockets().len() >= ports);
        stream
    }

    fn wait(mut condition: impl FnMut() -> bool) {
        let deadline = Instant::now() + Duration::from_secs(10);
        while !condition() {
            assert!(Instant::now() < deadline, "it does not come to that");
            std::thread::yield_now();
        }
    }

    fn frame(text: &[u8]) -> Vec<u8> {
        [&(text.len() as u32).to_be_bytes(), text].concat()
    }

    #[test]
    fn a_frame_reaches_all_other_ports_and_none_while_the_wire_is_cut() {
        let wire = Wire::new().expect("a wire");
        let (mut one, mut two, mut three) = (port(&wire, 1), port(&wire, 2), port(&wire, 3));
        one.write_all(&frame(b"hello")).expect("is sent");
        for other in [&mut two, &mut three] {
            let mut got = [0; 9];
            other.read_exact(&mut got).expect("arrives");
            assert_eq!(got[..], frame(b"hello"));
        }
        wire.cut(true);
        one.write_all(&frame(b"lost")).expect("is sent");
        wait(|| wire.inner.ports.lost.load(Ordering::Relaxed) == 1);
        wire.cut(false);
        one.write_all(&frame(b"again")).expect("is sent");
        let mut got = [0; 9];
        two.read_exact(&mut got).expect("arrives");
        assert_eq!(got[..], frame(b"again"));
    }

    #[test]
    fn a_wire_leaves_no_file() {
        let wire = Wire::new().expect("a wire");
        let path = wire.path().to_owned();
        let open = port(&wire, 1);
        drop(wire);
        assert!(!path.exists());
        let mut rest = Vec::new();
        assert_eq!((&open).read_to_end(&mut rest).expect("is closed"), 0);
    }
}
