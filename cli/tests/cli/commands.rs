//! What each command asks of the service, and what it prints of the answer.

use crate::support::{Answer, Request, Service};
use serde_json::{Value, json};

pub(crate) fn ok(body: Value) -> Option<Answer> {
    Some(Answer::json(200, body))
}

pub(crate) fn server(status: &str, extra: Value) -> Value {
    let mut server = json!({
        "id": "s-1", "name": "web", "status": status, "OS-EXT-STS:task_state": null,
        "OS-EXT-SRV-ATTR:host": "h1", "flavor": {"original_name": "small"},
        "addresses": {"net": [{"addr": "10.0.0.3", "version": 4}]},
    });
    for (key, value) in extra.as_object().into_iter().flatten() {
        server[key] = value.clone();
    }
    json!({"server": server})
}

/// What `server create` looks up first.
fn parts(request: &Request) -> Option<Answer> {
    match request.line().as_str() {
        "GET /image/v2/images?name=cirros" => ok(json!({"images": [{"id": "i-1", "name": "cirros"}]})),
        "GET /compute/v2.1/flavors/detail?is_public=None" => {
            ok(json!({"flavors": [{"id": "f-1", "name": "small"}]}))
        }
        "GET /network/v2.0/networks?name=net" => ok(json!({"networks": [{"id": "n-1", "name": "net"}]})),
        "GET /network/v2.0/ports/p-1" => ok(json!({"port": {"id": "p-1"}})),
        _ => None,
    }
}

#[test]
fn an_id_is_tried_before_a_name() {
    let service = Service::start(|request| match request.line().as_str() {
        "GET /compute/v2.1/servers/s-1" => ok(server("ACTIVE", json!({}))),
        "GET /compute/v2.1/servers/detail?deleted=False&name=web" => {
            ok(json!({"servers": [server("ACTIVE", json!({}))["server"], {"id": "s-2", "name": "web2"}]}))
        }
        _ => None,
    });
    assert_eq!(service.run(&["server", "show", "s-1", "--json"]).json()["name"], "web");
    assert_eq!(service.take_lines(), ["GET /compute/v2.1/servers/s-1"]);
    assert_eq!(service.run(&["server", "show", "web", "-q"]).text(), "s-1\n");
    assert_eq!(
        service.take_lines(),
        ["GET /compute/v2.1/servers/web", "GET /compute/v2.1/servers/detail?deleted=False&name=web"]
    );
}

#[test]
fn a_name_of_two_things_is_refused_with_both_ids() {
    let service = Service::start(|request| match request.line().as_str() {
        "GET /image/v2/images?name=a" => {
            ok(json!({"images": [{"id": "i-1", "name": "a"}, {"id": "i-2", "name": "a"}]}))
        }
        _ => None,
    });
    let run = service.run(&["image", "delete", "a"]);
    assert_eq!(run.code, 2);
    assert!(run.stderr.contains("i-1") && run.stderr.contains("i-2"), "{}", run.stderr);
    assert!(service.take_requests().iter().all(|request| request.method == "GET"));
}

#[test]
fn a_name_is_neither_a_path_nor_a_pattern() {
    let service = Service::start(|request| match request.line().as_str() {
        "GET /compute/v2.1/servers/detail?deleted=False" => ok(json!({"servers": []})),
        _ => None,
    });
    assert_eq!(service.run(&["server", "show", "../flavors?a=.*"]).code, 3);
    assert_eq!(
        service.take_lines(),
        [
            "GET /compute/v2.1/servers/..%2Fflavors%3Fa%3D.%2A",
            "GET /compute/v2.1/servers/detail?deleted=False"
        ]
    );
}

#[test]
fn compute_requests_carry_the_token_and_the_version() {
    let service = Service::start(|_| ok(json!({"servers": []})));
    service.run(&["server", "list"]).text();
    let request = service.take_requests().remove(0);
    assert_eq!(request.header("x-auth-token"), Some("token-1"));
    assert_eq!(request.header("openstack-api-version"), Some("compute 2.87"));
    assert_eq!(request.header("x-openstack-nova-api-version"), Some("2.87"));
}

