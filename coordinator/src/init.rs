//! A new installation: its folder, certificates, keys, first user and flavors.

use crate::ca::{Ca, CaError};
use crate::config::{Config, Flood, Overcommit};
use crate::fleet::Change;
use crate::fleet::identity::{Project, Role, User};
use crate::fleet::instance::Flavor;
use crate::ledger::{Ledger, now};
use crate::store::StoreError;
use crate::tokens::{HashError, hash_password, random};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use godwit_protocol::id::{ProjectId, UserId};
use godwit_protocol::network::Unknown;
use std::collections::BTreeMap;
use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// Port of the API.
const API_PORT: u16 = 8774;
/// UDP port of the agents' channel.
const AGENTS_PORT: u16 = 8775;

/// What a new installation is made of.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Its folder.
    pub dir: PathBuf,
    /// How users reach the API.
    pub url: String,
    /// Where the API listens; by default the URL's host.
    pub listen: Option<SocketAddr>,
    /// Where agents connect; by default the URL's host.
    pub agents_listen: Option<SocketAddr>,
    /// The shared folder.
    pub pool: PathBuf,
    /// Replace an installation that is there.
    pub force: bool,
}

/// What was made, for people.
#[derive(Clone, Debug)]
pub struct Made {
    /// The administrator's password; it is kept only as a hash, and in clouds.yaml.
    pub password: String,
    /// Where clients read how to log in.
    pub clouds: PathBuf,
}

