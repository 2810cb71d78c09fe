//! The operator API through the router.

use super::routes;
use crate::api::testing::{Answer, Api, As};
use crate::error::Error;
use crate::fleet::Change;
use crate::fleet::host::{Host, Observed};
use crate::fleet::instance::Flavor;
use crate::fleet::network::{Network, Port};
use crate::ledger::now;
use axum::http::Method;
use godwit_protocol::host::{Cell, Cpu, HypervisorInfo, Inventory, PagePool, PoolReport, Underlay};
use godwit_protocol::id::{HostId, InstanceId, NetworkId, PortId};
use godwit_protocol::request::HostReport;
use godwit_protocol::reservation::{Aspect, Drift};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use uuid::Uuid;

async fn ask(api: &Api, who: As, method: Method, path: &str, body: Value) -> Answer {
    api.ask(who, method, &format!("/operator/v1{path}"), &[], body).await
}

async fn change(api: &Api, changes: Vec<Change>) {
    api.app.ledger.change::<_, Error>(|_| Ok((changes, ()))).await.unwrap();
}

/// A host with one cell of `cpus` shared CPUs and 4 GiB.
fn inventory(name: &str, cpus: u32) -> Inventory {
    let cpu = |id| Cpu { id, package: 0, die: 0, core: id.into(), siblings: vec![id], ..Cpu::default() };
    Inventory {
        hostname: name.into(),
        agent_version: env!("CARGO_PKG_VERSION").into(),
        kernel: "6.12".into(),
        architecture: "x86_64".into(),
        cpu_model: "model".into(),
        hypervisor: HypervisorInfo {
            kind: "QEMU".into(),
            libvirt_version: "11.3.0".into(),
            version: "10.0.2".into(),
            kvm: true,
        },
        cells: vec![Cell {
            id: 0,
            cpus: (0..cpus).map(cpu).collect(),
            memory_bytes: 4 << 30,
            page_pools: vec![PagePool { size_kib: 4, total: 1 << 20, taken: 0 }],
            distances: BTreeMap::from([(0, 10)]),
            shared_cpus: (0..cpus).collect(),
            dedicated_cpus: vec![],
        }],
        reserved_memory_bytes: 0,
        links: vec![],
        underlay: Underlay { link: "eth0".into(), address: "198.18.0.11".parse().unwrap(), mtu: 1500 },
        migration_address: None,
        physical_networks: vec![],
        pools: vec![PoolReport {
            name: "pool".into(),
            path: "/srv/godwit".into(),
            total_bytes: 1 << 40,
            free_bytes: 1 << 40,
            reachable: true,
            ..PoolReport::default()
        }],
    }
}

/// A host that is up.
async fn host(api: &Api, name: &str, cpus: u32) -> HostId {
    let host = Host {
        id: HostId::random(),
        number: 1,
        name: name.into(),
        enabled: true,
        disabled_reason: None,
        drain: None,
        inventory: Some(inventory(name, cpus)),
        joined_at: now(),
        key_digest: String::new(),
    };
    let id = host.id;
    change(api, vec![host.into()]).await;
    let observed = Observed { connected: true, ..Observed::at(now()) };
    api.app.ledger.observe(|fleet| fleet.observed.insert(id, observed));
    id
}

#[tokio::test]
async fn every_route_is_described_and_every_description_has_a_route() {
    let text =
        std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/operator-api.yaml")).unwrap();
    let described: serde_yaml_ng::Value = serde_yaml_ng::from_str(&text).unwrap();
    let described: Value = serde_json::to_value(described).unwrap();
    let paths = described["paths"].as_object().unwrap();
    let served: BTreeSet<&str> = routes().into_iter().map(|(path, _)| path).collect();
    assert_eq!(served, paths.keys().map(String::as_str).collect());
    let api = Api::new().await;
    for (path, methods) in paths {
        let url = path.replace(['{', '}'], "");
        for method in [Method::GET, Method::POST, Method::PUT, Method::DELETE, Method::PATCH] {
            let has = methods.get(method.as_str().to_lowercase()).is_some();
            let answer = ask(&api, As::Admin, method.clone(), &url, json!({})).await;
            assert_eq!(answer.status != 405, has, "{method} {path}: {}", answer.text());
        }
    }
}

