//! The network API through the router.

use crate::api::compute::tests::Scene;
use crate::api::testing::{Answer, As};
use axum::http::Method;
use serde_json::{Value, json};
use std::collections::BTreeSet;

mod provider;

impl Scene {
    async fn net(&self, who: As, method: Method, path: &str, body: Value) -> Answer {
        self.api.ask(who, method, &format!("/network/v2.0{path}"), &[], body).await
    }

    async fn make(&self, path: &str, body: Value) -> Value {
        let answer = self.net(As::Admin, Method::POST, path, body).await;
        assert_eq!(answer.status, 201, "{}", answer.text());
        answer.json()
    }

    async fn refusal(&self, method: Method, path: &str, body: Value) -> (u16, String) {
        let answer = self.net(As::Admin, method, path, body).await;
        let error = &answer.json()["NeutronError"];
        let text = format!(
            "{}: {}",
            error["type"].as_str().unwrap_or("?"),
            error["message"].as_str().unwrap_or("?")
        );
        (answer.status.as_u16(), text)
    }
}

fn names(object: &Value) -> BTreeSet<&str> {
    object.as_object().unwrap().keys().map(String::as_str).collect()
}

const NETWORK: [&str; 16] = [
    "id",
    "name",
    "description",
    "tenant_id",
    "project_id",
    "admin_state_up",
    "status",
    "shared",
    "router:external",
    "mtu",
    "port_security_enabled",
    "subnets",
    "tags",
    "created_at",
    "updated_at",
    "revision_number",
];

#[tokio::test]
async fn a_network_a_subnet_and_a_port_are_made_as_the_openstack_command_asks() {
    let scene = Scene::new().await;
    let network =
        scene.make("/networks", json!({ "network": { "admin_state_up": true, "name": "n" } })).await;
    let network = &network["network"];
    let mut fields: BTreeSet<&str> = NETWORK.into();
    fields.extend(["provider:network_type", "provider:physical_network", "provider:segmentation_id"]);
    assert_eq!(names(network), fields);
    assert_eq!((&network["mtu"], &network["provider:network_type"]), (&json!(1450), &json!("vxlan")));
    assert!((1001..=2000).contains(&network["provider:segmentation_id"].as_u64().unwrap()));
    let body = json!({ "subnet": {
        "network_id": network["id"], "ip_version": 4, "name": "s", "cidr": "10.9.0.0/24",
    } });
    let subnet = scene.make("/subnets", body).await["subnet"].clone();
    assert_eq!(subnet["gateway_ip"], "10.9.0.1");
    assert_eq!(subnet["allocation_pools"], json!([{ "start": "10.9.0.2", "end": "10.9.0.254" }]));
    let body = json!({ "port": { "network_id": network["id"], "admin_state_up": true, "name": "p" } });
    let port = scene.make("/ports", body).await["port"].clone();
    assert_eq!(port["fixed_ips"], json!([{ "subnet_id": subnet["id"], "ip_address": "10.9.0.2" }]));
    assert!(port["mac_address"].as_str().unwrap().starts_with("fa:16:3e:"));
    assert_eq!((&port["status"], &port["binding:vif_type"]), (&json!("DOWN"), &json!("unbound")));
    let path = format!("/networks/{}", network["id"].as_str().unwrap());
    let shown = scene.net(As::Admin, Method::GET, &path, Value::Null).await.json();
    assert_eq!(shown["network"]["subnets"], json!([subnet["id"]]));
}

#[tokio::test]
async fn an_external_port_is_plugged_in_on_its_host_and_hosts_are_told() {
    let scene = Scene::new().await;
    let before = scene.api.app.ledger.read(|fleet| fleet.networks[&scene.network].generation);
    let body = json!({ "port": { "network_id": scene.network, "binding:host_id": "h1" } });
    let port = scene.make("/ports", body).await["port"].clone();
    let bound = ("h1", "bridge", "ACTIVE");
    assert_eq!(
        (port["binding:host_id"].as_str(), port["binding:vif_type"].as_str(), port["status"].as_str()),
        (Some(bound.0), Some(bound.1), Some(bound.2))
    );
    let after = scene.api.app.ledger.read(|fleet| fleet.networks[&scene.network].generation);
    assert_eq!(after, before + 1, "a newer state than any that a host has");
    let path = format!("/ports/{}", port["id"].as_str().unwrap());
    let moved =
        scene.net(As::Admin, Method::PUT, &path, json!({ "port": { "binding:host_id": "" } })).await.json();
    assert_eq!(moved["port"]["binding:vif_type"], "unbound");
    let unknown = json!({ "port": { "network_id": scene.network, "binding:host_id": "h9" } });
    assert_eq!(scene.refusal(Method::POST, "/ports", unknown).await.0, 404);
}

