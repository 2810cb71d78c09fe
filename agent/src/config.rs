//! `agent.toml`: what the operator says, and what is found out where nothing is said.

use crate::hypervisor::{MemoryBinding, Virtualization};
use crate::network::netlink::UnderlayChoice;
use crate::state::{StateError, write_atomic};
use crate::storage::{Disks, PoolPolicy, Share};
use crate::telemetry::Capacity;
use crate::telemetry::filter::Room;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// TCP port for streams of migrations where none is configured.
pub const MIGRATION_PORT: u16 = 8776;

/// Why there is no configuration to run with.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// An unknown key, a wrong type or value.
    #[error("{} is wrong: {message}", path.display())]
    Wrong {
        /// The file.
        path: PathBuf,
        /// Which line, key and value.
        message: String,
    },
    /// No coordinator is named.
    #[error("{} names no coordinator; `godwit-agent join URL TOKEN` writes it", .0.display())]
    NoCoordinator(PathBuf),
    /// The file cannot be written.
    #[error("cannot write the configuration")]
    Write(#[from] StateError),
}

/// Where `/metrics` listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MetricsListen {
    /// On TCP.
    Tcp(SocketAddr),
    /// On a unix socket.
    Unix(PathBuf),
}

impl FromStr for MetricsListen {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        if let Some(path) = text.strip_prefix("unix:") {
            return if path.starts_with('/') {
                Ok(Self::Unix(path.into()))
            } else {
                Err(format!("'{text}': the path after unix: must be absolute"))
            };
        }
        text.parse().map(Self::Tcp).map_err(|_| format!("'{text}' is neither ADDRESS:PORT nor unix:/PATH"))
    }
}

impl fmt::Display for MetricsListen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// A set of CPUs as the kernel writes it, `0-3,8`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CpuSet(pub Vec<u32>);

impl FromStr for CpuSet {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        /// More than any kernel numbers; it bounds what a typing error costs.
        const MAX_CPU: u32 = 65_535;
        let bad = |part: &str| format!("'{part}' is no CPU or range of CPUs such as 0-3,8");
        let mut cpus = std::collections::BTreeSet::new();
        for part in text.split(',').map(str::trim).filter(|p| !p.is_empty()) {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let number = |t: &str| t.trim().parse::<u32>().ok().filter(|n| *n <= MAX_CPU);
            match (number(first), number(last)) {
                (Some(first), Some(last)) if first <= last => cpus.extend(first..=last),
                _ => return Err(bad(part)),
            }
        }
        Ok(Self(cpus.into_iter().collect()))
    }
}

/// The file as written.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Written {
    #[serde(deserialize_with = "parsed")]
    coordinator: Option<SocketAddr>,
    underlay_link: Option<String>,
    #[serde(deserialize_with = "parsed")]
    underlay_address: Option<IpAddr>,
    pool: Option<PathBuf>,
    nfs: Option<Share>,
    disks: Disks,
    image_cache_mib: Option<u64>,
    libvirt: Option<String>,
    #[serde(deserialize_with = "parsed")]
    metrics_listen: Option<MetricsListen>,
    #[serde(deserialize_with = "parsed")]
    migration_listen: Option<SocketAddr>,
    bpffs: Option<PathBuf>,
    capacity: Capacity,
    program_stats: Option<bool>,
    #[serde(deserialize_with = "parsed")]
    shared_cpus: Option<CpuSet>,
    #[serde(deserialize_with = "parsed")]
    dedicated_cpus: Option<CpuSet>,
    reserved_memory_mib: Option<u64>,
    memory_binding: MemoryBinding,
    virtualization: Virtualization,
    connections: Option<u32>,
    members: Option<u32>,
    physical_networks: BTreeMap<String, String>,
}

fn parsed<'de, D, T>(deserializer: D) -> Result<Option<T>, D::Error>
where
    D: serde::Deserializer<'de>,
    T: FromStr<Err: fmt::Display>,
{
    let text = String::deserialize(deserializer)?;
    text.parse().map(Some).map_err(|e| serde::de::Error::custom(format!("{text:?}: {e}")))
}

