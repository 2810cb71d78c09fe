//! Which fields an answer has in which microversion: no more and no fewer.

use super::*;
use serde_json::json;
use std::collections::BTreeSet;

/// The names of an object's fields.
pub(super) fn names(object: &Value) -> BTreeSet<String> {
    object.as_object().unwrap_or_else(|| panic!("no object: {object}")).keys().cloned().collect()
}

pub(super) fn set(lists: &[&[&str]]) -> BTreeSet<String> {
    lists.iter().flat_map(|list| list.iter().map(|name| (*name).to_owned())).collect()
}

/// Fields of every view of a server.
const SERVER: &[&str] = &[
    "id",
    "name",
    "status",
    "tenant_id",
    "user_id",
    "metadata",
    "hostId",
    "image",
    "flavor",
    "created",
    "updated",
    "addresses",
    "accessIPv4",
    "accessIPv6",
    "links",
    "progress",
    "OS-DCF:diskConfig",
];

/// Fields of a server's full view.
const FULL: &[&str] = &[
    "key_name",
    "config_drive",
    "os-extended-volumes:volumes_attached",
    "OS-EXT-AZ:availability_zone",
    "OS-EXT-STS:vm_state",
    "OS-EXT-STS:task_state",
    "OS-EXT-STS:power_state",
    "OS-SRV-USG:launched_at",
    "OS-SRV-USG:terminated_at",
];

/// Fields that administrators see beside these.
const ADMIN: &[&str] =
    &["OS-EXT-SRV-ATTR:host", "OS-EXT-SRV-ATTR:hypervisor_hostname", "OS-EXT-SRV-ATTR:instance_name"];

/// The same from 2.3 on.
const ADMIN_3: &[&str] = &[
    "OS-EXT-SRV-ATTR:hostname",
    "OS-EXT-SRV-ATTR:reservation_id",
    "OS-EXT-SRV-ATTR:launch_index",
    "OS-EXT-SRV-ATTR:kernel_id",
    "OS-EXT-SRV-ATTR:ramdisk_id",
    "OS-EXT-SRV-ATTR:root_device_name",
    "OS-EXT-SRV-ATTR:user_data",
];

/// What each version adds to every view.
const ADDED: [(u32, &str); 6] = [
    (9, "locked"),
    (19, "description"),
    (26, "tags"),
    (63, "trusted_image_certificates"),
    (73, "locked_reason"),
    (87, ""),
];

fn added(minor: u32) -> Vec<&'static str> {
    ADDED.iter().filter(|(since, name)| *since <= minor && !name.is_empty()).map(|(_, name)| *name).collect()
}

#[tokio::test]
async fn a_server_has_the_fields_of_its_microversion_and_no_others() {
    let scene = Scene::new().await;
    let path = format!("/servers/{}", scene.instance);
    for minor in [1, 2, 3, 8, 9, 15, 16, 18, 19, 25, 26, 46, 47, 62, 63, 70, 71, 72, 73, 75, 87] {
        let extra = added(minor);
        let mut expected = set(&[SERVER, FULL, ADMIN, &extra]);
        if minor >= 3 {
            expected.extend(set(&[ADMIN_3]));
        }
        if minor >= 16 {
            expected.insert("host_status".into());
        }
        let listed = scene.get(minor, "/servers/detail").await;
        assert_eq!(names(&listed["servers"][0]), expected, "listed at 2.{minor}");
        if minor >= 71 {
            expected.insert("server_groups".into());
        }
        let shown = scene.get(minor, &path).await;
        assert_eq!(names(&shown["server"]), expected, "shown at 2.{minor}");
        let changed =
            scene.ask(minor, Method::PUT, &path, json!({ "server": { "name": "web" } })).await.json();
        let address = &changed["server"]["addresses"]["net1"][0];
        assert_eq!(
            names(address).len(),
            if minor < 75 { 2 } else { 4 },
            "addresses when changed at 2.{minor}"
        );
        if minor < 75 {
            expected = set(&[SERVER, &extra]);
            if minor >= 71 {
                expected.insert("server_groups".into());
            }
        }
        assert_eq!(names(&changed["server"]), expected, "changed at 2.{minor}");
        let flavor: &[&str] = if minor < 47 {
            &["id", "links"]
        } else {
            &["original_name", "vcpus", "ram", "disk", "ephemeral", "swap", "extra_specs"]
        };
        assert_eq!(names(&shown["server"]["flavor"]), set(&[flavor]), "flavor at 2.{minor}");
    }
    let brief = scene.get(87, "/servers").await;
    assert_eq!(names(&brief["servers"][0]), set(&[&["id", "name", "links"]]));
}