#[tokio::test]
async fn what_cannot_be_is_refused_with_the_reason() {
    let scene = Scene::new().await;
    let network = scene.network;
    let subnet = |other: Value| {
        let mut body = json!({ "network_id": network, "cidr": "10.1.0.0/24" });
        body.as_object_mut().unwrap().extend(other.as_object().unwrap().clone());
        ("/subnets", json!({ "subnet": body }))
    };
    let port = |other: Value| {
        let mut body = json!({ "network_id": network });
        body.as_object_mut().unwrap().extend(other.as_object().unwrap().clone());
        ("/ports", json!({ "port": body }))
    };
    let net = |body: Value| ("/networks", json!({ "network": body }));
    let ips = |ip: &str| json!({ "fixed_ips": [{ "ip_address": ip }] });
    for ((path, body), code, part) in [
        (net(json!({ "mtu": 9000 })), 400, "1450"),
        (net(json!({ "mtu": 900 })), 400, "1280"),
        (net(json!({ "router:external": true })), 400, "not supported"),
        (net(json!({ "provider:network_type": "gre" })), 400, "network_type value 'gre' not supported"),
        (net(json!({ "provider:segmentation_id": 1001 })), 409, "taken"),
        (net(json!({ "provider:segmentation_id": 0 })), 400, "1 to 16777215"),
        (net(json!({ "admin_state_up": false })), 400, "admin_state_up"),
        (net(json!({ "colour": 1 })), 400, "Unrecognized attribute(s) 'colour'"),
        (subnet(json!({ "cidr": "10.0.0.128/25" })), 400, "overlaps"),
        (subnet(json!({ "cidr": "10.1.0.5/24" })), 400, "10.1.0.0/24"),
        (subnet(json!({ "cidr": "no" })), 400, "cidr"),
        (subnet(json!({ "ip_version": 6 })), 400, "ip_version 6"),
        (subnet(json!({ "gateway_ip": "10.2.0.1" })), 400, "gateway"),
        (subnet(json!({ "allocation_pools": [{ "start": "10.1.0.1", "end": "10.1.0.9" }] })), 409, "gateway"),
        (
            subnet(json!({ "allocation_pools": [{ "start": "10.1.0.9", "end": "10.1.0.5" }] })),
            400,
            "backwards",
        ),
        (subnet(json!({ "network_id": "n" })), 404, "NetworkNotFound"),
        (port(ips("10.0.0.5")), 409, "in use"),
        (port(ips("10.0.0.1")), 409, "in use"),
        (port(ips("10.7.0.1")), 400, "no usable address"),
        (port(json!({ "mac_address": "fa:16:3e:00:00:05" })), 409, "in use"),
        (port(json!({ "mac_address": "ff:ff:ff:ff:ff:ff" })), 400, "NIC"),
        (port(json!({ "security_groups": ["x"] })), 404, "SecurityGroupNotFound"),
        (port(json!({ "allowed_address_pairs": [{}] })), 400, "ip_address"),
        (port(json!({ "allowed_address_pairs": [{ "ip_address": "no" }] })), 400, "IP subnet"),
        (
            port(
                json!({ "port_security_enabled": false, "allowed_address_pairs": [{ "ip_address": "1.2.3.4" }] }),
            ),
            409,
            "Port Security must be enabled",
        ),
        (port(json!({ "network_id": "n" })), 404, "NetworkNotFound"),
    ] {
        let (status, text) = scene.refusal(Method::POST, path, body.clone()).await;
        assert_eq!(status, code, "{body}: {text}");
        assert!(text.contains(part), "{body}: {text}");
    }
}

#[tokio::test]
async fn what_is_in_use_is_not_deleted() {
    let scene = Scene::new().await;
    let port = scene.api.app.ledger.read(|fleet| fleet.ports.values().next().unwrap().id);
    for (path, kind) in [
        (format!("/networks/{}", scene.network), "NetworkInUse"),
        (format!("/subnets/{}", scene.subnet), "SubnetInUse"),
        (format!("/ports/{port}"), "PortInUse"),
    ] {
        let (status, text) = scene.refusal(Method::DELETE, &path, Value::Null).await;
        assert_eq!(status, 409, "{text}");
        assert!(text.starts_with(kind), "{text}");
    }
    let free = scene.make("/networks", json!({ "network": {} })).await["network"]["id"].clone();
    let body = json!({ "subnet": { "network_id": free, "cidr": "10.5.0.0/24" } });
    let subnet = scene.make("/subnets", body).await["subnet"]["id"].clone();
    let path = format!("/networks/{}", free.as_str().unwrap());
    assert_eq!(scene.net(As::Admin, Method::DELETE, &path, Value::Null).await.status, 204);
    let path = format!("/subnets/{}", subnet.as_str().unwrap());
    assert_eq!(
        scene.net(As::Admin, Method::GET, &path, Value::Null).await.status,
        404,
        "it went with its network"
    );
}