#[tokio::test]
async fn what_a_host_says_is_elsewhere_is_listed_and_a_problem() {
    let api = Api::new().await;
    let id = host(&api, "h1", 2).await;
    let drift = Drift {
        instance: InstanceId::random(),
        aspect: Aspect::VcpuThread { vcpu: 1 },
        wanted: "CPUs 3".into(),
        found: "CPUs 0-3".into(),
    };
    let report = HostReport {
        host: id,
        generation: 1,
        inventory: inventory("h1", 2),
        instances: vec![],
        reservations: vec![],
        beside: vec![],
        drifts: vec![drift.clone()],
        networks: vec![],
    };
    api.app.ledger.observe(|fleet| fleet.observed.get_mut(&id).unwrap().report = Some(report));
    let body = ask(&api, As::Admin, Method::GET, "/drifts", json!({})).await.json();
    let expected = json!([{
        "host": "h1", "host_id": id, "server": drift.instance, "server_name": null, "kind": "vcpu_thread",
        "aspect": {"kind": "vcpu_thread", "vcpu": 1}, "wanted": "CPUs 3", "found": "CPUs 0-3",
    }]);
    assert_eq!(body["drifts"], expected);
    let status = ask(&api, As::Admin, Method::GET, "/status", json!({})).await.json();
    assert!(status["problems"].to_string().contains("not where they were reserved"), "{status}");
}

#[tokio::test]
async fn an_inventory_that_contradicts_itself_is_refused_and_the_one_before_stays() {
    let api = Api::new().await;
    let id = host(&api, "h1", 2).await;
    let before = api.app.ledger.read(|fleet| fleet.hosts[&id].inventory.clone());
    type Lie = fn(&mut Inventory);
    let lies: [(Lie, &str); 8] = [
        (|i| i.cells.push(i.cells[0].clone()), "cell 0 is in it twice"),
        (|i| i.cells.push(Cell { id: 1, ..i.cells[0].clone() }), "CPU 0 is in it twice"),
        (|i| i.cells[0].dedicated_cpus.push(9), "shares or dedicates CPU 9"),
        (
            |i| i.cells[0].page_pools.push(PagePool { size_kib: 4, total: 0, taken: 0 }),
            "pages of 4 KiB twice",
        ),
        (|i| i.cells[0].page_pools[0].size_kib = 0, "pages of no size"),
        (|i| i.cells[0].page_pools[0].total = u64::MAX, "KiB in pages"),
        (|i| i.cells[0].page_pools[0].taken = u64::MAX, "others hold"),
        (|i| i.pools[0].free_bytes = u64::MAX, "bytes free of"),
    ];
    for (generation, (lie, text)) in (1..).zip(lies) {
        let mut inventory = inventory("h1", 2);
        lie(&mut inventory);
        let report = HostReport {
            host: id,
            generation,
            inventory,
            instances: vec![],
            reservations: vec![],
            beside: vec![],
            drifts: vec![],
            networks: vec![],
        };
        crate::reconcile::report(&api.app, report).await;
        assert_eq!(api.app.ledger.read(|fleet| fleet.hosts[&id].inventory.clone()), before, "{text}");
        let status = ask(&api, As::Admin, Method::GET, "/status", json!({})).await.json();
        assert!(status["problems"].to_string().contains(text), "{text}: {status}");
    }
}

#[tokio::test]
async fn only_administrators_may_ask() {
    let api = Api::new().await;
    for (method, path) in [
        (Method::GET, "/status"),
        (Method::GET, "/hosts"),
        (Method::GET, "/drifts"),
        (Method::POST, "/join-tokens"),
        (Method::GET, "/operations"),
        (Method::POST, "/placement/explain"),
    ] {
        let body = json!({ "flavor": "1" });
        let body = if path == "/join-tokens" { json!({}) } else { body };
        assert_eq!(ask(&api, As::Member, method.clone(), path, body.clone()).await.status, 403, "{path}");
        let nobody = ask(&api, As::Nobody, method, path, body).await;
        assert_eq!(nobody.status, 401);
        assert!(nobody.json()["error"]["message"].is_string());
    }
}

fn csr() -> String {
    let key = rcgen::KeyPair::generate().unwrap();
    rcgen::CertificateParams::default().serialize_request(&key).unwrap().pem().unwrap()
}

