//! Who is let in: users by tokens, agents by certificates, hosts by join tokens. All else is refused and logged.

use std::path::Path;
use std::process::Command;

use crate::fleet::{Fleet, KILL};
use godwit_tests::lab::{Host, STATE_FOLDER, URL};
use serde_json::{Value, json};

/// The status and the body that the API answers a request with; curl's own `words` say which.
pub(crate) fn http(fleet: &Fleet, words: &[&str]) -> (String, String) {
    let ca = format!("{STATE_FOLDER}/ca.pem");
    let begin = ["curl", "-sS", "--cacert", &ca, "-D", "-", "-w", "\n%{http_code}"];
    let answer = fleet.lab.coordinator().host().exec(&[&begin[..], words].concat()).expect("the API answers");
    let (body, status) = answer.rsplit_once('\n').expect("curl writes the status");
    (status.to_owned(), body.to_owned())
}

fn servers(fleet: &Fleet, token: &str) -> String {
    let header = format!("X-Auth-Token: {token}");
    http(fleet, &["-H", &header, &format!("{URL}/compute/v2.1/servers")]).0
}

/// A new token of the admin.
pub(crate) fn token(fleet: &Fleet) -> String {
    let file = fleet.lab.coordinator().host().file("lib/godwit/clouds.yaml");
    let clouds = std::fs::read_to_string(file).expect("is there");
    let password = clouds.lines().find_map(|line| line.trim().strip_prefix("password:"));
    let password = password.expect("has one").trim().trim_matches(['"', '\'']);
    let domain = json!({"name": "Default"});
    let body = json!({"auth": {
        "identity": {"methods": ["password"], "password": {"user": {"name": "admin", "domain": domain, "password": password}}},
        "scope": {"project": {"name": "admin", "domain": domain}},
    }});
    let url = format!("{URL}/identity/v3/auth/tokens");
    let words = ["-H", "Content-Type: application/json", "-d", &body.to_string(), &url];
    let (status, answer) = http(fleet, &words);
    assert_eq!(status, "201", "{answer}");
    let headers = answer.lines().filter_map(|line| line.split_once(": "));
    let mut token = headers.filter(|(name, _)| name.eq_ignore_ascii_case("x-subject-token"));
    token.next().expect("is a header").1.trim().to_owned()
}

#[test]
fn a_forged_or_revoked_token_opens_nothing() {
    let fleet = Fleet::start(1);
    let token = token(&fleet);
    assert_eq!(servers(&fleet, &token), "200");
    let mut forged = token.clone().into_bytes();
    let last = forged.len() - 1;
    forged[last] = if forged[last] == b'A' { b'B' } else { b'A' };
    let middle = forged.len() / 2;
    forged[middle] = if forged[middle] == b'A' { b'B' } else { b'A' };
    let forged = String::from_utf8(forged).expect("is text");
    for wrong in [forged.as_str(), "", "gAAAAABm", &"x".repeat(4096)] {
        assert_eq!(servers(&fleet, wrong), "401", "{wrong:?}");
    }
    let (auth, subject) = (format!("X-Auth-Token: {token}"), format!("X-Subject-Token: {token}"));
    let url = format!("{URL}/identity/v3/auth/tokens");
    assert_eq!(http(&fleet, &["-X", "DELETE", "-H", &auth, "-H", &subject, &url]).0, "204");
    assert_eq!(servers(&fleet, &token), "401");
}

/// Waits until a daemon's log says something new.
fn wait_for_log(host: &Host, daemon: &str, since: usize, said: &str) {
    let log = || std::fs::read_to_string(host.log_file(daemon)).unwrap_or_default();
    let seen = || Ok(log().get(since..).is_some_and(|text| text.contains(said)));
    host.wait(&format!("{said:?} in {daemon}'s log"), seen)
        .unwrap_or_else(|error| panic!("{error}: {}", log().get(since..).unwrap_or_default()));
}

