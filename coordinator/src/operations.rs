//! Operations: lists of idempotent steps with undo, journaled. A step runs, then the cursor moves, durably; a
//! restart goes on at the first step that is not known to be done. After a failure the steps are undone
//! backwards. From an operation's point of no return on it only goes forward.

mod bring_image;
pub mod confirm_resize;
pub mod create_instance;
pub mod delete_instance;
pub mod live_migrate;
mod move_disk;
pub mod place;
pub mod power;
mod reserve;
pub mod resize_instance;
pub mod revert_resize;
mod step;

pub use step::{Context, StepError};

use crate::app::Shared;
use crate::crash;
use crate::error::Error;
use crate::fleet::instance::{Fault, Instance, InstanceStatus};
use crate::fleet::operation::{Operation, Phase, Verb};
use crate::fleet::{Change, Fleet, Time};
use crate::ledger::now;
use crate::store::StoreError;
use godwit_protocol::id::{InstanceId, OperationId};
use godwit_protocol::operation::Progress;
use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

/// Finished operations that are kept for people to look at.
const KEPT: usize = 1000;

/// Running operations' progress and their wake-ups.
#[derive(Default)]
pub struct Operations {
    progress: Mutex<HashMap<InstanceId, Progress>>,
}

impl Operations {
    /// How far what runs on an instance is, when its host tells.
    pub fn progress(&self, instance: InstanceId) -> Option<Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner).get(&instance).copied()
    }

    fn tell(&self, instance: InstanceId, progress: Option<Progress>) {
        let mut all = self.progress.lock().unwrap_or_else(PoisonError::into_inner);
        match progress {
            Some(progress) => all.insert(instance, progress),
            None => all.remove(&instance),
        };
    }
}

/// Names of a verb's steps, in order, and how many of them may still be undone.
fn plan(verb: Verb) -> (&'static [&'static str], usize) {
    match verb {
        Verb::CreateInstance => (create_instance::STEPS, create_instance::STEPS.len()),
        Verb::DeleteInstance => (delete_instance::STEPS, 0),
        Verb::StartInstance => (power::START, 1),
        Verb::StopInstance => (power::STOP, 1),
        Verb::RebootInstance { .. } => (power::REBOOT, 1),
        Verb::PauseInstance { .. } => (power::PAUSE, 1),
        Verb::LiveMigrate { .. } => (live_migrate::STEPS, live_migrate::POINT_OF_NO_RETURN),
        Verb::MigrateInstance { .. } | Verb::ResizeInstance { .. } => {
            (resize_instance::STEPS, resize_instance::STEPS.len())
        }
        Verb::ConfirmResize { .. } => (confirm_resize::STEPS, 0),
        Verb::RevertResize { .. } => (revert_resize::STEPS, 0),
    }
}

async fn run_step(context: &Context, step: usize) -> Result<(), StepError> {
    match context.verb {
        Verb::CreateInstance => create_instance::run(context, step).await,
        Verb::DeleteInstance => delete_instance::run(context, step).await,
        Verb::StartInstance => power::run_start(context).await,
        Verb::StopInstance => power::run_stop(context).await,
        Verb::RebootInstance { hard } => power::run_reboot(context, hard).await,
        Verb::PauseInstance { paused } => power::run_pause(context, paused).await,
        Verb::LiveMigrate { migration } => live_migrate::run(context, migration, step).await,
        Verb::MigrateInstance { migration } | Verb::ResizeInstance { migration } => {
            resize_instance::run(context, migration, step).await
        }
        Verb::ConfirmResize { migration } => confirm_resize::run(context, migration, step).await,
        Verb::RevertResize { migration } => revert_resize::run(context, migration, step).await,
    }
}

async fn undo_step(context: &Context, step: usize) -> Result<(), StepError> {
    match context.verb {
        Verb::CreateInstance => create_instance::undo(context, step).await,
        Verb::LiveMigrate { migration } => live_migrate::undo(context, migration, step).await,
        Verb::MigrateInstance { migration } | Verb::ResizeInstance { migration } => {
            resize_instance::undo(context, migration, step).await
        }
        // A power change that failed leaves the domain as it is; a deletion only goes forward.
        _ => Ok(()),
    }
}

