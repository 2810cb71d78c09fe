//! Hosts that are being emptied: their instances move away, a few at once, until nothing is left or an operator says
//! otherwise. What runs moves live; what is switched off moves cold, which is confirmed at once, for it is as it was. That
//! a host drains is durable, and all else follows from the records, so a restart goes on. What cannot move stays, is told
//! with the reason, and is tried again.

use crate::app::{App, Shared};
use crate::error::Error;
use crate::fleet::host::{Drain, Host};
use crate::fleet::instance::{Instance, InstanceStatus};
use crate::fleet::migration::{Migration, MigrationKind, MigrationStatus};
use crate::fleet::operation::Verb;
use crate::fleet::{Fleet, Time};
use crate::ledger::now;
use crate::liveness::Liveness;
use crate::operations::place::Sought;
use crate::operations::resize_instance::Wanted;
use crate::operations::{StepError, confirm_resize, live_migrate, place, resize_instance};
use crate::reconcile;
use godwit_protocol::id::{HostId, InstanceId, MigrationId, UserId};
use serde::Serialize;
use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::time::Duration;

/// Heartbeats between two looks for a place for an instance that had none.
const LOOK_AGAIN: u32 = 10;

/// Heartbeats from a migration that failed to the next try; twice as many after each further one.
const TRY_AGAIN: u32 = 10;

/// Doublings of [`TRY_AGAIN`] at most.
const DOUBLINGS: u32 = 6;

/// Instances whose reasons to stay are searched for in one answer; the others' are left out.
const MOST_REASONS: usize = 100;

/// What one draining host has to do now.
#[derive(Debug, PartialEq, Eq)]
struct Round {
    host: HostId,
    user: UserId,
    /// How many more instances may leave now.
    free: usize,
    /// Instances that may leave, the largest first: they find a place the least easily.
    candidates: Vec<InstanceId>,
}

/// An instance that is still on a draining host.
#[derive(Debug, Serialize)]
pub struct Left {
    server: InstanceId,
    name: String,
    /// `moving`, `waiting` for its turn, `busy` with something else, or `held` by a reason.
    state: &'static str,
    reason: Option<String>,
}

/// Empties the hosts that are to be emptied, as long as the process lives.
pub async fn run(app: Shared) {
    let heartbeat = Duration::from_millis(app.config.heartbeat_ms);
    let mut look_after: BTreeMap<InstanceId, Time> = BTreeMap::new();
    loop {
        tokio::time::sleep(heartbeat).await;
        let at = now();
        look_after.retain(|_, after| *after > at);
        for round in app.ledger.read(|fleet| rounds(fleet, heartbeat, at)) {
            advance(&app, round, &mut look_after).await;
        }
        confirm(&app, app.ledger.read(undecided)).await;
    }
}

/// Sends away as many as may leave.
async fn advance(app: &Shared, round: Round, look_after: &mut BTreeMap<InstanceId, Time>) {
    let heartbeat = Duration::from_millis(app.config.heartbeat_ms);
    let mut free = round.free;
    for id in round.candidates {
        if free == 0 {
            break;
        }
        if look_after.contains_key(&id) {
            continue;
        }
        // Each look by itself: others may read and write in between.
        if !app.ledger.read(|fleet| has_place(app, fleet, id, round.host)) {
            look_after.insert(id, now() + heartbeat * LOOK_AGAIN);
            continue;
        }
        match send_away(app, id, round.user).await {
            Ok(migration) => {
                tracing::info!(host = %round.host, instance = %id, %migration, "a draining host sends an instance away");
                free -= 1;
            }
            Err(error) => {
                tracing::info!(host = %round.host, instance = %id, %error, "a draining host keeps an instance for now");
            }
        }
    }
}

async fn send_away(app: &Shared, id: InstanceId, user: UserId) -> Result<MigrationId, Error> {
    match app.ledger.read(|fleet| fleet.instances.get(&id).is_some_and(is_off)) {
        true => resize_instance::request(app, id, Wanted::Host(None), user).await,
        false => live_migrate::request(app, id, None, user).await,
    }
}

