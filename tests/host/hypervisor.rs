//! The agent's hypervisor with a real libvirtd and real guests, without an agent around it.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use godwit_agent::hypervisor::libvirt::Libvirt;
use godwit_agent::hypervisor::{
    DomainContext, Event, Hypervisor, HypervisorError, MemoryBinding, Virtualization,
};
use godwit_agent::inventory::read_cells;
use godwit_agent::storage::{Pool, PoolPolicy};
use godwit_protocol::id::{InstanceId, NetworkId, PortId};
use godwit_protocol::image::DiskFormat;
use godwit_protocol::instance::{ConfigDrive, InstanceSpec, InstanceState, Tuning};
use godwit_protocol::port::{GuestPort, PortAddress, tap_name};
use godwit_protocol::reservation::{Reservation, ReservedCell};
use godwit_tests::guest_image;
use godwit_tests::lab::{Lab, LabOptions, POOL, until};

/// A lab of one host with a bridge, and the hypervisor on it.
struct Rig {
    // Dropped first: its thread would otherwise tell of a libvirtd that went with the lab.
    libvirt: Libvirt,
    events: Arc<Mutex<Vec<Event>>>,
    pool: Pool,
    context: DomainContext,
    _state: tempfile::TempDir,
    lab: Lab,
}

impl Rig {
    fn start() -> Self {
        let patience = Duration::from_secs(300);
        let lab =
            Lab::start(LabOptions { hosts: 1, patience, ..LabOptions::default() }).expect("the lab starts");
        for words in ["ip link add gwb1001 type bridge", "ip link set gwb1001 mtu 1450 up"] {
            lab.host(1).exec(&words.split(' ').collect::<Vec<_>>()).expect("the bridge is made");
        }
        lab.set_baseline().expect("the lab answers");
        let state = tempfile::tempdir().expect("is made");
        let libvirt = Libvirt::new(&lab.host(1).libvirt_uri(), Virtualization::Tcg, state.path().to_owned());
        let events = Arc::<Mutex<Vec<Event>>>::default();
        let heard = events.clone();
        libvirt.subscribe(Arc::new(move |event| heard.lock().expect("no panic").push(event)));
        let cells = read_cells("/".as_ref(), 4).expect("the machine has cells");
        let context = DomainContext {
            pool: POOL.into(),
            cells,
            memory_binding: MemoryBinding::None,
            base: None,
            stop_on_error: false,
        };
        let pool =
            Pool::new(lab.pool(), PoolPolicy::default(), &prometheus::Registry::new()).expect("is fresh");
        Self { libvirt, events, pool, context, _state: state, lab }
    }

    /// Waits for an event since the last call of this.
    fn expect_event(&self, wanted: Event) {
        let heard = || Ok(self.events.lock().expect("no panic").contains(&wanted));
        until("h1", &format!("{wanted:?}"), Duration::from_secs(20), heard).expect("the event comes");
        self.events.lock().expect("no panic").clear();
    }

    fn state(&self, spec: &InstanceSpec) -> Option<InstanceState> {
        self.libvirt.state(spec.instance).expect("libvirt answers")
    }

    /// A disk with nothing on it, the config drive, the domain.
    fn define(&self, spec: &InstanceSpec) {
        self.pool.write_config_drive(spec).expect("the config drive is written");
        let disk = std::fs::File::create(self.pool.instance(spec.instance).disk).expect("is made");
        disk.set_len(16 << 20).expect("is sized");
        self.libvirt.define(spec, &self.context).expect("libvirt takes the description");
        // As the agent does before a guest starts.
        for tap in self.libvirt.taps(spec.instance).expect("it is defined") {
            let host = self.lab.host(1);
            if host.exec(&["ip", "link", "show", &tap]).is_ok() {
                continue;
            }
            for line in ["tuntap add TAP mode tap", "link set TAP master gwb1001 mtu 1450 up"] {
                let line = line.replace("TAP", &tap);
                let words: Vec<&str> = ["ip"].into_iter().chain(line.split(' ')).collect();
                host.exec(&words).expect("the tap is made");
            }
        }
    }
}

