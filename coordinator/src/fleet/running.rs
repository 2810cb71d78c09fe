//! What runs on each instance, derived from the records: found without a look at what has ended.

use super::migration::Migration;
use super::operation::Operation;
use super::{Change, Record};
use godwit_protocol::id::{InstanceId, MigrationId, OperationId};
use std::collections::{BTreeMap, BTreeSet};
use uuid::Uuid;

/// Operations and migrations that have not ended.
#[derive(Default)]
pub(crate) struct Running {
    operations: BTreeSet<(InstanceId, OperationId)>,
    migrations: BTreeSet<(InstanceId, MigrationId)>,
}

impl Running {
    /// Follows a change that is about to be taken into these records.
    pub(super) fn follow(
        &mut self,
        change: &Change,
        operations: &BTreeMap<OperationId, Operation>,
        migrations: &BTreeMap<MigrationId, Migration>,
    ) {
        match change {
            Change::Operation(new) => {
                set(&mut self.operations, (new.instance, new.id), new.is_running());
            }
            Change::Migration(new) => {
                set(&mut self.migrations, (new.instance, new.id), new.status.is_running());
            }
            Change::Gone(Operation::KIND, key) => {
                if let Some(old) = key.parse().ok().and_then(|id| operations.get(&id)) {
                    self.operations.remove(&(old.instance, old.id));
                }
            }
            Change::Gone(Migration::KIND, key) => {
                if let Some(old) = key.parse().ok().and_then(|id| migrations.get(&id)) {
                    self.migrations.remove(&(old.instance, old.id));
                }
            }
            _ => {}
        }
    }

    pub(super) fn operation(&self, on: InstanceId) -> Option<OperationId> {
        let all = (on, OperationId(Uuid::nil()))..=(on, OperationId(Uuid::max()));
        self.operations.range(all).next().map(|(_, id)| *id)
    }

    pub(super) fn migration(&self, on: InstanceId) -> Option<MigrationId> {
        let all = (on, MigrationId(Uuid::nil()))..=(on, MigrationId(Uuid::max()));
        self.migrations.range(all).next().map(|(_, id)| *id)
    }
}

fn set<T: Ord>(among: &mut BTreeSet<T>, it: T, runs: bool) {
    if runs {
        among.insert(it);
    } else {
        among.remove(&it);
    }
}
