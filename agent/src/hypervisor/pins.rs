//! Which CPUs an instance's threads may run on: what its reservation means on this host. The domain's description is
//! written from it, and what really runs is held against it.

use crate::kernel_numbers::parse_list;
use godwit_protocol::host::Cell;
use godwit_protocol::instance::Tuning;
use godwit_protocol::reservation::Reservation;
use std::collections::{BTreeMap, BTreeSet};

/// CPUs by thread; an empty set: any.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pins {
    /// Of each vCPU.
    pub vcpus: BTreeMap<u32, BTreeSet<u32>>,
    /// Of the emulator's threads.
    pub emulator: BTreeSet<u32>,
}

impl Pins {
    /// What `reservation` means on a host with these cells.
    pub fn of(reservation: &Reservation, tuning: &Tuning, cells: &[Cell]) -> Self {
        let everywhere = shared_everywhere(cells);
        if reservation.cells.is_empty() {
            let vcpus = (0..reservation.vcpus).map(|vcpu| (vcpu, everywhere.clone())).collect();
            return Self { vcpus, emulator: everywhere };
        }
        let mut vcpus = BTreeMap::<u32, BTreeSet<u32>>::new();
        for cell in &reservation.cells {
            vcpus.extend(cell.pinning.iter().map(|(&vcpu, &cpu)| (vcpu, BTreeSet::from([cpu]))));
            let shared = shared_cpus(cells, cell.host);
            vcpus.extend(cell.shared_vcpus.iter().map(|&vcpu| (vcpu, shared.clone())));
        }
        let emulator = emulator(reservation, tuning, cells, &vcpus, everywhere);
        Self { vcpus, emulator }
    }

    /// CPUs where none of the instance's threads may be found, because they are other instances' own.
    pub fn allows_emulator(&self, found: &BTreeSet<u32>, cells: &[Cell]) -> bool {
        let own = self.vcpus.values().flatten().chain(&self.emulator);
        let allowed: BTreeSet<u32> = own.copied().chain(shared_everywhere(cells)).collect();
        self.emulator.is_empty() || found.is_subset(&allowed)
    }
}

fn emulator(
    reservation: &Reservation,
    tuning: &Tuning,
    cells: &[Cell],
    vcpus: &BTreeMap<u32, BTreeSet<u32>>,
    everywhere: BTreeSet<u32>,
) -> BTreeSet<u32> {
    if !reservation.emulator_cpus.is_empty() {
        return reservation.emulator_cpus.iter().copied().collect();
    }
    if tuning.emulator_shares {
        let near = reservation.cells.iter().filter_map(|cell| cells.iter().find(|c| c.id == cell.host));
        let near: BTreeSet<u32> = near.flat_map(|cell| cell.shared_cpus.iter().copied()).collect();
        for shared in [near, everywhere] {
            if !shared.is_empty() {
                return shared;
            }
        }
    }
    // Without CPUs of their own they stay on those of the vCPUs, off other guests' CPUs, and off those that run in
    // real time: a thread that waits for an emulator that never gets its turn waits for ever.
    let usual = vcpus.iter().filter(|(vcpu, _)| !tuning.realtime_vcpus.contains(vcpu));
    let usual: BTreeSet<u32> = usual.flat_map(|(_, cpus)| cpus).copied().collect();
    match usual.is_empty() {
        true => vcpus.values().flatten().copied().collect(),
        false => usual,
    }
}

/// What libvirt was told, from a domain's description: CPUs by vCPU. vCPUs that it was told nothing of are left out.
pub(super) fn told(xml: &str) -> BTreeMap<u32, BTreeSet<u32>> {
    let attribute = |tag: &str, name: &str| {
        let (_, rest) = tag.split_once(&format!(" {name}='"))?;
        Some(rest.split_once('\'')?.0.to_owned())
    };
    let tags = |name: &str| {
        let start = format!("<{name} ");
        xml.split(&start)
            .skip(1)
            .filter_map(|rest| rest.split_once('>'))
            .map(|(tag, _)| format!(" {tag}"))
            .collect::<Vec<_>>()
    };
    let mut told = BTreeMap::new();
    if let Some(cpus) = tags("vcpu").first().and_then(|tag| parse_list(&attribute(tag, "cpuset")?)) {
        let count = xml.split_once("</vcpu>").and_then(|(before, _)| before.rsplit_once('>')?.1.parse().ok());
        told.extend((0..count.unwrap_or(0)).map(|vcpu: u32| (vcpu, cpus.clone())));
    }
    for tag in tags("vcpupin") {
        let vcpu = attribute(&tag, "vcpu").and_then(|vcpu| vcpu.parse().ok());
        let cpus = attribute(&tag, "cpuset").and_then(|cpus| parse_list(&cpus));
        told.extend(vcpu.zip(cpus));
    }
    told
}

/// All CPUs of the host that floating vCPUs use.
pub fn shared_everywhere(cells: &[Cell]) -> BTreeSet<u32> {
    cells.iter().flat_map(|cell| cell.shared_cpus.iter().copied()).collect()
}

/// CPUs of the host that a cell's floating vCPUs may use.
fn shared_cpus(cells: &[Cell], host: u32) -> BTreeSet<u32> {
    let Some(cell) = cells.iter().find(|cell| cell.id == host) else { return BTreeSet::new() };
    if cell.shared_cpus.is_empty() {
        // Nothing was kept for sharing, so placement cannot have meant any other CPUs.
        return cell.cpus.iter().map(|cpu| cpu.id).collect();
    }
    cell.shared_cpus.iter().copied().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_libvirt_was_told_is_read_from_its_description() {
        let xml = "<domain>\n<vcpu placement='static' cpuset='0-1,4'>3</vcpu>\n<cputune>\n\
                   <vcpupin vcpu='1' cpuset='6'/><emulatorpin cpuset='5'/></cputune></domain>";
        let set = |cpus: &[u32]| cpus.iter().copied().collect::<BTreeSet<u32>>();
        let floating = set(&[0, 1, 4]);
        assert_eq!(told(xml), BTreeMap::from([(0, floating.clone()), (1, set(&[6])), (2, floating)]));
        assert_eq!(told("<domain><vcpu placement='static'>2</vcpu></domain>"), BTreeMap::new());
        assert_eq!(told("<vcpu cpuset='x'>9</vcpu><vcpupin vcpu='a' cpuset='1'/>"), BTreeMap::new());
    }
}
