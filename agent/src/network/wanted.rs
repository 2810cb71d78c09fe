//! What is wanted of this host's networks, kept on disk: an agent that starts while the coordinator is away knows what
//! its ports may do and which addresses they have.

use crate::state::{StateError, read_json, write_atomic};
use godwit_protocol::network::{LocalPort, NetworkWanted};
use godwit_protocol::port::tap_name;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The newest wanted state of each network on this host.
pub struct WantedNetworks {
    folder: PathBuf,
    networks: Mutex<BTreeMap<u32, NetworkWanted>>,
}

impl WantedNetworks {
    /// Those of the agent's folder. One that does not read is left out, and told: the coordinator tells it again.
    ///
    /// # Errors
    /// The folder cannot be made or read.
    pub fn open(dir: &Path) -> Result<Self, StateError> {
        let folder = dir.join("networks");
        let failed = |source| StateError::Io { path: folder.clone(), source };
        match fs::create_dir(&folder) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(failed(error)),
            _ => {}
        }
        let mut networks = BTreeMap::new();
        for entry in fs::read_dir(&folder).map_err(failed)? {
            let path = entry.map_err(failed)?.path();
            if path.extension().is_none_or(|extension| extension != "json") {
                continue;
            }
            match read_json::<NetworkWanted>(&path) {
                Ok(Some(wanted)) => drop(networks.insert(wanted.vni, wanted)),
                Ok(None) => {}
                Err(error) => {
                    tracing::warn!("a network is forgotten: {}", godwit_protocol::error::chain(&error))
                }
            }
        }
        Ok(Self { folder, networks: Mutex::new(networks) })
    }

    /// Keeps a network's wanted state, on disk before this returns.
    ///
    /// # Errors
    /// What the kernel says; the state before is then kept.
    pub fn keep(&self, wanted: &NetworkWanted) -> Result<(), StateError> {
        let mut networks = self.lock();
        if networks.get(&wanted.vni) == Some(wanted) {
            return Ok(());
        }
        let path = self.path(wanted.vni);
        let bytes = serde_json::to_vec(wanted)
            .map_err(|error| StateError::Malformed { path: path.clone(), source: error.into() })?;
        write_atomic(&path, &bytes, 0o600)?;
        networks.insert(wanted.vni, wanted.clone());
        Ok(())
    }

    /// Forgets a network; not knowing it is a success.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn forget(&self, vni: u32) -> Result<(), StateError> {
        let mut networks = self.lock();
        let path = self.path(vni);
        match fs::remove_file(&path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                return Err(StateError::Io { path, source });
            }
            _ => drop(networks.remove(&vni)),
        }
        Ok(())
    }

    /// All of them, in the order of their numbers.
    pub fn all(&self) -> Vec<NetworkWanted> {
        self.lock().values().cloned().collect()
    }

    /// The taps of all their ports.
    pub fn taps(&self) -> BTreeSet<String> {
        self.lock().values().flat_map(|wanted| &wanted.ports).map(|port| tap_name(port.port)).collect()
    }

    /// One of them.
    pub fn get(&self, vni: u32) -> Option<NetworkWanted> {
        self.lock().get(&vni).cloned()
    }

    /// The generation of a network that is wanted here.
    pub fn generation(&self, vni: u32) -> Option<u64> {
        self.lock().get(&vni).map(|wanted| wanted.generation)
    }

    /// The port of a tap, with its network's MTU in bytes.
    pub fn port(&self, tap: &str) -> Option<(u32, LocalPort)> {
        let networks = self.lock();
        networks.values().find_map(|wanted| {
            let port = wanted.ports.iter().find(|port| tap_name(port.port) == tap)?;
            Some((wanted.mtu, port.clone()))
        })
    }

    fn path(&self, vni: u32) -> PathBuf {
        self.folder.join(format!("{vni}.json"))
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u32, NetworkWanted>> {
        self.networks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
