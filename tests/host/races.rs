//! Requests that come at the same time, twice, or while another is under way.

use std::time::Duration;

use crate::fleet::{Fleet, guests};
use godwit_tests::lab::{LabOptions, until};

impl Fleet {
    /// What `godwit` says of a command that must fail.
    pub(crate) fn refusal(&self, words: &[&str]) -> String {
        let output = self.lab.coordinator().cli_output(words).expect("godwit runs");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success(), "`godwit {}` was to be refused", words.join(" "));
        said
    }
}

#[test]
fn a_server_deleted_at_any_moment_of_its_creation_is_gone() {
    let fleet = Fleet::start(2);
    for moment in 0..10 {
        fleet.ask_for("one", &[]);
        std::thread::sleep(Duration::from_millis(60 * moment));
        fleet.godwit(&["server", "delete", "one", "--wait"]);
        fleet.check_nothing_left();
    }
    fleet.create("two", &[]);
    fleet.clean();
}

#[test]
fn a_deletion_asked_for_twice_is_one_and_a_name_used_twice_is_two_servers() {
    let fleet = Fleet::start(1);
    let server = fleet.create("one", &[]);
    let id = server["id"].as_str().expect("has one");
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                let output = fleet.lab.coordinator().cli_output(&["server", "delete", id, "--wait"]);
                let output = output.expect("godwit runs");
                // The one that comes after the end finds nothing.
                assert!(matches!(output.status.code(), Some(0 | 3)), "{output:?}");
            });
        }
    });
    fleet.check_nothing_left();

    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| fleet.ask_for("twin", &[]));
        }
    });
    let both = || {
        let servers = fleet.godwit(&["server", "list"]);
        let servers = servers.as_array().expect("is a list");
        Ok(servers.len() == 2 && servers.iter().all(|server| server["status"] == "ACTIVE"))
    };
    until("h1", "both servers", Duration::from_secs(60), both).expect("both run");
    let said = fleet.refusal(&["server", "delete", "twin"]);
    assert!(said.contains("belongs to 2 servers"), "{said}");
    assert_eq!(guests(fleet.host(1)).len(), 2);
    fleet.clean();
}

#[test]
fn of_two_servers_that_race_for_the_last_cpu_one_runs_and_the_other_hears_every_hosts_reason() {
    let agent_settings =
        "memory_binding = \"none\"\nshared_cpus = \"1\"\ndedicated_cpus = \"0\"\n".to_owned();
    let fleet = Fleet::with(LabOptions { hosts: 2, agent_settings, ..LabOptions::default() });
    let flavor = ["flavor", "create", "pinned", "--vcpus", "1", "--memory", "128M", "--disk", "0"];
    fleet.godwit(&[&flavor[..], &["--property", "hw:cpu_policy=dedicated"]].concat());
    let create = |name: &str| {
        let words = ["server", "create", name, "--flavor", "pinned", "--image", "blank", "--network", "blue"];
        fleet.godwit(&words);
    };
    create("first");
    fleet.wait_for_status("first", "ACTIVE");
    std::thread::scope(|scope| {
        for name in ["left", "right"] {
            scope.spawn(move || create(name));
        }
    });
    let status = |name: &str| fleet.server(name).expect("is there")["status"].clone();
    let ended = || Ok(["left", "right"].iter().all(|name| status(name) != "BUILD"));
    until("c0", "the race's end", Duration::from_secs(60), ended).expect("it ends");
    let (winner, loser) = if status("left") == "ACTIVE" { ("left", "right") } else { ("right", "left") };
    fleet.wait_for_status(winner, "ACTIVE");
    let fault = fleet.wait_for_status(loser, "ERROR")["fault"]["message"].to_string();
    for said in ["none of 2 hosts", "h1", "h2", "cpu_dedicated_free"] {
        assert!(fault.contains(said), "{said:?} is missing in {fault}");
    }
    assert_eq!(guests(fleet.host(1)).len() + guests(fleet.host(2)).len(), 2);
    fleet.godwit(&["server", "delete", "--wait", winner]);
    create("next");
    fleet.wait_for_status("next", "ACTIVE");
    fleet.clean();
}
