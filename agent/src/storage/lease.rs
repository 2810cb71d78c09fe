//! Who may open an instance's disk for writing: one host at a time, by a small file beside the disk.
//!
//! The file holds the host and an epoch that counts up with each change of hands. It is read and written under an
//! open-file-description lock, which on NFS version 4 is the server's, so that of two hosts at once one is second and
//! sees what the first wrote: taking such a lock also makes the NFS client forget what it has cached of the file. A
//! lease has no time: a host that is silent may still run its guest, so it keeps the lease until it gives it back,
//! hands it over, or the instance is deleted. QEMU's own locks on the image are the second line.

use super::{InstancePaths, StorageError, io_error};
use godwit_protocol::id::HostId;
use nix::fcntl::{FcntlArg, fcntl};
use serde::{Deserialize, Serialize};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

/// A record is padded to this, so that one write replaces it whole.
const RECORD_BYTES: usize = 512;

/// Others hold the lock for two small requests to the server.
const LOCK_WITHIN: Duration = Duration::from_secs(10);
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// What is wanted of the lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum LeaseCall {
    /// It is to be this host's.
    Claim(HostId),
    /// This host has it no longer; that somebody else has it is fine.
    Release(HostId),
    /// The first host gives it to the second, to which the instance has moved.
    HandOver(HostId, HostId),
}

/// What the file says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Lease {
    /// Counts the changes of hands.
    pub(super) epoch: u64,
    /// Whose it is; nobody's where there is none.
    pub(super) host: Option<HostId>,
}

impl Lease {
    /// What it becomes; pure.
    ///
    /// # Errors
    /// The host that has it, when it is another one's.
    fn after(self, call: LeaseCall) -> Result<Lease, HostId> {
        let given = |host| Lease { epoch: self.epoch + 1, host };
        match (call, self.host) {
            (LeaseCall::Claim(host), Some(holder)) if holder != host => Err(holder),
            (LeaseCall::Claim(_), Some(_)) => Ok(self),
            (LeaseCall::Claim(host), None) => Ok(given(Some(host))),
            (LeaseCall::Release(host), Some(holder)) if holder == host => Ok(given(None)),
            (LeaseCall::Release(_), _) => Ok(self),
            (LeaseCall::HandOver(_, to), Some(holder)) if holder == to => Ok(self),
            (LeaseCall::HandOver(from, to), None) if from != to => Ok(given(Some(to))),
            (LeaseCall::HandOver(from, to), Some(holder)) if holder == from => Ok(given(Some(to))),
            (LeaseCall::HandOver(..), Some(holder)) => Err(holder),
            (LeaseCall::HandOver(..), None) => Ok(self),
        }
    }
}

/// Reads the lease, and changes it as `call` says.
///
/// # Errors
/// [`StorageError::Held`] when it is another host's; [`StorageError::Invalid`] when the file is none of ours.
pub(super) fn act(paths: &InstancePaths, call: &LeaseCall) -> Result<Lease, StorageError> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).mode(0o600).custom_flags(libc::O_NOFOLLOW);
    options.create(!matches!(call, LeaseCall::Release(_)));
    let file = match options.open(&paths.lease) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return match call {
                LeaseCall::Release(_) => Ok(Lease::default()),
                _ => Err(StorageError::NotFound(paths.folder.clone())),
            };
        }
        Err(error) => return Err(io_error("open", &paths.lease)(error)),
    };
    // Closing the file lets go of it.
    lock(&file, &paths.lease)?;
    let lease = read(&file, &paths.lease)?;
    let after = lease.after(*call).map_err(|host| StorageError::Held { path: paths.disk.clone(), host })?;
    if after != lease {
        let mut record = serde_json::to_vec(&after).unwrap_or_default();
        record.resize(RECORD_BYTES, b'\n');
        let written = file.write_all_at(&record, 0).and_then(|()| file.sync_all());
        written.map_err(io_error("write", &paths.lease))?;
    }
    Ok(after)
}

