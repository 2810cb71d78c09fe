//! What is made of requests: what is taken, what is refused, and how.

use super::*;
use crate::fleet::instance::{Fault, NicRequest, Task};
use serde_json::json;

/// The compute fault's key, code and text.
pub(super) fn fault(answer: &Answer) -> (u16, String) {
    let body = answer.json();
    let inner = body.as_object().and_then(|map| map.values().next()).cloned().unwrap_or_default();
    assert_eq!(inner["code"], answer.status.as_u16(), "{}", answer.text());
    (answer.status.as_u16(), inner["message"].as_str().unwrap_or_default().to_owned())
}

impl Scene {
    /// The body of a server's creation, with other attributes set or (null) taken out.
    fn new_server(&self, other: &[(&str, Value)]) -> Value {
        let mut server = json!({
            "name": "s1",
            "imageRef": self.image,
            "flavorRef": "1",
            "networks": [{ "uuid": self.network }],
        });
        for (key, value) in other {
            if value.is_null() {
                server.as_object_mut().unwrap().remove(*key);
            } else {
                server[*key] = value.clone();
            }
        }
        json!({ "server": server })
    }

    async fn create(&self, minor: u32, other: &[(&str, Value)]) -> Answer {
        self.post(minor, "/servers", self.new_server(other)).await
    }

    fn created(&self, answer: &Answer) -> Instance {
        assert_eq!(answer.status, 202, "{}", answer.text());
        let id = answer.json()["server"]["id"].as_str().unwrap().parse().unwrap();
        self.api.app.ledger.read(|fleet| fleet.instances[&id].clone())
    }
}

#[tokio::test]
async fn a_server_is_made_as_the_openstack_command_asks_for_it() {
    let scene = Scene::new().await;
    let mapping = json!([{
        "uuid": scene.image, "boot_index": 0, "source_type": "image", "destination_type": "local",
        "delete_on_termination": true,
    }]);
    let answer = scene
        .create(
            87,
            &[("block_device_mapping_v2", mapping), ("min_count", json!(1)), ("max_count", json!("1"))],
        )
        .await;
    let made = scene.created(&answer);
    assert_eq!(made.name, "s1");
    assert!(matches!(made.nics[..], [NicRequest::Network(network, None)] if network == scene.network));
    let body = answer.json();
    assert!(body["server"]["links"][0]["href"].as_str().unwrap().ends_with(&made.id.to_string()));
    assert!(answer.header("location").ends_with(&made.id.to_string()));
}

#[tokio::test]
async fn several_servers_get_numbered_names() {
    let scene = Scene::new().await;
    let answer = scene.create(87, &[("min_count", json!(2)), ("max_count", json!(3))]).await;
    assert_eq!(scene.created(&answer).name, "s1-1");
    let mut names: Vec<String> =
        scene.api.app.ledger.read(|fleet| fleet.instances.values().map(|i| i.name.clone()).collect());
    names.sort();
    assert_eq!(names, ["s1-1", "s1-2", "s1-3", "web"]);
}

