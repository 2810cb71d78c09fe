//! Resizes and cold migrations, as clients ask for them and see them.

use super::requests::fault;
use super::*;
use crate::fleet::instance::Task;
use crate::fleet::migration::{Resize, Shape};
use godwit_protocol::reservation::Reservation;
use serde_json::json;

impl Scene {
    fn held(&self, memory_mib: u64) -> Reservation {
        Reservation {
            instance: self.instance,
            vcpus: 1,
            memory_bytes: memory_mib << 20,
            cells: vec![],
            emulator_cpus: vec![],
            idle_cpus: vec![],
        }
    }

    fn another_flavor(&self, id: &str, disk_gib: u64) -> Flavor {
        Flavor { id: id.into(), name: format!("m1.{id}"), memory_mib: 1024, disk_gib, ..a_flavor() }
    }

    /// The server holds what it should, and there is a flavor "9" with a larger disk, and "8" with none.
    async fn prepared(&self) {
        let instance = Instance { reservation: Some(self.held(512)), ..self.an_instance() };
        let flavors = [self.another_flavor("9", 2), self.another_flavor("8", 0)];
        self.apply(flavors.map(Change::from).into_iter().chain([instance.into()]).collect()).await;
    }

    /// A resize to flavor "9" that waits, and its server.
    fn a_resize(&self, status: MigrationStatus) -> (Migration, Instance) {
        let shape = |flavor: Flavor| Shape {
            disk_bytes: flavor.disk_gib * GIB,
            flavor: flavor.into(),
            topology: None,
        };
        let new = shape(self.another_flavor("9", 2));
        let instance = Instance {
            status: InstanceStatus::Resized,
            flavor: new.flavor.clone(),
            disk_bytes: new.disk_bytes,
            reservation: Some(self.held(1024)),
            ..self.an_instance()
        };
        let old = shape(a_flavor());
        let resize = Resize { old, new, old_reservation: self.held(512), ran: true };
        let migration = Migration {
            kind: MigrationKind::Resize,
            resize: Some(resize),
            target: Some(self.host),
            reservation: instance.reservation.clone(),
            switched_at: Some(Time::UNIX_EPOCH),
            ..self.a_migration(7, status)
        };
        (migration, instance)
    }
}

#[tokio::test]
async fn what_a_resize_cannot_be_is_refused_in_nova_s_words() {
    let scene = Scene::new().await;
    scene.prepared().await;
    let path = format!("/servers/{}/action", scene.instance);
    let paused = Instance { status: InstanceStatus::Paused, ..scene.an_instance() };
    for (minor, body, code, part) in [
        (87, json!({ "resize": { "flavorRef": "1" } }), 400, "When resizing, instances must change flavor!"),
        (87, json!({ "resize": { "flavorRef": "none" } }), 400, "could not be found"),
        (87, json!({ "resize": { "flavorRef": "8" } }), 400, "Server disk was unable to be resized"),
        (87, json!({ "resize": {} }), 400, "flavorRef"),
        (87, json!({ "resize": { "flavorRef": "9", "colour": 1 } }), 400, "colour"),
        (87, json!({ "resize": { "flavorRef": 9 } }), 400, "flavorRef"),
        (87, json!({ "resize": null }), 400, "resize"),
        (87, json!({ "migrate": { "host": "h9" } }), 400, "h9"),
        (
            87,
            json!({ "migrate": { "host": "h1" } }),
            400,
            "Cannot migrate to the host where the server exists",
        ),
        (87, json!({ "migrate": {} }), 400, "host"),
        (87, json!({ "migrate": { "host": null, "force": true } }), 400, "force"),
        (1, json!({ "confirmResize": null }), 409, "Cannot 'confirmResize' instance"),
        (1, json!({ "revertResize": null }), 409, "while it is in vm_state active"),
    ] {
        let (status, text) = fault(&scene.post(minor, &path, body.clone()).await);
        assert_eq!(status, code, "{body}: {text}");
        assert!(text.contains(part), "{body}: {text}");
    }
    scene.apply(vec![paused.into()]).await;
    for body in [json!({ "resize": { "flavorRef": "9" } }), json!({ "migrate": null })] {
        let (status, text) = fault(&scene.post(87, &path, body.clone()).await);
        assert_eq!((status, text.contains("while it is in vm_state paused")), (409, true), "{body}: {text}");
    }
    let (_, other) = scene.a_resize(MigrationStatus::Finished);
    let smaller = scene.another_flavor("7", 1);
    let active = Instance { status: InstanceStatus::Active, ..other };
    scene.apply(vec![active.into(), smaller.into()]).await;
    let (status, text) = fault(&scene.post(87, &path, json!({ "resize": { "flavorRef": "7" } })).await);
    assert_eq!((status, text.contains("Unable to resize disk down")), (400, true), "{text}");
}

