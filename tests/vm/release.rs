//! The release's own kernel, which is older than the programs need: the agent says so and goes on, and the kernel's
//! bridge answers for the neighbours that the coordinator has told of.

use std::time::{Duration, Instant};

use godwit_tests::vm::{Vm, Wire};
use serde_json::json;

use crate::fleet;

const ADDRESS: &str = "10.9.0.1";
const PEER: &str = "10.9.0.2";
const VNI: u32 = 1001;

/// The port's id, and the link that stands for its tap.
const PORT: &str = "01000000-0000-0000-0000-000000000000";
const TAP: &str = "gwt01000000000";

/// What the coordinator would have told: a port here, and a neighbour at another host (`NetworkWanted` in protocol/).
fn network() -> String {
    let wanted = json!({
        "network": "00000000-0000-0000-0000-000000000007",
        "vni": VNI,
        "carrier": "vxlan",
        "mtu": 1450,
        "udp_port": 4789,
        "generation": 1,
        "ports": [{ "port": PORT, "mac": "fa:16:3e:00:00:01", "addresses": ["10.42.0.5"] }],
        "forwarding": [{ "mac": "fa:16:3e:00:00:02", "addresses": ["10.42.0.9"], "vtep": PEER }],
        "flood": [PEER],
    });
    wanted.to_string()
}

/// The agent alone, as after a power-on while the coordinator is away; and a guest.
fn alone() -> String {
    format!(
        "kill $(pidof godwit-coordinator) $(pidof godwit-agent)
         while pidof godwit-agent godwit-coordinator > /dev/null; do sleep 0.1; done
         ip neighbour replace {PEER} lladdr 52:54:00:00:00:02 dev eth0 nud permanent
         ip netns add guest
         ip link add {TAP} type veth peer name eth0 netns guest
         ip link set {TAP} up
         ip -n guest link set eth0 address fa:16:3e:00:00:01 up
         ip -n guest address add 10.42.0.5/24 dev eth0
         echo '{}' > /var/lib/godwit/networks/{VNI}.json
         godwit-agent run > /var/log/agent 2>&1 &",
        network()
    )
}

/// The EtherType inside a VXLAN packet over IPv4, with its destination address.
fn inner(frame: &[u8]) -> Option<(u16, [u8; 6])> {
    let is_vxlan =
        frame.get(12..14)? == [8, 0] && frame.get(23)? == &17 && frame.get(36..38)? == [0x12, 0xb5];
    let kind = frame.get(62..64)?.try_into().ok()?;
    is_vxlan.then_some((u16::from_be_bytes(kind), frame.get(50..56)?.try_into().ok()?))
}

#[test]
fn a_kernel_that_does_not_take_the_programs_is_named_and_its_bridge_answers_for_neighbours() {
    let wire = Wire::new().expect("a wire");
    let vm = fleet::builder("release")
        .release_kernel()
        .wire(&wire, &format!("{ADDRESS}/24"))
        .start()
        .expect("starts");
    let release = vm.exec(&["uname", "-r"]).expect("runs").trim().to_owned();
    assert!(release.starts_with("6.1."), "{release}");
    fleet::start(&vm, ADDRESS, "");
    vm.shell(&format!("modprobe -a veth bridge vxlan\n{}", alone())).expect("runs");
    let is_made = |vm: &Vm| Ok(vm.shell(&format!("ip link show {TAP}"))?.contains(" master "));
    vm.until("the guest's network", Duration::from_secs(60), is_made)
        .unwrap_or_else(|error| panic!("{error}\n{}", fleet::logs(&vm)));

    // The metrics say what answers, and the log why.
    let series = fleet::series(&vm).expect("answers");
    for line in [
        "godwit_telemetry_up 0",
        "godwit_neighbour_suppression{by=\"ebpf\"} 0",
        "godwit_neighbour_suppression{by=\"kernel\"} 1",
    ] {
        assert!(series.lines().any(|found| found == line), "{line}: {series}");
    }
    let log = vm.shell("cat /var/log/agent").expect("is there");
    let why = format!("the eBPF programs need Linux 6.6 or newer, and this is {release}");
    let told = log.lines().filter(|line| line.contains(&why)).count();
    assert!(told >= 2, "neither packets nor ports have programs: {log}");

    // The guest's question is answered on its own host: its ping leaves for the neighbour, and no question does.
    let mut station = wire.station().expect("is plugged in");
    let ask = "ip netns exec guest ping -c 3 -i 0.2 -W 1 10.42.0.9 > /dev/null || true; ip -n guest neighbour show 10.42.0.9";
    let known = vm.shell(ask).expect("runs");
    assert!(known.contains("lladdr fa:16:3e:00:00:02"), "{known}\n{}", fleet::logs(&vm));
    let (begin, mut pings) = (Instant::now(), 0);
    while pings < 3 {
        assert!(begin.elapsed() < Duration::from_secs(30), "{pings} pings have left");
        let frame = station.receive(Duration::from_secs(20)).expect("the pings leave");
        match inner(&frame) {
            Some((0x0806, destination)) => panic!("a question has left, for {destination:x?}"),
            Some((0x0800, [0xfa, 0x16, 0x3e, 0, 0, 2])) => pings += 1,
            _ => {}
        }
    }
    // What nobody was told of is asked for everywhere.
    vm.shell("ip netns exec guest ping -c 1 -W 1 10.42.0.77 > /dev/null || true").expect("runs");
    while begin.elapsed() < Duration::from_secs(60) {
        let frame = station.receive(Duration::from_secs(20)).expect("the question leaves");
        if inner(&frame) == Some((0x0806, [0xff; 6])) {
            return;
        }
    }
    panic!("a question for an unknown address does not leave");
}