#[tokio::test]
async fn what_a_creation_names_and_cannot_have_is_refused_before_anything_is_made() {
    let scene = Scene::new().await;
    let id = InstanceId::random().to_string();
    let volume =
        json!([{ "uuid": id, "source_type": "volume", "destination_type": "volume", "boot_index": 0 }]);
    let grown = json!([{
        "uuid": scene.image, "source_type": "image", "destination_type": "volume", "boot_index": "0",
        "volume_size": "6",
    }]);
    let old = json!([{ "device_name": "vda", "volume_id": id, "delete_on_termination": "0" }]);
    let cases: &[(&[(&str, Value)], &str)] = &[
        (&[("imageRef", json!(id))], "Can not find requested image"),
        (&[("imageRef", json!("cirros"))], "must be the id of an image"),
        (&[("imageRef", json!(""))], "An image is needed"),
        (&[("flavorRef", json!("m1.tiny"))], "must be a flavor's id"),
        (&[("flavorRef", Value::Null)], "flavorRef"),
        (&[("networks", json!([{ "uuid": id }]))], "Network"),
        (&[("networks", json!([{ "uuid": "net1" }]))], "Network net1"),
        (&[("networks", json!([{ "port": id }]))], "Port"),
        (&[("networks", json!([{}]))], "'uuid' or 'port'"),
        (&[("networks", json!("some"))], "\"auto\" or \"none\""),
        (&[("networks", Value::Null)], "required"),
        (&[("name", json!(""))], "name"),
        (&[("name", json!("a".repeat(256)))], "256"),
        (&[("min_count", json!(0))], "at least 1"),
        (&[("min_count", json!(3)), ("max_count", json!(2))], "min_count must be <="),
        (&[("max_count", json!(21))], "at most 20"),
        (&[("key_name", json!("mine"))], "key pair 'mine'"),
        (&[("user_data", json!("not base64!"))], "base64"),
        (&[("availability_zone", json!("mars"))], "'nova'"),
        (&[("availability_zone", json!("nova:h9"))], "h9"),
        (&[("host", json!("h9"))], "h9"),
        (&[("host", json!("h1")), ("availability_zone", json!("nova:h1"))], "twice"),
        (&[("block_device_mapping_v2", volume)], "Volumes are not supported"),
        (&[("block_device_mapping_v2", grown)], "Volumes are not supported"),
        (&[("block_device_mapping", old)], "Volumes are not supported"),
        (&[("security_groups", json!([{ "name": "mine" }]))], "Security group mine not found"),
        (&[("tags", json!(["a"]))], "tags"),
        (&[("colour", json!("red"))], "colour"),
        (&[("metadata", json!({ "a": 1 }))], "'a'"),
    ];
    for (other, part) in cases {
        let (code, text) = fault(&scene.create(87, other).await);
        assert_eq!(code, 400, "{other:?}: {text}");
        assert!(text.contains(part), "{other:?}: {text}");
    }
    assert_eq!(scene.api.app.ledger.read(|fleet| fleet.instances.len()), 1);
}

#[tokio::test]
async fn a_flavor_that_contradicts_itself_is_refused_with_key_and_rule() {
    let scene = Scene::new().await;
    let specs = [("hw:numa_nodes", "1"), ("hw:cpu_thread_policy", "isolate")];
    let extra_specs = specs.map(|(k, v)| (k.to_owned(), v.to_owned())).into();
    scene.apply(vec![Flavor { extra_specs, ..a_flavor() }.into()]).await;
    let (code, text) = fault(&scene.create(87, &[]).await);
    assert_eq!(code, 400);
    assert!(
        text.contains("hw:cpu_thread_policy") && text.contains("thread_policy_needs_dedicated"),
        "{text}"
    );
}

#[tokio::test]
async fn only_an_administrator_chooses_the_host() {
    let scene = Scene::new().await;
    let changes = vec![Network { shared: true, ..scene.a_network() }.into()];
    scene.apply(changes).await;
    let wish = [("availability_zone", json!("nova:h1"))];
    let answer = scene.ask_as(As::Member, 87, Method::POST, "/servers", scene.new_server(&wish)).await;
    assert_eq!(answer.status, 403);
    let answer = scene.ask_as(As::Member, 87, Method::POST, "/servers", scene.new_server(&[])).await;
    assert_eq!(scene.created(&answer).project, scene.api.member.1);
    assert_eq!(scene.created(&scene.create(87, &wish).await).wanted_host, Some(scene.host));
    let answer = scene.ask_as(As::Reader, 87, Method::POST, "/servers", scene.new_server(&[])).await;
    assert_eq!(answer.status, 403);
}

#[tokio::test]
async fn networks_may_be_left_to_the_cloud_where_there_is_one_answer() {
    let scene = Scene::new().await;
    for networks in [json!("auto"), json!([])] {
        let minor = if networks.is_array() { 36 } else { 87 };
        let made = scene.created(&scene.create(minor, &[("networks", networks)]).await);
        assert!(matches!(made.nics[..], [NicRequest::Network(network, None)] if network == scene.network));
    }
    let none = scene.created(&scene.create(87, &[("networks", json!("none"))]).await);
    assert!(none.nics.is_empty());
    scene.apply(vec![Network { id: NetworkId::random(), vni: 1002, ..scene.a_network() }.into()]).await;
    assert_eq!(scene.create(87, &[("networks", json!("auto"))]).await.status, 409);
}

#[tokio::test]
async fn a_name_in_a_path_is_not_found_and_never_a_bad_request() {
    let scene = Scene::new().await;
    for path in [
        "/servers/web",
        "/flavors/m1.tiny",
        "/os-hypervisors/h1",
        "/os-keypairs/k",
        "/servers/1/migrations/7",
        "/os-aggregates/x",
    ] {
        assert_eq!(scene.ask(87, Method::GET, path, Value::Null).await.status, 404, "{path}");
    }
    let (code, text) = fault(&scene.ask(87, Method::GET, "/servers/web", Value::Null).await);
    assert_eq!((code, text.as_str()), (404, "Instance web could not be found."));
}

