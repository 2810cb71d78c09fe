//! What the `openstack` command shows of the fleet, and networks, flavors and keys without any server.

use crate::stage::Stage;

#[test]
fn the_fleet_is_shown_and_a_disabled_host_gets_no_server() {
    let stage = Stage::start(2);
    let token = stage.json(&["token", "issue"]);
    assert!(token["id"].as_str().is_some_and(|id| id.len() > 20) && token["project_id"].is_string());
    let catalog = stage.json(&["catalog", "list"]).to_string();
    let versions = stage.json(&["versions", "show"]).to_string();
    for service in ["identity", "compute", "image", "network", "placement"] {
        assert!(catalog.contains(service), "{catalog}");
        assert!(versions.contains(service), "{versions}");
    }

    let names = |words: &[&str], column: &str| -> Vec<String> {
        let rows = stage.json(words);
        let rows = rows.as_array().into_iter().flatten();
        let mut names: Vec<String> = rows.filter_map(|row| row[column].as_str().map(str::to_owned)).collect();
        names.sort();
        names
    };
    assert_eq!(names(&["hypervisor", "list", "--long"], "Hypervisor Hostname"), ["h1", "h2"]);
    assert_eq!(names(&["host", "list"], "Host Name"), ["h1", "h2"]);
    assert_eq!(names(&["compute", "service", "list"], "Host"), ["h1", "h2"]);
    assert_eq!(names(&["resource", "provider", "list"], "name"), ["h1", "h2"]);
    assert_eq!(names(&["network", "agent", "list"], "Host"), ["h1", "h2"]);
    assert_eq!(names(&["availability", "zone", "list", "--compute"], "Zone Name"), ["nova"]);
    assert_eq!(names(&["project", "list"], "Name"), ["admin"]);
    assert_eq!(names(&["user", "list"], "Name"), ["admin"]);
    let shown = stage.json(&["hypervisor", "show", "h1"]);
    assert_eq!((&shown["host_ip"], &shown["state"]), (&"198.18.0.11".into(), &"up".into()), "{shown}");
    assert!(shown["vcpus"].as_u64().is_some_and(|count| count > 0), "{shown}");
    assert_eq!(stage.json(&["hypervisor", "stats", "show"])["count"], 2);
    for words in [
        &["quota", "show"][..],
        &["quota", "show", "--usage"],
        &["usage", "show"],
        &["usage", "list"],
        &["limits", "show", "--absolute"],
        &["host", "show", "h1"],
    ] {
        stage.json(words);
    }

    let set = ["openstack", "compute", "service", "set"];
    stage.run(&[&set[..], &["--disable", "--disable-reason", "repair", "h1", "nova-compute"]].concat());
    let listed = stage.json(&["compute", "service", "list", "--long"]);
    let rows = listed.as_array().into_iter().flatten();
    let off: Vec<_> = rows.filter(|row| row["Status"] == "disabled").collect();
    assert!(off.len() == 1 && off[0]["Host"] == "h1" && off[0]["Disabled Reason"] == "repair", "{listed}");
    let fits = stage.lab().coordinator().cli(&["placement", "explain", "--flavor", "m1.tiny", "-q"]);
    assert_eq!(fits.expect("explains").trim(), "h2");
    stage.run(&[&set[..], &["--enable", "h1", "nova-compute"]].concat());
    assert!(!stage.run(&["openstack", "compute", "service", "list"]).contains("disabled"));

    let openstack = |words: &[&str]| stage.run(&[&["openstack"], words].concat());
    openstack(&["aggregate", "create", "--zone", "z1", "agg1"]);
    openstack(&["aggregate", "add", "host", "agg1", "h1"]);
    openstack(&["aggregate", "set", "--property", "numa=1", "agg1"]);
    let shown = stage.json(&["aggregate", "show", "agg1"]);
    assert_eq!((&shown["hosts"][0], &shown["availability_zone"]), (&"h1".into(), &"z1".into()), "{shown}");
    assert!(shown["properties"].to_string().contains("numa"), "{shown}");
    assert_eq!(names(&["aggregate", "list"], "Name"), ["agg1"]);
    assert_eq!(names(&["availability", "zone", "list", "--compute"], "Zone Name"), ["nova", "z1"]);
    let in_zone = ["placement", "explain", "--flavor", "m1.tiny", "--availability-zone", "z1", "-q"];
    assert_eq!(stage.lab().coordinator().cli(&in_zone).expect("explains").trim(), "h1");
    let simulated = ["placement", "simulate", "--flavor", "m1.tiny", "--most", "3", "--json"];
    let simulated = stage.lab().coordinator().cli(&simulated).expect("simulates");
    assert!(simulated.contains("\"placed\": 3"), "{simulated}");
    openstack(&["aggregate", "remove", "host", "agg1", "h1"]);
    openstack(&["aggregate", "delete", "agg1"]);
    openstack(&["server", "group", "create", "--policy", "anti-affinity", "group1"]);
    let group = stage.json(&["server", "group", "show", "group1"]);
    assert!(group.to_string().contains("anti-affinity"), "{group}");
    assert_eq!(names(&["server", "group", "list"], "Name"), ["group1"]);
    openstack(&["server", "group", "delete", "group1"]);
    stage.is_clean();
}