#[test]
fn lists_are_followed_to_their_last_page() {
    let service = Service::start(|request| match request.target.as_str() {
        "/image/v2/images" => ok(json!({"images": [{"id": "i-1"}], "next": "/v2/images?marker=i-1"})),
        "/image/v2/images?marker=i-1" => ok(json!({"images": [{"id": "i-2"}]})),
        "/compute/v2.1/servers/detail?deleted=False" => ok(json!({
            "servers": [{"id": "s-1"}], "servers_links": [{"rel": "next", "href": "http://elsewhere/x"}],
        })),
        "/compute/v2.1/servers/detail?deleted=False&marker=s-1" => ok(json!({"servers": [{"id": "s-2"}]})),
        _ => None,
    });
    assert_eq!(service.run(&["image", "list", "-q"]).text(), "i-1\ni-2\n");
    assert_eq!(service.run(&["server", "list", "-q"]).text(), "s-1\ns-2\n");
}

#[test]
fn a_table_has_a_head_and_aligned_columns() {
    let service = Service::start(|_| ok(json!({"servers": [server("ACTIVE", json!({}))["server"]]})));
    let run = service.run(&["server", "list"]);
    let lines: Vec<_> = run.text().lines().collect();
    assert_eq!(lines.len(), 2);
    assert_eq!(
        lines.iter().map(|line| line.split_whitespace().collect()).collect::<Vec<Vec<_>>>(),
        [
            vec!["ID", "NAME", "STATUS", "HOST", "ADDRESSES", "FLAVOR"],
            vec!["s-1", "web", "ACTIVE", "h1", "net=10.0.0.3", "small"]
        ]
    );
    assert_eq!(lines[0].find("STATUS"), lines[1].find("ACTIVE"));
}

#[test]
fn a_flavor_takes_units_and_goes_again_when_its_properties_are_refused() {
    let service = Service::start(|request| match request.line().as_str() {
        "POST /compute/v2.1/flavors" => ok(json!({"flavor": {"id": "f-1"}})),
        "POST /compute/v2.1/flavors/f-1/os-extra_specs"
            if request.json()["extra_specs"]["hw:numa_nodes"] == "2" =>
        {
            ok(json!({"extra_specs": {}}))
        }
        "POST /compute/v2.1/flavors/f-1/os-extra_specs" => {
            Some(Answer::fault(400, "badRequest", "numa_nodes: 0 cells"))
        }
        "GET /compute/v2.1/flavors/f-1" => ok(json!({"flavor": {"id": "f-1", "ram": 2048, "disk": 10}})),
        "DELETE /compute/v2.1/flavors/f-1" => Some(Answer(202, Vec::new())),
        _ => None,
    });
    let create = |nodes: &str| {
        let property = format!("hw:numa_nodes={nodes}");
        service.run(&[
            "flavor",
            "create",
            "big",
            "--vcpus",
            "2",
            "--memory",
            "2G",
            "--disk",
            "10",
            "--property",
            &property,
        ])
    };
    assert!(create("2").text().contains("2 GiB"));
    assert_eq!(
        service.take_requests()[0].json(),
        json!({"flavor": {"id": null, "name": "big", "vcpus": 2, "ram": 2048, "disk": 10, "swap": 0,
            "OS-FLV-EXT-DATA:ephemeral": 0, "os-flavor-access:is_public": true}})
    );
    let refused = create("0");
    assert_eq!(refused.code, 1);
    assert!(refused.stderr.contains("numa_nodes: 0 cells"), "{}", refused.stderr);
    assert_eq!(service.take_lines().last().unwrap(), "DELETE /compute/v2.1/flavors/f-1");
}

#[test]
fn a_private_key_is_not_sent() {
    let service = Service::start(|_| None);
    std::fs::write(service.folder().join("id"), "-----BEGIN OPENSSH PRIVATE KEY-----\n").unwrap();
    assert_eq!(service.run(&["keypair", "create", "k", "--public-key", "id"]).code, 2);
    assert!(service.take_requests().is_empty());
}

#[test]
fn a_network_with_a_refused_subnet_goes_again() {
    let service = Service::start(|request| match request.line().as_str() {
        "POST /network/v2.0/networks" => Some(Answer::json(201, json!({"network": {"id": "n-1"}}))),
        "POST /network/v2.0/subnets" => Some(Answer::json(
            400,
            json!({"NeutronError": {"type": "T", "message": "overlaps", "detail": ""}}),
        )),
        "DELETE /network/v2.0/networks/n-1" => Some(Answer(204, Vec::new())),
        _ => None,
    });
    let run = service.run(&["network", "create", "net", "--subnet", "10.0.0.0/24", "--mtu", "1400"]);
    assert_eq!(run.code, 1);
    assert!(run.stderr.contains("overlaps"), "{}", run.stderr);
    let requests = service.take_requests();
    assert_eq!(requests[0].json(), json!({"network": {"name": "net", "admin_state_up": true, "mtu": 1400}}));
    assert_eq!(
        requests[1].json(),
        json!({"subnet": {"network_id": "n-1", "name": "net", "cidr": "10.0.0.0/24", "ip_version": 4}})
    );
    assert_eq!(requests[2].line(), "DELETE /network/v2.0/networks/n-1");
}