/// What the agent runs with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// The agent's folder.
    pub dir: PathBuf,
    /// Where the coordinator takes agents.
    pub coordinator: SocketAddr,
    /// What is said of the link and the address that VXLAN packets leave by.
    pub underlay: UnderlayChoice,
    /// The shared folder of images and instances.
    pub pool: PathBuf,
    /// How the pool is reached and used.
    pub pool_policy: PoolPolicy,
    /// libvirt's URI.
    pub libvirt: String,
    /// Where `/metrics` is.
    pub metrics_listen: MetricsListen,
    /// Where streams of migrations are accepted; none: [`MIGRATION_PORT`] of the underlay's address.
    pub migration_listen: Option<SocketAddr>,
    /// A mounted BPF file system.
    pub bpffs: PathBuf,
    /// Most entries of the programs' maps.
    pub capacity: Capacity,
    /// Whether the kernel measures what the programs cost.
    pub program_stats: bool,
    /// CPUs for floating vCPUs; none: those that are not dedicated.
    pub shared_cpus: Option<CpuSet>,
    /// CPUs to pin to; none unless the operator names some.
    pub dedicated_cpus: CpuSet,
    /// Memory kept from guests, in bytes.
    pub reserved_memory_bytes: u64,
    /// Whether guest memory is bound to cells.
    pub memory_binding: MemoryBinding,
    /// How guests are run.
    pub virtualization: Virtualization,
    /// Room for what security groups remember.
    pub filter_room: Room,
    /// Links that flat and VLAN networks may use, by the name of their physical network.
    pub physical_networks: BTreeMap<String, String>,
}

impl Config {
    /// Reads `DIR/agent.toml` and finds out what it leaves open.
    ///
    /// # Errors
    /// Each of [`ConfigError`] but the last.
    pub fn load(dir: &Path) -> Result<Self, ConfigError> {
        let path = dir.join("agent.toml");
        let text = match fs::read_to_string(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => String::new(),
            other => other.map_err(|source| ConfigError::Read { path: path.clone(), source })?,
        };
        let written = read(&path, &text)?;
        if let Some(Err(message)) = written.nfs.as_ref().map(Share::check) {
            return Err(ConfigError::Wrong { path, message: format!("[nfs] {message}") });
        }
        let coordinator = written.coordinator.ok_or(ConfigError::NoCoordinator(path))?;
        Ok(Self {
            dir: dir.to_owned(),
            coordinator,
            underlay: UnderlayChoice {
                link: written.underlay_link,
                address: written.underlay_address,
                towards: Some(coordinator.ip()),
            },
            pool: written.pool.unwrap_or_else(|| "/srv/godwit".into()),
            pool_policy: PoolPolicy {
                share: written.nfs,
                disks: written.disks,
                cache_bytes: written.image_cache_mib.unwrap_or(20_480).saturating_mul(1 << 20),
            },
            libvirt: written.libvirt.unwrap_or_else(|| "qemu:///system".to_owned()),
            metrics_listen: written
                .metrics_listen
                .unwrap_or_else(|| MetricsListen::Tcp(SocketAddr::from(([127, 0, 0, 1], 9177)))),
            migration_listen: written.migration_listen,
            bpffs: written.bpffs.unwrap_or_else(|| "/sys/fs/bpf".into()),
            capacity: written.capacity,
            program_stats: written.program_stats.unwrap_or(true),
            shared_cpus: written.shared_cpus,
            dedicated_cpus: written.dedicated_cpus.unwrap_or_default(),
            reserved_memory_bytes: written.reserved_memory_mib.unwrap_or(512).saturating_mul(1 << 20),
            memory_binding: written.memory_binding,
            virtualization: written.virtualization,
            filter_room: room(written.connections, written.members, dir)?,
            physical_networks: physical_networks(written.physical_networks, dir)?,
        })
    }
}

