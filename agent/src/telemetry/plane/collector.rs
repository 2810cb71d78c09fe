//! What the ports' programs have counted, as Prometheus series.

use super::DataPlane;
use crate::metrics::{Exposition, Text};
use crate::telemetry::TelemetryError;
use crate::telemetry::series::{Series, counter, gauge, write_labels};
use godwit_ebpf_common::tables::{AccountKey, Outcome, Protocol, Reason};
use godwit_ebpf_common::underlay::Class;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

const TRAFFIC: &[&str] = &["vni", "port", "direction", "class"];
const NEIGHBOURS: &[&str] = &["vni", "port", "protocol"];

const PACKETS: Series =
    counter("godwit_port_packets_total", "Packets of guests at their taps, as on a wire.", TRAFFIC);
const BYTES: Series =
    counter("godwit_port_bytes_total", "Their bytes, from the Ethernet header on.", TRAFFIC);
const DROPS: Series = counter(
    "godwit_port_drops_total",
    "Packets of guests that ended at their taps, by reason.",
    &["vni", "port", "reason"],
);
const OUTCOMES: [Series; Outcome::ALL.len()] = [
    counter(
        "godwit_neighbour_requests_seen_total",
        "Questions of guests, by ARP and neighbour discovery, who has an address.",
        NEIGHBOURS,
    ),
    counter("godwit_neighbour_requests_answered_total", "Questions answered at the port.", NEIGHBOURS),
    counter(
        "godwit_neighbour_requests_suppressed_total",
        "Questions that ended at the port without an answer.",
        NEIGHBOURS,
    ),
    counter("godwit_neighbour_requests_passed_total", "Questions that went on.", NEIGHBOURS),
    counter(
        "godwit_neighbour_requests_unknown_total",
        "Questions for an address that nobody has told of.",
        NEIGHBOURS,
    ),
    counter(
        "godwit_neighbour_requests_leaked_total",
        "Questions for a known address that left for other hosts.",
        NEIGHBOURS,
    ),
    counter(
        "godwit_neighbour_unicast_seen_total",
        "Questions to one station, whether it is still there.",
        NEIGHBOURS,
    ),
    counter("godwit_neighbour_probes_seen_total", "Questions whether an address is free.", NEIGHBOURS),
    counter(
        "godwit_neighbour_announcements_seen_total",
        "What guests said unasked of their own address.",
        NEIGHBOURS,
    ),
    counter(
        "godwit_neighbour_conflicts_seen_total",
        "Claims of an address that somebody else is known to have. Port `remote`: from another host.",
        NEIGHBOURS,
    ),
];
const LOST: Series = counter(
    "godwit_telemetry_lost_total",
    "What the programs could not write: events, counts, packets of a link without a port.",
    &["what"],
);
const FULL: Series = counter(
    "godwit_telemetry_map_full_total",
    "Entries that the agent could not write, because a map was full.",
    &[],
);
const ENTRIES: Series = gauge("godwit_telemetry_map_entries", "Entries in a map.", &["map"]);
const CAPACITY: Series =
    gauge("godwit_telemetry_map_capacity", "Most entries of a map, by `capacity` in agent.toml.", &["map"]);
const INCOMPLETE: Series = gauge(
    "godwit_telemetry_incomplete",
    "Networks and ports of which some entry has no room in its map.",
    &["what"],
);
const ATTACHED: Series =
    gauge("godwit_port_programs_attached", "Taps with (yes) and without (no) their programs.", &["attached"]);
const FAILED: Series = counter(
    "godwit_port_refreshes_failed_total",
    "Times that a tap's programs could not be put in their places.",
    &[],
);
const RUNS: Series = counter(
    "godwit_port_program_runs_total",
    "Runs of a port's program since its load, while the kernel counts them.",
    &["program"],
);
const RUN_SECONDS: Series = counter(
    "godwit_port_program_run_seconds_total",
    "Time that those runs took, over all CPUs.",
    &["program"],
);

const READS_FAILED: Series = counter(
    "godwit_port_reads_failed_total",
    "Scrapes in which the kernel did not let the ports' counters be read.",
    &[],
);

/// The series `godwit_port_…`, `godwit_neighbour_…` and `godwit_telemetry_…`.
pub struct PlaneCollector {
    plane: Arc<DataPlane>,
    reads_failed: AtomicU64,
}

