//! `/proc/cpuinfo`, where sysfs tells nothing of CPUs: every architecture writes another one.

use super::UNTOLD;
use crate::kernel_numbers::{MAX_NUMBER, digits};
use std::collections::{BTreeMap, BTreeSet};

/// What is told of one CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Told {
    /// `physical id`.
    pub(super) package: i64,
    /// `core id`, unique only inside a package.
    pub(super) core: i64,
}

/// The CPUs that are online, by number.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct CpuInfo {
    pub(super) cpus: BTreeMap<u32, Told>,
}

impl CpuInfo {
    pub(super) fn parse(text: &str) -> Self {
        let mut cpus = BTreeMap::new();
        let mut current = None;
        let mut count = None;
        for (key, value) in text.lines().filter_map(|line| line.split_once(':')) {
            let (key, value) = (key.trim(), value.trim());
            // `processor : 3` nearly everywhere, `processor 3: version = FF, …` on s390.
            let number = match key {
                "processor" => digits(value),
                _ => key.strip_prefix("processor ").and_then(|number| digits(number.trim())),
            };
            if let Some(number) = number.filter(|&number| number <= MAX_NUMBER) {
                cpus.insert(number, Told { package: UNTOLD, core: UNTOLD });
                current = Some(number);
                continue;
            }
            let told = current.and_then(|number| cpus.get_mut(&number));
            match (key, told) {
                ("physical id", Some(told)) => told.package = value.parse().unwrap_or(UNTOLD),
                ("core id", Some(told)) => told.core = value.parse().unwrap_or(UNTOLD),
                // Alpha and SPARC only count.
                ("cpus active" | "ncpus active" | "cpus detected", _) => {
                    count = count.or(digits(value).filter(|&count| count <= MAX_NUMBER));
                }
                _ => {}
            }
        }
        if cpus.is_empty() && !text.trim().is_empty() {
            // A kernel for one CPU does not number it.
            let numbers = 0..count.unwrap_or(1);
            cpus.extend(numbers.map(|number| (number, Told { package: UNTOLD, core: UNTOLD })));
        }
        Self { cpus }
    }

    /// The CPUs of the same core, this one included; of a core that is not told, only itself.
    pub(super) fn siblings(&self, cpu: u32) -> BTreeSet<u32> {
        match self.cpus.get(&cpu) {
            Some(told) if told.core != UNTOLD => {
                self.cpus.iter().filter(|(_, other)| *other == told).map(|(&cpu, _)| cpu).collect()
            }
            _ => BTreeSet::from([cpu]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_architecture_is_read_its_own_way() {
        let numbers = |text: &str| CpuInfo::parse(text).cpus.into_keys().collect::<Vec<_>>();
        assert_eq!(numbers("processor\t: 0\ncpu\t\t: POWER5\n\nprocessor\t: 2\n"), [0, 2]);
        assert_eq!(
            numbers("vendor_id       : IBM/S390\nprocessor 0: version = FF\nprocessor 1: version = FF\n"),
            [0, 1]
        );
        assert_eq!(numbers("cpu\t\t\t: Alpha\ncpus detected\t\t: 2\n"), [0, 1]);
        assert_eq!(numbers("Processor\t: ARM926EJ-S rev 5 (v5l)\nBogoMIPS\t: 100\n"), [0]);
        assert_eq!(numbers("processor : 99999999999999999999\nprocessor : -1\nprocessor : 3\n"), [3]);
        assert_eq!(numbers("\n"), [0_u32; 0]);
    }

    #[test]
    fn threads_of_a_core_share_its_number_in_their_package() {
        let cpu =
            |id, package, core| format!("processor : {id}\nphysical id : {package}\ncore id : {core}\n\n");
        let text = [cpu(0, 0, 0), cpu(1, 1, 0), cpu(2, 0, 0), cpu(3, 1, 1)].concat();
        let info = CpuInfo::parse(&text);
        assert_eq!(info.siblings(0), BTreeSet::from([0, 2]));
        assert_eq!(info.siblings(1), BTreeSet::from([1]));
        assert_eq!(info.cpus[&3], Told { package: 1, core: 1 });
        assert_eq!(CpuInfo::parse("processor : 0\nprocessor : 1\n").siblings(0), BTreeSet::from([0]));
    }
}