async fn token(api: &Api, body: Value) -> String {
    let answer = ask(api, As::Admin, Method::POST, "/join-tokens", body).await;
    assert_eq!(answer.status, 201, "{}", answer.text());
    answer.json()["token"].as_str().unwrap().to_owned()
}

async fn join(api: &Api, token: &str, hostname: &str) -> Answer {
    let body = json!({ "token": token, "csr": csr(), "hostname": hostname });
    ask(api, As::Nobody, Method::POST, "/join", body).await
}

#[tokio::test]
async fn a_host_joins_once_with_a_token_and_is_gone_when_it_is_removed() {
    let api = Api::new().await;
    let first = token(&api, json!({})).await;
    let joined = join(&api, &first, "h1").await;
    assert_eq!(joined.status, 200, "{}", joined.text());
    assert_eq!(joined.json()["agents_address"], "127.0.0.1:8775");
    let replayed = join(&api, &first, "h2").await;
    assert_eq!(replayed.status, 409);
    assert!(replayed.text().contains("used already"));
    let second = token(&api, json!({ "ttl_seconds": 60 })).await;
    let taken = join(&api, &second, "h1").await;
    assert_eq!(taken.status, 409);
    assert!(taken.text().contains("godwit host remove h1"));
    let forged = format!("{}x", &second[..second.len() - 1]);
    assert_eq!(join(&api, &forged, "h2").await.status, 401);
    assert_eq!(join(&api, &second, "h 2").await.status, 400);
    let hosts = ask(&api, As::Admin, Method::GET, "/hosts", Value::Null).await.json();
    assert_eq!(hosts["hosts"][0]["name"], "h1");
    assert_eq!(hosts["hosts"][0]["state"], "lost");
    assert_eq!(ask(&api, As::Admin, Method::DELETE, "/hosts/h1", Value::Null).await.status, 204);
    assert_eq!(ask(&api, As::Admin, Method::GET, "/hosts/h1", Value::Null).await.status, 404);
    assert_eq!(
        join(&api, &second, "h1").await.status,
        200,
        "the name is free again, the token was not used up"
    );
}

#[tokio::test]
async fn an_expired_join_token_says_how_to_get_a_new_one() {
    let api = Api::new().await;
    let token = token(&api, json!({})).await;
    api.app
        .ledger
        .change::<_, Error>(|fleet| {
            let mut record = fleet.join_tokens.values().next().unwrap().clone();
            record.expires_at = now();
            Ok((vec![record.into()], ()))
        })
        .await
        .unwrap();
    let answer = join(&api, &token, "h1").await;
    assert_eq!(answer.status, 401);
    assert!(answer.text().contains("godwit host token"), "{}", answer.text());
    for body in [json!({ "ttl_seconds": 0 }), json!({ "ttl_seconds": 99_999_999 }), json!({ "ttl": 1 })] {
        assert_eq!(ask(&api, As::Admin, Method::POST, "/join-tokens", body).await.status, 400);
    }
}

#[tokio::test]
async fn a_host_is_shown_by_name_and_id_and_can_be_disabled() {
    let api = Api::new().await;
    let id = host(&api, "h1", 4).await;
    let shown = ask(&api, As::Admin, Method::GET, &format!("/hosts/{id}"), Value::Null).await.json();
    assert_eq!(shown["host"]["state"], "up");
    assert_eq!(shown["host"]["vcpus"], 4);
    assert_eq!(shown["host"]["cells"][0]["id"], 0);
    let off = json!({ "enabled": false, "reason": "new memory" });
    let off = ask(&api, As::Admin, Method::PUT, "/hosts/h1", off).await.json();
    assert_eq!(
        (&off["host"]["enabled"], &off["host"]["disabled_reason"]),
        (&json!(false), &json!("new memory"))
    );
    let on = ask(&api, As::Admin, Method::PUT, "/hosts/h1", json!({ "enabled": true })).await.json();
    assert_eq!(on["host"]["disabled_reason"], Value::Null);
    let status = ask(&api, As::Admin, Method::GET, "/status", Value::Null).await.json();
    assert_eq!((&status["healthy"], &status["hosts"][0]["cells"]), (&json!(true), &json!(1)));
}

