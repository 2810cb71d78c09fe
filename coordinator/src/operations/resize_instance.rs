//! Give an instance another flavor, or move it while it is switched off, which is a resize to the flavor that it has on
//! another host: hold a place, switch off, leave the source, bring the disk where the pool is another one and make it
//! larger, move ports and record, define and start. What it held before is held until somebody confirms or reverts. The guest is off meanwhile, so everything
//! is undone on a failure: the instance is then on its old host as before, and runs if it ran.

use super::live_migrate::{in_fleet, plug_in, queued, record, target, update};
use super::power::GRACE_MS;
use super::reserve::{Verdict, generation, hold};
use super::{Context, StepError, create_instance, idle, journal, move_disk, place, spawn};
use crate::app::Shared;
use crate::error::Error;
use crate::fleet::instance::{Flavor, Instance, InstanceStatus, Task};
use crate::fleet::migration::{Migration, MigrationKind, MigrationStatus, Resize, Shape};
use crate::fleet::network::Port;
use crate::fleet::operation::{Operation, Verb};
use crate::fleet::{Change, Fleet};
use crate::l2;
use crate::ledger::now;
use crate::placement::request::Request;
use godwit_protocol::id::{HostId, InstanceId, MigrationId, NetworkId, UserId};
use godwit_protocol::image::DiskFormat;
use godwit_protocol::instance::InstanceState;
use godwit_protocol::request::{AgentRequest, GrowRequest};
use std::collections::BTreeSet;

/// In order.
pub(super) const STEPS: &[&str] =
    &["reserve", "stop", "leave", "disk", "network", "switch", "define", "start"];

const GIB: u64 = 1 << 30;

/// What is wanted of an instance.
#[derive(Clone, Debug)]
pub enum Wanted {
    /// This flavor, wherever there is room.
    Flavor(Flavor),
    /// Another host: this one, or wherever there is room.
    Host(Option<HostId>),
}

impl Wanted {
    fn action(&self) -> &'static str {
        match self {
            Self::Flavor(_) => "resize",
            Self::Host(_) => "migrate",
        }
    }
}

/// Accepts a resize, or a move.
///
/// # Errors
/// Not found; a conflict when the instance neither runs nor is switched off, or something runs on it; invalid for a
/// flavor or a host that cannot be.
pub async fn request(
    app: &Shared,
    id: InstanceId,
    wanted: Wanted,
    user: UserId,
) -> Result<MigrationId, Error> {
    let (migration, operation) = app
        .ledger
        .change(|fleet| {
            let instance = idle(fleet, id)?;
            let migration = check(fleet, instance, &wanted, user)?;
            let verb = match migration.kind {
                MigrationKind::Resize => Verb::ResizeInstance { migration: migration.id },
                _ => Verb::MigrateInstance { migration: migration.id },
            };
            let operation = journal(verb, id);
            let task = Some(Task::ResizePreparing);
            let busy = Instance { task, updated_at: now(), ..instance.clone() };
            let ids = (migration.id, operation.id);
            Ok::<_, Error>((vec![busy.into(), migration.into(), operation.into()], ids))
        })
        .await?;
    spawn(app, operation);
    Ok(migration)
}

/// The record of a resize that may be, or why not.
fn check(fleet: &Fleet, instance: &Instance, wanted: &Wanted, user: UserId) -> Result<Migration, Error> {
    let state = || Error::state(wanted.action(), instance.id, instance.status);
    if !matches!(instance.status, InstanceStatus::Active | InstanceStatus::Stopped) {
        return Err(state());
    }
    let (source, old_reservation) = instance.host.zip(instance.reservation.clone()).ok_or_else(state)?;
    let old = Shape {
        flavor: instance.flavor.clone(),
        disk_bytes: instance.disk_bytes,
        topology: instance.topology,
    };
    let (kind, new, wanted_target) = match wanted {
        Wanted::Flavor(flavor) => (MigrationKind::Resize, shape(fleet, instance, flavor)?, None),
        Wanted::Host(Some(host)) if *host == source => {
            return Err(Error::Invalid("Cannot migrate to the host where the server exists.".into()));
        }
        Wanted::Host(host) => (MigrationKind::Cold, old.clone(), *host),
    };
    if let Some(host) = wanted_target.filter(|host| !fleet.hosts.contains_key(host)) {
        return Err(Error::not_found("Host", host));
    }
    let ran = instance.status == InstanceStatus::Active;
    let resize = Some(Resize { old, new, old_reservation, ran });
    Ok(Migration { kind, resize, ..queued(fleet, instance, source, wanted_target, user) })
}

