//! Open vSwitch with its datapath in user space, a tunnel to every host, and a flow for each known address that
//! answers questions for it in its owner's place.

use crate::frames::Protocol;
use crate::known::{add_plain_guest, hosts};
use crate::namespaces::{run, spawn, try_run};
use crate::site::{Station, VNI, plug, vtep};
use godwit_protocol::port::Mac;
use std::fmt::Write as _;
use std::path::Path;
use std::process::Child;
use std::thread;
use std::time::{Duration, Instant};

const SCHEMA: &str = "/usr/share/openvswitch/vswitch.ovsschema";

/// Its two daemons on one host.
pub(crate) struct OpenVSwitch(#[allow(dead_code, reason = "they end with the namespaces")] Vec<Child>);

impl OpenVSwitch {
    /// One on each host.
    pub(crate) fn hosts(all: &[Station], protocol: Protocol) -> Result<Vec<Self>, String> {
        if !Path::new(SCHEMA).exists() {
            return Err("skip: openvswitch-switch is not installed: run `cargo xtask setup --bench`".into());
        }
        if protocol == Protocol::Nd {
            return Err("skip: OpenFlow has no action that turns a solicitation into an advertisement".into());
        }
        let started: Vec<Self> = hosts().map(|host| Self::start(host, all)).collect::<Result<_, _>>()?;
        // The first packet to a tunnel's other end asks where that is.
        for (one, other) in hosts().flat_map(|one| hosts().map(move |other| (one, other))) {
            if one != other {
                let ping = format!("ip netns exec h{one} ping -c 1 -W 1 {}", vtep(other));
                wait("the tunnels' ends", || try_run(&ping).status.success())?;
            }
        }
        Ok(started)
    }

    fn start(host: u8, all: &[Station]) -> Result<Self, String> {
        let name = plug(host);
        let tap = add_plain_guest(all, host);
        let folder = format!("/run/ovs{host}");
        std::fs::create_dir(&folder).expect("is made");
        run(&format!("ovsdb-tool create {folder}/conf.db {SCHEMA}"));
        let database = format!("unix:{folder}/db.sock");
        let env = format!("env OVS_RUNDIR={folder} OVS_DBDIR={folder} OVS_LOGDIR={folder}");
        let mut daemons = vec![spawn(
            &name,
            &format!("{env} ovsdb-server {folder}/conf.db --remote=p{database} --unixctl={folder}/db.ctl"),
        )];
        let vsctl = |words: &str| {
            let line = format!("ip netns exec {name} {env} ovs-vsctl --timeout=20 --db={database} {words}");
            let output = try_run(&line);
            match output.status.success() {
                true => Ok(()),
                false => Err(format!("{line}: {}", String::from_utf8_lossy(&output.stderr))),
            }
        };
        wait("ovsdb-server", || Path::new(&format!("{folder}/db.sock")).exists())?;
        vsctl("--no-wait init")?;
        daemons.push(spawn(
            &name,
            &format!("{env} ovs-vswitchd {database} --disable-system --unixctl={folder}/switch.ctl"),
        ));
        vsctl("add-br ul -- set bridge ul datapath_type=netdev -- add-port ul eth0")?;
        run(&format!("ip -n {name} address flush dev eth0"));
        run(&format!("ip -n {name} address add {}/24 dev ul", vtep(host)));
        run(&format!("ip -n {name} link set ul mtu 1600 up"));
        vsctl(&format!(
            "add-br br -- set bridge br datapath_type=netdev fail-mode=secure -- add-port br {tap} -- set \
             interface {tap} ofport_request=1"
        ))?;
        for other in hosts().filter(|other| *other != host) {
            vsctl(&format!(
                "add-port br vx{other} -- set interface vx{other} type=vxlan ofport_request={} \
                 options:remote_ip={} options:local_ip={} options:key={VNI}",
                10 + other,
                vtep(other),
                vtep(host)
            ))?;
        }
        let flows = format!("{folder}/flows");
        std::fs::write(&flows, flows_of(host, all)).expect("is writable");
        let line = format!("ip netns exec {name} {env} ovs-ofctl add-flows unix:{folder}/br.mgmt {flows}");
        let added = try_run(&line);
        if !added.status.success() {
            return Err(format!("{line}: {}", String::from_utf8_lossy(&added.stderr)));
        }
        Ok(Self(daemons))
    }
}

/// The ARP responder as it is commonly written (ovs-fields(7), arp), and head-end replication for the rest.
fn flows_of(host: u8, all: &[Station]) -> String {
    let mut flows = String::new();
    for station in all {
        let (mac, address) = (Mac(station.mac()), station.v4());
        let digits = mac.to_string().replace(':', "");
        let _ = writeln!(
            flows,
            "priority=100,in_port=1,arp,arp_op=1,arp_tpa={address},actions=move:NXM_OF_ETH_SRC[]->NXM_OF_ETH_DST[],\
             mod_dl_src:{mac},load:0x2->NXM_OF_ARP_OP[],move:NXM_NX_ARP_SHA[]->NXM_NX_ARP_THA[],\
             move:NXM_OF_ARP_SPA[]->NXM_OF_ARP_TPA[],load:0x{digits}->NXM_NX_ARP_SHA[],\
             load:0x{:08x}->NXM_OF_ARP_SPA[],in_port",
            address.to_bits()
        );
    }
    let tunnels: Vec<String> =
        hosts().filter(|other| *other != host).map(|other| format!("output:{}", 10 + other)).collect();
    let _ = writeln!(flows, "priority=1,in_port=1,actions={}", tunnels.join(","));
    let _ = writeln!(flows, "priority=0,actions=output:1");
    flows
}

fn wait(what: &str, condition: impl Fn() -> bool) -> Result<(), String> {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !condition() {
        if Instant::now() > deadline {
            return Err(format!("{what}: did not come up"));
        }
        thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}
