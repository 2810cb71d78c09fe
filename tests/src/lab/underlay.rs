//! The network between the hosts: a bridge in a namespace of its own, so that nothing of it shows outside.

use std::path::Path;

use super::LabError;
use super::control::Setup;
use super::namespace::Namespace;

/// The underlay's switch. Its first process also removes the lab's folder at the end, whatever ended the lab.
#[derive(Debug)]
pub(super) struct Underlay {
    namespace: Namespace,
}

const BRIDGE: &str = "underlay";

impl Underlay {
    pub(super) fn create(keeper: &Path, folder: &Path) -> Result<Underlay, LabError> {
        let setup = Setup { remove_at_end: Some(folder.to_path_buf()), ..Setup::default() };
        let namespace = Namespace::create("underlay", keeper, "net", &[], &setup)?;
        namespace.run(&["ip", "link", "add", BRIDGE, "type", "bridge", "mcast_snooping", "0"])?;
        namespace.run(&["ip", "link", "set", BRIDGE, "up"])?;
        Ok(Underlay { namespace })
    }

    /// Connects a host's namespace by a cable; its end there is eth0.
    pub(super) fn plug(&self, host: &str, process: i32) -> Result<(), LabError> {
        let port = port(host);
        // A host that lost its power may leave its end of the cable for a moment.
        let _ = self.namespace.output(&["ip", "link", "delete", &port])?;
        let peer = process.to_string();
        self.namespace
            .run(&["ip", "link", "add", &port, "type", "veth", "peer", "name", "eth0", "netns", &peer])?;
        self.namespace.run(&["ip", "link", "set", &port, "master", BRIDGE, "up"]).map(drop)
    }

    /// Unplugs or plugs the cable: the host sees its carrier go and come.
    pub(super) fn set_link(&self, host: &str, up: bool) -> Result<(), LabError> {
        self.namespace.run(&["ip", "link", "set", &port(host), if up { "up" } else { "down" }]).map(drop)
    }

    /// A command that runs where all of the underlay's packets pass: a capture on "underlay" or "to-h1".
    pub(super) fn command(&self, words: &[&str]) -> std::process::Command {
        self.namespace.command(words)
    }
}

fn port(host: &str) -> String {
    format!("to-{host}")
}