/// What else changes when an operation ends: the instance's state, the migration's record.
fn finish(fleet: &Fleet, operation: &Operation, error: Option<&StepError>) -> Vec<Change> {
    match operation.verb {
        Verb::CreateInstance => create_instance::finish(fleet, operation, error),
        Verb::DeleteInstance => delete_instance::finish(fleet, operation, error),
        Verb::LiveMigrate { migration } => live_migrate::finish(fleet, operation, migration, error),
        Verb::MigrateInstance { migration } | Verb::ResizeInstance { migration } => {
            resize_instance::finish(fleet, operation, migration, error)
        }
        Verb::ConfirmResize { migration } => confirm_resize::finish(fleet, operation, migration),
        Verb::RevertResize { migration } => revert_resize::finish(fleet, operation, migration),
        _ => power::finish(fleet, operation, error),
    }
}

/// A new operation on an instance, as a change to journal together with what the request itself changes.
fn journal(verb: Verb, instance: InstanceId) -> Operation {
    let at = now();
    Operation {
        id: OperationId::random(),
        verb,
        instance,
        phase: Phase::Running,
        cursor: 0,
        step: plan(verb).0.first().copied().unwrap_or_default().to_owned(),
        cancel: false,
        error: None,
        created_at: at,
        updated_at: at,
    }
}

/// The instance, when nothing runs on it.
fn idle(fleet: &Fleet, id: InstanceId) -> Result<&Instance, Error> {
    let instance = fleet.instances.get(&id).ok_or_else(|| Error::not_found("Instance", id))?;
    match fleet.running_operation(id) {
        Some(operation) => Err(Error::Conflict(format!(
            "Instance {id} is busy with {} (step {}); wait for it to end, or delete the instance.",
            operation.verb.name(),
            operation.step
        ))),
        None => Ok(instance),
    }
}

/// Continues everything that an earlier life of the process left unfinished.
pub fn resume(app: &Shared) {
    let running: Vec<OperationId> =
        app.ledger.read(|fleet| fleet.operations.values().filter(|o| o.is_running()).map(|o| o.id).collect());
    for id in running {
        tracing::info!(operation = %id, "an operation goes on after the restart");
        spawn(app, id);
    }
    let owed: Vec<InstanceId> = app.ledger.read(|fleet| {
        let owed = |i: &&Instance| i.delete_wanted && fleet.running_operation(i.id).is_none();
        fleet.instances.values().filter(owed).map(|i| i.id).collect()
    });
    for id in owed {
        let app = app.clone();
        tokio::spawn(async move { delete_instance::after_other_operation(&app, id).await });
    }
}

/// Runs a journaled operation in the background.
fn spawn(app: &Shared, id: OperationId) {
    let app = app.clone();
    tokio::spawn(async move {
        if let Err(error) = drive(&app, id).await {
            tracing::error!(operation = %id, %error, "an operation stopped; it goes on at the next start");
        }
    });
}

/// An operation's life, from wherever the journal says it is.
async fn drive(app: &Shared, id: OperationId) -> Result<(), StoreError> {
    let Some(operation) = app.ledger.read(|fleet| fleet.operations.get(&id).cloned()) else { return Ok(()) };
    let context = Context::new(app, &operation);
    let (steps, undoable) = plan(operation.verb);
    let mut failure = operation.error.clone().map(StepError::Failed);
    let mut cursor = operation.cursor;
    let mut phase = operation.phase;
    while phase == Phase::Running && cursor < steps.len() {
        if cursor < undoable && context.is_cancelled() {
            failure = Some(StepError::Cancelled);
            phase = Phase::Undoing;
            // The step at the cursor may have begun in an earlier life: undo it too.
            cursor += 1;
            break;
        }
        let place = format!("{}.{}", operation.verb.name(), steps[cursor]);
        crash::point(&place, "before");
        let result = run_step(&context, cursor).await;
        crash::point(&place, "after");
        match result {
            Ok(()) => {
                cursor += 1;
                note(app, id, phase, cursor, steps.get(cursor).copied(), None).await?;
            }
            Err(error) if cursor < undoable => {
                failure = Some(error);
                phase = Phase::Undoing;
                // A failed step may have done half of its work: it is undone as well.
                cursor += 1;
            }
            Err(error) => {
                tracing::warn!(operation = %id, step = steps[cursor], %error, "a step past the point of no return is tried again");
                context.pause().await;
            }
        }
    }
    if phase == Phase::Undoing {
        let text = failure.as_ref().map(ToString::to_string);
        note(app, id, phase, cursor, cursor.checked_sub(1).map(|c| steps[c]), text.clone()).await?;
        while cursor > 0 {
            let place = format!("{}.undo_{}", operation.verb.name(), steps[cursor - 1]);
            crash::point(&place, "before");
            match undo_step(&context, cursor - 1).await {
                Ok(()) => {
                    crash::point(&place, "after");
                    cursor -= 1;
                    note(app, id, phase, cursor, cursor.checked_sub(1).map(|c| steps[c]), text.clone())
                        .await?;
                }
                Err(error) => {
                    tracing::warn!(operation = %id, step = steps[cursor - 1], %error, "an undo is tried again");
                    context.pause().await;
                }
            }
        }
    }
    end(app, id, failure).await
}