/// Why there is no new installation.
#[derive(Debug, thiserror::Error)]
pub enum InitError {
    /// There is one.
    #[error(
        "{0} holds an installation already; --force replaces it, with its state and all its certificates"
    )]
    Exists(PathBuf),
    /// The URL.
    #[error("{0:?} is no URL of the form https://ADDR:PORT")]
    Url(String),
    /// A file.
    #[error("{path} cannot be written")]
    Write {
        /// Which.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// The certificates.
    #[error("the certificates cannot be made")]
    Ca(#[from] CaError),
    /// The password.
    #[error(transparent)]
    Hash(#[from] HashError),
    /// The system.
    #[error("the system gives no random bytes")]
    Random(#[from] getrandom::Error),
    /// The state.
    #[error("the state cannot be made")]
    Store(#[from] StoreError),
    /// coordinator.toml.
    #[error("the settings cannot be written")]
    Settings(#[from] toml::ser::Error),
    /// clouds.yaml.
    #[error("clouds.yaml cannot be written")]
    Clouds(#[from] serde_yaml_ng::Error),
}

/// Host and port of a URL.
///
/// # Errors
/// [`InitError::Url`].
pub fn authority(url: &str) -> Result<(String, Option<u16>), InitError> {
    let bad = || InitError::Url(url.to_owned());
    let rest = url.strip_prefix("https://").or_else(|| url.strip_prefix("http://")).ok_or_else(bad)?;
    let rest = rest.strip_suffix('/').unwrap_or(rest);
    let (host, port) = match rest.strip_prefix('[') {
        Some(rest) => {
            let (host, port) = rest.split_once(']').ok_or_else(bad)?;
            (host, port.strip_prefix(':').map(str::parse).transpose().map_err(|_| bad())?)
        }
        None => match rest.split_once(':') {
            Some((host, port)) => (host, Some(port.parse().map_err(|_| bad())?)),
            None => (rest, None),
        },
    };
    let plain = |b: u8| b.is_ascii_alphanumeric() || b".-:".contains(&b);
    if host.is_empty() || !host.bytes().all(plain) { Err(bad()) } else { Ok((host.to_owned(), port)) }
}

/// Names and addresses that the coordinator's certificate must have.
///
/// # Errors
/// [`InitError::Url`].
pub fn certificate_names(config: &Config) -> Result<Vec<String>, InitError> {
    let (host, _) = authority(&config.url)?;
    let mut names = vec![host];
    for address in [config.listen.ip(), config.agents_listen.ip()] {
        let name = address.to_string();
        if !address.is_unspecified() && !names.contains(&name) {
            names.push(name);
        }
    }
    Ok(names)
}

/// Makes a new installation. coordinator.toml is written last: without it there is none, and a call that was cut
/// off can be repeated.
///
/// # Errors
/// [`InitError`].
pub async fn init(plan: Plan) -> Result<Made, InitError> {
    let settings = plan.dir.join("coordinator.toml");
    if settings.exists() && !plan.force {
        return Err(InitError::Exists(plan.dir));
    }
    let config = settings_of(&plan)?;
    make_folder(&plan.dir)?;
    for old in ["coordinator.toml", "state.db", "state.db-wal", "state.db-shm"] {
        let path = plan.dir.join(old);
        match std::fs::remove_file(&path) {
            Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
                return Err(InitError::Write { path, source });
            }
            _ => {}
        }
    }
    let (ca_pem, ca_key) = Ca::create(now())?;
    write(&plan.dir.join("ca.key"), &ca_key, 0o600)?;
    write(&plan.dir.join("ca.pem"), &ca_pem, 0o644)?;
    let ca = Ca::from_pem(ca_pem, &ca_key)?;
    write_server_certificate(&plan.dir, &ca, &config)?;
    write(&plan.dir.join("token.key"), &hex::encode(random::<32>()?), 0o600)?;
    let password = URL_SAFE_NO_PAD.encode(random::<18>()?);
    let changes = first_records(hash_password(&password)?);
    let ledger = Ledger::open(&plan.dir.join("state.db"))?;
    ledger.change::<_, StoreError>(|_| Ok((changes, ()))).await?;
    let clouds = plan.dir.join("clouds.yaml");
    let dir = plan.dir.canonicalize().unwrap_or_else(|_| plan.dir.clone());
    write(&clouds, &clouds_yaml(&config.url, &password, &dir.join("ca.pem"))?, 0o600)?;
    write(&settings, &toml::to_string_pretty(&config)?, 0o644)?;
    Ok(Made { password, clouds })
}

/// A new certificate and key for the coordinator.
///
/// # Errors
/// [`InitError`].
pub fn write_server_certificate(dir: &Path, ca: &Ca, config: &Config) -> Result<(), InitError> {
    let (certificate, key) = ca.sign_coordinator(&certificate_names(config)?, now())?;
    // One file for both: a crash between two files would leave a certificate with another's key.
    write(&dir.join("server.pem"), &format!("{certificate}{key}"), 0o600)
}

fn settings_of(plan: &Plan) -> Result<Config, InitError> {
    let (host, port) = authority(&plan.url)?;
    // A name says nothing about this machine's addresses: listen on all of them.
    let address = host.parse().unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED));
    let listen = plan.listen.unwrap_or(SocketAddr::new(address, port.unwrap_or(API_PORT)));
    let url = plan.url.trim_end_matches('/');
    Ok(Config {
        url: if port.is_some() { url.to_owned() } else { format!("{url}:{}", listen.port()) },
        listen,
        plain_listen: None,
        agents_listen: plan.agents_listen.unwrap_or(SocketAddr::new(listen.ip(), AGENTS_PORT)),
        metrics_listen: "127.0.0.1:9178".into(),
        pool: plan.pool.clone(),
        vni_range: "1001:2000".into(),
        vlan_ranges: Default::default(),
        vxlan_port: 4789,
        flood: Flood::HeadEnd,
        multicast_groups: None,
        multicast_ttl: 1,
        unknown_unicast: Unknown::Drop,
        unknown_neighbours: Unknown::Flood,
        overcommit: Overcommit::default(),
        placement: Default::default(),
        heartbeat_ms: 1000,
        token_seconds: 3600,
        host_patience_seconds: 60,
        max_downtime_ms: 500,
        allow_resize_to_same_host: true,
        resize_confirm_window: 0,
        migrations_kept: 1000,
    })
}

fn first_records(password_hash: String) -> Vec<Change> {
    let project = Project { id: ProjectId::random(), name: "admin".into() };
    let roles = vec![(project.id, Role::Admin)];
    let user = User { id: UserId::random(), name: "admin".into(), password_hash, roles };
    let sizes = [
        ("m1.tiny", 1, 512, 1),
        ("m1.small", 1, 2048, 20),
        ("m1.medium", 2, 4096, 40),
        ("m1.large", 4, 8192, 80),
        ("m1.xlarge", 8, 16384, 160),
    ];
    let flavor = |(index, (name, vcpus, memory_mib, disk_gib)): (usize, (&str, u32, u64, u64))| Flavor {
        id: (index + 1).to_string(),
        name: name.into(),
        vcpus,
        memory_mib,
        disk_gib,
        public: true,
        extra_specs: BTreeMap::new(),
        description: None,
    };
    let flavors = sizes.into_iter().enumerate().map(|size| flavor(size).into());
    [project.into(), user.into()].into_iter().chain(flavors).collect()
}

fn clouds_yaml(url: &str, password: &str, ca: &Path) -> Result<String, InitError> {
    let clouds = serde_json::json!({ "clouds": { "godwit": {
        "auth": {
            "auth_url": format!("{url}/identity/v3"),
            "username": "admin",
            "password": password,
            "project_name": "admin",
            "user_domain_name": "Default",
            "project_domain_name": "Default",
        },
        "cacert": ca,
        "identity_api_version": "3",
        "interface": "public",
        "region_name": "RegionOne",
    } } });
    Ok(serde_yaml_ng::to_string(&clouds)?)
}

fn make_folder(dir: &Path) -> Result<(), InitError> {
    let failed = |source| InitError::Write { path: dir.to_owned(), source };
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(failed)?;
    std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o700)).map_err(failed)
}

/// A whole file or none, on disk when it returns.
fn write(path: &Path, text: &str, mode: u32) -> Result<(), InitError> {
    let failed = |source| InitError::Write { path: path.to_owned(), source };
    let mut partial = path.as_os_str().to_owned();
    partial.push(".partial");
    let mut options = std::fs::OpenOptions::new();
    let mut file =
        options.write(true).create(true).truncate(true).mode(mode).open(&partial).map_err(failed)?;
    file.write_all(text.as_bytes()).and_then(|()| file.sync_all()).map_err(failed)?;
    std::fs::rename(&partial, path).map_err(failed)?;
    let folder = path.parent().map_or(Ok(()), |dir| std::fs::File::open(dir).and_then(|dir| dir.sync_all()));
    folder.map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(dir: &Path, url: &str) -> Plan {
        Plan {
            dir: dir.join("c0"),
            url: url.into(),
            listen: None,
            agents_listen: None,
            pool: "/srv/godwit".into(),
            force: false,
        }
    }

    #[test]
    fn a_url_gives_its_host_and_port_or_is_refused() {
        let host = |url: &str| authority(url).ok();
        assert_eq!(host("https://198.18.0.1:8774"), Some(("198.18.0.1".into(), Some(8774))));
        assert_eq!(host("https://cloud.example/"), Some(("cloud.example".into(), None)));
        assert_eq!(host("https://[fd00::1]:99"), Some(("fd00::1".into(), Some(99))));
        for url in ["198.18.0.1", "ftp://a", "https://", "https://a:b", "https://a/b", "https://[::1"] {
            assert_eq!(host(url), None, "{url}");
        }
    }

    #[test]
    fn listeners_follow_the_url_unless_told_otherwise() {
        let dir = Path::new("/nowhere");
        let config = settings_of(&plan(dir, "https://198.18.0.1:8774")).unwrap();
        assert_eq!(config.listen.to_string(), "198.18.0.1:8774");
        assert_eq!(config.agents_listen.to_string(), "198.18.0.1:8775");
        let named = settings_of(&plan(dir, "https://cloud.example")).unwrap();
        assert_eq!(
            (named.url.as_str(), named.listen.to_string()),
            ("https://cloud.example:8774", "0.0.0.0:8774".into())
        );
        assert_eq!(certificate_names(&named).unwrap(), ["cloud.example"]);
    }

    #[tokio::test]
    async fn a_new_installation_reads_back_and_its_secrets_are_its_owners_alone() {
        let folder = tempfile::tempdir().unwrap();
        let plan = plan(folder.path(), "https://127.0.0.1:8774");
        let made = init(plan.clone()).await.unwrap();
        Config::read(&plan.dir).unwrap();
        let fleet = Ledger::open(&plan.dir.join("state.db")).unwrap();
        fleet.read(|fleet| {
            assert_eq!(fleet.flavors.keys().collect::<Vec<_>>(), ["1", "2", "3", "4", "5"]);
            let admin = fleet.users.values().next().unwrap();
            assert_eq!(admin.roles[0].1, Role::Admin);
        });
        for (name, mode) in [
            ("", 0o700),
            ("ca.key", 0o600),
            ("server.pem", 0o600),
            ("token.key", 0o600),
            ("clouds.yaml", 0o600),
        ] {
            let meta = std::fs::metadata(plan.dir.join(name)).unwrap();
            assert_eq!(meta.permissions().mode() & 0o777, mode, "{name}");
        }
        let clouds = std::fs::read_to_string(&made.clouds).unwrap();
        let clouds: serde_yaml_ng::Value = serde_yaml_ng::from_str(&clouds).unwrap();
        assert_eq!(clouds["clouds"]["godwit"]["auth"]["password"].as_str(), Some(made.password.as_str()));
        assert!(matches!(init(plan.clone()).await, Err(InitError::Exists(_))));
        let again = init(Plan { force: true, ..plan }).await.unwrap();
        assert_ne!(again.password, made.password);
    }
}
