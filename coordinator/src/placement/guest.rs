//! The guest's side of a placement: its cells, and how the flavor and the image describe them.
//!
//! The rules are those of OpenStack Nova's hardware model (release 34), which is the field's reference.

use super::cpu_set::{CpuSet, MAX_CPU};
use super::spec::{Entry, SpecError, SpecRule, Specs, parse_whole};

/// How vCPUs relate to host CPUs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum CpuPolicy {
    /// All vCPUs float over the shared CPUs.
    Shared,
    /// Each vCPU has a host CPU of its own.
    Dedicated,
    /// Some vCPUs are dedicated, the others shared.
    Mixed,
}

/// How dedicated vCPUs relate to hardware threads of one core.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ThreadPolicy {
    /// Siblings where they can be had.
    Prefer,
    /// Siblings only.
    Require,
    /// A core alone for each vCPU.
    Isolate,
}

/// Where the emulator's own threads run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum EmulatorPolicy {
    /// On the shared CPUs.
    Share,
    /// On a dedicated CPU beside guest cell 0.
    Isolate,
}

/// The page size a guest asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PageSize {
    /// The host's smallest.
    Small,
    /// Any but the host's smallest.
    Large,
    /// Any.
    Any,
    /// Exactly this many KiB.
    Kib(u64),
}

impl CpuPolicy {
    /// The policy of this name.
    pub fn from_name(name: &str) -> Option<Self> {
        [Self::Shared, Self::Dedicated, Self::Mixed].into_iter().find(|policy| policy.name() == name)
    }

    /// `shared`, `dedicated` or `mixed`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Shared => "shared",
            Self::Dedicated => "dedicated",
            Self::Mixed => "mixed",
        }
    }

    /// What flavor and image ask for together: the image may only give up what the flavor allows.
    pub(super) fn from_specs(specs: Specs<'_>) -> Result<Option<Self>, SpecError> {
        let read = |entry: &Entry<'_>| {
            Self::from_name(entry.value).ok_or_else(|| entry.refuse(SpecRule::BadCpuPolicy))
        };
        let (flavor, image) = specs.both("cpu_policy");
        let flavor = flavor.as_ref().map(read).transpose()?;
        let Some(image) = image else { return Ok(flavor) };
        let wanted = read(&image)?;
        match (flavor, wanted) {
            (None, wanted) => Ok(Some(wanted)),
            (Some(Self::Mixed), Self::Dedicated) | (Some(Self::Shared), Self::Mixed | Self::Dedicated) => {
                Err(image.refuse(SpecRule::ImageCpuPolicyConflict))
            }
            (flavor, _) => Ok(flavor),
        }
    }
}

impl ThreadPolicy {
    /// The policy of this name.
    pub fn from_name(name: &str) -> Option<Self> {
        [Self::Prefer, Self::Require, Self::Isolate].into_iter().find(|policy| policy.name() == name)
    }

    /// `prefer`, `require` or `isolate`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Prefer => "prefer",
            Self::Require => "require",
            Self::Isolate => "isolate",
        }
    }

    fn from_specs(specs: Specs<'_>) -> Result<Option<Self>, SpecError> {
        let read = |entry: &Entry<'_>| {
            Self::from_name(entry.value).ok_or_else(|| entry.refuse(SpecRule::BadThreadPolicy))
        };
        let (flavor, image) = specs.both("cpu_thread_policy");
        let flavor = flavor.as_ref().map(read).transpose()?;
        let Some(image) = image else { return Ok(flavor) };
        let wanted = read(&image)?;
        match flavor {
            None | Some(Self::Prefer) => Ok(flavor.or(Some(wanted))),
            Some(flavor) if flavor != wanted => Err(image.refuse(SpecRule::ImageThreadPolicyConflict)),
            flavor => Ok(flavor),
        }
    }
}

impl EmulatorPolicy {
    /// The policy of this name.
    pub fn from_name(name: &str) -> Option<Self> {
        [Self::Share, Self::Isolate].into_iter().find(|policy| policy.name() == name)
    }

    /// `share` or `isolate`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Share => "share",
            Self::Isolate => "isolate",
        }
    }

    fn from_specs(specs: Specs<'_>) -> Result<Option<Self>, SpecError> {
        let entry = specs.flavor("emulator_threads_policy");
        let read = |entry: Entry<'_>| {
            Self::from_name(entry.value).ok_or_else(|| entry.refuse(SpecRule::BadEmulatorPolicy))
        };
        entry.map(read).transpose()
    }
}

