//! One lab a machine: an abstract unix socket, which vanishes with its owner and tells who that is.

use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::time::{Duration, Instant};

use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};

use super::LabError;

const NAME: &str = "godwit-lab";

/// Held for as long as the lab is there.
#[derive(Debug)]
pub(super) struct LabLock {
    _listener: UnixListener,
}

impl LabLock {
    pub(super) fn take(patience: Duration) -> Result<LabLock, LabError> {
        let address =
            SocketAddr::from_abstract_name(NAME).map_err(LabError::io("cannot name the lab's lock"))?;
        let deadline = Instant::now() + patience;
        loop {
            match UnixListener::bind_addr(&address) {
                Ok(listener) => return Ok(LabLock { _listener: listener }),
                Err(error) if error.kind() != std::io::ErrorKind::AddrInUse => {
                    return Err(LabError::io("cannot take the lab's lock")(error));
                }
                Err(_) if Instant::now() < deadline => std::thread::sleep(super::POLL),
                Err(_) => {
                    let owner = UnixStream::connect_addr(&address).ok();
                    let owner = owner.and_then(|stream| getsockopt(&stream, PeerCredentials).ok());
                    return Err(LabError::AlreadyRunning { process: owner.map_or(0, |owner| owner.pid()) });
                }
            }
        }
    }
}
