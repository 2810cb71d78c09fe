//! What a host's aggregates say of it, and how a wanted value is compared with theirs: Nova's operators.

use std::collections::{BTreeMap, BTreeSet};

/// The zone of hosts that no aggregate puts into another.
pub const DEFAULT_ZONE: &str = "nova";

/// The metadata key that puts an aggregate's hosts into a zone.
pub const ZONE_KEY: &str = "availability_zone";

/// Beginning of the metadata keys that keep an aggregate's hosts to some projects.
pub const PROJECT_KEY: &str = "filter_tenant_id";

/// What the aggregates of a host say of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Labels {
    /// Its availability zone.
    pub zone: String,
    /// Metadata: of each key, every aggregate's value.
    pub metadata: BTreeMap<String, BTreeSet<String>>,
    /// Projects that it is kept to; none keeps it to nobody.
    pub projects: BTreeSet<String>,
}

impl Default for Labels {
    fn default() -> Self {
        Self { zone: DEFAULT_ZONE.to_owned(), metadata: BTreeMap::new(), projects: BTreeSet::new() }
    }
}

impl Labels {
    /// From the metadata of each aggregate that a host is in.
    pub fn of<'m>(aggregates: impl IntoIterator<Item = &'m BTreeMap<String, String>>) -> Self {
        let mut labels = Self::default();
        for metadata in aggregates {
            for (key, value) in metadata {
                if key == ZONE_KEY {
                    labels.zone.clone_from(value);
                }
                if key.starts_with(PROJECT_KEY) {
                    labels.projects.extend(value.split(',').map(|project| project.trim().to_owned()));
                }
                labels.metadata.entry(key.clone()).or_default().insert(value.clone());
            }
        }
        labels
    }
}

/// Whether a value is as wanted. `wanted` is a value, or begins with an operator: `=`, `==`, `!=`, `<=`, `>=` for
/// numbers, `s==`, `s!=`, `s<`, `s<=`, `s>`, `s>=` for texts, `<in>`, `<all-in>`, `<or> A <or> B`.
pub fn matches(value: &str, wanted: &str) -> bool {
    let mut words = wanted.split_whitespace();
    let (Some(operator), rest) = (words.next(), words.collect::<Vec<_>>()) else { return value.is_empty() };
    let first = rest.first().copied().unwrap_or_default();
    let numbers = || Some((value.trim().parse::<f64>().ok()?, first.parse::<f64>().ok()?));
    let compare = |ok: fn(f64, f64) -> bool| numbers().is_some_and(|(have, need)| ok(have, need));
    match operator {
        // `=` has always meant "at least".
        "=" | ">=" => compare(|have, need| have >= need),
        "<=" => compare(|have, need| have <= need),
        "==" => compare(|have, need| have == need),
        "!=" => compare(|have, need| have != need),
        "s==" => value == first,
        "s!=" => value != first,
        "s<" => value < first,
        "s<=" => value <= first,
        "s>" => value > first,
        "s>=" => value >= first,
        "<in>" => value.contains(first),
        "<all-in>" => rest.iter().all(|word| value.contains(word)),
        "<or>" => rest.iter().filter(|word| **word != "<or>").any(|word| *word == value),
        _ => value == wanted,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wanted_values_compare_as_their_operators_say() {
        for (value, wanted, expected) in [
            ("ssd", "ssd", true),
            ("ssd", "hdd", false),
            ("8", ">= 4", true),
            ("8", "= 9", false),
            ("8", "== 8", true),
            ("x", "== 8", false),
            ("8", "!= 8", false),
            ("8", "<= 8", true),
            ("b", "s> a", true),
            ("b", "s== b", true),
            ("abc", "<in> bc", true),
            ("abc", "<all-in> a c", true),
            ("abc", "<all-in> a d", false),
            ("b", "<or> a <or> b", true),
            ("c", "<or> a <or> b", false),
            ("", "", true),
        ] {
            assert_eq!(matches(value, wanted), expected, "{value} {wanted}");
        }
    }

    #[test]
    fn aggregates_add_up() {
        let metadata = |pairs: &[(&str, &str)]| {
            pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect::<BTreeMap<_, _>>()
        };
        let (a, b) = (
            metadata(&[("disk", "ssd"), (ZONE_KEY, "z1")]),
            metadata(&[("disk", "nvme"), ("filter_tenant_id2", "p1, p2")]),
        );
        let labels = Labels::of([&a, &b]);
        assert_eq!(labels.zone, "z1");
        assert_eq!(labels.metadata["disk"], BTreeSet::from(["nvme".to_owned(), "ssd".to_owned()]));
        assert_eq!(labels.projects, BTreeSet::from(["p1".to_owned(), "p2".to_owned()]));
        assert_eq!(Labels::of([]).zone, DEFAULT_ZONE);
    }
}