fn log_length(host: &Host, daemon: &str) -> usize {
    std::fs::metadata(host.log_file(daemon)).map_or(0, |data| usize::try_from(data.len()).unwrap_or(0))
}

fn is_connected(fleet: &Fleet, name: &str) -> bool {
    fleet
        .godwit(&["host", "list"])
        .as_array()
        .expect("is a list")
        .iter()
        .any(|host| host["name"] == name && host["connected"] == true)
}

/// Runs the host's agent with files of another identity until both sides have said what they think of it.
fn impersonate(
    fleet: &Fleet,
    host: &Host,
    files: &[(&str, Vec<u8>)],
    agent_says: &str,
    coordinator_says: &str,
) {
    host.kill_agent(KILL).expect("it is killed");
    let folder = host.file("lib/godwit/identity");
    let path = |name: &str| folder.join(name);
    let kept: Vec<(&str, Vec<u8>)> =
        files.iter().map(|(name, _)| (*name, std::fs::read(path(name)).expect("is there"))).collect();
    let write = |files: &[(&str, Vec<u8>)]| {
        for (name, bytes) in files {
            std::fs::write(path(name), bytes).expect("is writable");
        }
    };
    write(files);
    let coordinator = fleet.lab.coordinator().host();
    host.wait("the end of its connection", || Ok(!is_connected(fleet, host.name()))).expect("it ends");
    let (agents, coordinators) =
        (log_length(host, "godwit-agent"), log_length(coordinator, "godwit-coordinator"));
    host.start_agent().expect("it starts");
    wait_for_log(coordinator, "godwit-coordinator", coordinators, coordinator_says);
    wait_for_log(host, "godwit-agent", agents, agent_says);
    assert!(!is_connected(fleet, host.name()));
    host.kill_agent(KILL).expect("it is killed");
    write(&kept);
}