#[tokio::test]
async fn another_project_s_server_is_not_found_by_anybody_but_administrators() {
    let scene = Scene::new().await;
    let path = format!("/servers/{}", scene.instance);
    for method in [Method::GET, Method::DELETE] {
        assert_eq!(scene.ask_as(As::Member, 87, method, &path, Value::Null).await.status, 404);
    }
    assert_eq!(
        scene.ask_as(As::Member, 87, Method::GET, "/servers", Value::Null).await.json()["servers"],
        json!([])
    );
    let all = scene.ask_as(As::Member, 87, Method::GET, "/servers?all_tenants=1", Value::Null).await;
    assert_eq!(all.status, 403);
}

#[tokio::test]
async fn servers_are_found_by_what_clients_filter_with() {
    let scene = Scene::new().await;
    let mut second = scene.an_instance();
    (second.id, second.name, second.status) = (InstanceId::random(), "db".into(), InstanceStatus::Stopped);
    second.created_at += time::Duration::HOUR;
    scene.apply(vec![second.into()]).await;
    for (query, expected) in [
        ("", "db web"),
        ("?name=we", "web"),
        ("?name=%5Edb%24", "db"),
        ("?status=SHUTOFF", "db"),
        ("?status=active&deleted=False", "web"),
        ("?host=h1&all_tenants=True", "db web"),
        ("?deleted=True", ""),
        ("?ip=10.0.0.5", "web"),
        ("?sort_key=display_name&sort_dir=desc", "web db"),
        ("?limit=1", "db"),
        ("?changes-since=1970-01-01T00:30:00Z", ""),
        ("?flavor=1&vm_state=stopped", "db"),
    ] {
        let listed = scene.get(87, &format!("/servers/detail{query}")).await;
        let names: Vec<&str> =
            listed["servers"].as_array().unwrap().iter().map(|s| s["name"].as_str().unwrap()).collect();
        assert_eq!(names.join(" "), expected, "{query}");
    }
    let first = scene.get(87, "/servers?limit=1").await;
    let next = first["servers_links"][0]["href"].as_str().unwrap();
    let rest = scene.get(87, next.strip_prefix("https://127.0.0.1:8774/compute/v2.1").unwrap()).await;
    assert_eq!(rest["servers"][0]["name"], "web");
    assert!(rest.get("servers_links").is_none(), "that was the last page");
    for bad in ["?marker=nothing", "?name=%28", "?colour=red", "?status=FINE", "?limit=x"] {
        assert_eq!(
            scene.ask(87, Method::GET, &format!("/servers{bad}"), Value::Null).await.status,
            400,
            "{bad}"
        );
    }
    assert_eq!(
        scene.ask(1, Method::GET, "/servers?colour=red", Value::Null).await.status,
        200,
        "as it was then"
    );
}

#[tokio::test]
async fn a_server_s_state_is_told_in_nova_s_words() {
    let scene = Scene::new().await;
    let path = format!("/servers/{}", scene.instance);
    for (state, task, status, task_state) in [
        (InstanceStatus::Building, Some(Task::Copying), "BUILD", json!("block_device_mapping")),
        (InstanceStatus::Active, None, "ACTIVE", json!(null)),
        (InstanceStatus::Active, Some(Task::Migrating), "MIGRATING", json!("migrating")),
        (InstanceStatus::Active, Some(Task::Rebooting), "REBOOT", json!("rebooting")),
        (InstanceStatus::Stopped, Some(Task::Resetting), "HARD_REBOOT", json!("rebooting_hard")),
        (InstanceStatus::Paused, None, "PAUSED", json!(null)),
        (InstanceStatus::Stopped, Some(Task::Starting), "SHUTOFF", json!("powering-on")),
        (InstanceStatus::Active, Some(Task::Deleting), "ACTIVE", json!("deleting")),
        (InstanceStatus::Stopped, Some(Task::ResizeMigrating), "RESIZE", json!("resize_migrating")),
        (InstanceStatus::Resized, None, "VERIFY_RESIZE", json!(null)),
        (InstanceStatus::Resized, Some(Task::ResizeReverting), "REVERT_RESIZE", json!("resize_reverting")),
        (InstanceStatus::Stopped, Some(Task::ResizeReverting), "REVERT_RESIZE", json!("resize_reverting")),
    ] {
        scene.apply(vec![Instance { status: state, task, ..scene.an_instance() }.into()]).await;
        let shown = scene.get(87, &path).await;
        assert_eq!(
            (&shown["server"]["status"], &shown["server"]["OS-EXT-STS:task_state"]),
            (&json!(status), &task_state)
        );
    }
    let fault = Some(Fault { message: "h1: memory_pool_full".into(), at: Time::UNIX_EPOCH });
    let failed = scene.an_operation(Verb::CreateInstance, Phase::Failed, Some("x"));
    let broken = Instance { status: InstanceStatus::Error, fault, ..scene.an_instance() };
    scene.apply(vec![broken.into(), failed.into()]).await;
    let fault = scene.get(87, &path).await["server"]["fault"].clone();
    assert_eq!((&fault["code"], &fault["message"]), (&json!(500), &json!("h1: memory_pool_full")));
    assert_eq!(fault["created"], "1970-01-01T00:00:00Z");
    assert!(fault["details"].as_str().unwrap().contains("create_instance"));
}