impl PageSize {
    /// What flavor and image ask for together: the image chooses only where the flavor leaves it open.
    pub(super) fn from_specs(specs: Specs<'_>) -> Result<Option<Self>, SpecError> {
        let (flavor, image) = specs.both("mem_page_size");
        match (flavor, image) {
            (None, None) => Ok(None),
            (None, Some(image)) => Err(image.refuse(SpecRule::PageSizeForbidden)),
            (Some(flavor), image) => match (Self::read(&flavor)?, image) {
                (size, None) => Ok(Some(size)),
                (Self::Any | Self::Large, Some(image)) => Self::read(&image).map(Some),
                (_, Some(image)) => Err(image.refuse(SpecRule::PageSizeForbidden)),
            },
        }
    }

    fn read(entry: &Entry<'_>) -> Result<Self, SpecError> {
        let size = match entry.value {
            "small" => Some(Self::Small),
            "large" => Some(Self::Large),
            "any" => Some(Self::Any),
            text => parse_whole(text).or_else(|| parse_size_kib(text)).filter(|&kib| kib > 0).map(Self::Kib),
        };
        size.ok_or_else(|| entry.refuse(SpecRule::BadPageSize))
    }
}

/// Reads `2MB`, `1GiB` or `16384Kb` (bits) as KiB; all prefixes are powers of 1024. None for what is no whole
/// number of KiB.
fn parse_size_kib(text: &str) -> Option<u64> {
    let (number, bits_per_unit) = match text.strip_suffix('B') {
        Some(number) => (number, 8.0),
        None => (text.strip_suffix("bit").or_else(|| text.strip_suffix('b'))?, 1.0),
    };
    let (number, exponent) = match number.strip_suffix('i') {
        Some(number) => split_prefix(number)?,
        None => split_prefix(number).unwrap_or((number, 0)),
    };
    let well_formed = number.ends_with(|last: char| last.is_ascii_digit())
        && number.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.')
        && number.bytes().filter(|&byte| byte == b'.').count() <= 1;
    if !well_formed {
        return None;
    }
    let bytes = number.parse::<f64>().ok()? * bits_per_unit / 8.0 * 1024_f64.powi(exponent);
    let kib = bytes.ceil() / 1024.0;
    // Above 2^53 a float no longer tells whole numbers apart.
    (kib.fract() == 0.0 && kib < 9_007_199_254_740_992.0).then_some(kib as u64)
}

/// Splits a prefix such as `M` off; the number is its power of 1024.
fn split_prefix(text: &str) -> Option<(&str, i32)> {
    let prefix = text.chars().next_back()?;
    let exponent = "KMGTPE".find(prefix)? as i32 + 1;
    Some((&text[..text.len() - 1], exponent))
}

/// One guest cell.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestCell {
    /// vCPUs that float over the host cell's shared CPUs.
    pub shared: CpuSet,
    /// vCPUs that have a host CPU of their own.
    pub dedicated: CpuSet,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// The page size asked for, if any.
    pub page_size: Option<PageSize>,
    /// The CPU policy asked for, if any; none is as shared.
    pub cpu_policy: Option<CpuPolicy>,
    /// The thread policy asked for, if any; none is as prefer.
    pub thread_policy: Option<ThreadPolicy>,
}

impl GuestCell {
    /// Whether the policy can pin vCPUs of this cell.
    pub fn pins(&self) -> bool {
        matches!(self.cpu_policy, Some(CpuPolicy::Dedicated | CpuPolicy::Mixed))
    }

    /// Whether the policy can float vCPUs of this cell.
    pub fn floats(&self) -> bool {
        self.cpu_policy != Some(CpuPolicy::Dedicated)
    }
}

/// A guest with a NUMA topology.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Guest {
    /// Its cells, in the guest's order; cell `i` is the guest's NUMA node `i`.
    pub cells: Vec<GuestCell>,
    /// Where the emulator's threads run.
    pub emulator_policy: Option<EmulatorPolicy>,
    /// Dedicated CPUs that the emulator takes in guest cell 0 when it is isolated; commonly 1.
    pub isolated_emulator_cpus: u32,
}