#[test]
fn networks_flavors_and_keys_are_made_shown_and_deleted() {
    let stage = Stage::start(1);
    let flavor = ["flavor", "create", "--ram", "512", "--vcpus", "2", "--disk", "5"];
    let made = stage.json(&[&flavor[..], &["--property", "hw:numa_nodes=1", "numa"]].concat());
    assert_eq!((&made["ram"], &made["vcpus"], &made["disk"]), (&512.into(), &2.into(), &5.into()), "{made}");
    let shown = stage.json(&["flavor", "show", "numa"]);
    assert_eq!(shown["properties"]["hw:numa_nodes"], "1", "{shown}");
    assert!(stage.run(&["openstack", "flavor", "list"]).contains("numa"));

    stage.run(&["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", "/run/key"]);
    let made = stage.json(&["keypair", "create", "--public-key", "/run/key.pub", "key"]);
    let known = stage.run(&["ssh-keygen", "-l", "-E", "md5", "-f", "/run/key.pub"]);
    let fingerprint = made["fingerprint"].as_str().expect("has one");
    assert!(known.contains(fingerprint), "{fingerprint} in {known}");
    assert!(stage.run(&["openstack", "keypair", "list"]).contains("key"));

    let network = stage.json(&["network", "create", "net"]);
    let subnet =
        stage.json(&["subnet", "create", "--network", "net", "--subnet-range", "10.9.0.0/24", "sub"]);
    assert_eq!((&subnet["network_id"], &subnet["gateway_ip"]), (&network["id"], &"10.9.0.1".into()));
    // A port that is bound to a host makes it build the network; nothing else does.
    let host = stage.host("h1");
    let bridge = format!("gwb{}", network["provider:segmentation_id"]);
    let port = stage.json(&["port", "create", "--network", "net", "free"]);
    assert_eq!(port["network_id"], network["id"]);
    assert!(!host.exec(&["ip", "-o", "link"]).expect("runs").contains(&bridge));
    stage.run(&["openstack", "port", "create", "--network", "net", "--host", "h1", "bound"]);
    host.wait("the network's bridge", || Ok(host.exec(&["ip", "-o", "link"])?.contains(&bridge)))
        .unwrap_or_else(|error| panic!("{error}"));
    for (noun, name) in [("network", "net"), ("subnet", "sub"), ("port", "free")] {
        assert!(stage.run(&["openstack", noun, "list"]).contains(name));
        assert_eq!(stage.json(&[noun, "show", name])["name"], name);
    }

    let said = stage.refused(&["openstack", "network", "delete", "net"]);
    assert!(said.contains("use"), "a network with ports stays: {said}");
    stage.run(&["openstack", "port", "delete", "free", "bound"]);
    stage.run(&["openstack", "subnet", "delete", "sub"]);
    stage.run(&["openstack", "network", "delete", "net"]);
    stage.run(&["openstack", "flavor", "delete", "numa"]);
    stage.run(&["openstack", "keypair", "delete", "key"]);
    for noun in ["network", "subnet", "port", "keypair"] {
        assert_eq!(stage.json(&[noun, "list"]), serde_json::json!([]), "{noun}");
    }
    stage.is_clean();
}
