//! Which addresses of the fleet are free: IP and Ethernet addresses for ports, room for the overlay's headers.

pub mod range;

use crate::error::Error;
use crate::fleet::Fleet;
use crate::fleet::network::{FixedIp, Port, Subnet};
use godwit_protocol::host::Underlay;
use godwit_protocol::id::{NetworkId, SubnetId};
use godwit_protocol::port::Mac;
use std::collections::HashSet;
use std::net::IpAddr;

/// Bytes that VXLAN adds inside an IPv4 underlay's MTU: IPv4 20, UDP 8, VXLAN 8, the inner Ethernet header 14.
const OVERHEAD_V4: u32 = 50;

/// The same with an IPv6 header of 40.
const OVERHEAD_V6: u32 = 70;

/// Addresses of one port at most.
const PER_PORT: usize = 16;

/// An address that is wanted: of this subnet, or this one, or both; of neither: any.
#[derive(Clone, Copy, Debug, Default)]
pub struct AddressWish {
    /// From which subnet.
    pub subnet: Option<SubnetId>,
    /// Which.
    pub address: Option<IpAddr>,
}

/// Subnets of a network, oldest first.
pub fn subnets(fleet: &Fleet, network: NetworkId) -> Vec<&Subnet> {
    let mut subnets: Vec<&Subnet> = fleet.subnets.values().filter(|s| s.network == network).collect();
    subnets.sort_by_key(|s| (s.created_at, s.id));
    subnets
}

/// Addresses of a network that nobody else may have: those of its ports and its gateways.
pub fn taken(fleet: &Fleet, network: NetworkId) -> HashSet<IpAddr> {
    let ports = fleet.ports.values().filter(|p| p.network == network);
    let gateways = fleet.subnets.values().filter(|s| s.network == network).filter_map(|s| s.gateway);
    ports.flat_map(|p| p.fixed_ips.iter().map(|ip| ip.address)).chain(gateways).collect()
}

/// The addresses of a port: those wished for, or one of each family that the network has. `taken` are those that
/// others have.
///
/// # Errors
/// An address that is taken or in no subnet of the network; no address is free.
pub fn choose(
    fleet: &Fleet,
    network: NetworkId,
    wishes: Option<&[AddressWish]>,
    mut taken: HashSet<IpAddr>,
) -> Result<Vec<FixedIp>, Error> {
    let all = subnets(fleet, network);
    let Some(wishes) = wishes else {
        let families = [true, false].map(|v4| -> Vec<&Subnet> {
            all.iter().copied().filter(|s| s.cidr.addr().is_ipv4() == v4).collect()
        });
        let families = families.iter().filter(|family| !family.is_empty());
        return families.map(|family| next_free(family, &taken, network)).collect();
    };
    if wishes.len() > PER_PORT {
        return Err(Error::Invalid(format!(
            "{} addresses are too many; a port has {PER_PORT} at most.",
            wishes.len()
        )));
    }
    let mut chosen = Vec::with_capacity(wishes.len());
    for wish in wishes {
        let candidates =
            match wish.subnet {
                Some(id) => vec![all.iter().copied().find(|s| s.id == id).ok_or_else(|| {
                    Error::Invalid(format!("Subnet {id} is not one of network {network}."))
                })?],
                None => all.clone(),
            };
        let ip = match wish.address {
            Some(address) => this(&candidates, address, &taken, network)?,
            None => next_free(&candidates, &taken, network)?,
        };
        taken.insert(ip.address);
        chosen.push(ip);
    }
    Ok(chosen)
}

fn this(
    subnets: &[&Subnet],
    address: IpAddr,
    taken: &HashSet<IpAddr>,
    network: NetworkId,
) -> Result<FixedIp, Error> {
    let subnet = subnets.iter().find(|s| range::is_usable(&s.cidr, address)).ok_or_else(|| {
        Error::Invalid(format!("{address} is no usable address of the wanted subnets of network {network}."))
    })?;
    if taken.contains(&address) {
        return Err(Error::Conflict(format!("The address {address} of network {network} is in use.")));
    }
    Ok(FixedIp { subnet: subnet.id, address })
}