/// Key and certificate of another authority, which names the host all the same.
fn certificate_of_another_authority(folder: &Path, host_id: &str) -> (Vec<u8>, Vec<u8>) {
    let (key, certificate) = (folder.join("other.key"), folder.join("other.pem"));
    let name = format!("subjectAltName=DNS:{host_id}.host.godwit");
    let output = Command::new("openssl")
        .args([
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:P-256",
            "-nodes",
            "-days",
            "2",
        ])
        .args(["-subj", "/CN=other", "-addext", &name, "-keyout"])
        .args([&key, Path::new("-out"), &certificate])
        .output()
        .expect("openssl runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let read = |path: &Path| std::fs::read(path).expect("is there");
    (read(&key), read(&certificate))
}

/// A certificate of the installation's own authority for the host's own key, which ends in 20 days.
fn certificate_that_ends_soon(fleet: &Fleet, host_id: &str, key: &Path) -> String {
    let authority = fleet.lab.coordinator().host().file("lib/godwit");
    let extensions = fleet.lab.folder().join("soon.cnf");
    let text = format!("subjectAltName=DNS:{host_id}.host.godwit\nextendedKeyUsage=clientAuth,serverAuth\n");
    std::fs::write(&extensions, text).expect("is writable");
    let script = "openssl req -new -key \"$1\" -subj /CN=soon | \
                  openssl x509 -req -days 20 -CA \"$2/ca.pem\" -CAkey \"$2/ca.key\" -extfile \"$3\"";
    let mut command = Command::new("bash");
    command.args(["-o", "pipefail", "-c", script, "bash"]).args([key, &authority, &extensions]);
    let output = command.output().expect("bash runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("is text")
}

#[test]
fn an_agent_shows_its_own_certificate_or_is_refused_and_gets_a_new_one_before_it_ends() {
    let fleet = Fleet::start(2);
    let (first, second) = (fleet.host(1), fleet.host(2));
    let identity = |host: &Host, name: &str| {
        std::fs::read(host.file("lib/godwit/identity").join(name)).expect("is there")
    };
    let id = String::from_utf8(identity(first, "host.id")).expect("is text");
    let (key, certificate) = certificate_of_another_authority(fleet.lab.folder(), id.trim());
    let files = [("host.key", key), ("host.pem", certificate)];
    impersonate(&fleet, first, &files, "not connected", "a connection for agents is refused");

    let files = ["host.key", "host.pem"].map(|name| (name, identity(second, name)));
    let another = "its certificate belongs to another host";
    impersonate(&fleet, first, &files, another, another);

    let folder = first.file("lib/godwit/identity");
    let soon = certificate_that_ends_soon(&fleet, id.trim(), &folder.join("host.key"));
    std::fs::write(folder.join("host.pem"), &soon).expect("is writable");
    first.start_agent().expect("it starts");
    let shown = || std::fs::read_to_string(folder.join("host.pem")).expect("is there");
    first.wait("a newer certificate", || Ok(shown() != soon)).expect("it comes");
    first.kill_agent(KILL).expect("it is killed");
    first.start_agent().expect("it starts with it");
    fleet.wait_for_hosts();
    fleet.create("one", &["--host", "h1"]);
    fleet.clean();
}

#[test]
fn the_identity_of_a_removed_host_opens_nothing() {
    let fleet = Fleet::start(2);
    let host = fleet.host(2);
    host.kill_agent(KILL).expect("it is killed");
    let removed = || Ok(fleet.lab.coordinator().cli_output(&["host", "remove", "h2"])?.status.success());
    host.wait("its removal", removed).expect("it is removed");
    let coordinator = fleet.lab.coordinator().host();
    let (agents, coordinators) =
        (log_length(host, "godwit-agent"), log_length(coordinator, "godwit-coordinator"));
    host.start_agent().expect("it starts");
    wait_for_log(coordinator, "godwit-coordinator", coordinators, "no such host");
    wait_for_log(host, "godwit-agent", agents, "no such host");
    let names = fleet.godwit(&["host", "list"]);
    let names: Vec<&Value> = names.as_array().expect("is a list").iter().map(|host| &host["name"]).collect();
    assert_eq!(names, ["h1"]);
}

#[test]
fn a_join_token_that_was_used_expired_or_made_up_lets_no_host_in() {
    let fleet = Fleet::start(1);
    let host = fleet.host(1);
    let agent = godwit_tests::programs_folder().join("godwit-agent").to_string_lossy().into_owned();
    let join = |token: &str| {
        let output = host.output(&[agent.as_str(), "join", URL, token, "--dir", "/var/lib/other"]);
        output.expect("the agent runs")
    };
    let coordinator = fleet.lab.coordinator().host();
    let token = fleet.lab.coordinator().join_token().expect("is made");
    let short = fleet.godwit(&["host", "token", "--ttl", "1"])["token"].as_str().expect("is text").to_owned();
    // Another name for the same machine, so that only the token can be at fault.
    host.exec(&["hostname", "h9"]).expect("is set");
    assert!(join(&token).status.success(), "a token that is good opens");
    host.exec(&["hostname", "h8"]).expect("is set");
    host.exec(&["rm", "-r", "/var/lib/other"]).expect("is removed");
    let authority = token.rsplit_once('.').expect("has three parts").1;
    let forged = format!("gw1.{}.{authority}", "A".repeat(43));
    let stranger = format!("{}.{}", token.rsplit_once('.').expect("has three parts").0, "0".repeat(64));
    let since = log_length(coordinator, "godwit-coordinator");
    // It is good for a second, and trying it sooner would use it.
    std::thread::sleep(std::time::Duration::from_millis(1_100));
    for (token, reason) in [
        (&token, "used"),
        (&short, "expired"),
        (&forged, "no join token of this cloud"),
        (&stranger, "does not prove"),
    ] {
        let output = join(token);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && said.contains(reason), "{said}");
    }
    wait_for_log(coordinator, "godwit-coordinator", since, "a host is not let in");
    let hosts = fleet.godwit(&["host", "list"]);
    assert_eq!(hosts.as_array().expect("is a list").len(), 2, "{hosts:#}");
}
