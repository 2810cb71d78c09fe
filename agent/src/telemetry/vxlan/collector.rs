//! The counters as Prometheus series, read from the kernel when they are scraped.

use super::VxlanTelemetry;
use crate::telemetry::TelemetryError;
use crate::telemetry::series::{Series, counter, gauge};
use godwit_ebpf_common::underlay::Direction;
use prometheus::IntCounter;
use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use std::sync::Arc;

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

/// The series `godwit_vxlan_…`.
///
/// The counters are the kernel's: it keeps none but that of failed reads.
pub struct VxlanCollector {
    telemetry: Arc<VxlanTelemetry>,
    reads_failed: IntCounter,
    descriptions: Vec<Desc>,
}

impl VxlanCollector {
    /// A collector of what `telemetry` counts, to be registered.
    ///
    /// # Errors
    /// Never with these names; the type is Prometheus' own.
    pub fn new(telemetry: Arc<VxlanTelemetry>) -> Result<Self, prometheus::Error> {
        let reads_failed = IntCounter::new(
            "godwit_vxlan_reads_failed_total",
            "Scrapes in which the kernel did not let the VXLAN counters be read.",
        )?;
        let series = [PACKETS, BYTES, OTHER, STALE, STALE_SECONDS, ATTACHED, RUNS, RUN_SECONDS];
        let mut descriptions = series.iter().map(Series::desc).collect::<Result<Vec<_>, _>>()?;
        descriptions.extend(reads_failed.desc().into_iter().cloned());
        Ok(Self { telemetry, reads_failed, descriptions })
    }

    fn read(&self) -> Result<Vec<MetricFamily>, TelemetryError> {
        let telemetry = &self.telemetry;
        let (mut packets, mut bytes) = (PACKETS.family(), BYTES.family());
        for sample in telemetry.read()? {
            let (vni, peer) = (sample.vni.to_string(), sample.peer.to_string());
            let labels = [vni.as_str(), sample.direction.as_str(), sample.class.as_str(), peer.as_str()];
            packets.push(&labels, sample.packets as f64);
            bytes.push(&labels, sample.bytes as f64);
        }
        let mut others = OTHER.family();
        for (other, count) in telemetry.read_other()? {
            others.push(&[other.as_str()], count as f64);
        }
        let (mut stale, mut longest) = (STALE.family(), STALE_SECONDS.family());
        for (vni, (count, after)) in telemetry.read_stale()? {
            stale.push(&[&vni.to_string()], count as f64);
            longest.push(&[&vni.to_string()], after.as_secs_f64());
        }
        let (mut attached, mut runs, mut seconds) = (ATTACHED.family(), RUNS.family(), RUN_SECONDS.family());
        for (direction, cost) in Direction::ALL.into_iter().zip(telemetry.read_cost()?) {
            let labels = [direction.as_str()];
            attached.push(&labels, f64::from(u8::from(telemetry.is_attached(direction)?)));
            // A program that was never timed has no cost to tell, and zero would be a wrong one.
            if cost.runs > 0 {
                runs.push(&labels, cost.runs as f64);
                seconds.push(&labels, cost.time.as_secs_f64());
            }
        }
        let families = [packets, bytes, others, stale, longest, attached, runs, seconds];
        Ok(families.into_iter().map(|family| family.finish()).collect())
    }
}

impl Collector for VxlanCollector {
    fn desc(&self) -> Vec<&Desc> {
        self.descriptions.iter().collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let mut families = self.read().unwrap_or_else(|error| {
            tracing::error!(error = &error as &dyn std::error::Error, "the VXLAN counters were not read");
            self.reads_failed.inc();
            Vec::new()
        });
        families.extend(self.reads_failed.collect());
        families
    }
}
