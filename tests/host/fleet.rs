//! A fleet on the lab's hosts, and what a person would look at on them.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use godwit_tests::guest_image;
use godwit_tests::lab::{Host, Lab, LabOptions, Probe, ProbePort, until};
use serde_json::Value;

/// A server's memory, in MiB.
pub(crate) const MEMORY_MIB: u64 = 128;

/// SIGKILL.
pub(crate) const KILL: i32 = 9;

/// Hosts that have joined, with the image "blank", the flavor "small" and the network "blue".
pub(crate) struct Fleet {
    pub(crate) lab: Lab,
}

impl Fleet {
    pub(crate) fn start(hosts: usize) -> Fleet {
        Fleet::with(LabOptions { hosts, ..LabOptions::default() })
    }

    pub(crate) fn with(options: LabOptions) -> Fleet {
        // A lab that a person holds, or that another checkout tests with, will end.
        let lab = Lab::start(LabOptions { patience: Duration::from_secs(600), ..options });
        let fleet = Fleet { lab: lab.expect("the lab starts") };
        fleet.lab.join_all().expect("all hosts join");
        let blank = fleet.file("blank.raw", &vec![0; 1 << 20]);
        fleet.upload("blank", &blank, "raw");
        let memory = format!("{MEMORY_MIB}M");
        fleet.godwit(&["flavor", "create", "small", "--vcpus", "1", "--memory", &memory, "--disk", "0"]);
        fleet.godwit(&["network", "create", "blue", "--subnet", "10.77.0.0/24"]);
        fleet.lab.set_baseline().expect("is listed");
        fleet
    }

    pub(crate) fn host(&self, number: usize) -> &Host {
        self.lab.host(number)
    }

    /// A file of the lab that every host sees at this path.
    pub(crate) fn file(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.lab.folder().join(name);
        std::fs::write(&path, bytes).expect("is writable");
        path
    }

    pub(crate) fn upload(&self, name: &str, file: &std::path::Path, format: &str) {
        self.godwit(&["image", "create", name, "--file", &file.to_string_lossy(), "--disk-format", format]);
    }

    /// The image that boots, as "linux", with a key for SSH into it.
    pub(crate) fn upload_linux(&self) {
        let image = guest_image::ensure(&godwit_tests::target_folder().join("guest")).expect("it is built");
        self.upload("linux", &image.path, "qcow2");
        self.lab.set_baseline().expect("is listed");
    }

    /// What `godwit --json` answers.
    pub(crate) fn godwit(&self, words: &[&str]) -> Value {
        self.lab.coordinator().cli_json(words).unwrap_or_else(|error| panic!("{error}"))
    }

    /// Asks for a blank server; a coordinator that dies before it can answer has it all the same.
    pub(crate) fn ask_for(&self, name: &str, more: &[&str]) {
        let words = ["server", "create", name, "--flavor", "small", "--image", "blank", "--network", "blue"];
        let _ = self.lab.coordinator().cli_output(&[&words, more].concat()).expect("godwit runs");
    }

    /// A blank server that runs; the rest of its command line is `more`.
    pub(crate) fn create(&self, name: &str, more: &[&str]) -> Value {
        self.ask_for(name, more);
        self.wait_for_status(name, "ACTIVE")
    }

    /// The server as the API shows it; none when there is none.
    pub(crate) fn server(&self, name: &str) -> Option<Value> {
        let output =
            self.lab.coordinator().cli_output(&["--json", "server", "show", name]).expect("godwit runs");
        match output.status.code() {
            Some(0) => Some(serde_json::from_slice(&output.stdout).expect("godwit answers JSON")),
            Some(3) => None,
            _ => panic!("server show {name}: {}", String::from_utf8_lossy(&output.stderr)),
        }
    }

