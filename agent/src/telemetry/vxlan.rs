//! VXLAN traffic on the underlay link, by network, direction and class.

mod collector;
#[cfg(test)]
mod tests;

pub use collector::VxlanCollector;

use super::TelemetryError;
use super::pins::{Layout, Pins};
use aya::maps::{Map, MapData, MapError, MapType, PerCpuArray, PerCpuHashMap};
use aya::programs::links::{FdLink, LinkError, PinnedLink};
use aya::programs::tc::{SchedClassifier, SchedClassifierLink, TcAttachOptions, TcAttachType};
use aya::programs::{LinkOrder, ProgramError, ProgramInfo};
use aya::sys::SyscallError;
use aya::{Ebpf, EbpfLoader, include_bytes_aligned};
use godwit_ebpf_common::underlay::{
    Class, Direction, EGRESS_PROGRAM, INGRESS_PROGRAM, OTHER_MAP, Other, PORT_GLOBAL, TRAFFIC_ENTRIES,
    TRAFFIC_MAP, Traffic, TrafficKey,
};
use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::time::Duration;

/// The programs, as agent/build.rs built them.
static OBJECT: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/underlay"));

const TRAFFIC_PIN: &str = "underlay_traffic";
const OTHER_PIN: &str = "underlay_other";

/// How to count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// UDP destination port of VXLAN.
    pub port: u16,
    /// Keys that can be counted, at most six a network. Changing it starts the counters from zero.
    pub entries: u32,
}

impl Default for Options {
    /// RFC 7348's port, and room for 1365 networks.
    fn default() -> Self {
        Self { port: 4789, entries: TRAFFIC_ENTRIES }
    }
}

/// What was counted of one network, one way, for one class of destinations, since the map was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sample {
    /// VXLAN network identifier.
    pub vni: u32,
    /// Received or sent by this host.
    pub direction: Direction,
    /// Whom the inner destination address is.
    pub class: Class,
    /// Packets on the wire, every segment of an offloaded one counted.
    pub packets: u64,
    /// Their bytes, from the outer Ethernet header on.
    pub bytes: u64,
}

/// What a program itself costs, since this agent loaded it. The kernel counts only while
/// `kernel.bpf_stats_enabled` is set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cost {
    /// Which of the two programs.
    pub direction: Direction,
    /// Packets it has seen, as the kernel handed them over.
    pub runs: u64,
    /// Time spent in it, all CPUs together.
    pub time: Duration,
}

/// The program `underlay` on one link. Dropping it leaves everything attached and counting; see
/// [`Self::remove`].
pub struct VxlanTelemetry {
    link: String,
    pins: Pins,
    ebpf: Ebpf,
    traffic: PerCpuHashMap<MapData, TrafficKey, Traffic>,
    other: PerCpuArray<MapData, u64>,
}

impl VxlanTelemetry {
    /// Counts what passes on `link`, with everything pinned under `<bpffs>/godwit`.
    ///
    /// What an agent before has pinned there is adopted: its counts go on, and its programs are replaced
    /// atomically. A map of another layout or size is made anew, and an attachment to another link is moved;
    /// both are logged.
    ///
    /// # Errors
    /// There is no such link or no BPF file system, or the kernel refuses; what was attached before goes on.
    pub fn ensure(link: &str, bpffs: &Path, options: Options) -> Result<Self, TelemetryError> {
        if nix::net::if_::if_nametoindex(link).is_err() {
            return Err(TelemetryError::NoLink { link: link.to_owned() });
        }
        let pins = Pins::open(bpffs)?;
        pins.discard_unless(TRAFFIC_PIN, &traffic_layout(options.entries))?;
        pins.discard_unless(OTHER_PIN, &OTHER_LAYOUT)?;
        let mut ebpf = EbpfLoader::new()
            .map_pin_path(TRAFFIC_MAP, pins.path(TRAFFIC_PIN))
            .map_pin_path(OTHER_MAP, pins.path(OTHER_PIN))
            .map_max_entries(TRAFFIC_MAP, options.entries)
            .override_global(PORT_GLOBAL, &options.port, true)
            .load(OBJECT)
            .map_err(|error| TelemetryError::Object(Box::new(error)))?;
        let traffic = take_map(&mut ebpf, TRAFFIC_MAP)?;
        let other = take_map(&mut ebpf, OTHER_MAP)?;
        for direction in Direction::ALL {
            // Both before either is attached: a kernel that refuses one must not be left with the other.
            let loaded = program_mut(&mut ebpf, direction)?.load();
            loaded.map_err(|source| program_error(direction, "loaded", source))?;
        }
        for direction in Direction::ALL {
            ensure_attached(program_mut(&mut ebpf, direction)?, direction, link, &pins)?;
        }
        Ok(Self { link: link.to_owned(), pins, ebpf, traffic, other })
    }