#[tokio::test]
async fn an_action_that_is_not_built_says_so_and_one_that_is_not_known_too() {
    let scene = Scene::new().await;
    let path = format!("/servers/{}/action", scene.instance);
    for (body, code, part) in [
        (json!({ "rebuild": { "imageRef": "2" } }), 501, "create it again"),
        (json!({ "createImage": { "name": "x" } }), 501, "not supported"),
        (json!({ "dance": null }), 400, "dance"),
        (json!({ "os-start": null, "os-stop": null }), 400, "one action"),
        (json!({ "reboot": { "type": "GENTLE" } }), 400, "HARD or SOFT"),
        (json!({ "os-start": null }), 409, "while it is"),
        (json!({ "os-migrateLive": { "host": "h9", "block_migration": "auto" } }), 400, "h9"),
        (json!({ "os-migrateLive": { "host": "h1", "block_migration": "auto" } }), 400, "already"),
        (json!({ "os-migrateLive": { "host": null, "block_migration": true } }), 400, "block_migration"),
        (json!({ "os-getConsoleOutput": { "length": 10 } }), 503, "not connected"),
    ] {
        let (status, text) = fault(&scene.post(87, &path, body.clone()).await);
        assert_eq!(status, code, "{body}: {text}");
        assert!(text.contains(part), "{body}: {text}");
    }
    let id = scene.instance;
    for path in ["os-volume_attachments", "os-interface", "remote-consoles"] {
        assert_eq!(scene.post(87, &format!("/servers/{id}/{path}"), json!({})).await.status, 501, "{path}");
    }
}

#[tokio::test]
async fn stopping_is_accepted_and_seen_at_once() {
    let scene = Scene::new().await;
    let path = format!("/servers/{}", scene.instance);
    let answer = scene.post(87, &format!("{path}/action"), json!({ "os-stop": null })).await;
    assert_eq!((answer.status.as_u16(), answer.bytes.len()), (202, 0));
    let shown = scene.get(87, &path).await;
    assert_eq!(shown["server"]["OS-EXT-STS:task_state"], "powering-off");
    let (code, text) = fault(&scene.post(87, &format!("{path}/action"), json!({ "pause": null })).await);
    assert_eq!(code, 409, "{text}");
    let actions = scene.get(84, &format!("{path}/os-instance-actions")).await;
    assert_eq!(actions["instanceActions"][0]["action"], "stop");
}

#[tokio::test]
async fn a_migration_that_ended_is_in_the_history_and_no_longer_with_its_server() {
    let scene = Scene::new().await;
    scene.apply(vec![scene.a_migration(7, MigrationStatus::Completed).into()]).await;
    let path = format!("/servers/{}/migrations", scene.instance);
    assert_eq!(scene.get(87, &path).await, json!({ "migrations": [] }));
    for method in [Method::GET, Method::DELETE] {
        assert_eq!(scene.ask(87, method, &format!("{path}/7"), Value::Null).await.status, 404);
    }
    let history = scene.get(80, &format!("/os-migrations?instance_uuid={}", scene.instance)).await;
    assert_eq!(history["migrations"][0]["status"], "completed");
    assert_eq!(scene.get(80, "/os-migrations?status=error").await, json!({ "migrations": [] }));
    scene.apply(vec![scene.a_migration(8, MigrationStatus::Running).into()]).await;
    let forced = scene.post(80, &format!("{path}/8/action"), json!({ "force_complete": null })).await;
    assert_eq!(forced.status, 501);
}

