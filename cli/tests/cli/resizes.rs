//! Resizes and cold migrations: what is asked for, what is waited for, and how it is told.

use crate::commands::{ok, server};
use crate::support::{Answer, Service};
use serde_json::{Value, json};

/// A service where a change of s-1 ends after a while with the server in `status`.
fn changing(status: &'static str) -> Service {
    let mut polls = 0;
    Service::start(move |request| match request.line().as_str() {
        "GET /compute/v2.1/servers/s-1" => {
            polls += 1;
            let task = if polls < 3 { json!("resize_migrating") } else { Value::Null };
            let status = if polls < 3 { "RESIZE" } else { status };
            ok(server(status, json!({"OS-EXT-STS:task_state": task})))
        }
        "GET /compute/v2.1/flavors/f-2" => ok(json!({"flavor": {"id": "f-2", "name": "large"}})),
        "POST /compute/v2.1/servers/s-1/action" => Some(Answer(202, Vec::new())),
        "GET /compute/v2.1/os-migrations?instance_uuid=s-1" => {
            ok(json!({"migrations": [{"id": 4, "uuid": "m-4", "status": "error"}]}))
        }
        "GET /operator/v1/migrations/m-4" => {
            ok(json!({"migration": {"error": "h1: no CPUs\nh2: no memory"}}))
        }
        _ => None,
    })
}

fn asked(service: &Service) -> Value {
    let requests = service.take_requests();
    requests.iter().find(|request| request.method == "POST").unwrap().json()
}

#[test]
fn a_resize_is_waited_for_until_it_is_to_be_decided() {
    let service = changing("VERIFY_RESIZE");
    let run = service.run(&["server", "resize", "s-1", "--flavor", "f-2", "--wait"]);
    assert!(run.text().contains("VERIFY_RESIZE"), "{}", run.text());
    assert_eq!(asked(&service), json!({"resize": {"flavorRef": "f-2"}}));
    for (words, action) in [
        (&["server", "resize", "s-1", "--flavor", "f-2"][..], json!({"resize": {"flavorRef": "f-2"}})),
        (&["server", "migrate", "s-1", "--cold"], json!({"migrate": null})),
        (&["server", "migrate", "s-1", "--cold", "--host", "h2"], json!({"migrate": {"host": "h2"}})),
        (&["server", "resize", "confirm", "s-1"], json!({"confirmResize": null})),
        (&["server", "resize", "revert", "s-1"], json!({"revertResize": null})),
    ] {
        assert_eq!(service.run(words).code, 0, "{words:?}");
        assert_eq!(asked(&service), action);
    }
}

#[test]
fn a_resize_that_failed_is_told_with_its_reason_whole() {
    let run = changing("SHUTOFF").run(&["server", "resize", "s-1", "--flavor", "f-2", "--wait"]);
    assert_eq!(run.code, 1);
    assert!(run.stderr.contains("SHUTOFF as before: h1: no CPUs\nh2: no memory"), "{}", run.stderr);
}

#[test]
fn a_decision_is_waited_for_as_well() {
    let run = changing("SHUTOFF").run(&["server", "resize", "revert", "s-1", "--wait"]);
    assert!(run.text().contains("SHUTOFF"), "{}", run.text());
}

#[test]
fn a_resize_without_a_flavor_or_a_server_is_a_wrong_command_line() {
    for words in [
        &["server", "resize", "s-1"][..],
        &["server", "resize", "--flavor", "f-2"],
        &["server", "resize", "confirm"],
    ] {
        assert_eq!(changing("ACTIVE").run(words).code, 2, "{words:?}");
    }
}