#[tokio::test]
async fn only_an_administrator_sees_where_a_server_is() {
    let scene = Scene::new().await;
    let (user, project) = scene.api.member;
    scene.apply(vec![Instance { user, project, ..scene.an_instance() }.into()]).await;
    let path = format!("/servers/{}", scene.instance);
    let shown = scene.ask_as(As::Member, 87, Method::GET, &path, Value::Null).await.json();
    let extra = added(87);
    assert_eq!(names(&shown["server"]), set(&[SERVER, FULL, &extra, &["server_groups"]]));
    assert_eq!(shown["server"]["hostId"].as_str().unwrap().len(), 56, "but it sees which ones are together");
}

#[tokio::test]
async fn a_hypervisor_has_the_fields_and_the_kind_of_id_of_its_microversion() {
    let scene = Scene::new().await;
    let fields: &[&str] = &[
        "id",
        "hypervisor_hostname",
        "state",
        "status",
        "cpu_info",
        "current_workload",
        "disk_available_least",
        "host_ip",
        "free_disk_gb",
        "free_ram_mb",
        "hypervisor_type",
        "hypervisor_version",
        "local_gb",
        "local_gb_used",
        "memory_mb",
        "memory_mb_used",
        "running_vms",
        "vcpus",
        "vcpus_used",
        "service",
    ];
    for minor in [1, 28, 53, 87] {
        let listed = scene.get(minor, "/os-hypervisors/detail").await;
        let one = &listed["hypervisors"][0];
        assert_eq!(names(one), set(&[fields]), "2.{minor}");
        assert_eq!(one["cpu_info"].is_string(), minor < 28);
        assert_eq!(one["id"], if minor < 53 { json!(1) } else { json!(scene.host) });
        let shown =
            scene.get(minor, &format!("/os-hypervisors/{}", one["id"].to_string().trim_matches('"'))).await;
        assert_eq!(&shown["hypervisor"], one);
    }
    let one = &scene.get(87, "/os-hypervisors/detail").await["hypervisors"][0];
    for (field, value) in [
        ("vcpus", json!(4)),
        ("vcpus_used", json!(1)),
        ("memory_mb", json!(8192)),
        ("memory_mb_used", json!(1024)),
        ("free_ram_mb", json!(7168)),
        ("local_gb", json!(100)),
        ("local_gb_used", json!(40)),
        ("free_disk_gb", json!(60)),
        ("running_vms", json!(1)),
        ("hypervisor_version", json!(10_000_002)),
        ("host_ip", json!("198.18.0.11")),
        ("state", json!("down")),
        ("status", json!("enabled")),
    ] {
        assert_eq!(one[field], value, "{field}");
    }
    let topology = json!({ "cells": 1, "sockets": 1, "cores": 2, "threads": 2 });
    assert_eq!(one["cpu_info"]["topology"], topology);
    let brief = scene.get(87, "/os-hypervisors?hypervisor_hostname_pattern=h1&with_servers=True").await;
    assert_eq!(
        names(&brief["hypervisors"][0]),
        set(&[&["id", "hypervisor_hostname", "state", "status", "servers"]])
    );
    assert_eq!(brief["hypervisors"][0]["servers"][0]["uuid"], json!(scene.instance));
}

#[tokio::test]
async fn a_migration_has_the_fields_of_its_microversion() {
    let scene = Scene::new().await;
    scene.apply(vec![scene.a_migration(7, MigrationStatus::Running).into()]).await;
    let common: &[&str] = &[
        "id",
        "status",
        "source_node",
        "source_compute",
        "dest_node",
        "dest_compute",
        "dest_host",
        "created_at",
        "updated_at",
    ];
    let history: &[&str] = &["instance_uuid", "old_instance_type_id", "new_instance_type_id"];
    let bytes: &[&str] = &[
        "server_uuid",
        "memory_total_bytes",
        "memory_processed_bytes",
        "memory_remaining_bytes",
        "disk_total_bytes",
        "disk_processed_bytes",
        "disk_remaining_bytes",
    ];
    for minor in [1, 22, 23, 58, 59, 79, 80, 87] {
        let mut newer: Vec<&str> = Vec::new();
        newer.extend((minor >= 59).then_some("uuid"));
        newer.extend((minor >= 80).then_some(["user_id", "project_id"]).into_iter().flatten());
        let listed = scene.get(minor, "/os-migrations").await;
        let types: &[&str] = if minor >= 23 { &["migration_type", "links"] } else { &[] };
        assert_eq!(names(&listed["migrations"][0]), set(&[common, history, &newer, types]), "2.{minor}");
        let path = format!("/servers/{}/migrations", scene.instance);
        if minor < 23 {
            let answer = scene.ask(minor, Method::GET, &path, Value::Null).await;
            assert_eq!(answer.status, 404, "2.{minor}");
            continue;
        }
        let running = scene.get(minor, &path).await;
        assert_eq!(names(&running["migrations"][0]), set(&[common, bytes, &newer]), "2.{minor}");
        let shown = scene.get(minor, &format!("{path}/7")).await;
        assert_eq!(shown["migration"], running["migrations"][0]);
        assert_eq!(shown["migration"]["id"], 7, "clients know migrations by a number");
    }
}

