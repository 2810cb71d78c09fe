//! Aggregates, zones and server groups, as clients see them.

use super::fields::{names, set};
use super::*;
use serde_json::json;

fn body(answer: &Answer) -> Value {
    assert!(answer.status == 200, "{} {}", answer.status, answer.text());
    answer.json()
}

#[tokio::test]
async fn an_aggregate_puts_its_hosts_into_a_zone() {
    let scene = Scene::new().await;
    let made = scene
        .post(81, "/os-aggregates", json!({ "aggregate": { "name": "a", "availability_zone": "z1" } }))
        .await;
    let made = body(&made)["aggregate"].clone();
    let fields =
        ["availability_zone", "created_at", "deleted", "deleted_at", "id", "name", "updated_at", "uuid"];
    assert_eq!(names(&made), set(&[&fields]));
    assert_eq!((&made["id"], &made["availability_zone"]), (&json!(1), &json!("z1")));
    let act = |action: Value| scene.post(1, "/os-aggregates/1/action", action);
    // The one host has a server, whose zone must not change under it.
    let refused = act(json!({ "add_host": { "host": "h1" } })).await;
    assert_eq!(refused.status, 409, "{}", refused.text());
    let gone = scene.api.app.ledger.read(|fleet| fleet.instances.values().map(Change::gone).collect());
    scene.apply(gone).await;
    let added = body(&act(json!({ "add_host": { "host": "h1" } })).await);
    assert_eq!(added["aggregate"]["hosts"], json!(["h1"]));
    assert_eq!(names(&added["aggregate"]).len(), fields.len() + 1, "two more, and no uuid below 2.41");
    assert_eq!(act(json!({ "add_host": { "host": "h1" } })).await.status, 409);
    assert_eq!(act(json!({ "add_host": { "host": "h9" } })).await.status, 404);
    let set =
        act(json!({ "set_metadata": { "metadata": { "numa": "1", "availability_zone": "z1" } } })).await;
    assert_eq!(body(&set)["aggregate"]["metadata"], json!({ "availability_zone": "z1", "numa": "1" }));
    let zones = scene.get(1, "/os-availability-zone/detail").await;
    assert_eq!(zones["availabilityZoneInfo"][0]["zoneName"], "z1");
    assert_eq!(zones["availabilityZoneInfo"].as_array().map(Vec::len), Some(1), "nobody is left in nova");
    assert_eq!(scene.get(53, "/os-services").await["services"][0]["zone"], "z1");
    let second = scene
        .post(81, "/os-aggregates", json!({ "aggregate": { "name": "b", "availability_zone": "z2" } }))
        .await;
    assert_eq!(body(&second)["aggregate"]["id"], 2);
    let twice = scene.post(1, "/os-aggregates/2/action", json!({ "add_host": { "host": "h1" } })).await;
    assert!(twice.status == 409 && twice.text().contains("z1 and z2"), "{}", twice.text());
    let renamed =
        scene.ask(81, Method::PUT, "/os-aggregates/2", json!({ "aggregate": { "name": "a" } })).await;
    assert_eq!(renamed.status, 409);
    assert_eq!(scene.ask(81, Method::DELETE, "/os-aggregates/1", Value::Null).await.status, 409);
    assert_eq!(act(json!({ "remove_host": { "host": "h1" } })).await.status, 200);
    assert_eq!(scene.ask(81, Method::DELETE, "/os-aggregates/1", Value::Null).await.status, 200);
    assert_eq!(scene.ask(81, Method::GET, "/os-aggregates/1", Value::Null).await.status, 404);
    assert_eq!(
        scene.ask(81, Method::GET, "/os-aggregates/b", Value::Null).await.status,
        404,
        "clients look names up"
    );
    for (action, part) in [
        (json!({}), "one action"),
        (json!({ "dance": {} }), "dance"),
        (json!({ "set_metadata": { "metadata": { "a": 1 } } }), "metadata a"),
        (json!({ "set_metadata": { "metadata": { "availability_zone": "a:b" } } }), "colon"),
        (json!({ "set_metadata": {} }), "metadata"),
        (json!({ "add_host": { "host": "h1", "colour": "red" } }), "colour"),
    ] {
        let answer = scene.post(1, "/os-aggregates/2/action", action).await;
        assert!(answer.status == 400 && answer.text().contains(part), "{}", answer.text());
    }
}

