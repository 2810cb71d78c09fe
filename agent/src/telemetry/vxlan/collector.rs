//! The counters as Prometheus series, read from the kernel when they are scraped.

use super::VxlanTelemetry;
use crate::telemetry::TelemetryError;
use godwit_ebpf_common::underlay::Direction;
use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{CounterVec, IntCounter, IntCounterVec, IntGaugeVec, Opts};
use std::sync::{Arc, Mutex, PoisonError};

/// `godwit_vxlan_packets_total`, `_bytes_total`, `_other_packets_total`, `_program_attached`,
/// `_program_runs_total`, `_program_run_seconds_total` and `_reads_failed_total`.
///
/// The counters are the kernel's: it keeps none but that of failed reads.
pub struct VxlanCollector {
    telemetry: Arc<VxlanTelemetry>,
    series: Mutex<Series>,
    reads_failed: IntCounter,
    descriptions: Vec<Desc>,
}

#[derive(Debug)]
struct Series {
    packets: IntCounterVec,
    bytes: IntCounterVec,
    other: IntCounterVec,
    attached: IntGaugeVec,
    runs: IntCounterVec,
    run_seconds: CounterVec,
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
        let series = Series::new()?;
        let descriptions = series.collectors().into_iter().flat_map(|series| series.desc());
        let descriptions = descriptions.chain(reads_failed.desc()).cloned().collect();
        let series = Mutex::new(series);
        Ok(Self { telemetry, series, reads_failed, descriptions })
    }
}

impl Series {
    fn new() -> Result<Self, prometheus::Error> {
        let traffic = ["vni", "direction", "class"];
        Ok(Self {
            packets: IntCounterVec::new(
                Opts::new(
                    "godwit_vxlan_packets_total",
                    "VXLAN packets on the underlay, as they are on the wire.",
                ),
                &traffic,
            )?,
            bytes: IntCounterVec::new(
                Opts::new(
                    "godwit_vxlan_bytes_total",
                    "Bytes of those packets, from the outer Ethernet header on.",
                ),
                &traffic,
            )?,
            other: IntCounterVec::new(
                Opts::new(
                    "godwit_vxlan_other_packets_total",
                    "Packets on the underlay that could not be counted by network, by reason.",
                ),
                &["reason"],
            )?,
            attached: IntGaugeVec::new(
                Opts::new(
                    "godwit_vxlan_program_attached",
                    "Whether the counting program is on the underlay.",
                ),
                &["direction"],
            )?,
            runs: IntCounterVec::new(
                Opts::new(
                    "godwit_vxlan_program_runs_total",
                    "Runs of the counting program since its load, while kernel.bpf_stats_enabled is set.",
                ),
                &["direction"],
            )?,
            run_seconds: CounterVec::new(
                Opts::new(
                    "godwit_vxlan_program_run_seconds_total",
                    "Time that those runs took, over all CPUs.",
                ),
                &["direction"],
            )?,
        })
    }

    fn reset(&self) {
        for series in [&self.packets, &self.bytes, &self.other, &self.runs] {
            series.reset();
        }
        self.attached.reset();
        self.run_seconds.reset();
    }

    fn collectors(&self) -> [&dyn Collector; 6] {
        [&self.packets, &self.bytes, &self.other, &self.attached, &self.runs, &self.run_seconds]
    }

    fn read(&self, telemetry: &VxlanTelemetry) -> Result<(), TelemetryError> {
        for sample in telemetry.read()? {
            let vni = sample.vni.to_string();
            let labels = [vni.as_str(), sample.direction.as_str(), sample.class.as_str()];
            self.packets.with_label_values(&labels).inc_by(sample.packets);
            self.bytes.with_label_values(&labels).inc_by(sample.bytes);
        }
        for (other, packets) in telemetry.read_other()? {
            self.other.with_label_values(&[other.as_str()]).inc_by(packets);
        }
        for direction in Direction::ALL {
            let attached = telemetry.is_attached(direction)?;
            self.attached.with_label_values(&[direction.as_str()]).set(i64::from(attached));
        }
        // A program that was never timed has no cost to tell, and zero would be a wrong one.
        for cost in telemetry.read_cost()?.into_iter().filter(|cost| cost.runs > 0) {
            let labels = [cost.direction.as_str()];
            self.runs.with_label_values(&labels).inc_by(cost.runs);
            self.run_seconds.with_label_values(&labels).inc_by(cost.time.as_secs_f64());
        }
        Ok(())
    }
}

impl Collector for VxlanCollector {
    fn desc(&self) -> Vec<&Desc> {
        self.descriptions.iter().collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        // One scrape at a time: the series hold a scrape's values only while it lasts.
        let series = self.series.lock().unwrap_or_else(PoisonError::into_inner);
        series.reset();
        let mut families = match series.read(&self.telemetry) {
            Ok(()) => series.collectors().into_iter().flat_map(|series| series.collect()).collect(),
            Err(error) => {
                tracing::error!(error = &error as &dyn std::error::Error, "the VXLAN counters were not read");
                self.reads_failed.inc();
                Vec::new()
            }
        };
        families.extend(self.reads_failed.collect());
        families
    }
}