    /// Waits until a server rests in a status.
    pub(crate) fn wait_for_status(&self, name: &str, status: &str) -> Value {
        let mut shown = Value::Null;
        let waited = until("c0", &format!("{name} {status}"), Duration::from_secs(120), || {
            shown = self.server(name).unwrap_or_default();
            let stuck = shown["status"] == "ERROR" && status != "ERROR";
            assert!(!stuck, "{name} is in ERROR: {}", shown["fault"]);
            Ok(shown["status"] == status && shown["OS-EXT-STS:task_state"].is_null())
        });
        waited
            .unwrap_or_else(|error| panic!("{error}: {shown:#}\n{:#}", self.godwit(&["operation", "list"])));
        shown
    }

    /// The newest migration as the operator's API shows it.
    pub(crate) fn migration(&self) -> Value {
        let all = self.godwit(&["migration", "list"]);
        let newest = all.as_array().expect("is a list").iter().filter_map(|m| m["id"].as_u64()).max();
        self.godwit(&["migration", "show", &newest.expect("there is one").to_string()])
    }

    /// Waits for the end of the newest migration, and checks that all there is agrees with what it says.
    pub(crate) fn settle(&self, name: &str) -> Value {
        let server = self.wait_for_status(name, "ACTIVE");
        let migration = self.migration();
        let host = match migration["status"].as_str() {
            Some("completed") => migration["target"].as_str(),
            Some("failed" | "cancelled") => migration["source"].as_str(),
            other => panic!("{other:?} is no end of a migration: {migration:#}"),
        };
        assert_eq!(server["OS-EXT-SRV-ATTR:host"].as_str(), host, "{migration:#}");
        if migration["status"] == "failed" {
            assert!(migration["error"].as_str().is_some_and(|text| !text.is_empty()), "{migration:#}");
        }
        self.check_home(&server);
        migration
    }

    /// The server is on the host that its record names, and nowhere else.
    pub(crate) fn check_home(&self, server: &Value) {
        let id = server["id"].as_str().expect("it has an id");
        let home = server["OS-EXT-SRV-ATTR:host"].as_str().expect("it is on a host");
        for host in self.lab.hosts() {
            let here = host.name() == home;
            let name = host.name();
            let guests = guests(host);
            assert_eq!(guests.len(), usize::from(here), "{name} runs {guests:?}, {home} should");
            assert_eq!(migration_sockets(host), Vec::<String>::new(), "{name}");
        }
        self.check_held_by(server, home);
        let ports = self.godwit(&["port", "list"]);
        let mine: Vec<&Value> =
            ports.as_array().expect("is a list").iter().filter(|port| port["device_id"] == id).collect();
        assert!(mine.iter().all(|port| port["binding:host_id"] == home), "{mine:#?}");
        let disk = instance_file(self.host_named(home), server, "disk");
        assert!(disk.is_file(), "{} is missing", disk.display());
    }

    fn host_named(&self, name: &str) -> &Host {
        self.lab.hosts().iter().find(|host| host.name() == name).expect("there is such a host")
    }

    /// One host holds something for a server, and no other.
    pub(crate) fn check_held_by(&self, server: &Value, home: &str) {
        let id = server["id"].as_str().expect("it has an id");
        for host in self.lab.hosts() {
            let right = || {
                let count = reservations(host).iter().filter(|holder| *holder == id).count();
                Ok(count == usize::from(host.name() == home))
            };
            host.wait("the reservations' being right", right)
                .unwrap_or_else(|error| panic!("{error}: {:?}", reservations(host)));
        }
    }

    /// A server's QEMU is on this host.
    pub(crate) fn check_guest_on(&self, server: &Value, host: &Host) {
        let name = server["OS-EXT-SRV-ATTR:instance_name"].as_str().expect("it has a domain");
        let found: Vec<String> = guests(host).into_iter().map(|(_, guest)| guest).collect();
        assert_eq!(found, [name], "{}", host.name());
    }

