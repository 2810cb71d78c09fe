//! A host that is emptied while its coordinator is killed.

use std::time::Duration;

use crate::fleet::{Fleet, KILL, reservations};
use godwit_tests::lab::until;

#[test]
fn a_host_is_drained_although_its_coordinator_is_killed_and_takes_servers_again_afterwards() {
    let fleet = Fleet::start(2);
    fleet.create("one", &["--host", "h1"]);
    fleet.godwit(&["host", "drain", "h1"]);
    let coordinator = fleet.lab.coordinator();
    coordinator.kill(KILL).expect("it is killed");
    coordinator.start().expect("it starts");

    let empty = || {
        let drained = &fleet.godwit(&["host", "show", "h1"])["drain"];
        Ok(drained["left"].as_array().is_some_and(Vec::is_empty))
    };
    until("h1", "its being empty", Duration::from_secs(60), empty).expect("it is drained");
    let moved = fleet.wait_for_status("one", "ACTIVE");
    assert_eq!(moved["OS-EXT-SRV-ATTR:host"], "h2");
    fleet.check_home(&moved);
    assert_eq!(reservations(fleet.host(1)), Vec::<String>::new());

    let refused = ["server", "create", "two", "--flavor", "small", "--image", "blank", "--network", "blue"];
    fleet.godwit(&[&refused[..], &["--host", "h1"]].concat());
    let refused = fleet.wait_for_status("two", "ERROR");
    assert!(refused["fault"]["message"].to_string().contains("host_draining"), "{:#}", refused["fault"]);

    fleet.godwit(&["host", "undrain", "h1"]);
    fleet.create("three", &["--host", "h1"]);
    fleet.clean();
}
