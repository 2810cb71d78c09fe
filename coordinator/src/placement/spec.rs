//! Extra specs and image properties as the user wrote them, and the rules they can break.

use std::collections::BTreeMap;
use std::fmt;

use thiserror::Error;

use super::cpu_set::CpuSet;

/// Guest cells that a map (`hw:numa_cpus.N`) may name.
pub const MAX_GUEST_CELLS: u32 = 128;

/// The rule that a request breaks. The names are stable: users, logs and tests refer to them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SpecRule {
    /// A value that is not what its key takes, or two keys that exclude each other.
    InvalidRequest,
    /// A key that would change the placement in a way that is not offered.
    UnsupportedKey,
    /// `numa_nodes` is not a whole number above 0.
    BadNodeCount,
    /// The image sets what the flavor has set.
    ImageOverrideForbidden,
    /// CPUs and memory are not both given for each guest cell.
    IncompleteMap,
    /// vCPUs or memory cannot be split evenly.
    AsymmetricSplit,
    /// A map names a vCPU that the flavor does not have.
    CpuOutOfRange,
    /// A map names a vCPU in two cells.
    CpuDuplicate,
    /// A map leaves a vCPU out.
    CpuUnassigned,
    /// The cells' memory does not add up to the flavor's.
    MemoryMismatch,
    /// A page size that cannot be read.
    BadPageSize,
    /// The image asks for a page size that the flavor does not leave open.
    PageSizeForbidden,
    /// An unknown CPU policy.
    BadCpuPolicy,
    /// The image asks for more dedicated CPUs than the flavor allows.
    ImageCpuPolicyConflict,
    /// An unknown thread policy.
    BadThreadPolicy,
    /// Flavor and image name different thread policies.
    ImageThreadPolicyConflict,
    /// A thread policy without dedicated CPUs.
    ThreadPolicyNeedsDedicated,
    /// An unknown emulator thread policy.
    BadEmulatorPolicy,
    /// Isolated emulator threads without dedicated CPUs.
    EmulatorIsolateNeedsDedicated,
    /// A dedicated mask without the mixed policy.
    DedicatedMaskNeedsMixed,
    /// The mixed policy with no mask, or with two.
    MixedNeedsExactlyOneMask,
    /// A dedicated mask that holds no vCPU, all of them, or one that does not exist.
    BadDedicatedMask,
    /// Real time without dedicated CPUs.
    RealtimeNeedsDedicated,
    /// A real-time mask that holds no vCPU, leaves none to the emulator, or names one that does not exist.
    BadRealtimeMask,
    /// A text that is not a CPU list.
    InvalidCpuList,
    /// The image raises a maximum of the flavor.
    ImageMaxOverFlavorMax,
    /// The image prefers more than the maxima allow.
    ImageTopologyOverMax,
    /// No product of sockets, cores and threads within the maxima gives the vCPUs.
    TopologyImpossible,
    /// Locked memory without a page size.
    LockMemoryNeedsPageSize,
    /// Flavor and image contradict each other over locked memory.
    LockedMemoryConflict,
    /// An unknown policy for the cells of passed-through devices.
    BadPciNumaPolicy,
    /// Flavor and image name different policies for the cells of passed-through devices.
    ImagePciNumaPolicyConflict,
}