#[tokio::test]
async fn a_host_can_be_drained_and_undrained() {
    let api = Api::new().await;
    host(&api, "h1", 4).await;
    let drained = ask(&api, As::Admin, Method::PUT, "/hosts/h1/drain", json!({ "at_once": 2 })).await.json();
    let drained = &drained["host"];
    assert_eq!((&drained["draining"], &drained["enabled"]), (&json!(true), &json!(true)));
    assert_eq!((&drained["drain"]["at_once"], &drained["drain"]["left"]), (&json!(2), &json!([])));
    for (body, told) in [(json!({ "at_once": 0 }), "1 to 16"), (json!({ "all": true }), "all")] {
        let answer = ask(&api, As::Admin, Method::PUT, "/hosts/h1/drain", body).await;
        assert_eq!(answer.status, 400);
        assert!(answer.text().contains(told), "{}", answer.text());
    }
    assert_eq!(ask(&api, As::Admin, Method::PUT, "/hosts/h9/drain", json!({})).await.status, 404);
    let ended = ask(&api, As::Admin, Method::DELETE, "/hosts/h1/drain", Value::Null).await.json();
    assert_eq!((&ended["host"]["draining"], &ended["host"]["drain"]), (&json!(false), &Value::Null));
}

#[tokio::test]
async fn a_host_with_a_bound_port_cannot_be_removed_and_its_tables_are_shown() {
    let api = Api::new().await;
    let here = host(&api, "h1", 4).await;
    let (at, network) = (now(), NetworkId::random());
    let record = Network {
        id: network,
        name: "blue".into(),
        description: String::new(),
        project: api.admin.1,
        vni: 1001,
        port_security: true,
        segment: Default::default(),
        mtu: 1450,
        shared: false,
        admin_state_up: true,
        tags: vec![],
        generation: 3,
        revision: 0,
        created_at: at,
        updated_at: at,
    };
    let port = Port {
        id: PortId::random(),
        network,
        name: String::new(),
        description: String::new(),
        project: api.admin.1,
        mac: "fa:16:3e:00:00:01".parse().unwrap(),
        fixed_ips: vec![],
        instance: None,
        device_id: String::new(),
        device_owner: String::new(),
        index: 0,
        owned_by_instance: false,
        host: Some(here),
        target_host: None,
        admin_state_up: true,
        port_security: true,
        allowed_pairs: Vec::new(),
        security_groups: None,
        tags: vec![],
        revision: 0,
        created_at: at,
        updated_at: at,
    };
    change(&api, vec![record.into(), port.into()]).await;
    let tables = ask(&api, As::Admin, Method::GET, "/networks/blue/l2", Value::Null).await.json();
    assert_eq!((&tables["vni"], &tables["hosts"][0]["agrees"]), (&json!(1001), &json!(false)));
    assert_eq!(tables["hosts"][0]["wanted"]["ports"].as_array().map(Vec::len), Some(1));
    let refused = ask(&api, As::Admin, Method::DELETE, "/hosts/h1", Value::Null).await;
    assert_eq!(refused.status, 409);
    assert!(refused.text().contains("bound to host h1"));
    assert_eq!(ask(&api, As::Admin, Method::GET, "/networks/red/l2", Value::Null).await.status, 404);
}

#[tokio::test]
async fn placement_explains_each_host_and_refuses_a_flavor_that_contradicts_itself() {
    let api = Api::new().await;
    host(&api, "h1", 4).await;
    let flavor = |id: &str, vcpus, specs: &[(&str, &str)]| Flavor {
        id: id.into(),
        name: format!("f{id}"),
        vcpus,
        memory_mib: 1024,
        disk_gib: 1,
        public: true,
        extra_specs: specs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect(),
        description: None,
    };
    let silent = Host {
        id: HostId::random(),
        number: 2,
        name: "h2".into(),
        enabled: true,
        disabled_reason: None,
        drain: None,
        inventory: None,
        joined_at: now(),
        key_digest: String::new(),
    };
    let odd = flavor("3", 3, &[("hw:numa_nodes", "2")]);
    change(&api, vec![flavor("1", 2, &[]).into(), flavor("2", 8, &[]).into(), odd.into(), silent.into()])
        .await;
    let explain = |flavor: &'static str| {
        ask(&api, As::Admin, Method::POST, "/placement/explain", json!({ "flavor": flavor }))
    };
    let fits = explain("f1").await.json();
    assert_eq!((&fits["hosts"][0]["host"], &fits["hosts"][0]["fits"]), (&json!("h1"), &json!(true)));
    assert_eq!((&fits["hosts"][1]["host"], &fits["hosts"][1]["fits"]), (&json!("h2"), &json!(false)));
    let too_large = explain("2").await.json();
    let row = &too_large["hosts"][0];
    assert_eq!((&row["fits"], &row["rule"]), (&json!(false), &json!("vcpus_total")));
    assert_eq!((&row["need"], &row["have"]), (&json!("8 vCPUs"), &json!("4 CPUs")));
    let contradiction = explain("3").await;
    assert_eq!(contradiction.status, 400);
    assert!(contradiction.text().contains("hw:numa_nodes"), "{}", contradiction.text());
    assert_eq!(explain("nothing").await.status, 404);
}

