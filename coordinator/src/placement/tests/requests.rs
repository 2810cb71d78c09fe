//! What flavors and images may ask for, and the rule that each mistake breaks.

use std::collections::BTreeMap;

use godwit_protocol::instance::CpuTopology;
use proptest::prelude::*;

use super::cpus;
use crate::placement::guest::{CpuPolicy, EmulatorPolicy, PageSize, ThreadPolicy};
use crate::placement::request::Request;
use crate::placement::spec::{SpecError, SpecRule};

fn map(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

/// Resolves 4 vCPUs and 1024 MiB.
fn resolve(flavor: &[(&str, &str)], image: &[(&str, &str)]) -> Result<Request, SpecError> {
    Request::from_specs(4, 1024, &map(flavor), &map(image))
}

/// The rule that a request breaks.
fn broken(flavor: &[(&str, &str)], image: &[(&str, &str)]) -> SpecRule {
    match resolve(flavor, image) {
        Ok(request) => panic!("{flavor:?} {image:?} was accepted as {request:?}"),
        Err(error) => error.rule,
    }
}

#[test]
fn a_plain_flavor_floats() {
    let request = resolve(&[("quota:cpu_shares", "10"), ("hw:watchdog_action", "reset")], &[]).unwrap();
    assert_eq!(request.guest, None);
    assert_eq!(request.topology, CpuTopology { sockets: 4, cores: 1, threads: 1 });
}

#[test]
fn cells_split_evenly_unless_maps_say_otherwise() {
    let even = resolve(&[("hw:numa_nodes", "2")], &[]).unwrap().guest.unwrap();
    assert_eq!(even.cells.iter().map(|cell| &cell.shared).collect::<Vec<_>>(), [&cpus("0-1"), &cpus("2-3")]);
    assert!(even.cells.iter().all(|cell| cell.memory_mib == 512));
    let specs = [
        ("hw:numa_nodes", "2"),
        ("hw:numa_cpus.0", "0,2-3"),
        ("hw:numa_cpus.1", "1"),
        ("hw:numa_mem.0", "1000"),
        ("hw:numa_mem.1", "24"),
    ];
    let mapped = resolve(&specs, &[]).unwrap().guest.unwrap();
    let shares: Vec<_> = mapped.cells.iter().map(|cell| (cell.shared.to_string(), cell.memory_mib)).collect();
    assert_eq!(shares, [("0,2-3".to_owned(), 1000), ("1".to_owned(), 24)]);
}

#[test]
fn dedicated_and_mixed_policies_split_the_vcpus() {
    let dedicated = resolve(&[("hw:cpu_policy", "dedicated")], &[]).unwrap().guest.unwrap();
    assert_eq!((&dedicated.cells[0].dedicated, dedicated.cells[0].shared.len()), (&cpus("0-3"), 0));
    for mask in ["1-3", "^0"] {
        let specs = [("hw:cpu_policy", "mixed"), ("hw:cpu_dedicated_mask", mask)];
        let mixed = resolve(&specs, &[]).unwrap().guest.unwrap();
        assert_eq!((&mixed.cells[0].dedicated, &mixed.cells[0].shared), (&cpus("1-3"), &cpus("0")));
    }
    let realtime = [("hw:cpu_policy", "mixed"), ("hw:cpu_realtime", "yes"), ("hw:cpu_realtime_mask", "2-3")];
    let request = resolve(&realtime, &[("hw_cpu_realtime_mask", "3")]).unwrap();
    assert_eq!(request.realtime_vcpus, cpus("3"), "the image's mask goes before the flavor's");
    assert_eq!(request.guest.unwrap().cells[0].dedicated, cpus("3"));
}

#[test]
fn resources_and_traits_name_policies_too() {
    let specs = [("resources:PCPU", "4"), ("trait:HW_CPU_HYPERTHREADING", "forbidden")];
    let cell = &resolve(&specs, &[]).unwrap().guest.unwrap().cells[0];
    assert_eq!(
        (cell.cpu_policy, cell.thread_policy),
        (Some(CpuPolicy::Dedicated), Some(ThreadPolicy::Isolate))
    );
    let isolated = [("resources1:PCPU", "5"), ("hw:emulator_threads_policy", "isolate")];
    let guest = resolve(&isolated, &[]).unwrap().guest.unwrap();
    assert_eq!(guest.emulator_policy, Some(EmulatorPolicy::Isolate));
    assert_eq!((guest.emulator_cpus(0), guest.emulator_cpus(1)), (1, 0));
}

#[test]
fn page_sizes_are_read_in_every_form() {
    for (text, size) in [
        ("small", PageSize::Small),
        ("large", PageSize::Large),
        ("any", PageSize::Any),
        ("2048", PageSize::Kib(2048)),
        ("2MB", PageSize::Kib(2048)),
        ("2MiB", PageSize::Kib(2048)),
        ("16384Kb", PageSize::Kib(2048)),
        ("16384Kbit", PageSize::Kib(2048)),
        ("2097152B", PageSize::Kib(2048)),
        ("1GB", PageSize::Kib(1 << 20)),
        (".5GB", PageSize::Kib(1 << 19)),
    ] {
        let guest = resolve(&[("hw:mem_page_size", text)], &[]).unwrap().guest.unwrap();
        assert_eq!(guest.cells[0].page_size, Some(size), "{text}");
    }
    for text in
        ["0", "2M", "2kB", "-2MB", "2 MB", "MB", "iB", "1.MB", "1.2.3MB", "1000B", "²", "1e3KB", "huge"]
    {
        assert_eq!(broken(&[("hw:mem_page_size", text)], &[]), SpecRule::BadPageSize, "{text}");
    }
    // More than any machine has, and no panic.
    let much = "9".repeat(60) + "EB";
    assert_eq!(broken(&[("hw:mem_page_size", &much)], &[]), SpecRule::BadPageSize);
}

#[test]
fn an_image_chooses_only_where_the_flavor_leaves_it_open() {
    let size = |flavor, image| {
        let request = resolve(&[("hw:mem_page_size", flavor)], &[("hw_mem_page_size", image)]).unwrap();
        request.guest.unwrap().cells[0].page_size
    };
    assert_eq!(size("any", "2048"), Some(PageSize::Kib(2048)));
    assert_eq!(size("large", "small"), Some(PageSize::Small));
    let policy = |flavor, image| {
        let request = resolve(&[("hw:cpu_policy", flavor)], &[("hw_cpu_policy", image)]).unwrap();
        request.guest.map(|guest| guest.cells[0].cpu_policy)
    };
    assert_eq!(policy("dedicated", "shared"), Some(Some(CpuPolicy::Dedicated)));
    let specs = [("hw:cpu_policy", "dedicated"), ("hw:cpu_thread_policy", "prefer")];
    let guest = resolve(&specs, &[("hw_cpu_thread_policy", "require")]).unwrap().guest.unwrap();
    assert_eq!(guest.cells[0].thread_policy, Some(ThreadPolicy::Prefer), "an image does not tighten prefer");
}

#[test]
fn the_image_conflicts_have_their_own_rules() {
    let dedicated = ("hw:cpu_policy", "dedicated");
    for (rule, flavor, image) in [
        (SpecRule::ImageOverrideForbidden, &[("hw:numa_nodes", "1")][..], ("hw_numa_nodes", "1")),
        (SpecRule::ImageOverrideForbidden, &[("hw:numa_nodes", "1")], ("hw_numa_nodes", "-1")),
        (SpecRule::BadNodeCount, &[], ("hw_numa_nodes", "-1")),
        (SpecRule::BadCpuPolicy, &[("hw:cpu_policy", "mine")], ("hw_numa_nodes", "-1")),
        (SpecRule::PageSizeForbidden, &[], ("hw_mem_page_size", "2048")),
        (SpecRule::PageSizeForbidden, &[("hw:mem_page_size", "2048")], ("hw_mem_page_size", "2048")),
        (SpecRule::ImageCpuPolicyConflict, &[("hw:cpu_policy", "shared")], ("hw_cpu_policy", "mixed")),
        (SpecRule::ImageCpuPolicyConflict, &[("hw:cpu_policy", "mixed")], ("hw_cpu_policy", "dedicated")),
        (
            SpecRule::ImageThreadPolicyConflict,
            &[dedicated, ("hw:cpu_thread_policy", "require")],
            ("hw_cpu_thread_policy", "isolate"),
        ),
        (SpecRule::ImageMaxOverFlavorMax, &[("hw:cpu_max_sockets", "2")], ("hw_cpu_max_sockets", "4")),
        (SpecRule::ImageTopologyOverMax, &[("hw:cpu_max_sockets", "2")], ("hw_cpu_sockets", "4")),
        (
            SpecRule::LockedMemoryConflict,
            &[("hw:locked_memory", "true"), ("hw:mem_page_size", "any")],
            ("hw_locked_memory", "false"),
        ),
    ] {
        assert_eq!(broken(flavor, &[image]), rule, "{flavor:?} {image:?}");
    }
}

#[test]
fn every_bad_flavor_is_refused_by_its_rule() {
    let (dedicated, mixed) = (("hw:cpu_policy", "dedicated"), ("hw:cpu_policy", "mixed"));
    let two = ("hw:numa_nodes", "2");
    let manual = |cpus0, cpus1, mem0, mem1| {
        vec![
            two,
            ("hw:numa_cpus.0", cpus0),
            ("hw:numa_cpus.1", cpus1),
            ("hw:numa_mem.0", mem0),
            ("hw:numa_mem.1", mem1),
        ]
    };
    for (rule, flavor) in [
        (SpecRule::BadNodeCount, vec![("hw:numa_nodes", "0")]),
        (SpecRule::BadNodeCount, vec![("hw:numa_nodes", "-1")]),
        (SpecRule::BadNodeCount, vec![("hw:numa_nodes", "٢")]),
        (SpecRule::BadNodeCount, vec![("hw:numa_nodes", "1.0")]),
        (SpecRule::AsymmetricSplit, vec![("hw:numa_nodes", "3")]),
        (SpecRule::AsymmetricSplit, vec![("hw:numa_nodes", "10000")]),
        (SpecRule::AsymmetricSplit, vec![("hw:numa_nodes", "99999999999999999999999999")]),
        (SpecRule::IncompleteMap, vec![two, ("hw:numa_cpus.0", "0-3")]),
        (SpecRule::IncompleteMap, vec![two, ("hw:numa_cpus.0", "0-3"), ("hw:numa_mem.0", "1024")]),
        (SpecRule::CpuOutOfRange, manual("0-2", "3-4", "512", "512")),
        (SpecRule::CpuDuplicate, manual("0-2", "2-3", "512", "512")),
        (SpecRule::CpuUnassigned, manual("0-1", "2", "512", "512")),
        (SpecRule::MemoryMismatch, manual("0-1", "2-3", "512", "511")),
        (SpecRule::MemoryMismatch, manual("0-1", "2-3", "1024", "0")),
        (SpecRule::MemoryMismatch, manual("0-1", "2-3", "18446744073709551615", "1025")),
        (SpecRule::InvalidRequest, manual("0-1", "2-3", "-512", "1536")),
        (SpecRule::InvalidCpuList, manual("0-1", "x", "512", "512")),
        (SpecRule::BadCpuPolicy, vec![("hw:cpu_policy", "exclusive")]),
        (SpecRule::BadThreadPolicy, vec![dedicated, ("hw:cpu_thread_policy", "always")]),
        (SpecRule::BadEmulatorPolicy, vec![dedicated, ("hw:emulator_threads_policy", "pinned")]),
        (SpecRule::ThreadPolicyNeedsDedicated, vec![("hw:cpu_thread_policy", "isolate")]),
        (SpecRule::EmulatorIsolateNeedsDedicated, vec![("hw:emulator_threads_policy", "isolate")]),
        (SpecRule::DedicatedMaskNeedsMixed, vec![("hw:cpu_dedicated_mask", "1")]),
        (SpecRule::DedicatedMaskNeedsMixed, vec![dedicated, ("hw:cpu_dedicated_mask", "1")]),
        (SpecRule::MixedNeedsExactlyOneMask, vec![mixed]),
        (
            SpecRule::MixedNeedsExactlyOneMask,
            vec![
                mixed,
                ("hw:cpu_dedicated_mask", "1"),
                ("hw:cpu_realtime", "1"),
                ("hw:cpu_realtime_mask", "1"),
            ],
        ),
        (SpecRule::BadDedicatedMask, vec![mixed, ("hw:cpu_dedicated_mask", "0-3")]),
        (SpecRule::BadDedicatedMask, vec![mixed, ("hw:cpu_dedicated_mask", "4")]),
        (SpecRule::BadDedicatedMask, vec![mixed, ("hw:cpu_dedicated_mask", "^0-3")]),
        (SpecRule::RealtimeNeedsDedicated, vec![("hw:cpu_realtime", "1"), ("hw:cpu_realtime_mask", "1")]),
        (SpecRule::BadRealtimeMask, vec![dedicated, ("hw:cpu_realtime", "1")]),
        (SpecRule::BadRealtimeMask, vec![dedicated, ("hw:cpu_realtime", "1"), ("hw:cpu_realtime_mask", "4")]),
        (SpecRule::LockMemoryNeedsPageSize, vec![("hw:locked_memory", "true")]),
        (
            SpecRule::TopologyImpossible,
            vec![("hw:cpu_max_sockets", "1"), ("hw:cpu_max_cores", "1"), ("hw:cpu_max_threads", "1")],
        ),
        (SpecRule::InvalidRequest, vec![("hw:cpu_sockets", "two")]),
        (SpecRule::InvalidRequest, vec![("hw:cpu_realtime", "perhaps")]),
        (SpecRule::InvalidRequest, vec![dedicated, ("resources:PCPU", "4")]),
        (SpecRule::InvalidRequest, vec![("resources:PCPU", "3")]),
        (SpecRule::InvalidRequest, vec![("resources:PCPU", "4"), ("resources:VCPU", "4")]),
        (
            SpecRule::InvalidRequest,
            vec![dedicated, ("hw:cpu_thread_policy", "prefer"), ("trait:HW_CPU_HYPERTHREADING", "required")],
        ),
        (SpecRule::UnsupportedKey, vec![("hw:cpu_polcy", "dedicated")]),
        (SpecRule::UnsupportedKey, vec![("hw:pmem", "6GB")]),
        (SpecRule::UnsupportedKey, vec![("hw:numa_cpu.0", "1")]),
        (SpecRule::UnsupportedKey, vec![("resources:CUSTOM_GPU", "1")]),
        (SpecRule::UnsupportedKey, vec![("trait:CUSTOM_FAST", "required")]),
        (SpecRule::UnsupportedKey, vec![("pci_passthrough:alias", "nic:1")]),
    ] {
        let error = resolve(&flavor, &[]).expect_err(&format!("{flavor:?} was accepted"));
        assert_eq!(error.rule, rule, "{flavor:?}: {error}");
        let text = error.to_string();
        assert!(text.contains(rule.name()) && text.contains(&error.key), "{text}");
    }
}

/// Values that are nothing, or no number.
const NOTHING: [&str; 5] = ["", " ", "\t\n", "\u{a0}", "\u{200b}"];

#[test]
fn a_value_that_is_nothing_is_refused_whatever_the_key_and_whoever_says_it() {
    for (key, by_image, _) in crate::placement::values::KEYS {
        let index = if matches!(key, "numa_cpus" | "numa_mem") { ".0" } else { "" };
        for value in NOTHING {
            let error = resolve(&[(&format!("hw:{key}{index}"), value)], &[]).unwrap_err();
            assert_eq!((error.key.as_str(), error.value.as_str()), (&*format!("hw:{key}{index}"), value));
            if by_image {
                let error = resolve(&[], &[(&format!("hw_{key}{index}"), value)]).unwrap_err();
                assert_eq!((error.key.as_str(), error.value.as_str()), (&*format!("hw_{key}{index}"), value));
            }
        }
    }
    for key in ["resources:VCPU", "resources2:PCPU", "trait:HW_CPU_HYPERTHREADING"] {
        for value in NOTHING {
            assert_eq!(broken(&[(key, value)], &[]), SpecRule::InvalidRequest, "{key}={value:?}");
        }
    }
}

#[test]
fn what_an_older_version_took_with_empty_values_still_moves() {
    let request =
        Request::accepted(4, 1024, &map(&[("hw:cpu_policy", "")]), &map(&[("hw_cpu_policy", "dedicated")]));
    assert_eq!(request.unwrap().guest.unwrap().cells[0].cpu_policy, Some(CpuPolicy::Dedicated));
}

#[test]
fn numbers_are_plain_digits_of_a_size_that_can_be() {
    let strange = ["-1", "+1", "1_0", "0x1", "1.0", "1e1", "٢", "２", "²", "½", "nine"];
    for (key, rule) in [
        ("numa_nodes", SpecRule::BadNodeCount),
        ("cpu_sockets", SpecRule::InvalidRequest),
        ("cpu_max_threads", SpecRule::InvalidRequest),
        ("mem_page_size", SpecRule::BadPageSize),
        ("numa_mem.0", SpecRule::InvalidRequest),
    ] {
        for value in strange {
            assert_eq!(broken(&[(&format!("hw:{key}"), value)], &[]), rule, "hw:{key}={value}");
        }
    }
    for value in ["9223372036854775808", "18446744073709551616", "340282366920938463463374607431768211456"] {
        assert_eq!(broken(&[("hw:mem_page_size", value)], &[]), SpecRule::BadPageSize, "{value}");
        assert_eq!(broken(&[("hw:numa_nodes", value)], &[]), SpecRule::AsymmetricSplit, "{value}");
        let map = [("hw:numa_nodes", "1"), ("hw:numa_cpus.0", value), ("hw:numa_mem.0", "1024")];
        assert_eq!(broken(&map, &[]), SpecRule::InvalidCpuList, "{value}");
        let map = [("hw:numa_nodes", "1"), ("hw:numa_cpus.0", "0-3"), ("hw:numa_mem.0", value)];
        assert!(resolve(&map, &[]).is_err(), "{value}");
    }
    assert_eq!(broken(&[("hw:mem_page_size", "33554432")], &[]), SpecRule::BadPageSize, "32 GiB");
    for key in ["hw:cpu_sockets", "hw:cpu_max_cores"] {
        assert_eq!(broken(&[(key, "0")], &[]), SpecRule::InvalidRequest, "{key}");
    }
    for part in ["sockets", "cores", "threads"] {
        let (by_flavor, by_image) = (format!("hw:cpu_{part}"), format!("hw_cpu_{part}"));
        assert_eq!(
            broken(&[(&by_flavor, "5")], &[]),
            SpecRule::TopologyImpossible,
            "more than there are vCPUs"
        );
        assert_eq!(broken(&[], &[(&by_image, "9223372036854775808")]), SpecRule::ImageTopologyOverMax);
        assert!(resolve(&[(&by_flavor, "5")], &[("hw_cpu_sockets", "4")]).is_ok(), "the image's goes first");
    }
}

#[test]
fn a_map_that_nobody_would_read_is_refused() {
    let cell = |index: &str| format!("hw:numa_cpus{index}");
    for index in
        [".01", ".00", ".+0", ".-1", ".x", ".", "", ".128", ".99999999999999999999", ".٠", ". 0", ".0.0"]
    {
        let key = cell(index);
        let error =
            resolve(&[("hw:numa_nodes", "1"), (&key, "0-3"), ("hw:numa_mem.0", "1024")], &[]).unwrap_err();
        assert_eq!((error.key.as_str(), error.rule), (key.as_str(), SpecRule::IncompleteMap), "{index}");
    }
    let gap = [
        ("hw:numa_nodes", "1"),
        ("hw:numa_cpus.0", "0-3"),
        ("hw:numa_mem.0", "1024"),
        ("hw:numa_cpus.2", "0-3"),
    ];
    assert_eq!(broken(&gap, &[]), SpecRule::IncompleteMap);
    let of_none = [("hw:numa_cpus.0", "0-3"), ("hw:numa_mem.0", "1024")];
    assert_eq!(broken(&of_none, &[]), SpecRule::IncompleteMap, "nothing asks for cells");
    assert_eq!(broken(&[], &[("hw_numa_cpus.0", "0-3")]), SpecRule::IncompleteMap);
}

#[test]
fn a_key_that_only_looks_like_another_is_refused() {
    for (key, by_image) in [
        ("hw: cpu_policy", false),
        ("HW:cpu_policy", false),
        (" hw:cpu_policy", false),
        ("hw:CPU_POLICY", false),
        ("hw:numa_nodes.0", false),
        ("hw_cpu_policy", false),
        ("hw:cpu_policy", true),
    ] {
        let pairs = [(key, "dedicated")];
        let (flavor, image): (&[_], &[_]) = if by_image { (&[], &pairs) } else { (&pairs, &[]) };
        assert_eq!(broken(flavor, image), SpecRule::UnsupportedKey, "{key}");
    }
    let both = [("trait:HW_CPU_HYPERTHREADING", "required"), ("trait1:HW_CPU_HYPERTHREADING", "forbidden")];
    let dedicated = ("hw:cpu_policy", "dedicated");
    assert_eq!(broken(&[dedicated, both[0], both[1]], &[]), SpecRule::InvalidRequest);
    assert_eq!(
        broken(&[dedicated], &[(both[0].0, "forbidden")]),
        SpecRule::InvalidRequest,
        "only flavors forbid"
    );
}

#[test]
fn what_only_a_flavor_may_say_is_refused_from_an_image() {
    for key in ["hw_cpu_dedicated_mask", "hw_emulator_threads_policy", "hw_cpu_realtime", "hw_numa_mempolicy"]
    {
        assert_eq!(broken(&[], &[(key, "1")]), SpecRule::UnsupportedKey, "{key}");
    }
    assert!(
        resolve(&[], &[("hw_disk_bus", "virtio"), ("os_type", "linux"), ("trait:X", "forbidden")]).is_ok()
    );
}

#[test]
fn absurd_sizes_are_refused() {
    let none = BTreeMap::new();
    for (vcpus, memory_mib) in [(0, 1), (u32::MAX, 1), (65_536, 1), (1, 0)] {
        let error = Request::from_specs(vcpus, memory_mib, &none, &none).unwrap_err();
        assert_eq!(error.rule, SpecRule::InvalidRequest);
    }
    assert!(
        Request::from_specs(1, u64::MAX, &none, &none).is_ok(),
        "no host will have it, but it can be said"
    );
}

#[test]
fn licences_that_count_sockets_get_their_maximum() {
    let topology = |flavor: &[(&str, &str)], image: &[(&str, &str)]| {
        let CpuTopology { sockets, cores, threads } = resolve(flavor, image).unwrap().topology;
        (sockets, cores, threads)
    };
    assert_eq!(topology(&[("hw:cpu_max_sockets", "1")], &[]), (1, 4, 1));
    assert_eq!(topology(&[("hw:cpu_max_sockets", "4")], &[("hw_cpu_max_sockets", "2")]), (2, 2, 1));
    assert_eq!(topology(&[("hw:cpu_threads", "2")], &[]), (2, 1, 2));
    assert_eq!(topology(&[("hw:cpu_cores", "4")], &[("hw_cpu_sockets", "2")]), (2, 2, 1));
    assert_eq!(topology(&[("hw:cpu_cores", "4"), ("hw:cpu_max_cores", "2")], &[]), (4, 1, 1));
}

proptest! {
    #[test]
    fn no_request_makes_the_rules_panic(
        vcpus in prop_oneof![0..20u32, any::<u32>()],
        memory_mib in prop_oneof![0..4096u64, any::<u64>()],
        flavor in specs("hw:"),
        image in specs("hw_"),
    ) {
        let accepted = Request::accepted(vcpus, memory_mib, &flavor, &image);
        if let Ok(request) = Request::from_specs(vcpus, memory_mib, &flavor, &image) {
            prop_assert_eq!(accepted.as_ref(), Ok(&request));
        }
        if let Ok(request) = accepted {
            let topology = request.topology;
            prop_assert_eq!(topology.sockets * topology.cores * topology.threads, vcpus);
            if let Some(guest) = request.guest {
                let count = |cell: &crate::placement::guest::GuestCell| cell.shared.len() + cell.dedicated.len();
                prop_assert_eq!(guest.cells.iter().map(count).sum::<u32>(), vcpus);
                prop_assert_eq!(guest.cells.iter().map(|cell| cell.memory_mib).sum::<u64>(), memory_mib);
            }
        }
    }
}

fn specs(prefix: &'static str) -> impl Strategy<Value = BTreeMap<String, String>> {
    let key = prop::sample::select(vec![
        "numa_nodes",
        "numa_cpus.0",
        "numa_cpus.1",
        "numa_mem.0",
        "numa_mem.1",
        "cpu_policy",
        "cpu_thread_policy",
        "cpu_dedicated_mask",
        "cpu_realtime",
        "cpu_realtime_mask",
        "cpu_sockets",
        "cpu_max_cores",
        "mem_page_size",
        "emulator_threads_policy",
        "locked_memory",
    ]);
    let value = prop_oneof![
        prop::sample::select(vec![
            "0",
            "1",
            "2",
            "-1",
            "0-3",
            "^0",
            "^0-99",
            "dedicated",
            "mixed",
            "shared",
            "isolate",
            "require",
            "any",
            "large",
            "2MB",
            "true",
            "",
            "512",
            "18446744073709551616",
            "65535",
            "4294967295",
        ])
        .prop_map(str::to_owned),
        "\\PC{0,8}",
    ];
    proptest::collection::btree_map(key.prop_map(move |key| format!("{prefix}{key}")), value, 0..6)
}