impl SpecRule {
    /// The rule's stable name.
    pub fn name(self) -> &'static str {
        self.texts().0
    }

    /// What the rule demands, for people.
    pub fn demand(self) -> &'static str {
        self.texts().1
    }

    fn texts(self) -> (&'static str, &'static str) {
        match self {
            Self::InvalidRequest => ("invalid_request", "not a value that this key takes here"),
            Self::UnsupportedKey => {
                ("unsupported_key", "this key would change the placement and is not supported")
            }
            Self::BadNodeCount => {
                ("bad_node_count", "the number of guest cells is a whole number, at least 1")
            }
            Self::ImageOverrideForbidden => {
                ("image_override_forbidden", "an image may not set what the flavor has set")
            }
            Self::IncompleteMap => {
                ("incomplete_map", "each guest cell needs both its CPUs and its memory, or none of them")
            }
            Self::AsymmetricSplit => {
                ("asymmetric_split", "vCPUs and memory must divide evenly among the guest cells")
            }
            Self::CpuOutOfRange => {
                ("cpu_out_of_range", "a guest cell may only hold vCPUs that the flavor has")
            }
            Self::CpuDuplicate => ("cpu_duplicate", "a vCPU belongs to one guest cell only"),
            Self::CpuUnassigned => ("cpu_unassigned", "every vCPU belongs to a guest cell"),
            Self::MemoryMismatch => {
                ("memory_mismatch", "each guest cell has memory, and together they have the flavor's")
            }
            Self::BadPageSize => {
                ("bad_page_size", "a page size is small, large, any, a number of KiB, or a size such as 2MB")
            }
            Self::PageSizeForbidden => (
                "page_size_forbidden",
                "an image may choose a page size only if the flavor says any or large",
            ),
            Self::BadCpuPolicy => ("bad_cpu_policy", "the policy is one of shared, dedicated and mixed"),
            Self::ImageCpuPolicyConflict => {
                ("image_cpu_policy_conflict", "an image may not ask for more dedicated CPUs than the flavor")
            }
            Self::BadThreadPolicy => {
                ("bad_thread_policy", "the policy is one of prefer, isolate and require")
            }
            Self::ImageThreadPolicyConflict => {
                ("image_thread_policy_conflict", "an image may not change the flavor's thread policy")
            }
            Self::ThreadPolicyNeedsDedicated => {
                ("thread_policy_needs_dedicated", "a thread policy needs the CPU policy dedicated or mixed")
            }
            Self::BadEmulatorPolicy => ("bad_emulator_policy", "the policy is one of share and isolate"),
            Self::EmulatorIsolateNeedsDedicated => (
                "emulator_isolate_needs_dedicated",
                "isolated emulator threads need the CPU policy dedicated or mixed",
            ),
            Self::DedicatedMaskNeedsMixed => {
                ("dedicated_mask_needs_mixed", "a mask of dedicated vCPUs needs the CPU policy mixed")
            }
            Self::MixedNeedsExactlyOneMask => (
                "mixed_needs_exactly_one_mask",
                "the CPU policy mixed needs either a dedicated mask or a real-time mask, and not both",
            ),
            Self::BadDedicatedMask => {
                ("bad_dedicated_mask", "the mask holds some of the flavor's vCPUs, but not all of them")
            }
            Self::RealtimeNeedsDedicated => {
                ("realtime_needs_dedicated", "real-time vCPUs need the CPU policy dedicated or mixed")
            }
            Self::BadRealtimeMask => (
                "bad_realtime_mask",
                "the mask holds some of the flavor's vCPUs, and leaves one out unless emulator threads have a policy",
            ),
            Self::InvalidCpuList => ("invalid_cpu_list", "a CPU list looks like 0-3,^2,7"),
            Self::ImageMaxOverFlavorMax => {
                ("image_max_over_flavor_max", "an image may only lower the flavor's maxima")
            }
            Self::ImageTopologyOverMax => {
                ("image_topology_over_max", "an image may not prefer more than the maxima allow")
            }
            Self::TopologyImpossible => (
                "topology_impossible",
                "some product of sockets, cores and threads within the maxima must give the vCPUs",
            ),
            Self::LockMemoryNeedsPageSize => {
                ("lock_memory_needs_page_size", "locked memory needs a page size (hw:mem_page_size)")
            }
            Self::LockedMemoryConflict => {
                ("locked_memory_conflict", "flavor and image must agree over locked memory")
            }
            Self::BadPciNumaPolicy => (
                "bad_pci_numa_affinity_policy",
                "the policy is one of required, preferred, legacy and socket",
            ),
            Self::ImagePciNumaPolicyConflict => (
                "image_pci_numa_affinity_policy_conflict",
                "flavor and image must agree over the cells of devices",
            ),
        }
    }
}

impl fmt::Display for SpecRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A request that breaks a rule: the key, its value, and the rule.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{key}={value}: {} ({rule})", rule.demand())]
pub struct SpecError {
    /// The key as the user wrote it, `vcpus` or `memory_mib`.
    pub key: String,
    /// Its value as the user wrote it; empty when the key is missing.
    pub value: String,
    /// The rule it breaks.
    pub rule: SpecRule,
}

/// One key with its value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Entry<'a> {
    pub(super) key: String,
    pub(super) value: &'a str,
}

impl Entry<'_> {
    pub(super) fn refuse(&self, rule: SpecRule) -> SpecError {
        SpecError { key: self.key.clone(), value: self.value.to_owned(), rule }
    }

    pub(super) fn whole_number(&self, rule: SpecRule) -> Result<u64, SpecError> {
        parse_whole(self.value.trim()).ok_or_else(|| self.refuse(rule))
    }

    pub(super) fn boolean(&self) -> Result<bool, SpecError> {
        match self.value.trim().to_ascii_lowercase().as_str() {
            "1" | "t" | "true" | "on" | "y" | "yes" => Ok(true),
            "0" | "f" | "false" | "off" | "n" | "no" => Ok(false),
            _ => Err(self.refuse(SpecRule::InvalidRequest)),
        }
    }

    pub(super) fn cpus(&self) -> Result<CpuSet, SpecError> {
        CpuSet::parse(self.value).map_err(|_| self.refuse(SpecRule::InvalidCpuList))
    }

    /// A mask over `vcpus` virtual CPUs: a text that starts with `^` takes away from all of them.
    pub(super) fn mask(&self, vcpus: u32) -> Result<CpuSet, SpecError> {
        let mut mask = CpuSet::parse(self.value).map_err(|_| self.refuse(SpecRule::InvalidCpuList))?;
        if self.value.trim().starts_with('^') {
            let all = format!("0-{},{}", vcpus.saturating_sub(1), self.value);
            mask = CpuSet::parse(&all).map_err(|_| self.refuse(SpecRule::InvalidCpuList))?;
        }
        Ok(mask)
    }
}

