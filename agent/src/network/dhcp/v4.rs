//! DHCP for IPv4 (RFC 2131, RFC 2132, RFC 3442).

use super::frame::{self, Asked, Path};
use super::{Answer, LEASE_SECONDS, SERVER};
use dhcproto::v4::{DhcpOption, HType, Message, MessageType, Opcode, OptionCode};
use dhcproto::{Decodable, Decoder, Encodable};
use godwit_protocol::network::LocalPort;
use godwit_protocol::port::{Lease, Mac};
use ipnet::{IpNet, Ipv4Net};
use std::net::{IpAddr, Ipv4Addr};

/// Who answers in a subnet without a gateway: an address that no subnet here can have.
const NOWHERE: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);

const BROADCAST: Mac = Mac([0xff; 6]);

/// What a port is told; none: nothing.
pub(super) fn answer(asked: &Asked, port: &LocalPort, mtu: u32) -> Option<Answer> {
    // Of an Ethernet address. The decoder takes any length, and panics when asked for more than the field holds.
    if asked.message.get(2) != Some(&6) {
        return None;
    }
    let request = Message::decode(&mut Decoder::new(&asked.message)).ok()?;
    if request.opcode() != Opcode::BootRequest || request.chaddr() != port.mac.0 {
        return None;
    }
    let leases: Vec<&Lease> = port.leases.iter().filter(|lease| lease.address.is_ipv4()).collect();
    let first = leases.first()?;
    let kind = match request.opts().get(OptionCode::MessageType)? {
        DhcpOption::MessageType(kind) => *kind,
        _ => return None,
    };
    let wanted = match request.opts().get(OptionCode::RequestedIpAddress) {
        Some(DhcpOption::RequestedIpAddress(address)) => Some(*address),
        _ => None,
    };
    let current = Some(request.ciaddr()).filter(|address| !address.is_unspecified());
    let lease_of =
        |address: Ipv4Addr| leases.iter().find(|lease| lease.address == IpAddr::V4(address)).copied();
    match kind {
        MessageType::Discover => {
            let lease = wanted.and_then(lease_of).unwrap_or(first);
            give(&request, MessageType::Offer, lease, mtu)
        }
        MessageType::Request => {
            if let Some(DhcpOption::ServerIdentifier(server)) =
                request.opts().get(OptionCode::ServerIdentifier)
                && !leases.iter().any(|lease| server_of(lease) == *server)
            {
                // The guest has chosen somebody else.
                return None;
            }
            match wanted.or(current).and_then(lease_of) {
                Some(lease) => give(&request, MessageType::Ack, lease, mtu),
                None => refuse(&request, first),
            }
        }
        MessageType::Inform => {
            let lease = current.and_then(lease_of)?;
            give(&request, MessageType::Ack, lease, mtu)
        }
        _ => None,
    }
}

fn server_of(lease: &Lease) -> Ipv4Addr {
    match lease.gateway {
        Some(IpAddr::V4(gateway)) => gateway,
        _ => NOWHERE,
    }
}

fn reply(request: &Message, kind: MessageType, server: Ipv4Addr) -> Message {
    let mut reply = Message::default();
    reply
        .set_opcode(Opcode::BootReply)
        .set_htype(HType::Eth)
        .set_xid(request.xid())
        .set_flags(request.flags())
        .set_giaddr(request.giaddr())
        .set_chaddr(request.chaddr());
    reply.opts_mut().insert(DhcpOption::MessageType(kind));
    reply.opts_mut().insert(DhcpOption::ServerIdentifier(server));
    if let Some(id) = request.opts().get(OptionCode::ClientIdentifier) {
        // RFC 6842.
        reply.opts_mut().insert(id.clone());
    }
    reply
}

fn give(request: &Message, kind: MessageType, lease: &Lease, mtu: u32) -> Option<Answer> {
    let IpAddr::V4(address) = lease.address else { return None };
    let range = Ipv4Net::new(address, lease.prefix_length).ok()?;
    let server = server_of(lease);
    let mut message = reply(request, kind, server);
    let informs = matches!(
        request.opts().get(OptionCode::MessageType),
        Some(DhcpOption::MessageType(MessageType::Inform))
    );
    let options = message.opts_mut();
    if !informs {
        options.insert(DhcpOption::AddressLeaseTime(LEASE_SECONDS));
    }
    options.insert(DhcpOption::SubnetMask(range.netmask()));
    options.insert(DhcpOption::BroadcastAddr(range.broadcast()));
    options.insert(DhcpOption::InterfaceMtu(u16::try_from(mtu).unwrap_or(u16::MAX)));
    let gateway = match lease.gateway {
        Some(IpAddr::V4(gateway)) => Some(gateway),
        _ => None,
    };
    options.extend_with(gateway.map(|gateway| DhcpOption::Router(vec![gateway])));
    let routes = routes(lease, gateway);
    options.extend_with((!routes.is_empty()).then_some(DhcpOption::ClasslessStaticRoute(routes)));
    let servers: Vec<Ipv4Addr> = lease.dns.iter().filter_map(v4).collect();
    options.extend_with((!servers.is_empty()).then_some(DhcpOption::DomainNameServer(servers)));
    if informs {
        message.set_ciaddr(address);
    } else {
        message.set_yiaddr(address);
    }
    // Before it has an address a guest may only hear broadcast; it says so.
    let (to, destination) = if request.flags().broadcast() {
        (BROADCAST, Ipv4Addr::BROADCAST)
    } else {
        (Mac(request.chaddr().try_into().ok()?), address)
    };
    finish(&message, if kind == MessageType::Offer { "offer" } else { "ack" }, server, to, destination)
}

/// A guest that has the address of another network, or one that is not its own.
fn refuse(request: &Message, lease: &Lease) -> Option<Answer> {
    let server = server_of(lease);
    finish(&reply(request, MessageType::Nak, server), "nak", server, BROADCAST, Ipv4Addr::BROADCAST)
}

fn finish(
    message: &Message,
    kind: &'static str,
    source: Ipv4Addr,
    to: Mac,
    destination: Ipv4Addr,
) -> Option<Answer> {
    let mut bytes = message.to_vec().ok()?;
    // What clients of BOOTP's time take for whole (RFC 951).
    bytes.resize(bytes.len().max(300), 0);
    Some(Answer { kind, frame: frame::v4(Path { from: SERVER, to, source, destination }, &bytes) })
}

/// Routes beside the gateway. A client that takes these ignores the gateway, so that is among them (RFC 3442).
fn routes(lease: &Lease, gateway: Option<Ipv4Addr>) -> Vec<(Ipv4Net, Ipv4Addr)> {
    let given = lease.routes.iter().filter_map(|(to, via)| match (to, via) {
        (IpNet::V4(to), IpAddr::V4(via)) => Some((*to, *via)),
        _ => None,
    });
    let mut routes: Vec<(Ipv4Net, Ipv4Addr)> = given.collect();
    if let Some(gateway) = gateway.filter(|_| !routes.is_empty()) {
        routes.push((Ipv4Net::default(), gateway));
    }
    routes
}

fn v4(address: &IpAddr) -> Option<Ipv4Addr> {
    match address {
        IpAddr::V4(address) => Some(*address),
        IpAddr::V6(_) => None,
    }
}

/// Options that may be missing.
trait ExtendWith {
    fn extend_with(&mut self, option: Option<DhcpOption>);
}

impl ExtendWith for dhcproto::v4::DhcpOptions {
    fn extend_with(&mut self, option: Option<DhcpOption>) {
        if let Some(option) = option {
            self.insert(option);
        }
    }
}
