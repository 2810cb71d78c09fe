//! DHCPv6 (RFC 8415), stateful: a guest's addresses and name servers. Prefixes and gateways are a router's to tell.

use super::frame::{self, Asked, Path};
use super::{Answer, LEASE_SECONDS, SERVER};
use dhcproto::v6::{
    DhcpOption, DhcpOptions, IAAddr, IANA, Message, MessageType, OptionCode, Status, StatusCode,
};
use dhcproto::{Decodable, Decoder, Encodable};
use godwit_protocol::network::LocalPort;
use std::net::{IpAddr, Ipv6Addr};

/// The server's identifier: by its Ethernet address (section 11.4).
fn duid() -> Vec<u8> {
    [&[0, 3, 0, 1][..], &SERVER.0].concat()
}

/// The server's link-local address, which follows from its Ethernet address (RFC 4291, appendix A).
fn server() -> Ipv6Addr {
    let [a, b, c, d, e, f] = SERVER.0;
    Ipv6Addr::from([0xfe, 0x80, 0, 0, 0, 0, 0, 0, a ^ 2, b, c, 0xff, 0xfe, d, e, f])
}

/// What a port is told; none: nothing.
pub(super) fn answer(asked: &Asked, port: &LocalPort) -> Option<Answer> {
    let request = Message::decode(&mut Decoder::new(&asked.message)).ok()?;
    let IpAddr::V6(guest) = asked.source else { return None };
    let client = request.opts().get(OptionCode::ClientId);
    let named = match request.opts().get(OptionCode::ServerId) {
        Some(DhcpOption::ServerId(id)) => Some(*id == duid()),
        _ => None,
    };
    use MessageType as M;
    let kind = match (request.msg_type(), named) {
        (M::Solicit, None) if request.opts().get(OptionCode::RapidCommit).is_some() => M::Reply,
        (M::Solicit, None) => M::Advertise,
        (M::Request | M::Renew | M::Release | M::Decline, Some(true)) => M::Reply,
        (M::Rebind | M::Confirm, None) | (M::InformationRequest, None | Some(true)) => M::Reply,
        // For another server, or not as the RFC says (section 16).
        _ => return None,
    };
    if client.is_none() && request.msg_type() != M::InformationRequest {
        return None;
    }
    let mut reply = Message::new_with_id(kind, request.xid());
    let options = reply.opts_mut();
    client.into_iter().for_each(|id| options.insert(id.clone()));
    options.insert(DhcpOption::ServerId(duid()));
    let own: Vec<Ipv6Addr> = port.leases.iter().filter_map(|lease| v6(&lease.address)).collect();
    match request.msg_type() {
        M::InformationRequest => {}
        M::Confirm => options.insert(confirm(&request, &own)?),
        M::Release | M::Decline => {
            options.insert(status(Status::Success, "noted; the address stays the port's"))
        }
        kind => {
            if kind == M::Solicit && reply_is_rapid(&request) {
                options.insert(DhcpOption::RapidCommit);
            }
            let asked = request.opts().get_all(OptionCode::IANA).unwrap_or_default();
            for (index, ia) in asked.iter().enumerate() {
                if let DhcpOption::IANA(ia) = ia {
                    options.insert(associate(ia, if index == 0 { &own } else { &[] }));
                }
            }
        }
    }
    let mut servers: Vec<Ipv6Addr> = Vec::new();
    for server in port.leases.iter().flat_map(|lease| &lease.dns).filter_map(v6) {
        if !servers.contains(&server) {
            servers.push(server);
        }
    }
    if !servers.is_empty() {
        options.insert(DhcpOption::DomainNameServers(servers));
    }
    let bytes = reply.to_vec().ok()?;
    let path = Path { from: SERVER, to: asked.mac, source: server(), destination: guest };
    let kind = if kind == M::Advertise { "advertise" } else { "reply" };
    Some(Answer { kind, frame: frame::v6(path, &bytes) })
}

fn reply_is_rapid(request: &Message) -> bool {
    request.opts().get(OptionCode::RapidCommit).is_some()
}

fn v6(address: &IpAddr) -> Option<Ipv6Addr> {
    match address {
        IpAddr::V6(address) => Some(*address),
        IpAddr::V4(_) => None,
    }
}

/// The addresses of an association; those that a guest names and that are not its own end at once.
fn associate(asked: &IANA, own: &[Ipv6Addr]) -> DhcpOption {
    let mut inner = DhcpOptions::new();
    for address in own {
        inner.insert(lasting(*address, LEASE_SECONDS));
    }
    let named = asked.opts.get_all(OptionCode::IAAddr).unwrap_or_default();
    for option in named {
        if let DhcpOption::IAAddr(named) = option
            && !own.contains(&named.addr)
            && !own.is_empty()
        {
            inner.insert(lasting(named.addr, 0));
        }
    }
    if own.is_empty() {
        inner.insert(status(Status::NoAddrsAvail, "the port has no other address"));
    }
    let (t1, t2) = (LEASE_SECONDS / 2, LEASE_SECONDS / 5 * 4);
    DhcpOption::IANA(IANA { id: asked.id, t1, t2, opts: inner })
}

fn lasting(addr: Ipv6Addr, seconds: u32) -> DhcpOption {
    DhcpOption::IAAddr(IAAddr {
        addr,
        preferred_life: seconds,
        valid_life: seconds,
        opts: DhcpOptions::new(),
    })
}

/// Whether a guest that comes back is still where its addresses are good (section 18.3.3).
fn confirm(request: &Message, own: &[Ipv6Addr]) -> Option<DhcpOption> {
    let associations = request.opts().get_all(OptionCode::IANA).unwrap_or_default();
    let mut named = associations.iter().flat_map(|option| match option {
        DhcpOption::IANA(ia) => ia.opts.get_all(OptionCode::IAAddr).unwrap_or_default(),
        _ => &[],
    });
    let is_own = |option: &DhcpOption| matches!(option, DhcpOption::IAAddr(a) if own.contains(&a.addr));
    let first = named.next()?;
    Some(if is_own(first) && named.all(is_own) {
        status(Status::Success, "the addresses are the port's")
    } else {
        status(Status::NotOnLink, "an address is not the port's")
    })
}

fn status(status: Status, msg: &str) -> DhcpOption {
    DhcpOption::StatusCode(StatusCode { status, msg: msg.to_owned() })
}