/// Journals how far an operation is.
async fn note(
    app: &Shared,
    id: OperationId,
    phase: Phase,
    cursor: usize,
    step: Option<&str>,
    error: Option<String>,
) -> Result<(), StoreError> {
    app.ledger
        .change(|fleet| {
            let Some(operation) = fleet.operations.get(&id) else { return Ok((vec![], ())) };
            let step = step.unwrap_or_default().to_owned();
            let updated_at = now();
            Ok((vec![Operation { phase, cursor, step, error, updated_at, ..operation.clone() }.into()], ()))
        })
        .await
}

/// Journals an operation's end together with what it means for the instance, and starts a deletion that waited.
async fn end(app: &Shared, id: OperationId, failure: Option<StepError>) -> Result<(), StoreError> {
    let instance = app
        .ledger
        .change(|fleet| {
            let Some(operation) = fleet.operations.get(&id).cloned() else {
                return Ok::<_, StoreError>((vec![], None));
            };
            let mut changes = finish(fleet, &operation, failure.as_ref());
            let phase = if failure.is_some() { Phase::Failed } else { Phase::Succeeded };
            let error = failure.as_ref().map(ToString::to_string);
            let instance = operation.instance;
            changes.push(Operation { phase, error, updated_at: now(), ..operation }.into());
            changes.extend(outdated(fleet, app.config.migrations_kept));
            Ok((changes, Some(instance)))
        })
        .await?;
    let Some(instance) = instance else { return Ok(()) };
    app.operations.tell(instance, None);
    match failure {
        Some(error) => {
            tracing::warn!(operation = %id, %instance, %error, "an operation failed and is undone")
        }
        None => tracing::info!(operation = %id, %instance, "an operation is done"),
    }
    delete_instance::after_other_operation(app, instance).await;
    Ok(())
}

/// The oldest operations and migrations that have ended, beyond those that are kept.
fn outdated(fleet: &Fleet, migrations_kept: usize) -> Vec<Change> {
    let ended = fleet.operations.values().filter(|o| !o.is_running());
    let operations = oldest_beyond(KEPT, ended, |o| o.updated_at);
    // Numbers go on from the highest, which therefore stays.
    let last = fleet.migrations.values().map(|m| m.number).max();
    let ended = fleet.migrations.values().filter(|m| !m.status.is_running() && Some(m.number) != last);
    let migrations = oldest_beyond(migrations_kept, ended, |m| m.updated_at);
    operations.into_iter().map(Change::gone).chain(migrations.into_iter().map(Change::gone)).collect()
}

fn oldest_beyond<'r, R>(
    kept: usize,
    records: impl Iterator<Item = &'r R>,
    age: impl Fn(&R) -> Time,
) -> Vec<&'r R> {
    let mut records: Vec<&R> = records.collect();
    let surplus = records.len().saturating_sub(kept);
    if surplus > 0 {
        records.sort_by_key(|record| age(record));
    }
    records.truncate(surplus);
    records
}

/// An instance with an error that its owner sees.
fn in_error(instance: &Instance, message: String) -> Instance {
    Instance {
        status: InstanceStatus::Error,
        task: None,
        fault: Some(Fault { message, at: now() }),
        updated_at: now(),
        ..instance.clone()
    }
}
