//! The compute service's answers hold what Nova publishes for their microversion, field by field and type by type.
//!
//! `fields.txt` is taken from the schemas of answers that Nova 34.0.0 ships. For each answer it names the objects
//! in it: `servers[].flavor: id?=string links?=array` is the object at that place, with a question mark where a
//! field may be absent; where the line has `…`, other fields may be there too.

use serde_json::Value;

use crate::guests::{self, Guest};
use crate::stage::Stage;

const NOVA: &str = include_str!("fields.txt");

/// Answers whose list may be empty, because nothing that we offer fills it.
const EMPTY: [&str; 2] = ["/servers/SERVER/os-volume_attachments", "/os-aggregates"];

#[test]
fn every_answer_of_compute_has_the_fields_that_nova_publishes_for_its_microversion() {
    let stage = Stage::start(2);
    guests::prepare(&stage);
    let guest = Guest::create(&stage, "one", "h1");
    stage.run(&["openstack", "server", "migrate", "--live-migration", "--host", "h2", "--wait", "one"]);

    let ask = Asker::new(&stage);
    let known = [
        ("SERVER", guest.id.clone()),
        ("FLAVOR", stage.json(&["flavor", "show", "small"])["id"].as_str().expect("has an id").to_owned()),
        ("PROJECT", stage.run(&["openstack", "token", "issue", "-f", "value", "-c", "project_id"])),
        (
            "HYPERVISOR",
            ask.get("/os-hypervisors", 87)["hypervisors"][0]["id"].as_str().expect("is one").into(),
        ),
        ("ACTION", {
            let actions = ask.get(&format!("/servers/{}/os-instance-actions", guest.id), 87);
            actions["instanceActions"][0]["request_id"].as_str().expect("is one").to_owned()
        }),
    ];
    let mut wrong = Vec::new();
    let mut answer = (String::new(), Value::Null);
    let mut objects = 0;
    for line in NOVA.lines() {
        if let Some(request) = line.strip_prefix("GET ") {
            let (path, version) = request.split_once(" 2.").expect("names a version");
            let mut real = path.to_owned();
            for (word, id) in &known {
                real = real.replace(word, id.trim());
            }
            let minor = version.parse().expect("is a number");
            answer = (request.to_owned(), ask.get(&real, minor));
            let first = answer.1.as_object().and_then(|fields| fields.values().next());
            let empty = first.and_then(Value::as_array).is_some_and(Vec::is_empty);
            if empty && !EMPTY.contains(&path) {
                wrong.push(format!("{request}: an empty list proves nothing"));
            }
            continue;
        }
        let (place, fields) = line.trim().split_once(": ").expect("names fields");
        let (place, open) = place.strip_suffix(" …").map_or((place, false), |place| (place, true));
        for object in at(&answer.1, place) {
            objects += 1;
            compare(object, fields, open, &format!("GET {}, {place}", answer.0), &mut wrong);
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(objects > 300, "only {objects} objects were compared");
    guest.delete(&stage);
    guests::clear(&stage);
}

/// The objects at a place such as `servers[].addresses.*[]`.
fn at<'a>(answer: &'a Value, place: &str) -> Vec<&'a Value> {
    let mut found = vec![answer];
    for part in place.split('.').filter(|part| !part.is_empty()) {
        let name = part.trim_end_matches("[]");
        found = found
            .into_iter()
            .filter_map(Value::as_object)
            .flat_map(|fields| fields.iter().filter(|(field, _)| name == "*" || *field == name))
            .map(|(_, value)| value)
            .collect();
        if part.ends_with("[]") {
            found = found.into_iter().filter_map(Value::as_array).flatten().collect();
        }
    }
    found.into_iter().filter(|value| value.is_object()).collect()
}

fn compare(object: &Value, fields: &str, open: bool, place: &str, wrong: &mut Vec<String>) {
    let mut allowed = Vec::new();
    for field in fields.split_whitespace() {
        let (name, kinds) = field.rsplit_once('=').expect("names a type");
        let (name, optional) = name.strip_suffix('?').map_or((name, false), |name| (name, true));
        allowed.push(name);
        match object.get(name) {
            None if optional => {}
            None => wrong.push(format!("{place}: {name} is missing")),
            Some(value) if kinds.split('|').any(|kind| is(value, kind)) => {}
            Some(value) => wrong.push(format!("{place}: {name} is {value}, not {kinds}")),
        }
    }
    let names = object.as_object().into_iter().flat_map(|fields| fields.keys());
    for name in names.filter(|name| !open && !allowed.contains(&name.as_str())) {
        wrong.push(format!("{place}: {name} is not to be there"));
    }
}

fn is(value: &Value, kind: &str) -> bool {
    match kind {
        "any" => true,
        "null" => value.is_null(),
        "string" => value.is_string(),
        "boolean" => value.is_boolean(),
        "integer" => value.is_i64() || value.is_u64(),
        "number" => value.is_number(),
        "array" => value.is_array(),
        "object" => value.is_object(),
        _ => panic!("fields.txt names the type {kind}"),
    }
}

/// Requests without a client in between.
struct Asker<'a> {
    stage: &'a Stage,
    token: String,
}

impl Asker<'_> {
    fn new(stage: &Stage) -> Asker<'_> {
        let token = stage.run(&["openstack", "token", "issue", "-f", "value", "-c", "id"]);
        Asker { stage, token: token.trim().to_owned() }
    }

    fn get(&self, path: &str, minor: u32) -> Value {
        let url = format!("{}/compute/v2.1{path}", godwit_tests::lab::URL);
        let version = format!("OpenStack-API-Version: compute 2.{minor}");
        let token = format!("X-Auth-Token: {}", self.token);
        let authority = format!("{}/ca.pem", godwit_tests::lab::STATE_FOLDER);
        let answer = self.stage.run(&[
            "curl",
            "-sS",
            "--fail-with-body",
            "--cacert",
            &authority,
            "-H",
            &version,
            "-H",
            &token,
            &url,
        ]);
        serde_json::from_str(&answer).unwrap_or_else(|_| panic!("GET {path} at 2.{minor}: {answer}"))
    }
}
