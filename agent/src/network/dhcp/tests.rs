//! The responder: what it says to crafted questions, and to clients that others have written.

use super::frame::Asked;
use super::{Responder, SERVER, v4, v6};
use crate::network::sandbox::{add_guest, in_sandbox, run};
use crate::network::wanted::WantedNetworks;
use crate::telemetry::filter::{PortFilter, Requests, Room};
use dhcproto::v4::{DhcpOption, Flags, Message, MessageType, OptionCode};
use dhcproto::{Decodable, Decoder, Encodable, v6 as six};
use godwit_protocol::id::{NetworkId, PortId};
use godwit_protocol::network::{Carrier, LocalPort, NetworkWanted, Unknown};
use godwit_protocol::port::{Lease, Mac, tap_name};
use prometheus::Registry;
use std::fs;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use uuid::Uuid;

const MAC: Mac = Mac([0xfa, 0x16, 0x3e, 0, 0, 5]);

fn lease(address: &str, prefix_length: u8, gateway: Option<&str>, dns: &[&str]) -> Lease {
    Lease {
        address: address.parse().unwrap(),
        prefix_length,
        gateway: gateway.map(|gateway| gateway.parse().unwrap()),
        dns: dns.iter().map(|server| server.parse().unwrap()).collect(),
        routes: vec![],
        dhcp: true,
    }
}

fn port() -> LocalPort {
    let mut v4 = lease("10.0.0.5", 24, Some("10.0.0.1"), &["10.0.0.2", "10.0.0.3"]);
    v4.routes = vec![("10.9.0.0/16".parse().unwrap(), "10.0.0.7".parse().unwrap())];
    LocalPort {
        port: PortId(Uuid::from_u128(5 << 120)),
        mac: MAC,
        addresses: vec![],
        port_security: true,
        allowed_pairs: vec![],
        rules: None,
        leases: vec![v4, lease("fd00::5", 64, None, &["fd00::2"])],
    }
}

fn ask4(kind: MessageType, change: impl FnOnce(&mut Message)) -> Option<Message> {
    let mut message = Message::default();
    message.set_chaddr(&MAC.0);
    message.opts_mut().insert(DhcpOption::MessageType(kind));
    change(&mut message);
    let asked = Asked { mac: MAC, source: Ipv4Addr::UNSPECIFIED.into(), message: message.to_vec().unwrap() };
    let answer = v4::answer(&asked, &port(), 1450)?;
    let reply = Message::decode(&mut Decoder::new(&answer.frame[42..])).unwrap();
    assert_eq!(reply.xid(), message.xid());
    Some(reply)
}

