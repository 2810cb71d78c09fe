//! coordinator.toml.

use crate::placement::Order;
use crate::verbs::network::VLANS;
use godwit_protocol::network::Unknown;
use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// The coordinator's settings; `init` writes them, people change them.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// How users reach the API, `https://ADDR:8774`; the catalog and all links start with it.
    pub url: String,
    /// Where the API listens with TLS.
    pub listen: SocketAddr,
    /// Where the API also listens without TLS: `127.0.0.1:PORT` or `unix:/path`. Nothing else is accepted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub plain_listen: Option<String>,
    /// Where agents connect (UDP).
    pub agents_listen: SocketAddr,
    /// Where `/metrics` is served: `127.0.0.1:PORT` or `unix:/path`.
    #[serde(default = "default_metrics")]
    pub metrics_listen: String,
    /// The shared folder with `images/` and `instances/`; the same path on all hosts.
    pub pool: PathBuf,
    /// Numbers for VXLAN networks, both ends included: `1001:2000`.
    #[serde(default = "default_vni_range")]
    pub vni_range: String,
    /// Numbers for VLAN networks that name none, by physical network: `{ physnet1 = "100:199" }`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub vlan_ranges: BTreeMap<String, String>,
    /// VXLAN's UDP port.
    #[serde(default = "default_vxlan_port")]
    pub vxlan_port: u16,
    /// How broadcast reaches the other hosts of a VXLAN network.
    #[serde(default)]
    pub flood: Flood,
    /// Groups of the underlay, such as `239.0.0.0/8`, of which each VXLAN network has the one with its number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub multicast_groups: Option<IpNet>,
    /// Hops that a packet to a group may take; more than 1 where routers of the underlay pass multicast on.
    #[serde(default = "default_multicast_ttl")]
    pub multicast_ttl: u8,
    /// What becomes of a packet for an Ethernet address that no port has: `drop` or `flood`.
    #[serde(default = "Unknown::drop")]
    pub unknown_unicast: Unknown,
    /// What becomes of a question for an IP address that no port has: `flood` or `drop`.
    #[serde(default = "Unknown::flood")]
    pub unknown_neighbours: Unknown,
    /// How much more may be promised than there is.
    #[serde(default)]
    pub overcommit: Overcommit,
    /// How hosts are chosen.
    #[serde(default)]
    pub placement: PlacementConfig,
    /// Time between an agent's heartbeats, in milliseconds.
    #[serde(default = "default_heartbeat_ms")]
    pub heartbeat_ms: u64,
    /// How long an operation waits for a host that does not answer before it fails and is undone, in seconds.
    #[serde(default = "default_host_patience_seconds")]
    pub host_patience_seconds: u64,
    /// Life of a user's token, in seconds.
    #[serde(default = "default_token_seconds")]
    pub token_seconds: u64,
    /// Longest pause of a guest at the end of a live migration, in milliseconds.
    #[serde(default = "default_downtime_ms")]
    pub max_downtime_ms: u64,
    /// Whether a resize may find its place on the host where the instance is.
    #[serde(default = "default_same_host")]
    pub allow_resize_to_same_host: bool,
    /// After how long a resize that nobody has confirmed or reverted is confirmed, in seconds; 0: never.
    #[serde(default)]
    pub resize_confirm_window: u64,
    /// How many migrations that have ended are kept to be looked at, the newest.
    #[serde(default = "default_migrations_kept")]
    pub migrations_kept: usize,
}

/// How broadcast, and what is unknown, reaches the other hosts of a VXLAN network.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Flood {
    /// As one copy to each host with a port, which asks nothing of the underlay.
    #[default]
    HeadEnd,
    /// As one packet to a multicast group, which hosts with a port join.
    Multicast,
}

/// Ratios of promised to real.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Overcommit {
    /// vCPUs to shared CPUs.
    pub cpu: f64,
    /// Guest memory to memory.
    pub memory: f64,
}

