//! Commands as a user types them, shown and run.

use super::DemoError;
use godwit_tests::lab::{Lab, LabError, POOL, Pings, Probe, ProbePort, until};
use serde_json::Value;
use std::time::{Duration, Instant};

/// Where the demo acts.
pub(super) struct Stage<'a> {
    lab: &'a Lab,
    started: Instant,
}

/// A server as the API shows it.
#[derive(Debug, Clone)]
pub(super) struct Server {
    pub host: String,
    pub address: String,
}

/// The name of the port that h3 pings from.
const PROBE_PORT: &str = "h3-probe";

impl<'a> Stage<'a> {
    pub(super) fn new(lab: &'a Lab, started: Instant) -> Self {
        Self { lab, started }
    }

    /// A heading with the time.
    pub(super) fn act(&self, title: &str) {
        println!("\n== {:5.1} s  {title}", self.started.elapsed().as_secs_f64());
    }

    /// A line of explanation.
    pub(super) fn say(&self, text: &str) {
        println!("   {text}");
    }

    /// Runs `godwit` with `arguments`, shown before and with its output after.
    pub(super) fn run(&self, arguments: &[&str]) -> Result<(), DemoError> {
        show(arguments);
        print!("{}", self.lab.coordinator().cli(arguments)?);
        Ok(())
    }

    /// Runs `godwit` with `arguments`, which must fail; shows why it did.
    pub(super) fn expect_failure(&self, arguments: &[&str]) -> Result<(), DemoError> {
        show(arguments);
        let output = self.lab.coordinator().cli_output(arguments)?;
        print!("{}", String::from_utf8_lossy(&output.stderr));
        if output.status.success() {
            return Err(DemoError::Unexpected(format!("`godwit {}` was to be refused", arguments.join(" "))));
        }
        println!("(exit code {})", output.status.code().unwrap_or(-1));
        Ok(())
    }

    /// A server's place and first address.
    pub(super) fn server(&self, name: &str) -> Result<Server, DemoError> {
        let shown = self.lab.coordinator().cli_json(&["server", "show", name])?;
        let address = shown["addresses"].as_object().and_then(|nets| {
            nets.values()
                .flat_map(|list| list.as_array().into_iter().flatten())
                .find_map(|a| a["addr"].as_str())
        });
        match (shown["OS-EXT-SRV-ATTR:host"].as_str(), address) {
            (Some(host), Some(address)) => Ok(Server { host: host.to_owned(), address: address.to_owned() }),
            _ => Err(DemoError::Unexpected(format!("server {name} shows no host or address: {shown}"))),
        }
    }

