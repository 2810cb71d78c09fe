//! The counters as Prometheus series, read from the kernel when they are scraped.

use super::{Sample, VxlanTelemetry};
use crate::metrics::{Exposition, Text};
use crate::telemetry::TelemetryError;
use crate::telemetry::series::{Series, counter, gauge, write_labels};
use godwit_ebpf_common::underlay::{Class, Direction};
use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

const TRAFFIC: &[&str] = &["vni", "direction", "class", "peer"];

const PACKETS: Series = counter(
    "godwit_vxlan_packets_total",
    "VXLAN packets on the underlay, as they are on the wire, by the VTEP at the other end.",
    TRAFFIC,
);
const BYTES: Series = counter(
    "godwit_vxlan_bytes_total",
    "Bytes of those packets, from the outer Ethernet header on.",
    TRAFFIC,
);
const OTHER: Series = counter(
    "godwit_vxlan_other_packets_total",
    "Packets on the underlay that could not be counted by network, by reason.",
    &["reason"],
);
const STALE: Series = counter(
    "godwit_vxlan_stale_packets_total",
    "Packets that came for stations which had left this host.",
    &["vni"],
);
const STALE_SECONDS: Series = gauge(
    "godwit_vxlan_stale_longest_seconds",
    "The longest time from when this host knew that a station had left to a packet for it.",
    &["vni"],
);
const ATTACHED: Series = gauge(
    "godwit_vxlan_program_attached",
    "Whether the counting program is on the underlay.",
    &["direction"],
);
const RUNS: Series = counter(
    "godwit_vxlan_program_runs_total",
    "Runs of the counting program since its load, while the kernel counts them.",
    &["direction"],
);
const RUN_SECONDS: Series = counter(
    "godwit_vxlan_program_run_seconds_total",
    "Time that those runs took, over all CPUs.",
    &["direction"],
);

const READS_FAILED: Series = counter(
    "godwit_vxlan_reads_failed_total",
    "Scrapes in which the kernel did not let the VXLAN counters be read.",
    &[],
);

/// The series `godwit_vxlan_…`.
///
/// The counters are the kernel's: it keeps none but that of failed reads.
pub struct VxlanCollector {
    telemetry: Arc<VxlanTelemetry>,
    reads_failed: AtomicU64,
}

impl VxlanCollector {
    /// A collector of what `telemetry` counts.
    pub fn new(telemetry: Arc<VxlanTelemetry>) -> Self {
        Self { telemetry, reads_failed: AtomicU64::new(0) }
    }

    /// Most of a scrape: a host with a thousand networks has tens of thousands of these.
    fn read_traffic(&self, text: &mut Text<'_>) -> Result<(), TelemetryError> {
        let (mut kinds, mut rows) = (Kinds::default(), Vec::new());
        self.telemetry.each(|sample| {
            if rows.is_empty() {
                PACKETS.head(text);
            }
            let Sample { vni, packets, bytes, .. } = sample;
            let labels = kinds.number(&sample);
            kinds.line(text, &PACKETS, vni, labels, packets);
            rows.push(Row { vni, labels, bytes });
        })?;
        if !rows.is_empty() {
            BYTES.head(text);
        }
        for Row { vni, labels, bytes } in rows {
            kinds.line(text, &BYTES, vni, labels, bytes);
        }
        Ok(())
    }

    fn read(&self, text: &mut Text<'_>) -> Result<(), TelemetryError> {
        self.read_traffic(text)?;
        let telemetry = &self.telemetry;
        let mut others = OTHER.family();
        for (other, count) in telemetry.read_other()? {
            others.push(&[other.as_str()], count);
        }
        let (mut stale, mut longest) = (STALE.family(), STALE_SECONDS.family());
        for (vni, (count, after)) in telemetry.read_stale()? {
            stale.push(&[&vni.to_string()], count);
            longest.push(&[&vni.to_string()], after.as_secs_f64());
        }
        let (mut attached, mut runs, mut seconds) = (ATTACHED.family(), RUNS.family(), RUN_SECONDS.family());
        for (direction, cost) in Direction::ALL.into_iter().zip(telemetry.read_cost()?) {
            let labels = [direction.as_str()];
            attached.push(&labels, u8::from(telemetry.is_attached(direction)?));
            // A program that was never timed has no cost to tell, and zero would be a wrong one.
            if cost.runs > 0 {
                runs.push(&labels, cost.runs);
                seconds.push(&labels, cost.time.as_secs_f64());
            }
        }
        for family in [others, stale, longest, attached, runs, seconds] {
            family.finish(text);
        }
        Ok(())
    }
}

/// Labels of one kind of traffic but for its network, and a count of its bytes.
struct Row {
    vni: u32,
    labels: u32,
    bytes: u64,
}

/// What tells kinds of traffic within a network apart. There are few, and each is written very often.
#[derive(Default)]
struct Kinds {
    numbers: HashMap<(Direction, Class, IpAddr), u32>,
    labels: Vec<String>,
}

impl Kinds {
    /// The number of a sample's labels.
    fn number(&mut self, sample: &Sample) -> u32 {
        let Sample { direction, class, peer, .. } = *sample;
        *self.numbers.entry((direction, class, peer)).or_insert_with(|| {
            let mut labels = "\"".to_owned();
            write_labels(
                &mut labels,
                &TRAFFIC[1..],
                &[direction.as_str(), class.as_str(), &peer.to_string()],
            );
            labels.push_str("} ");
            self.labels.push(labels);
            self.labels.len() as u32 - 1
        })
    }

    /// Writes a line of one of the two series of traffic.
    fn line(&self, text: &mut Text<'_>, series: &Series, vni: u32, labels: u32, value: u64) {
        let (mut network, mut number) = (itoa::Buffer::new(), itoa::Buffer::new());
        let labels = self.labels.get(labels as usize).map_or("", String::as_str);
        for part in [series.name, "{vni=\"", network.format(vni), labels, number.format(value), "\n"] {
            text.push(part);
        }
    }
}

impl Exposition for VxlanCollector {
    fn write(&self, text: &mut Text<'_>) {
        if let Err(error) = self.read(text) {
            tracing::error!(error = &error as &dyn std::error::Error, "the VXLAN counters were not read");
            self.reads_failed.fetch_add(1, Ordering::Relaxed);
        }
        let mut failed = READS_FAILED.family();
        failed.push(&[], self.reads_failed.load(Ordering::Relaxed));
        failed.finish(text);
    }
}