#[test]
fn a_port_can_be_bound_to_a_host() {
    let service = Service::start(|request| match request.line().as_str() {
        "GET /network/v2.0/networks/n-1" => ok(json!({"network": {"id": "n-1"}})),
        "GET /operator/v1/hosts/h2" => ok(json!({"host": {"id": "x", "name": "h2"}})),
        "POST /network/v2.0/ports" => Some(Answer::json(201, json!({"port": {"id": "p-1"}}))),
        _ => None,
    });
    let arguments = ["port", "create", "n-1", "--host", "h2", "--fixed-ip", "10.0.0.9", "-q"];
    assert_eq!(service.run(&arguments).text(), "p-1\n");
    assert_eq!(
        service.take_requests().last().unwrap().json(),
        json!({"port": {"network_id": "n-1", "name": "", "admin_state_up": true, "binding:host_id": "h2",
            "fixed_ips": [{"ip_address": "10.0.0.9"}]}})
    );
}

#[test]
fn a_server_is_created_from_names_and_waited_for() {
    let mut polls = 0;
    let service = Service::start(move |request| match request.line().as_str() {
        "POST /compute/v2.1/servers" => Some(Answer::json(202, json!({"server": {"id": "s-1"}}))),
        "GET /compute/v2.1/servers/s-1" => {
            polls += 1;
            match polls {
                1 => ok(server("BUILD", json!({"OS-EXT-STS:task_state": "spawning"}))),
                2 => Some(Answer::fault(503, "serviceUnavailable", "restarting")),
                _ => ok(server("ACTIVE", json!({}))),
            }
        }
        _ => parts(request),
    });
    std::fs::write(service.folder().join("ud"), "#!/bin/sh\n").unwrap();
    let run = service.run(&[
        "server",
        "create",
        "web",
        "--flavor",
        "small",
        "--image",
        "cirros",
        "--network",
        "net",
        "--port",
        "p-1",
        "--key-name",
        "k",
        "--user-data",
        "ud",
        "--host",
        "h2",
        "--wait",
        "--json",
    ]);
    assert_eq!(run.json()["status"], "ACTIVE");
    let requests = service.take_requests();
    let create = requests.iter().find(|request| request.method == "POST").unwrap();
    assert_eq!(
        create.json(),
        json!({"server": {"name": "web", "min_count": 1, "max_count": 1, "imageRef": "i-1", "flavorRef": "f-1",
            "networks": [{"uuid": "n-1"}, {"port": "p-1"}], "key_name": "k", "user_data": "IyEvYmluL3NoCg==",
            "availability_zone": "nova:h2"}})
    );
}

#[test]
fn a_server_that_fails_is_told_host_by_host() {
    let reason = "no host fits\nh1: numa_cells: need 4, have 2\nh2: pages: need 512, have 0";
    let service = Service::start(move |request| match request.line().as_str() {
        "POST /compute/v2.1/servers" => Some(Answer::json(202, json!({"server": {"id": "s-1"}}))),
        "GET /compute/v2.1/servers/s-1" => {
            ok(server("ERROR", json!({"fault": {"code": 500, "message": reason, "created": "x"}})))
        }
        _ => parts(request),
    });
    let create = [
        "server",
        "create",
        "web",
        "--flavor",
        "small",
        "--image",
        "cirros",
        "--no-network",
        "--wait",
        "--json",
    ];
    let run = service.run(&create);
    assert_eq!(run.code, 1);
    assert_eq!(run.stdout, "");
    assert!(run.stderr.contains(reason), "{}", run.stderr);
    assert!(service.run(&["server", "show", "s-1"]).text().contains("need 512, have 0"));
}