/// What a flavor and an image say about CPUs and memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Resolved {
    /// The guest's cells; none when nothing asks for a NUMA topology.
    pub(super) guest: Option<Guest>,
    /// vCPUs that run in real time.
    pub(super) realtime: CpuSet,
    /// Whether the guest's memory is locked.
    pub(super) locked_memory: bool,
}

impl Guest {
    /// Dedicated CPUs that the emulator needs beside the vCPUs of guest cell `index`.
    pub fn emulator_cpus(&self, index: usize) -> u32 {
        match self.emulator_policy {
            Some(EmulatorPolicy::Isolate) if index == 0 => self.isolated_emulator_cpus,
            _ => 0,
        }
    }
}

/// Applies every rule about CPUs and memory to a request, in Nova's order.
pub(super) fn resolve(specs: Specs<'_>, vcpus: u32, memory_mib: u64) -> Result<Resolved, SpecError> {
    check_sizes(vcpus, memory_mib)?;
    let all = CpuSet::first_n(vcpus);
    let cpu_policy = CpuPolicy::from_specs(specs)?;
    let thread_policy = ThreadPolicy::from_specs(specs)?;
    let realtime = realtime_cpus(specs, vcpus)?;
    let dedicated_mask = dedicated_mask(specs, vcpus)?;
    let emulator_policy = EmulatorPolicy::from_specs(specs)?;
    let cpu_policy = with_explicit_resources(specs, cpu_policy, emulator_policy, vcpus)?;
    let thread_policy = with_hyperthreading_trait(specs, thread_policy)?;

    let dedicated = match cpu_policy {
        None | Some(CpuPolicy::Shared) => {
            refuse_dedicated_extras(specs, thread_policy, emulator_policy, realtime.as_ref())?;
            CpuSet::new()
        }
        Some(CpuPolicy::Dedicated) => match &dedicated_mask {
            Some((entry, _)) => return Err(entry.refuse(SpecRule::DedicatedMaskNeedsMixed)),
            None => all.clone(),
        },
        Some(CpuPolicy::Mixed) => match (&dedicated_mask, &realtime) {
            (Some((_, mask)), None) | (None, Some(mask)) => mask.clone(),
            (Some((entry, _)), Some(_)) => return Err(entry.refuse(SpecRule::MixedNeedsExactlyOneMask)),
            (None, None) => return Err(missing("hw:cpu_dedicated_mask", SpecRule::MixedNeedsExactlyOneMask)),
        },
    };

    let nodes = node_count(specs)?;
    let page_size = PageSize::from_specs(specs)?;
    let locked_memory = locked_memory(specs)?;
    let pinned = matches!(cpu_policy, Some(CpuPolicy::Dedicated | CpuPolicy::Mixed));
    let realtime = realtime.unwrap_or_default();
    if nodes.is_none() && page_size.is_none() && !pinned {
        return Ok(Resolved { guest: None, realtime, locked_memory });
    }
    let shares = cell_shares(specs, nodes, &all, memory_mib)?;
    let cells = shares.into_iter().map(|(cpus, memory_mib)| GuestCell {
        shared: cpus.difference(&dedicated),
        dedicated: cpus.intersection(&dedicated),
        memory_mib,
        page_size,
        cpu_policy,
        thread_policy,
    });
    let guest = Guest { cells: cells.collect(), emulator_policy, isolated_emulator_cpus: 1 };
    Ok(Resolved { guest: Some(guest), realtime, locked_memory })
}

/// Refuses an image that has a property with a value of the wrong kind, whether or not anything asks for it: such
/// an image would be refused by another flavor only.
pub(super) fn check_image(specs: Specs<'_>) -> Result<(), SpecError> {
    let names = |entry: &Entry<'_>, known: bool, rule| if known { Ok(()) } else { Err(entry.refuse(rule)) };
    if let Some(entry) = specs.image("cpu_policy") {
        names(&entry, CpuPolicy::from_name(entry.value).is_some(), SpecRule::BadCpuPolicy)?;
    }
    if let Some(entry) = specs.image("cpu_thread_policy") {
        names(&entry, ThreadPolicy::from_name(entry.value).is_some(), SpecRule::BadThreadPolicy)?;
    }
    if let Some(entry) = specs.image("pci_numa_affinity_policy") {
        names(&entry, PCI_NUMA_POLICIES.contains(&entry.value), SpecRule::BadPciNumaPolicy)?;
    }
    if let Some(entry) = specs.image("numa_nodes") {
        image_nodes(&entry)?;
    }
    for part in ["sockets", "cores", "threads", "max_sockets", "max_cores", "max_threads"] {
        if let Some(entry) = specs.image(&format!("cpu_{part}")) {
            entry.whole_number(SpecRule::InvalidRequest)?;
        }
    }
    specs.image("locked_memory").map_or(Ok(()), |entry| entry.boolean().map(drop))
}