fn next_free(subnets: &[&Subnet], taken: &HashSet<IpAddr>, network: NetworkId) -> Result<FixedIp, Error> {
    let free = |s: &&Subnet| {
        let address = range::free_address(&s.pools, |a| taken.contains(&a))?;
        Some(FixedIp { subnet: s.id, address })
    };
    subnets.iter().find_map(free).ok_or_else(|| match subnets {
        [] => Error::Invalid(format!("Network {network} has no subnet to take an address from.")),
        _ => Error::Exhausted(format!(
            "No more addresses are free on network {network}; delete ports, or add a subnet."
        )),
    })
}

/// The addresses of a new NIC: the one that is wanted, or one of each family. `made` are ports that are not in the
/// fleet yet.
///
/// # Errors
/// As [`choose`].
pub fn allocate(
    fleet: &Fleet,
    network: NetworkId,
    wanted: Option<IpAddr>,
    made: &[Port],
) -> Result<Vec<FixedIp>, Error> {
    let mut taken = taken(fleet, network);
    let new = made.iter().filter(|p| p.network == network);
    taken.extend(new.flat_map(|p| p.fixed_ips.iter().map(|ip| ip.address)));
    let wish = wanted.map(|address| [AddressWish { subnet: None, address: Some(address) }]);
    choose(fleet, network, wish.as_ref().map(|wish| wish.as_slice()), taken)
}

/// An Ethernet address that no port of the fleet or of `made` has.
pub fn free_mac(fleet: &Fleet, made: &[Port]) -> Mac {
    let taken: HashSet<Mac> = fleet.ports.values().chain(made).map(|p| p.mac).collect();
    // All 2^24 being taken would need more ports than a fleet can hold; a double is then refused by its network.
    range::free_mac(luck(), |mac| taken.contains(&mac)).unwrap_or(Mac([0xfa, 0x16, 0x3e, 0, 0, 0]))
}

/// A random number. Where the system has none to give, any will do: it only spreads choices.
pub fn luck() -> u32 {
    getrandom::u32().unwrap_or_default()
}

