//! The descriptions, checked as text; the host suite has libvirt parse and run them.

use super::*;
use crate::storage::Base;
use godwit_protocol::host::Cpu;
use godwit_protocol::id::{NetworkId, PortId};
use godwit_protocol::image::DiskFormat;
use godwit_protocol::instance::{ConfigDrive, Tuning};
use godwit_protocol::port::PortAddress;

/// An ordinary instance: two floating vCPUs, 512 MiB, one NIC.
pub(crate) fn spec() -> InstanceSpec {
    let instance = "0b1c2d3e-0000-4000-8000-000000000001".parse().unwrap();
    let port: PortId = "11111111-2222-4333-8444-555555555555".parse().unwrap();
    InstanceSpec {
        instance,
        name: "web 1".to_owned(),
        reservation: Reservation {
            instance,
            vcpus: 2,
            memory_bytes: 512 << 20,
            cells: vec![],
            emulator_cpus: vec![],
            idle_cpus: vec![],
        },
        topology: None,
        tuning: Tuning::default(),
        disk_format: DiskFormat::Qcow2,
        ports: vec![GuestPort {
            port,
            network: NetworkId::random(),
            vni: 1001,
            mac: "fa:16:3e:00:00:01".parse().unwrap(),
            mtu: 1450,
            addresses: vec![PortAddress {
                address: "10.0.0.5".parse().unwrap(),
                prefix_length: 24,
                gateway: Some("10.0.0.1".parse().unwrap()),
                dns: vec!["10.0.0.2".parse().unwrap()],
                routes: vec![],
                dhcp: false,
            }],
        }],
        config_drive: ConfigDrive {
            hostname: "web-1".to_owned(),
            public_keys: BTreeMap::from([("mine".to_owned(), "ssh-ed25519 AAAA me@home".to_owned())]),
            metadata: BTreeMap::from([("role".to_owned(), "front".to_owned())]),
            user_data: None,
            availability_zone: "nova".to_owned(),
        },
    }
}

fn cell(id: u32, cpus: std::ops::Range<u32>, shared: Vec<u32>, distances: [(u32, u32); 2]) -> Cell {
    Cell {
        id,
        cpus: cpus
            .map(|id| Cpu { id, package: 0, die: 0, core: id.into(), siblings: vec![id], ..Cpu::default() })
            .collect(),
        memory_bytes: 8 << 30,
        page_pools: vec![],
        distances: distances.into(),
        shared_cpus: shared,
        dedicated_cpus: vec![],
    }
}

fn context() -> DomainContext {
    DomainContext {
        base: None,
        stop_on_error: false,
        pool: "/srv/godwit".into(),
        cells: vec![
            cell(0, 0..4, vec![0, 1], [(0, 10), (1, 21)]),
            cell(1, 4..8, vec![4], [(0, 21), (1, 10)]),
        ],
        memory_binding: MemoryBinding::Strict,
    }
}

/// Guest cell 0 on host cell 1 with pinned vCPUs on huge pages, guest cell 1 on host cell 0, floating.
fn two_cells() -> InstanceSpec {
    let mut spec = spec();
    spec.reservation.vcpus = 4;
    spec.reservation.cells = vec![
        ReservedCell {
            guest: 0,
            host: 1,
            shared_vcpus: vec![],
            pinning: BTreeMap::from([(0, 6), (1, 7)]),
            memory_bytes: 256 << 20,
            page_size_kib: Some(2048),
        },
        ReservedCell {
            guest: 1,
            host: 0,
            shared_vcpus: vec![2, 3],
            pinning: BTreeMap::new(),
            memory_bytes: 256 << 20,
            page_size_kib: Some(4),
        },
    ];
    spec
}

#[track_caller]
fn assert_holds(xml: &str, parts: &[&str]) {
    for part in parts {
        assert!(xml.contains(part), "{part} is missing from\n{xml}");
    }
}

#[test]
fn a_users_name_cannot_break_out_of_its_element() {
    let mut spec = spec();
    spec.name = "</title><devices/>&\"'\u{1}\n".to_owned();
    let xml = describe(&spec, &context(), &Emulator::default());
    assert_holds(&xml, &["<title>&lt;/title&gt;&lt;devices/&gt;&amp;&quot;&apos;\u{fffd} </title>"]);
}

#[test]
fn an_ordinary_guest_floats_over_the_shared_cpus() {
    let xml = describe(&spec(), &context(), &Emulator::default());
    assert_holds(
        &xml,
        &[
            "<domain type='qemu'>",
            "<name>instance-0b1c2d3e</name>",
            "<memory unit='KiB'>524288</memory>",
            "<vcpu placement='static' cpuset='0-1,4'>2</vcpu>",
            "<topology sockets='2' cores='1' threads='1'/>",
            "<source file='/srv/godwit/instances/0b1c2d3e-0000-4000-8000-000000000001/disk'/><backingStore/>",
            "type='qcow2' cache='none'",
            "<interface type='ethernet'>",
            "<target dev='gwt11111111222' managed='no'/>",
            "<mtu size='1450'/>",
        ],
    );
    assert!(!xml.contains("numatune") && !xml.contains("cputune") && !xml.contains("hugepages"));
    assert_eq!(taps(&xml).into_iter().collect::<Vec<_>>(), ["gwt11111111222"]);
}

#[test]
fn only_taps_that_libvirt_does_not_make_itself_are_to_be_there() {
    let description = "<target dev='vda' bus='virtio'/><target dev='gwt1'/><target dev='gwt2' managed='no'/>";
    assert_eq!(taps(description).into_iter().collect::<Vec<_>>(), ["gwt2"]);
}

