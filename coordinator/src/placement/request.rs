//! What a user asks for, resolved from a flavor's extra specs and an image's properties.

use std::collections::BTreeMap;

use godwit_protocol::instance::CpuTopology;

use super::cpu_set::CpuSet;
use super::guest::{self, CpuPolicy, Guest, PageSize};
use super::spec::{Entry, SpecError, SpecRule, Specs, numbered};
use super::topology::TopologyWish;
use super::values;

/// Beginnings of keys that say where a guest may go: one that is not one of [`values::KEYS`] is refused, so that a slip of the
/// pen does not quietly lose a guarantee. Other keys do not matter here and are left alone.
const PLACING: [&str; 6] = ["cpu_", "numa_", "mem_", "emulator_", "pci_", "pmem"];

/// A request that breaks no rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// vCPUs in all, at least 1.
    pub vcpus: u32,
    /// Memory in MiB in all, at least 1.
    pub memory_mib: u64,
    /// Bytes of disk it will fill at most; 0 unless the caller sets it.
    pub disk_bytes: u64,
    /// The guest's cells; none when nothing asks for a NUMA topology, and the guest may float over a host.
    pub guest: Option<Guest>,
    /// Sockets, cores and threads that the guest sees.
    pub topology: CpuTopology,
    /// vCPUs that run in real time.
    pub realtime_vcpus: CpuSet,
    /// Whether the guest's memory is locked.
    pub locked_memory: bool,
}

impl Request {
    /// Resolves a flavor (`vcpus`, `memory_mib`, `hw:…` extra specs) and an image (`hw_…` properties) that somebody asks
    /// for now.
    ///
    /// The error names the first rule that is broken, with key and value.
    pub fn from_specs(
        vcpus: u32,
        memory_mib: u64,
        extra_specs: &BTreeMap<String, String>,
        image_properties: &BTreeMap<String, String>,
    ) -> Result<Self, SpecError> {
        let specs = Specs::new(extra_specs, image_properties);
        refuse_unknown_keys(specs)?;
        values::check(specs)?;
        let request = Self::accepted(vcpus, memory_mib, extra_specs, image_properties)?;
        refuse_lost_maps(specs, &request)?;
        TopologyWish::from_specs(specs)?.check(specs, vcpus)?;
        Ok(request)
    }

    /// The same for what was accepted before, perhaps by a version that refused less.
    ///
    /// # Errors
    /// As [`Self::from_specs`].
    pub fn accepted(
        vcpus: u32,
        memory_mib: u64,
        extra_specs: &BTreeMap<String, String>,
        image_properties: &BTreeMap<String, String>,
    ) -> Result<Self, SpecError> {
        let specs = Specs::new(extra_specs, image_properties);
        refuse_unknown_keys(specs)?;
        let resolved = guest::resolve(specs, vcpus, memory_mib)?;
        guest::check_pci_numa_policy(specs)?;
        guest::check_image(specs)?;
        let wish = TopologyWish::from_specs(specs)?;
        let topology = wish.best(vcpus, true).ok_or_else(|| SpecError {
            key: "vcpus".to_owned(),
            value: vcpus.to_string(),
            rule: SpecRule::TopologyImpossible,
        })?;
        Ok(Self {
            vcpus,
            memory_mib,
            disk_bytes: 0,
            guest: resolved.guest,
            topology,
            realtime_vcpus: resolved.realtime,
            locked_memory: resolved.locked_memory,
        })
    }
}

impl Request {
    /// Checks one extra spec of a flavor by itself.
    ///
    /// # Errors
    /// The rule that its value breaks whatever the other keys say.
    pub fn check_extra_spec(key: &str, value: &str) -> Result<(), SpecError> {
        values::check_one(&Entry { key: key.to_owned(), value }, false)
    }

    /// Whether any of its vCPUs has a host CPU of its own.
    pub fn pins(&self) -> bool {
        self.guest.as_ref().is_some_and(|guest| guest.cells.iter().any(|cell| cell.pins()))
    }
}