/// How near a passed-through device must be. Devices are not passed through yet, so a right value asks for nothing.
const PCI_NUMA_POLICIES: [&str; 4] = ["required", "preferred", "legacy", "socket"];

/// Checks the policy for the cells of passed-through devices.
pub(super) fn check_pci_numa_policy(specs: Specs<'_>) -> Result<(), SpecError> {
    let (flavor, image) = specs.both("pci_numa_affinity_policy");
    if let (Some(flavor), Some(image)) = (&flavor, &image)
        && flavor.value != image.value
    {
        return Err(image.refuse(SpecRule::ImagePciNumaPolicyConflict));
    }
    match flavor.or(image) {
        Some(entry) if !PCI_NUMA_POLICIES.contains(&entry.value) => {
            Err(entry.refuse(SpecRule::BadPciNumaPolicy))
        }
        _ => Ok(()),
    }
}

fn missing(key: &str, rule: SpecRule) -> SpecError {
    SpecError { key: key.to_owned(), value: String::new(), rule }
}

fn check_sizes(vcpus: u32, memory_mib: u64) -> Result<(), SpecError> {
    let refuse =
        |key: &str, value: String| SpecError { key: key.to_owned(), value, rule: SpecRule::InvalidRequest };
    if vcpus == 0 || vcpus > MAX_CPU {
        return Err(refuse("vcpus", vcpus.to_string()));
    }
    if memory_mib == 0 {
        return Err(refuse("memory_mib", memory_mib.to_string()));
    }
    Ok(())
}

/// The vCPUs that run in real time; none when real time is off.
pub(super) fn realtime_cpus(specs: Specs<'_>, vcpus: u32) -> Result<Option<CpuSet>, SpecError> {
    let Some(switch) = specs.flavor("cpu_realtime") else { return Ok(None) };
    if !switch.boolean()? {
        return Ok(None);
    }
    let all = CpuSet::first_n(vcpus);
    // The image knows its own needs better than the flavor does.
    let (flavor, image) = specs.both("cpu_realtime_mask");
    let entry = image.or(flavor);
    let mask = entry.as_ref().map_or_else(|| Ok(all.clone()), |entry| entry.mask(vcpus))?;
    let refuse = || match &entry {
        Some(entry) => entry.refuse(SpecRule::BadRealtimeMask),
        None => missing("hw:cpu_realtime_mask", SpecRule::BadRealtimeMask),
    };
    if mask.is_empty() {
        return Err(refuse());
    }
    let leaves_none_out = EmulatorPolicy::from_specs(specs)?.is_none() && mask == all;
    if leaves_none_out || !mask.is_subset(&all) {
        return Err(refuse());
    }
    Ok(Some(mask))
}

fn dedicated_mask<'a>(specs: Specs<'a>, vcpus: u32) -> Result<Option<(Entry<'a>, CpuSet)>, SpecError> {
    let Some(entry) = specs.flavor("cpu_dedicated_mask") else { return Ok(None) };
    let all = CpuSet::first_n(vcpus);
    let mask = entry.mask(vcpus)?;
    if mask.is_empty() || mask == all || !mask.is_subset(&all) {
        return Err(entry.refuse(SpecRule::BadDedicatedMask));
    }
    Ok(Some((entry, mask)))
}

