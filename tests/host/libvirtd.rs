//! Creations while libvirtd is away.

use std::time::Duration;

use crate::fleet::{Fleet, guests};
use godwit_tests::lab::{LabOptions, until};

#[test]
fn a_server_created_while_libvirtd_is_away_runs_when_it_is_back() {
    let fleet = Fleet::start(1);
    let host = fleet.host(1);
    host.hold_libvirtd_down().expect("it goes");
    fleet.ask_for("one", &[]);
    let waits = || {
        let operations = fleet.godwit(&["operation", "list"]);
        Ok(operations[0]["step"] == "define" && operations[0]["phase"] == "running")
    };
    host.wait("the step that needs libvirtd", waits).expect("it is reached");
    assert_eq!(fleet.server("one").expect("is there")["status"], "BUILD");
    host.release_libvirtd().expect("it is back");
    let server = fleet.wait_for_status("one", "ACTIVE");
    fleet.check_home(&server);

    host.kill_libvirtd().expect("it is killed");
    assert_eq!(guests(host).len(), 1, "guests outlive libvirtd");
    fleet.clean();
}

#[test]
fn a_libvirtd_that_stays_away_fails_the_creation_with_the_reason_and_nothing_is_left() {
    let settings = "host_patience_seconds = 10".to_owned();
    let fleet = Fleet::with(LabOptions { hosts: 1, coordinator_settings: settings, ..LabOptions::default() });
    let host = fleet.host(1);
    host.hold_libvirtd_down().expect("it goes");
    fleet.ask_for("one", &[]);
    let undone = || {
        let operations = fleet.godwit(&["operation", "list"]);
        Ok(operations[0]["error"]
            .as_str()
            .is_some_and(|error| error.contains("h1") && error.contains("libvirt")))
    };
    until("c0", "the end of the patience", Duration::from_secs(120), undone)
        .unwrap_or_else(|error| panic!("{error}: {:#}", fleet.godwit(&["operation", "list"])));
    host.release_libvirtd().expect("it is back");
    let fault = fleet.wait_for_status("one", "ERROR")["fault"]["message"].to_string();
    assert!(fault.contains("h1") && fault.contains("libvirt"), "{fault}");
    fleet.clean();
    fleet.create("two", &[]);
    fleet.clean();
}