#[test]
fn a_guest_with_cells_sits_where_its_reservation_says() {
    let xml = describe(&two_cells(), &context(), &Emulator { kvm: true, ..Emulator::default() });
    assert_holds(
        &xml,
        &[
            "<domain type='kvm'>",
            "<vcpupin vcpu='0' cpuset='6'/>",
            "<vcpupin vcpu='1' cpuset='7'/>",
            "<vcpupin vcpu='2' cpuset='0-1'/>",
            "<emulatorpin cpuset='0-1,6-7'/>",
            "<memory mode='strict' nodeset='0-1'/>",
            "<memnode cellid='0' mode='strict' nodeset='1'/>",
            "<page size='2048' unit='KiB' nodeset='0'/>",
            "<cell id='0' cpus='0-1' memory='262144' unit='KiB'><distances><sibling id='0' value='10'/>\
             <sibling id='1' value='21'/></distances></cell>",
            "<cpu mode='host-model'>",
        ],
    );
}

#[test]
fn emulator_threads_with_cpus_of_their_own_stay_there() {
    let mut spec = two_cells();
    spec.reservation.emulator_cpus = vec![5];
    assert_holds(&describe(&spec, &context(), &Emulator::default()), &["<emulatorpin cpuset='5'/>"]);
}

#[test]
fn emulator_threads_that_share_float_over_the_shared_cpus_of_the_guests_cells() {
    let mut spec = two_cells();
    spec.tuning.emulator_shares = true;
    assert_holds(&describe(&spec, &context(), &Emulator::default()), &["<emulatorpin cpuset='0-1,4'/>"]);
    let mut context = context();
    context.cells.iter_mut().for_each(|cell| cell.shared_cpus.clear());
    assert_holds(&describe(&spec, &context, &Emulator::default()), &["<emulatorpin cpuset='0-3,6-7'/>"]);
}

#[test]
fn real_time_keeps_the_emulator_away_and_the_memory_in_place() {
    let mut spec = two_cells();
    spec.tuning.realtime_vcpus = BTreeSet::from([1]);
    assert_holds(
        &describe(&spec, &context(), &Emulator::default()),
        &[
            "<vcpusched vcpus='1' scheduler='fifo' priority='1'/>",
            "<emulatorpin cpuset='0-1,6'/>",
            "<nosharepages/>",
            "<locked/>",
            "<pmu state='off'/>",
        ],
    );
    let mut spec = self::spec();
    spec.tuning.locked_memory = true;
    let xml = describe(&spec, &context(), &Emulator::default());
    assert_holds(&xml, &["<memoryBacking>\n    <locked/>\n  </memoryBacking>"]);
    assert!(!xml.contains("sharepages") && !xml.contains("pmu"));
}

#[test]
fn memory_is_bound_only_where_the_kernel_has_the_cells() {
    let context = DomainContext { memory_binding: MemoryBinding::None, ..context() };
    assert!(!describe(&two_cells(), &context, &Emulator::default()).contains("numatune"));
}

#[test]
fn a_merge_takes_the_pinning_and_nothing_else() {
    let live = "<domain>\n  <vcpu placement='static'>4</vcpu>\n  <cputune>\n    <vcpupin vcpu='0' cpuset='1'/>\n  \
                </cputune>\n  <cpu mode='custom'/>\n  <numatune>\n  </numatune>\n  <vcpus>kept</vcpus>\n</domain>";
    let target = describe(&two_cells(), &context(), &Emulator::default());
    let merged = merge(live, &target);
    assert_holds(
        &merged,
        &[
            "<vcpupin vcpu='0' cpuset='6'/>",
            "memnode cellid='0'",
            "<cpu mode='custom'/>",
            "<vcpus>kept</vcpus>",
        ],
    );
    assert!(!merged.contains("cpuset='1'"));
    assert!(!merged.contains("devices"));
}

#[test]
fn a_merge_drops_the_pinning_of_a_source_whose_target_has_none() {
    let context = DomainContext { memory_binding: MemoryBinding::None, ..context() };
    let live = describe(&two_cells(), &self::context(), &Emulator::default());
    let merged = merge(&live, &describe(&spec(), &context, &Emulator::default()));
    assert!(!merged.contains("cputune") && !merged.contains("numatune"));
    assert_holds(&merged, &["<vcpu placement='static' cpuset='0-1,4'>2</vcpu>"]);
}

#[test]
fn lists_are_written_as_libvirt_reads_them() {
    let list = |numbers: &[u32]| List(&numbers.iter().copied().collect()).to_string();
    assert_eq!(list(&[]), "");
    assert_eq!(list(&[7]), "7");
    assert_eq!(list(&[0, 1, 2, 5, 7, 8]), "0-2,5,7-8");
}

#[test]
fn an_overlay_names_its_base_and_nothing_behind_it_and_a_share_stops_the_guest() {
    let base = Base { path: "/p/instances/i/base.raw".into(), format: DiskFormat::Raw };
    let context = DomainContext { base: Some(base), stop_on_error: true, ..context() };
    let xml = describe(&spec(), &context, &Emulator::default());
    assert!(xml.contains(
        "<backingStore type='file'><format type='raw'/><source file='/p/instances/i/base.raw'/><backingStore/></backingStore>"
    ));
    assert!(xml.contains("discard='unmap' error_policy='stop' rerror_policy='stop'/>"));
}
