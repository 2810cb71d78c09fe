//! Guests that talk to each other over a bridge, through the filter on their taps.

use super::{BPFFS, Direction, Room, both, network, port, rule};
use crate::network::sandbox::{add_guest, in_namespace, in_sandbox, run};
use crate::telemetry::filter::PortFilter;
use godwit_protocol::id::PortId;
use godwit_protocol::network::{LocalPort, NetworkWanted};
use godwit_protocol::port::tap_name;
use godwit_protocol::security::Rule;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::time::Duration;
use uuid::Uuid;

fn guest(last: u8, rules: Vec<Rule>) -> LocalPort {
    let port = port(rules);
    LocalPort { port: PortId(Uuid::from_u128(u128::from(last) << 120)), ..port }
}

/// A namespace with the address 10.0.0.`last`, whose link's other end is the port's tap on the bridge.
fn plug_in(name: &str, last: u8) {
    add_guest(name, &tap_name(guest(last, vec![]).port));
    run(&format!("ip -n {name} address add 10.0.0.{last}/24 dev eth0"));
}

fn wanted(of_b: Vec<Rule>) -> NetworkWanted {
    network(vec![guest(1, both(rule(Direction::Egress)).into()), guest(2, of_b)], vec![])
}

fn open(wanted: &NetworkWanted) -> PortFilter {
    let filter = PortFilter::open(Path::new(BPFFS), Room::default()).unwrap();
    filter.ensure(wanted).unwrap();
    filter.adopt().unwrap();
    filter
}

fn connect(port: u16) -> Option<TcpStream> {
    let address = SocketAddr::from(([10, 0, 0, 2], port));
    in_namespace("a", || TcpStream::connect_timeout(&address, Duration::from_millis(800)).ok())
}

#[test]
fn a_connection_that_a_rule_let_be_opened_outlives_the_agent_and_ends_with_the_rule() {
    in_sandbox(|| {
        plug_in("a", 1);
        plug_in("b", 2);
        let web = Rule { protocol: Some(6), ports: Some((80, 80)), ..rule(Direction::Ingress) };
        let listeners =
            in_namespace("b", || [80, 81].map(|port| TcpListener::bind(("10.0.0.2", port)).unwrap()));
        let filter = open(&wanted(vec![web]));
        assert!(connect(81).is_none(), "no rule is about it");
        let mut here = connect(80).expect("a rule lets it");
        let (mut there, _) = listeners[0].accept().unwrap();
        let mut exchange = move || {
            there.write_all(b"news").unwrap();
            let mut bytes = [0; 4];
            here.set_read_timeout(Some(Duration::from_millis(800))).unwrap();
            here.read_exact(&mut bytes).is_ok()
        };
        assert!(exchange());
        // As after kill -9: what is attached stays, and the next agent takes it over.
        drop(filter);
        assert!(exchange());
        assert!(connect(81).is_none());
        let filter = open(&wanted(vec![web]));
        assert!(exchange());
        filter.ensure(&wanted(vec![])).unwrap();
        assert!(!exchange(), "the rule is gone");
        assert!(connect(80).is_none());
    });
}

#[test]
fn what_a_port_had_goes_with_its_tap() {
    in_sandbox(|| {
        plug_in("a", 1);
        plug_in("b", 2);
        let filter = open(&wanted(vec![]));
        let pins = || {
            let names = std::fs::read_dir(Path::new(BPFFS).join("godwit")).unwrap();
            let names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
            names.filter(|name| name.starts_with("filter_tap_")).count()
        };
        assert_eq!(pins(), 4);
        run(&format!("ip link delete {}", tap_name(guest(2, vec![]).port)));
        filter.refresh();
        assert_eq!(pins(), 2);
        let inner = filter.lock();
        assert_eq!(inner.filters.keys().count(), 2);
        drop(inner);
        filter.remove(super::VNI).unwrap();
        run("ip link delete dev br");
        run(&format!("ip link delete {}", tap_name(guest(1, vec![]).port)));
        filter.refresh();
        assert_eq!(pins(), 0);
    });
}
