//! The filter's counters for `/metrics`.

use super::PortFilter;
use crate::telemetry::taps::name_of;
use crate::telemetry::{TelemetryError, batch, monotonic_ns};
use godwit_ebpf_common::filter::{
    CONNECTIONS_MAP, Connection, ConnectionKey, Counts, Entries, INGRESS, Strays,
};
use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{CounterVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts};
use std::sync::Arc;

/// Reads the maps when it is scraped.
pub struct FilterCollector {
    filter: Arc<PortFilter>,
    drops: IntCounterVec,
    opened: IntCounterVec,
    lost: IntCounterVec,
    ports: IntGauge,
    members: IntGaugeVec,
    connections: IntGaugeVec,
    capacity: IntGauge,
    evicted: IntCounter,
    fragments: IntCounter,
    full: IntCounterVec,
    runs: IntCounterVec,
    run_seconds: CounterVec,
}

impl FilterCollector {
    /// Of this filter.
    ///
    /// # Errors
    /// Never, for these names are right.
    pub fn new(filter: Arc<PortFilter>) -> Result<Self, prometheus::Error> {
        let counter =
            |name: &str, help: &str, labels: &[&str]| IntCounterVec::new(Opts::new(name, help), labels);
        Ok(Self {
            filter,
            drops: counter(
                "godwit_filter_dropped_packets_total",
                "Packets that a port's security groups do not let pass, by why.",
                &["tap", "direction", "reason"],
            )?,
            opened: counter(
                "godwit_filter_connections_opened_total",
                "Connections that a rule of a security group let be opened.",
                &["tap", "direction"],
            )?,
            lost: counter(
                "godwit_dhcp_lost_requests_total",
                "Questions by DHCP that the responder had no time for.",
                &["tap"],
            )?,
            ports: IntGauge::new("godwit_filter_ports", "Ports of this host that have a filter.")?,
            members: IntGaugeVec::new(
                Opts::new(
                    "godwit_filter_members",
                    "Addresses of members of security groups, by whether there was room for them.",
                ),
                &["state"],
            )?,
            connections: IntGaugeVec::new(
                Opts::new(
                    "godwit_filter_connections",
                    "Connections that are remembered: live, or idle for so long that they count no more.",
                ),
                &["state"],
            )?,
            capacity: IntGauge::new(
                "godwit_filter_connections_capacity",
                "Most connections that are remembered; more push out those longest unused.",
            )?,
            evicted: IntCounter::new(
                "godwit_filter_connections_evicted_total",
                "Connections that had to make place for others: those that count no more first.",
            )?,
            fragments: IntCounter::new(
                "godwit_filter_fragments_total",
                "Packets in fragments that were let pass; the last 4096 of a minute let their later fragments pass.",
            )?,
            full: counter(
                "godwit_filter_map_full_total",
                "Entries that a map of the filter had no room for.",
                &["map"],
            )?,
            runs: counter(
                "godwit_filter_program_runs_total",
                "Runs of the filter's program since its load, while the kernel counts them.",
                &["program"],
            )?,
            run_seconds: CounterVec::new(
                Opts::new(
                    "godwit_filter_program_run_seconds_total",
                    "Time that those runs took, over all CPUs.",
                ),
                &["program"],
            )?,
        })
    }

    /// Connections that count, and those that do not any more.
    fn read_connections(&self) -> Result<(), TelemetryError> {
        let (mut live, mut idle) = (0, 0);
        let inner = &mut *self.filter.lock();
        let came = inner.census.came()?;
        let now = monotonic_ns();
        let take = |key: ConnectionKey, connection: &Connection| {
            let unused = now.saturating_sub(connection.seen_ns);
            let of = if unused < connection.timeout_ns(key.protocol) { &mut live } else { &mut idle };
            *of += 1;
        };
        batch::each(&inner.connections, CONNECTIONS_MAP, take)?;
        let evicted = inner.census.evicted(came, live + idle)?;
        self.evicted.reset();
        self.evicted.inc_by(evicted);
        self.connections.with_label_values(&["live"]).set(live as i64);
        self.connections.with_label_values(&["idle"]).set(idle as i64);
        Ok(())
    }

