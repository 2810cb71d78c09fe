//! Both halves with fake hypervisors; real ones are in the host suite.

use super::*;
use crate::datapath::stream::tests::{ca, identity};
use crate::hypervisor::MemoryBinding;
use crate::hypervisor::domain_xml::tests::spec;
use crate::hypervisor::fake::{Call, Fake, Peers};
use godwit_protocol::instance::InstanceState;

struct Host {
    hypervisor: Arc<Fake>,
    migrations: Migrations,
    folder: tempfile::TempDir,
}

fn hosts() -> [Host; 2] {
    let (ca, peers) = (ca(), Peers::default());
    [(); 2].map(|()| {
        let folder = tempfile::tempdir().unwrap();
        let host = HostId::random();
        let settings = MigrationSettings {
            identity: Arc::new(identity(&ca, host)),
            host,
            listen: "127.0.0.1:0".parse().unwrap(),
            libvirt_uri: "qemu:///system".to_owned(),
            folder: folder.path().join("migrations"),
        };
        let hypervisor = Arc::new(Fake::new(peers.clone()));
        let migrations = Migrations::new(settings, hypervisor.clone(), &Registry::new()).unwrap();
        Host { hypervisor, migrations, folder }
    })
}

fn context() -> DomainContext {
    DomainContext {
        pool: "/srv/godwit".into(),
        cells: vec![],
        memory_binding: MemoryBinding::None,
        base: None,
        stop_on_error: false,
    }
}

fn target() -> MigrationTarget {
    MigrationTarget { migration: MigrationId::random(), spec: spec() }
}

fn source(target: &MigrationTarget, ready: TargetReady) -> MigrationSource {
    MigrationSource {
        migration: target.migration,
        instance: target.spec.instance,
        target: ready,
        max_downtime_ms: 500,
        bandwidth_mib_s: None,
    }
}

#[test]
fn a_migration_leaves_the_guest_on_the_target_and_no_socket() {
    let [a, b] = hosts();
    let target = target();
    let instance = target.spec.instance;
    a.hypervisor.define(&target.spec, &context()).unwrap();
    a.hypervisor.start(instance).unwrap();
    let ready = b.migrations.prepare(&target, &context()).unwrap();
    assert_eq!(b.migrations.prepare(&target, &context()).unwrap(), ready);
    let source = source(&target, ready);
    a.migrations.migrate(&source, &mut |_| {}).unwrap();
    for host in [&a, &b] {
        host.migrations.discard(target.migration, instance).unwrap();
        let left = fs::read_dir(host.folder.path().join("migrations")).unwrap().count();
        assert_eq!(left, 0);
    }
    assert_eq!(a.hypervisor.state(instance).unwrap(), None);
    assert_eq!(b.hypervisor.state(instance).unwrap(), Some(InstanceState::Running));
    let again = RequestError::from(a.migrations.migrate(&source, &mut |_| {}).unwrap_err());
    assert_eq!(again.kind, ErrorKind::NotFound);
}

#[test]
fn a_failed_migration_leaves_the_guest_where_it_was() {
    let [a, b] = hosts();
    let target = target();
    let instance = target.spec.instance;
    a.hypervisor.define(&target.spec, &context()).unwrap();
    a.hypervisor.start(instance).unwrap();
    a.hypervisor.fail_next(Call::Migrate);
    let ready = b.migrations.prepare(&target, &context()).unwrap();
    a.migrations.migrate(&source(&target, ready), &mut |_| {}).unwrap_err();
    b.migrations.discard(target.migration, instance).unwrap();
    assert_eq!(a.hypervisor.state(instance).unwrap(), Some(InstanceState::Running));
    assert_eq!(b.hypervisor.state(instance).unwrap(), None);
    let token = b.migrations.prepare(&target, &context()).unwrap().stream_token;
    assert_eq!(token.len(), 2 * TOKEN_BYTES);
}

#[test]
fn a_cancel_reaches_the_migration_that_runs_and_no_other() {
    let [a, b] = hosts();
    let target = target();
    a.hypervisor.define(&target.spec, &context()).unwrap();
    a.hypervisor.start(target.spec.instance).unwrap();
    assert!(matches!(a.migrations.cancel(target.migration), Err(MigrationError::NotRunning(_))));
    let ready = b.migrations.prepare(&target, &context()).unwrap();
    let outcome = a.migrations.migrate(&source(&target, ready), &mut |_| {
        a.migrations.cancel(target.migration).unwrap();
    });
    assert_eq!(RequestError::from(outcome.unwrap_err()).kind, ErrorKind::Cancelled);
}

#[test]
fn an_instance_that_runs_here_is_not_awaited() {
    let [a, _] = hosts();
    let target = target();
    a.hypervisor.define(&target.spec, &context()).unwrap();
    let error = RequestError::from(a.migrations.prepare(&target, &context()).unwrap_err());
    assert_eq!(error.kind, ErrorKind::Conflict);
}

#[test]
fn libvirts_socket_is_where_the_uri_says() {
    let [mut a, _] = hosts();
    a.migrations.settings.libvirt_uri = "qemu+unix:///system?socket=/x/y.sock&mode=direct".to_owned();
    assert_eq!(a.migrations.libvirt_socket(), Path::new("/x/y.sock"));
}
