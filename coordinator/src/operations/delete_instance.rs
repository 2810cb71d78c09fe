//! Delete an instance: domain, disk, ports, reservations, record. It only goes forward; while its host is silent
//! it waits, and a host that is removed from the fleet has nothing left to clean.

use super::resize_instance::pending;
use super::{Context, StepError, journal, move_disk, spawn};
use crate::app::Shared;
use crate::error::Error;
use crate::fleet::instance::{Instance, Task};
use crate::fleet::migration::{Migration, MigrationStatus};
use crate::fleet::network::Port;
use crate::fleet::operation::{Operation, Phase, Verb};
use crate::fleet::{Change, Fleet};
use crate::l2;
use crate::ledger::now;
use crate::store::StoreError;
use godwit_protocol::id::{HostId, InstanceId, NetworkId};
use godwit_protocol::request::AgentRequest;
use std::collections::BTreeSet;
use std::time::Duration;

/// From one time that a host is told to stop making a disk to the next.
const TELL_EVERY: Duration = Duration::from_secs(1);

/// In order.
pub(super) const STEPS: &[&str] = &["domain", "disk", "ports", "reservation"];

/// Accepts a deletion, at any time in an instance's life. What runs on it is stopped and undone first.
///
/// # Errors
/// When there is no such instance.
pub async fn request(app: &Shared, id: InstanceId) -> Result<(), Error> {
    let (operation, stopped) = app
        .ledger
        .change(|fleet| {
            let instance = fleet.instances.get(&id).ok_or_else(|| Error::not_found("Instance", id))?;
            let deleting = Instance {
                delete_wanted: true,
                task: Some(Task::Deleting),
                updated_at: now(),
                ..instance.clone()
            };
            let running = fleet.running_operation(id).cloned();
            let (operation, stopped) = match running {
                Some(running) if running.verb == Verb::DeleteInstance => return Ok((vec![], (None, None))),
                Some(running) => (Operation { cancel: true, ..running.clone() }, Some(running.verb)),
                None => (journal(Verb::DeleteInstance, id), None),
            };
            let start = stopped.is_none().then_some(operation.id);
            Ok::<_, Error>((vec![deleting.into(), operation.into()], (start, stopped)))
        })
        .await?;
    if let Some(operation) = operation {
        spawn(app, operation);
    }
    match stopped {
        Some(Verb::LiveMigrate { migration }) => super::live_migrate::interrupt(app, migration),
        Some(_) => interrupt_disk(app, id),
        None => {}
    }
    Ok(())
}

/// Tells the host to stop making the disk, or a larger one, so that what is not wanted any more gets to its undo now, and
/// not when the copy ends: on a pool that stands still that may be never. Told again for as long as the disk is made,
/// since the order to make it may be on its way.
fn interrupt_disk(app: &Shared, id: InstanceId) {
    let app = app.clone();
    tokio::spawn(async move {
        loop {
            let hosts = app.ledger.read(|fleet| makes_disk(fleet, id));
            if hosts.is_empty() {
                break;
            }
            // What a host does not hear now, it hears the next time.
            let told = hosts.into_iter().map(|host| app.agents.call(host, AgentRequest::CancelDisk(id)));
            futures_util::future::join_all(told).await;
            tokio::time::sleep(TELL_EVERY).await;
        }
    });
}

/// The hosts that make an instance's disk now, or move it.
fn makes_disk(fleet: &Fleet, id: InstanceId) -> Vec<HostId> {
    let running = fleet.running_operation(id).filter(|operation| operation.phase == Phase::Running);
    let Some(operation) = running else { return vec![] };
    let (hosts, steps) = match operation.verb {
        Verb::CreateInstance => {
            let host = fleet.instances.get(&id).and_then(|instance| instance.host);
            ([host, None], super::create_instance::STEPS)
        }
        Verb::ResizeInstance { migration } | Verb::MigrateInstance { migration } => {
            let migration = fleet.migrations.get(&migration);
            ([migration.map(|m| m.source), migration.and_then(|m| m.target)], super::resize_instance::STEPS)
        }
        _ => return vec![],
    };
    let now = steps.get(operation.cursor) == Some(&"disk");
    hosts.into_iter().flatten().filter(|_| now).collect()
}

