//! What servers need, made and removed with the `openstack` command; and what the hosts carry of a server.

use std::time::Duration;

use godwit_tests::guest_image::{self, GuestImage};
use godwit_tests::lab::{Host, until};
use serde_json::Value;

use crate::stage::Stage;

/// The image that all upload.
pub(crate) fn image() -> GuestImage {
    guest_image::ensure(&godwit_tests::target_folder().join("guest")).expect("the image is built")
}

/// Makes the image `guest`, the flavor `small`, the key `key`, the network `net`, and on each host a port of it
/// that stands for a machine there: `at-h1`, …
pub(crate) fn prepare(stage: &Stage) {
    let image = image().path.to_string_lossy().into_owned();
    let upload =
        ["openstack", "image", "create", "--disk-format", "qcow2", "--public", "--file", &image, "guest"];
    let size = ["--ram", "256", "--vcpus", "1", "--disk", "1", "--property", "hw:numa_nodes=1"];
    stage.run(&["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", "/run/key"]);
    stage.run_all(&[
        upload.to_vec(),
        [&["openstack", "flavor", "create"], &size[..], &["small"]].concat(),
        vec!["openstack", "keypair", "create", "--public-key", "/run/key.pub", "key"],
        vec!["openstack", "network", "create", "net"],
    ]);
    stage.run(&["openstack", "subnet", "create", "--network", "net", "--subnet-range", "10.9.0.0/24", "sub"]);
    let names: Vec<&str> = stage.lab().hosts().iter().map(Host::name).collect();
    let ports: Vec<String> = names.iter().map(|host| format!("at-{host}")).collect();
    let create = ["openstack", "port", "create", "--network", "net", "--host"];
    let lines = ports.iter().zip(names).map(|(port, host)| [&create[..], &[host, port]].concat());
    stage.run_all(&lines.collect::<Vec<_>>());
}

/// Removes what [`prepare`] made; then the lab must be as it was when its hosts had joined.
pub(crate) fn clear(stage: &Stage) {
    let ports: Vec<String> = stage.lab().hosts().iter().map(|host| format!("at-{}", host.name())).collect();
    let ports: Vec<&str> = ports.iter().map(String::as_str).collect();
    stage.run(&[&["openstack", "port", "delete"], &ports[..]].concat());
    stage.run_all(&[
        vec!["openstack", "network", "delete", "net"],
        vec!["openstack", "image", "delete", "guest"],
        vec!["openstack", "flavor", "delete", "small"],
        vec!["openstack", "keypair", "delete", "key"],
    ]);
    stage.is_clean();
}

/// A server with one port.
pub(crate) struct Guest {
    pub(crate) id: String,
    pub(crate) name: String,
    pub(crate) mac: String,
    pub(crate) address: String,
    /// The number of its network on the wire.
    vni: u64,
}

impl Guest {
    /// A server of what [`prepare`] made, on a host of the caller's choice, active.
    pub(crate) fn create(stage: &Stage, name: &str, host: &str) -> Guest {
        let zone = format!("nova:{host}");
        let parts = ["--flavor", "small", "--image", "guest", "--network", "net", "--key-name", "key"];
        let place = ["--availability-zone", &zone, "--wait", name];
        let words: Vec<&str> = [&["server", "create"], &parts[..], &place[..]].concat();
        let shown = stage.json(&words);
        assert_eq!(shown["status"], "ACTIVE", "{shown}");
        assert_eq!(shown["name"], name, "{shown}");
        Guest::named(stage, name)
    }

    /// A server that exists.
    pub(crate) fn named(stage: &Stage, name: &str) -> Guest {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let id = text(&stage.json(&["server", "show", name])["id"]);
        let ports = stage.json(&["port", "list", "--server", &id]);
        let address = text(&ports[0]["Fixed IP Addresses"][0]["ip_address"]);
        let vni = stage.json(&["network", "show", "net"])["provider:segmentation_id"].as_u64();
        let mac = text(&ports[0]["MAC Address"]);
        Guest { id, name: name.to_owned(), mac, address, vni: vni.expect("the network has a number") }
    }

    /// `openstack server show`, or a field of it.
    pub(crate) fn shown(&self, stage: &Stage, field: &str) -> Value {
        stage.json(&["server", "show", &self.name])[field].clone()
    }

    /// Waits until the client shows a status.
    pub(crate) fn becomes(&self, stage: &Stage, status: &str) {
        until("c0", &format!("{} being {status}", self.name), Duration::from_secs(60), || {
            let shown = self.shown(stage, "status");
            assert_ne!(shown, "ERROR", "{}", stage.run(&["openstack", "server", "show", &self.name]));
            Ok(shown == status)
        })
        .unwrap_or_else(|error| panic!("{error}"));
    }

