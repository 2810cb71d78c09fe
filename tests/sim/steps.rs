//! Every request that an operation makes fails in turn, before and after its effect.

use crate::fleet::Fleet;
use crate::model::{Fault, lock};
use godwit_coordinator::fleet::instance::InstanceStatus;
use godwit_coordinator::fleet::migration::MigrationStatus;
use godwit_coordinator::operations::{delete_instance, live_migrate, power};
use godwit_protocol::id::InstanceId;
use std::sync::Arc;
use tokio::sync::Semaphore;

/// Fleets that live at once.
const FLEETS: usize = 8;

/// An instance's life, with at most one fault in it; returns the requests that were made.
async fn life(fault: Option<(usize, Fault)>) -> Vec<&'static str> {
    let fleet = Fleet::start(3).await;
    lock(&fleet.world).fault = fault;
    let told = format!("with {fault:?}");

    let mut id = fleet.create(1).await;
    let created = fleet.settled(id).await.unwrap();
    if created.status == InstanceStatus::Error {
        let text = created.fault.unwrap().message;
        assert!(text.contains("a fault of the test's making"), "{told}: {text}");
        assert_eq!((created.host, created.reservation), (None, None), "{told}");
        delete_instance::request(&fleet.app, id).await.unwrap();
        assert!(fleet.settled(id).await.is_none(), "{told}");
        fleet.clean(&told).await;
        id = fleet.create(1).await;
        fleet.settled(id).await.unwrap();
    }
    runs_where_it_says(&fleet, id, &told);

    let migration = live_migrate::request(&fleet.app, id, None, fleet.user).await.unwrap();
    fleet.settled(id).await.unwrap();
    let record = fleet.app.ledger.read(|f| f.migrations[&migration].clone());
    let host = fleet.instance(id).unwrap().host;
    match record.status {
        MigrationStatus::Completed => assert_eq!(host, record.target, "{told}"),
        MigrationStatus::Failed => {
            assert_eq!(host, Some(record.source), "{told}");
            assert!(record.error.is_some(), "{told}");
        }
        other => panic!("{told}: the migration is {other:?}"),
    }
    runs_where_it_says(&fleet, id, &told);

    power::stop(&fleet.app, id).await.unwrap();
    if fleet.settled(id).await.unwrap().status == InstanceStatus::Stopped {
        power::start(&fleet.app, id).await.unwrap();
        fleet.settled(id).await.unwrap();
    }
    // Whatever went wrong before, a reset brings it up.
    power::reboot(&fleet.app, id, true).await.unwrap();
    fleet.settled(id).await.unwrap();
    delete_instance::request(&fleet.app, id).await.unwrap();
    assert!(fleet.settled(id).await.is_none(), "{told}");
    fleet.clean(&told).await;
    lock(&fleet.world).requests.clone()
}

/// One host runs it, holds it, and is the one that the record names; its ports are plugged in there.
fn runs_where_it_says(fleet: &Fleet, id: InstanceId, told: &str) {
    let instance = fleet.instance(id).unwrap();
    let host = instance.host.unwrap_or_else(|| panic!("{told}: it is nowhere: {:?}", instance.fault));
    let world = lock(&fleet.world);
    assert_eq!(instance.status, InstanceStatus::Active, "{told}");
    assert_eq!(world.runs_on(id), [host], "{told}");
    let holders: Vec<_> = world.hosts.iter().filter(|(_, h)| h.reservations.contains_key(&id)).collect();
    assert_eq!(holders.len(), 1, "{told}: {holders:?}");
    assert_eq!(holders[0].1.reservations.get(&id), instance.reservation.as_ref(), "{told}");
    assert!(world.hosts.values().all(|h| h.prepared.is_empty()), "{told}: a migration's set-up is left");
    assert!(!world.has_double_pin(), "{told}");
    let ports = fleet.app.ledger.read(|f| f.ports_of(id).into_iter().cloned().collect::<Vec<_>>());
    assert!(ports.iter().all(|p| p.host == Some(host) && p.target_host.is_none()), "{told}: {ports:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whichever_request_fails_nothing_is_left_and_the_next_works() {
    let requests = life(None).await;
    assert!(requests.len() > 15, "{requests:?}");
    let room = Arc::new(Semaphore::new(FLEETS));
    let mut lives = tokio::task::JoinSet::new();
    for number in 0..requests.len() {
        for fault in [Fault::Refused, Fault::Botched, Fault::CutBefore, Fault::CutAfter] {
            let room = room.clone();
            lives.spawn(async move {
                let _place = room.acquire().await.unwrap();
                life(Some((number, fault))).await;
            });
        }
    }
    while let Some(life) = lives.join_next().await {
        life.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cpu_is_given_to_one_of_those_who_race_for_it() {
    let fleet = Fleet::start(1).await;
    // Two cells of two CPUs: four instances of two CPUs want what two can have.
    let ids = [fleet.create(2).await, fleet.create(2).await, fleet.create(2).await, fleet.create(2).await];
    let mut active = 0;
    for id in ids {
        let instance = fleet.settled(id).await.unwrap();
        match instance.status {
            InstanceStatus::Active => active += 1,
            _ => {
                let text = instance.fault.unwrap().message;
                assert!(text.contains("needs 2 CPUs"), "{text}");
            }
        }
        assert!(!lock(&fleet.world).has_double_pin());
    }
    assert_eq!(active, 2);
    for id in ids {
        delete_instance::request(&fleet.app, id).await.unwrap();
        assert!(fleet.settled(id).await.is_none());
    }
    fleet.clean("after the race").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_silent_host_keeps_what_it_holds_and_gets_nothing_new() {
    let fleet = Fleet::start(1).await;
    let first = fleet.create(1).await;
    let held = fleet.settled(first).await.unwrap();
    assert_eq!(held.status, InstanceStatus::Active);
    let host = held.host.unwrap();
    lock(&fleet.world).silent.insert(host);
    let lost = |f: &godwit_coordinator::fleet::Fleet| {
        godwit_coordinator::reconcile::liveness(f, host, 100, godwit_coordinator::ledger::now())
            == godwit_coordinator::liveness::Liveness::Lost
    };
    fleet.until("the host is lost", lost).await;
    let second = fleet.create(1).await;
    let refused = fleet.settled(second).await.unwrap();
    assert!(refused.fault.unwrap().message.contains("host_lost"));
    let kept = fleet.instance(first).unwrap();
    assert_eq!((kept.status, kept.host, kept.reservation), (held.status, held.host, held.reservation));
    lock(&fleet.world).silent.clear();
    fleet.until("the host is back", |f| !lost(f)).await;
    for id in [first, second] {
        delete_instance::request(&fleet.app, id).await.unwrap();
        assert!(fleet.settled(id).await.is_none());
    }
    fleet.clean("after the silence").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deletion_during_creation_wins() {
    let fleet = Fleet::start(2).await;
    for _ in 0..20 {
        let id = fleet.create(1).await;
        delete_instance::request(&fleet.app, id).await.unwrap();
        delete_instance::request(&fleet.app, id).await.unwrap();
        fleet.until("the instance is gone", |f| !f.instances.contains_key(&id)).await;
    }
    fleet.clean("after twenty").await;
}
