//! Hosts that are emptied while everything else goes on.

use crate::fleet::Fleet;
use crate::model::lock;
use godwit_coordinator::drain;
use godwit_coordinator::error::Error;
use godwit_coordinator::fleet::instance::InstanceStatus;
use godwit_coordinator::fleet::migration::MigrationStatus;
use godwit_coordinator::ledger::now;
use godwit_coordinator::operations::{delete_instance, power};
use godwit_coordinator::verbs;
use godwit_protocol::id::{HostId, InstanceId};

async fn drain(fleet: &Fleet, host: HostId) {
    let begin = |f: &_| verbs::host::drain(f, host, 1, fleet.user, now());
    fleet.app.ledger.change(begin).await.unwrap();
}

/// Waits until an instance is on a host and nothing runs on it. At no moment do two leave at once.
async fn arrives(fleet: &Fleet, id: InstanceId, host: HostId) {
    let what = format!("{id} has moved to {host}");
    let arrived = |f: &godwit_coordinator::fleet::Fleet| {
        let running = f.migrations.values().filter(|m| m.status.is_running()).count();
        assert!(running <= 1, "{running} instances leave at once");
        f.instances.get(&id).is_some_and(|i| i.host == Some(host)) && f.running_operation(id).is_none()
    };
    fleet.until(&what, arrived).await;
}

/// Why an instance does not leave a draining host; none: it does.
async fn held(fleet: &Fleet, host: HostId, id: InstanceId) -> Option<String> {
    let record = fleet.app.ledger.read(|f| f.hosts[&host].drain.clone()).unwrap();
    let left = serde_json::to_value(drain::left(&fleet.app, host, &record).await).unwrap();
    let entry = left.as_array().unwrap().iter().find(|left| left["server"] == id.to_string())?;
    (entry["state"] == "held").then(|| entry["reason"].as_str().unwrap().to_owned())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_draining_host_is_emptied_one_by_one_and_what_cannot_move_waits_for_the_fleet_to_change() {
    let fleet = Fleet::start(2).await;
    // Each takes a cell of its own: of the four cells in the fleet one is free.
    let mut by_host = std::collections::BTreeMap::<HostId, Vec<InstanceId>>::new();
    for _ in 0..3 {
        let id = fleet.create(2).await;
        let created = fleet.settled(id).await.unwrap();
        by_host.entry(created.host.unwrap()).or_default().push(id);
    }
    let (source, mut leaving) =
        by_host.iter().find(|(_, ids)| ids.len() == 2).map(|(h, i)| (*h, i.clone())).unwrap();
    let (target, in_the_way) =
        by_host.iter().find(|(_, ids)| ids.len() == 1).map(|(h, i)| (*h, i[0])).unwrap();
    leaving.sort_unstable();
    drain(&fleet, source).await;

    arrives(&fleet, leaving[0], target).await;
    fleet.until("the other has no place", |f| f.running_operation(leaving[1]).is_none()).await;
    let reason = held(&fleet, source, leaving[1]).await.unwrap();
    assert!(reason.contains("cpu_dedicated_free"), "{reason}");

    let refused = fleet.create(2).await;
    let refused = fleet.settled(refused).await.unwrap();
    assert_eq!(refused.status, InstanceStatus::Error);
    let text = refused.fault.unwrap().message;
    assert!(text.contains("host_draining"), "{text}");
    assert_eq!(fleet.instance(leaving[1]).unwrap().host, Some(source));

    delete_instance::request(&fleet.app, in_the_way).await.unwrap();
    arrives(&fleet, leaving[1], target).await;
    assert!(fleet.app.ledger.read(|f| f.held_on(source).is_empty()));

    fleet.app.ledger.change(|f| verbs::host::undrain(f, source)).await.unwrap();
    let next = fleet.create(2).await;
    assert_eq!(fleet.settled(next).await.unwrap().host, Some(source));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_instance_whose_migration_failed_is_sent_again_and_leaves_the_draining_host() {
    let fleet = Fleet::start(2).await;
    let id = fleet.create(1).await;
    let source = fleet.settled(id).await.unwrap().host.unwrap();
    lock(&fleet.world).refuse_next = Some("migrate");
    drain(&fleet, source).await;
    let failed = |m: &godwit_coordinator::fleet::migration::Migration| m.status == MigrationStatus::Failed;
    fleet.until("its migration fails", |f| f.migrations.values().any(failed)).await;
    fleet.until("it is undone", |f| f.running_operation(id).is_none()).await;
    fleet.until("it has left", |f| f.instances[&id].host != Some(source)).await;
    let errors: Vec<_> = fleet.app.ledger.read(|f| f.migrations.values().map(|m| m.error.clone()).collect());
    assert_eq!(errors.len(), 2, "{errors:?}");
    assert!(errors.iter().flatten().all(|e| e.contains("a fault of the test's making")), "{errors:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_switched_off_leaves_a_draining_host_cold_stays_off_and_leaves_nothing_held() {
    let fleet = Fleet::start(2).await;
    let id = fleet.create(1).await;
    let source = fleet.settled(id).await.unwrap().host.unwrap();
    power::stop(&fleet.app, id).await.unwrap();
    fleet.until("it is stopped", |f| f.instances[&id].status == InstanceStatus::Stopped).await;
    drain(&fleet, source).await;
    let left = |f: &godwit_coordinator::fleet::Fleet| {
        let instance = &f.instances[&id];
        instance.host != Some(source) && instance.status == InstanceStatus::Stopped
    };
    fleet.until("it has left and that is decided", left).await;
    fleet.until("nothing is held for it", |f| f.held_on(source).is_empty()).await;
    let decided =
        |m: &godwit_coordinator::fleet::migration::Migration| m.status == MigrationStatus::Confirmed;
    assert!(fleet.app.ledger.read(|f| f.migrations.values().all(decided)));
}

#[tokio::test]
async fn a_drain_takes_one_to_sixteen_at_once_and_ends_when_the_host_is_enabled() {
    let fleet = Fleet::start(1).await;
    let host = fleet.app.ledger.read(|f| *f.hosts.keys().next().unwrap());
    for at_once in [0, 17, u32::MAX] {
        let begin = |f: &_| verbs::host::drain(f, host, at_once, fleet.user, now());
        assert!(matches!(fleet.app.ledger.change(begin).await, Err(Error::Invalid(_))), "{at_once}");
    }
    drain(&fleet, host).await;
    assert!(!fleet.app.ledger.read(|f| f.hosts[&host].is_open()));
    fleet.app.ledger.change(|f| verbs::host::set_enabled(f, host, true, None)).await.unwrap();
    assert!(fleet.app.ledger.read(|f| f.hosts[&host].is_open()));
}
