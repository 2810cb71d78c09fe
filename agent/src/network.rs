//! The overlay on this host: a bridge and a VXLAN device per network, and which host each address is behind.

pub mod dhcp;
pub mod fake;
pub mod filtered;
pub mod keeper;
pub mod netlink;
pub mod overlay;
#[cfg(test)]
pub(crate) mod sandbox;
pub mod wanted;
pub mod watch;

use godwit_protocol::error::{ErrorKind, RequestError};
use godwit_protocol::host::{Link, PhysicalNetwork, Underlay};
use godwit_protocol::network::{Carrier, FIRST_PROVIDED, NetworkReported, NetworkWanted};
use godwit_protocol::port::Mac;
use std::collections::BTreeSet;
use std::net::IpAddr;

/// What carries the guests' packets. Every call may block for as long as the kernel takes, which is short:
/// nothing here waits for another machine.
pub trait HostNetwork: Send + Sync {
    /// Brings a network to the wanted state, by changing only what differs; a second time changes nothing. Which
    /// order is the newest is for the caller to know.
    ///
    /// # Errors
    /// What is wanted makes no sense, does not fit the underlay, or the kernel refuses a step; the steps before
    /// it stay done, and the next call goes on from there.
    fn ensure(&self, wanted: &NetworkWanted) -> Result<Changes, NetworkError>;

    /// Takes a network off this host, with whatever was attached to its bridge left without one. Says whether
    /// there was anything; not being there is a success.
    ///
    /// # Errors
    /// The kernel refuses.
    fn remove(&self, vni: u32) -> Result<bool, NetworkError>;

    /// Makes those of these taps that are ports of the network and are not there yet, down: nothing passes before
    /// [`Self::open_taps`], and until then [`Self::ensure`] puts their programs on them and them on the bridge.
    ///
    /// # Errors
    /// The kernel refuses.
    fn make_taps(&self, _wanted: &NetworkWanted, _taps: &BTreeSet<String>) -> Result<(), NetworkError> {
        Ok(())
    }

    /// Lets packets pass at these taps.
    ///
    /// # Errors
    /// The kernel refuses.
    fn open_taps(&self, _taps: &BTreeSet<String>) -> Result<(), NetworkError> {
        Ok(())
    }

    /// The taps of guests that nobody has open.
    ///
    /// # Errors
    /// The kernel does not tell.
    fn unused_taps(&self) -> Result<BTreeSet<String>, NetworkError> {
        Ok(BTreeSet::new())
    }

    /// Removes those of these taps that nobody has open.
    ///
    /// # Errors
    /// The kernel refuses.
    fn discard_taps(&self, _taps: &BTreeSet<String>) -> Result<(), NetworkError> {
        Ok(())
    }

    /// Sets up the taps that have come, and forgets those that have gone; what fails is logged.
    fn refresh(&self) {}

    /// What is there, by the kernel's own account, in the order of VNIs.
    ///
    /// # Errors
    /// The kernel does not tell.
    fn observe(&self) -> Result<Vec<NetworkReported>, NetworkError>;

    /// The host's own links, in the order of their names: not loopback, and nothing that belongs to guests or
    /// overlays.
    ///
    /// # Errors
    /// The kernel does not tell.
    fn links(&self) -> Result<Vec<Link>, NetworkError>;

    /// The link and address that VXLAN packets leave by.
    ///
    /// # Errors
    /// The link is not there.
    fn underlay(&self) -> Result<Underlay, NetworkError>;

    /// The links that flat and VLAN networks may use and that are there.
    ///
    /// # Errors
    /// The kernel does not tell.
    fn physical_networks(&self) -> Result<Vec<PhysicalNetwork>, NetworkError>;
}

/// What [`HostNetwork::ensure`] had to do, in changes of each kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// Of the network's two links, those made, replaced or set up anew.
    pub links: u32,
    /// Forwarding entries added, moved or removed.
    pub forwarding: u32,
    /// Destinations of broadcast added or removed.
    pub flood: u32,
    /// Ports of this host put on the bridge.
    pub ports: u32,
}

