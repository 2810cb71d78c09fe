//! Hosts with the agent's own code: links by netlink, programs and their maps, filled as the agent fills them.

use crate::namespaces::{add, run, try_run, within};
use godwit_agent::network::HostNetwork;
use godwit_agent::network::filtered::Filtered;
use godwit_agent::network::netlink::{Netlink, UnderlayChoice};
use godwit_agent::network::overlay::Overlay;
use godwit_agent::telemetry::Capacity;
use godwit_agent::telemetry::filter::{PortFilter, Room};
use godwit_agent::telemetry::plane::DataPlane;
use godwit_agent::telemetry::vxlan::{Options, VxlanTelemetry};
use godwit_protocol::id::{NetworkId, PortId};
use godwit_protocol::network::{Carrier, Forwarding, LocalPort, NetworkWanted, Unknown};
use godwit_protocol::port::{Mac, tap_name};
use godwit_protocol::security::Rule;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;
use std::sync::Arc;
use uuid::Uuid;

pub(crate) const VNI: u32 = 1001;
pub(crate) const VXLAN_PORT: u16 = 4789;

/// MTU of the networks; the underlay's has room for VXLAN's headers.
pub(crate) const MTU: u32 = 1500;

/// An address that the coordinator has told of: a port on a host.
#[derive(Clone, Copy)]
pub(crate) struct Station {
    /// From 1 on.
    pub(crate) number: u32,
    pub(crate) host: u8,
}

impl Station {
    pub(crate) fn mac(self) -> [u8; 6] {
        let [_, a, b, c] = self.number.to_be_bytes();
        [0xfa, 0x16, 0x3e, a, b, c]
    }

    pub(crate) fn v4(self) -> Ipv4Addr {
        Ipv4Addr::from_bits(0x0a00_0000 | self.number)
    }

    pub(crate) fn v6(self) -> Ipv6Addr {
        Ipv6Addr::from_bits(0xfd00 << 112 | u128::from(self.number))
    }

    /// The first digits name the tap.
    pub(crate) fn id(self) -> PortId {
        PortId(Uuid::from_u128(u128::from(self.number) << 84))
    }

    pub(crate) fn tap(self) -> String {
        tap_name(self.id())
    }

    fn addresses(self) -> Vec<IpAddr> {
        vec![self.v4().into(), self.v6().into()]
    }
}

/// What ports may do.
#[derive(Clone, Default)]
pub(crate) struct Policy {
    pub(crate) port_security: bool,
    pub(crate) rules: Option<Vec<Rule>>,
}

pub(crate) fn vtep(host: u8) -> IpAddr {
    [198, 18, 0, 10 + host].into()
}

/// What a host is told of a network with these stations.
pub(crate) fn wanted(vni: u32, host: u8, stations: &[Station], policy: &Policy) -> NetworkWanted {
    let local = |station: &Station| LocalPort {
        rules: policy.rules.clone(),
        leases: vec![],
        port: station.id(),
        mac: Mac(station.mac()),
        addresses: station.addresses(),
        port_security: policy.port_security,
        allowed_pairs: vec![],
    };
    let remote = |station: &Station| Forwarding {
        mac: Mac(station.mac()),
        addresses: station.addresses(),
        vtep: vtep(station.host),
    };
    let (here, there): (Vec<&Station>, Vec<&Station>) =
        stations.iter().partition(|station| station.host == host);
    let mut flood: Vec<IpAddr> = there.iter().map(|station| vtep(station.host)).collect();
    flood.sort();
    flood.dedup();
    NetworkWanted {
        groups: vec![],
        network: NetworkId(Uuid::from_u128(vni.into())),
        vni,
        carrier: Carrier::Vxlan,
        mtu: MTU,
        udp_port: VXLAN_PORT,
        generation: 1,
        ports: here.into_iter().map(local).collect(),
        forwarding: there.into_iter().map(remote).collect(),
        flood,
        floating: vec![],
        routers: vec![],
        unknown_unicast: Unknown::Drop,
        unknown_neighbours: Unknown::Flood,
    }
}

