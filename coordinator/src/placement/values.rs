//! What each key's value must be by itself, whatever the other keys say. It is asked of what is new: of a flavor when it
//! is set, of flavor and image when an instance is made. Nova checks flavors so (its validators of extra specs); here
//! images are checked alike, so that a slip of the pen is told and does not quietly lose a guarantee.

use super::spec::{Entry, MAX_GUEST_CELLS, SpecError, SpecRule, Specs, numbered, parse_whole};

/// The largest page that any architecture has, 16 GiB, in KiB.
const LARGEST_PAGE_KIB: u64 = 16 << 20;

/// The keys under `hw:` that are understood, whether images may set them as `hw_…`, and the rule that a value of the
/// wrong kind breaks.
pub(super) const KEYS: [(&str, bool, SpecRule); 18] = [
    ("numa_nodes", true, SpecRule::BadNodeCount),
    ("numa_cpus", true, SpecRule::InvalidCpuList),
    ("numa_mem", true, SpecRule::InvalidRequest),
    ("cpu_policy", true, SpecRule::BadCpuPolicy),
    ("cpu_thread_policy", true, SpecRule::BadThreadPolicy),
    ("cpu_dedicated_mask", false, SpecRule::BadDedicatedMask),
    ("cpu_realtime", false, SpecRule::InvalidRequest),
    ("cpu_realtime_mask", true, SpecRule::BadRealtimeMask),
    ("cpu_sockets", true, SpecRule::InvalidRequest),
    ("cpu_cores", true, SpecRule::InvalidRequest),
    ("cpu_threads", true, SpecRule::InvalidRequest),
    ("cpu_max_sockets", true, SpecRule::InvalidRequest),
    ("cpu_max_cores", true, SpecRule::InvalidRequest),
    ("cpu_max_threads", true, SpecRule::InvalidRequest),
    ("mem_page_size", true, SpecRule::BadPageSize),
    ("emulator_threads_policy", false, SpecRule::BadEmulatorPolicy),
    ("locked_memory", true, SpecRule::InvalidRequest),
    // Says how near a passed-through device must be; without devices it asks for nothing.
    ("pci_numa_affinity_policy", true, SpecRule::BadPciNumaPolicy),
];

/// The trait that says whether cores have several threads.
const HYPERTHREADING: &str = "HW_CPU_HYPERTHREADING";

/// Checks every value of flavor and image, and that maps have no gap.
pub(super) fn check(specs: Specs<'_>) -> Result<(), SpecError> {
    for (entry, by_image) in specs.entries_by_source() {
        check_one(&entry, by_image)?;
    }
    for by_image in [false, true] {
        for map in ["numa_cpus", "numa_mem"] {
            check_gaps(specs, map, by_image)?;
        }
    }
    check_traits(specs)
}

/// Checks one value. A key that does not matter to placement is right with any value.
pub(super) fn check_one(entry: &Entry<'_>, by_image: bool) -> Result<(), SpecError> {
    if numbered(&entry.key, "trait") == Some(HYPERTHREADING) {
        let known: &[&str] = if by_image { &["required"] } else { &["required", "forbidden"] };
        return demand(known.contains(&entry.value), entry, SpecRule::InvalidRequest);
    }
    let Some(name) = entry.key.strip_prefix(if by_image { "hw_" } else { "hw:" }) else { return Ok(()) };
    let (base, index) = name.split_once('.').map_or((name, None), |(base, index)| (base, Some(index)));
    let Some(&(_, _, rule)) = KEYS.iter().find(|(known, ..)| *known == base) else { return Ok(()) };
    demand(!entry.value.trim().is_empty(), entry, rule)?;
    match base {
        "numa_cpus" | "numa_mem" => {
            demand(index.is_some_and(|index| cell(index).is_some()), entry, SpecRule::IncompleteMap)?;
            match base {
                "numa_cpus" => entry.cpus().map(drop),
                _ => entry.whole_number(rule).map(drop),
            }
        }
        "cpu_realtime_mask" => entry.cpus().map(drop),
        "cpu_sockets" | "cpu_cores" | "cpu_threads" | "cpu_max_sockets" | "cpu_max_cores"
        | "cpu_max_threads" => demand(entry.whole_number(rule)? > 0, entry, rule),
        "mem_page_size" => {
            let kib = parse_whole(entry.value);
            demand(kib.is_none_or(|kib| kib <= LARGEST_PAGE_KIB), entry, rule)
        }
        _ => Ok(()),
    }
}

/// The guest cell that a map's key names: a plain number, for `01` would be read by nobody.
fn cell(index: &str) -> Option<u32> {
    let cell = parse_whole(index).and_then(|cell| u32::try_from(cell).ok())?;
    (cell < MAX_GUEST_CELLS && index == cell.to_string()).then_some(cell)
}

/// Refuses a map in which a number is missing: what comes behind it would be read by nobody.
fn check_gaps(specs: Specs<'_>, map: &str, by_image: bool) -> Result<(), SpecError> {
    let prefix = if by_image { format!("hw_{map}.") } else { format!("hw:{map}.") };
    let entries = specs.entries_by_source().filter(|(_, of_image)| *of_image == by_image);
    let mut cells: Vec<_> =
        entries.filter_map(|(entry, _)| Some((cell(entry.key.strip_prefix(&prefix)?)?, entry))).collect();
    cells.sort_by_key(|(cell, _)| *cell);
    match cells.iter().zip(0..).find(|((cell, _), wanted)| cell != wanted) {
        Some(((_, entry), _)) => Err(entry.refuse(SpecRule::IncompleteMap)),
        None => Ok(()),
    }
}

/// Refuses a trait that is both required and forbidden, under different numbers.
fn check_traits(specs: Specs<'_>) -> Result<(), SpecError> {
    let all = specs.entries_by_source().map(|(entry, _)| entry);
    let mut asked = all.filter(|entry| numbered(&entry.key, "trait") == Some(HYPERTHREADING));
    let Some(first) = asked.next() else { return Ok(()) };
    match asked.find(|other| other.value != first.value) {
        Some(other) => Err(other.refuse(SpecRule::InvalidRequest)),
        None => Ok(()),
    }
}

fn demand(holds: bool, entry: &Entry<'_>, rule: SpecRule) -> Result<(), SpecError> {
    if holds { Ok(()) } else { Err(entry.refuse(rule)) }
}