impl Changes {
    /// Whether everything was as wanted already.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// Why the overlay is not as wanted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NetworkError {
    /// What is wanted contradicts itself.
    #[error("network with VNI {vni}: {reason}")]
    Invalid {
        /// VXLAN network identifier.
        vni: u32,
        /// What is wrong with it.
        reason: String,
    },
    /// The underlay link is not there.
    #[error(
        "there is no link {link}: set `underlay_link` in agent.toml to the link that VXLAN packets leave by"
    )]
    NoUnderlay {
        /// The name looked for.
        link: String,
    },
    /// No link can be told to be the underlay.
    #[error(
        "no link leads {}: set `underlay_link` and `underlay_address` in agent.toml", destination(.towards)
    )]
    NoRoute {
        /// Where to; nothing: anywhere.
        towards: Option<IpAddr>,
    },
    /// Which address of the underlay link is the host's VTEP cannot be told, or is not there.
    #[error("{}", which_address(.link, .have, .wanted))]
    UnderlayAddress {
        /// The link.
        link: String,
        /// The addresses that it has.
        have: String,
        /// The one that was asked for.
        wanted: Option<IpAddr>,
    },
    /// The host has no such physical network.
    #[error("this host has no physical network {physical}: name its link in physical_networks of agent.toml")]
    NoPhysical {
        /// Its name in the API.
        physical: String,
    },
    /// The link of a physical network is not there.
    #[error("there is no link {link}, which physical_networks in agent.toml gives for {physical}")]
    NoLink {
        /// Its name in the API.
        physical: String,
        /// The link.
        link: String,
    },
    /// The link of a physical network serves something else.
    #[error("the link {link} cannot carry the physical network {physical}: {reason}")]
    LinkTaken {
        /// Its name in the API.
        physical: String,
        /// The link.
        link: String,
        /// What it serves.
        reason: String,
    },
    /// The kernel has no VLANs.
    #[error("this host's kernel has no VLAN links: load the module 8021q")]
    NoVlans {
        /// What it said.
        source: netlink::KernelError,
    },
    /// The underlay's packets are too small for those of the network.
    #[error(
        "network with VNI {vni} has an MTU of {mtu} bytes and needs one of {need} on the underlay, \
         but {link} has {have}: raise the MTU of {link}, or give the network one of {} or less",
        .have.saturating_sub(.need - .mtu)
    )]
    MtuTooLarge {
        /// VXLAN network identifier.
        vni: u32,
        /// The network's MTU in bytes.
        mtu: u32,
        /// What the underlay would have to have, in bytes.
        need: u32,
        /// What it has, in bytes.
        have: u32,
        /// The underlay link.
        link: String,
    },
    /// A setting of a link cannot be written.
    #[error("cannot write {path}")]
    Setting {
        /// The file.
        path: String,
        /// Why.
        source: std::io::Error,
    },
    /// Ports have rules that nothing here can apply.
    #[error(
        "network with VNI {vni} has ports with security groups, and this host's kernel does not take the filter: \
         see the agent's log"
    )]
    NoFilter {
        /// The network's number.
        vni: u32,
    },
    /// A guest is to have a port that nobody has told of.
    #[error(
        "this host was told of no network with the port of tap {tap}: its network comes before its guest"
    )]
    UnknownTap {
        /// The tap.
        tap: String,
    },
    /// The programs of its ports.
    #[error("the ports of the network are not set up")]
    Plane(#[from] crate::telemetry::TelemetryError),
    /// The kernel refuses.
    #[error("the kernel refuses to {action}")]
    Kernel {
        /// What was asked of it.
        action: String,
        /// What it said.
        source: netlink::KernelError,
    },
}

fn destination(address: &Option<IpAddr>) -> String {
    address.map_or_else(|| "out of this host".into(), |address| format!("to {address}"))
}

fn which_address(link: &str, have: &str, wanted: &Option<IpAddr>) -> String {
    match (have, wanted) {
        ("", _) => format!("link {link} has no address to send VXLAN packets from: give it one"),
        (have, Some(wanted)) => {
            format!("link {link} lacks {wanted}, the `underlay_address` of agent.toml; it has {have}")
        }
        (have, None) => format!(
            "link {link} has several addresses, {have}: a host has one VTEP, so say which by `underlay_address` in \
             agent.toml"
        ),
    }
}

