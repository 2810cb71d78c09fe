//! Dashboards and alert rules, judged by Prometheus's own tool.

use std::path::{Path, PathBuf};
use std::process::Command;

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