/// `resources:VCPU` and `resources:PCPU` are another way to name the CPU policy; both ways at once are refused.
fn with_explicit_resources(
    specs: Specs<'_>,
    policy: Option<CpuPolicy>,
    emulator: Option<EmulatorPolicy>,
    vcpus: u32,
) -> Result<Option<CpuPolicy>, SpecError> {
    let (shared, dedicated) = (specs.resources("VCPU")?, specs.resources("PCPU")?);
    let refuse = |key: &str, value: u64| {
        Err(SpecError { key: key.to_owned(), value: value.to_string(), rule: SpecRule::InvalidRequest })
    };
    let wanted = u64::from(vcpus) + u64::from(emulator == Some(EmulatorPolicy::Isolate));
    match (shared, dedicated) {
        (0, 0) => Ok(policy),
        (shared, 0) if policy.is_some() => refuse("resources:VCPU", shared),
        (_, 0) => Ok(Some(CpuPolicy::Shared)),
        (0, dedicated) if policy.is_some() || dedicated != wanted => refuse("resources:PCPU", dedicated),
        (0, _) => Ok(Some(CpuPolicy::Dedicated)),
        (_, dedicated) => refuse("resources:PCPU", dedicated),
    }
}

/// The trait `HW_CPU_HYPERTHREADING` is another way to name the thread policy; both ways at once are refused.
fn with_hyperthreading_trait(
    specs: Specs<'_>,
    policy: Option<ThreadPolicy>,
) -> Result<Option<ThreadPolicy>, SpecError> {
    match specs.wanted_trait("HW_CPU_HYPERTHREADING") {
        None => Ok(policy),
        Some(entry) if policy.is_some() => Err(entry.refuse(SpecRule::InvalidRequest)),
        Some(entry) if entry.value == "required" => Ok(Some(ThreadPolicy::Require)),
        Some(entry) if entry.value == "forbidden" => Ok(Some(ThreadPolicy::Isolate)),
        Some(entry) => Err(entry.refuse(SpecRule::InvalidRequest)),
    }
}

fn refuse_dedicated_extras(
    specs: Specs<'_>,
    thread_policy: Option<ThreadPolicy>,
    emulator_policy: Option<EmulatorPolicy>,
    realtime: Option<&CpuSet>,
) -> Result<(), SpecError> {
    let refuse = |name: &str, rule| {
        let (flavor, image) = specs.both(name);
        Err(flavor.or(image).map_or_else(|| missing(&format!("hw:{name}"), rule), |entry| entry.refuse(rule)))
    };
    if thread_policy.is_some() {
        return refuse("cpu_thread_policy", SpecRule::ThreadPolicyNeedsDedicated);
    }
    if emulator_policy == Some(EmulatorPolicy::Isolate) {
        return refuse("emulator_threads_policy", SpecRule::EmulatorIsolateNeedsDedicated);
    }
    if specs.flavor("cpu_dedicated_mask").is_some() {
        return refuse("cpu_dedicated_mask", SpecRule::DedicatedMaskNeedsMixed);
    }
    if realtime.is_some() {
        return refuse("cpu_realtime", SpecRule::RealtimeNeedsDedicated);
    }
    Ok(())
}

/// An image's number of cells; none when it is below 0, which is a number and no number of cells.
fn image_nodes(entry: &Entry<'_>) -> Result<Option<u64>, SpecError> {
    let text = entry.value.trim();
    match text.strip_prefix('-').map(parse_whole) {
        Some(Some(1..)) => Ok(None),
        Some(None) => Err(entry.refuse(SpecRule::BadNodeCount)),
        Some(Some(0)) => Ok(Some(0)),
        None => entry.whole_number(SpecRule::BadNodeCount).map(Some),
    }
}

fn node_count(specs: Specs<'_>) -> Result<Option<u64>, SpecError> {
    let entry = match specs.both("numa_nodes") {
        (Some(flavor), Some(image)) => match image_nodes(&image)? {
            Some(0) => flavor,
            _ => return Err(image.refuse(SpecRule::ImageOverrideForbidden)),
        },
        (None, None) => return Ok(None),
        (Some(flavor), None) => flavor,
        // An image's number is read as a number first: 02 is 2.
        (None, Some(image)) => match image_nodes(&image)? {
            None | Some(0) => return Err(image.refuse(SpecRule::BadNodeCount)),
            count => return Ok(count),
        },
    };
    // Digits beyond u64 are still a whole number; no split will come out even.
    let digits = entry.value.bytes().all(|byte| byte.is_ascii_digit()) && !entry.value.starts_with('0');
    if !digits {
        return Err(entry.refuse(SpecRule::BadNodeCount));
    }
    Ok(Some(entry.value.parse().unwrap_or(u64::MAX)))
}

