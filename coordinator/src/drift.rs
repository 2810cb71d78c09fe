//! What hosts hold and run against what the fleet thinks: told, and repaired by nobody but people.

use crate::fleet::Fleet;
use godwit_protocol::id::{HostId, InstanceId};
use godwit_protocol::request::HostReport;
use godwit_protocol::reservation::{Aspect, Drift, Reservation};

/// Everything that is not where it was reserved, host by host: what hosts say of their guests, and reservations that
/// are not those of the fleet. Instances on which something runs are left out; they are about to change.
pub fn list(fleet: &Fleet) -> Vec<(HostId, Drift)> {
    let reports = fleet.observed.values().filter_map(|observed| observed.report.as_ref());
    let mut all: Vec<(HostId, Drift)> =
        reports.flat_map(|report| of_report(fleet, report).into_iter().map(|d| (report.host, d))).collect();
    all.sort();
    all
}

/// Those that one host's report tells of.
pub fn of_report(fleet: &Fleet, report: &HostReport) -> Vec<Drift> {
    let idle = |drift: &&Drift| fleet.running_operation(drift.instance).is_none();
    let mut drifts: Vec<Drift> = report.drifts.iter().filter(idle).cloned().collect();
    let mut compare = |instance: InstanceId, wanted: &Reservation, held: &[Reservation], what: &str| {
        let held = held.iter().find(|r| r.instance == instance);
        if held != Some(wanted) && fleet.running_operation(instance).is_none() {
            drifts.push(Drift {
                instance,
                aspect: Aspect::Reservation,
                wanted: what.into(),
                found: held.map_or("nothing", |_| "another reservation").into(),
            });
        }
    };
    for instance in fleet.instances.values().filter(|i| i.host == Some(report.host)) {
        if let Some(wanted) = &instance.reservation {
            compare(instance.id, wanted, &report.reservations, "what the coordinator placed");
        }
    }
    let resized = fleet.migrations.values().filter(|m| m.status.is_running() && m.source == report.host);
    for migration in resized.filter(|m| m.switched_at.is_some()) {
        if let Some(resize) = &migration.resize {
            let stayed = migration.target == Some(report.host);
            let held = if stayed { &report.beside } else { &report.reservations };
            compare(
                migration.instance,
                &resize.old_reservation,
                held,
                "what it goes back to if its resize is reverted",
            );
        }
    }
    drifts
}