#[tokio::test]
async fn a_flavor_has_the_fields_of_its_microversion() {
    let scene = Scene::new().await;
    let fields: &[&str] = &[
        "id",
        "name",
        "links",
        "ram",
        "disk",
        "vcpus",
        "swap",
        "rxtx_factor",
        "OS-FLV-EXT-DATA:ephemeral",
        "OS-FLV-DISABLED:disabled",
        "os-flavor-access:is_public",
    ];
    for minor in [1, 54, 55, 60, 61, 74, 75, 87] {
        let mut newer: Vec<&str> = Vec::new();
        newer.extend((minor >= 55).then_some("description"));
        let brief = scene.get(minor, "/flavors").await;
        assert_eq!(
            names(&brief["flavors"][0]),
            set(&[&["id", "name", "links"], &newer]),
            "brief at 2.{minor}"
        );
        newer.extend((minor >= 61).then_some("extra_specs"));
        let shown = scene.get(minor, "/flavors/1").await;
        assert_eq!(names(&shown["flavor"]), set(&[fields, &newer]), "2.{minor}");
        assert_eq!(shown["flavor"]["swap"], if minor < 75 { json!("") } else { json!(0) });
        assert_eq!(scene.get(minor, "/flavors/detail").await["flavors"][0], shown["flavor"]);
    }
}

#[tokio::test]
async fn a_service_has_the_fields_and_the_kind_of_id_of_its_microversion() {
    let scene = Scene::new().await;
    let fields: &[&str] =
        &["id", "binary", "host", "zone", "status", "state", "updated_at", "disabled_reason"];
    for minor in [1, 10, 11, 52, 53, 69, 87] {
        let listed = scene.get(minor, "/os-services?binary=nova-compute&host=h1").await;
        let newer: &[&str] = if minor >= 11 { &["forced_down"] } else { &[] };
        assert_eq!(names(&listed["services"][0]), set(&[fields, newer]), "2.{minor}");
        assert_eq!(listed["services"][0]["id"].is_string(), minor >= 53);
    }
    assert_eq!(scene.get(87, "/os-services?binary=nova-scheduler").await, json!({ "services": [] }));
}

#[tokio::test]
async fn limits_and_quotas_lose_with_the_microversion_what_is_not_compute_s() {
    let scene = Scene::new().await;
    let limits: &[&str] = &[
        "maxServerMeta",
        "maxTotalInstances",
        "maxTotalCores",
        "maxTotalRAMSize",
        "maxTotalKeypairs",
        "maxServerGroups",
        "maxServerGroupMembers",
        "totalInstancesUsed",
        "totalCoresUsed",
        "totalRAMUsed",
        "totalServerGroupsUsed",
    ];
    let network: &[&str] = &[
        "maxTotalFloatingIps",
        "totalFloatingIpsUsed",
        "totalSecurityGroupsUsed",
        "maxSecurityGroups",
        "maxSecurityGroupRules",
    ];
    let quotas: &[&str] = &[
        "id",
        "instances",
        "cores",
        "ram",
        "metadata_items",
        "key_pairs",
        "server_groups",
        "server_group_members",
    ];
    for minor in [1, 35, 36, 38, 39, 56, 57, 87] {
        let mut expected = set(&[limits]);
        let mut quota = set(&[quotas]);
        if minor < 36 {
            expected.extend(set(&[network]));
            quota.extend(set(&[&["fixed_ips", "floating_ips", "security_groups", "security_group_rules"]]));
        }
        if minor < 39 {
            expected.insert("maxImageMeta".into());
        }
        if minor < 57 {
            expected.extend(set(&[&["maxPersonality", "maxPersonalitySize"]]));
            quota.extend(set(&[&[
                "injected_files",
                "injected_file_content_bytes",
                "injected_file_path_bytes",
            ]]));
        }
        let shown = scene.get(minor, "/limits?reserved=False").await;
        assert_eq!(names(&shown["limits"]["absolute"]), expected, "2.{minor}");
        assert_eq!(shown["limits"]["absolute"]["totalRAMUsed"], 512);
        let project = scene.api.admin.1;
        let shown = scene.get(minor, &format!("/os-quota-sets/{project}")).await;
        assert_eq!(names(&shown["quota_set"]), quota, "2.{minor}");
        let detail = scene.get(minor, &format!("/os-quota-sets/{project}/detail")).await;
        assert_eq!(names(&detail["quota_set"]), quota, "2.{minor}");
        assert_eq!(detail["quota_set"]["cores"], json!({ "limit": -1, "in_use": 1, "reserved": 0 }));
    }
}