#[tokio::test]
async fn a_server_group_has_the_fields_of_each_version() {
    let scene = Scene::new().await;
    let make = |minor, group: Value| scene.post(minor, "/os-server-groups", json!({ "server_group": group }));
    let old =
        body(&make(1, json!({ "name": "a", "policies": ["anti-affinity"] })).await)["server_group"].clone();
    assert_eq!(names(&old), set(&[&["id", "members", "metadata", "name", "policies"]]));
    let rules = json!({ "max_server_per_host": 2 });
    let new = body(&make(64, json!({ "name": "b", "policy": "anti-affinity", "rules": rules })).await);
    let new = &new["server_group"];
    assert_eq!(names(new), set(&[&["id", "members", "name", "policy", "project_id", "rules", "user_id"]]));
    assert_eq!((&new["rules"], &new["members"]), (&rules, &json!([])));
    let listed = scene.get(87, "/os-server-groups").await;
    assert_eq!(listed["server_groups"].as_array().map(Vec::len), Some(2));
    let path = format!("/os-server-groups/{}", new["id"].as_str().unwrap());
    assert_eq!(scene.get(13, &path).await["server_group"]["policies"], json!(["anti-affinity"]));
    for (minor, group, part) in [
        (14, json!({ "name": "a", "policies": ["soft-affinity"] }), "soft-affinity"),
        (64, json!({ "name": "a", "policies": ["affinity"] }), "policy"),
        (64, json!({ "name": "a", "policy": "near" }), "near"),
        (
            64,
            json!({ "name": "a", "policy": "affinity", "rules": { "max_server_per_host": 2 } }),
            "anti-affinity",
        ),
        (
            64,
            json!({ "name": "a", "policy": "anti-affinity", "rules": { "max_server_per_host": 0 } }),
            "at least 1",
        ),
        (64, json!({ "name": "", "policy": "affinity" }), "empty"),
        (1, json!({ "name": "a", "policies": ["affinity", "anti-affinity"] }), "one policy"),
    ] {
        let answer = make(minor, group).await;
        assert!(answer.status == 400 && answer.text().contains(part), "{}", answer.text());
    }
    assert_eq!(scene.ask(64, Method::DELETE, &path, Value::Null).await.status, 204);
    assert_eq!(scene.ask(64, Method::GET, &path, Value::Null).await.status, 404);
}

#[tokio::test]
async fn hints_are_taken_or_refused_by_name() {
    let scene = Scene::new().await;
    let group = scene
        .post(64, "/os-server-groups", json!({ "server_group": { "name": "a", "policy": "affinity" } }))
        .await;
    let group = body(&group)["server_group"]["id"].clone();
    let create = |hints: Value| {
        let server = json!({
            "name": "n", "imageRef": scene.image.to_string(), "flavorRef": "1", "networks": "none",
        });
        scene.post(71, "/servers", json!({ "server": server, "os:scheduler_hints": hints }))
    };
    let made = create(json!({ "group": group, "different_host": [scene.instance.to_string()] })).await;
    assert_eq!(made.status, 202, "{}", made.text());
    let id = made.json()["server"]["id"].clone();
    let shown = scene.get(71, &format!("/servers/{}", id.as_str().unwrap())).await;
    assert_eq!(shown["server"]["server_groups"], json!([group]));
    let members = scene.get(64, &format!("/os-server-groups/{}", group.as_str().unwrap())).await;
    assert_eq!(members["server_group"]["members"], json!([id]));
    let nobody = "00000000-0000-0000-0000-000000000001";
    for (hints, part) in [
        (json!({ "group": nobody }), "Instance group"),
        (json!({ "group": "x" }), "group"),
        (json!({ "same_host": nobody }), nobody),
        (json!({ "different_host": [1] }), "different_host"),
        (json!({ "query": "[]" }), "query"),
    ] {
        let answer = create(hints).await;
        assert!(answer.status == 400 && answer.text().contains(part), "{}", answer.text());
    }
}