#[tokio::test]
async fn a_pool_is_shown_once_with_every_host_that_reports_it() {
    let api = Api::new().await;
    host(&api, "h1", 4).await;
    host(&api, "h2", 4).await;
    let away = inventory("h3", 4);
    let pools = vec![PoolReport { reachable: false, free_bytes: 1, ..away.pools[0].clone() }];
    let away = Host {
        id: HostId::random(),
        number: 3,
        name: "h3".into(),
        enabled: true,
        disabled_reason: None,
        drain: None,
        inventory: Some(Inventory { pools, ..away }),
        joined_at: now(),
        key_digest: String::new(),
    };
    change(&api, vec![away.into()]).await;
    let listed = ask(&api, As::Admin, Method::GET, "/pools", Value::Null).await.json();
    assert_eq!(listed["pools"].as_array().map(Vec::len), Some(1), "{listed}");
    let name = listed["pools"][0]["name"].as_str().expect("has a name").to_owned();
    let shown = ask(&api, As::Admin, Method::GET, &format!("/pools/{name}"), Value::Null).await.json();
    assert_eq!(shown["pool"], listed["pools"][0]);
    assert_eq!(shown["pool"]["id"], shown["pool"]["name"], "without a mark it is known by its name");
    assert_eq!(shown["pool"]["free_bytes"], json!(1_u64 << 40), "as a host that reaches it says");
    assert_eq!(
        shown["pool"]["hosts"],
        json!([
            { "host": "h1", "reachable": true },
            { "host": "h2", "reachable": true },
            { "host": "h3", "reachable": false },
        ])
    );
    assert_eq!(ask(&api, As::Admin, Method::GET, "/pools/none", Value::Null).await.status, 404);
}

#[tokio::test]
async fn pools_in_folders_of_one_name_are_told_apart_by_their_marks() {
    let api = Api::new().await;
    let marks = [Uuid::from_u128(2), Uuid::from_u128(1)];
    for (number, mark) in [(1, 0), (2, 1), (3, 0)] {
        let plain = inventory(&format!("h{number}"), 4);
        let pools = vec![PoolReport { mark: Some(marks[mark]), ..plain.pools[0].clone() }];
        let host = Host {
            id: HostId::random(),
            number,
            name: format!("h{number}"),
            enabled: true,
            disabled_reason: None,
            drain: None,
            inventory: Some(Inventory { pools, ..plain }),
            joined_at: now(),
            key_digest: String::new(),
        };
        change(&api, vec![host.into()]).await;
    }
    let listed = ask(&api, As::Admin, Method::GET, "/pools", Value::Null).await.json();
    let seen = |index: usize| {
        let hosts = listed["pools"][index]["hosts"].as_array().expect("is a list");
        let hosts: Vec<&str> = hosts.iter().filter_map(|host| host["host"].as_str()).collect();
        (listed["pools"][index]["id"].clone(), hosts)
    };
    assert_eq!(seen(0), (json!(marks[0]), vec!["h1", "h3"]), "{listed}");
    assert_eq!(seen(1), (json!(marks[1]), vec!["h2"]));
    assert_eq!(listed["pools"].as_array().map(Vec::len), Some(2));
    let path = format!("/pools/{}", marks[1]);
    let shown = ask(&api, As::Admin, Method::GET, &path, Value::Null).await.json();
    assert_eq!(shown["pool"], listed["pools"][1]);
    let name = listed["pools"][0]["name"].as_str().expect("has a name");
    let both = ask(&api, As::Admin, Method::GET, &format!("/pools/{name}"), Value::Null).await;
    assert_eq!(both.status, 409, "{}", both.text());
}