/// Lets go of what is still held on a draining host for those that have left it switched off.
async fn confirm(app: &Shared, moved: Vec<InstanceId>) {
    for id in moved {
        if let Err(error) = confirm_resize::request(app, id).await {
            // Somebody was faster, or something runs on it: it is looked at again.
            tracing::debug!(instance = %id, %error, "its move is not confirmed now");
        }
    }
}

fn has_place(app: &App, fleet: &Fleet, id: InstanceId, host: HostId) -> bool {
    let instance = fleet.instances.get(&id).filter(|i| i.host == Some(host));
    instance.is_some_and(|instance| find_place(app, fleet, instance, host).is_ok())
}

/// Where an instance of a draining host could go.
fn find_place(app: &App, fleet: &Fleet, instance: &Instance, host: HostId) -> Result<(), StepError> {
    let not = [host];
    let chosen = if is_off(instance) {
        // It brings its disk with it.
        let moved = Instance { disk_bytes: 0, ..instance.clone() };
        place::choose(fleet, &app.config, &place::Wish::of(&moved, None, &not).moving())
    } else {
        place::choose(fleet, &app.config, &place::Wish::of(instance, None, &not).running_on(host))
    };
    chosen.map(drop)
}

fn is_off(instance: &Instance) -> bool {
    instance.status == InstanceStatus::Stopped
}

/// What each draining host that can be asked has to do.
fn rounds(fleet: &Fleet, heartbeat: Duration, at: Time) -> Vec<Round> {
    let draining = fleet.hosts.values().filter_map(|host| Some((host, host.drain.as_ref()?)));
    let heartbeat_ms = u64::try_from(heartbeat.as_millis()).unwrap_or(u64::MAX);
    let up =
        draining.filter(|(host, _)| reconcile::liveness(fleet, host.id, heartbeat_ms, at) == Liveness::Up);
    up.map(|(host, drain)| {
        let here: Vec<&Instance> = fleet.instances_on(host.id).map(|(instance, _)| instance).collect();
        let moving = here.iter().filter(|instance| is_moving(fleet, instance)).count();
        let may_leave = |instance: &&Instance| {
            may_move(instance)
                && fleet.running_operation(instance.id).is_none()
                && rests_until(fleet, drain, host.id, instance.id, heartbeat).is_none_or(|end| end <= at)
        };
        let mut candidates: Vec<&Instance> = here.into_iter().filter(may_leave).collect();
        candidates.sort_by_key(|instance| (Reverse(instance.flavor.memory_mib), instance.id));
        Round {
            host: host.id,
            user: drain.user,
            free: (drain.at_once as usize).saturating_sub(moving),
            candidates: candidates.into_iter().map(|instance| instance.id).collect(),
        }
    })
    .collect()
}

fn is_moving(fleet: &Fleet, instance: &Instance) -> bool {
    fleet.running_operation(instance.id).is_some_and(|operation| moves(operation.verb))
}

fn moves(verb: Verb) -> bool {
    matches!(verb, Verb::LiveMigrate { .. } | Verb::MigrateInstance { .. })
}

fn may_move(instance: &Instance) -> bool {
    let status = instance.status;
    let may = matches!(status, InstanceStatus::Active | InstanceStatus::Paused | InstanceStatus::Stopped);
    may && !instance.delete_wanted
}

/// Instances that the drain of a host has sent away switched off, and whose move nobody has decided about.
fn undecided(fleet: &Fleet) -> Vec<InstanceId> {
    if fleet.hosts.values().all(|host| host.drain.is_none()) {
        // Migrations are kept, so there are many of them.
        return Vec::new();
    }
    let by_drain = |m: &&Migration| {
        let drain = fleet.hosts.get(&m.source).and_then(|host| host.drain.as_ref());
        m.kind == MigrationKind::Cold
            && m.status == MigrationStatus::Finished
            && drain.is_some_and(|drain| drain.user == m.user && drain.since <= m.created_at)
    };
    fleet.migrations.values().filter(by_drain).map(|m| m.instance).collect()
}

/// Migrations away from the host that came to nothing while it drains, the newest last.
fn failures<'f>(fleet: &'f Fleet, drain: &Drain, host: HostId, instance: InstanceId) -> Vec<&'f Migration> {
    let failed = |m: &&Migration| {
        m.instance == instance
            && m.source == host
            && m.created_at >= drain.since
            && matches!(m.status, MigrationStatus::Failed | MigrationStatus::Cancelled)
    };
    let mut failures: Vec<&Migration> = fleet.migrations.values().filter(failed).collect();
    failures.sort_by_key(|migration| migration.updated_at);
    failures
}