    /// Deletes all servers, and checks that nothing of them is anywhere.
    pub(crate) fn clean(&self) {
        let servers = self.godwit(&["server", "list"]);
        let servers = servers.as_array().expect("is a list").iter();
        let ids: Vec<String> =
            servers.filter_map(|server| server["id"].as_str().map(str::to_owned)).collect();
        if !ids.is_empty() {
            let mut words = vec!["server", "delete", "--wait"];
            words.extend(ids.iter().map(String::as_str));
            self.godwit(&words);
        }
        self.check_nothing_left();
    }

    /// Nothing is left of any server: process, file, link, domain, map, reservation, address, running operation.
    pub(crate) fn check_nothing_left(&self) {
        let mut left = Vec::new();
        let waited = until("the lab", "the hosts' being clean", Duration::from_secs(30), || {
            left = self.lab.leftovers()?;
            for host in self.lab.hosts().iter().filter(|host| host.init_process().is_ok()) {
                let name = host.name();
                left.extend(reservations(host).into_iter().map(|id| format!("{name}: reservation {id}")));
                left.extend(migration_sockets(host).into_iter().map(|path| format!("{name}: {path}")));
            }
            Ok(left.is_empty())
        });
        waited.unwrap_or_else(|error| panic!("{error}: {left:#?}"));
        for (noun, busy) in [("port", &["port", "list"][..]), ("server", &["server", "list"])] {
            let there = self.godwit(busy);
            let owned = |thing: &&Value| noun == "server" || thing["device_id"] != "";
            let there: Vec<&Value> = there.as_array().expect("is a list").iter().filter(owned).collect();
            assert!(there.is_empty(), "{noun}s are left: {there:#?}");
        }
        let operations = self.godwit(&["operation", "list"]);
        let running = |o: &&Value| ["running", "undoing"].iter().any(|phase| o["phase"] == *phase);
        let running: Vec<&Value> = operations.as_array().expect("is a list").iter().filter(running).collect();
        assert!(running.is_empty(), "{running:#?}");
    }

    /// A port of "blue" on a host with a namespace behind it, in place of a machine of one's own.
    pub(crate) fn probe(&self, host: &Host) -> Probe {
        self.probe_with(host, &[]).0
    }

    /// The same with more of the port's options, and the port.
    pub(crate) fn probe_with(&self, host: &Host, more: &[&str]) -> (Probe, Value) {
        let name = format!("probe-{}", host.name());
        let words = ["port", "create", "blue", "--name", &name, "--host", host.name()];
        let made = self.godwit(&[&words[..], more].concat());
        let port = &made;
        let network = self.godwit(&["network", "show", "blue"]);
        let text = |value: &Value| value.as_str().expect("is text").to_owned();
        let port = ProbePort {
            id: text(&port["id"]),
            mac: text(&port["mac_address"]),
            address: format!("{}/24", text(&port["fixed_ips"][0]["ip_address"])),
            vni: u32::try_from(network["provider:segmentation_id"].as_u64().expect("has one")).expect("fits"),
            mtu: u32::try_from(network["mtu"].as_u64().expect("has one")).expect("fits"),
        };
        let bridge = format!("gwb{}", port.vni);
        host.wait("the bridge", || Ok(host.output(&["ip", "link", "show", &bridge])?.status.success()))
            .expect("the network is built");
        let probe = self.lab.probe(host, &port).expect("is attached");
        (probe, made)
    }

    /// Takes the port of [`Self::probe`] away.
    pub(crate) fn end_probe(&self, probe: Probe, host: &Host) {
        drop(probe);
        self.godwit(&["port", "delete", &format!("probe-{}", host.name())]);
    }

    /// Waits until all hosts are up and connected.
    pub(crate) fn wait_for_hosts(&self) {
        let up = || {
            let hosts = self.godwit(&["host", "list"]);
            let hosts = hosts.as_array().expect("is a list");
            Ok(hosts.iter().all(|host| host["state"] == "up" && host["connected"] == true))
        };
        until("c0", "all hosts' being connected", Duration::from_secs(60), up).expect("they come back");
    }
}