/// Starts the deletion that waited for another operation to end.
pub(super) async fn after_other_operation(app: &Shared, id: InstanceId) {
    let started = app
        .ledger
        .change(|fleet| {
            let owed = fleet.instances.get(&id).is_some_and(|i| i.delete_wanted);
            if !owed || fleet.running_operation(id).is_some() {
                return Ok::<_, StoreError>((vec![], None));
            }
            let operation = journal(Verb::DeleteInstance, id);
            Ok((vec![operation.clone().into()], Some(operation.id)))
        })
        .await;
    if let Ok(Some(operation)) = started {
        spawn(app, operation);
    }
}

/// One step, by its place in [`STEPS`].
pub(super) async fn run(context: &Context, step: usize) -> Result<(), StepError> {
    let instance = context.instance()?;
    let host = instance.host.filter(|h| context.app.ledger.read(|fleet| fleet.hosts.contains_key(h)));
    match (STEPS[step], host) {
        ("domain", Some(host)) => context.insist(host, AgentRequest::RemoveInstance(instance.id)).await,
        ("disk", host) => {
            if let Some(host) = host {
                context.insist(host, AgentRequest::DeleteDisk(instance.id)).await?;
            }
            // A move that nobody has decided about.
            match context.app.ledger.read(|fleet| pending(fleet, instance.id).cloned()) {
                Some(migration) => move_disk::leave(context, &migration).await,
                None => Ok(()),
            }
        }
        ("ports", _) => release_ports(context).await,
        ("reservation", host) => {
            let left = context.app.ledger.read(|fleet| pending(fleet, instance.id).map(|m| m.source));
            for host in host.into_iter().chain(left) {
                context.insist(host, AgentRequest::Release(instance.id)).await?;
            }
            Ok(())
        }
        _ => Ok(()),
    }
}

/// Ports that were made for the instance go, the user's own are set free, and the hosts are told.
pub(super) async fn release_ports(context: &Context) -> Result<(), StepError> {
    let networks: BTreeSet<NetworkId> = context
        .change(|fleet| {
            let ports = fleet.ports_of(context.instance);
            let networks: BTreeSet<NetworkId> = ports.iter().map(|p| p.network).collect();
            let mut changes: Vec<Change> = ports.into_iter().map(set_free).collect();
            changes.extend(networks.iter().filter_map(|n| l2::touched(fleet, *n)));
            Ok((changes, networks))
        })
        .await?;
    if let Some(host) = context.instance()?.host {
        for network in &networks {
            // A host that is away is told when it comes back.
            let _ = l2::ensure(&context.app, host, *network).await;
        }
    }
    networks.into_iter().for_each(|network| context.app.l2_changed(network));
    Ok(())
}

fn set_free(port: &Port) -> Change {
    if port.owned_by_instance {
        return Change::gone(port);
    }
    Port {
        instance: None,
        device_id: String::new(),
        device_owner: String::new(),
        host: None,
        target_host: None,
        revision: port.revision + 1,
        updated_at: now(),
        ..port.clone()
    }
    .into()
}

/// The record goes, and what is told of its migrations stays.
pub(super) fn finish(fleet: &Fleet, operation: &Operation, _: Option<&StepError>) -> Vec<Change> {
    // A resize that nobody has decided about is decided by this.
    let status = MigrationStatus::Confirmed;
    let decided = pending(fleet, operation.instance)
        .map(|m| Migration { status, updated_at: now(), ..m.clone() }.into());
    decided.into_iter().chain(fleet.instances.get(&operation.instance).map(Change::gone)).collect()
}
