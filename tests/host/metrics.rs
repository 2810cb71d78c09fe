//! What both daemons expose, judged by Prometheus's own tool and held against docs/metrics.md; and the alert rules.

use std::collections::BTreeSet;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::fleet::Fleet;

fn workspace() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests are in the workspace")
}

/// promtool, which `cargo xtask setup` has brought unless it is in the PATH.
fn promtool() -> Command {
    let own = godwit_tests::target_folder().join("tools/promtool");
    let mut command = Command::new(if own.is_file() { own } else { PathBuf::from("promtool") });
    command.current_dir(workspace());
    command
}

fn files(folder: &str) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(workspace().join(folder)).expect("is a folder");
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.expect("is readable").path()).collect();
    files.sort();
    assert!(!files.is_empty(), "{folder} is empty");
    files
}

/// What promtool says of an exposition; empty when it finds nothing.
fn check_metrics(exposition: &str) -> String {
    let mut command = promtool();
    command.args(["check", "metrics"]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("promtool starts: run `cargo xtask setup`");
    child.stdin.take().expect("is piped").write_all(exposition.as_bytes()).expect("it reads");
    let output = child.wait_with_output().expect("it ends");
    let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert!(output.status.success() || !said.is_empty(), "promtool fails without a word");
    said
}

/// The families of an exposition.
fn families(exposition: &str) -> BTreeSet<&str> {
    let types = exposition.lines().filter_map(|line| line.strip_prefix("# TYPE "));
    types.filter_map(|line| line.split(' ').next()).collect()
}

#[test]
fn alert_rules_are_valid_and_fire_when_they_should() {
    for (words, folder) in [(["check", "rules"], "docs/alerts"), (["test", "rules"], "tests/promtool")] {
        let output = promtool().args(words).args(files(folder)).output();
        let output = output.expect("promtool starts: run `cargo xtask setup`");
        let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        assert!(output.status.success(), "{said}");
    }
    for file in files("docs/grafana") {
        let text = std::fs::read(&file).expect("is readable");
        let board: serde_json::Value = serde_json::from_slice(&text).expect("is JSON");
        assert!(board["panels"].as_array().is_some_and(|panels| !panels.is_empty()), "{}", file.display());
    }
}

#[test]
fn both_daemons_expose_what_prometheus_takes_and_what_the_reference_tells_of() {
    let fleet = Fleet::start(1);
    let server = fleet.create("busy", &[]);
    fleet.check_guest_on(&server, fleet.host(1));
    let reference = std::fs::read_to_string(workspace().join("docs/metrics.md")).expect("is readable");
    let agent = fleet.host(1).exec(&["curl", "-sSf", "http://127.0.0.1:9177/metrics"]).expect("it is served");
    let url = "http://127.0.0.1:9178/metrics";
    let scraped = fleet.lab.coordinator().client(&["curl", "-sSf", url]).expect("c0 runs").output();
    let scraped = scraped.expect("curl starts");
    assert!(scraped.status.success(), "{}", String::from_utf8_lossy(&scraped.stderr));
    let coordinator = String::from_utf8(scraped.stdout).expect("is text");
    for (exposition, telling) in [(&agent, "godwit_agent_info"), (&coordinator, "godwit_coordinator_hosts")] {
        assert_eq!(check_metrics(exposition), "");
        let families = families(exposition);
        assert!(families.contains(telling), "{families:?}");
        let untold: Vec<&&str> =
            families.iter().filter(|name| !reference.contains(&format!("`{name}`"))).collect();
        assert!(untold.is_empty(), "docs/metrics.md does not tell of {untold:?}");
    }
    fleet.clean();
}