/// What an instance is with another flavor.
fn shape(fleet: &Fleet, instance: &Instance, flavor: &Flavor) -> Result<Shape, Error> {
    let invalid = |text: String| Err(Error::Invalid(text));
    let disk = |reason: &str| invalid(format!("Server disk was unable to be resized because: {reason}"));
    if flavor.id == instance.flavor.id {
        return invalid("When resizing, instances must change flavor!".into());
    }
    let properties = &instance.image_properties;
    let request = Request::from_specs(flavor.vcpus, flavor.memory_mib, &flavor.extra_specs, properties)
        .map_err(|e| Error::Invalid(e.to_string()))?;
    let least_mib = fleet.images.get(&instance.image.image).map_or(0, |image| image.min_memory_mib);
    if flavor.memory_mib < least_mib {
        return invalid(format!(
            "Flavor's memory is too small for requested image: it has {} MiB, the image wants {least_mib} MiB.",
            flavor.memory_mib
        ));
    }
    let disk_bytes = match flavor.disk_gib.checked_mul(GIB) {
        Some(0) if instance.flavor.disk_gib != 0 => {
            return disk("Resize to zero disk flavor is not allowed.");
        }
        Some(0) => instance.disk_bytes,
        Some(bytes) if bytes < instance.disk_bytes => {
            return disk(&format!(
                "Unable to resize disk down: it has {} bytes, the flavor has {bytes}.",
                instance.disk_bytes
            ));
        }
        Some(bytes) => bytes,
        None => return invalid(format!("Flavor's disk of {} GiB is not a disk.", flavor.disk_gib)),
    };
    Ok(Shape { flavor: flavor.clone().into(), disk_bytes, topology: Some(request.topology) })
}

/// What a migration of this kind carries.
pub(super) fn resize(migration: &Migration) -> Result<&Resize, StepError> {
    let none = || Error::Conflict("The migration resizes nothing.".into());
    migration.resize.as_ref().ok_or_else(|| none().into())
}

/// The migration of an instance that is what it is to be, and holds beside that what it was.
pub fn pending(fleet: &Fleet, instance: InstanceId) -> Option<&Migration> {
    fleet.running_migration(instance).filter(|m| m.resize.is_some() && m.switched_at.is_some())
}

/// One step, by its place in [`STEPS`].
pub(super) async fn run(context: &Context, id: MigrationId, step: usize) -> Result<(), StepError> {
    if STEPS[step] == "reserve" {
        return reserve(context, id).await;
    }
    let migration = record(context, id)?;
    let (source, target) = (migration.source, target(&migration)?);
    let resize = resize(&migration)?;
    match STEPS[step] {
        "stop" => {
            context.show(Task::ResizeMigrating).await?;
            update(context, id, |m| m.status = MigrationStatus::Running).await?;
            stop(context, source, resize.ran, GRACE_MS).await
        }
        "leave" if source != target => {
            context.ask(source, AgentRequest::RemoveInstance(context.instance)).await.map(drop)
        }
        "disk" => {
            move_disk::bring(context, id).await?;
            match resize.grows() {
                true => grow(context, target, resize.new.disk_bytes).await,
                false => Ok(()),
            }
        }
        "network" => {
            context.show(Task::ResizeMigrated).await?;
            let networks = plug_in(context, (source != target).then_some(target)).await?;
            networks.into_iter().for_each(|network| context.app.l2_changed(network));
            create_instance::build_networks(context, target).await
        }
        "switch" => {
            if source == target {
                let reservation = migration.reservation.clone();
                let reservation = reservation.ok_or_else(|| Error::Conflict("It holds no place.".into()))?;
                context.ask(target, AgentRequest::Exchange(reservation)).await?;
            }
            switch(context, id, true).await
        }
        "define" => {
            context.show(Task::ResizeFinishing).await?;
            let spec = context.app.ledger.read(|fleet| create_instance::spec(context, fleet))?;
            context.ask(target, AgentRequest::DefineInstance(Box::new(spec))).await.map(drop)
        }
        "start" if resize.ran => {
            context.ask(target, AgentRequest::StartInstance(context.instance)).await.map(drop)
        }
        _ => Ok(()),
    }
}

