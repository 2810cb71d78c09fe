//! Start, stop, reboot, pause: one step each. A failure leaves the domain as it is and is told by the operation.

use super::{Context, StepError, create_instance, idle, journal, spawn};
use crate::app::Shared;
use crate::error::Error;
use crate::fleet::instance::{Instance, InstanceStatus, Task};
use crate::fleet::operation::{Operation, Verb};
use crate::fleet::{Change, Fleet};
use crate::ledger::now;
use godwit_protocol::id::{HostId, InstanceId};
use godwit_protocol::instance::InstanceState;
use godwit_protocol::request::AgentRequest;

pub(super) const START: &[&str] = &["start"];
pub(super) const STOP: &[&str] = &["stop"];
pub(super) const REBOOT: &[&str] = &["reboot"];
pub(super) const PAUSE: &[&str] = &["pause"];

/// How long a guest may take to shut down before it is switched off, in milliseconds.
pub(super) const GRACE_MS: u64 = 60_000;

/// Starts an instance that is off.
///
/// # Errors
/// Not found; a conflict when it is not off or something runs on it.
pub async fn start(app: &Shared, id: InstanceId) -> Result<(), Error> {
    request(app, id, Verb::StartInstance, Task::Starting, &[InstanceStatus::Stopped]).await
}

/// Stops an instance that runs: it is asked to shut down, and switched off after a minute.
///
/// # Errors
/// Not found; a conflict when it does not run or something runs on it.
pub async fn stop(app: &Shared, id: InstanceId) -> Result<(), Error> {
    request(app, id, Verb::StopInstance, Task::Stopping, &[InstanceStatus::Active, InstanceStatus::Paused])
        .await
}

/// Reboots an instance.
///
/// # Errors
/// Not found; a conflict when it does not run (a hard reboot also starts one that is off) or something runs on it.
pub async fn reboot(app: &Shared, id: InstanceId, hard: bool) -> Result<(), Error> {
    let (task, from): (_, &[InstanceStatus]) = if hard {
        (Task::Resetting, &[InstanceStatus::Active, InstanceStatus::Paused, InstanceStatus::Stopped])
    } else {
        (Task::Rebooting, &[InstanceStatus::Active])
    };
    request(app, id, Verb::RebootInstance { hard }, task, from).await
}

/// Holds or releases an instance's vCPUs.
///
/// # Errors
/// Not found; a conflict when it is not running, or not paused, or something runs on it.
pub async fn pause(app: &Shared, id: InstanceId, paused: bool) -> Result<(), Error> {
    let (task, from) = if paused {
        (Task::Pausing, InstanceStatus::Active)
    } else {
        (Task::Resuming, InstanceStatus::Paused)
    };
    request(app, id, Verb::PauseInstance { paused }, task, &[from]).await
}

async fn request(
    app: &Shared,
    id: InstanceId,
    verb: Verb,
    task: Task,
    from: &[InstanceStatus],
) -> Result<(), Error> {
    let operation = app
        .ledger
        .change(|fleet| {
            let instance = idle(fleet, id)?;
            if !from.contains(&instance.status) {
                let action = verb.name().trim_end_matches("_instance");
                return Err(Error::state(action, id, instance.status));
            }
            let busy = Instance { task: Some(task), updated_at: now(), ..instance.clone() };
            let operation = journal(verb, id);
            Ok((vec![busy.into(), operation.clone().into()], operation.id))
        })
        .await?;
    spawn(app, operation);
    Ok(())
}

pub(super) async fn run_start(context: &Context) -> Result<(), StepError> {
    let host = host(context)?;
    // The host may have lost its devices to a power cut since the instance ran last.
    create_instance::build_networks(context, host).await?;
    context.ask(host, AgentRequest::StartInstance(context.instance)).await.map(drop)
}

pub(super) async fn run_stop(context: &Context) -> Result<(), StepError> {
    let request = AgentRequest::StopInstance { instance: context.instance, grace_ms: GRACE_MS };
    context.ask(host(context)?, request).await.map(drop)
}

pub(super) async fn run_reboot(context: &Context, hard: bool) -> Result<(), StepError> {
    if context.instance()?.status == InstanceStatus::Stopped {
        return run_start(context).await;
    }
    let request = AgentRequest::RebootInstance { instance: context.instance, hard };
    context.ask(host(context)?, request).await.map(drop)
}

pub(super) async fn run_pause(context: &Context, paused: bool) -> Result<(), StepError> {
    let request = AgentRequest::PauseInstance { instance: context.instance, paused };
    context.ask(host(context)?, request).await.map(drop)
}

fn host(context: &Context) -> Result<HostId, StepError> {
    let host = context.instance()?.host;
    host.ok_or_else(|| Error::Conflict("The instance is on no host.".into()).into())
}

pub(super) fn finish(fleet: &Fleet, operation: &Operation, error: Option<&StepError>) -> Vec<Change> {
    let Some(instance) = fleet.instances.get(&operation.instance) else { return vec![] };
    let mut ended = Instance { task: None, updated_at: now(), ..instance.clone() };
    if error.is_none() {
        (ended.status, ended.power) = match operation.verb {
            Verb::StopInstance => (InstanceStatus::Stopped, Some(InstanceState::Stopped)),
            Verb::PauseInstance { paused: true } => (InstanceStatus::Paused, Some(InstanceState::Paused)),
            _ => (InstanceStatus::Active, Some(InstanceState::Running)),
        };
    }
    if ended.delete_wanted {
        ended.task = Some(Task::Deleting);
    }
    vec![ended.into()]
}
