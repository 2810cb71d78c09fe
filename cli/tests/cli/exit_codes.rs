//! Each exit code, and errors that say what to do.

use crate::support::{Answer, Service, run};
use serde_json::json;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::thread;

#[test]
fn a_wrong_command_line_is_2() {
    let service = Service::start(|_| None);
    let wrong: [&[&str]; 8] = [
        &["server", "frobnicate"],
        &["flavor", "create", "f", "--vcpus", "0", "--memory", "1G", "--disk", "1"],
        &["flavor", "create", "f", "--vcpus", "1", "--memory", "1.5G", "--disk", "1"],
        &["network", "create", "n", "--subnet", "10.0.0.0"],
        &["image", "create", "i", "--file", "absent", "--disk-format", "raw"],
        &["server", "list", "--json", "--quiet"],
        &["flavor", "set", "f"],
        &["server", "stop", "s", "--timeout", "5"],
    ];
    for arguments in wrong {
        assert_eq!(service.run(arguments).code, 2, "{arguments:?}");
    }
    assert!(service.take_requests().is_empty());
}

#[test]
fn a_refused_request_is_1_in_the_services_words_and_with_its_id() {
    let service = Service::start(|request| {
        (request.method == "POST").then(|| Answer::fault(409, "conflictingRequest", "the name is taken"))
    });
    let run = service.run(&["flavor", "create", "f", "--vcpus", "1", "--memory", "64", "--disk", "1"]);
    assert_eq!((run.code, run.stdout.as_str()), (1, ""));
    assert!(run.stderr.contains("the name is taken") && run.stderr.contains("req-1"), "{}", run.stderr);
}

#[test]
fn what_is_not_there_is_3() {
    let service = Service::start(|request| {
        request.target.ends_with("?name=absent").then(|| Answer::json(200, json!({"images": []})))
    });
    let run = service.run(&["image", "show", "absent"]);
    assert_eq!(run.code, 3);
    assert!(run.stderr.contains("'absent'") && run.stderr.contains("godwit image list"), "{}", run.stderr);
}

#[test]
fn a_wrong_password_is_4_and_says_where_it_comes_from() {
    let service = Service::start(|_| None);
    let run = service.run_as("wrong", &["server", "list"]);
    assert_eq!(run.code, 4);
    for words in ["wrong password", "user 'admin'", "OS_* variables"] {
        assert!(run.stderr.contains(words), "{words}: {}", run.stderr);
    }
    assert!(!run.stderr.contains("secret"));
}

#[test]
fn a_coordinator_that_is_away_is_4_and_says_which_file_named_it() {
    // Bound and closed: nobody listens there now.
    let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let auth =
        format!("{{auth_url: 'http://{address}/identity/v3', username: u, password: p, project_name: q}}");
    std::fs::write(folder.path().join("clouds.yaml"), format!("clouds: {{godwit: {{auth: {auth}}}}}"))
        .unwrap();
    let away = run(folder.path(), &[], &["server", "list"]);
    assert_eq!(away.code, 4);
    for words in
        ["clouds.yaml", "cloud 'godwit'", &address.to_string(), "connection refused", "coordinator runs"]
    {
        assert!(away.stderr.contains(words), "{words}: {}", away.stderr);
    }
}

#[test]
fn a_port_that_does_not_speak_http_is_4_and_says_to_try_https() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/identity/v3", listener.local_addr().unwrap());
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            // A TLS alert, as a server answers to what is no handshake; the login is read before, not reset.
            let _ = stream.read(&mut [0; 4096]);
            let _ = stream.write_all(&[0x15, 3, 3, 0, 2, 2, 50]);
        }
    });
    let folder = tempfile::tempdir().unwrap();
    let variables =
        [("OS_AUTH_URL", url.as_str()), ("OS_USERNAME", "u"), ("OS_PASSWORD", "p"), ("OS_PROJECT_NAME", "q")];
    let plain = run(folder.path(), &variables, &["server", "list"]);
    assert_eq!(plain.code, 4);
    assert!(plain.stderr.contains("https://"), "{}", plain.stderr);
}

#[test]
fn no_cloud_at_all_is_4_and_says_how_to_name_one() {
    let folder = tempfile::tempdir().unwrap();
    let lost =
        run(folder.path(), &[("XDG_CONFIG_HOME", folder.path().to_str().unwrap())], &["server", "list"]);
    assert_eq!(lost.code, 4);
    assert!(lost.stderr.contains("OS_CLIENT_CONFIG_FILE"), "{}", lost.stderr);
}

