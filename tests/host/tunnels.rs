//! Who sends what to whom over VXLAN, by a capture on the underlay.

use std::io::{BufRead as _, BufReader};
use std::process::ChildStdout;
use std::time::Duration;

use crate::fleet::{Fleet, KILL, forwarding};
use godwit_tests::lab::{Host, LabOptions, Probe, Running, until};
use serde_json::Value;

/// All VXLAN packets of the underlay, and pings between hosts, which say that what was before them has been seen.
struct Capture<'a> {
    fleet: &'a Fleet,
    lines: BufReader<ChildStdout>,
    _running: Running,
}

/// A packet of a network: from where to where, its network's number, and what tcpdump says of what is inside.
#[derive(Debug)]
struct Tunnelled {
    from: String,
    to: String,
    vni: String,
    inside: String,
}

impl<'a> Capture<'a> {
    fn start(fleet: &'a Fleet) -> Capture<'a> {
        // A change of user would forget whose end it is to end with.
        let stays = ["-Z", "root"];
        let seen = ["--immediate-mode", "udp port 4789 or icmp"];
        let words = [&["tcpdump", "-lnti", "underlay"][..], &stays, &seen].concat();
        let mut running = fleet.lab.capture(&words).expect("tcpdump starts");
        let child = running.child().expect("runs");
        let mut said = BufReader::new(child.stderr.take().expect("is piped"));
        let mut line = String::new();
        while !line.contains("listening on") {
            line.clear();
            assert!(said.read_line(&mut line).expect("is readable") > 0, "tcpdump does not start");
        }
        // What it still has to say must not fill the pipe.
        std::thread::spawn(move || std::io::copy(&mut said, &mut std::io::sink()));
        let lines = BufReader::new(child.stdout.take().expect("is piped"));
        Capture { fleet, lines, _running: running }
    }

    /// What has passed since this was last asked, of packets that hold `inside`.
    fn take(&mut self, inside: &str) -> Vec<Tunnelled> {
        // Packets pass the switch one behind the other: the answer to this is behind all that was sent before.
        let (one, two) = (self.fleet.host(1), self.fleet.host(2));
        one.exec(&["ping", "-c", "1", "-W", "5", "-s", "777", two.address()])
            .expect("the hosts hear each other");
        let (mut seen, mut line) = (Vec::new(), String::new());
        loop {
            line.clear();
            assert!(self.lines.read_line(&mut line).expect("is readable") > 0, "tcpdump has ended");
            if line.starts_with("IP ") && line.contains("echo reply") && line.contains("length 785") {
                return seen;
            }
            let Some((ends, vni)) = line.split_once(": VXLAN, flags [I] (0x08), vni ") else { continue };
            let words: Vec<&str> = ends.split_whitespace().collect();
            let ["IP", from, ">", to] = words[..] else { panic!("{line}") };
            // The port is behind the last dot.
            let host = |end: &str| end.rsplit_once('.').expect("has a port").0.to_owned();
            let (from, to, vni) = (host(from), host(to), vni.trim().to_owned());
            let mut content = String::new();
            self.lines.read_line(&mut content).expect("is readable");
            if content.contains(inside) {
                seen.push(Tunnelled { from, to, vni, inside: content.trim().to_owned() });
            }
        }
    }

    /// Receivers of the packets that hold `inside`, all of which `from` has sent with this VNI.
    fn receivers(&mut self, from: &Host, vni: &str, inside: &str) -> Vec<String> {
        let seen = self.take(inside);
        for packet in &seen {
            assert_eq!((packet.from.as_str(), packet.vni.as_str()), (from.address(), vni), "{packet:?}");
        }
        let mut receivers: Vec<String> = seen.into_iter().map(|packet| packet.to).collect();
        receivers.sort();
        receivers
    }
}

/// Lets a guest ask once for an address that nobody answers for.
fn ask_once(probe: &Probe) {
    let write = "echo 1 >/proc/sys/net/ipv4/neigh/eth0/mcast_solicit";
    probe.exec(&["sh", "-c", write]).expect("the setting is written");
}

/// A question by ARP, whether or not anybody answers.
fn ask(probe: &Probe, address: &str) {
    probe.exec(&["ip", "neighbour", "flush", "dev", "eth0"]).expect("the cache is emptied");
    probe.output(&["ping", "-c", "1", "-W", "1", address]).expect("ping runs");
}

fn ping(probe: &Probe, address: &str) {
    probe.exec(&["ping", "-c", "1", "-W", "5", address]).expect("it is answered");
}

/// A packet to an Ethernet address that no port has.
fn send_to_nobody(probe: &Probe) {
    let nobody = "10.77.0.222 dev eth0 lladdr fa:16:3e:99:99:99";
    let words: Vec<&str> = ["ip", "neighbour", "replace"].into_iter().chain(nobody.split(' ')).collect();
    probe.exec(&words).expect("the neighbour is written");
    probe.output(&["ping", "-c", "1", "-W", "1", "10.77.0.222"]).expect("ping runs");
}

fn text(value: &Value) -> String {
    value.as_str().expect("is text").to_owned()
}

/// Starts the coordinator again with other settings, and waits until hosts know.
fn restart(fleet: &Fleet, settings: &str, is_told: impl Fn() -> bool) {
    let coordinator = fleet.lab.coordinator();
    coordinator.kill(KILL).expect("it ends");
    coordinator.set(settings).expect("its settings are written");
    coordinator.start().expect("it starts");
    fleet.wait_for_hosts();
    until("the hosts", settings, Duration::from_secs(30), || Ok(is_told())).unwrap_or_else(|e| panic!("{e}"));
}

/// Whether a host's agent keeps, of the network, what the settings say.
fn keeps(host: &Host, vni: &str, key: &str, value: &str) -> bool {
    let kept = std::fs::read(host.file(format!("lib/godwit/networks/{vni}.json"))).unwrap_or_default();
    let kept: Value = serde_json::from_slice(&kept).unwrap_or_default();
    kept[key] == value
}

#[test]
fn who_sends_what_to_whom_is_as_the_settings_say_by_a_capture_on_the_underlay() {
    let settings = "unknown_unicast = \"drop\"\nunknown_neighbours = \"flood\"\n".to_owned();
    let fleet = Fleet::with(LabOptions { hosts: 3, coordinator_settings: settings, ..LabOptions::default() });
    let [one, two, three] = [1, 2, 3].map(|number| fleet.host(number));
    let (at_one, port_one) = fleet.probe_with(one, &[]);
    let (at_two, port_two) = fleet.probe_with(two, &[]);
    ask_once(&at_one);
    let vni = fleet.godwit(&["network", "show", "blue"])["provider:segmentation_id"].to_string();
    let address = |port: &Value| text(&port["fixed_ips"][0]["ip_address"]);
    let (first, second) = (address(&port_one), address(&port_two));
    until("blue", "its reaching both", Duration::from_secs(20), || {
        Ok(at_one.output(&["ping", "-c", "1", "-W", "1", &second])?.status.success())
    })
    .unwrap_or_else(|error| panic!("{error}"));
    let mut capture = Capture::start(&fleet);

    // Only hosts that have a port have the network, and only they hear its broadcast.
    ask(&at_one, "10.77.0.200");
    assert_eq!(capture.receivers(one, &vni, "ARP, Request who-has 10.77.0.200"), [two.address()]);
    assert!(!three.output(&["ip", "link", "show", &format!("gwv{vni}")]).expect("runs").status.success());

    // A new port's MAC, address and VTEP are told to every host that needs them, before it says a word.
    let (at_three, port_three) = fleet.probe_with(three, &[]);
    let entry = format!("{} dev gwv{vni} dst {}", text(&port_three["mac_address"]), three.address());
    for host in [one, two] {
        host.wait("the new port's entry", || {
            Ok(forwarding(host).iter().any(|line| line.starts_with(&entry)))
        })
        .unwrap_or_else(|error| panic!("{error}: {:#?}", forwarding(host)));
    }
    // And a tunnel to every other host is there.
    for host in [one, two, three] {
        let others: Vec<&Host> = [one, two, three].into_iter().filter(|o| o.name() != host.name()).collect();
        let floods = |other: &Host| {
            let flood = format!("00:00:00:00:00:00 dev gwv{vni} dst {}", other.address());
            forwarding(host).iter().any(|line| line.starts_with(&flood))
        };
        host.wait("a tunnel to each other host", || Ok(others.iter().all(|other| floods(other))))
            .unwrap_or_else(|error| panic!("{error}: {:#?}", forwarding(host)));
    }

    // A ping to a guest is one VXLAN packet with its VNI between the two VTEPs, each way; who is known is not asked
    // for, by anybody, at any time.
    let third = address(&port_three);
    capture.take("");
    ping(&at_one, &second);
    let seen = capture.take("ICMP echo");
    let ways: Vec<(&str, &str)> = seen.iter().map(|p| (p.from.as_str(), p.to.as_str())).collect();
    assert_eq!(ways, [(one.address(), two.address()), (two.address(), one.address())], "{seen:?}");
    assert!(seen.iter().all(|packet| packet.vni == vni), "{seen:?}");
    for (probe, known) in [(&at_one, &second), (&at_two, &third), (&at_three, &first), (&at_one, &third)] {
        ask(probe, known);
    }
    let mut questions = capture.take("ARP, Request who-has");
    // One station may ask another whether it is still there: such a question names its Ethernet address.
    questions.retain(|packet| !packet.inside.contains(" ("));
    assert!(questions.is_empty(), "known addresses were asked for: {questions:?}");

    // Who is not known is asked for by one copy to each other host; a packet to nobody ends at its port.
    ask(&at_one, "10.77.0.201");
    assert_eq!(capture.receivers(one, &vni, "who-has 10.77.0.201"), [two.address(), three.address()]);
    send_to_nobody(&at_one);
    assert_eq!(capture.receivers(one, &vni, "> 10.77.0.222: ICMP"), [""; 0]);

    // The other way round, as settings.
    restart(&fleet, "unknown_unicast = \"flood\"\nunknown_neighbours = \"drop\"\n", || {
        [one, two, three].iter().all(|host| {
            keeps(host, &vni, "unknown_unicast", "flood") && keeps(host, &vni, "unknown_neighbours", "drop")
        })
    });
    ask(&at_one, "10.77.0.202");
    assert_eq!(capture.receivers(one, &vni, "who-has 10.77.0.202"), [""; 0]);
    send_to_nobody(&at_one);
    assert_eq!(capture.receivers(one, &vni, "> 10.77.0.222: ICMP"), [two.address(), three.address()]);

    // With a group, broadcast is one packet to it, and unicast goes from VTEP to VTEP as before.
    let groups =
        "flood = \"multicast\"\nmulticast_groups = \"239.0.0.0/8\"\nunknown_neighbours = \"flood\"\n";
    let number: u32 = vni.parse().expect("is a number");
    let group = std::net::Ipv4Addr::from_bits(0xef00_0000 | number).to_string();
    restart(&fleet, groups, || {
        let joined =
            |host: &&Host| forwarding(host).iter().any(|line| line.contains(&format!("dst {group}")));
        [one, two, three].iter().all(joined)
    });
    ask(&at_one, "10.77.0.203");
    assert_eq!(capture.receivers(one, &vni, "who-has 10.77.0.203"), [group]);
    ping(&at_one, &third);
    let ways: Vec<String> = capture.take("ICMP echo").into_iter().map(|packet| packet.to).collect();
    assert_eq!(ways, [three.address(), one.address()]);

    drop((at_one, at_two, at_three));
    let ports = [&port_one, &port_two, &port_three].map(|port| text(&port["id"]));
    fleet.godwit(&["port", "delete", &ports[0], &ports[1], &ports[2]]);
    fleet.check_nothing_left();
}
