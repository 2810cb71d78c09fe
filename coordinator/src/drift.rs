//! What hosts hold and run against what the fleet thinks: told, and repaired by nobody but people.

use crate::fleet::Fleet;
use godwit_protocol::id::HostId;
use godwit_protocol::request::HostReport;
use godwit_protocol::reservation::{Aspect, Drift};

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
    let here = fleet.instances.values().filter(|i| i.host == Some(report.host));
    for instance in here.filter(|i| fleet.running_operation(i.id).is_none()) {
        let Some(wanted) = &instance.reservation else { continue };
        let held = report.reservations.iter().find(|r| r.instance == instance.id);
        if held != Some(wanted) {
            drifts.push(Drift {
                instance: instance.id,
                aspect: Aspect::Reservation,
                wanted: "what the coordinator placed".into(),
                found: held.map_or("nothing", |_| "another reservation").into(),
            });
        }
    }
    drifts
}