fn lock(file: &File, path: &Path) -> Result<(), StorageError> {
    let lock = libc::flock {
        l_type: libc::F_WRLCK as _,
        l_whence: libc::SEEK_SET as _,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    let deadline = Instant::now() + LOCK_WITHIN;
    loop {
        match fcntl(file, FcntlArg::F_OFD_SETLK(&lock)) {
            Ok(_) => return Ok(()),
            Err(nix::errno::Errno::EAGAIN | nix::errno::Errno::EACCES) if Instant::now() < deadline => {
                std::thread::sleep(LOOK_EVERY);
            }
            Err(error) => return Err(io_error("lock", path)(error.into())),
        }
    }
}

fn read(file: &File, path: &Path) -> Result<Lease, StorageError> {
    let mut record = [0; RECORD_BYTES];
    let mut length = 0;
    while length < RECORD_BYTES {
        match file.read_at(&mut record[length..], length as u64).map_err(io_error("read", path))? {
            0 => break,
            more => length += more,
        }
    }
    let text = record[..length].trim_ascii();
    if text.is_empty() {
        return Ok(Lease::default());
    }
    serde_json::from_slice(text).map_err(|_| {
        StorageError::Invalid(format!(
            "{} is no lease; when no host runs the instance, remove the file",
            path.display()
        ))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use godwit_protocol::id::InstanceId;
    use std::sync::Barrier;

    fn paths(folder: &tempfile::TempDir) -> InstancePaths {
        let paths = InstancePaths::new(folder.path(), InstanceId::random());
        std::fs::create_dir_all(&paths.folder).unwrap();
        paths
    }

    #[test]
    fn one_host_has_it_until_it_gives_it_back_or_on() {
        let folder = tempfile::tempdir().unwrap();
        let paths = paths(&folder);
        let (one, two, three) = (HostId::random(), HostId::random(), HostId::random());
        assert_eq!(act(&paths, &LeaseCall::Release(one)).unwrap(), Lease::default());
        assert!(!paths.lease.exists(), "giving back what is not there makes nothing");
        assert_eq!(act(&paths, &LeaseCall::Claim(one)).unwrap(), Lease { epoch: 1, host: Some(one) });
        assert_eq!(act(&paths, &LeaseCall::Claim(one)).unwrap().epoch, 1, "a second time changes nothing");
        let error = act(&paths, &LeaseCall::Claim(two)).unwrap_err();
        assert!(matches!(error, StorageError::Held { host, .. } if host == one), "{error}");
        assert_eq!(act(&paths, &LeaseCall::Release(two)).unwrap().host, Some(one));
        assert!(act(&paths, &LeaseCall::HandOver(three, two)).is_err(), "who has none gives none");
        assert_eq!(act(&paths, &LeaseCall::HandOver(one, two)).unwrap(), Lease { epoch: 2, host: Some(two) });
        assert_eq!(act(&paths, &LeaseCall::HandOver(one, two)).unwrap().epoch, 2);
        assert!(act(&paths, &LeaseCall::Claim(one)).is_err());
        assert_eq!(act(&paths, &LeaseCall::Release(two)).unwrap(), Lease { epoch: 3, host: None });
        assert_eq!(act(&paths, &LeaseCall::Claim(three)).unwrap(), Lease { epoch: 4, host: Some(three) });
    }

    #[test]
    fn of_many_at_once_one_gets_it() {
        let folder = tempfile::tempdir().unwrap();
        for _ in 0..20 {
            let paths = paths(&folder);
            let barrier = Barrier::new(8);
            let won = std::thread::scope(|scope| {
                let claim = || {
                    let host = HostId::random();
                    barrier.wait();
                    act(&paths, &LeaseCall::Claim(host)).is_ok()
                };
                let threads: Vec<_> = (0..8).map(|_| scope.spawn(claim)).collect();
                threads.into_iter().map(|thread| thread.join().unwrap()).filter(|won| *won).count()
            });
            assert_eq!(won, 1);
        }
    }

    #[test]
    fn a_file_of_somebody_else_is_left_as_it_is() {
        let folder = tempfile::tempdir().unwrap();
        let paths = paths(&folder);
        std::fs::write(&paths.lease, "mine").unwrap();
        let error = act(&paths, &LeaseCall::Claim(HostId::random())).unwrap_err().to_string();
        assert!(error.contains("no lease"), "{error}");
        assert_eq!(std::fs::read(&paths.lease).unwrap(), b"mine");
    }
}
