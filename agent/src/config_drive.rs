//! The config drive: an ISO 9660 image labelled `config-2` that tells a guest its name, keys and addresses the way
//! OpenStack does, so that cloud-init and its kin read it as they are
//! (<https://docs.openstack.org/nova/latest/user/metadata.html>).

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use godwit_protocol::instance::InstanceSpec;
use godwit_protocol::port::{GuestPort, PortAddress, tap_name};
use serde_json::{Value, json};
use std::fs::{self, File};
use std::io::{self, Read};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Versions of the layout: `latest`, and the last one whose keys changed.
const VERSIONS: [&str; 2] = ["latest", "2018-08-27"];

/// Bytes of randomness that a guest gets for its first boot, as many as Nova gives.
const SEED_BYTES: u64 = 512;

/// Why a config drive was not built.
#[derive(Debug, thiserror::Error)]
pub enum ConfigDriveError {
    /// The staging folder cannot be written.
    #[error("cannot stage the config drive")]
    Stage(#[from] io::Error),
    /// The tool is missing.
    #[error("cannot run xorriso; install the package xorriso")]
    Tool(#[source] io::Error),
    /// The tool failed.
    #[error("xorriso failed: {0}")]
    Failed(String),
}

/// The image's bytes, some hundred KiB.
///
/// # Errors
/// [`ConfigDriveError`].
pub fn build(spec: &InstanceSpec) -> Result<Vec<u8>, ConfigDriveError> {
    let mut seed = Vec::with_capacity(SEED_BYTES as usize);
    File::open("/dev/urandom")?.take(SEED_BYTES).read_to_end(&mut seed)?;
    let staging = tempfile::tempdir()?;
    for version in VERSIONS {
        let folder = staging.path().join("openstack").join(version);
        fs::create_dir_all(&folder)?;
        fs::write(folder.join("meta_data.json"), meta_data(spec, &seed).to_string())?;
        fs::write(folder.join("network_data.json"), network_data(&spec.ports).to_string())?;
        if let Some(user_data) = &spec.config_drive.user_data {
            fs::write(folder.join("user_data"), user_data)?;
        }
    }
    make_iso(staging.path())
}

fn make_iso(tree: &Path) -> Result<Vec<u8>, ConfigDriveError> {
    let output = Command::new("xorriso")
        .args(["-as", "mkisofs", "-quiet", "-volid", "config-2", "-joliet", "-rock", "-output", "-"])
        .arg(PathBuf::from(tree))
        .stdin(Stdio::null())
        .output()
        .map_err(ConfigDriveError::Tool)?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    let complaint = String::from_utf8_lossy(&output.stderr);
    let last = complaint.lines().rev().find(|line| !line.trim().is_empty());
    Err(ConfigDriveError::Failed(last.unwrap_or("it said nothing").to_owned()))
}

fn meta_data(spec: &InstanceSpec, seed: &[u8]) -> Value {
    let drive = &spec.config_drive;
    let mut data = json!({
        "uuid": spec.instance,
        "name": spec.name,
        "hostname": drive.hostname,
        "launch_index": 0,
        "availability_zone": drive.availability_zone,
        "random_seed": STANDARD.encode(seed),
        "devices": [],
        "dedicated_cpus": [],
    });
    if !drive.public_keys.is_empty() {
        data["public_keys"] = json!(drive.public_keys);
        data["keys"] = drive
            .public_keys
            .iter()
            .map(|(name, key)| json!({"name": name, "type": "ssh", "data": key}))
            .collect();
    }
    if !drive.metadata.is_empty() {
        data["meta"] = json!(drive.metadata);
    }
    data
}

fn network_data(ports: &[GuestPort]) -> Value {
    let links: Vec<Value> = ports
        .iter()
        .map(|port| {
            json!({
                "id": tap_name(port.port),
                "vif_id": port.port,
                "type": "bridge",
                "mtu": port.mtu,
                "ethernet_mac_address": port.mac,
            })
        })
        .collect();
    let addresses = ports.iter().flat_map(|port| port.addresses.iter().map(move |address| (port, address)));
    let networks: Vec<Value> =
        addresses.enumerate().map(|(number, (port, address))| network(number, port, address)).collect();
    let mut name_servers: Vec<IpAddr> = Vec::new();
    for server in ports.iter().flat_map(|port| &port.addresses).flat_map(|address| &address.dns) {
        if !name_servers.contains(server) {
            name_servers.push(*server);
        }
    }
    json!({ "links": links, "networks": networks, "services": services(&name_servers) })
}

fn network(number: usize, port: &GuestPort, address: &PortAddress) -> Value {
    let (family, anywhere) = match address.address {
        IpAddr::V4(_) => ("ipv4", "0.0.0.0"),
        IpAddr::V6(_) => ("ipv6", "::"),
    };
    let default = address
        .gateway
        .iter()
        .map(|gateway| json!({"network": anywhere, "netmask": anywhere, "gateway": gateway}));
    let others = address.routes.iter().map(|(destination, gateway)| {
        json!({"network": destination.network(), "netmask": destination.netmask(), "gateway": gateway})
    });
    let routes: Vec<Value> = default.chain(others).collect();
    json!({
        "id": format!("network{number}"),
        "network_id": port.network,
        "link": tap_name(port.port),
        "type": family,
        "ip_address": address.address,
        "netmask": netmask(address),
        "routes": routes,
        "services": services(&address.dns),
    })
}

fn services(name_servers: &[IpAddr]) -> Vec<Value> {
    name_servers.iter().map(|server| json!({"type": "dns", "address": server})).collect()
}

fn netmask(address: &PortAddress) -> IpAddr {
    let length = u32::from(address.prefix_length);
    match address.address {
        IpAddr::V4(_) => {
            Ipv4Addr::from_bits(u32::MAX.checked_shl(32 - length.min(32)).unwrap_or_default()).into()
        }
        IpAddr::V6(_) => {
            Ipv6Addr::from_bits(u128::MAX.checked_shl(128 - length.min(128)).unwrap_or_default()).into()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hypervisor::domain_xml::tests::spec;

    fn read_back(image: &[u8], path: &str) -> Vec<u8> {
        let folder = tempfile::tempdir().unwrap();
        let (iso, copy) = (folder.path().join("config.iso"), folder.path().join("copy"));
        fs::write(&iso, image).unwrap();
        let output = Command::new("xorriso")
            .args(["-osirrox", "on", "-indev"])
            .arg(&iso)
            .arg("-extract")
            .args([path.as_ref(), copy.as_os_str()])
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        fs::read(copy).unwrap()
    }

    #[test]
    fn a_guest_reads_what_was_meant_for_it() {
        let mut spec = spec();
        spec.name = "näme \"with\" <marks>".to_owned();
        spec.config_drive.user_data = Some(b"#!/bin/sh\necho \xff\n".to_vec());
        let image = build(&spec).unwrap();
        assert_eq!(&image[32808..32816], b"config-2");
        for version in VERSIONS {
            let meta = read_back(&image, &format!("/openstack/{version}/meta_data.json"));
            let meta: Value = serde_json::from_slice(&meta).unwrap();
            assert_eq!(meta["uuid"], json!(spec.instance));
            assert_eq!(meta["name"], spec.name);
            assert_eq!(meta["hostname"], "web-1");
            assert_eq!(meta["public_keys"]["mine"], "ssh-ed25519 AAAA me@home");
            assert_eq!(meta["keys"][0]["data"], "ssh-ed25519 AAAA me@home");
            assert_eq!(meta["meta"]["role"], "front");
            let user_data = read_back(&image, &format!("/openstack/{version}/user_data"));
            assert_eq!(Some(user_data), spec.config_drive.user_data);
        }
    }

    #[test]
    fn a_guest_finds_its_addresses_by_its_nics_mac() {
        let mut spec = spec();
        spec.ports[0].addresses[0].routes =
            vec![("192.168.128.0/17".parse().unwrap(), "10.0.0.9".parse().unwrap())];
        spec.ports[0].addresses.push(PortAddress {
            address: "fd00::5".parse().unwrap(),
            prefix_length: 64,
            gateway: Some("fd00::1".parse().unwrap()),
            dns: vec!["10.0.0.2".parse().unwrap(), "fd00::2".parse().unwrap()],
            routes: vec![("2001:db8::/33".parse().unwrap(), "fd00::9".parse().unwrap())],
            dhcp: true,
        });
        let image = build(&spec).unwrap();
        let data = read_back(&image, "/openstack/latest/network_data.json");
        let data: Value = serde_json::from_slice(&data).unwrap();
        let (link, network) = (&data["links"][0], &data["networks"][0]);
        assert_eq!(link["ethernet_mac_address"], "fa:16:3e:00:00:01");
        assert_eq!(link["mtu"], 1450);
        assert_eq!(network["link"], link["id"]);
        assert_eq!(network["ip_address"], "10.0.0.5");
        assert_eq!(network["netmask"], "255.255.255.0");
        assert_eq!(
            network["routes"],
            json!([
                {"network":"0.0.0.0","netmask":"0.0.0.0","gateway":"10.0.0.1"},
                {"network":"192.168.128.0","netmask":"255.255.128.0","gateway":"10.0.0.9"},
            ])
        );
        let network = &data["networks"][1];
        assert_eq!((&network["type"], &network["ip_address"]), (&json!("ipv6"), &json!("fd00::5")));
        assert_eq!(network["netmask"], "ffff:ffff:ffff:ffff::");
        assert_eq!(
            network["routes"],
            json!([
                {"network":"::","netmask":"::","gateway":"fd00::1"},
                {"network":"2001:db8::","netmask":"ffff:ffff:8000::","gateway":"fd00::9"},
            ])
        );
        // Each once, as the guest's resolver wants them.
        let servers = ["10.0.0.2", "fd00::2"].map(|server| json!({"type": "dns", "address": server}));
        assert_eq!(data["services"], json!(servers));
    }

    #[test]
    fn a_netmask_covers_every_length() {
        let mask = |address: &str, prefix_length| {
            netmask(&PortAddress {
                address: address.parse().unwrap(),
                prefix_length,
                gateway: None,
                dns: vec![],
                routes: vec![],
                dhcp: false,
            })
            .to_string()
        };
        assert_eq!(mask("10.0.0.1", 0), "0.0.0.0");
        assert_eq!(mask("10.0.0.1", 20), "255.255.240.0");
        assert_eq!(mask("10.0.0.1", 32), "255.255.255.255");
        assert_eq!(mask("fd00::1", 64), "ffff:ffff:ffff:ffff::");
        assert_eq!(mask("fd00::1", 0), "::");
    }
}
