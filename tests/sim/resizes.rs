//! Resizes and moves of instances that are switched off: every request that they make fails in turn, and both places
//! are held until somebody has decided.

use crate::fleet::{Fleet, flavor};
use crate::model::{Disk, Fault, lock};
use godwit_coordinator::fleet::instance::{Instance, InstanceStatus};
use godwit_coordinator::fleet::migration::{Migration, MigrationStatus};
use godwit_coordinator::operations::resize_instance::{self, Wanted, pending};
use godwit_coordinator::operations::{confirm_resize, delete_instance, power, revert_resize};
use godwit_coordinator::store::StoreError;
use godwit_protocol::id::{HostId, InstanceId, MigrationId};
use godwit_protocol::reservation::Reservation;
use std::collections::BTreeSet;
use std::sync::Arc;
use tokio::sync::Semaphore;

/// Fleets that live at once.
const FLEETS: usize = 8;

const GIB: u64 = 1 << 30;

/// Asks for what is wanted until it is done: the one fault of a life may undo it once. After it was undone, the instance
/// is as before.
async fn resized(fleet: &Fleet, id: InstanceId, wanted: Wanted, told: &str) -> Instance {
    let before = fleet.instance(id).unwrap();
    for _ in 0..2 {
        let migration = resize_instance::request(&fleet.app, id, wanted.clone(), fleet.user).await.unwrap();
        let after = fleet.settled(id).await.unwrap();
        let record = fleet.app.ledger.read(|f| f.migrations[&migration].clone());
        if after.status == InstanceStatus::Resized {
            assert_eq!(record.status, MigrationStatus::Finished, "{told}");
            assert_eq!(after.host, record.target, "{told}");
            holds_both(fleet, &before, &after, told);
            return after;
        }
        assert_eq!(record.status, MigrationStatus::Failed, "{told}");
        assert!(record.error.is_some_and(|e| e.contains("a fault of the test's making")), "{told}");
        // One whose start failed as well is off, and is started by its owner.
        powered(fleet, id, before.status).await;
        is_as(fleet, &before, told);
    }
    panic!("{told}: it failed twice");
}

