//! Ports: an instance's attachments to networks.

use crate::id::{NetworkId, PortId};
use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

/// An Ethernet address.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct Mac(pub [u8; 6]);

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Not six pairs of hexadecimal digits with colons.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is not an Ethernet address such as fa:16:3e:00:00:01")]
pub struct BadMac(pub String);

impl FromStr for Mac {
    type Err = BadMac;
    fn from_str(text: &str) -> Result<Self, BadMac> {
        let bad = || BadMac(text.to_owned());
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().filter(|p| p.len() == 2 && p.bytes().all(|b| b.is_ascii_hexdigit()));
            *byte = u8::from_str_radix(part.ok_or_else(bad)?, 16).map_err(|_| bad())?;
        }
        if parts.next().is_some() { Err(bad()) } else { Ok(Self(bytes)) }
    }
}

impl From<Mac> for String {
    fn from(mac: Mac) -> Self {
        mac.to_string()
    }
}

impl TryFrom<String> for Mac {
    type Error = BadMac;
    fn try_from(text: String) -> Result<Self, BadMac> {
        text.parse()
    }
}

/// A port as a guest gets it: the NIC and what the config drive says of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestPort {
    /// Which.
    pub port: PortId,
    /// Its network.
    pub network: NetworkId,
    /// The network's VXLAN number, which names the bridge.
    pub vni: u32,
    /// The NIC's address.
    pub mac: Mac,
    /// MTU for the guest, in bytes.
    pub mtu: u32,
    /// Addresses of the port.
    pub addresses: Vec<PortAddress>,
}

/// An address of a port, with what a guest must know to use it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortAddress {
    /// The address.
    pub address: IpAddr,
    /// Length of the subnet's prefix in bits.
    pub prefix_length: u8,
    /// The subnet's gateway.
    pub gateway: Option<IpAddr>,
    /// Name servers.
    pub dns: Vec<IpAddr>,
    /// Routes beside the gateway: destination and next hop.
    #[serde(default)]
    pub routes: Vec<(IpNet, IpAddr)>,
    /// Whether the guest is to ask for it by DHCP.
    #[serde(default)]
    pub dhcp: bool,
}

/// What a host's DHCP responder gives to a port: an address with what its subnet says.
pub type Lease = PortAddress;

/// The tap's name on the host: at most 15 characters, as the kernel wants.
pub fn tap_name(port: PortId) -> String {
    format!("gwt{}", &port.0.simple().to_string()[..11])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mac_prints_as_it_parses_and_nothing_else_parses() {
        assert_eq!("FA:16:3e:00:00:01".parse::<Mac>().unwrap().to_string(), "fa:16:3e:00:00:01");
        for bad in [
            "",
            "fa:16:3e:00:00",
            "fa:16:3e:00:00:01:02",
            "fa:16:3e:00:00:+1",
            "fa163e000001",
            "é:16:3e:00:00:01",
        ] {
            assert!(bad.parse::<Mac>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_tap_name_fits_the_kernel() {
        assert_eq!(tap_name(PortId::random()).len(), 14);
    }
}
