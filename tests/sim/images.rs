//! Images that come to another pool: whatever fails, a server is made or its error told, and nothing half-made stays.

use crate::fleet::Fleet;
use crate::model::{Fault, lock};
use godwit_coordinator::fleet::instance::InstanceStatus;
use godwit_coordinator::operations::delete_instance;
use godwit_protocol::event::EventKind;
use godwit_protocol::id::{HostId, InstanceId};
use std::collections::BTreeSet;
use uuid::Uuid;

/// The pool of the first two hosts of three.
const POOL: Uuid = Uuid::from_u128(7);

/// One that only the second has.
const OTHER_POOL: Uuid = Uuid::from_u128(8);

/// Three hosts, of which two share a pool without images.
async fn start() -> (Fleet, [HostId; 2]) {
    let fleet = Fleet::start(3).await;
    let mut hosts = fleet.app.ledger.read(|f| f.hosts.keys().copied().collect::<Vec<_>>()).into_iter();
    let two = [hosts.next().unwrap(), hosts.next().unwrap()];
    lock(&fleet.world).images.of = two.iter().map(|host| (*host, POOL)).collect();
    fleet.until("the pools are known", |f| two.iter().all(|host| f.pool_mark(*host) == Some(POOL))).await;
    (fleet, two)
}

async fn delete(fleet: &Fleet, id: InstanceId) {
    delete_instance::request(&fleet.app, id).await.unwrap();
    assert!(fleet.settled(id).await.is_none());
}

/// What is recorded of copies, and what there is, is the same.
async fn agree(fleet: &Fleet, told: &str) {
    let same = |f: &godwit_coordinator::fleet::Fleet| {
        let world = lock(&fleet.world);
        let recorded: BTreeSet<_> = f.image_copies.values().map(|copy| (POOL, copy.image)).collect();
        f.image_copies.values().all(|copy| copy.whole)
            && recorded == world.images.images
            && world.images.incoming.is_empty()
    };
    fleet.until(&format!("{told}: the copies are what the records say"), same).await;
}

