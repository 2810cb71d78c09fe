//! Series that are made anew for each scrape from what the kernel has counted. Cheaper than Prometheus' own vectors,
//! which look each series up: there are tens of thousands on a host with many networks.

use prometheus::core::Desc;
use prometheus::proto::{Counter, Gauge, LabelPair, Metric, MetricFamily, MetricType};
use std::collections::HashMap;

/// A name, what it means, and its labels.
#[derive(Clone, Copy, Debug)]
pub(super) struct Series {
    pub(super) name: &'static str,
    pub(super) help: &'static str,
    pub(super) labels: &'static [&'static str],
    pub(super) is_counter: bool,
}

pub(super) const fn counter(
    name: &'static str,
    help: &'static str,
    labels: &'static [&'static str],
) -> Series {
    Series { name, help, labels, is_counter: true }
}

pub(super) const fn gauge(name: &'static str, help: &'static str, labels: &'static [&'static str]) -> Series {
    Series { name, help, labels, is_counter: false }
}

impl Series {
    /// What a registry wants to know of it.
    pub(super) fn desc(&self) -> Result<Desc, prometheus::Error> {
        let labels = self.labels.iter().map(|label| (*label).to_owned()).collect();
        Desc::new(self.name.to_owned(), self.help.to_owned(), labels, HashMap::new())
    }

    /// A scrape's values of it.
    pub(super) fn family(&self) -> Family {
        Family { series: *self, metrics: Vec::new() }
    }
}

/// One scrape's values of a series.
pub(super) struct Family {
    series: Series,
    metrics: Vec<Metric>,
}

impl Family {
    /// Adds a value; `labels` has as many as the series.
    pub(super) fn push(&mut self, labels: &[&str], value: f64) {
        let pairs = self.series.labels.iter().zip(labels).map(|(name, value)| {
            let mut pair = LabelPair::default();
            pair.set_name((*name).to_owned());
            pair.set_value((*value).to_owned());
            pair
        });
        let mut metric = Metric::from_label(pairs.collect());
        if self.series.is_counter {
            let mut counter = Counter::default();
            counter.set_value(value);
            metric.set_counter(counter);
        } else {
            let mut gauge = Gauge::default();
            gauge.set_value(value);
            metric.set_gauge(gauge);
        }
        self.metrics.push(metric);
    }

    pub(super) fn finish(self) -> MetricFamily {
        let mut family = MetricFamily::default();
        family.set_name(self.series.name.to_owned());
        family.set_help(self.series.help.to_owned());
        family.set_field_type(if self.series.is_counter { MetricType::COUNTER } else { MetricType::GAUGE });
        family.set_metric(self.metrics);
        family
    }
}
