//! What the agent keeps on disk: who it is, how far its reports have counted, which networks it was told of last.

use godwit_protocol::id::{HostId, NetworkId};
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, VecDeque};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Generations taken from the disk at once: a restart skips at most this many, a report costs no write.
const GENERATION_BLOCK: u64 = 1000;

/// Removed networks whose generation is remembered, newest last.
const MAX_REMOVED: usize = 1024;

/// Why the state cannot be opened or kept.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The host has not joined.
    #[error("this host has not joined: {} is not there; run `godwit-agent join URL TOKEN` first", .0.display())]
    NotJoined(PathBuf),
    /// Another agent has the folder.
    #[error("another godwit-agent runs on {}", .0.display())]
    Locked(PathBuf),
    /// A file that reads as something else.
    #[error("{} does not read; it was not written by this agent or is damaged", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// Reading or writing failed.
    #[error("cannot use {}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
}

impl StateError {
    fn io(path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { path: path.to_owned(), source }
    }
}

/// The files of `DIR/identity`.
pub struct IdentityPaths {
    /// The folder.
    pub folder: PathBuf,
    /// The CA's certificate.
    pub ca: PathBuf,
    /// The host's certificate.
    pub certificate: PathBuf,
    /// The host's key, readable by root only.
    pub key: PathBuf,
    /// The host's id. Written last: where it is, the others are.
    pub host: PathBuf,
}

impl IdentityPaths {
    /// Those of the agent's folder `dir`.
    pub fn new(dir: &Path) -> Self {
        let folder = dir.join("identity");
        Self {
            ca: folder.join("ca.pem"),
            certificate: folder.join("host.pem"),
            key: folder.join("host.key"),
            host: folder.join("host.id"),
            folder,
        }
    }
}

/// Writes `path` so that after a power loss it holds the old or the new bytes, never a part.
///
/// # Errors
/// What the kernel says, for instance a full disk; the old file is then still there.
pub fn write_atomic(path: &Path, bytes: &[u8], mode: u32) -> Result<(), StateError> {
    let mut partial = path.as_os_str().to_owned();
    partial.push(".partial");
    let partial = PathBuf::from(partial);
    let write = || {
        // A leftover of a crash may have another mode: begin anew.
        match fs::remove_file(&partial) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&partial)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&partial, path)?;
        path.parent().map_or(Ok(()), |folder| File::open(folder)?.sync_all())
    };
    write().map_err(StateError::io(path))
}

/// Reads a file of the agent's own; none when it is not there.
///
/// # Errors
/// [`StateError::Io`] and [`StateError::Malformed`].
pub fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<Option<T>, StateError> {
    match fs::read(path) {
        Ok(bytes) => serde_json::from_slice(&bytes)
            .map(Some)
            .map_err(|e| StateError::Malformed { path: path.to_owned(), source: e.into() }),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(StateError::io(path)(e)),
    }
}

/// `DIR/state.json`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Kept {
    /// No report has had this generation or a later one.
    generation_limit: u64,
    /// Newest generation of each network, removed ones included.
    networks: BTreeMap<NetworkId, u64>,
    /// Removed networks, oldest first.
    removed: VecDeque<NetworkId>,
}

/// How a network's generation compares with what was seen.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Older,
    Same,
    New,
}

impl Kept {
    fn judge(&self, network: NetworkId, generation: u64, removed: bool) -> Verdict {
        match self.networks.get(&network) {
            Some(newest) if *newest > generation => Verdict::Older,
            Some(newest) if *newest == generation && self.removed.contains(&network) == removed => {
                Verdict::Same
            }
            _ => Verdict::New,
        }
    }

    fn remember(&mut self, network: NetworkId, generation: u64, removed: bool) {
        self.networks.insert(network, generation);
        self.removed.retain(|n| *n != network);
        if removed {
            self.removed.push_back(network);
            if self.removed.len() > MAX_REMOVED
                && let Some(oldest) = self.removed.pop_front()
            {
                self.networks.remove(&oldest);
            }
        }
    }
}

#[derive(Debug)]
struct Inner {
    kept: Kept,
    next_generation: u64,
}

/// The state of one running agent; it holds the folder's lock.
#[derive(Debug)]
pub struct State {
    host: HostId,
    path: PathBuf,
    inner: Mutex<Inner>,
    _lock: Flock<File>,
}

impl State {
    /// Opens the folder of a host that has joined.
    ///
    /// # Errors
    /// Each of [`StateError`].
    pub fn open(dir: &Path) -> Result<Self, StateError> {
        let id_path = IdentityPaths::new(dir).host;
        let text = match fs::read_to_string(&id_path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Err(StateError::NotJoined(id_path)),
            other => other.map_err(StateError::io(&id_path))?,
        };
        let host = text
            .trim()
            .parse()
            .map_err(|e: uuid::Error| StateError::Malformed { path: id_path, source: e.into() })?;
        let lock = lock(dir)?;
        let path = dir.join("state.json");
        let kept: Kept = read_json(&path)?.unwrap_or_default();
        let next_generation = kept.generation_limit;
        Ok(Self { host, path, inner: Mutex::new(Inner { kept, next_generation }), _lock: lock })
    }