/// Names that the API takes, links that the kernel can have, and none for two networks: what one has, the other would
/// get.
fn physical_networks(
    written: BTreeMap<String, String>,
    dir: &Path,
) -> Result<BTreeMap<String, String>, ConfigError> {
    let wrong = |message| Err(ConfigError::Wrong { path: dir.join("agent.toml"), message });
    let mut links = BTreeMap::new();
    for (name, link) in &written {
        if name.is_empty() || name.len() > 64 || name.contains(char::is_whitespace) {
            return wrong(format!(
                "physical_networks: {name:?} is no name of 1 to 64 characters without blanks"
            ));
        }
        if link.is_empty() || link.len() > 15 || link.contains(|c: char| c == '/' || c.is_whitespace()) {
            return wrong(format!("physical_networks: {name} = {link:?}: that is no link's name"));
        }
        if let Some(other) = links.insert(link, name) {
            return wrong(format!("physical_networks: {other} and {name} have the same link {link}"));
        }
    }
    Ok(written)
}

/// How many entries the maps of the filter have.
fn room(connections: Option<u32>, members: Option<u32>, dir: &Path) -> Result<Room, ConfigError> {
    let usual = Room::default();
    let room = Room {
        connections: connections.unwrap_or(usual.connections),
        members: members.unwrap_or(usual.members),
    };
    for (key, value) in [("connections", room.connections), ("members", room.members)] {
        if !(1024..=1 << 24).contains(&value) {
            let message = format!("{key} = {value}: it must be 1024 to 16777216");
            return Err(ConfigError::Wrong { path: dir.join("agent.toml"), message });
        }
    }
    Ok(room)
}

/// Names the coordinator in `DIR/agent.toml` and leaves every other line as it is.
///
/// # Errors
/// [`ConfigError::Wrong`] when the file that is there does not read, [`ConfigError::Write`].
pub fn write_coordinator(dir: &Path, coordinator: SocketAddr) -> Result<(), ConfigError> {
    let path = dir.join("agent.toml");
    let text = match fs::read_to_string(&path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => String::new(),
        other => other.map_err(|source| ConfigError::Read { path: path.clone(), source })?,
    };
    read(&path, &text)?;
    let is_it = |line: &&str| line.split_once('=').is_some_and(|(key, _)| key.trim() == "coordinator");
    let mut new = format!("coordinator = \"{coordinator}\"\n");
    for line in text.lines().filter(|line| !is_it(line)) {
        new.push_str(line);
        new.push('\n');
    }
    Ok(write_atomic(&path, new.as_bytes(), 0o644)?)
}