    /// libvirt's and the kernel's word: the server runs on this host and on no other, its bridge, VXLAN device and
    /// tap are there, and every other host forwards to it there.
    pub(crate) fn is_carried_by(&self, stage: &Stage, host: &str) {
        let carrier = stage.host(host);
        assert_eq!(self.state(carrier), "running");
        assert_eq!(self.processes(carrier), 1, "QEMU on {host}");
        let (bridge, tunnel) = (format!("gwb{}", self.vni), format!("gwv{}", self.vni));
        let links = carrier.exec(&["bridge", "link", "show"]).expect("runs");
        assert!(
            links.contains(&format!("{tunnel}:")) && links.contains(&format!("master {bridge}")),
            "{links}"
        );
        let nic = carrier.exec(&["virsh", "-q", "domiflist", &self.id]).expect("runs");
        let tap = nic.split_whitespace().next().expect("it has a NIC");
        assert!(nic.contains(&self.mac), "{nic}");
        let tap = carrier.exec(&["ip", "link", "show", tap]).expect("the tap is there");
        assert!(tap.contains(&format!("master {bridge}")) && tap.contains("LOWER_UP"), "{tap}");
        assert_eq!(self.shown(stage, "OS-EXT-SRV-ATTR:host"), host);
        for other in stage.lab().hosts().iter().filter(|other| other.name() != host) {
            assert_eq!(self.state(other), "", "{} on {}", self.name, other.name());
            assert_eq!(self.processes(other), 0, "QEMU on {}", other.name());
            let what = format!("its entry for {} on {host}", self.mac);
            let wanted = format!("{} dst {} ", self.mac, carrier.address());
            until(other.name(), &what, Duration::from_secs(20), || {
                Ok(other.exec(&["bridge", "fdb", "show", "dev", &tunnel])?.contains(&wanted))
            })
            .unwrap_or_else(|error| {
                panic!("{error}: {:?}", other.exec(&["bridge", "fdb", "show", "dev", &tunnel]))
            });
        }
    }

    /// No host runs it; its disk stays.
    pub(crate) fn is_off(&self, stage: &Stage) {
        for host in stage.lab().hosts() {
            assert_eq!(self.processes(host), 0, "QEMU on {}", host.name());
            assert!(["", "shut off"].contains(&self.state(host).as_str()), "{}", self.state(host));
        }
        assert!(stage.lab().pool().join("instances").join(&self.id).join("disk").is_file());
    }

    /// Nothing of it is left on any host or on the pool.
    pub(crate) fn is_gone(&self, stage: &Stage) {
        for host in stage.lab().hosts() {
            assert_eq!(self.processes(host), 0, "QEMU on {}", host.name());
            assert_eq!(self.state(host), "");
            let entries = host.exec(&["bridge", "fdb", "show"]).expect("runs");
            let what = format!("the end of the entries for {}", self.mac);
            until(host.name(), &what, Duration::from_secs(20), || {
                Ok(!host.exec(&["bridge", "fdb", "show"])?.contains(&self.mac))
            })
            .unwrap_or_else(|error| panic!("{error}: {entries}"));
        }
        assert!(!stage.lab().pool().join("instances").join(&self.id).exists());
        assert!(!stage.run(&["openstack", "port", "list"]).contains(&self.mac));
    }

    /// libvirt's word for its state; empty when this host's libvirt does not know it.
    pub(crate) fn state(&self, host: &Host) -> String {
        let output = host.output(&["virsh", "-q", "domstate", &self.id]).expect("virsh starts");
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    }

    /// How many QEMU processes of it the host's kernel shows.
    fn processes(&self, host: &Host) -> usize {
        let listed = host.exec(&["ps", "-eo", "args="]).expect("runs");
        let ours = |line: &&str| line.starts_with("/usr/bin/qemu-system") && line.contains(&self.id);
        listed.lines().filter(ours).count()
    }

    /// Waits until the guest's system has come up as often as `times` since its console was opened.
    pub(crate) fn boots(&self, stage: &Stage, times: usize) -> String {
        let mut log = String::new();
        until("c0", &format!("start {times} of {}", self.name), Duration::from_secs(90), || {
            log = stage.run(&["openstack", "console", "log", "show", &self.name]);
            Ok(log.matches(guest_image::READY).count() >= times)
        })
        .unwrap_or_else(|error| panic!("{error}: {log}"));
        log
    }

    /// Deletes it, and checks that nothing is left.
    pub(crate) fn delete(&self, stage: &Stage) {
        stage.run(&["openstack", "server", "delete", "--wait", &self.name]);
        self.is_gone(stage);
    }
}