/// Undoes one step, whether or not it got to its effect.
pub(super) async fn undo(context: &Context, id: MigrationId, step: usize) -> Result<(), StepError> {
    let migration = record(context, id)?;
    let Some(target) = migration.target else { return Ok(()) };
    let (source, resize) = (migration.source, resize(&migration)?);
    let instance = context.instance;
    match STEPS[step] {
        // Its vCPUs may run already.
        "define" => context.insist(target, AgentRequest::RemoveInstance(instance)).await,
        "switch" => {
            if source == target {
                context.insist(source, AgentRequest::Exchange(resize.old_reservation.clone())).await?;
            }
            switch(context, id, false).await
        }
        "network" if source != target => {
            let networks = plug_in(context, None).await?;
            leave_networks(context, target, networks).await;
            Ok(())
        }
        // The source's is as it was.
        "disk" if migration.disk_moves => move_disk::take_back(context, &migration).await,
        "disk" if resize.grows() => {
            context.insist(target, AgentRequest::RestoreDisk(instance)).await?;
            // A host that was removed meanwhile has put nothing back.
            let there = context.app.ledger.read(|fleet| fleet.hosts.contains_key(&target));
            match there {
                true => Ok(()),
                false => context.insist(source, AgentRequest::RestoreDisk(instance)).await,
            }
        }
        "leave" => {
            let spec = context.app.ledger.read(|fleet| create_instance::spec(context, fleet))?;
            context.insist(source, AgentRequest::DefineInstance(Box::new(spec))).await
        }
        "stop" if resize.ran => start_again(context, source).await,
        "reserve" => {
            release_new(context, source, target).await?;
            update(context, id, |m| (m.target, m.reservation) = (None, None)).await
        }
        _ => Ok(()),
    }
}

/// Lets go of the place that was to be, or is not to be any more.
pub(super) async fn release_new(context: &Context, source: HostId, target: HostId) -> Result<(), StepError> {
    let request = match source == target {
        true => AgentRequest::ReleaseBeside(context.instance),
        false => AgentRequest::Release(context.instance),
    };
    context.insist(target, request).await
}

/// Switches the guest off, if it may run.
pub(super) async fn stop(context: &Context, host: HostId, ran: bool, grace_ms: u64) -> Result<(), StepError> {
    if !ran {
        return Ok(());
    }
    let request = AgentRequest::StopInstance { instance: context.instance, grace_ms };
    context.ask(host, request).await?;
    context.update(|instance| instance.power = Some(InstanceState::Stopped)).await
}

/// Starts the guest where it was. A host that cannot leaves it switched off, which is told and may be tried again by
/// its owner; a host that does not answer is waited for.
pub(super) async fn start_again(context: &Context, host: HostId) -> Result<(), StepError> {
    create_instance::build_networks(context, host).await?;
    let (status, power) = match context.ask(host, AgentRequest::StartInstance(context.instance)).await {
        Ok(_) => (InstanceStatus::Active, InstanceState::Running),
        Err(StepError::Host { host, error }) if !error.is_transient() => {
            tracing::error!(instance = %context.instance, host, %error, "it cannot be started again");
            (InstanceStatus::Stopped, InstanceState::Stopped)
        }
        Err(error) => return Err(error),
    };
    context.update(|i| (i.status, i.power) = (status, Some(power))).await
}

/// Hosts hear that an instance's ports are not on `host` any more.
pub(super) async fn leave_networks(context: &Context, host: HostId, networks: BTreeSet<NetworkId>) {
    for network in networks {
        // A host that is away is told when it comes back.
        let _ = l2::ensure(&context.app, host, network).await;
        context.app.l2_changed(network);
    }
}

async fn reserve(context: &Context, id: MigrationId) -> Result<(), StepError> {
    let mut stale = 0;
    loop {
        let (source, target, reservation, generation) = context
            .place(|fleet| {
                let migration = in_fleet(fleet, id)?;
                if let (Some(target), Some(reservation)) = (migration.target, &migration.reservation) {
                    let planned = (migration.source, target, reservation.clone(), generation(fleet, target));
                    return Ok((vec![], planned));
                }
                let placed = placed(context, fleet, migration)?;
                let (Some(target), Some(reservation)) = (placed.target, placed.reservation.clone()) else {
                    return Err(Error::Conflict("No place was found.".into()).into());
                };
                let planned = (placed.source, target, reservation, generation(fleet, target));
                Ok((vec![placed.into()], planned))
            })
            .await?;
        let plan = (generation, source == target);
        let verdict = hold(context, target, reservation, plan, &mut stale).await?;
        if verdict == Verdict::Held {
            return Ok(());
        }
        update(context, id, |m| {
            (m.target, m.reservation) = (None, None);
            m.refused_by.extend((verdict == Verdict::Refused).then_some(target));
        })
        .await?;
    }
}