/// Two guest cells, pinned the other way round, where the machine has CPUs for it.
fn spec(context: &DomainContext) -> InstanceSpec {
    let instance = InstanceId::random();
    let cpus: Vec<u32> = context.cells.iter().flat_map(|cell| cell.cpus.iter().map(|cpu| cpu.id)).collect();
    let cell = |guest: u32| ReservedCell {
        guest,
        host: context.cells[0].id,
        shared_vcpus: vec![],
        pinning: BTreeMap::from([(guest, cpus[(guest as usize + 1) % cpus.len()])]),
        memory_bytes: 64 << 20,
        page_size_kib: None,
    };
    InstanceSpec {
        instance,
        name: "the \"first\" & <only>".to_owned(),
        reservation: Reservation {
            instance,
            vcpus: 2,
            memory_bytes: 128 << 20,
            cells: vec![cell(0), cell(1)],
            emulator_cpus: vec![],
            idle_cpus: vec![],
        },
        topology: None,
        tuning: Tuning::default(),
        disk_format: DiskFormat::Raw,
        ports: vec![GuestPort {
            port: PortId::random(),
            network: NetworkId::random(),
            vni: 1001,
            mac: "fa:16:3e:00:00:07".parse().expect("is one"),
            mtu: 1450,
            addresses: vec![PortAddress {
                address: [10, 0, 0, 7].into(),
                prefix_length: 24,
                gateway: None,
                dns: vec![],
                routes: vec![],
                dhcp: false,
            }],
        }],
        config_drive: ConfigDrive { hostname: "only".to_owned(), ..ConfigDrive::default() },
    }
}

#[test]
fn a_guest_lives_from_its_definition_to_its_removal() {
    let rig = Rig::start();
    let (libvirt, spec) = (&rig.libvirt, spec(&rig.context));
    let id = spec.instance;
    let info = libvirt.info().expect("libvirt answers");
    assert!(!info.kvm && info.version.split('.').count() == 3, "{info:?}");
    assert!(matches!(libvirt.start(id), Err(HypervisorError::NotFound(_))));

    rig.define(&spec);
    rig.expect_event(Event::Changed(id));
    rig.define(&spec);
    assert_eq!(rig.state(&spec), Some(InstanceState::Stopped));
    assert!(matches!(libvirt.pause(id, true), Err(HypervisorError::Conflict(_))));

    for _ in 0..2 {
        libvirt.start(id).expect("it starts");
        assert_eq!(rig.state(&spec), Some(InstanceState::Running));
    }
    rig.expect_event(Event::Changed(id));
    let tap = tap_name(spec.ports[0].port);
    let link = rig.lab.host(1).exec(&["ip", "link", "show", &tap]).expect("the tap is there");
    assert!(link.contains("master gwb1001") && link.contains("mtu 1450"), "{link}");
    let xml = rig.lab.host(1).exec(&["virsh", "dumpxml", &id.to_string()]).expect("it is defined");
    let title = rig.lab.host(1).exec(&["virsh", "desc", "--title", &id.to_string()]).expect("it has one");
    assert_eq!(title.trim(), spec.name);
    assert!(xml.contains("<vcpupin vcpu='1'"), "{xml}");

    for paused in [true, true, false, false] {
        libvirt.pause(id, paused).expect("it is held or released");
        let wanted = if paused { InstanceState::Paused } else { InstanceState::Running };
        assert_eq!(rig.state(&spec), Some(wanted));
    }
    let listed = libvirt.list().expect("libvirt answers");
    assert_eq!(listed.iter().map(|report| report.instance).collect::<Vec<_>>(), [id]);

    libvirt.stop(id, Duration::ZERO).expect("it stops");
    libvirt.stop(id, Duration::ZERO).expect("it has stopped");
    assert_eq!(rig.state(&spec), Some(InstanceState::Stopped));
    let link = rig.lab.host(1).exec(&["ip", "link", "show", &tap]).expect("the tap stays");
    assert!(link.contains("NO-CARRIER"), "{link}");

    libvirt.start(id).expect("it starts again");
    for _ in 0..2 {
        libvirt.remove(id).expect("it is forgotten");
    }
    assert_eq!(rig.state(&spec), None);
    rig.pool.delete_disk(id).expect("its folder is removed");
    rig.lab.host(1).exec(&["ip", "link", "delete", &tap]).expect("it is the agent's to remove");
    assert_eq!(rig.lab.leftovers().expect("the lab answers"), Vec::<String>::new());
}