    /// All counts by network, summed over CPUs, in the order of network, direction and class.
    ///
    /// # Errors
    /// The kernel does not let the map be read.
    pub fn read(&self) -> Result<Vec<Sample>, TelemetryError> {
        let mut samples = BTreeMap::new();
        for entry in self.traffic.iter() {
            let (key, values) = entry.map_err(|source| map_error(TRAFFIC_MAP, source))?;
            let Some((direction, class)) = key.kind() else { continue };
            let packets = values.iter().map(|traffic| traffic.packets).sum();
            let bytes = values.iter().map(|traffic| traffic.bytes).sum();
            let sample = Sample { vni: key.vni, direction, class, packets, bytes };
            samples.insert((key.vni, direction, class), sample);
        }
        Ok(samples.into_values().collect())
    }

    /// Packets that could not be counted by network, for each reason.
    ///
    /// # Errors
    /// The kernel does not let the map be read.
    pub fn read_other(&self) -> Result<[(Other, u64); Other::ALL.len()], TelemetryError> {
        let mut counts = Other::ALL.map(|other| (other, 0));
        for (other, count) in &mut counts {
            let values = self.other.get(&(*other as u32), 0);
            *count = values.map_err(|source| map_error(OTHER_MAP, source))?.iter().sum();
        }
        Ok(counts)
    }

    /// What each program costs; all zero unless the kernel was told to count it.
    ///
    /// # Errors
    /// The kernel does not tell.
    pub fn read_cost(&self) -> Result<[Cost; 2], TelemetryError> {
        let cost = |direction| {
            let name = program_name(direction);
            let program = self.ebpf.program(name).ok_or(TelemetryError::Incomplete { name })?;
            let info = program.info().map_err(|source| program_error(direction, "inspected", source))?;
            Ok(Cost { direction, runs: info.run_count(), time: info.run_time() })
        };
        Ok([cost(Direction::Rx)?, cost(Direction::Tx)?])
    }

    /// Whether the program of a direction is on the link still. It is not if the link was removed, even if one
    /// of the same name was made since.
    ///
    /// # Errors
    /// The kernel does not tell.
    pub fn is_attached(&self, direction: Direction) -> Result<bool, TelemetryError> {
        let name = program_name(direction);
        if nix::net::if_::if_nametoindex(self.link.as_str()).is_err() {
            return Ok(false);
        }
        let program = self.ebpf.program(name).ok_or(TelemetryError::Incomplete { name })?;
        let info = program.info().map_err(|source| program_error(direction, "inspected", source))?;
        is_attached(&info, direction, &self.link)
    }

    /// Takes the programs off the link and their counts out of the kernel.
    ///
    /// # Errors
    /// A pinned file cannot be removed; then it still holds on to what it stands for.
    pub fn remove(self) -> Result<(), TelemetryError> {
        for direction in Direction::ALL {
            self.pins.remove(program_name(direction))?;
        }
        self.pins.remove(TRAFFIC_PIN)?;
        self.pins.remove(OTHER_PIN)?;
        self.pins.remove_folder()
    }

    #[cfg(test)]
    pub(super) fn program_mut(&mut self, direction: Direction) -> &mut SchedClassifier {
        program_mut(&mut self.ebpf, direction).expect("the object has both programs")
    }
}

const OTHER_LAYOUT: Layout = Layout {
    name: OTHER_MAP,
    kind: MapType::PerCpuArray,
    key_bytes: size_of::<u32>(),
    value_bytes: size_of::<u64>(),
    entries: Other::ALL.len() as u32,
};

fn traffic_layout(entries: u32) -> Layout {
    Layout {
        name: TRAFFIC_MAP,
        kind: MapType::PerCpuHash,
        key_bytes: size_of::<TrafficKey>(),
        value_bytes: size_of::<Traffic>(),
        entries,
    }
}

fn program_name(direction: Direction) -> &'static str {
    match direction {
        Direction::Rx => INGRESS_PROGRAM,
        Direction::Tx => EGRESS_PROGRAM,
    }
}