/// Only the guest's cells, without what the guest sees of sockets, cores and threads.
pub fn guest(
    vcpus: u32,
    memory_mib: u64,
    extra_specs: &BTreeMap<String, String>,
    image_properties: &BTreeMap<String, String>,
) -> Result<Option<Guest>, SpecError> {
    let specs = checked(extra_specs, image_properties)?;
    refuse_unknown_keys(specs)?;
    Ok(guest::resolve(specs, vcpus, memory_mib)?.guest)
}

fn checked<'a>(
    extra_specs: &'a BTreeMap<String, String>,
    image_properties: &'a BTreeMap<String, String>,
) -> Result<Specs<'a>, SpecError> {
    let specs = Specs::new(extra_specs, image_properties);
    guest::check_image(specs)?;
    Ok(specs)
}

/// Only the CPU policy that flavor and image ask for together.
pub fn cpu_policy(
    extra_specs: &BTreeMap<String, String>,
    image_properties: &BTreeMap<String, String>,
) -> Result<Option<CpuPolicy>, SpecError> {
    CpuPolicy::from_specs(checked(extra_specs, image_properties)?)
}

/// Only the page size that flavor and image ask for together.
pub fn page_size(
    extra_specs: &BTreeMap<String, String>,
    image_properties: &BTreeMap<String, String>,
) -> Result<Option<PageSize>, SpecError> {
    PageSize::from_specs(checked(extra_specs, image_properties)?)
}

/// Only the vCPUs that run in real time; none when real time is off.
pub fn realtime_vcpus(
    vcpus: u32,
    extra_specs: &BTreeMap<String, String>,
    image_properties: &BTreeMap<String, String>,
) -> Result<Option<CpuSet>, SpecError> {
    guest::realtime_cpus(checked(extra_specs, image_properties)?, vcpus)
}

/// Only what flavor and image say about sockets, cores and threads.
pub fn topology_wish(
    extra_specs: &BTreeMap<String, String>,
    image_properties: &BTreeMap<String, String>,
) -> Result<TopologyWish, SpecError> {
    TopologyWish::from_specs(checked(extra_specs, image_properties)?)
}

/// A map that nothing gives a topology to would be read by nobody.
fn refuse_lost_maps(specs: Specs<'_>, request: &Request) -> Result<(), SpecError> {
    let maps = ["hw:numa_cpus.", "hw:numa_mem.", "hw_numa_cpus.", "hw_numa_mem."];
    let lost = |entry: &Entry<'_>| maps.iter().any(|map| entry.key.starts_with(map));
    match specs.entries_by_source().map(|(entry, _)| entry).find(lost) {
        Some(entry) if request.guest.is_none() => Err(entry.refuse(SpecRule::IncompleteMap)),
        _ => Ok(()),
    }
}

fn refuse_unknown_keys(specs: Specs<'_>) -> Result<(), SpecError> {
    match specs.entries_by_source().find(|(entry, by_image)| !is_understood(entry, *by_image)) {
        Some((entry, _)) => Err(entry.refuse(SpecRule::UnsupportedKey)),
        None => Ok(()),
    }
}

fn is_understood(entry: &Entry<'_>, by_image: bool) -> bool {
    let key = entry.key.as_str();
    if let Some(name) = key.strip_prefix(if by_image { "hw_" } else { "hw:" }) {
        let base = match name.split_once('.') {
            Some((base @ ("numa_cpus" | "numa_mem"), _)) => base,
            _ => name,
        };
        if values::KEYS.iter().any(|&(known, image_may, _)| known == base && (image_may || !by_image)) {
            return true;
        }
    }
    if let Some(class) = numbered(key, "resources") {
        return matches!(class, "VCPU" | "PCPU");
    }
    if let Some(name) = numbered(key, "trait") {
        return name == "HW_CPU_HYPERTHREADING" || entry.value != "required";
    }
    // Capitals, spaces, and the other source's prefix do not make it another key to the eye.
    let plain = key.trim().to_ascii_lowercase();
    let name = plain.strip_prefix("hw:").or_else(|| plain.strip_prefix("hw_")).map(str::trim_start);
    let places = name.is_some_and(|name| PLACING.iter().any(|placing| name.starts_with(placing)));
    !places && key != "pci_passthrough:alias"
}