/// What a host's agent has loaded.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Programs {
    /// Nothing: the kernel's own means stand in.
    None,
    /// What counts and answers.
    Telemetry,
    /// That, and security groups.
    All,
}

/// A host, in the namespace `h` and its number.
pub(crate) struct Host {
    pub(crate) name: String,
    pub(crate) bpffs: PathBuf,
    pub(crate) network: Arc<Filtered<Overlay>>,
    pub(crate) plane: Option<Arc<DataPlane>>,
    pub(crate) underlay: Option<Arc<VxlanTelemetry>>,
}

/// The host's namespace, on the underlay by its link `eth0`; the switch's end is called as the host is.
pub(crate) fn plug(number: u8) -> String {
    let name = format!("h{number}");
    if !try_run("ip link show underlay").status.success() {
        run("ip link add underlay mtu 1600 type bridge mcast_snooping 0");
        run("ip link set underlay up");
    }
    add(&name);
    run(&format!("ip link add {name} mtu 1600 type veth peer name eth0 mtu 1600 netns {name}"));
    run(&format!("ip link set {name} master underlay up"));
    run(&format!("ip -n {name} link set eth0 address 02:00:00:00:00:{number:02x} up"));
    run(&format!("ip -n {name} address add {}/24 dev eth0", vtep(number)));
    name
}

/// Lets hosts know each other's Ethernet addresses, so that nothing is asked on the underlay.
pub(crate) fn acquaint(hosts: u8) {
    for (one, other) in (1..=hosts).flat_map(|one| (1..=hosts).map(move |other| (one, other))) {
        if one != other {
            let address = vtep(other);
            run(&format!(
                "ip -n h{one} neighbour replace {address} lladdr 02:00:00:00:00:{other:02x} dev eth0"
            ));
        }
    }
}

impl Host {
    pub(crate) fn start(number: u8, programs: Programs, capacity: Capacity) -> Self {
        let name = plug(number);
        let bpffs = PathBuf::from(format!("/run/bpf{number}"));
        std::fs::create_dir(&bpffs).expect("is made");
        run(&format!("mount -t bpf bpf {}", bpffs.display()));
        let choice = UnderlayChoice {
            link: Some("eth0".into()),
            address: Some(vtep(number)),
            ..UnderlayChoice::default()
        };
        let has_any = programs != Programs::None;
        let (links, underlay, plane, filter) = within(&name, || {
            let links = Netlink::open(&choice).expect("the host has links");
            let options = Options { known_only: true, capacity, ..Options::default() };
            let underlay = has_any
                .then(|| Arc::new(VxlanTelemetry::ensure("eth0", &bpffs, options).expect("is attached")));
            let plane =
                has_any.then(|| Arc::new(DataPlane::open(&bpffs, capacity).expect("the programs load")));
            let filter = (programs == Programs::All)
                .then(|| Arc::new(PortFilter::open(&bpffs, Room::default()).expect("the filter loads")));
            (links, underlay, plane, filter)
        });
        let links = if has_any { links } else { links.standing_in() };
        let network = Arc::new(Filtered::new(Overlay::new(links, plane.clone()), filter));
        Self { name, bpffs, network, plane, underlay }
    }

    /// Brings a network to the wanted state.
    pub(crate) fn ensure(&self, wanted: &NetworkWanted) {
        within(&self.name, || self.network.ensure(wanted)).expect("the network is as wanted");
    }

    /// A guest: a namespace whose link `eth0` has the station's tap for its other end.
    pub(crate) fn add_guest(&self, guest: &str, station: Station) {
        add(guest);
        self.add_tap(guest, "eth0", station);
    }

    /// A tap whose other end is this link in a namespace.
    pub(crate) fn add_tap(&self, guest: &str, link: &str, station: Station) {
        let (host, tap, mac) = (&self.name, station.tap(), Mac(station.mac()));
        run(&format!(
            "ip -n {host} link add {tap} mtu {MTU} type veth peer name {link} mtu {MTU} address {mac} netns {guest}"
        ));
        run(&format!("ip -n {host} link set {tap} up"));
        run(&format!("ip -n {guest} link set {link} up"));
    }
}