#[test]
fn an_unknown_flavor_creates_nothing() {
    let service = Service::start(parts);
    let run = service.run(&["server", "create", "web", "--flavor", "absent", "--image", "cirros"]);
    assert_eq!(run.code, 3);
    assert!(run.stderr.contains("flavor") && run.stderr.contains("'absent'"), "{}", run.stderr);
    assert!(service.take_requests().iter().all(|request| request.method == "GET"));
}

#[test]
fn a_deleted_server_is_waited_for_until_it_is_gone() {
    let mut polls = 0;
    let service = Service::start(move |request| match request.line().as_str() {
        "GET /compute/v2.1/servers/s-1" => {
            polls += 1;
            (polls < 3)
                .then(|| Answer::json(200, server("ACTIVE", json!({"OS-EXT-STS:task_state": "deleting"}))))
        }
        "DELETE /compute/v2.1/servers/s-1" => Some(Answer(204, Vec::new())),
        _ => None,
    });
    assert_eq!(service.run(&["server", "delete", "s-1", "--wait"]).text(), "deleted server web (s-1)\n");
}

#[test]
fn a_failed_server_can_be_deleted_and_waited_for() {
    let mut polls = 0;
    let service = Service::start(move |request| match request.line().as_str() {
        "GET /compute/v2.1/servers/s-1" => {
            polls += 1;
            (polls < 4).then(|| Answer::json(200, server("ERROR", json!({}))))
        }
        "DELETE /compute/v2.1/servers/s-1" => Some(Answer(204, Vec::new())),
        _ => None,
    });
    assert_eq!(service.run(&["server", "delete", "s-1", "--wait"]).text(), "deleted server web (s-1)\n");
}

#[test]
fn one_wrong_name_deletes_nothing() {
    let service = Service::start(|request| match request.line().as_str() {
        "GET /compute/v2.1/servers/s-1" => ok(server("ACTIVE", json!({}))),
        "GET /compute/v2.1/servers/detail?deleted=False&name=absent" => ok(json!({"servers": []})),
        _ => None,
    });
    assert_eq!(service.run(&["server", "delete", "s-1", "absent"]).code, 3);
    assert!(service.take_requests().iter().all(|request| request.method == "GET"));
}

#[test]
fn the_console_is_printed_as_it_is() {
    let service = Service::start(|request| match request.line().as_str() {
        "GET /compute/v2.1/servers/s-1" => ok(server("ACTIVE", json!({}))),
        "POST /compute/v2.1/servers/s-1/action" => ok(json!({"output": "login:\u{1b}[0m\n"})),
        _ => None,
    });
    assert_eq!(service.run(&["server", "console", "s-1", "--lines", "5"]).text(), "login:\u{1b}[0m\n");
    assert_eq!(service.take_requests()[1].json(), json!({"os-getConsoleOutput": {"length": 5}}));
}

/// A service where a migration of s-1 runs for a while and then ends with `status`.
fn migrating(status: &'static str, record: Value) -> Service {
    let mut polls = 0;
    Service::start(move |request| match request.line().as_str() {
        "GET /compute/v2.1/servers/s-1" => ok(server("ACTIVE", json!({"OS-EXT-SRV-ATTR:host": "h2"}))),
        "POST /compute/v2.1/servers/s-1/action" => Some(Answer(202, Vec::new())),
        "GET /compute/v2.1/os-migrations?instance_uuid=s-1" => {
            polls += 1;
            let old = json!({"id": 3, "uuid": "m-3", "status": "completed"});
            let now = if polls < 4 { "running" } else { status };
            let new = json!({"id": 4, "uuid": "m-4", "status": now});
            ok(json!({"migrations": if polls == 1 { json!([old]) } else { json!([new, old]) }}))
        }
        "GET /operator/v1/migrations/m-4" => ok(json!({"migration": record})),
        _ => None,
    })
}

#[test]
fn a_migration_is_watched_to_its_end_and_its_figures_told() {
    let record = json!({"id": 4, "uuid": "m-4", "total_ms": 1234, "downtime_ms": 56, "gap_ms": 78});
    let service = migrating("completed", record);
    let run = service.run(&["server", "migrate", "s-1", "--host", "h2", "--wait"]);
    assert_eq!(
        run.text(),
        "migrated web to h2, 1234 ms in all, 56 ms of them paused, 78 ms without packets\n"
    );
    let requests = service.take_requests();
    let action = requests.iter().find(|request| request.method == "POST").unwrap();
    assert_eq!(action.json(), json!({"os-migrateLive": {"host": "h2", "block_migration": "auto"}}));
}