fn side(direction: Direction) -> TcAttachType {
    match direction {
        Direction::Rx => TcAttachType::Ingress,
        Direction::Tx => TcAttachType::Egress,
    }
}

fn program_mut(ebpf: &mut Ebpf, direction: Direction) -> Result<&mut SchedClassifier, TelemetryError> {
    let name = program_name(direction);
    let program = ebpf.program_mut(name).ok_or(TelemetryError::Incomplete { name })?;
    program.try_into().map_err(|source| program_error(direction, "used", source))
}

fn take_map<M>(ebpf: &mut Ebpf, name: &'static str) -> Result<M, TelemetryError>
where
    M: TryFrom<Map, Error = MapError>,
{
    let map = ebpf.take_map(name).ok_or(TelemetryError::Incomplete { name })?;
    M::try_from(map).map_err(|source| map_error(name, source))
}

/// Attaches a loaded program to `link`: by taking over the pinned attachment if it is of that link, else
/// anew.
fn ensure_attached(
    program: &mut SchedClassifier,
    direction: Direction,
    link: &str,
    pins: &Pins,
) -> Result<(), TelemetryError> {
    if adopt(program, direction, link, pins)? {
        return Ok(());
    }
    // What comes in is seen before anyone redirects or drops it, what goes out after everyone has had a say.
    let order = match direction {
        Direction::Rx => LinkOrder::first(),
        Direction::Tx => LinkOrder::last(),
    };
    let attached = program
        .attach_with_options(link, side(direction), TcAttachOptions::TcxOrder(order))
        .and_then(|id| program.take_link(id))
        .map_err(|source| program_error(direction, "attached", source))?;
    let attached =
        FdLink::try_from(attached).map_err(|error| attachment_error(direction, "pinned", error))?;
    attached
        .pin(pins.path(program_name(direction)))
        .map_err(|error| attachment_error(direction, "pinned", error))?;
    Ok(())
}

/// Puts a loaded program in the place of the one that a pinned attachment holds. `false`: there is none of
/// `link`, and none is pinned any more.
fn adopt(
    program: &mut SchedClassifier,
    direction: Direction,
    link: &str,
    pins: &Pins,
) -> Result<bool, TelemetryError> {
    let name = program_name(direction);
    let pinned = match PinnedLink::from_pin(pins.path(name)) {
        Ok(pinned) => FdLink::from(pinned),
        Err(LinkError::SyscallError(error)) if error.io_error.kind() == io::ErrorKind::NotFound => {
            return Ok(false);
        }
        Err(error) => return Err(attachment_error(direction, "opened", error)),
    };
    let pinned = SchedClassifierLink::try_from(pinned)
        .map_err(|error| attachment_error(direction, "adopted", error))?;
    let info = program.info().map_err(|source| program_error(direction, "inspected", source))?;
    let reason = match program.attach_to_link(pinned) {
        Ok(_) if is_attached(&info, direction, link)? => return Ok(true),
        Ok(id) => {
            // Closes the descriptor, so that the attachment ends with its pin.
            program.detach(id).map_err(|source| program_error(direction, "detached", source))?;
            "it is on another link"
        }
        Err(ProgramError::SyscallError(SyscallError { io_error, .. }))
            if io_error.raw_os_error() == Some(libc::ENOLINK) =>
        {
            "its link is gone"
        }
        Err(source) => return Err(program_error(direction, "exchanged", source)),
    };
    tracing::warn!(program = name, link, reason, "a pinned attachment is given up and made anew");
    pins.remove(name)?;
    Ok(false)
}

fn is_attached(program: &ProgramInfo, direction: Direction, link: &str) -> Result<bool, TelemetryError> {
    let (_, attached) = SchedClassifier::query_tcx(link, side(direction))
        .map_err(|source| program_error(direction, "looked for", source))?;
    Ok(attached.iter().any(|info| info.id() == program.id()))
}

fn map_error(map: &'static str, source: MapError) -> TelemetryError {
    TelemetryError::Map { map, source: Box::new(source) }
}

fn program_error(direction: Direction, action: &'static str, source: ProgramError) -> TelemetryError {
    TelemetryError::Program { program: program_name(direction), action, source: Box::new(source) }
}

fn attachment_error(
    direction: Direction,
    action: &'static str,
    source: impl std::error::Error + Send + Sync + 'static,
) -> TelemetryError {
    TelemetryError::Attachment { program: program_name(direction), action, source: Box::new(source) }
}