fn locked_memory(specs: Specs<'_>) -> Result<bool, SpecError> {
    let (flavor, image) = specs.both("locked_memory");
    let wanted = flavor.as_ref().map(Entry::boolean).transpose()?;
    let by_image = image.as_ref().map(Entry::boolean).transpose()?;
    if let (Some(wanted), Some(by_image), Some(entry)) = (wanted, by_image, &image)
        && wanted != by_image
    {
        return Err(entry.refuse(SpecRule::LockedMemoryConflict));
    }
    let locked = wanted.or(by_image).unwrap_or(false);
    let (page_size, image_page_size) = specs.both("mem_page_size");
    if locked && page_size.or(image_page_size).is_none() {
        let entry = flavor.or(image);
        return Err(entry.map_or_else(
            || missing("hw:locked_memory", SpecRule::LockMemoryNeedsPageSize),
            |entry| entry.refuse(SpecRule::LockMemoryNeedsPageSize),
        ));
    }
    Ok(locked)
}

/// The vCPUs and the memory in MiB of each guest cell: as the maps say, else split evenly.
fn cell_shares(
    specs: Specs<'_>,
    nodes: Option<u64>,
    all: &CpuSet,
    memory_mib: u64,
) -> Result<Vec<(CpuSet, u64)>, SpecError> {
    let nodes = nodes.unwrap_or(1);
    let (cpus, memory) = (specs.per_cell("numa_cpus")?, specs.per_cell("numa_mem")?);
    match (cpus.first(), memory.first()) {
        (None, None) => even_shares(nodes, all.len(), memory_mib),
        (Some(_), Some(_)) if cpus.len() as u64 == nodes && memory.len() as u64 == nodes => {
            mapped_shares(&cpus, &memory, all, memory_mib)
        }
        (Some(entry), _) | (None, Some(entry)) => Err(entry.refuse(SpecRule::IncompleteMap)),
    }
}

fn even_shares(nodes: u64, vcpus: u32, memory_mib: u64) -> Result<Vec<(CpuSet, u64)>, SpecError> {
    if !u64::from(vcpus).is_multiple_of(nodes) || !memory_mib.is_multiple_of(nodes) {
        let value = nodes.to_string();
        return Err(SpecError { key: "hw:numa_nodes".to_owned(), value, rule: SpecRule::AsymmetricSplit });
    }
    // It divides the vCPUs, so it is no larger than them.
    let nodes = nodes as u32;
    let cpus_each = vcpus / nodes;
    let shares = (0..nodes).map(|node| {
        let cpus = (node * cpus_each..(node + 1) * cpus_each).collect();
        (cpus, memory_mib / u64::from(nodes))
    });
    Ok(shares.collect())
}

fn mapped_shares(
    cpu_entries: &[Entry<'_>],
    memory_entries: &[Entry<'_>],
    all: &CpuSet,
    memory_mib: u64,
) -> Result<Vec<(CpuSet, u64)>, SpecError> {
    let mut shares = Vec::with_capacity(cpu_entries.len());
    let mut unassigned = all.clone();
    let mut sum = 0_u128;
    for (cpu_entry, memory_entry) in cpu_entries.iter().zip(memory_entries) {
        let cpus = cpu_entry.cpus()?;
        if !cpus.is_subset(all) {
            return Err(cpu_entry.refuse(SpecRule::CpuOutOfRange));
        }
        if !cpus.is_subset(&unassigned) {
            return Err(cpu_entry.refuse(SpecRule::CpuDuplicate));
        }
        unassigned.subtract(&cpus);
        let memory = memory_entry.whole_number(SpecRule::InvalidRequest)?;
        if memory == 0 {
            // No hypervisor starts a guest whose cell has no memory.
            return Err(memory_entry.refuse(SpecRule::MemoryMismatch));
        }
        sum += u128::from(memory);
        shares.push((cpus, memory));
    }
    if !unassigned.is_empty() {
        let value = unassigned.to_string();
        return Err(SpecError { key: "hw:numa_cpus".to_owned(), value, rule: SpecRule::CpuUnassigned });
    }
    if sum != u128::from(memory_mib) {
        let value = sum.to_string();
        return Err(SpecError { key: "hw:numa_mem".to_owned(), value, rule: SpecRule::MemoryMismatch });
    }
    Ok(shares)
}