#[test]
fn a_failed_migration_is_told_with_its_reason() {
    let run = migrating("error", json!({"id": 4, "error": "h2: no shared folder"}));
    let run = run.run(&["server", "migrate", "s-1", "--wait"]);
    assert_eq!(run.code, 1);
    assert!(
        run.stderr.contains("h2: no shared folder") && run.stderr.contains("ACTIVE on h2"),
        "{}",
        run.stderr
    );
}

#[test]
fn a_migration_is_cancelled_by_its_number() {
    let service = Service::start(|request| match request.line().as_str() {
        "GET /compute/v2.1/os-migrations" => ok(json!({"migrations": [
            {"id": 4, "uuid": "m-4", "status": "running", "instance_uuid": "s-1"},
            {"id": 3, "uuid": "m-3", "status": "completed", "instance_uuid": "s-1"},
        ]})),
        "DELETE /compute/v2.1/servers/s-1/migrations/4" => Some(Answer(202, Vec::new())),
        _ => None,
    });
    assert_eq!(service.run(&["migration", "cancel", "4"]).text(), "cancelling migration 4\n");
    assert_eq!(service.run(&["migration", "cancel", "3"]).code, 1);
    assert_eq!(service.run(&["migration", "cancel", "9"]).code, 3);
    assert_eq!(service.run(&["migration", "list", "-q"]).text(), "3\n4\n");
}

#[test]
fn a_join_token_comes_with_the_command_to_type() {
    let service = Service::start(|request| match request.line().as_str() {
        "POST /operator/v1/join-tokens" => {
            Some(Answer::json(201, json!({"token": "gw1.a.b", "expires_at": "2030-01-01T00:00:00Z"})))
        }
        _ => None,
    });
    let command = format!("godwit-agent join http://{} gw1.a.b", service.address);
    assert!(service.run(&["host", "token"]).text().contains(&command));
    assert_eq!(service.run(&["host", "token", "--ttl", "60", "-q"]).text(), "gw1.a.b\n");
    assert_eq!(service.take_requests()[1].json(), json!({"ttl_seconds": 60}));
}

#[test]
fn a_host_is_taken_out_of_placement_with_a_reason() {
    let service = Service::start(|request| match request.line().as_str() {
        "GET /operator/v1/hosts" => ok(json!({"hosts": [{"id": "x-1", "name": "h1"}]})),
        "PUT /operator/v1/hosts/x-1" => ok(json!({"host": {}})),
        _ => None,
    });
    assert_eq!(service.run(&["host", "disable", "h1", "--reason", "fan"]).text(), "disabled host h1 (x-1)\n");
    assert_eq!(service.take_requests()[2].json(), json!({"enabled": false, "reason": "fan"}));
}

#[test]
fn a_drain_is_watched_until_the_host_is_empty_and_says_who_cannot_leave() {
    let looks = std::sync::atomic::AtomicUsize::new(0);
    let host = |left: Value| ok(json!({"host": {"id": "x-1", "name": "h1", "drain": {"left": left}}}));
    let held = json!([{"server": "s-1", "name": "web", "state": "held", "reason": "none of 1 hosts"}]);
    let service = Service::start(move |request| match request.line().as_str() {
        "GET /operator/v1/hosts" => ok(json!({"hosts": [{"id": "x-1", "name": "h1"}]})),
        "PUT /operator/v1/hosts/x-1/drain" => host(held.clone()),
        "DELETE /operator/v1/hosts/x-1/drain" => ok(json!({"host": {}})),
        "GET /operator/v1/hosts/x-1" => match looks.fetch_add(1, std::sync::atomic::Ordering::Relaxed) {
            0 => host(held.clone()),
            _ => host(json!([])),
        },
        _ => None,
    });
    let run = service.run(&["host", "drain", "h1", "--at-once", "3", "--wait"]);
    assert_eq!(run.text(), "drained host h1 (x-1)\n");
    let asked = service.take_requests().into_iter().find(|request| request.method == "PUT").unwrap();
    assert_eq!(asked.json(), json!({"at_once": 3}));
    assert_eq!(service.run(&["host", "undrain", "h1"]).text(), "no longer draining host h1 (x-1)\n");
    assert_eq!(service.run(&["host", "drain", "h1", "--at-once", "17"]).code, 2);
}