/// Until when an instance whose migration failed is left in peace; none: nothing failed.
fn rests_until(
    fleet: &Fleet,
    drain: &Drain,
    host: HostId,
    instance: InstanceId,
    heartbeat: Duration,
) -> Option<Time> {
    let failures = failures(fleet, drain, host, instance);
    let doublings = u32::try_from(failures.len()).unwrap_or(u32::MAX).saturating_sub(1).min(DOUBLINGS);
    failures.last().map(|newest| newest.updated_at + heartbeat * TRY_AGAIN * (1 << doublings))
}

/// What is left on a draining host, the next to go first, with the reason for each instance that does not move.
pub async fn left(app: &App, id: HostId, drain: &Drain) -> Vec<Left> {
    let mut here: Vec<_> = app
        .ledger
        .read(|fleet| fleet.instances_on(id).map(|(i, _)| (Reverse(i.flavor.memory_mib), i.id)).collect());
    here.sort_unstable();
    let (mut left, mut searched) = (Vec::with_capacity(here.len()), 0);
    for (_, id_here) in here {
        let found = app.ledger.read(|fleet| {
            let host = fleet.hosts.get(&id)?;
            let instance = fleet.instances.get(&id_here).filter(|i| i.host == Some(id))?;
            Some((instance.name.clone(), standing(app, fleet, host, drain, instance)))
        });
        let Some((name, standing)) = found else { continue };
        let (state, reason) = match standing {
            Standing::Moving => ("moving", None),
            Standing::Waiting => ("waiting", None),
            Standing::Busy(with) => ("busy", Some(format!("{with} runs on it"))),
            Standing::Held(reason) => ("held", Some(reason)),
            Standing::NoRoom(sought) => {
                searched += 1;
                ("held", if searched <= MOST_REASONS { why_not(app, &sought).await } else { None })
            }
        };
        left.push(Left { server: id_here, name, state, reason });
    }
    left
}

async fn why_not(app: &App, sought: &Sought) -> Option<String> {
    let refusal = place::why_not(&app.ledger, &app.config, sought).await;
    refusal.map_or_else(|error| Some(error.to_string()), |refusal| refusal.map(|refusal| refusal.to_string()))
}

/// How an instance stands to leaving.
enum Standing {
    Moving,
    Waiting,
    Busy(&'static str),
    Held(String),
    NoRoom(Box<Sought>),
}

fn standing(app: &App, fleet: &Fleet, host: &Host, drain: &Drain, instance: &Instance) -> Standing {
    if let Some(operation) = fleet.running_operation(instance.id) {
        return match operation.verb {
            verb if moves(verb) => Standing::Moving,
            verb => Standing::Busy(verb.name()),
        };
    }
    if !may_move(instance) {
        let text = match instance.status {
            InstanceStatus::Resized => "it is resized; confirm or revert that, then it moves".to_owned(),
            other => {
                format!("it is {}; only what runs or is stopped moves: mend it, or delete it", other.name())
            }
        };
        return Standing::Held(text);
    }
    let state = reconcile::liveness(fleet, host.id, app.config.heartbeat_ms, now());
    if state != Liveness::Up {
        return Standing::Held(format!("host {} is {}", host.name, state.as_str()));
    }
    match find_place(app, fleet, instance, host.id) {
        Ok(()) => {}
        Err(StepError::NoRoom(sought)) => return Standing::NoRoom(sought),
        Err(error) => return Standing::Held(error.to_string()),
    }
    let heartbeat = Duration::from_millis(app.config.heartbeat_ms);
    match failures(fleet, drain, host.id, instance.id).last() {
        Some(failed) if rests_until(fleet, drain, host.id, instance.id, heartbeat) > Some(now()) => {
            let why = failed.error.as_deref().unwrap_or("it was cancelled");
            Standing::Held(format!("its migration {} came to nothing: {why}", failed.number))
        }
        _ => Standing::Waiting,
    }
}