/// Starts or stops an instance until it is so: a fault may have made it otherwise than was asked, and its host's next
/// report may be faster than its owner.
async fn powered(fleet: &Fleet, id: InstanceId, status: InstanceStatus) {
    while fleet.settled(id).await.unwrap().status != status {
        // Refused when it is so by now.
        let _ = match status {
            InstanceStatus::Active => power::start(&fleet.app, id).await,
            _ => power::stop(&fleet.app, id).await,
        };
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
}

/// Every reservation of an instance, by host.
fn held(fleet: &Fleet, id: InstanceId) -> Vec<(HostId, Reservation)> {
    let world = lock(&fleet.world);
    let hosts = world.hosts.iter();
    hosts
        .flat_map(|(host, held)| {
            held.reservations.get(&id).into_iter().chain(held.beside.get(&id)).map(|r| (*host, r.clone()))
        })
        .collect()
}

/// The new place and the old one are held, and it runs in the new one if it ran.
fn holds_both(fleet: &Fleet, before: &Instance, after: &Instance, told: &str) {
    let mut held = held(fleet, after.id);
    for wanted in [before, after] {
        let place = wanted.host.zip(wanted.reservation.clone()).unwrap();
        let found = held.iter().position(|is| *is == place);
        held.remove(found.unwrap_or_else(|| panic!("{told}: {place:?} is not among {held:?}")));
    }
    assert!(held.is_empty(), "{told}: {held:?}");
    is_sound(fleet, after, before.status == InstanceStatus::Active, told);
    let (source, target) = (before.host.unwrap(), after.host.unwrap());
    let world = lock(&fleet.world);
    let grew = after.disk_bytes > before.disk_bytes;
    let wanted = Disk { size_bytes: after.disk_bytes, old: grew.then_some(before.disk_bytes) };
    assert_eq!(world.disk(target, after.id), Some(wanted), "{told}");
    if source != target && !world.apart.is_empty() {
        let kept = Disk { size_bytes: before.disk_bytes, old: None };
        assert_eq!(world.disk(source, after.id), Some(kept), "{told}");
    }
}

/// The instance is what `before` was, and holds that alone.
fn is_as(fleet: &Fleet, before: &Instance, told: &str) {
    let now = fleet.instance(before.id).unwrap();
    let facts =
        |i: &Instance| (i.status, i.power, i.host, i.reservation.clone(), i.flavor.clone(), i.disk_bytes);
    assert_eq!(facts(&now), facts(before), "{told}");
    holds_one(fleet, &now, told);
}

fn holds_one(fleet: &Fleet, now: &Instance, told: &str) {
    assert!(fleet.app.ledger.read(|f| f.running_migration(now.id).is_none()), "{told}");
    let place = now.host.zip(now.reservation.clone()).unwrap();
    assert_eq!(held(fleet, now.id), [place], "{told}");
    let world = lock(&fleet.world);
    let disk = world.disk(now.host.unwrap(), now.id);
    assert_eq!(disk, Some(Disk { size_bytes: now.disk_bytes, old: None }), "{told}");
    let pools = world.apart.values().chain([&world.disks]);
    assert_eq!(pools.filter(|pool| pool.contains_key(&now.id)).count(), 1, "{told}: a disk is left");
    drop(world);
    is_sound(fleet, now, now.status == InstanceStatus::Active, told);
}

/// It is on the one host that its record names, with its ports, and so is its domain.
fn is_sound(fleet: &Fleet, now: &Instance, runs: bool, told: &str) {
    let world = lock(&fleet.world);
    assert_eq!(world.wrongs, Vec::<String>::new(), "{told}");
    assert!(!world.has_double_pin(), "{told}");
    let defined: Vec<HostId> =
        world.hosts.iter().filter(|(_, h)| h.domains.contains_key(&now.id)).map(|(host, _)| *host).collect();
    assert_eq!(defined, Vec::from_iter(now.host), "{told}");
    assert_eq!(world.runs_on(now.id), if runs { defined } else { vec![] }, "{told}");
    let ports = fleet.app.ledger.read(|f| f.ports_of(now.id).into_iter().cloned().collect::<Vec<_>>());
    assert!(ports.iter().all(|p| p.host == now.host && p.target_host.is_none()), "{told}: {ports:?}");
    // What the coordinator counts as held is what is held.
    let counted: usize = fleet.app.ledger.read(|f| {
        let all = f.hosts.keys().flat_map(|host| f.held_on(*host));
        all.filter(|r| r.instance == now.id).count()
    });
    let hold = world
        .hosts
        .values()
        .flat_map(|h| h.reservations.get(&now.id).into_iter().chain(h.beside.get(&now.id)));
    assert_eq!(counted, hold.count(), "{told}");
}

/// A life with resizes, on so many hosts, which have one pool or each its own, with at most one fault in it; returns the
/// requests that were made.
async fn life(hosts: usize, apart: bool, fault: Option<(usize, Fault)>) -> Vec<&'static str> {
    let fleet = Fleet::start(hosts).await;
    let told = format!("{hosts} hosts, apart: {apart}, {fault:?}");
    if apart {
        let all: Vec<HostId> = fleet.app.ledger.read(|f| f.hosts.keys().copied().collect());
        lock(&fleet.world).apart = all.into_iter().map(|host| (host, Default::default())).collect();
    }
    let id = fleet.create(1).await;
    let created = fleet.settled(id).await.unwrap();
    assert_eq!(created.status, InstanceStatus::Active, "{told}");
    {
        let mut world = lock(&fleet.world);
        world.requests.clear();
        world.fault = fault;
    }
    let larger = Wanted::Flavor(flavor(2, 2));
    let there = resized(&fleet, id, larger.clone(), &told).await;
    assert_eq!(there.host == created.host, hosts == 1, "{told}");
    revert_resize::request(&fleet.app, id).await.unwrap();
    powered(&fleet, id, InstanceStatus::Active).await;
    is_as(&fleet, &created, &told);

    // Larger for good, of one that is off.
    powered(&fleet, id, InstanceStatus::Stopped).await;
    let there = resized(&fleet, id, larger, &told).await;
    confirm_resize::request(&fleet.app, id).await.unwrap();
    let stays = fleet.settled(id).await.unwrap();
    assert_eq!((stays.status, &stays.reservation), (InstanceStatus::Stopped, &there.reservation), "{told}");
    assert_eq!(stays.flavor.vcpus, 2, "{told}");
    holds_one(&fleet, &stays, &told);

    // And one that nobody has decided about is deleted.
    let last = if hosts == 1 { Wanted::Flavor(flavor(1, 2)) } else { Wanted::Host(None) };
    resized(&fleet, id, last, &told).await;
    delete_instance::request(&fleet.app, id).await.unwrap();
    assert!(fleet.settled(id).await.is_none(), "{told}");
    fleet.clean(&told).await;
    let open = fleet.app.ledger.read(|f| f.migrations.values().filter(|m| m.status.is_running()).count());
    assert_eq!(open, 0, "{told}");
    lock(&fleet.world).requests.clone()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whichever_request_of_a_resize_fails_the_server_is_whole_and_both_places_are_held_until_it_is_decided()
 {
    let room = Arc::new(Semaphore::new(FLEETS));
    let mut lives = tokio::task::JoinSet::new();
    for (hosts, apart) in [(1, false), (3, false), (3, true)] {
        let requests = life(hosts, apart, None).await;
        let kinds: BTreeSet<&str> = requests.iter().copied().collect();
        for kind in ["grow_disk", "drop_old_disk", "remove_instance", "define_instance"] {
            assert!(kinds.contains(kind), "{kind} is not among {requests:?}");
        }
        assert_eq!(kinds.contains("restore_disk"), !apart, "{requests:?}");
        assert_eq!(kinds.contains("mark_disk") && kinds.contains("await_disk"), hosts > 1, "{requests:?}");
        assert_eq!(kinds.contains("send_disk") && kinds.contains("leave_disk"), apart, "{requests:?}");
        assert_eq!(kinds.contains("exchange"), hosts == 1, "{requests:?}");
        // The others fail alike whichever pools there are.
        let about_disks = ["mark_disk", "await_disk", "send_disk", "leave_disk", "delete_disk", "grow_disk"];
        for number in (0..requests.len()).filter(|number| !apart || about_disks.contains(&requests[*number]))
        {
            // A channel that breaks is the same for all requests: each of them has it break once.
            let cut = if number % 2 == 0 { Fault::CutBefore } else { Fault::CutAfter };
            for fault in [Fault::Refused, Fault::Botched, cut] {
                let room = room.clone();
                lives.spawn(async move {
                    let _place = room.acquire().await.unwrap();
                    life(hosts, apart, Some((number, fault))).await;
                });
            }
        }
    }
    while let Some(life) = lives.join_next().await {
        life.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_resize_that_finds_no_place_leaves_the_server_running_and_tells_every_hosts_reason() {
    let fleet = Fleet::start(2).await;
    let id = fleet.create(1).await;
    let before = fleet.settled(id).await.unwrap();
    // A cell has two CPUs.
    let wanted = Wanted::Flavor(flavor(3, 1));
    let migration = resize_instance::request(&fleet.app, id, wanted, fleet.user).await.unwrap();
    fleet.settled(id).await.unwrap();
    is_as(&fleet, &before, "after a refusal");
    let error = fleet.app.ledger.read(|f| f.migrations[&migration].error.clone()).unwrap();
    assert!(error.matches("needs 3 CPUs, has 2 CPUs").count() == 2, "{error}");
    assert!(!lock(&fleet.world).requests.contains(&"stop_instance"), "nothing was touched");

    // Beside many more that have ended, and one as old that waits to be decided about.
    let one = fleet.app.ledger.read(|f| f.migrations[&migration].clone());
    let kept = fleet.app.config.migrations_kept as u64;
    let before_it = |seconds: u64| one.updated_at - std::time::Duration::from_secs(seconds);
    let ended = (1..kept + 5).map(|at| Migration {
        id: MigrationId::random(),
        number: one.number + at,
        updated_at: before_it(at),
        ..one.clone()
    });
    let (status, updated_at) = (MigrationStatus::Finished, before_it(9_999_999));
    let waits = Migration {
        id: MigrationId::random(),
        instance: InstanceId::random(),
        status,
        updated_at,
        ..one.clone()
    };
    let changes = ended.chain([waits.clone()]).map(Into::into).collect();
    fleet.app.ledger.change(|_| Ok::<_, StoreError>((changes, ()))).await.unwrap();
    delete_instance::request(&fleet.app, id).await.unwrap();
    assert!(fleet.settled(id).await.is_none());
    fleet.app.ledger.read(|f| {
        let mut left: Vec<u64> =
            f.migrations.values().filter(|m| m.id != waits.id).map(|m| m.number - one.number).collect();
        left.sort_unstable();
        // The newest are left, and the one with the highest number, from which numbers go on.
        assert_eq!(left, (0..kept).chain([kept + 4]).collect::<Vec<_>>());
        assert_eq!(f.running_migration(waits.instance).map(|m| m.id), Some(waits.id));
    });
    fleet.clean("after a refusal").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_host_that_is_lost_stops_no_confirmation_and_refuses_a_reversal_and_lets_go_when_it_is_back() {
    let fleet = Fleet::start(2).await;
    let id = fleet.create(1).await;
    let created = fleet.settled(id).await.unwrap();
    let source = created.host.unwrap();
    resized(&fleet, id, Wanted::Flavor(flavor(2, 2)), "before the loss").await;
    // As soon as both hosts have reported since.
    let agrees = |f: &godwit_coordinator::fleet::Fleet| godwit_coordinator::drift::list(f).is_empty();
    fleet.until("two places of one instance are no drift", agrees).await;
    lock(&fleet.world).silent.insert(source);
    let lost = |f: &godwit_coordinator::fleet::Fleet| {
        godwit_coordinator::reconcile::liveness(f, source, 100, godwit_coordinator::ledger::now())
            == godwit_coordinator::liveness::Liveness::Lost
    };
    fleet.until("the source is lost", lost).await;
    let error = revert_resize::request(&fleet.app, id).await.unwrap_err().to_string();
    assert!(error.contains("is lost"), "{error}");
    assert!(fleet.app.ledger.read(|f| pending(f, id).is_some()), "a refusal changes nothing");
    lock(&fleet.world).silent.clear();
    fleet.until("the source is back", |f| !lost(f)).await;
    confirm_resize::request(&fleet.app, id).await.unwrap();
    let stays = fleet.settled(id).await.unwrap();
    assert_eq!(stays.status, InstanceStatus::Active);
    holds_one(&fleet, &stays, "after the confirmation");
    // A place that nobody owns, as after a confirmation that the source did not hear.
    let old = created.reservation.clone().unwrap();
    lock(&fleet.world).hosts.get_mut(&source).unwrap().reservations.insert(id, old);
    let gone = || !lock(&fleet.world).hosts[&source].reservations.contains_key(&id);
    fleet.until("the source has let go", |_| gone()).await;
    delete_instance::request(&fleet.app, id).await.unwrap();
    assert!(fleet.settled(id).await.is_none());
    fleet.clean("after a confirmation").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_resized_is_left_alone_until_it_is_decided_and_what_cannot_be_is_refused() {
    let fleet = Fleet::start(2).await;
    let id = fleet.create(1).await;
    let before = fleet.settled(id).await.unwrap();
    let refused = async |wanted: Wanted| {
        resize_instance::request(&fleet.app, id, wanted, fleet.user).await.unwrap_err().to_string()
    };
    let same = refused(Wanted::Flavor(flavor(1, 1))).await;
    assert!(same.contains("must change flavor"), "{same}");
    let smaller = refused(Wanted::Flavor(flavor(2, 0))).await;
    assert!(smaller.contains("Resize to zero disk flavor is not allowed"), "{smaller}");
    let here = refused(Wanted::Host(before.host)).await;
    assert!(here.contains("where the server exists"), "{here}");
    let undecided = confirm_resize::request(&fleet.app, id).await.unwrap_err().to_string();
    assert!(undecided.contains("active"), "{undecided}");
    is_as(&fleet, &before, "after refusals");

    let after = resized(&fleet, id, Wanted::Flavor(flavor(2, 2)), "to be left alone").await;
    let again = refused(Wanted::Flavor(flavor(1, 1))).await;
    assert!(again.contains("resized"), "{again}");
    assert!(power::stop(&fleet.app, id).await.is_err() && power::reboot(&fleet.app, id, true).await.is_err());
    confirm_resize::request(&fleet.app, id).await.unwrap();
    let stays = fleet.settled(id).await.unwrap();
    assert_eq!((stays.host, stays.disk_bytes), (after.host, 2 * GIB));
    let down = refused(Wanted::Flavor(flavor(1, 1))).await;
    assert!(down.contains("Unable to resize disk down"), "{down}");
    delete_instance::request(&fleet.app, id).await.unwrap();
    assert!(fleet.settled(id).await.is_none());
    fleet.clean("after refusals").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deletion_stops_a_disk_that_is_made_or_made_larger_and_leaves_nothing() {
    for hosts in [1, 2] {
        let fleet = Fleet::start(hosts).await;
        let under_way = |what: &'static str| {
            let world = fleet.world.clone();
            move |_: &godwit_coordinator::fleet::Fleet| lock(&world).requests.contains(&what)
        };
        let grown = fleet.create(1).await;
        fleet.settled(grown).await.unwrap();
        lock(&fleet.world).endless = Some("grow_disk");
        let wanted = Wanted::Flavor(flavor(2, 2));
        resize_instance::request(&fleet.app, grown, wanted, fleet.user).await.unwrap();
        fleet.until("its disk is made larger", under_way("grow_disk")).await;
        delete_instance::request(&fleet.app, grown).await.unwrap();
        fleet.until("the deletion has ended", |f| !f.instances.contains_key(&grown)).await;
        assert!(lock(&fleet.world).cancelled.contains(&grown), "{hosts} hosts");

        {
            let mut world = lock(&fleet.world);
            world.endless = Some("create_disk");
            world.requests.clear();
        }
        let made = fleet.create(1).await;
        fleet.until("its disk is made", under_way("create_disk")).await;
        delete_instance::request(&fleet.app, made).await.unwrap();
        fleet.until("the deletion has ended", |f| !f.instances.contains_key(&made)).await;
        fleet.clean(&format!("{hosts} hosts")).await;
        let open =
            |f: &godwit_coordinator::fleet::Fleet| f.migrations.values().filter(|m| m.is_moving()).count();
        assert_eq!(fleet.app.ledger.read(open), 0, "{hosts} hosts");
        assert_eq!(lock(&fleet.world).wrongs, Vec::<String>::new(), "{hosts} hosts");
    }
}