fn kind(message: &Message) -> MessageType {
    match message.opts().get(OptionCode::MessageType) {
        Some(DhcpOption::MessageType(kind)) => *kind,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_guest_is_offered_its_own_address_with_all_that_its_subnet_says() {
    let offer = ask4(MessageType::Discover, |_| {}).unwrap();
    assert_eq!((kind(&offer), offer.yiaddr()), (MessageType::Offer, Ipv4Addr::new(10, 0, 0, 5)));
    let gateway = Ipv4Addr::new(10, 0, 0, 1);
    for option in [
        DhcpOption::SubnetMask(Ipv4Addr::new(255, 255, 255, 0)),
        DhcpOption::BroadcastAddr(Ipv4Addr::new(10, 0, 0, 255)),
        DhcpOption::Router(vec![gateway]),
        DhcpOption::DomainNameServer(vec![Ipv4Addr::new(10, 0, 0, 2), Ipv4Addr::new(10, 0, 0, 3)]),
        DhcpOption::InterfaceMtu(1450),
        DhcpOption::ServerIdentifier(gateway),
        DhcpOption::AddressLeaseTime(86_400),
        DhcpOption::ClasslessStaticRoute(vec![
            ("10.9.0.0/16".parse().unwrap(), Ipv4Addr::new(10, 0, 0, 7)),
            ("0.0.0.0/0".parse().unwrap(), gateway),
        ]),
    ] {
        assert_eq!(offer.opts().get((&option).into()), Some(&option));
    }
}

#[test]
fn only_a_ports_own_address_is_confirmed() {
    let request = |address: [u8; 4]| {
        ask4(MessageType::Request, |m| {
            m.opts_mut().insert(DhcpOption::RequestedIpAddress(address.into())).map_or((), drop)
        })
    };
    assert_eq!(kind(&request([10, 0, 0, 5]).unwrap()), MessageType::Ack);
    let refusal = request([10, 0, 0, 6]).unwrap();
    assert_eq!((kind(&refusal), refusal.yiaddr()), (MessageType::Nak, Ipv4Addr::UNSPECIFIED));
    let renewal = ask4(MessageType::Request, |m| {
        m.set_ciaddr([10, 0, 0, 5]);
    })
    .unwrap();
    assert_eq!(kind(&renewal), MessageType::Ack);
    let elsewhere = ask4(MessageType::Request, |m| {
        m.opts_mut().insert(DhcpOption::RequestedIpAddress([10, 0, 0, 5].into()));
        m.opts_mut().insert(DhcpOption::ServerIdentifier([10, 0, 0, 200].into()));
    });
    assert!(elsewhere.is_none(), "the guest has chosen another server");
    let informed = ask4(MessageType::Inform, |m| {
        m.set_ciaddr([10, 0, 0, 5]);
    })
    .unwrap();
    assert_eq!((kind(&informed), informed.yiaddr()), (MessageType::Ack, Ipv4Addr::UNSPECIFIED));
    assert!(informed.opts().get(OptionCode::AddressLeaseTime).is_none(), "RFC 2131, 3.4");
    for kind in [MessageType::Release, MessageType::Decline, MessageType::Offer] {
        assert!(ask4(kind, |_| {}).is_none(), "{kind:?}");
    }
    assert!(
        ask4(MessageType::Discover, |m| {
            m.set_chaddr(&[2; 6]);
        })
        .is_none(),
        "another's address"
    );
}

#[test]
fn an_answer_goes_where_the_guest_can_hear_it() {
    let answer = |flags| {
        let mut message = Message::default();
        message.set_chaddr(&MAC.0).set_flags(flags);
        message.opts_mut().insert(DhcpOption::MessageType(MessageType::Discover));
        let message = message.to_vec().unwrap();
        let asked = Asked { mac: MAC, source: Ipv4Addr::UNSPECIFIED.into(), message };
        v4::answer(&asked, &port(), 1450).unwrap().frame
    };
    let frame = answer(Flags::default());
    assert_eq!((&frame[..6], &frame[6..12], &frame[30..34]), (&MAC.0[..], &SERVER.0[..], &[10, 0, 0, 5][..]));
    let frame = answer(Flags::default().set_broadcast());
    assert_eq!((&frame[..6], &frame[30..34]), (&[0xff; 6][..], &[255; 4][..]));
}

#[test]
fn questions_that_are_cut_or_none_are_not_answered() {
    let whole = {
        let mut message = Message::default();
        message.set_chaddr(&MAC.0);
        message.opts_mut().insert(DhcpOption::MessageType(MessageType::Discover));
        super::frame::v4(
            super::frame::Path {
                from: MAC,
                to: SERVER,
                source: Ipv4Addr::UNSPECIFIED,
                destination: Ipv4Addr::BROADCAST,
            },
            &message.to_vec().unwrap(),
        )
    };
    let answered = |frame: &[u8]| {
        Asked::read(frame).and_then(|asked| {
            if asked.is_v4() { v4::answer(&asked, &port(), 1450) } else { v6::answer(&asked, &port()) }
        })
    };
    assert!(answered(&whole).is_some());
    for length in 0..whole.len() {
        assert!(answered(&whole[..length]).is_none(), "{length} bytes");
    }
    let mut runner = proptest::test_runner::TestRunner::default();
    let change = (proptest::collection::vec((0..whole.len(), proptest::num::u8::ANY), 1..8), 14..400_usize);
    runner
        .run(&change, |(changes, length)| {
            let mut frame = whole.clone();
            changes.into_iter().for_each(|(at, byte)| frame[at] = byte);
            frame.truncate(length);
            // Whatever it says, it says it without a panic.
            let _ = answered(&frame);
            Ok(())
        })
        .unwrap();
}

fn ask6(message: &six::Message, port: &LocalPort) -> Option<six::Message> {
    let source: Ipv6Addr = "fe80::5".parse().unwrap();
    let asked = Asked { mac: MAC, source: source.into(), message: message.to_vec().unwrap() };
    let answer = v6::answer(&asked, port)?;
    let reply = six::Message::decode(&mut Decoder::new(&answer.frame[62..])).unwrap();
    assert_eq!(reply.xid(), message.xid());
    Some(reply)
}

fn solicit(kind: six::MessageType, server: Option<Vec<u8>>, addresses: &[&str]) -> six::Message {
    let mut message = six::Message::new(kind);
    message.opts_mut().insert(six::DhcpOption::ClientId(vec![0, 3, 0, 1, 2, 2, 2, 2, 2, 2]));
    server.into_iter().for_each(|id| message.opts_mut().insert(six::DhcpOption::ServerId(id)));
    let mut opts = six::DhcpOptions::new();
    for address in addresses {
        let addr = address.parse().unwrap();
        let inner = six::DhcpOptions::new();
        let address = six::IAAddr { addr, preferred_life: 0, valid_life: 0, opts: inner };
        opts.insert(six::DhcpOption::IAAddr(address));
    }
    message.opts_mut().insert(six::DhcpOption::IANA(six::IANA { id: 1, t1: 0, t2: 0, opts }));
    message
}

fn given(reply: &six::Message) -> Vec<(String, u32)> {
    let Some(six::DhcpOption::IANA(ia)) = reply.opts().get(six::OptionCode::IANA) else { return vec![] };
    let addresses = ia.opts.get_all(six::OptionCode::IAAddr).unwrap_or_default().iter();
    let addresses = addresses.map(|option| match option {
        six::DhcpOption::IAAddr(address) => (address.addr.to_string(), address.valid_life),
        other => panic!("{other:?}"),
    });
    // In whatever order the crate writes them.
    addresses.collect::<std::collections::BTreeSet<_>>().into_iter().collect()
}

#[test]
fn dhcpv6_gives_a_ports_addresses_and_ends_those_that_are_not_its_own() {
    use six::MessageType as M;
    let ours = || Some([&[0, 3, 0, 1][..], &SERVER.0].concat());
    let advertised = ask6(&solicit(M::Solicit, None, &[]), &port()).unwrap();
    assert_eq!(advertised.msg_type(), M::Advertise);
    assert_eq!(given(&advertised), [("fd00::5".to_owned(), 86_400)]);
    let servers = advertised.opts().get(six::OptionCode::DomainNameServers);
    assert_eq!(servers, Some(&six::DhcpOption::DomainNameServers(vec!["fd00::2".parse().unwrap()])));
    let renewed = ask6(&solicit(M::Renew, ours(), &["fd00::5", "fd00::6"]), &port()).unwrap();
    assert_eq!(renewed.msg_type(), M::Reply);
    assert_eq!(given(&renewed), [("fd00::5".to_owned(), 86_400), ("fd00::6".to_owned(), 0)]);
    for (message, answered) in [
        (solicit(M::Request, ours(), &[]), true),
        (solicit(M::Request, Some(vec![1, 2]), &[]), false),
        (solicit(M::Request, None, &[]), false),
        (solicit(M::Solicit, ours(), &[]), false),
        (solicit(M::Release, ours(), &["fd00::5"]), true),
        (solicit(M::Reply, ours(), &[]), false),
    ] {
        assert_eq!(ask6(&message, &port()).is_some(), answered, "{message:?}");
    }
    for (address, status) in [("fd00::5", six::Status::Success), ("fd00::6", six::Status::NotOnLink)] {
        let reply = ask6(&solicit(M::Confirm, None, &[address]), &port()).unwrap();
        match reply.opts().get(six::OptionCode::StatusCode) {
            Some(six::DhcpOption::StatusCode(code)) => assert_eq!(code.status, status),
            other => panic!("{other:?}"),
        }
    }
}

/// What a client's script was told, as `name=value`.
fn told(path: &Path) -> Vec<String> {
    let text = fs::read_to_string(path).unwrap_or_default();
    text.lines().map(str::to_owned).collect()
}

#[test]
fn busyboxs_and_iscs_clients_get_their_addresses_and_only_at_ports_that_have_some() {
    in_sandbox(|| {
        let folder = tempfile::tempdir().unwrap();
        let other = LocalPort { port: PortId(Uuid::from_u128(6 << 120)), leases: vec![], ..port() };
        let wanted = NetworkWanted {
            network: NetworkId(Uuid::from_u128(7)),
            vni: 1001,
            carrier: Carrier::Vxlan,
            mtu: 1450,
            udp_port: 4789,
            generation: 1,
            ports: vec![port(), other.clone()],
            forwarding: vec![],
            flood: vec![],
            floating: vec![],
            routers: vec![],
            unknown_unicast: Unknown::Drop,
            unknown_neighbours: Unknown::Flood,
            groups: vec![],
        };
        let bpffs = Path::new("/sys/fs/bpf");
        let filter = PortFilter::open(bpffs, Room::default()).unwrap();
        let networks = Arc::new(WantedNetworks::open(folder.path()).unwrap());
        networks.keep(&wanted).unwrap();
        Responder::new(networks, &Registry::new()).unwrap().start(Requests::open(bpffs).unwrap()).unwrap();
        for (name, port) in [("a", &port()), ("b", &other)] {
            add_guest(name, &tap_name(port.port));
            run(&format!("ip -n {name} link set eth0 address {MAC}"));
            run(&format!("ip netns exec {name} sysctl -qw net.ipv6.conf.eth0.accept_dad=0"));
            run(&format!("ip -n {name} link set eth0 down"));
            run(&format!("ip -n {name} link set eth0 up"));
        }
        filter.ensure(&wanted).unwrap();
        let script = folder.path().join("told.sh");
        let told_path = folder.path().join("told");
        let text =
            format!("#!/bin/sh\n[ \"$1$reason\" = deconfig ] || env > {}\nexit 0\n", told_path.display());
        fs::write(&script, text).unwrap();
        fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
        let script = script.display();
        run(&format!(
            "ip netns exec a busybox udhcpc -f -n -q -t 5 -T 1 -i eth0 -O staticroutes -O mtu -s {script}"
        ));
        let bound = told(&told_path);
        for line in [
            "ip=10.0.0.5",
            "mask=24",
            "router=10.0.0.1",
            "dns=10.0.0.2 10.0.0.3",
            "mtu=1450",
            "staticroutes=10.9.0.0/16 10.0.0.7 0.0.0.0/0 10.0.0.1",
            "lease=86400",
        ] {
            assert!(bound.iter().any(|told| told == line), "{line} is not in {bound:#?}");
        }
        let here = folder.path().display();
        run(&format!("ip netns exec a dhclient -6 -1 -lf {here}/leases -pf {here}/pid -sf {script} eth0"));
        run(&format!("ip netns exec a dhclient -6 -x -lf {here}/leases -pf {here}/pid -sf {script} eth0"));
        let leases = fs::read_to_string(folder.path().join("leases")).unwrap();
        assert!(leases.contains("iaaddr fd00::5"), "{leases}");
        let refused = crate::network::sandbox::try_run(&format!(
            "ip netns exec b busybox udhcpc -f -n -q -t 1 -T 1 -i eth0 -s {script}"
        ));
        assert!(!refused.status.success(), "nobody answers at a port without leases");
    });
}