/// The largest MTU of an overlay network over an underlay, in bytes.
pub fn overlay_mtu(underlay: &Underlay) -> u32 {
    underlay.mtu.saturating_sub(if underlay.address.is_ipv4() { OVERHEAD_V4 } else { OVERHEAD_V6 })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::Time;
    use godwit_protocol::id::{PortId, ProjectId};

    fn subnet(fleet: &mut Fleet, network: NetworkId, cidr: &str, age: i64) -> SubnetId {
        let cidr: ipnet::IpNet = cidr.parse().unwrap();
        let gateway = Some(range::usable(&cidr).0);
        let at = Time::UNIX_EPOCH + time::Duration::seconds(age);
        let subnet = Subnet {
            id: SubnetId::random(),
            network,
            name: String::new(),
            description: String::new(),
            project: ProjectId::random(),
            cidr,
            gateway,
            pools: range::default_pools(&cidr, gateway),
            dns: vec![],
            routes: vec![],
            dhcp: false,
            tags: vec![],
            revision: 1,
            created_at: at,
            updated_at: at,
        };
        let id = subnet.id;
        fleet.apply(subnet.into());
        id
    }

    fn port(network: NetworkId, fixed_ips: Vec<FixedIp>) -> Port {
        Port {
            id: PortId::random(),
            network,
            name: String::new(),
            description: String::new(),
            project: ProjectId::random(),
            mac: Mac([0xfa, 0x16, 0x3e, 1, 2, 3]),
            fixed_ips,
            instance: None,
            device_id: String::new(),
            device_owner: String::new(),
            index: 0,
            owned_by_instance: false,
            host: None,
            target_host: None,
            admin_state_up: true,
            port_security: true,
            allowed_pairs: Vec::new(),
            security_groups: None,
            tags: vec![],
            revision: 1,
            created_at: Time::UNIX_EPOCH,
            updated_at: Time::UNIX_EPOCH,
        }
    }

    fn texts(ips: &[FixedIp]) -> Vec<String> {
        ips.iter().map(|ip| ip.address.to_string()).collect()
    }

    #[test]
    fn a_nic_gets_one_address_of_each_family_and_never_one_that_is_taken() {
        let (mut fleet, network) = (Fleet::default(), NetworkId::random());
        subnet(&mut fleet, network, "10.0.0.0/29", 0);
        subnet(&mut fleet, network, "fd00::/64", 1);
        let first = allocate(&fleet, network, None, &[]).unwrap();
        assert_eq!(texts(&first), ["10.0.0.2", "fd00::2"]);
        let made = [port(network, first)];
        assert_eq!(texts(&allocate(&fleet, network, None, &made).unwrap()), ["10.0.0.3", "fd00::3"]);
        fleet.apply(made[0].clone().into());
        assert_eq!(texts(&allocate(&fleet, network, None, &[]).unwrap()), ["10.0.0.3", "fd00::3"]);
    }

    #[test]
    fn a_wanted_address_is_given_or_refused_with_the_reason() {
        let (mut fleet, network) = (Fleet::default(), NetworkId::random());
        let id = subnet(&mut fleet, network, "10.0.0.0/29", 0);
        let want = |address: &str| allocate(&fleet, network, Some(address.parse().unwrap()), &[]);
        assert_eq!(want("10.0.0.5").unwrap(), [FixedIp { subnet: id, address: "10.0.0.5".parse().unwrap() }]);
        assert!(matches!(want("10.0.0.1"), Err(Error::Conflict(_))), "the gateway's");
        for outside in ["10.0.0.0", "10.0.0.7", "10.0.0.8", "fd00::2"] {
            assert!(matches!(want(outside), Err(Error::Invalid(_))), "{outside}");
        }
    }

    #[test]
    fn a_full_family_is_refused_and_a_network_without_subnets_gives_no_address() {
        let (mut fleet, network) = (Fleet::default(), NetworkId::random());
        assert!(allocate(&fleet, network, None, &[]).unwrap().is_empty());
        subnet(&mut fleet, network, "10.0.0.0/30", 0);
        let first = allocate(&fleet, network, None, &[]).unwrap();
        assert_eq!(texts(&first), ["10.0.0.2"]);
        fleet.apply(port(network, first).into());
        assert!(matches!(allocate(&fleet, network, None, &[]), Err(Error::Exhausted(_))));
        subnet(&mut fleet, network, "10.0.1.0/30", 1);
        assert_eq!(texts(&allocate(&fleet, network, None, &[]).unwrap()), ["10.0.1.2"]);
    }

    #[test]
    fn a_wish_may_name_the_subnet_and_two_wishes_never_get_the_same_address() {
        let (mut fleet, network) = (Fleet::default(), NetworkId::random());
        subnet(&mut fleet, network, "10.0.0.0/24", 0);
        let second = subnet(&mut fleet, network, "10.0.1.0/24", 1);
        let wish = AddressWish { subnet: Some(second), address: None };
        let chosen = choose(&fleet, network, Some(&[wish, wish]), HashSet::new()).unwrap();
        assert_eq!(texts(&chosen), ["10.0.1.2", "10.0.1.3"]);
        let foreign = AddressWish { subnet: Some(SubnetId::random()), address: None };
        assert!(matches!(choose(&fleet, network, Some(&[foreign]), HashSet::new()), Err(Error::Invalid(_))));
    }

    #[test]
    fn an_overlay_leaves_room_for_its_headers() {
        let underlay =
            |address: &str| Underlay { link: "eth0".into(), address: address.parse().unwrap(), mtu: 1500 };
        assert_eq!(overlay_mtu(&underlay("198.18.0.11")), 1450);
        assert_eq!(overlay_mtu(&underlay("fd00::11")), 1430);
    }
}