impl PlaneCollector {
    /// A collector of what `plane` counts.
    pub fn new(plane: Arc<DataPlane>) -> Self {
        Self { plane, reads_failed: AtomicU64::new(0) }
    }

    fn read(&self, text: &mut Text<'_>) -> Result<(), TelemetryError> {
        self.read_accounts(text)?;
        self.read_state(text)
    }

    fn read_accounts(&self, text: &mut Text<'_>) -> Result<(), TelemetryError> {
        let (mut packets, mut bytes, mut drops) = (PACKETS.family(), BYTES.family(), DROPS.family());
        let mut outcomes = OUTCOMES.map(|series| series.family());
        let mut block = String::new();
        for (key, account) in self.plane.read()? {
            let (vni, port) = (key.vni.to_string(), port_label(&key));
            let directions = [
                ("from_guest", account.from_packets, account.from_bytes),
                ("to_guest", account.to_packets, account.to_bytes),
            ];
            for (direction, packet_counts, byte_counts) in directions {
                // What never occurred has no series: most of a port's would stay zero.
                for (index, class) in Class::ALL.iter().enumerate().filter(|(i, _)| packet_counts[*i] > 0) {
                    let labels = [vni.as_str(), port.as_str(), direction, class.as_str()];
                    block.clear();
                    write_labels(&mut block, TRAFFIC, &labels);
                    packets.push_under(&block, packet_counts[index]);
                    bytes.push_under(&block, byte_counts[index]);
                }
            }
            for (protocol, counts) in Protocol::ALL.iter().zip(account.neighbours) {
                for (family, count) in outcomes.iter_mut().zip(counts).filter(|(_, count)| *count > 0) {
                    family.push(&[&vni, &port, protocol.as_str()], count);
                }
            }
            for (reason, count) in Reason::ALL.iter().zip(account.drops).filter(|(_, count)| *count > 0) {
                drops.push(&[&vni, &port, reason.as_str()], count);
            }
        }
        for family in [packets, bytes, drops].into_iter().chain(outcomes) {
            family.finish(text);
        }
        Ok(())
    }

    fn read_state(&self, text: &mut Text<'_>) -> Result<(), TelemetryError> {
        let plane = &self.plane;
        let mut lost = LOST.family();
        for (what, count) in plane.read_lost()? {
            lost.push(&[what.as_str()], count);
        }
        let (mut full, mut failed) = (FULL.family(), FAILED.family());
        full.push(&[], plane.full.load(Ordering::Relaxed));
        failed.push(&[], plane.failed.load(Ordering::Relaxed));
        let filling = plane.filling();
        let (mut entries, mut capacity) = (ENTRIES.family(), CAPACITY.family());
        for (map, count) in filling.entries {
            entries.push(&[map], count);
        }
        for (map, count) in plane.capacity.entries() {
            capacity.push(&[map], count);
        }
        let mut incomplete = INCOMPLETE.family();
        incomplete.push(&["networks"], filling.incomplete);
        incomplete.push(&["ports"], filling.refused);
        let (on, off) = plane.attached();
        let mut attached = ATTACHED.family();
        attached.push(&["yes"], on);
        attached.push(&["no"], off);
        let (mut runs, mut seconds) = (RUNS.family(), RUN_SECONDS.family());
        for cost in plane.read_cost()?.into_iter().filter(|cost| cost.runs > 0) {
            runs.push(&[cost.program], cost.runs);
            seconds.push(&[cost.program], cost.time.as_secs_f64());
        }
        for family in [lost, full, failed, entries, capacity, incomplete, attached, runs, seconds] {
            family.finish(text);
        }
        Ok(())
    }
}

/// The port as its tap is called on the host, which is there however little is known of it.
fn port_label(key: &AccountKey) -> String {
    match key.port {
        0 => "remote".to_owned(),
        port => tap(port),
    }
}

/// The tap of a port's number in the account.
pub(super) fn tap(port: u64) -> String {
    format!("gwt{:011x}", port >> 20)
}

impl Exposition for PlaneCollector {
    fn write(&self, text: &mut Text<'_>) {
        if let Err(error) = self.read(text) {
            tracing::error!(error = &error as &dyn std::error::Error, "the ports' counters were not read");
            self.reads_failed.fetch_add(1, Ordering::Relaxed);
        }
        let mut failed = READS_FAILED.family();
        failed.push(&[], self.reads_failed.load(Ordering::Relaxed));
        failed.finish(text);
    }
}
