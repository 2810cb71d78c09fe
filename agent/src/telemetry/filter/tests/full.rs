//! Maps without room: what is counted, and what passes all the same.

use super::packets::{self, udp};
use super::{BPFFS, Bench, GUEST, OTHER, both, rule};
use crate::network::sandbox::in_sandbox;
use crate::telemetry::filter::{FilterCollector, PortFilter, Room};
use aya::maps::PerCpuValues;
use godwit_ebpf_common::filter::{Counts, FILTERS_ENTRIES, FilterKey, Strays};
use godwit_protocol::security::Direction;
use prometheus::core::Collector;
use std::path::Path;
use std::sync::Arc;

/// A series of the filter; none if it is not there.
fn series(filter: &Arc<PortFilter>, name: &str, label: &str) -> Option<f64> {
    let families = FilterCollector::new(filter.clone()).unwrap().collect();
    let family = families.iter().find(|family| family.name() == name)?;
    let is_it = |metric: &&prometheus::proto::Metric| {
        label.is_empty() || metric.get_label().iter().any(|found| found.value() == label)
    };
    let metric = family.get_metric().iter().find(is_it)?;
    let is_counter = name.ends_with("_total");
    Some(if is_counter { metric.get_counter().get_value() } else { metric.get_gauge().get_value() })
}

fn bench(connections: u32) -> (Bench, Arc<PortFilter>) {
    let room = Room { connections, ..Room::default() };
    let filter = Arc::new(PortFilter::open(Path::new(BPFFS), room).unwrap());
    let bench = Bench { filter: filter.clone() };
    bench.tell(both(rule(Direction::Egress)));
    bench.settle();
    (bench, filter)
}

#[test]
fn connections_that_had_to_make_place_are_counted_over_restarts_and_other_sizes() {
    in_sandbox(|| {
        const CONNECTIONS: u32 = 2000;
        let opened = 3 * CONNECTIONS as u16;
        let (one, filter) = bench(CONNECTIONS);
        let evicted =
            |filter: &Arc<PortFilter>| series(filter, "godwit_filter_connections_evicted_total", "").unwrap();
        let there = |filter: &Arc<PortFilter>| {
            ["live", "idle"].map(|state| series(filter, "godwit_filter_connections", state).unwrap())
        };
        for port in 0..100 {
            assert!(one.sends(&udp(GUEST, OTHER, 4000, 1000 + port)));
        }
        assert_eq!((evicted(&filter), there(&filter)[0]), (0.0, 100.0));
        for port in 100..opened {
            assert!(one.sends(&udp(GUEST, OTHER, 4000, 1000 + port)));
        }
        let gone = f64::from(opened) - there(&filter)[0];
        assert!(gone >= f64::from(opened) - f64::from(CONNECTIONS), "{gone}");
        assert_eq!(evicted(&filter), gone);
        assert!(one.sends(&udp(GUEST, OTHER, 4000, 999 + opened)), "the last is known, and none is new");
        assert_eq!(evicted(&filter), gone);
        drop((one, filter));

        let (_, filter) = bench(CONNECTIONS);
        assert_eq!(evicted(&filter), gone, "the next agent goes on");
        drop(filter);
        let (two, filter) = bench(2 * CONNECTIONS);
        assert_eq!(evicted(&filter), gone, "while the old table is still there");
        filter.adopt().unwrap();
        assert_eq!(evicted(&filter), gone, "a larger table has room for all");
        assert!(two.sends(&udp(GUEST, OTHER, 4001, 1)));
        assert_eq!((evicted(&filter), there(&filter)[0]), (gone, f64::from(opened) - gone + 1.0));
    });
}

#[test]
fn what_has_no_room_is_counted_by_map_and_verdicts_stay_as_they_are() {
    in_sandbox(|| {
        let (bench, filter) = bench(1000);
        let cpus = aya::util::nr_cpus().unwrap();
        {
            // As ports have left them.
            let inner = &mut *filter.lock();
            for link in 1000..1000 + FILTERS_ENTRIES {
                let key = FilterKey { link, direction: 0 };
                let counts = PerCpuValues::try_from(vec![Counts::default(); cpus]).unwrap();
                inner.counts[0].insert(key, counts, 0).unwrap();
                let strays = PerCpuValues::try_from(vec![Strays::default(); cpus]).unwrap();
                inner.strays.insert(key, strays, 0).unwrap();
            }
        }
        let full = |map| series(&filter, "godwit_filter_map_full_total", map).unwrap();
        assert_eq!(["counts", "strays", "fragments"].map(full), [0.0; 3]);
        assert!(!bench.gets(&udp(OTHER, GUEST, 1, 2)));
        assert!(!bench.gets(&packets::tcp(OTHER, GUEST, 1, 2, 16)));
        let [first, later] = packets::fragments(GUEST, OTHER, 4000, 53, 99);
        assert!(bench.sends(&first) && bench.sends(&later));
        // One that was refused, one that was opened; one that was a stray.
        assert_eq!(["counts", "strays", "fragments"].map(full), [2.0, 1.0, 0.0]);
        assert_eq!(series(&filter, "godwit_filter_fragments_total", ""), Some(1.0));
    });
}