impl NetworkError {
    /// What the coordinator may do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Invalid { .. } => ErrorKind::Invalid,
            Self::MtuTooLarge { .. } | Self::LinkTaken { .. } => ErrorKind::Conflict,
            Self::NoPhysical { .. } | Self::NoLink { .. } | Self::NoVlans { .. } => ErrorKind::Conflict,
            Self::NoUnderlay { .. } | Self::NoRoute { .. } | Self::UnderlayAddress { .. } => {
                ErrorKind::Unavailable
            }
            Self::NoFilter { .. } | Self::UnknownTap { .. } => ErrorKind::Conflict,
            Self::Setting { .. } | Self::Plane(_) | Self::Kernel { .. } => ErrorKind::Internal,
        }
    }
}

impl From<NetworkError> for RequestError {
    /// The whole chain of sources in one line, as it travels.
    fn from(error: NetworkError) -> Self {
        let kind = error.kind();
        let chain = std::iter::successors(Some(&error as &dyn std::error::Error), |error| error.source());
        let parts: Vec<String> = chain.map(ToString::to_string).collect();
        Self::new(kind, parts.join(": "))
    }
}

/// Bytes that VXLAN adds to a guest's IP packet up to the underlay's: inner Ethernet, VXLAN, UDP and outer IP
/// header.
fn overhead_bytes(underlay: IpAddr) -> u32 {
    14 + 8 + 8 + if underlay.is_ipv4() { 20 } else { 40 }
}

/// Refuses what no host could do.
fn check(wanted: &NetworkWanted, underlay: &Underlay) -> Result<(), NetworkError> {
    let vni = wanted.vni;
    let invalid = |reason: String| Err(NetworkError::Invalid { vni, reason });
    if wanted.mtu < 68 {
        return invalid(format!("an MTU of {} bytes is less than the 68 that IPv4 needs", wanted.mtu));
    }
    if !wanted.carrier.is_vxlan() {
        if vni < FIRST_PROVIDED {
            return invalid(format!("a network on a link has a number from {FIRST_PROVIDED} on"));
        }
        if matches!(wanted.carrier, Carrier::Vlan(_, 0 | 4095..)) {
            return invalid("a VLAN is a number from 1 to 4094".into());
        }
        if !wanted.forwarding.is_empty() || !wanted.flood.is_empty() {
            return invalid("a network on a link has no tunnels".into());
        }
        return Ok(());
    }
    if !(1..FIRST_PROVIDED).contains(&vni) {
        return invalid("a VNI is a number from 1 to 16777215".into());
    }
    if wanted.udp_port == 0 {
        return invalid("zero is no UDP port".into());
    }
    if let Carrier::VxlanGroup { group, ttl } = wanted.carrier {
        if !group.is_multicast() || group.is_ipv4() != underlay.address.is_ipv4() {
            let own = underlay.address;
            return invalid(format!(
                "{group} is no multicast group of the underlay, where this host is {own}: set `multicast_groups` in \
                 coordinator.toml to a range of the underlay's family"
            ));
        }
        if ttl == 0 {
            return invalid("a packet to a group takes at least one hop".into());
        }
        if wanted.flood != [group] {
            return invalid(format!("broadcast is to go to the group {group} alone"));
        }
    }
    for (index, entry) in wanted.forwarding.iter().enumerate() {
        let mac = entry.mac;
        if mac.0[0] & 1 == 1 || mac == Mac([0; 6]) {
            return invalid(format!("{mac} is no address of one port"));
        }
        if wanted.forwarding[..index].iter().any(|other| other.mac == mac) {
            return invalid(format!("{mac} is to be behind two hosts"));
        }
    }
    let replicated = if wanted.carrier == Carrier::Vxlan { wanted.flood.as_slice() } else { &[] };
    let vteps = wanted.forwarding.iter().map(|entry| entry.vtep).chain(replicated.iter().copied());
    for vtep in vteps {
        if vtep == underlay.address {
            return invalid(format!("{vtep} is this host's own address on the underlay"));
        }
        if vtep.is_ipv4() != underlay.address.is_ipv4() || vtep.is_multicast() || vtep.is_unspecified() {
            return invalid(format!("{vtep} cannot be reached from {} on the underlay", underlay.address));
        }
    }
    let need = wanted.mtu + overhead_bytes(underlay.address);
    if need > underlay.mtu {
        let (mtu, have, link) = (wanted.mtu, underlay.mtu, underlay.link.clone());
        return Err(NetworkError::MtuTooLarge { vni, mtu, need, have, link });
    }
    Ok(())
}