#[test]
fn a_description_that_libvirt_does_not_take_is_the_requests_fault() {
    let rig = Rig::start();
    let mut spec = spec(&rig.context);
    spec.topology = Some(godwit_protocol::instance::CpuTopology { sockets: 3, cores: 3, threads: 3 });
    let error = rig.libvirt.define(&spec, &rig.context).expect_err("2 vCPUs are not 27");
    assert!(matches!(error, HypervisorError::Rejected { .. }), "{error}");
}

#[test]
fn guests_outlive_libvirtd_and_a_qemu_that_dies_is_a_crash() {
    let rig = Rig::start();
    let spec = spec(&rig.context);
    rig.define(&spec);
    rig.libvirt.start(spec.instance).expect("it starts");
    rig.lab.host(1).hold_libvirtd_down().expect("libvirtd goes");
    rig.expect_event(Event::Disconnected);
    assert!(matches!(rig.libvirt.list(), Err(HypervisorError::Unavailable { .. })));
    rig.lab.host(1).release_libvirtd().expect("libvirtd comes");
    rig.expect_event(Event::Connected);
    assert_eq!(rig.state(&spec), Some(InstanceState::Running));
    rig.lab.host(1).exec(&["pkill", "-KILL", "-f", "qemu-system-x86"]).expect("QEMU is there");
    rig.expect_event(Event::Changed(spec.instance));
    let crashed = || Ok(rig.state(&spec) == Some(InstanceState::Crashed));
    until("h1", "the crash", Duration::from_secs(20), crashed).expect("it is seen");
    rig.libvirt.start(spec.instance).expect("it starts again");
    assert_eq!(rig.state(&spec), Some(InstanceState::Running));
}

#[test]
fn a_guest_that_hears_its_button_restarts_and_stops_by_itself() {
    let rig = Rig::start();
    let spec = InstanceSpec { disk_format: DiskFormat::Qcow2, ..spec(&rig.context) };
    rig.define(&spec);
    let image =
        guest_image::ensure(&godwit_tests::target_folder().join("guest")).expect("the image is built");
    let disk: PathBuf = rig.pool.instance(spec.instance).disk;
    std::fs::copy(&image.path, &disk).expect("is copied");
    rig.libvirt.start(spec.instance).expect("it starts");
    let booted = |times: usize| {
        let enough = || {
            let console = rig.pool.console(spec.instance, None).expect("the console reads");
            Ok(console.matches("GODWIT-GUEST ready").count() >= times)
        };
        until("h1", "the guest", Duration::from_secs(120), enough).expect("it boots");
    };
    booted(1);
    rig.libvirt.reboot(spec.instance, false).expect("it restarts");
    booted(2);
    rig.libvirt.reboot(spec.instance, true).expect("it is reset");
    booted(3);
    rig.libvirt.stop(spec.instance, Duration::from_secs(60)).expect("it stops");
    assert_eq!(rig.state(&spec), Some(InstanceState::Stopped));
    let reason = rig.lab.host(1).exec(&["virsh", "domstate", "--reason", &spec.instance.to_string()]);
    assert!(reason.expect("libvirt answers").contains("shutdown"), "it was not switched off");
}