fn read(path: &Path, text: &str) -> Result<Written, ConfigError> {
    toml::from_str(text).map_err(|e| ConfigError::Wrong {
        path: path.to_owned(),
        message: e.to_string().trim_end().to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(text: &str) -> Result<Config, ConfigError> {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("agent.toml"), text).unwrap();
        Config::load(dir.path())
    }

    #[test]
    fn an_unknown_key_is_refused_by_name() {
        let error = load("coordinator = \"127.0.0.1:1\"\nunderlay_lnk = \"x\"").unwrap_err().to_string();
        assert!(error.contains("underlay_lnk") && error.contains("agent.toml"), "{error}");
    }

    #[test]
    fn a_wrong_value_is_refused_with_its_text() {
        for (line, text) in [
            ("metrics_listen = \"localhost\"", "localhost"),
            ("metrics_listen = \"unix:metrics.sock\"", "absolute"),
            ("shared_cpus = \"3-1\"", "3-1"),
            ("shared_cpus = \"0-99999999\"", "0-99999999"),
            ("memory_binding = \"loose\"", "loose"),
            ("reserved_memory_mib = -1", "-1"),
            ("physical_networks = { outside = \"no/link\" }", "no/link"),
            ("physical_networks = { a = \"eth1\", b = \"eth1\" }", "the same link eth1"),
            ("disks = \"thin\"", "thin"),
            ("[nfs]\nserver = \"a\"", "export"),
            ("[nfs]\nserver = \"a b\"\nexport = \"/e\"", "server"),
            ("[nfs]\nserver = \"a\"\nexport = \"/e\"\nversion = \"4\"", "version"),
            ("[nfs]\nserver = \"a\"\nexport = \"/e\"\non_outage = \"soft\"", "softerr"),
            ("[nfs]\nserver = \"a\"\nexport = \"/e\"\nfolder = \"/x\"", "folder"),
        ] {
            let error = load(&format!("coordinator = \"127.0.0.1:1\"\n{line}")).unwrap_err().to_string();
            assert!(error.contains(text), "{line}: {error}");
        }
    }

    #[test]
    fn what_is_not_said_is_what_most_hosts_want() {
        let config = load("coordinator = \"127.0.0.1:8775\"").unwrap();
        let towards = Some(IpAddr::from([127, 0, 0, 1]));
        assert_eq!(config.underlay, UnderlayChoice { link: None, address: None, towards });
        assert_eq!(config.migration_listen, None);
        assert_eq!(config.reserved_memory_bytes, 512 << 20);
        assert_eq!((config.shared_cpus, config.dedicated_cpus), (None, CpuSet::default()));
        assert_eq!(config.memory_binding, MemoryBinding::Strict);
    }

    #[test]
    fn everything_said_is_taken() {
        let config = load(
            "coordinator = \"127.0.0.1:1\"\nunderlay_link = \"eth7\"\nunderlay_address = \"198.18.0.11\"\n\
             metrics_listen = \"unix:/run/m.sock\"\nshared_cpus = \"0-1,4\"\ndedicated_cpus = \"2\"\n\
             memory_binding = \"none\"\nvirtualization = \"tcg\"\ndisks = \"overlay\"\nimage_cache_mib = 5\n\
             [nfs]\nserver = \"fd00::7\"\nexport = \"/e\"\nversion = \"4.1\"\non_outage = \"hard\"\n\
             options = [\"nconnect=4\"]\n",
        )
        .unwrap();
        assert_eq!(config.underlay.link.as_deref(), Some("eth7"));
        assert_eq!(config.underlay.address, Some([198, 18, 0, 11].into()));
        assert_eq!(config.metrics_listen, MetricsListen::Unix("/run/m.sock".into()));
        assert_eq!(config.shared_cpus, Some(CpuSet(vec![0, 1, 4])));
        assert_eq!(config.dedicated_cpus, CpuSet(vec![2]));
        assert_eq!(config.memory_binding, MemoryBinding::None);
        assert_eq!(config.virtualization, Virtualization::Tcg);
        let PoolPolicy { share, disks, cache_bytes } = config.pool_policy;
        assert_eq!((disks, cache_bytes), (Disks::Overlay, 5 << 20));
        assert_eq!(share.map(|share| share.to_string()).as_deref(), Some("[fd00::7]:/e"));
    }

    #[test]
    fn without_a_coordinator_the_operator_is_told_to_join() {
        let error = load("").unwrap_err().to_string();
        assert!(error.contains("godwit-agent join"), "{error}");
    }

    #[test]
    fn joining_again_replaces_the_coordinator_and_keeps_every_other_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent.toml");
        write_coordinator(dir.path(), "127.0.0.1:1".parse().unwrap()).unwrap();
        fs::write(&path, "# ours\npool = \"/p\"\ncoordinator = \"127.0.0.1:1\"\n").unwrap();
        write_coordinator(dir.path(), "127.0.0.1:2".parse().unwrap()).unwrap();
        assert_eq!(
            fs::read_to_string(&path).unwrap(),
            "coordinator = \"127.0.0.1:2\"\n# ours\npool = \"/p\"\n"
        );
    }
}
