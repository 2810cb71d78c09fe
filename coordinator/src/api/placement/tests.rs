//! The placement API over a fleet in memory.

use crate::api::compute::tests::Scene;
use axum::http::Method;
use serde_json::{Value, json};

async fn get(scene: &Scene, path: &str) -> Value {
    let headers = [("openstack-api-version", "placement 1.29")];
    let path = format!("/placement{path}");
    let answer =
        scene.api.ask(crate::api::testing::As::Admin, Method::GET, &path, &headers, Value::Null).await;
    assert_eq!(answer.status, 200, "{path}: {}", answer.text());
    assert_eq!(answer.header("openstack-api-version"), "placement 1.29");
    answer.json()
}

#[tokio::test]
async fn a_host_is_a_resource_provider_with_what_it_has_and_what_is_held() {
    let scene = Scene::new().await;
    let listed = get(&scene, "/resource_providers?name=h1").await;
    let provider = &listed["resource_providers"][0];
    assert_eq!((&provider["uuid"], &provider["name"]), (&json!(scene.host), &json!("h1")));
    assert_eq!(provider["root_provider_uuid"], json!(scene.host));
    let path = format!("/resource_providers/{}", scene.host);
    let inventories = get(&scene, &format!("{path}/inventories")).await["inventories"].clone();
    let totals = ["VCPU", "PCPU", "MEMORY_MB", "DISK_GB"].map(|class| inventories[class]["total"].clone());
    assert_eq!(totals, [json!(2), json!(2), json!(8192), json!(100)]);
    assert_eq!(inventories["VCPU"]["allocation_ratio"], 16.0);
    assert_eq!(inventories["MEMORY_MB"]["reserved"], 512);
    let usages = get(&scene, &format!("{path}/usages")).await["usages"].clone();
    assert_eq!(usages, json!({ "VCPU": 1, "PCPU": 0, "MEMORY_MB": 512, "DISK_GB": 1 }));
    let allocations = get(&scene, &format!("/allocations/{}", scene.instance)).await;
    let held = json!({ "VCPU": 1, "MEMORY_MB": 512, "DISK_GB": 1 });
    assert_eq!(allocations["allocations"][scene.host.to_string()]["resources"], held);
    let traits = get(&scene, &format!("{path}/traits")).await["traits"].clone();
    assert_eq!(
        (traits, get(&scene, &format!("{path}/aggregates")).await["aggregates"].clone()),
        (json!(["HW_CPU_HYPERTHREADING"]), json!([]))
    );
    assert_eq!(get(&scene, "/resource_providers?name=h9").await, json!({ "resource_providers": [] }));
}

#[tokio::test]
async fn what_is_no_host_is_not_found_in_placement_s_words() {
    let scene = Scene::new().await;
    let answer = scene.api.get("/placement/resource_providers/h1").await;
    assert_eq!(answer.status, 404);
    assert_eq!(answer.json()["errors"][0]["status"], 404);
}
