//! A stand-in for a guest: a network namespace attached to a network's bridge on a host.

use std::ffi::OsStr;
use std::process::{Output, Stdio};

use super::LabError;
use super::control::Setup;
use super::host::{Host, Running};
use super::namespace::{Namespace, line};

/// A namespace with one link that has a port's MAC and address. Its own end dies with it, or with its host.
#[derive(Debug)]
pub struct Probe {
    namespace: Namespace,
}

/// What a probe stands for.
#[derive(Debug, Clone)]
pub struct ProbePort {
    /// The port's id; the link on the host is named by it as a guest's would be.
    pub id: String,
    /// The port's MAC address.
    pub mac: String,
    /// The port's address with its prefix length: "10.0.0.9/24".
    pub address: String,
    /// The network's number; its bridge must be on the host.
    pub vni: u32,
    /// The network's MTU.
    pub mtu: u32,
}

impl Probe {
    pub(super) fn attach(keeper: &std::path::Path, host: &Host, port: &ProbePort) -> Result<Probe, LabError> {
        let init = host.init_process()?.to_string();
        let name = format!("probe at {}", host.name());
        let namespace = Namespace::create(&name, keeper, "net", &["--inside", &init], &Setup::default())?;
        let tap = tap_name(&port.id);
        // The move is done from outside, where both processes have numbers: the host's namespaces are entered
        // for the link only, and the peer is named by its process as seen in the host.
        let inner = inner_process(namespace.process())?;
        let mtu = port.mtu.to_string();
        host.exec(&[
            "ip", "link", "add", &tap, "mtu", &mtu, "type", "veth", "peer", "name", "eth0", "mtu", &mtu,
            "address", &port.mac, "netns", &inner,
        ])?;
        host.exec(&["ip", "link", "set", &tap, "master", &format!("gwb{}", port.vni), "up"])?;
        namespace.run(&["ip", "link", "set", "lo", "up"])?;
        namespace.run(&["ip", "link", "set", "eth0", "up"])?;
        // No duplicate address detection: the address is ours by decree.
        namespace.run(&["ip", "address", "add", &port.address, "dev", "eth0", "nodad"])?;
        Ok(Probe { namespace })
    }

    /// Runs a command in the probe to its end, and returns its stdout. Exit codes other than 0 are errors.
    pub fn exec<S: AsRef<OsStr>>(&self, words: &[S]) -> Result<String, LabError> {
        self.namespace.run(words)
    }

    /// Runs a command in the probe to its end, whatever its end.
    pub fn output<S: AsRef<OsStr>>(&self, words: &[S]) -> Result<Output, LabError> {
        self.namespace.output(words)
    }

    /// Starts a command in the probe, with its output piped to the caller.
    pub fn spawn<S: AsRef<OsStr>>(&self, words: &[S]) -> Result<Running, LabError> {
        let mut command = self.namespace.command(words);
        Running::start(
            command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()),
            &line(words),
        )
    }
}

impl Drop for Probe {
    fn drop(&mut self) {
        // The end of the namespace would do it too, but some time later.
        let _ = self.namespace.output(&["ip", "link", "delete", "eth0"]);
    }
}

/// The name that a port's link has on its host.
pub fn tap_name(port_id: &str) -> String {
    let digits: String = port_id.chars().filter(|c| *c != '-').take(11).collect();
    format!("gwt{digits}")
}

/// A process's number in the innermost PID namespace it is in (proc_pid_status(5), NSpid).
fn inner_process(process: i32) -> Result<String, LabError> {
    let path = format!("/proc/{process}/status");
    let status = std::fs::read_to_string(&path).map_err(LabError::io(format!("cannot read {path}")))?;
    let numbers = status.lines().find_map(|line| line.strip_prefix("NSpid:"));
    let inner = numbers.and_then(|numbers| numbers.split_whitespace().last());
    inner
        .map(str::to_owned)
        .ok_or_else(|| LabError::Host { host: "probe".to_owned(), message: format!("{path} has no NSpid") })
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_ports_link_is_named_by_eleven_digits_of_its_id() {
        assert_eq!(super::tap_name("0a1b2c3d-4e5f-6071-8293-a4b5c6d7e8f9"), "gwt0a1b2c3d4e5");
    }
}
