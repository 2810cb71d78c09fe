//! L2 population: what each host must know of each network, and the task that tells it. `wanted` is pure and
//! whole; the host compares it with its kernel and changes only what differs.

use crate::app::{App, Shared};
use crate::config::Config;
use crate::fleet::network::{FixedIp, Network, Port, Segment};
use crate::fleet::{Change, Fleet};
use crate::verbs::security_rule;
use godwit_protocol::error::RequestError;
use godwit_protocol::id::{HostId, NetworkId, SecurityGroupId};
use godwit_protocol::network::{Carrier, Forwarding, GroupMembers, LocalPort, NetworkWanted, Unknown};
use godwit_protocol::port::PortAddress;
use godwit_protocol::request::AgentRequest;
use godwit_protocol::security::{Remote, Rule};
use ipnet::IpNet;
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::net::IpAddr;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::Notify;

/// Networks whose hosts are to be told.
#[derive(Default)]
pub struct Queue {
    dirty: Mutex<HashSet<NetworkId>>,
    wake: Notify,
}

impl Queue {
    /// That hosts must be told about a network, soon.
    pub fn push(&self, network: NetworkId) {
        self.dirty.lock().unwrap_or_else(PoisonError::into_inner).insert(network);
        self.wake.notify_one();
    }

    fn take(&self) -> HashSet<NetworkId> {
        std::mem::take(&mut *self.dirty.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Networks that a host needs.
pub fn networks_of(fleet: &Fleet, host: HostId) -> BTreeSet<NetworkId> {
    let here = |p: &&Port| p.host == Some(host) || p.target_host == Some(host);
    fleet.ports.values().filter(here).map(|p| p.network).collect()
}

/// Hosts that need a network: those where a port is, and those where one will be.
pub fn hosts_of(fleet: &Fleet, network: NetworkId) -> BTreeSet<HostId> {
    let ports = fleet.ports.values().filter(|p| p.network == network);
    ports.flat_map(|p| p.host.into_iter().chain(p.target_host)).collect()
}

/// All that `host` must know of `network`, or none when it has no port there.
pub fn wanted(fleet: &Fleet, network: &Network, host: HostId, config: &Config) -> Option<NetworkWanted> {
    if !hosts_of(fleet, network.id).contains(&host) {
        return None;
    }
    let vtep = |id: &HostId| fleet.hosts.get(id)?.inventory.as_ref().map(|i| i.underlay.address);
    let addresses = |p: &Port| p.fixed_ips.iter().map(|ip| ip.address).collect::<Vec<IpAddr>>();
    let (mut ports, mut forwarding, mut flood) = (Vec::new(), Vec::new(), BTreeSet::new());
    let (mut macs, mut floating) = (BTreeSet::new(), BTreeSet::new());
    for port in fleet.ports.values().filter(|p| p.network == network.id) {
        if port.host == Some(host) || port.target_host == Some(host) {
            ports.push(LocalPort {
                port: port.id,
                mac: port.mac,
                addresses: addresses(port),
                port_security: port.port_security,
                allowed_pairs: port.allowed_pairs.clone(),
                rules: rules(fleet, port),
                leases: leases(fleet, port),
            });
        }
        macs.insert(port.mac);
        floating.extend(port.allowed_pairs.iter().map(|(mac, _)| *mac));
        for other in port.host.iter().chain(&port.target_host).filter(|h| **h != host) {
            flood.extend(vtep(other));
        }
        if let Some(vtep) = port.host.filter(|h| *h != host).as_ref().and_then(vtep) {
            forwarding.push(Forwarding { mac: port.mac, addresses: addresses(port), vtep });
        }
    }
    let carrier = carrier(network, config);
    if let Carrier::VxlanGroup { group, .. } = carrier {
        flood = [group].into();
    }
    if !carrier.is_vxlan() {
        // The link's other stations are nobody's that we know.
        (forwarding, flood, floating) = Default::default();
    }
    let otherwise = |policy| if carrier.is_vxlan() { policy } else { Unknown::Flood };
    let subnets = fleet.subnets.values().filter(|s| s.network == network.id);
    Some(NetworkWanted {
        network: network.id,
        vni: network.vni,
        groups: groups(fleet, network.id, &ports),
        mtu: network.mtu,
        udp_port: config.vxlan_port,
        generation: network.generation,
        ports,
        forwarding,
        flood: flood.into_iter().collect(),
        floating: floating.difference(&macs).copied().collect(),
        routers: subnets.filter_map(|s| s.gateway).filter(IpAddr::is_ipv6).collect(),
        unknown_unicast: otherwise(config.unknown_unicast),
        unknown_neighbours: otherwise(config.unknown_neighbours),
        carrier,
    })
}

/// What carries a network from host to host.
pub fn carrier(network: &Network, config: &Config) -> Carrier {
    match &network.segment {
        Segment::Vxlan => match config.multicast_group(network.vni) {
            Some(group) => Carrier::VxlanGroup { group, ttl: config.multicast_ttl },
            None => Carrier::Vxlan,
        },
        Segment::Flat { physical } => Carrier::Flat(physical.clone()),
        Segment::Vlan { physical, tag } => Carrier::Vlan(physical.clone(), *tag),
    }
}

/// What may pass at a port; none: everything.
fn rules(fleet: &Fleet, port: &Port) -> Option<Vec<Rule>> {
    let groups = port.security_groups.as_ref().filter(|_| port.port_security)?;
    let of_group = |id: &SecurityGroupId| {
        let stateful = fleet.security_groups.get(id).is_none_or(|g| g.stateful);
        let rules = fleet.security_rules.values().filter(|r| r.group == *id);
        rules.map(move |r| security_rule::applied(r, stateful)).collect::<Vec<_>>()
    };
    Some(groups.iter().flat_map(of_group).collect())
}

/// The members, in one network, of all groups that rules of these ports name.
fn groups(fleet: &Fleet, network: NetworkId, ports: &[LocalPort]) -> Vec<GroupMembers> {
    let rules = ports.iter().flat_map(|port| port.rules.iter().flatten());
    let named: BTreeSet<SecurityGroupId> = rules
        .filter_map(|rule| match rule.remote {
            Remote::Group(group) => Some(group),
            _ => None,
        })
        .collect();
    let members = |group: SecurityGroupId| {
        let of_it = |p: &&Port| {
            p.network == network
                && p.host.is_some()
                && p.security_groups.as_ref().is_some_and(|groups| groups.contains(&group))
        };
        let ranges = |p: &Port| {
            let own = p.fixed_ips.iter().map(|ip| IpNet::from(ip.address));
            own.chain(p.allowed_pairs.iter().map(|(_, range)| *range)).collect::<Vec<_>>()
        };
        let members: BTreeSet<IpNet> = fleet.ports.values().filter(of_it).flat_map(ranges).collect();
        GroupMembers { group, members: members.into_iter().collect() }
    };
    named.into_iter().map(members).collect()
}

/// What a port's guest is told when it asks by DHCP.
fn leases(fleet: &Fleet, port: &Port) -> Vec<PortAddress> {
    port.fixed_ips.iter().filter_map(|ip| address(fleet, ip)).filter(|address| address.dhcp).collect()
}

/// An address with what its subnet says, as guests and hosts get it.
pub fn address(fleet: &Fleet, ip: &FixedIp) -> Option<PortAddress> {
    let subnet = fleet.subnets.get(&ip.subnet)?;
    Some(PortAddress {
        address: ip.address,
        prefix_length: subnet.cidr.prefix_len(),
        gateway: subnet.gateway,
        dns: subnet.dns.clone(),
        routes: subnet.routes.clone(),
        dhcp: subnet.dhcp,
    })
}

/// The change that makes hosts take a network's new state over any older one. It belongs into every change of
/// a port's host or addresses.
pub fn touched(fleet: &Fleet, network: NetworkId) -> Option<Change> {
    let network = fleet.networks.get(&network)?;
    Some(Network { generation: network.generation + 1, ..network.clone() }.into())
}

/// Tells one host about one network and waits until it is so there.
///
/// # Errors
/// What the host says.
pub async fn ensure(app: &App, host: HostId, network: NetworkId) -> Result<(), RequestError> {
    let request = app.ledger.read(|fleet| {
        let record = fleet.networks.get(&network)?;
        Some(match wanted(fleet, record, host, &app.config) {
            Some(wanted) => AgentRequest::EnsureNetwork(wanted),
            None => AgentRequest::RemoveNetwork { network, vni: record.vni, generation: record.generation },
        })
    });
    match request {
        Some(request) => app.agents.call(host, request).await.map(drop),
        None => Ok(()),
    }
}

/// Tells every connected host that has, or had, the network. True when each of them took it.
async fn populate(app: &Shared, network: NetworkId) -> bool {
    let hosts = app.ledger.read(|fleet| {
        let vni = fleet.networks.get(&network).map(|n| n.vni);
        let mut hosts = hosts_of(fleet, network);
        hosts.extend(fleet.observed.iter().filter_map(|(host, seen)| {
            let networks = &seen.report.as_ref()?.networks;
            networks.iter().any(|n| Some(n.vni) == vni).then_some(*host)
        }));
        hosts
    });
    let calls = hosts.into_iter().filter(|h| app.agents.is_connected(*h)).map(|host| async move {
        let result = ensure(app, host, network).await;
        if let Err(error) = &result {
            tracing::warn!(%host, %network, %error, "a host did not take a network's forwarding");
        }
        result.is_ok()
    });
    futures_util::future::join_all(calls).await.into_iter().all(|ok| ok)
}

/// The task that tells hosts: at once when something changed, again after a second where a host refused.
pub async fn run(app: Shared) {
    loop {
        app.l2.wake.notified().await;
        let networks = app.l2.take();
        let told = networks.into_iter().map(|network| {
            let app = app.clone();
            async move { (network, populate(&app, network).await) }
        });
        let failed: Vec<NetworkId> = futures_util::future::join_all(told)
            .await
            .into_iter()
            .filter_map(|(network, ok)| (!ok).then_some(network))
            .collect();
        if !failed.is_empty() {
            let app = app.clone();
            tokio::spawn(async move {
                tokio::time::sleep(Duration::from_secs(1)).await;
                failed.into_iter().for_each(|network| app.l2.push(network));
            });
        }
    }
}

/// What a host has against what it should have, by network number; empty when they agree.
pub fn drift(fleet: &Fleet, host: HostId, config: &Config) -> BTreeSet<NetworkId> {
    let Some(report) = fleet.observed.get(&host).and_then(|o| o.report.as_ref()) else {
        return BTreeSet::new();
    };
    let reported: BTreeMap<u32, _> = report.networks.iter().map(|n| (n.vni, n)).collect();
    let differs =
        |network: &&Network| match (wanted(fleet, network, host, config), reported.get(&network.vni)) {
            (None, None) => false,
            (Some(wanted), Some(is)) => {
                let want: BTreeSet<_> = wanted.forwarding.iter().map(|f| (f.mac, f.vtep)).collect();
                let flood: BTreeSet<_> = wanted.flood.iter().copied().collect();
                // What it keeps of an older state may be wrong in what is not reported: rules, addresses, policies.
                is.generation.is_some_and(|told| told < wanted.generation)
                    || want != is.forwarding.iter().copied().collect()
                    || flood != is.flood.iter().copied().collect()
                    || wanted.carrier.group_ttl() != is.group_ttl
            }
            _ => true,
        };
    fleet.networks.values().filter(differs).map(|n| n.id).collect()
}