/// ASCII digits only: a sign, an underscore or another script's digits are not numbers here.
pub(super) fn parse_whole(text: &str) -> Option<u64> {
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    digits.then(|| text.parse().ok()).flatten()
}

/// The two sources of a request.
#[derive(Debug, Clone, Copy)]
pub(super) struct Specs<'a> {
    flavor: &'a BTreeMap<String, String>,
    image: &'a BTreeMap<String, String>,
}

impl<'a> Specs<'a> {
    pub(super) fn new(flavor: &'a BTreeMap<String, String>, image: &'a BTreeMap<String, String>) -> Self {
        Self { flavor, image }
    }

    /// `hw:NAME` of the flavor; an empty value counts as not set.
    pub(super) fn flavor(&self, name: &str) -> Option<Entry<'a>> {
        entry(self.flavor, format!("hw:{name}"))
    }

    /// `hw:NAME` of the flavor as it stands, even empty.
    pub(super) fn flavor_as_written(&self, name: &str) -> Option<Entry<'a>> {
        let key = format!("hw:{name}");
        self.flavor.get(&key).map(|value| Entry { key, value })
    }

    /// `hw_NAME` of the image; an empty value counts as not set.
    pub(super) fn image(&self, name: &str) -> Option<Entry<'a>> {
        entry(self.image, format!("hw_{name}"))
    }

    /// The flavor's and the image's values of one key.
    pub(super) fn both(&self, name: &str) -> (Option<Entry<'a>>, Option<Entry<'a>>) {
        (self.flavor(name), self.image(name))
    }

    /// A map with one value a guest cell (`NAME.0`, `NAME.1`, …), read up to the first number that is missing.
    /// The flavor's excludes the image's.
    pub(super) fn per_cell(&self, name: &str) -> Result<Vec<Entry<'a>>, SpecError> {
        let read = |map: &'a BTreeMap<String, String>, prefix: &str| -> Vec<Entry<'a>> {
            (0..MAX_GUEST_CELLS)
                .map_while(|cell| {
                    let key = format!("{prefix}{name}.{cell}");
                    map.get(&key).map(|value| Entry { key, value })
                })
                .collect()
        };
        let (flavor, image) = (read(self.flavor, "hw:"), read(self.image, "hw_"));
        match (flavor.first(), image.first()) {
            (Some(_), Some(image)) => Err(image.refuse(SpecRule::ImageOverrideForbidden)),
            (Some(_), None) => Ok(flavor),
            _ => Ok(image),
        }
    }

    /// What `resources[N]:CLASS` asks for in sum, 0 when nothing does.
    pub(super) fn resources(&self, class: &str) -> Result<u64, SpecError> {
        let mut sum = 0_u64;
        for (key, value) in self.flavor {
            if numbered(key, "resources") == Some(class) {
                let entry = Entry { key: key.clone(), value };
                sum = sum.saturating_add(entry.whole_number(SpecRule::InvalidRequest)?);
            }
        }
        Ok(sum)
    }

    /// `trait[N]:NAME` of the flavor, or that of the image when it says `required`.
    pub(super) fn wanted_trait(&self, name: &str) -> Option<Entry<'a>> {
        let flavor = self.flavor.iter().find(|(key, _)| numbered(key, "trait") == Some(name));
        let image = || {
            self.image.iter().find(|(key, value)| *key == &format!("trait:{name}") && *value == "required")
        };
        flavor.or_else(image).map(|(key, value)| Entry { key: key.clone(), value })
    }

    /// All keys of both sources, and whether each is the image's.
    pub(super) fn entries_by_source(&self) -> impl Iterator<Item = (Entry<'a>, bool)> + use<'a> {
        let of = |source: &'a BTreeMap<String, String>, by_image| {
            source.iter().map(move |(key, value)| (Entry { key: key.clone(), value }, by_image))
        };
        of(self.flavor, false).chain(of(self.image, true))
    }
}

fn entry(map: &BTreeMap<String, String>, key: String) -> Option<Entry<'_>> {
    let value = map.get(&key).filter(|value| !value.is_empty())?;
    Some(Entry { key, value })
}

/// `NAME` of a key `resources:NAME` or `resources7:NAME`, given `resources`.
pub(super) fn numbered<'k>(key: &'k str, word: &str) -> Option<&'k str> {
    let (group, name) = key.strip_prefix(word)?.split_once(':')?;
    let group_is_number = !group.starts_with('0') && group.bytes().all(|byte| byte.is_ascii_digit());
    group_is_number.then_some(name)
}
