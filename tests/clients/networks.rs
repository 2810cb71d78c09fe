//! Networks of the provider, as the `openstack` command makes them, and a flat one on its host.

use std::time::Duration;

use crate::stage::Stage;
use godwit_tests::lab::{LabOptions, until};
use serde_json::{Value, json};

#[test]
fn provider_networks_of_the_openstack_command_are_made_refused_and_carried_by_their_link() {
    let defaults = LabOptions::default();
    let stage = Stage::with(LabOptions {
        hosts: 1,
        agent_settings: format!("physical_networks = {{ outside = \"eth7\" }}\n{}", defaults.agent_settings),
        coordinator_settings: "vlan_ranges = { outside = \"100:101\" }\n".to_owned(),
        ..defaults
    });
    let host = stage.host("h1");
    host.exec(&["ip", "link", "add", "eth7", "type", "veth", "peer", "name", "eth8"]).expect("is made");
    stage.lab().set_baseline().expect("is listed");
    until("c0", "the link's being known", Duration::from_secs(30), || {
        let shown = stage.lab().coordinator().cli_json(&["host", "show", "h1"])?;
        Ok(shown.to_string().contains("outside"))
    })
    .unwrap_or_else(|error| panic!("{error}"));

    let provider = |kind: &'static str| {
        ["network", "create", "--provider-network-type", kind, "--provider-physical-network", "outside"]
    };
    let facts = |made: &Value| {
        let facts = ["provider:network_type", "provider:physical_network", "provider:segmentation_id"];
        facts.map(|fact| made[fact].clone())
    };
    let tagged = stage.json(&[&provider("vlan")[..], &["--provider-segment", "42", "tagged"]].concat());
    assert_eq!(facts(&tagged), [json!("vlan"), json!("outside"), json!(42)], "{tagged}");
    let chosen = stage.json(&[&provider("vlan")[..], &["chosen"]].concat());
    assert!([json!(100), json!(101)].contains(&facts(&chosen)[2]), "{chosen}");
    let flat = stage.json(&[&provider("flat")[..], &["flat"]].concat());
    assert_eq!(facts(&flat), [json!("flat"), json!("outside"), Value::Null], "{flat}");
    let refused = |line: &[&str], part: &str| {
        let said = stage.refused(&[&["openstack"][..], line].concat());
        assert!(said.contains(part), "{said}");
    };
    refused(&[&provider("vlan")[..], &["--provider-segment", "42", "x"]].concat(), "in use by network");
    refused(&[&provider("flat")[..], &["x"]].concat(), "in use by network");
    let elsewhere = ["network", "create", "--provider-network-type", "flat", "--provider-physical-network"];
    refused(&[&elsewhere[..], &["inside", "x"]].concat(), "'inside' unknown");

    let range = ["subnet", "create", "--network", "flat", "--subnet-range", "10.8.0.0/24"];
    let told = ["--dns-nameserver", "10.8.0.53", "--host-route", "destination=192.0.2.0/24,gateway=10.8.0.9"];
    let subnet = stage.json(&[&range[..], &told, &["sub"]].concat());
    assert_eq!(subnet["dns_nameservers"], json!(["10.8.0.53"]), "{subnet}");
    let route = json!([{ "destination": "192.0.2.0/24", "nexthop": "10.8.0.9" }]);
    assert_eq!(subnet["host_routes"], route, "{subnet}");
    refused(&["subnet", "create", "--network", "flat", "--subnet-range", "10.8.0.128/25", "x"], "overlaps");

    stage.run(&["openstack", "port", "create", "--network", "flat", "--host", "h1", "bound"]);
    let carried = || Ok(host.exec(&["ip", "link", "show", "eth7"])?.contains("master gwb"));
    host.wait("the link's being the network's", carried).unwrap_or_else(|error| panic!("{error}"));
    stage.run(&["openstack", "port", "delete", "bound"]);
    stage.run(&["openstack", "network", "delete", "tagged", "chosen", "flat"]);
    stage.is_clean();
}
