//! Sockets, cores and threads that a guest sees.

use godwit_protocol::instance::CpuTopology;

use super::spec::{SpecError, SpecRule, Specs};

/// The maximum that stands for "no maximum".
pub const NO_MAXIMUM: u32 = 65_536;

const PARTS: [&str; 3] = ["sockets", "cores", "threads"];

/// What a flavor and an image say about sockets, cores and threads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TopologyWish {
    /// The numbers preferred; 0 is no preference.
    pub preferred: CpuTopology,
    /// The numbers not to exceed; [`NO_MAXIMUM`] where nothing is said. Licences often count sockets.
    pub maximum: CpuTopology,
}

impl TopologyWish {
    pub(super) fn from_specs(specs: Specs<'_>) -> Result<Self, SpecError> {
        let mut maximum = [NO_MAXIMUM; 3];
        for (part, maximum) in PARTS.iter().zip(&mut maximum) {
            let (flavor, image) = read(specs, &format!("cpu_max_{part}"))?;
            if flavor > 0 && image > flavor {
                return Err(refuse_image(specs, &format!("cpu_max_{part}"), SpecRule::ImageMaxOverFlavorMax));
            }
            *maximum = [image, flavor, NO_MAXIMUM].into_iter().find(|&count| count > 0).unwrap_or(NO_MAXIMUM);
        }
        let (mut by_flavor, mut by_image) = ([0; 3], [0; 3]);
        for (index, part) in PARTS.iter().enumerate() {
            (by_flavor[index], by_image[index]) = read(specs, &format!("cpu_{part}"))?;
        }
        let over =
            |counts: &[u32; 3]| counts.iter().zip(&maximum).position(|(count, maximum)| count > maximum);
        if let Some(index) = over(&by_image) {
            return Err(refuse_image(
                specs,
                &format!("cpu_{}", PARTS[index]),
                SpecRule::ImageTopologyOverMax,
            ));
        }
        // The image's preference replaces the flavor's as a whole; the flavor's lapses as a whole when the
        // image's maxima rule it out.
        let preferred = match (by_image != [0; 3], over(&by_flavor)) {
            (true, _) => by_image,
            (false, None) => by_flavor,
            (false, Some(_)) => [0; 3],
        };
        Ok(Self { preferred: topology(preferred), maximum: topology(maximum) })
    }

    /// Refuses a preference that no topology of these vCPUs can meet: more of something than there are vCPUs.
    pub(super) fn check(&self, specs: Specs<'_>, vcpus: u32) -> Result<(), SpecError> {
        let wanted = PARTS.iter().zip(counts(&self.preferred));
        let Some((part, _)) = wanted.into_iter().find(|(_, count)| *count > vcpus) else { return Ok(()) };
        let (flavor, image) = specs.both(&format!("cpu_{part}"));
        match image.or(flavor) {
            Some(entry) => Err(entry.refuse(SpecRule::TopologyImpossible)),
            None => Ok(()),
        }
    }

    /// The best topology for this many vCPUs: nearest to the preference, then fewest threads, then most sockets.
    /// None when the maxima leave none.
    pub fn best(&self, vcpus: u32, allow_threads: bool) -> Option<CpuTopology> {
        // Of equally near ones, the first in rank.
        let ranked = possible(vcpus, self.maximum, allow_threads).into_iter();
        ranked.rev().max_by_key(|topology| self.nearness(topology))
    }

    fn nearness(&self, topology: &CpuTopology) -> usize {
        let (got, wanted) = (counts(topology), counts(&self.preferred));
        got.iter().zip(&wanted).filter(|(got, wanted)| got == wanted).count()
    }
}

/// All topologies of exactly this many vCPUs within the maxima: fewest threads first, then most sockets.
pub fn possible(vcpus: u32, maximum: CpuTopology, allow_threads: bool) -> Vec<CpuTopology> {
    let max_threads = if allow_threads { maximum.threads } else { maximum.threads.min(1) };
    let mut found = Vec::new();
    for sockets in divisors(vcpus).into_iter().filter(|&sockets| sockets <= maximum.sockets) {
        let rest = vcpus / sockets;
        for cores in divisors(rest).into_iter().filter(|&cores| cores <= maximum.cores) {
            let threads = rest / cores;
            if threads <= max_threads {
                found.push(CpuTopology { sockets, cores, threads });
            }
        }
    }
    found.sort_by_key(|topology| std::cmp::Reverse((u64::from(vcpus / topology.threads), topology.sockets)));
    found
}

fn divisors(number: u32) -> Vec<u32> {
    let small = (1..=number.isqrt()).filter(|divisor| number.is_multiple_of(*divisor));
    small
        .flat_map(|divisor| [Some(divisor), Some(number / divisor).filter(|&other| other != divisor)])
        .flatten()
        .collect()
}

fn read(specs: Specs<'_>, name: &str) -> Result<(u32, u32), SpecError> {
    // A number that is set but empty is no number.
    let (flavor, image) = (specs.flavor_as_written(name), specs.image(name));
    let count = |entry: Option<super::spec::Entry<'_>>| match entry {
        // More than a u32 is more than any number of vCPUs: the comparisons come out the same.
        Some(entry) => {
            entry.whole_number(SpecRule::InvalidRequest).map(|count| u32::try_from(count).unwrap_or(u32::MAX))
        }
        None => Ok(0),
    };
    Ok((count(flavor)?, count(image)?))
}

fn refuse_image(specs: Specs<'_>, name: &str, rule: SpecRule) -> SpecError {
    let value = specs.image(name).map_or_else(String::new, |entry| entry.value.to_owned());
    SpecError { key: format!("hw_{name}"), value, rule }
}

fn topology([sockets, cores, threads]: [u32; 3]) -> CpuTopology {
    CpuTopology { sockets, cores, threads }
}

fn counts(topology: &CpuTopology) -> [u32; 3] {
    [topology.sockets, topology.cores, topology.threads]
}
