//! The filter's counters for `/metrics`.

use super::PortFilter;
use crate::telemetry::taps::name_of;
use godwit_ebpf_common::filter::{Counts, INGRESS};
use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{IntCounterVec, IntGauge, IntGaugeVec, Opts};
use std::sync::Arc;

/// Reads the maps when it is scraped.
pub struct FilterCollector {
    filter: Arc<PortFilter>,
    drops: IntCounterVec,
    opened: IntCounterVec,
    lost: IntCounterVec,
    ports: IntGauge,
    members: IntGaugeVec,
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
        })
    }
}

impl Collector for FilterCollector {
    fn desc(&self) -> Vec<&Desc> {
        [self.drops.desc(), self.opened.desc(), self.lost.desc(), self.ports.desc(), self.members.desc()]
            .concat()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        self.drops.reset();
        self.opened.reset();
        self.lost.reset();
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
        self.ports.set((inner.filters.keys().filter_map(Result::ok).count() / 2) as i64);
        self.members.with_label_values(&["told"]).set(inner.told.len() as i64);
        self.members.with_label_values(&["refused"]).set(inner.refused as i64);
        drop(inner);
        [
            self.drops.collect(),
            self.opened.collect(),
            self.lost.collect(),
            self.ports.collect(),
            self.members.collect(),
        ]
        .concat()
    }
}