/// How hosts are chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PlacementConfig {
    /// `spread`: the emptiest host and cell first; `pack`: the fullest that has room.
    pub order: Order,
    /// Where ties begin; 0 is the first host by name.
    pub seed: u64,
}

impl Default for Overcommit {
    fn default() -> Self {
        Self { cpu: 16.0, memory: 1.0 }
    }
}

/// Two numbers with a colon between them, the smaller first.
fn range<N: FromStr + PartialOrd>(text: &str) -> Option<RangeInclusive<N>> {
    let (first, last) = text.split_once(':')?;
    let range = first.trim().parse().ok()?..=last.trim().parse().ok()?;
    Some(range).filter(|range| !range.is_empty())
}

fn default_metrics() -> String {
    "127.0.0.1:9178".into()
}
fn default_vni_range() -> String {
    "1001:2000".into()
}
fn default_vxlan_port() -> u16 {
    4789
}
fn default_multicast_ttl() -> u8 {
    1
}
fn default_heartbeat_ms() -> u64 {
    1000
}
fn default_host_patience_seconds() -> u64 {
    60
}
fn default_token_seconds() -> u64 {
    3600
}
fn default_same_host() -> bool {
    true
}
fn default_downtime_ms() -> u64 {
    500
}
fn default_migrations_kept() -> usize {
    1000
}

/// What is wrong with coordinator.toml.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// It is not there or may not be read.
    #[error("{path} cannot be read; run `godwit-coordinator init` first")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// It does not parse.
    #[error("{path} does not read")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where and why.
        #[source]
        source: Box<toml::de::Error>,
    },
    /// A value is wrong.
    #[error("coordinator.toml: {key} = {value:?}: {rule}")]
    Value {
        /// Which.
        key: &'static str,
        /// As it stands there.
        value: String,
        /// What it must be.
        rule: &'static str,
    },
}

impl Config {
    /// Reads and checks `DIR/coordinator.toml`.
    ///
    /// # Errors
    /// See [`ConfigError`].
    pub fn read(dir: &Path) -> Result<Self, ConfigError> {
        let path = dir.join("coordinator.toml");
        let text = std::fs::read_to_string(&path)
            .map_err(|source| ConfigError::Read { path: path.clone(), source })?;
        let config: Self =
            toml::from_str(&text).map_err(|source| ConfigError::Parse { path, source: Box::new(source) })?;
        config.check()?;
        Ok(config)
    }

    /// The numbers that networks get.
    ///
    /// # Errors
    /// [`ConfigError::Value`].
    pub fn vnis(&self) -> Result<RangeInclusive<u32>, ConfigError> {
        let bad = || ConfigError::Value {
            key: "vni_range",
            value: self.vni_range.clone(),
            rule: "two numbers from 1 to 16777215 with a colon, the smaller first",
        };
        range(&self.vni_range).filter(|range| *range.start() > 0 && *range.end() <= 0xff_ffff).ok_or_else(bad)
    }

    /// The numbers that VLAN networks get, by physical network.
    ///
    /// # Errors
    /// [`ConfigError::Value`].
    pub fn vlans(&self) -> Result<BTreeMap<String, RangeInclusive<u16>>, ConfigError> {
        let read = |(physical, text): (&String, &String)| {
            let range =
                range(text).filter(|range| VLANS.contains(range.start()) && VLANS.contains(range.end()));
            range.map(|range| (physical.clone(), range)).ok_or_else(|| ConfigError::Value {
                key: "vlan_ranges",
                value: format!("{physical} = {text}"),
                rule: "two numbers from 1 to 4094 with a colon, the smaller first",
            })
        };
        self.vlan_ranges.iter().map(read).collect()
    }

