//! Series that are written anew for each scrape from what the kernel has counted, in Prometheus' text format
//! (Exposition formats, version 0.0.4). There are tens of thousands on a host with many networks: they do not pass
//! through Prometheus' own types, a sort and an encoder.

use crate::metrics::Text;
use std::fmt::{Display, Write as _};

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
    /// A scrape's values of it.
    pub(super) fn family(&self) -> Family {
        Family { series: *self, lines: String::new(), labels: String::new() }
    }

    /// Writes what stands before its values.
    pub(super) fn head(&self, text: &mut Text<'_>) {
        let kind = if self.is_counter { "counter" } else { "gauge" };
        for part in ["# HELP ", self.name, " ", self.help, "\n# TYPE ", self.name, " ", kind, "\n"] {
            text.push(part);
        }
    }
}

/// One scrape's values of a series.
pub(super) struct Family {
    series: Series,
    lines: String,
    labels: String,
}

impl Family {
    /// Adds a value; `labels` has as many as the series.
    pub(super) fn push(&mut self, labels: &[&str], value: impl Display) {
        let mut block = std::mem::take(&mut self.labels);
        block.clear();
        write_labels(&mut block, self.series.labels, labels);
        self.push_under(&block, value);
        self.labels = block;
    }

    /// Adds a value under labels that [`write_labels`] has written.
    pub(super) fn push_under(&mut self, labels: &str, value: impl Display) {
        self.lines.push_str(self.series.name);
        if !labels.is_empty() {
            self.lines.push('{');
            self.lines.push_str(labels);
            self.lines.push('}');
        }
        // Writing to a string does not fail.
        let _ = writeln!(self.lines, " {value}");
    }

    /// Writes what was added, if there is any.
    pub(super) fn finish(self, text: &mut Text<'_>) {
        if !self.lines.is_empty() {
            self.series.head(text);
            text.push(&self.lines);
        }
    }
}

/// Writes labels as they stand between braces. Names that a host gives to things are the only values.
pub(super) fn write_labels(block: &mut String, names: &[&str], values: &[&str]) {
    for (name, value) in names.iter().zip(values) {
        if !block.is_empty() {
            block.push(',');
        }
        block.push_str(name);
        block.push_str("=\"");
        for part in value.split_inclusive(['\\', '"', '\n']) {
            let plain = part.trim_end_matches(['\\', '"', '\n']);
            block.push_str(plain);
            match part[plain.len()..].chars().next() {
                Some('\n') => block.push_str("\\n"),
                Some(special) => block.extend(['\\', special]),
                None => {}
            }
        }
        block.push('"');
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_family_is_written_as_prometheus_reads_it_and_an_empty_one_not_at_all() {
        let series = counter("godwit_a_total", "What it is.", &["vni", "tap"]);
        let mut written = String::new();
        let mut take = |piece: String| written.push_str(&piece);
        let mut text = Text::new(&mut take);
        series.family().finish(&mut text);
        let mut family = series.family();
        family.push(&["1001", "gwt1"], 7_u64);
        family.push(&["a\\b", "c\"d\ne"], 0.5);
        family.finish(&mut text);
        gauge("godwit_b", "Without labels.", &[]).family().finish(&mut text);
        let mut bare = gauge("godwit_b", "Without labels.", &[]).family();
        bare.push(&[], 3);
        bare.finish(&mut text);
        drop(text);
        let expected = "# HELP godwit_a_total What it is.\n# TYPE godwit_a_total counter\n\
                        godwit_a_total{vni=\"1001\",tap=\"gwt1\"} 7\n\
                        godwit_a_total{vni=\"a\\\\b\",tap=\"c\\\"d\\ne\"} 0.5\n\
                        # HELP godwit_b Without labels.\n# TYPE godwit_b gauge\ngodwit_b 3\n";
        assert_eq!(written, expected);
    }
}
