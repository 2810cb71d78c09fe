//! Each kind of question gets an answer of the form that the vectors' schema promises, whatever it holds.

use serde_json::{Value, json};

use crate::placement::answer;

fn outcome(case: Value) -> Value {
    let answered = answer(&case);
    assert_eq!(answered["id"], case["id"]);
    answered
}

fn host() -> Value {
    json!({"cells": [{
        "id": 3, "memory_mib": 1024, "memory_used_mib": 0, "dedicated_cpus": [0, 1, 2, 3], "shared_cpus": [],
        "shared_cpus_used": 0, "pinned_cpus": [0], "siblings": [[0, 1], [2, 3]],
        "page_pools": [{"size_kib": 4, "total": 262_144, "used": 0, "reserved": 0}],
    }]})
}

#[test]
fn a_place_is_answered_with_cells_pins_and_emulator_cpus() {
    let request = json!({"vcpus": 2, "memory_mib": 512, "cpu_policy": "dedicated", "emulator_threads_policy": "isolate"});
    let fit = outcome(json!({"id": "a", "op": "place", "host": host(), "request": request, "limits": null}));
    assert_eq!(fit["outcome"], "fit", "{fit}");
    let cell = json!({
        "guest": 0, "host": 3, "page_size_kib": null, "pinning": {"0": 2, "1": 3}, "emulator_cpus": [1],
    });
    assert_eq!(fit["cells"], json!([cell]));
    let request = json!({"vcpus": 4, "memory_mib": 512, "cpu_policy": "dedicated"});
    let refused = outcome(json!({"id": "b", "op": "place", "host": host(), "request": request}));
    assert_eq!((&refused["outcome"], &refused["rule"]), (&json!("no_fit"), &json!("cpu_dedicated_free")));
    let plain = json!({"id": "c", "op": "place", "host": host(), "request": {"vcpus": 4, "memory_mib": 512}});
    assert_eq!(outcome(plain)["outcome"], "unconstrained");
}

#[test]
fn a_request_is_resolved_or_refused_by_its_rule() {
    let request = json!({
        "vcpus": 2, "memory_mib": 64, "numa_nodes": 2, "mem_page_size": "2MB",
        "numa_cpus": {"0": [1], "1": [0]}, "numa_mem_mib": {"0": 32, "1": 32},
    });
    let resolved = outcome(json!({"id": "a", "op": "resolve", "request": request}));
    assert_eq!(resolved["guest"]["cells"][0]["shared_vcpus"], json!([1]));
    assert_eq!(resolved["guest"]["cells"][1]["page_size"], 2048);
    let request = json!({"vcpus": 2, "memory_mib": 64, "numa_nodes": 3});
    let refused = outcome(json!({"id": "b", "op": "resolve", "request": request}));
    assert_eq!((&refused["outcome"], &refused["error"]), (&json!("invalid"), &json!("asymmetric_split")));
}

#[test]
fn usage_goes_on_and_comes_off() {
    let usage = json!([{
        "host": 3, "shared_vcpus": [], "memory_mib": 4, "page_size_kib": null, "pinned": [2], "emulator_cpus": [],
        "cpu_policy": "dedicated", "cpu_thread_policy": null,
    }]);
    let applied = outcome(json!({"id": "a", "op": "apply", "host": host(), "usage": usage}));
    assert_eq!(applied["host"]["cells"][0]["pinned_cpus"], json!([0, 2]));
    assert_eq!(applied["host"]["cells"][0]["page_pools"][0]["used"], 1024);
    let released = outcome(json!({"id": "b", "op": "release", "host": applied["host"], "usage": usage}));
    assert_eq!(released["host"], host());
    let refused = outcome(json!({"id": "c", "op": "release", "host": host(), "usage": usage}));
    assert_eq!(refused["error"], "unpin_not_pinned");
}

#[test]
fn the_small_questions_are_answered_too() {
    for (case, field, expected) in [
        (json!({"op": "cpu_list_parse", "text": "0-3,^1"}), "cpus", json!([0, 2, 3])),
        (json!({"op": "cpu_list_format", "cpus": [0, 1, 2, 5], "ranges": true}), "text", json!("0-2,5")),
        (
            json!({"op": "cpu_topology", "request": {"vcpus": 4, "memory_mib": 1, "cpu_max_sockets": 2}}),
            "best",
            json!({"sockets": 2, "cores": 2, "threads": 1}),
        ),
        (
            json!({"op": "cpu_policy", "request": {"vcpus": 1, "memory_mib": 1, "cpu_policy": "mixed"}}),
            "cpu_policy",
            json!("mixed"),
        ),
        (json!({"op": "realtime_mask", "request": {"vcpus": 1, "memory_mib": 1}}), "cpus", Value::Null),
    ] {
        let answered = outcome(case);
        assert_eq!((&answered["outcome"], &answered[field]), (&json!("ok"), &expected), "{answered}");
    }
}

#[test]
fn nonsense_is_an_answer_and_no_crash() {
    let huge = u64::MAX;
    for case in [
        Value::Null,
        json!([]),
        json!({"op": "place"}),
        json!({"op": "place", "host": {"cells": 1}, "request": {"vcpus": 1, "memory_mib": 1, "numa_nodes": 1}}),
        json!({"op": "place", "host": host(), "request": {"vcpus": huge, "memory_mib": -1}}),
        json!({"op": "place_guest", "host": host(), "guest": {"cells": [{"memory_mib": "x"}]}}),
        json!({"op": "page_size", "host_cell": {}, "guest_cell": {}}),
        json!({"op": "apply", "host": host(), "usage": [{"host": 3, "memory_mib": huge, "pinned": [huge]}]}),
        json!({"op": "cpu_topology_all", "vcpus": 0, "maximum": {"sockets": 0, "cores": 0, "threads": 0}}),
        json!({"op": "cpu_list_format", "cpus": ["a"]}),
    ] {
        let outcome = outcome(case.clone())["outcome"].clone();
        assert!(outcome == "invalid" || outcome == "unsupported", "{case}: {outcome}");
    }
}