#[test]
fn an_explanation_names_rule_need_and_have() {
    let service = Service::start(|request| match request.line().as_str() {
        "POST /operator/v1/placement/explain" => ok(json!({"hosts": [
            {"host": "h1", "fits": false, "rule": "numa_cells", "need": 4, "have": 1, "message": "too few cells"},
            {"host": "h2", "fits": true},
        ], "changes": [{"kind": "cells", "message": "it would fit if hw:numa_nodes were 1 (on h1)"}]})),
        _ => parts(request),
    });
    let run = service.run(&["placement", "explain", "--flavor", "small", "--image", "cirros"]);
    assert!(run.text().ends_with("it would fit if hw:numa_nodes were 1 (on h1)\n"), "{}", run.text());
    let words: Vec<_> = run.text().lines().nth(1).unwrap().split_whitespace().collect();
    assert_eq!(words, ["h1", "no", "numa_cells", "4", "1", "too", "few", "cells"]);
    assert_eq!(service.take_requests().last().unwrap().json(), json!({"flavor": "f-1", "image": "i-1"}));
    assert_eq!(service.run(&["placement", "explain", "--flavor", "small", "-q"]).text(), "h2\n");
}

#[test]
fn a_simulation_counts_by_host_and_says_why_not_one_more() {
    let service = Service::start(|request| match request.line().as_str() {
        "POST /operator/v1/placement/simulate" => ok(json!({
            "placed": 5, "hosts": [{"host": "h1", "count": 2}, {"host": "h2", "count": 3}], "stopped_by": "no room",
        })),
        _ => parts(request),
    });
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("fleet.json");
    std::fs::write(&file, r#"{"hosts": []}"#).unwrap();
    let run = service.run(&[
        "placement",
        "simulate",
        "--flavor",
        "small",
        "--most",
        "9",
        "--fleet",
        file.to_str().unwrap(),
    ]);
    assert!(
        run.text().contains("h2    3\n") && run.text().ends_with("5 fit; for one more, no room\n"),
        "{}",
        run.text()
    );
    let asked = service.take_requests().last().unwrap().json();
    assert_eq!(asked, json!({"flavor": "f-1", "most": 9, "fleet": {"hosts": []}}));
    std::fs::write(&file, "hosts:").unwrap();
    let run = service.run(&["placement", "simulate", "--flavor", "small", "--fleet", file.to_str().unwrap()]);
    assert_eq!(run.code, 2);
}

#[test]
fn the_l2_tables_tell_host_by_host_where_ports_are() {
    let service = Service::start(|request| match request.line().as_str() {
        "GET /network/v2.0/networks/n-1" => ok(json!({"network": {"id": "n-1"}})),
        "GET /operator/v1/networks/n-1/l2" => ok(json!({
            "network": "n-1", "vni": 1001, "hosts": [{
                "host": "h1", "vtep": "198.18.0.11", "agrees": false,
                "wanted": {
                    "ports": [{"port": "p-1", "mac": "fa:16:3e:00:00:01", "addresses": ["10.0.0.3"]}],
                    "forwarding": [{"mac": "fa:16:3e:00:00:02", "addresses": ["10.0.0.4"], "vtep": "198.18.0.12"}],
                    "flood": ["198.18.0.12"],
                },
                "reported": {"forwarding": [], "flood": ["198.18.0.12"]},
            }],
        })),
        _ => None,
    });
    let run = service.run(&["network", "l2", "n-1"]);
    for words in [
        "1001",
        "fa:16:3e:00:00:01 10.0.0.3",
        "fa:16:3e:00:00:02 at 198.18.0.12 (missing)",
        "h1    198.18.0.11  no",
    ] {
        assert!(run.text().contains(words), "{words}: {}", run.text());
    }
}

#[test]
fn the_status_is_one_view() {
    let service = Service::start(|request| match request.line().as_str() {
        "GET /operator/v1/status" => ok(json!({
            "version": "9.9", "healthy": true, "instances": {"ACTIVE": 2},
            "hosts": [{"id": "x-1", "name": "h1", "state": "up", "enabled": true, "memory_bytes": 1u64 << 30}],
        })),
        _ => None,
    });
    let run = service.run(&["status"]);
    for words in ["9.9", "instances ACTIVE", "h1", "up", "enabled", "1 GiB"] {
        assert!(run.text().contains(words), "{words}: {}", run.text());
    }
    assert_eq!(service.run(&["status", "--json"]).json()["hosts"][0]["name"], "h1");
}