#[tokio::test]
async fn a_host_is_disabled_and_enabled_as_a_service() {
    let scene = Scene::new().await;
    let path = format!("/os-services/{}", scene.host);
    let body = json!({ "status": "disabled", "disabled_reason": "maint" });
    let answer = scene.ask(69, Method::PUT, &path, body).await;
    let service = &answer.json()["service"];
    assert_eq!((&service["status"], &service["disabled_reason"]), (&json!("disabled"), &json!("maint")));
    assert!(!scene.api.app.ledger.read(|fleet| fleet.hosts[&scene.host].enabled));
    let old = json!({ "host": "h1", "binary": "nova-compute" });
    let answer = scene.ask(1, Method::PUT, "/os-services/enable", old.clone()).await;
    let expected = json!({ "service": { "host": "h1", "binary": "nova-compute", "status": "enabled" } });
    assert_eq!(answer.json(), expected);
    assert!(scene.api.app.ledger.read(|fleet| fleet.hosts[&scene.host].enabled));
    for body in
        [json!({ "status": "asleep" }), json!({ "status": "enabled", "disabled_reason": "x" }), json!({})]
    {
        assert_eq!(scene.ask(69, Method::PUT, &path, body).await.status, 400);
    }
    assert_eq!(scene.ask(69, Method::PUT, &path, json!({ "forced_down": true })).await.status, 501);
    let as_member = scene.ask_as(As::Member, 69, Method::PUT, &path, json!({ "status": "disabled" })).await;
    assert_eq!(as_member.status, 403);
}

#[tokio::test]
async fn flavors_and_their_specs_are_made_changed_and_removed() {
    let scene = Scene::new().await;
    let body = json!({ "flavor": {
        "name": "numa1", "ram": 1024, "vcpus": 2, "disk": 5, "id": null, "swap": 0,
        "OS-FLV-EXT-DATA:ephemeral": 0, "rxtx_factor": 1.0, "os-flavor-access:is_public": true,
    } });
    let made = scene.post(61, "/flavors", body.clone()).await;
    assert_eq!(made.status, 200, "{}", made.text());
    let id = made.json()["flavor"]["id"].as_str().unwrap().to_owned();
    assert_eq!(scene.post(61, "/flavors", body).await.status, 409);
    let specs = json!({ "extra_specs": { "hw:numa_nodes": "2", "hw:mem_page_size": "large" } });
    assert_eq!(scene.post(61, &format!("/flavors/{id}/os-extra_specs"), specs.clone()).await.json(), specs);
    let bad = json!({ "extra_specs": { "hw:numa_nodes": "0" } });
    let (code, text) = fault(&scene.post(61, &format!("/flavors/{id}/os-extra_specs"), bad).await);
    assert_eq!(code, 400);
    assert!(text.contains("hw:numa_nodes=0"), "{text}");
    let key = format!("/flavors/{id}/os-extra_specs/hw:numa_nodes");
    assert_eq!(scene.get(61, &key).await, json!({ "hw:numa_nodes": "2" }));
    assert_eq!(scene.ask(61, Method::DELETE, &key, Value::Null).await.status, 200);
    assert_eq!(scene.ask(61, Method::DELETE, &key, Value::Null).await.status, 404);
    let as_member =
        scene.ask_as(As::Member, 61, Method::DELETE, &format!("/flavors/{id}"), Value::Null).await;
    assert_eq!(as_member.status, 403);
    assert_eq!(scene.ask(61, Method::DELETE, &format!("/flavors/{id}"), Value::Null).await.status, 202);
    for bad in [json!({ "ram": 0 }), json!({ "swap": 512 }), json!({ "vcpus": "many" }), json!({ "x": 1 })] {
        let mut body = json!({ "name": "n", "ram": 1, "vcpus": 1, "disk": 1 });
        body.as_object_mut().unwrap().extend(bad.as_object().unwrap().clone());
        assert_eq!(scene.post(61, "/flavors", json!({ "flavor": body })).await.status, 400, "{bad}");
    }
}

#[tokio::test]
async fn a_private_flavor_is_an_administrator_s_alone() {
    let scene = Scene::new().await;
    scene
        .apply(vec![Flavor { id: "9".into(), name: "big".into(), public: false, ..a_flavor() }.into()])
        .await;
    assert_eq!(scene.ask_as(As::Member, 87, Method::GET, "/flavors/9", Value::Null).await.status, 404);
    for (query, count) in [("", 1), ("?is_public=None", 2), ("?is_public=False", 1)] {
        let listed = scene.get(61, &format!("/flavors/detail{query}")).await;
        assert_eq!(listed["flavors"].as_array().unwrap().len(), count, "{query}");
    }
}