    /// What had no room in maps that only programs write.
    fn read_entries(&self) -> Result<(), TelemetryError> {
        let inner = self.filter.lock();
        self.fragments.reset();
        self.fragments.inc_by(inner.census.get(Entries::Fragments)?);
        for (map, kind) in [
            ("fragments", Entries::FragmentsFull),
            ("counts", Entries::CountsFull),
            ("strays", Entries::StraysFull),
        ] {
            self.full.with_label_values(&[map]).inc_by(inner.census.get(kind)?);
        }
        Ok(())
    }

    fn read_cost(&self) {
        self.runs.reset();
        self.run_seconds.reset();
        // A program that was never timed has no cost to tell, and zero would be a wrong one.
        let costs = self.filter.read_cost().into_iter().flatten().filter(|cost| cost.runs > 0);
        for cost in costs {
            self.runs.with_label_values(&[cost.program]).inc_by(cost.runs);
            self.run_seconds.with_label_values(&[cost.program]).inc_by(cost.time.as_secs_f64());
        }
    }
}

impl Collector for FilterCollector {
    fn desc(&self) -> Vec<&Desc> {
        [
            self.drops.desc(),
            self.opened.desc(),
            self.lost.desc(),
            self.ports.desc(),
            self.members.desc(),
            self.connections.desc(),
            self.capacity.desc(),
            self.evicted.desc(),
            self.fragments.desc(),
            self.full.desc(),
            self.runs.desc(),
            self.run_seconds.desc(),
        ]
        .concat()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        self.drops.reset();
        self.opened.reset();
        self.lost.reset();
        self.full.reset();
        if let Err(error) = self.read_connections().and_then(|()| self.read_entries()) {
            tracing::error!("connections are not counted: {}", godwit_protocol::error::chain(&error));
        }
        self.read_cost();
        let inner = self.filter.lock();
        for (key, values) in inner.counts.iter().flat_map(|map| map.iter()).filter_map(Result::ok) {
            let Some(tap) = name_of(key.link) else { continue };
            let direction = if key.direction == INGRESS { "ingress" } else { "egress" };
            let sum = |of: fn(&Counts) -> u64| values.iter().map(of).sum::<u64>();
            self.drops.with_label_values(&[&tap, direction, "rules"]).inc_by(sum(|c| c.dropped));
            self.drops.with_label_values(&[&tap, direction, "malformed"]).inc_by(sum(|c| c.malformed));
            self.opened.with_label_values(&[&tap, direction]).inc_by(sum(|c| c.opened));
            self.lost.with_label_values(&[tap.as_str()]).inc_by(sum(|c| c.lost));
        }
        for (key, values) in inner.strays.iter().filter_map(Result::ok) {
            let Some(tap) = name_of(key.link) else { continue };
            let direction = if key.direction == INGRESS { "ingress" } else { "egress" };
            let sum = |of: fn(&Strays) -> u64| values.iter().map(of).sum::<u64>();
            self.drops.with_label_values(&[&tap, direction, "no_connection"]).inc_by(sum(|s| s.segments));
            self.full.with_label_values(&["connections"]).inc_by(sum(|s| s.full));
        }
        self.ports.set((inner.filters.keys().filter_map(Result::ok).count() / 2) as i64);
        self.members.with_label_values(&["told"]).set(inner.told.len() as i64);
        self.members.with_label_values(&["refused"]).set(inner.refused as i64);
        self.full.with_label_values(&["connections"]);
        self.full.with_label_values(&["filters"]).inc_by(inner.full);
        self.full.with_label_values(&["members"]).inc_by(inner.refused);
        self.capacity.set(inner.capacity.into());
        drop(inner);
        [
            self.drops.collect(),
            self.opened.collect(),
            self.lost.collect(),
            self.ports.collect(),
            self.members.collect(),
            self.connections.collect(),
            self.capacity.collect(),
            self.evicted.collect(),
            self.fragments.collect(),
            self.full.collect(),
            self.runs.collect(),
            self.run_seconds.collect(),
        ]
        .concat()
    }
}