    /// The underlay's group of a VXLAN network; none: broadcast is replicated to each host. Where the range has
    /// fewer addresses than there are networks, some share a group, and hosts drop what is not theirs.
    pub fn multicast_group(&self, vni: u32) -> Option<IpAddr> {
        let range = self.multicast_groups.filter(|_| self.flood == Flood::Multicast)?;
        Some(match range {
            IpNet::V4(range) => {
                IpAddr::V4((range.network().to_bits() | (vni & range.hostmask().to_bits())).into())
            }
            IpNet::V6(range) => IpAddr::V6(
                (range.network().to_bits() | (u128::from(vni) & range.hostmask().to_bits())).into(),
            ),
        })
    }

    fn check(&self) -> Result<(), ConfigError> {
        self.vnis()?;
        self.vlans()?;
        let value = |key, value: String, rule| Err(ConfigError::Value { key, value, rule });
        if !self.url.starts_with("https://") && !self.url.starts_with("http://") {
            return value(
                "url",
                self.url.clone(),
                "starts with https:// (or http:// behind a proxy of your own)",
            );
        }
        if !self.pool.is_absolute() {
            return value("pool", self.pool.display().to_string(), "an absolute path, the same on all hosts");
        }
        let Overcommit { cpu, memory } = self.overcommit;
        if ![cpu, memory].iter().all(|ratio| (1.0..=1000.0).contains(ratio)) {
            return value("overcommit", format!("{cpu}, {memory}"), "ratios from 1.0 to 1000.0");
        }
        self.check_flood()?;
        if !(100..=60_000).contains(&self.heartbeat_ms) {
            return value("heartbeat_ms", self.heartbeat_ms.to_string(), "from 100 to 60000 milliseconds");
        }
        if !(1..=3600).contains(&self.host_patience_seconds) {
            return value(
                "host_patience_seconds",
                self.host_patience_seconds.to_string(),
                "from 1 to 3600 seconds",
            );
        }
        if !(1..=60_000).contains(&self.max_downtime_ms) {
            return value(
                "max_downtime_ms",
                self.max_downtime_ms.to_string(),
                "from 1 to 60000 milliseconds",
            );
        }
        if !(self.resize_confirm_window == 0 || (60..=2_592_000).contains(&self.resize_confirm_window)) {
            return value(
                "resize_confirm_window",
                self.resize_confirm_window.to_string(),
                "0 for never, or from 60 to 2592000 seconds",
            );
        }
        if !(100..=100_000).contains(&self.migrations_kept) {
            return value("migrations_kept", self.migrations_kept.to_string(), "from 100 to 100000");
        }
        if self.vxlan_port == 0 {
            return value("vxlan_port", self.vxlan_port.to_string(), "from 1 to 65535");
        }
        if !(60..=604_800).contains(&self.token_seconds) {
            return value("token_seconds", self.token_seconds.to_string(), "from 60 to 604800 seconds");
        }
        if let Some(plain) = &self.plain_listen {
            let loopback = plain.parse::<SocketAddr>().is_ok_and(|a| a.ip().is_loopback());
            if !loopback && !plain.starts_with("unix:/") {
                return value(
                    "plain_listen",
                    plain.clone(),
                    "without TLS only 127.0.0.1:PORT, [::1]:PORT or unix:/path",
                );
            }
        }
        Ok(())
    }