    /// Who this host is.
    pub fn host(&self) -> HostId {
        self.host
    }

    /// A generation higher than every one before, over restarts and power losses. The first is 1.
    ///
    /// # Errors
    /// [`StateError::Io`]: then no generation was taken.
    pub fn next_generation(&self) -> Result<u64, StateError> {
        let mut inner = self.lock();
        let next = inner.next_generation + 1;
        if next >= inner.kept.generation_limit {
            let before = inner.kept.generation_limit;
            inner.kept.generation_limit = next + GENERATION_BLOCK;
            if let Err(e) = self.save(&inner.kept) {
                inner.kept.generation_limit = before;
                return Err(e);
            }
        }
        inner.next_generation = next;
        Ok(next)
    }

    /// Whether `generation` of a network's wanted state is at least the newest seen; if so it is remembered
    /// before anything is done about it, so that an older one can never win later.
    ///
    /// # Errors
    /// [`StateError::Io`].
    pub fn accept_network(
        &self,
        network: NetworkId,
        generation: u64,
        removed: bool,
    ) -> Result<bool, StateError> {
        let mut inner = self.lock();
        let verdict = inner.kept.judge(network, generation, removed);
        if verdict == Verdict::New {
            let mut kept = inner.kept.clone();
            kept.remember(network, generation, removed);
            self.save(&kept)?;
            inner.kept = kept;
        }
        Ok(verdict != Verdict::Older)
    }

    fn save(&self, kept: &Kept) -> Result<(), StateError> {
        let bytes = serde_json::to_vec(kept)
            .map_err(|e| StateError::Malformed { path: self.path.clone(), source: e.into() })?;
        write_atomic(&self.path, &bytes, 0o600)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Takes the lock that keeps two agents off one folder.
pub(crate) fn lock(dir: &Path) -> Result<Flock<File>, StateError> {
    let path = dir.join("lock");
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&path)
        .map_err(StateError::io(&path))?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| match errno {
        nix::errno::Errno::EWOULDBLOCK => StateError::Locked(dir.to_owned()),
        other => StateError::io(&path)(other.into()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn joined() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let paths = IdentityPaths::new(dir.path());
        fs::create_dir(&paths.folder).unwrap();
        fs::write(&paths.host, format!("{}\n", HostId::random())).unwrap();
        dir
    }

    #[test]
    fn a_generation_never_comes_twice_over_restarts() {
        let dir = joined();
        let mut newest = 0;
        for _ in 0..3 {
            let state = State::open(dir.path()).unwrap();
            for _ in 0..(GENERATION_BLOCK + 7) {
                let next = state.next_generation().unwrap();
                assert!(next > newest, "{next} after {newest}");
                newest = next;
            }
        }
    }

    #[test]
    fn an_older_network_generation_is_ignored_over_restarts_and_the_same_one_is_not() {
        let dir = joined();
        let network = NetworkId::random();
        let state = State::open(dir.path()).unwrap();
        assert!(state.accept_network(network, 5, false).unwrap());
        assert!(state.accept_network(network, 7, true).unwrap());
        drop(state);
        let state = State::open(dir.path()).unwrap();
        assert!(!state.accept_network(network, 6, false).unwrap());
        assert!(state.accept_network(network, 7, true).unwrap());
        assert!(state.accept_network(network, 8, false).unwrap());
    }

    #[test]
    fn removed_networks_are_forgotten_only_past_the_bound() {
        let mut kept = Kept::default();
        let networks: Vec<_> = (0..=MAX_REMOVED).map(|_| NetworkId::random()).collect();
        let alive = NetworkId::random();
        kept.remember(alive, 9, false);
        for network in &networks {
            kept.remember(*network, 9, true);
        }
        assert!(kept.judge(alive, 8, false) == Verdict::Older);
        assert!(kept.judge(networks[1], 8, false) == Verdict::Older);
        assert!(kept.judge(networks[0], 8, false) == Verdict::New);
        assert_eq!(kept.networks.len(), MAX_REMOVED + 1);
    }

    #[test]
    fn two_agents_cannot_share_a_folder() {
        let dir = joined();
        let _first = State::open(dir.path()).unwrap();
        assert!(matches!(State::open(dir.path()), Err(StateError::Locked(_))));
    }

    #[test]
    fn a_host_that_has_not_joined_is_told_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        let error = State::open(dir.path()).unwrap_err();
        assert!(error.to_string().contains("godwit-agent join"), "{error}");
    }

    #[test]
    fn a_damaged_state_file_is_named_and_not_overwritten() {
        let dir = joined();
        fs::write(dir.path().join("state.json"), "{").unwrap();
        let error = State::open(dir.path()).unwrap_err();
        assert!(error.to_string().contains("state.json"), "{error}");
        assert_eq!(fs::read_to_string(dir.path().join("state.json")).unwrap(), "{");
    }

    #[test]
    fn an_atomic_write_replaces_the_file_with_its_mode_and_leaves_no_partial() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        fs::write(dir.path().join("key.partial"), "old").unwrap();
        write_atomic(&path, b"one", 0o600).unwrap();
        write_atomic(&path, b"two", 0o600).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"two");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
