//! What is counted against what a capture sees, beyond what one packet at a time can show.

use std::process::Command;

use godwit_tests::programs_folder;

/// Mixes of packets, each checked whole.
const ROUNDS: &str = "10";

#[test]
fn counters_are_what_captures_see_in_random_mixes_of_segments_fragments_groups_and_strangers() {
    let seed = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("is later");
    let seed = seed.as_secs().to_string();
    let mut command = Command::new(programs_folder().join("bench-overlay"));
    let output = command.args(["exact", ROUNDS, &seed]).output().expect("bench-overlay is built");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "`bench-overlay exact {ROUNDS} {seed}` says:\n{said}");
    let found: serde_json::Value = serde_json::from_slice(&output.stdout).expect("it prints JSON");
    assert_eq!(found["exact"], 10, "{found}");
    assert!(found["packets"].as_u64().is_some_and(|packets| packets > 100), "{found}");
}