#[test]
fn something_else_at_the_address_is_4() {
    let service = Service::start(|_| None);
    let url = format!("http://{}/nothing", service.address);
    let variables =
        [("OS_AUTH_URL", url.as_str()), ("OS_USERNAME", "u"), ("OS_PASSWORD", "p"), ("OS_PROJECT_NAME", "q")];
    let elsewhere = run(service.folder(), &variables, &["server", "list"]);
    assert_eq!(elsewhere.code, 4);
    assert!(elsewhere.stderr.contains("should end in /identity/v3"), "{}", elsewhere.stderr);
}

#[test]
fn a_wait_that_is_over_is_5_and_says_how_to_go_on() {
    let service = Service::start(|request| match request.line().as_str() {
        "POST /compute/v2.1/servers/s-1/action" => Some(Answer(202, Vec::new())),
        "GET /compute/v2.1/servers/s-1" => Some(Answer::json(
            200,
            json!({"server": {
                "id": "s-1", "name": "web", "status": "ACTIVE", "OS-EXT-STS:task_state": "powering-off",
            }}),
        )),
        _ => None,
    });
    let run = service.run(&["server", "stop", "s-1", "--wait", "--timeout", "1"]);
    assert_eq!(run.code, 5);
    for words in ["powering-off", "--timeout", "godwit server show s-1"] {
        assert!(run.stderr.contains(words), "{words}: {}", run.stderr);
    }
}

#[test]
fn a_token_that_ran_out_is_renewed_once() {
    let mut refused = false;
    let service = Service::start(move |_| {
        if refused {
            return Some(Answer::json(200, json!({"servers": []})));
        }
        refused = true;
        Some(Answer(401, Vec::new()))
    });
    service.run(&["server", "list"]).text();
    let always = Service::start(|_| Some(Answer(401, Vec::new())));
    assert_eq!(always.run(&["server", "list"]).code, 4);
    assert_eq!(always.take_requests().len(), 2);
}

#[test]
fn a_reader_that_leaves_is_not_complained_about() {
    let many: Vec<_> =
        (0..5000).map(|number| json!({"id": format!("i-{number}"), "name": "x".repeat(100)})).collect();
    let service = Service::start(move |_| Some(Answer::json(200, json!({"images": many}))));
    let mut child = Command::new(env!("CARGO_BIN_EXE_godwit"))
        .env_clear()
        .env("OS_AUTH_URL", format!("http://{}/identity/v3", service.address))
        .envs([("OS_USERNAME", "admin"), ("OS_PASSWORD", "secret"), ("OS_PROJECT_NAME", "admin")])
        .args(["image", "list"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let mut stderr = String::new();
    child.stderr.take().unwrap().read_to_string(&mut stderr).unwrap();
    assert_eq!((child.wait().unwrap().code(), stderr.as_str()), (Some(0), ""));
}

#[test]
fn an_unknown_authority_is_4_and_says_to_set_cacert() {
    let signed = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).unwrap();
    let key = rustls::pki_types::PrivatePkcs8KeyDer::from(signed.signing_key.serialize_der());
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![signed.cert.der().clone()], key.into())
        .unwrap();
    let config = Arc::new(config);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("https://{}/identity/v3", listener.local_addr().unwrap());
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let mut tls = rustls::ServerConnection::new(Arc::clone(&config)).unwrap();
            let mut stream = rustls::Stream::new(&mut tls, &mut stream);
            // A client that trusts us sends its login; it only needs an answer.
            if stream.read(&mut [0; 4096]).is_ok() {
                let _ = stream
                    .write_all(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
            }
        }
    });
    let folder = tempfile::tempdir().unwrap();
    let ca = folder.path().join("ca.pem");
    std::fs::write(&ca, signed.cert.pem()).unwrap();
    let mut variables = vec![
        ("OS_AUTH_URL", url.as_str()),
        ("OS_USERNAME", "u"),
        ("OS_PASSWORD", "p"),
        ("OS_PROJECT_NAME", "q"),
    ];
    let unknown = run(folder.path(), &variables, &["server", "list"]);
    assert_eq!(unknown.code, 4);
    assert!(unknown.stderr.contains("cacert") && unknown.stderr.contains("not signed"), "{}", unknown.stderr);
    variables.push(("OS_CACERT", ca.to_str().unwrap()));
    let known = run(folder.path(), &variables, &["server", "list"]);
    assert!(
        known.stderr.contains("is no identity service"),
        "the certificate is trusted now: {}",
        known.stderr
    );
}

#[test]
fn completion_needs_no_cloud() {
    let folder = tempfile::tempdir().unwrap();
    for shell in ["bash", "zsh", "fish"] {
        assert!(run(folder.path(), &[], &["completion", shell]).text().contains("godwit"), "{shell}");
    }
}