#[tokio::test]
async fn an_instance_action_has_the_fields_of_its_microversion() {
    let scene = Scene::new().await;
    scene.apply(vec![scene.an_operation(Verb::StopInstance, Phase::Failed, Some("no answer")).into()]).await;
    let fields: &[&str] =
        &["action", "instance_uuid", "request_id", "user_id", "project_id", "start_time", "message"];
    let event: &[&str] = &["event", "start_time", "finish_time", "result", "traceback"];
    let path = format!("/servers/{}/os-instance-actions", scene.instance);
    for minor in [1, 51, 57, 58, 61, 62, 83, 84, 87] {
        let newer: &[&str] = if minor >= 58 { &["updated_at"] } else { &[] };
        let listed = scene.get(minor, &path).await;
        let one = &listed["instanceActions"][0];
        assert_eq!(names(one), set(&[fields, newer]), "2.{minor}");
        assert_eq!((&one["action"], &one["message"]), (&json!("stop"), &json!("Error")));
        let shown = scene.get(minor, &format!("{path}/{}", one["request_id"].as_str().unwrap())).await;
        let mut newer_event: Vec<&str> = Vec::new();
        newer_event.extend((minor >= 62).then_some(["hostId", "host"]).into_iter().flatten());
        newer_event.extend((minor >= 84).then_some("details"));
        let events = &shown["instanceAction"]["events"];
        assert_eq!(names(&events[0]), set(&[event, &newer_event]), "2.{minor}");
    }
}

#[tokio::test]
async fn zones_and_old_hosts_tell_the_one_zone_and_where_servers_are() {
    let scene = Scene::new().await;
    let zone = &scene.get(1, "/os-availability-zone/detail").await["availabilityZoneInfo"][0];
    assert_eq!(zone["zoneName"], "nova");
    assert_eq!(zone["zoneState"], json!({ "available": false }), "its only host is silent");
    assert_eq!(names(&zone["hosts"]["h1"]["nova-compute"]), set(&[&["active", "available", "updated_at"]]));
    assert_eq!(scene.get(1, "/os-availability-zone").await["availabilityZoneInfo"][0]["hosts"], Value::Null);
    let hosts = scene.get(1, "/os-hosts").await;
    assert_eq!(hosts, json!({ "hosts": [{ "host_name": "h1", "service": "compute", "zone": "nova" }] }));
    let shown = scene.get(1, "/os-hosts/h1").await;
    let total = json!({ "host": "h1", "project": "(total)", "cpu": 4, "memory_mb": 8192, "disk_gb": 100 });
    assert_eq!(shown["host"][0]["resource"], total);
    assert_eq!(scene.ask(43, Method::GET, "/os-hosts", Value::Null).await.status, 404);
}

#[tokio::test]
async fn the_version_documents_say_what_tempest_and_keystoneauth_look_for() {
    let scene = Scene::new().await;
    let root = scene.api.get("/compute/").await.json();
    let versions = root["versions"].as_array().unwrap();
    assert_eq!((&versions[0]["id"], &versions[1]["id"]), (&json!("v2.0"), &json!("v2.1")));
    assert_eq!((&versions[1]["version"], &versions[1]["min_version"]), (&json!("2.87"), &json!("2.1")));
    for version in versions {
        let href = version["links"][0]["href"].as_str().unwrap();
        let path = href.strip_prefix("https://127.0.0.1:8774").unwrap();
        let document = scene.api.ask(As::Nobody, Method::GET, path, &[], Value::Null).await;
        assert_eq!(document.status, 200, "{href}");
        assert_eq!(document.json()["version"]["id"], version["id"]);
    }
}