#[tokio::test]
async fn a_key_pair_is_taken_or_made_and_its_private_half_given_once() {
    let scene = Scene::new().await;
    let public = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGHCUe3+PxTFkvrOJzMe/eD3gHZb+TYj8KXSPuc+M5IN a@b\n";
    let body = json!({ "keypair": { "name": "k1", "public_key": public } });
    let taken = scene.post(10, "/os-keypairs", body.clone()).await;
    assert_eq!(taken.status, 201);
    assert!(taken.json()["keypair"].get("private_key").is_none());
    assert_eq!(scene.post(10, "/os-keypairs", body).await.status, 409);
    let made = scene.post(1, "/os-keypairs", json!({ "keypair": { "name": "k2" } })).await;
    assert_eq!(made.status, 200);
    assert!(
        made.json()["keypair"]["private_key"].as_str().unwrap().starts_with("-----BEGIN OPENSSH PRIVATE KEY")
    );
    let shown = scene.get(10, "/os-keypairs/k2").await;
    assert!(shown["keypair"].get("private_key").is_none());
    assert_eq!(shown["keypair"]["type"], "ssh");
    let bad = json!({ "keypair": { "name": "k3", "public_key": "ssh-rsa nonsense" } });
    assert_eq!(scene.post(10, "/os-keypairs", bad).await.status, 400);
    assert_eq!(scene.ask_as(As::Member, 10, Method::GET, "/os-keypairs/k1", Value::Null).await.status, 404);
    assert_eq!(scene.ask(10, Method::DELETE, "/os-keypairs/k1", Value::Null).await.status, 204);
    let named = scene.create(87, &[("key_name", json!("k2"))]).await;
    assert_eq!(scene.created(&named).key.unwrap().0, "k2");
}

#[tokio::test]
async fn metadata_is_merged_replaced_and_taken_out() {
    let scene = Scene::new().await;
    let path = format!("/servers/{}/metadata", scene.instance);
    let body = |a: Value| json!({ "metadata": a });
    let merged = scene.post(87, &path, body(json!({ "a": "1", "b": "2" }))).await;
    assert_eq!(merged.json(), body(json!({ "a": "1", "b": "2" })));
    let set = scene.ask(87, Method::PUT, &format!("{path}/a"), json!({ "meta": { "a": "3" } })).await;
    assert_eq!(set.json(), json!({ "meta": { "a": "3" } }));
    assert_eq!(scene.ask(87, Method::DELETE, &format!("{path}/b"), Value::Null).await.status, 204);
    assert_eq!(scene.get(87, &path).await, body(json!({ "a": "3" })));
    assert_eq!(scene.ask(87, Method::PUT, &path, body(json!({}))).await.json(), body(json!({})));
    assert_eq!(scene.ask(87, Method::GET, &format!("{path}/a"), Value::Null).await.status, 404);
}

#[tokio::test]
async fn usage_counts_what_a_project_s_servers_ran() {
    let scene = Scene::new().await;
    let project = scene.api.admin.1;
    let query = "start=1970-01-01T00:00:00&end=1970-01-01T02:00:00";
    let shown = scene.get(75, &format!("/os-simple-tenant-usage/{project}?{query}")).await;
    let usage = &shown["tenant_usage"];
    assert_eq!((&usage["total_hours"], &usage["total_memory_mb_usage"]), (&json!(2.0), &json!(1024.0)));
    assert_eq!(usage["server_usages"][0]["instance_id"], json!(scene.instance));
    let listed = scene.get(75, &format!("/os-simple-tenant-usage?detailed=1&{query}")).await;
    assert_eq!(listed["tenant_usages"][0]["tenant_id"], json!(project));
    let next = format!("/os-simple-tenant-usage/{project}?{query}&marker={}", scene.instance);
    assert_eq!(
        scene.get(75, &next).await,
        json!({ "tenant_usage": {} }),
        "clients ask on until nothing comes"
    );
    let backwards =
        scene.ask(75, Method::GET, "/os-simple-tenant-usage?start=2026-01-02&end=2026-01-01", Value::Null);
    assert_eq!(backwards.await.status, 400);
}