/// The first server in a pool without its image, with at most one fault on the way, and the image's end.
async fn life(fault: Option<(usize, Fault)>) -> Vec<&'static str> {
    let (fleet, [one, other]) = start().await;
    lock(&fleet.world).fault = fault;
    let told = format!("with {fault:?}");
    let mut first = fleet.create_on(1, Some(one)).await;
    let made = fleet.settled(first).await.unwrap();
    if made.status == InstanceStatus::Error {
        let text = made.fault.unwrap().message;
        assert!(text.contains("a fault of the test's making"), "{told}: {text}");
        agree(&fleet, &told).await;
        delete(&fleet, first).await;
        first = fleet.create_on(1, Some(one)).await;
        assert_eq!(fleet.settled(first).await.unwrap().status, InstanceStatus::Active, "{told}");
    }
    agree(&fleet, &told).await;
    assert_eq!(lock(&fleet.world).images.images.len(), 1, "{told}");
    let about_images = lock(&fleet.world).requests.clone();
    // The pool's other host has it too.
    let second = fleet.create_on(1, Some(other)).await;
    let made = fleet.settled(second).await.unwrap();
    assert_eq!(made.status, InstanceStatus::Active, "{told}: {:?}", made.fault);
    delete(&fleet, first).await;
    delete(&fleet, second).await;
    fleet.delete_image().await;
    fleet.until("no copy is left", |f| f.image_copies.is_empty()).await;
    assert_eq!(lock(&fleet.world).images.images.len(), 0, "{told}: the copy goes with its image");
    fleet.clean(&told).await;
    about_images
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whichever_request_of_an_images_way_fails_the_server_is_made_or_tells_why_and_nothing_is_left() {
    let requests = life(None).await;
    let kinds: BTreeSet<&str> = requests.iter().copied().collect();
    let about_images = ["find_image", "await_image", "send_image", "settle_image"];
    assert!(about_images.iter().all(|kind| kinds.contains(kind)), "{requests:?}");
    let mut lives = tokio::task::JoinSet::new();
    for number in (0..requests.len()).filter(|number| about_images.contains(&requests[*number])) {
        for fault in [Fault::Refused, Fault::Botched, Fault::CutBefore, Fault::CutAfter] {
            lives.spawn(async move { life(Some((number, fault))).await });
        }
    }
    while let Some(life) = lives.join_next().await {
        life.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_image_comes_once_to_a_pool_however_many_servers_wait_for_it() {
    let (fleet, hosts) = start().await;
    let mut ids = Vec::new();
    for number in 0..8 {
        ids.push(fleet.create_on(1, Some(hosts[number % 2])).await);
    }
    for id in &ids {
        let made = fleet.settled(*id).await.unwrap();
        assert_eq!(made.status, InstanceStatus::Active, "{:?}", made.fault);
    }
    let requests = lock(&fleet.world).requests.clone();
    for kind in ["await_image", "send_image", "settle_image"] {
        assert_eq!(requests.iter().filter(|request| **request == kind).count(), 1, "{kind}: {requests:?}");
    }
    agree(&fleet, "after eight").await;
    for id in ids {
        delete(&fleet, id).await;
    }
    fleet.clean("after eight").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_image_that_no_host_has_is_told_with_the_host_that_wants_it() {
    let (fleet, [one, _]) = start().await;
    let all: Vec<HostId> = fleet.app.ledger.read(|f| f.hosts.keys().copied().collect());
    lock(&fleet.world).images.of.extend(all.iter().map(|host| (*host, POOL)));
    fleet.until("all have one pool", |f| all.iter().all(|host| f.pool_mark(*host) == Some(POOL))).await;
    let id = fleet.create_on(1, Some(one)).await;
    let failed = fleet.settled(id).await.unwrap();
    let text = failed.fault.unwrap().message;
    let name = fleet.app.ledger.read(|f| f.hosts[&one].name.clone());
    assert!(text.contains(&format!("Host {name}")) && text.contains("no other host that answers"), "{text}");
    delete(&fleet, id).await;
    assert!(fleet.app.ledger.read(|f| f.image_copies.is_empty()));
    fleet.clean("after the refusal").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_image_that_a_host_was_to_get_is_told_to_operators() {
    let (fleet, [one, _]) = start().await;
    lock(&fleet.world).images.damaged = true;
    let id = fleet.create_on(1, Some(one)).await;
    let failed = fleet.settled(id).await.unwrap();
    assert!(failed.fault.unwrap().message.contains("not the image that was uploaded"));
    let damages = fleet.app.ledger.read(|f| f.damages.clone());
    let names = fleet.app.ledger.read(|f| f.hosts.values().map(|host| host.name.clone()).collect::<Vec<_>>());
    let how = &damages.values().next().unwrap().how;
    assert_eq!(names.iter().filter(|name| how.contains(*name)).count(), 2, "both ends are named: {how}");
    let events = fleet.app.events.list(10, |_, event| event.kind == EventKind::ImageDamaged);
    assert!(events[0].1.reason.as_ref().unwrap().contains(how), "{events:?}");
    delete(&fleet, id).await;
    fleet.delete_image().await;
    fleet.until("no copy is left", |f| f.image_copies.is_empty()).await;
    fleet.clean("after the damage").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_host_that_hangs_keeps_no_other_from_removing_its_copy_of_an_image() {
    let (fleet, [one, other]) = start().await;
    lock(&fleet.world).images.of.insert(other, OTHER_POOL);
    fleet.until("the other has its own pool", |f| f.pool_mark(other) == Some(OTHER_POOL)).await;
    for host in [one, other] {
        let id = fleet.create_on(1, Some(host)).await;
        assert_eq!(fleet.settled(id).await.unwrap().status, InstanceStatus::Active);
        delete(&fleet, id).await;
    }
    assert_eq!(fleet.app.ledger.read(|f| f.image_copies.len()), 2);
    lock(&fleet.world).images.hanging = Some(None);
    fleet.delete_image().await;
    fleet.until("one copy is left", |f| f.image_copies.len() == 1).await;
    let hanging = lock(&fleet.world).images.hanging.flatten().unwrap();
    let left = fleet.app.ledger.read(|f| f.image_copies.values().next().unwrap().host);
    assert_eq!(left, hanging, "whichever was asked first");
}