/// A server's first address.
pub(crate) fn address(server: &Value) -> String {
    let address = &server["addresses"]["blue"][0]["addr"];
    address.as_str().unwrap_or_else(|| panic!("it has no address: {server:#}")).to_owned()
}

/// QEMU processes of a host: their number there and their guest's name.
pub(crate) fn guests(host: &Host) -> Vec<(String, String)> {
    let listed = host.exec(&["ps", "-eo", "pid=,args="]).expect("ps runs");
    let lines = listed.lines().map(str::trim).filter_map(|line| line.split_once(' '));
    let ours = lines.filter(|(_, line)| line.trim_start().starts_with("/usr/bin/qemu-system"));
    ours.map(|(process, line)| {
        let name = line.split_whitespace().find_map(|word| word.strip_prefix("guest=")).unwrap_or(line);
        (process.to_owned(), name.split(',').next().unwrap_or(name).to_owned())
    })
    .collect()
}

/// Instances that hold something on a host, by the host's own durable word.
pub(crate) fn reservations(host: &Host) -> Vec<String> {
    let kept = kept_reservations(host);
    let kept = kept.as_array().into_iter().flatten();
    kept.filter_map(|reservation| reservation["instance"].as_str().map(str::to_owned)).collect()
}

/// The agent's reservations as they are on disk.
pub(crate) fn kept_reservations(host: &Host) -> Value {
    let text = std::fs::read(host.file("lib/godwit/reservations.json")).unwrap_or_default();
    serde_json::from_slice(&text).unwrap_or_default()
}

fn migration_sockets(host: &Host) -> Vec<String> {
    let entries = std::fs::read_dir(host.file("run/godwit/migrations")).into_iter().flatten().flatten();
    entries.map(|entry| entry.path().display().to_string()).collect()
}

/// The forwarding entries of a host's VXLAN devices.
pub(crate) fn forwarding(host: &Host) -> BTreeSet<String> {
    let listed = host.exec(&["bridge", "fdb", "show"]).expect("bridge runs");
    listed.lines().filter(|line| line.contains(" dst ")).map(|line| line.trim().to_owned()).collect()
}

/// The agent's figures of VXLAN packets, by their labels.
pub(crate) fn vxlan_packets(host: &Host) -> Vec<(String, u64)> {
    let text = host.exec(&["curl", "-sSf", "http://127.0.0.1:9177/metrics"]).expect("the agent answers");
    let lines = text.lines().filter_map(|line| line.strip_prefix("godwit_vxlan_packets_total"));
    lines
        .filter_map(|line| line.rsplit_once(' '))
        .map(|(labels, count)| (labels.to_owned(), count.parse().expect("is a count")))
        .collect()
}

/// A file of a host's pool, which may be another one than the lab's.
pub(crate) fn pool_file(host: &Host, path: &str) -> PathBuf {
    let root = format!("/proc/{}/root/srv/godwit", host.init_process().expect("it is on"));
    Path::new(&root).join(path)
}

/// A file of a server's as a host sees it.
pub(crate) fn instance_file(host: &Host, server: &Value, name: &str) -> PathBuf {
    pool_file(host, "instances").join(server["id"].as_str().expect("has one")).join(name)
}

/// Gives a host a pool of its own.
pub(crate) fn part(host: &Host) {
    host.exec(&["mount", "-t", "tmpfs", "tmpfs", "/srv/godwit"]).expect("is mounted");
}

/// Ends that, when nothing is left in it.
pub(crate) fn join(host: &Host) {
    let left = host.exec(&["find", "/srv/godwit", "-mindepth", "2"]).expect("find runs");
    assert_eq!(left, "", "something is left in the pool of {}", host.name());
    host.exec(&["umount", "/srv/godwit"]).expect("is unmounted");
}