/// The migration with a place for what the instance is to be.
fn placed(context: &Context, fleet: &Fleet, migration: &Migration) -> Result<Migration, StepError> {
    let resize = resize(migration)?;
    let new = Instance {
        flavor: resize.new.flavor.clone(),
        topology: resize.new.topology,
        // The pool has the disk already. What is kept of the old one and what the new one grows by are as much as the
        // new one together.
        disk_bytes: if resize.grows() { resize.new.disk_bytes } else { 0 },
        ..context.in_fleet(fleet)?.clone()
    };
    let may_stay = migration.kind == MigrationKind::Resize && context.app.config.allow_resize_to_same_host;
    let mut excluded = migration.refused_by.clone();
    excluded.extend((!may_stay).then_some(migration.source));
    let wish = place::Wish::of(&new, migration.wanted_target, &excluded).moving();
    let (target, reservation) = place::choose(fleet, &context.app.config, &wish)?;
    Ok(Migration {
        target: Some(target),
        reservation: Some(reservation),
        status: MigrationStatus::Preparing,
        updated_at: now(),
        ..migration.clone()
    })
}

async fn grow(context: &Context, host: HostId, size_bytes: u64) -> Result<(), StepError> {
    let format = context.instance()?.disk_format.unwrap_or(DiskFormat::Raw);
    let request = GrowRequest { instance: context.instance, format, size_bytes };
    context.ask(host, AgentRequest::GrowDisk(request)).await.map(drop)
}

/// Record and ports say that the instance is what it is to be, or what it was. Repeated, it changes nothing.
pub(super) async fn switch(context: &Context, id: MigrationId, forward: bool) -> Result<(), StepError> {
    let networks = context
        .change(|fleet| {
            let migration = in_fleet(fleet, id)?;
            let (resize, at) = (resize(migration)?, now());
            let target = target(migration)?;
            if migration.switched_at.is_some() == forward {
                return Ok((vec![], BTreeSet::new()));
            }
            let (host, shape, reservation) = match forward {
                true => (target, &resize.new, migration.reservation.clone()),
                false => (migration.source, &resize.old, Some(resize.old_reservation.clone())),
            };
            let ports = fleet.ports_of(context.instance);
            let networks: BTreeSet<NetworkId> = ports.iter().map(|p| p.network).collect();
            let mut changes: Vec<Change> = ports
                .into_iter()
                .map(|p| Port { host: Some(host), target_host: None, updated_at: at, ..p.clone() }.into())
                .collect();
            changes.extend(networks.iter().filter_map(|n| l2::touched(fleet, *n)));
            let moved = Instance {
                host: Some(host),
                reservation,
                flavor: shape.flavor.clone(),
                disk_bytes: shape.disk_bytes,
                topology: shape.topology,
                updated_at: at,
                ..context.in_fleet(fleet)?.clone()
            };
            let switched_at = forward.then_some(at);
            let noted = Migration { switched_at, updated_at: at, ..migration.clone() };
            changes.extend([moved.into(), noted.into()]);
            Ok((changes, networks))
        })
        .await?;
    networks.into_iter().for_each(|network| context.app.l2_changed(network));
    Ok(())
}

pub(super) fn finish(
    fleet: &Fleet,
    operation: &Operation,
    id: MigrationId,
    error: Option<&StepError>,
) -> Vec<Change> {
    let (migration, instance) = (fleet.migrations.get(&id), fleet.instances.get(&operation.instance));
    let (Some(migration), Some(instance)) = (migration, instance) else { return vec![] };
    let status = match error {
        None => MigrationStatus::Finished,
        Some(_) if operation.cancel => MigrationStatus::Cancelled,
        Some(_) => MigrationStatus::Failed,
    };
    let told = error.map(ToString::to_string);
    let ended = Migration { status, error: told, updated_at: now(), ..migration.clone() };
    let task = instance.delete_wanted.then_some(Task::Deleting);
    let mut next = Instance { task, updated_at: now(), ..instance.clone() };
    if error.is_none() {
        let ran = migration.resize.as_ref().is_some_and(|resize| resize.ran);
        next.status = InstanceStatus::Resized;
        next.power = Some(if ran { InstanceState::Running } else { InstanceState::Stopped });
    }
    vec![ended.into(), next.into()]
}
