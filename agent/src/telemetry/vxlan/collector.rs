//! The counters as Prometheus series, read from the kernel when they are scraped.

use super::VxlanTelemetry;
use crate::metrics::Exposition;
use crate::telemetry::TelemetryError;
use crate::telemetry::series::{Series, counter, gauge, write_labels};
use godwit_ebpf_common::underlay::Direction;
use std::collections::BTreeMap;
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

    fn read(&self, text: &mut String) -> Result<(), TelemetryError> {
        let telemetry = &self.telemetry;
        let (mut packets, mut bytes) = (PACKETS.family(), BYTES.family());
        // Peers are few, and each is written very often.
        let mut peers: BTreeMap<IpAddr, String> = BTreeMap::new();
        let mut labels = String::new();
        telemetry.each(|sample| {
            let peer = peers.entry(sample.peer).or_insert_with(|| sample.peer.to_string());
            let vni = sample.vni.to_string();
            labels.clear();
            write_labels(
                &mut labels,
                TRAFFIC,
                &[&vni, sample.direction.as_str(), sample.class.as_str(), peer],
            );
            packets.push_under(&labels, sample.packets);
            bytes.push_under(&labels, sample.bytes);
        })?;
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
        for family in [packets, bytes, others, stale, longest, attached, runs, seconds] {
            family.finish(text);
        }
        Ok(())
    }
}

impl Exposition for VxlanCollector {
    fn write(&self, text: &mut String) {
        if let Err(error) = self.read(text) {
            tracing::error!(error = &error as &dyn std::error::Error, "the VXLAN counters were not read");
            self.reads_failed.fetch_add(1, Ordering::Relaxed);
        }
        let mut failed = READS_FAILED.family();
        failed.push(&[], self.reads_failed.load(Ordering::Relaxed));
        failed.finish(text);
    }
}
