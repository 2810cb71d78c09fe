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
    assert_eq!(policy("", "dedicated"), Some(Some(CpuPolicy::Dedicated)), "an empty value is not set");
    let specs = [("hw:cpu_policy", "dedicated"), ("hw:cpu_thread_policy", "prefer")];
    let guest = resolve(&specs, &[("hw_cpu_thread_policy", "require")]).unwrap().guest.unwrap();
    assert_eq!(guest.cells[0].thread_policy, Some(ThreadPolicy::Prefer), "an image does not tighten prefer");
}

#[test]
fn the_image_conflicts_have_their_own_rules() {
    let dedicated = ("hw:cpu_policy", "dedicated");
    for (rule, flavor, image) in [
        (SpecRule::ImageOverrideForbidden, &[("hw:numa_nodes", "1")][..], ("hw_numa_nodes", "1")),
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
        if let Ok(request) = Request::from_specs(vcpus, memory_mib, &flavor, &image) {
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