#[tokio::test]
async fn a_resize_is_accepted_seen_at_once_and_one_at_a_time() {
    let scene = Scene::new().await;
    scene.prepared().await;
    let path = format!("/servers/{}", scene.instance);
    let answer = scene.post(87, &format!("{path}/action"), json!({ "resize": { "flavorRef": "9" } })).await;
    assert_eq!((answer.status.as_u16(), answer.bytes.len()), (202, 0), "{}", answer.text());
    let server = scene.get(87, &path).await["server"].clone();
    assert_eq!(
        (&server["status"], &server["OS-EXT-STS:vm_state"], &server["progress"]),
        (&json!("RESIZE"), &json!("active"), &json!(0))
    );
    assert!(server["OS-EXT-STS:task_state"].as_str().unwrap().starts_with("resize_"), "{server}");
    let again = scene.post(87, &format!("{path}/action"), json!({ "migrate": null })).await;
    assert_eq!(again.status, 409);
    let actions = scene.get(84, &format!("{path}/os-instance-actions")).await;
    assert_eq!(actions["instanceActions"][0]["action"], "resize");
    let history = scene.get(80, "/os-migrations?migration_type=resize").await;
    let migration = &history["migrations"][0];
    assert_eq!(
        (&migration["old_instance_type_id"], &migration["new_instance_type_id"]),
        (&json!(1), &json!(9)),
        "{migration}"
    );
    assert_eq!(scene.get(80, "/os-migrations?migration_type=migration").await, json!({ "migrations": [] }));
}

#[tokio::test]
async fn a_resized_server_says_so_until_it_is_decided_and_does_nothing_else() {
    let scene = Scene::new().await;
    scene.prepared().await;
    let (migration, instance) = scene.a_resize(MigrationStatus::Finished);
    scene.apply(vec![migration.clone().into(), instance.clone().into()]).await;
    let path = format!("/servers/{}", scene.instance);
    let server = scene.get(87, &path).await["server"].clone();
    assert_eq!(
        (&server["status"], &server["OS-EXT-STS:vm_state"]),
        (&json!("VERIFY_RESIZE"), &json!("resized"))
    );
    assert_eq!(
        (&server["flavor"]["original_name"], &server["OS-EXT-STS:power_state"]),
        (&json!("m1.9"), &json!(1))
    );
    assert_eq!(scene.get(87, "/servers?status=verify_resize").await["servers"].as_array().unwrap().len(), 1);
    let action = format!("{path}/action");
    for (body, name) in [
        (json!({ "os-stop": null }), "stop"),
        (json!({ "os-start": null }), "start"),
        (json!({ "reboot": { "type": "HARD" } }), "reboot"),
        (json!({ "pause": null }), "pause"),
        (json!({ "resize": { "flavorRef": "1" } }), "resize"),
        (json!({ "migrate": null }), "migrate"),
        (json!({ "os-migrateLive": { "host": null, "block_migration": "auto" } }), "os-migrateLive"),
    ] {
        let (status, text) = fault(&scene.post(87, &action, body).await);
        let words = format!("Cannot '{name}' instance {} while it is in vm_state resized", scene.instance);
        assert_eq!((status, text), (409, words));
    }
    // One that is running live only is a server's own.
    assert_eq!(scene.get(87, &format!("{path}/migrations")).await, json!({ "migrations": [] }));
    assert_eq!(scene.get(80, "/os-migrations").await["migrations"][0]["status"], "finished");
    let reverting = Instance { task: Some(Task::ResizeReverting), ..instance };
    scene.apply(vec![reverting.into()]).await;
    assert_eq!(scene.get(87, &path).await["server"]["status"], "REVERT_RESIZE");
    let placement = format!("/allocations/{}", migration.id);
    let headers = [("openstack-api-version", "placement 1.29")];
    let answer = scene
        .api
        .ask(As::Admin, Method::GET, &format!("/placement{placement}"), &headers, Value::Null)
        .await
        .json();
    let resources = &answer["allocations"][scene.host.to_string()]["resources"];
    assert_eq!(resources, &json!({ "VCPU": 1, "MEMORY_MB": 512 }), "{answer}");
}

#[tokio::test]
async fn a_confirmation_answers_204_and_a_reversal_without_the_old_host_says_what_to_do() {
    let scene = Scene::new().await;
    scene.prepared().await;
    let (migration, instance) = scene.a_resize(MigrationStatus::Finished);
    scene.apply(vec![migration.into(), instance.into()]).await;
    let path = format!("/servers/{}/action", scene.instance);
    // No host of this scene has ever been heard of.
    let (status, text) = fault(&scene.post(87, &path, json!({ "revertResize": null })).await);
    assert_eq!((status, text.contains("h1 is lost")), (409, true), "{text}");
    let answer = scene.post(87, &path, json!({ "confirmResize": null })).await;
    assert_eq!((answer.status.as_u16(), answer.bytes.len()), (204, 0));
    assert_eq!(scene.get(80, "/os-migrations").await["migrations"][0]["status"], "confirming");
}

#[tokio::test]
async fn a_resize_that_nobody_decides_about_is_confirmed_when_its_window_is_over() {
    use crate::operations::confirm_resize::overdue;
    let scene = Scene::new().await;
    let (migration, instance) = scene.a_resize(MigrationStatus::Finished);
    let decided = Migration { status: MigrationStatus::Reverting, ..migration.clone() };
    scene.apply(vec![migration.into(), instance.into()]).await;
    let window = std::time::Duration::from_secs(60);
    let due = |seconds| {
        let now = Time::UNIX_EPOCH + std::time::Duration::from_secs(seconds);
        scene.api.app.ledger.read(|fleet| overdue(fleet, window, now))
    };
    assert_eq!((due(59), due(60)), (vec![], vec![scene.instance]));
    scene.apply(vec![decided.into()]).await;
    assert_eq!(due(3600), []);
}