#[tokio::test]
async fn several_are_made_at_once_or_none_at_all() {
    let scene = Scene::new().await;
    let one = json!({ "network_id": scene.network });
    let made = scene.make("/ports", json!({ "ports": [one, one, one] })).await;
    let ips: BTreeSet<String> = made["ports"]
        .as_array()
        .unwrap()
        .iter()
        .map(|p| p["fixed_ips"][0]["ip_address"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(ips.len(), 3, "each sees those before it");
    let before = scene.api.app.ledger.read(|fleet| fleet.ports.len());
    let twice = json!({ "network_id": scene.network, "fixed_ips": [{ "ip_address": "10.0.0.77" }] });
    let (status, _) = scene.refusal(Method::POST, "/ports", json!({ "ports": [twice, twice] })).await;
    assert_eq!(status, 409);
    assert_eq!(scene.api.app.ledger.read(|fleet| fleet.ports.len()), before);
}

#[tokio::test]
async fn numbers_for_networks_run_out_with_a_clear_answer() {
    let scene = Scene::new().await;
    let many: Vec<Value> = (0..999).map(|i| json!({ "name": format!("n{i}") })).collect();
    scene.make("/networks", json!({ "networks": many })).await;
    let (status, text) = scene.refusal(Method::POST, "/networks", json!({ "network": {} })).await;
    assert_eq!(status, 409);
    assert!(text.contains("1001 to 2000") && text.contains("vni_range"), "{text}");
}

#[tokio::test]
async fn addresses_run_out_with_a_clear_answer_and_come_back() {
    let scene = Scene::new().await;
    let network = scene.make("/networks", json!({ "network": {} })).await["network"]["id"].clone();
    let body = json!({ "subnet": { "network_id": network, "cidr": "10.5.0.0/30" } });
    scene.make("/subnets", body).await;
    let body = json!({ "port": { "network_id": network } });
    let port = scene.make("/ports", body.clone()).await["port"].clone();
    let (status, text) = scene.refusal(Method::POST, "/ports", body.clone()).await;
    assert_eq!(status, 409);
    assert!(text.contains("No more addresses are free") && text.contains("add a subnet"), "{text}");
    let path = format!("/ports/{}", port["id"].as_str().unwrap());
    assert_eq!(scene.net(As::Admin, Method::DELETE, &path, Value::Null).await.status, 204);
    let again = scene.make("/ports", body).await["port"].clone();
    assert_eq!(again["fixed_ips"][0]["ip_address"], "10.5.0.2");
}

#[tokio::test]
async fn other_projects_see_a_network_only_when_it_is_shared() {
    let scene = Scene::new().await;
    let path = format!("/networks/{}", scene.network);
    assert_eq!(scene.net(As::Member, Method::GET, &path, Value::Null).await.status, 404);
    let shared = json!({ "network": { "shared": true } });
    assert_eq!(scene.net(As::Admin, Method::PUT, &path, shared.clone()).await.status, 200);
    let seen = scene.net(As::Member, Method::GET, &path, Value::Null).await.json();
    assert_eq!(names(&seen["network"]), NETWORK.into(), "and no number of the provider's");
    assert_eq!(
        scene.net(As::Member, Method::PUT, &path, json!({ "network": { "name": "x" } })).await.status,
        403
    );
    assert_eq!(scene.net(As::Member, Method::PUT, &path, shared).await.status, 403);
    let own = json!({ "port": { "network_id": scene.network } });
    assert_eq!(scene.net(As::Member, Method::POST, "/ports", own.clone()).await.status, 201);
    assert_eq!(scene.net(As::Reader, Method::POST, "/ports", own).await.status, 403);
    let (status, text) = scene.refusal(Method::PUT, &path, json!({ "network": { "shared": false } })).await;
    assert_eq!(status, 409, "{text}");
}

#[tokio::test]
async fn lists_take_the_filters_that_clients_send() {
    let scene = Scene::new().await;
    scene.make("/networks", json!({ "network": { "name": "other" } })).await;
    for (query, count) in [
        ("networks?name=net1", 1),
        ("networks?name=net1&name=other", 2),
        ("networks?router:external=False", 2),
        ("networks?limit=1", 1),
        ("ports?fields=id&fields=name&fields=mac_address&fields=fixed_ips&fields=status", 1),
        ("ports?fixed_ips=ip_address%3D10.0.0.5", 1),
        ("ports?device_id=none", 0),
        ("subnets?cidr=10.0.0.0/24", 1),
    ] {
        let listed = scene.net(As::Admin, Method::GET, &format!("/{query}"), Value::Null).await.json();
        let name = query.split('?').next().unwrap();
        assert_eq!(listed[name].as_array().unwrap().len(), count, "{query}");
    }
    assert_eq!(scene.net(As::Admin, Method::GET, "/networks?colour=red", Value::Null).await.status, 400);
    assert_eq!(scene.net(As::Admin, Method::GET, "/networks/net1", Value::Null).await.status, 404);
}

#[tokio::test]
async fn a_change_counts_revisions_and_tags_are_kept() {
    let scene = Scene::new().await;
    let path = format!("/subnets/{}", scene.subnet);
    let body = json!({ "subnet": { "name": "new", "dns_nameservers": ["10.0.0.9"], "gateway_ip": null } });
    let changed = scene.net(As::Admin, Method::PUT, &path, body).await.json();
    let subnet = &changed["subnet"];
    assert_eq!(
        (&subnet["name"], &subnet["gateway_ip"], &subnet["revision_number"]),
        (&json!("new"), &json!(null), &json!(2))
    );
    let generation = || scene.api.app.ledger.read(|fleet| fleet.networks[&scene.network].generation);
    let before = generation();
    let tags = json!({ "tags": ["a", "b"] });
    assert_eq!(scene.net(As::Admin, Method::PUT, &format!("{path}/tags"), tags.clone()).await.json(), tags);
    let body = json!({ "subnet": { "name": "newer", "dns_nameservers": ["10.0.0.9"] } });
    assert_eq!(scene.net(As::Admin, Method::PUT, &path, body).await.status, 200);
    assert_eq!(generation(), before, "nothing that hosts are told");
    let body = json!({ "subnet": { "dns_nameservers": ["10.0.0.10"] } });
    assert_eq!(scene.net(As::Admin, Method::PUT, &path, body).await.status, 200);
    assert_eq!(generation(), before + 1);
    let listed = scene.net(As::Admin, Method::GET, "/subnets?tags=a,b", Value::Null).await.json();
    assert_eq!(listed["subnets"][0]["dns_nameservers"], json!(["10.0.0.10"]));
    assert_eq!(scene.net(As::Admin, Method::DELETE, &format!("{path}/tags"), Value::Null).await.status, 204);
}

#[tokio::test]
async fn agents_extensions_and_quotas_are_told_truthfully() {
    let scene = Scene::new().await;
    let agents = scene.net(As::Admin, Method::GET, "/agents", Value::Null).await.json();
    let agent = &agents["agents"][0];
    assert_eq!(
        (&agent["host"], &agent["binary"], &agent["alive"]),
        (&json!("h1"), &json!("godwit-agent"), &json!(false))
    );
    assert_eq!(scene.net(As::Member, Method::GET, "/agents", Value::Null).await.status, 403);
    let listed = scene.net(As::Admin, Method::GET, "/extensions", Value::Null).await.json();
    for extension in listed["extensions"].as_array().unwrap() {
        let path = format!("/extensions/{}", extension["alias"].as_str().unwrap());
        assert_eq!(scene.net(As::Admin, Method::GET, &path, Value::Null).await.status, 200);
    }
    for absent in ["address-group", "router", "Availability%20Zone", "tag-ports-during-bulk-creation"] {
        let path = format!("/extensions/{absent}");
        assert_eq!(scene.net(As::Admin, Method::GET, &path, Value::Null).await.status, 404, "{absent}");
    }
    let answer = scene.net(As::Admin, Method::GET, "/routers?fields=id", Value::Null).await;
    assert_eq!(answer.status, 404);
    assert!(answer.json().to_string().contains("no routers here"), "{:?}", answer.json());
    let project = scene.api.admin.1;
    let quota =
        scene.net(As::Admin, Method::GET, &format!("/quotas/{project}/details"), Value::Null).await.json();
    assert_eq!(quota["quota"]["port"], json!({ "limit": -1, "used": 1, "reserved": 0 }));
    let root = scene.api.ask(As::Nobody, Method::GET, "/network", &[], Value::Null).await.json();
    assert_eq!(root["versions"][0]["id"], "v2.0");
}
