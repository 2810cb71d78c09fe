//! Uploads and downloads: whole and checked, or taken back.

use crate::commands::ok;
use crate::support::{Answer, Service};
use serde_json::json;
use sha2::{Digest, Sha512};
use std::sync::{Arc, Mutex};

#[test]
fn an_image_is_uploaded_with_its_size_and_checked() {
    let content = vec![7u8; 100_000];
    let hash = hex::encode(Sha512::digest(&content));
    let service = Service::start(move |request| match request.line().as_str() {
        "POST /image/v2/images" => Some(Answer::json(201, json!({"id": "i-1", "status": "queued"}))),
        "PUT /image/v2/images/i-1/file" => Some(Answer(204, Vec::new())),
        "GET /image/v2/images/i-1" => ok(json!({
            "id": "i-1", "name": "cirros", "status": "active", "size": 100_000, "os_hash_algo": "sha512",
            "os_hash_value": hash,
        })),
        _ => None,
    });
    std::fs::write(service.folder().join("f.qcow2"), &content).unwrap();
    let arguments = [
        "image",
        "create",
        "cirros",
        "--file",
        "f.qcow2",
        "--disk-format",
        "qcow2",
        "--public",
        "--property",
        "a=b",
        "--json",
    ];
    assert_eq!(service.run(&arguments).json()["status"], "active");
    let requests = service.take_requests();
    assert_eq!(
        requests[0].json(),
        json!({"name": "cirros", "disk_format": "qcow2", "container_format": "bare", "visibility": "public", "a": "b"})
    );
    assert_eq!(requests[1].header("content-length"), Some("100000"));
    assert_eq!(requests[1].header("content-type"), Some("application/octet-stream"));
    assert!(requests[1].body == content);
}

#[test]
fn an_image_that_arrives_changed_is_taken_back() {
    let service = Service::start(|request| match request.line().as_str() {
        "POST /image/v2/images" => Some(Answer::json(201, json!({"id": "i-1"}))),
        "PUT /image/v2/images/i-1/file" | "DELETE /image/v2/images/i-1" => Some(Answer(204, Vec::new())),
        "GET /image/v2/images/i-1" => ok(json!({
            "id": "i-1", "status": "active", "size": 3, "os_hash_algo": "sha512", "os_hash_value": "00",
        })),
        _ => None,
    });
    std::fs::write(service.folder().join("f"), "abc").unwrap();
    let run = service.run(&["image", "create", "x", "--file", "f", "--disk-format", "raw"]);
    assert_eq!(run.code, 1);
    assert!(run.stderr.contains("differs"), "{}", run.stderr);
    assert_eq!(service.take_lines().last().unwrap(), "DELETE /image/v2/images/i-1");
}

#[test]
fn a_refused_upload_is_told_in_the_services_words_and_taken_back() {
    let service = Service::start(|request| match request.line().as_str() {
        "POST /image/v2/images" => Some(Answer::json(201, json!({"id": "i-1"}))),
        "PUT /image/v2/images/i-1/file" => {
            Some(Answer(400, b"400 Bad Request: it has a backing file".to_vec()))
        }
        "DELETE /image/v2/images/i-1" => Some(Answer(204, Vec::new())),
        _ => None,
    });
    std::fs::write(service.folder().join("f"), "abc").unwrap();
    let run = service.run(&["image", "create", "x", "--file", "f", "--disk-format", "qcow2"]);
    assert_eq!(run.code, 1);
    assert!(run.stderr.contains("it has a backing file"), "{}", run.stderr);
    assert_eq!(service.take_lines().last().unwrap(), "DELETE /image/v2/images/i-1");
}

#[test]
fn a_connection_cut_during_an_upload_is_told_with_how_far_it_came() {
    let service = Service::start(|request| match request.line().as_str() {
        "POST /image/v2/images" => Some(Answer::json(201, json!({"id": "i-1"}))),
        // The support code hangs up instead of answering.
        "PUT /image/v2/images/i-1/file" => Some(Answer(0, Vec::new())),
        "DELETE /image/v2/images/i-1" => Some(Answer(204, Vec::new())),
        _ => None,
    });
    std::fs::write(service.folder().join("f"), "abc").unwrap();
    let run = service.run(&["image", "create", "x", "--file", "f", "--disk-format", "raw"]);
    assert_eq!(run.code, 1);
    assert!(run.stderr.contains("broke off after 3 of 3 bytes"), "{}", run.stderr);
    assert_eq!(service.take_lines().last().unwrap(), "DELETE /image/v2/images/i-1");
}

#[test]
fn a_saved_image_is_whole_or_not_there() {
    let content = b"the image".to_vec();
    let hash = Arc::new(Mutex::new(hex::encode(Sha512::digest(&content))));
    let announced = Arc::clone(&hash);
    let service = Service::start(move |request| match request.line().as_str() {
        "GET /image/v2/images/i-1" => ok(json!({
            "id": "i-1", "name": "x", "os_hash_algo": "sha512", "os_hash_value": *announced.lock().unwrap(),
        })),
        "GET /image/v2/images/i-1/file" => Some(Answer(200, content.clone())),
        _ => None,
    });
    service.run(&["image", "save", "i-1", "--file", "out"]).text();
    assert_eq!(std::fs::read(service.folder().join("out")).unwrap(), b"the image");
    assert_eq!(service.run(&["image", "save", "i-1", "--file", "-"]).text(), "the image");
    *hash.lock().unwrap() = "00".into();
    assert_eq!(service.run(&["image", "save", "i-1", "--file", "out2"]).code, 1);
    assert!(!service.folder().join("out2").exists());
    assert!(!service.folder().join("out2.partial").exists());
}