    /// That groups are some that switches and routers may keep to their members: not those of a link's own protocols,
    /// which go to every port (RFC 4541, 2.1.2), nor those that no packet may leave a host to (RFC 4291, 2.7).
    fn check_flood(&self) -> Result<(), ConfigError> {
        let value = |key, value: String, rule| Err(ConfigError::Value { key, value, rule });
        let Some(range) = self.multicast_groups else {
            return match self.flood {
                Flood::HeadEnd => Ok(()),
                Flood::Multicast => value(
                    "flood",
                    "multicast".into(),
                    "needs multicast_groups, a range such as 239.0.0.0/8 or ff05::/16",
                ),
            };
        };
        let usable = match range {
            IpNet::V4(range) => {
                let local = ipnet::Ipv4Net::new_assert([224, 0, 0, 0].into(), 24);
                range.network().is_multicast() && !range.contains(&local) && !local.contains(&range)
            }
            IpNet::V6(range) => {
                range.prefix_len() >= 16
                    && range.network().is_multicast()
                    && range.network().segments()[0] & 0xf >= 2
            }
        };
        if !usable {
            let rule = "a range of multicast addresses outside of 224.0.0.0/24; of IPv6 within one scope from ff02::/16";
            return value("multicast_groups", range.to_string(), rule);
        }
        if self.multicast_ttl == 0 {
            return value("multicast_ttl", self.multicast_ttl.to_string(), "from 1 to 255 hops");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What reading says of a file with these lines besides the needed ones.
    fn read(lines: &str) -> Result<Config, ConfigError> {
        let dir = tempfile::tempdir().expect("a folder");
        let needed = "url = \"https://192.0.2.1:8774\"\nlisten = \"192.0.2.1:8774\"\n\
                      agents_listen = \"192.0.2.1:8775\"\npool = \"/srv/godwit\"\n";
        std::fs::write(dir.path().join("coordinator.toml"), format!("{needed}{lines}")).expect("is written");
        Config::read(dir.path())
    }

    #[test]
    fn a_value_out_of_its_bounds_is_refused_with_its_key() {
        for (key, bad) in [
            ("vni_range", "\"0:5\""),
            ("vni_range", "\"9:5\""),
            ("vni_range", "\"1:16777216\""),
            ("vlan_ranges", "{ outside = \"0:5\" }"),
            ("vlan_ranges", "{ outside = \"9:5\" }"),
            ("vlan_ranges", "{ outside = \"9:4095\" }"),
            ("vxlan_port", "0"),
            ("flood", "\"multicast\""),
            ("multicast_groups", "\"10.0.0.0/8\""),
            ("multicast_groups", "\"224.0.0.0/4\""),
            ("multicast_groups", "\"224.0.0.128/25\""),
            ("multicast_groups", "\"ff01::/16\""),
            ("multicast_groups", "\"ff00::/8\""),
            ("multicast_ttl", "0\nmulticast_groups = \"239.0.0.0/8\""),
            ("heartbeat_ms", "99"),
            ("host_patience_seconds", "0"),
            ("host_patience_seconds", "3601"),
            ("max_downtime_ms", "0"),
            ("token_seconds", "59"),
            ("resize_confirm_window", "59"),
            ("migrations_kept", "99"),
            ("migrations_kept", "100001"),
            ("resize_confirm_window", "2592001"),
            ("plain_listen", "\"192.0.2.1:80\""),
        ] {
            match read(&format!("{key} = {bad}\n")) {
                Err(ConfigError::Value { key: named, .. }) => assert_eq!(named, key),
                other => panic!("{key} = {bad}: {other:?}"),
            }
        }
        assert!(matches!(read("[overcommit]\ncpu = 0.5\nmemory = 1.0\n"), Err(ConfigError::Value { .. })));
        let unknown = read("hosts = 3\n").expect_err("there is no such key");
        assert!(std::error::Error::source(&unknown).expect("has one").to_string().contains("hosts"));
        assert_eq!(read("").expect("is whole").host_patience_seconds, 60);
    }

    #[test]
    fn each_network_has_the_group_with_its_number() {
        let group = |range: &str, vni| {
            let lines = format!("flood = \"multicast\"\nmulticast_groups = \"{range}\"\n");
            read(&lines).expect("is whole").multicast_group(vni).expect("has one").to_string()
        };
        assert_eq!(group("239.0.0.0/8", 1001), "239.0.3.233");
        assert_eq!(group("239.0.0.0/8", 0xff_ffff), "239.255.255.255");
        assert_eq!(group("239.1.1.1/32", 1001), "239.1.1.1");
        assert_eq!(group("239.1.0.0/24", 1001), "239.1.0.233");
        assert_eq!(group("ff05::/16", 1001), "ff05::3e9");
        assert_eq!(read("multicast_groups = \"239.0.0.0/8\"").expect("is whole").multicast_group(1001), None);
    }
}