    /// Makes a key pair for SSH in the coordinator's private folder; returns its path.
    pub(super) fn ssh_key(&self) -> Result<String, DemoError> {
        let path = "/run/demo-key".to_owned();
        let words = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "demo", "-f", &path];
        println!("c0$ ssh-keygen -q -t ed25519 -N '' -f {path}");
        self.lab.coordinator().host().exec(&words)?;
        Ok(path)
    }

    /// A port on a host that no server has, and a namespace behind it that stands for a machine of one's own.
    pub(super) fn probe(&self, host_name: &str) -> Result<Probe, DemoError> {
        let arguments = ["port", "create", "blue", "--name", PROBE_PORT, "--host", host_name];
        show(&arguments);
        let port = self.lab.coordinator().cli_json(&arguments)?;
        let network = self.lab.coordinator().cli_json(&["network", "show", "blue"])?;
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let vni = network["provider:segmentation_id"].as_u64().unwrap_or_default() as u32;
        let probe_port = ProbePort {
            id: text(&port["id"]),
            mac: text(&port["mac_address"]),
            address: format!("{}/24", text(&port["fixed_ips"][0]["ip_address"])),
            vni,
            mtu: network["mtu"].as_u64().unwrap_or(1450) as u32,
        };
        let host = self.lab.hosts().iter().find(|h| h.name() == host_name);
        let host = host.ok_or_else(|| DemoError::Unexpected(format!("no host {host_name}")))?;
        let bridge = format!("gwb{vni}");
        until(host_name, "the network's bridge", Duration::from_secs(10), || {
            Ok(host.output(&["ip", "link", "show", &bridge])?.status.success())
        })?;
        Ok(self.lab.probe(host, &probe_port)?)
    }

    /// Deletes the port of [`Self::probe`].
    pub(super) fn delete_probe_port(&self) -> Result<(), DemoError> {
        self.run(&["port", "delete", PROBE_PORT])
    }

    /// Waits until a guest lets us in.
    pub(super) fn wait_for_ssh(&self, probe: &Probe, key: &str, server: &Server) -> Result<(), DemoError> {
        let key = self.key_outside(key);
        let words = ssh_words(&key, &server.address, "true");
        Ok(until("h3", "a guest's answering SSH", Duration::from_secs(60), || {
            Ok(probe.output(&words)?.status.success())
        })?)
    }

    /// Runs a command in a guest, and shows it.
    pub(super) fn ssh(&self, probe: &Probe, key: &str, server: &Server, line: &str) -> Result<(), DemoError> {
        println!("h3$ ssh root@{} {line}", server.address);
        print!("{}", probe.exec(&ssh_words(&self.key_outside(key), &server.address, line))?);
        Ok(())
    }

    /// Starts pinging a guest every 10 ms.
    pub(super) fn pings(&self, probe: &Probe, server: &Server) -> Result<Pings, DemoError> {
        println!("h3$ ping -D -n -i 0.01 {} &", server.address);
        Ok(Pings::start(probe, &server.address, Duration::from_millis(10))?)
    }

    /// The key as the probe sees it: the probe shares the files of the machine, not those of c0.
    fn key_outside(&self, key: &str) -> String {
        let inside = key.trim_start_matches("/run/");
        self.lab.coordinator().host().file("run").join(inside).to_string_lossy().into_owned()
    }

    /// Live-migrates a server to a host; returns the operator API's record of the migration.
    pub(super) fn migrate(&self, name: &str, host: &str) -> Result<Value, DemoError> {
        let arguments = ["server", "migrate", name, "--host", host, "--wait"];
        show(&arguments);
        Ok(self.lab.coordinator().cli_json(&arguments)?)
    }

    /// Shows what the kernel counted of VXLAN on a host.
    pub(super) fn metrics(&self, host_name: &str) -> Result<(), DemoError> {
        println!("{host_name}$ curl -s http://127.0.0.1:9177/metrics | grep ^godwit_vxlan_packets_total");
        let host = self.lab.hosts().iter().find(|h| h.name() == host_name);
        let host = host.ok_or_else(|| DemoError::Unexpected(format!("no host {host_name}")))?;
        let text = host.exec(&["curl", "-sSf", "http://127.0.0.1:9177/metrics"])?;
        let lines: Vec<&str> = text.lines().filter(|l| l.starts_with("godwit_vxlan_packets_total")).collect();
        if lines.is_empty() {
            return Err(DemoError::Unexpected(format!("{host_name} counts no VXLAN packets")));
        }
        println!("{}", lines.join("\n"));
        Ok(())
    }

    /// Shows why a flavor fits nowhere; returns how many hosts gave a rule with need and have.
    pub(super) fn explain(&self, flavor: &str) -> Result<usize, DemoError> {
        let arguments = ["placement", "explain", "--flavor", flavor];
        self.run(&arguments)?;
        let answer = self.lab.coordinator().cli_json(&arguments)?;
        let hosts = answer["hosts"].as_array().or_else(|| answer.as_array()).cloned().unwrap_or_default();
        let told = |key: &str, host: &Value| !host[key].is_null();
        let explained = hosts
            .iter()
            .filter(|h| h["fits"] == false && ["rule", "need", "have"].iter().all(|k| told(k, h)));
        Ok(explained.count())
    }

    /// What the hosts still hold, once they had time to take networks down.
    pub(super) fn leftovers(&self) -> Result<Vec<String>, DemoError> {
        println!(
            "(each host: domains, taps, bridges, VXLAN devices, QEMU and worker processes, BPF pins, files in {POOL})"
        );
        let mut left = Vec::new();
        let waited = until("the lab", "the hosts' being clean", Duration::from_secs(15), || {
            left = self.lab.leftovers()?;
            Ok(left.is_empty())
        });
        match waited {
            Ok(()) | Err(LabError::Late { .. }) => Ok(left),
            Err(error) => Err(error.into()),
        }
    }
}

fn show(arguments: &[&str]) {
    println!("$ godwit {}", arguments.join(" "));
}

fn ssh_words(key: &str, address: &str, line: &str) -> Vec<String> {
    let options = [
        "ssh",
        "-i",
        key,
        "-o",
        "StrictHostKeyChecking=no",
        "-o",
        "UserKnownHostsFile=/dev/null",
        "-o",
        "LogLevel=ERROR",
        "-o",
        "BatchMode=yes",
        "-o",
        "ConnectTimeout=5",
    ];
    let target = format!("root@{address}");
    options.into_iter().chain([target.as_str(), line]).map(str::to_owned).collect()
}

/// Returns on Ctrl-C or SIGTERM.
pub(super) fn wait_for_interrupt() -> std::io::Result<()> {
    let mut signals = nix::sys::signal::SigSet::empty();
    signals.add(nix::sys::signal::SIGINT);
    signals.add(nix::sys::signal::SIGTERM);
    signals.thread_block()?;
    signals.wait()?;
    Ok(())
}
