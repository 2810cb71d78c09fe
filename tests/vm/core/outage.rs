//! A file server that stands still: what is told, what goes on meanwhile, and what becomes of the copies.

use crate::fleet::{self, godwit, value};
use crate::nfs::{Client, NfsLab, PATIENCE, SERVER, big_file, ok};
use godwit_tests::vm::Vm;
use serde_json::Value;
use std::time::Instant;

/// No answer of the daemons may take longer, on whatever machine this runs; 0.1 s is aimed at, 0.25 s under emulation.
const NO_ANSWER_TAKES_S: f64 = 2.0;

/// Asks the agent for its series and the coordinator for its hosts and servers, and says how long each took, and in which
/// states the host was.
const PROBE: &str = r#"
import http.client, json, re, sys, time
api, metrics = int(sys.argv[1]), int(sys.argv[2])
settings = open("/etc/godwit/clouds.yaml").read()
say = lambda key: re.search(key + r":\s*\"?([^\s\"]+)", settings).group(1)
def ask(port, method, path, body=None, headers={}):
    begun = time.monotonic()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    data = answer.read()
    assert answer.status < 300, (path, answer.status, data)
    return time.monotonic() - begun, answer, data
user = {"name": "admin", "domain": {"id": "default"}, "password": say("password")}
scope = {"project": {"name": say("project_name"), "domain": {"id": "default"}}}
login = {"auth": {"identity": {"methods": ["password"], "password": {"user": user}}, "scope": scope}}
headers = {"content-type": "application/json"}
_, answer, _ = ask(api, "POST", "/identity/v3/auth/tokens", json.dumps(login), headers)
token = {"x-auth-token": answer.getheader("x-subject-token")}
took, states = {"api": [], "metrics": []}, set()
for _ in range(40):
    seconds, _, data = ask(api, "GET", "/operator/v1/hosts", None, token)
    took["api"].append(seconds)
    states |= {host["state"] for host in json.loads(data)["hosts"]}
    took["api"].append(ask(api, "GET", "/compute/v2.1/servers/detail", None, token)[0])
    took["api"].append(ask(api, "GET", "/image/v2/images", None, token)[0])
    took["metrics"].append(ask(metrics, "GET", "/metrics")[0])
    time.sleep(0.05)
rank = lambda all, share: sorted(all)[min(len(all) - 1, int(share * len(all)))]
of = {name: {"p50": rank(all, 0.5), "p99": rank(all, 0.99), "longest": max(all)} for name, all in took.items()}
print(json.dumps({"took_s": of, "states": sorted(states)}))
"#;

fn events(vm: &Vm, kind: &str) -> usize {
    ok(godwit(vm, &format!("event list --kind {kind}"))).as_array().map_or(0, Vec::len)
}

/// Waits until the server has the beginning of a disk, and stops it.
fn stop_in_mid_copy(lab: &NfsLab) -> Instant {
    let begun = "timeout 90 sh -c 'until [ -n \"$(find /export/ext4/instances -name disk.partial -size +1M)\" ]; do \
                 sleep 0.1; done'";
    ok(lab.server.shell(begun));
    ok(lab.server.pause(true));
    Instant::now()
}

#[test]
fn a_file_server_that_stands_still_holds_up_its_copies_and_nothing_else() {
    let lab = NfsLab::start();
    let client = lab.fleet_client(1);
    lab.serve();
    let share = format!("[nfs]\nserver = \"{SERVER}\"\nexport = \"/export/ext4\"");
    fleet::start(&client.vm, "10.9.0.11", &share);
    the_agent_has_mounted_its_share_once(&client);
    big_file(&client.vm, "/tmp/image", 48);
    ok(godwit(&client.vm, "image create big --file /tmp/image --disk-format raw"));
    ok(godwit(&client.vm, "flavor create small --vcpus 1 --memory 64M --disk 0"));
    // So that a copy takes some seconds.
    ok(lab.server.shell("modprobe sch_netem; tc qdisc add dev eth0 root netem rate 100mbit limit 10000"));
    what_stands_still_is_told_and_can_be_given_up(&lab, &client.vm);
    a_copy_goes_on_when_the_server_is_back(&lab, &client.vm);
}

fn the_agent_has_mounted_its_share_once(client: &Client) {
    let mounts = client.shell("grep ' /srv/godwit ' /proc/self/mounts");
    assert_eq!(mounts.lines().count(), 1, "{mounts}");
    for word in ["10.9.0.1:/export/ext4 ", " nfs4 ", "vers=4.2", "softerr", "noatime", "nosuid", "nodev"] {
        assert!(mounts.contains(word), "no {word} in {mounts}");
    }
    let pools = ok(godwit(&client.vm, "pool list"));
    let pool = &pools[0];
    assert_eq!((&pool["kind"], &pool["source"]), (&"nfs".into(), &"10.9.0.1:/export/ext4".into()));
    assert_eq!(pool["hosts"][0]["reachable"], true, "{pools}");
    assert!(
        pool["total_bytes"].as_u64() > Some(500 << 20) && pool["total_inodes"].as_u64() > Some(0),
        "{pools}"
    );
}

fn what_stands_still_is_told_and_can_be_given_up(lab: &NfsLab, vm: &Vm) {
    ok(godwit(vm, "server create one --flavor small --image big --no-network"));
    let stopped = stop_in_mid_copy(lab);
    let told =
        |what: &str| eprintln!("{what}: {:.1} s after the server stopped", stopped.elapsed().as_secs_f64());
    ok(vm.until("the stall's series", PATIENCE, |vm| Ok(value(vm, "godwit_pool_stalled")? == Some(1.0))));
    told("the series");
    ok(vm.until("the stall's event", PATIENCE, |vm| Ok(events(vm, "pool_stalled") == 1)));
    told("the event");
    let not_reached = |vm: &Vm| Ok(godwit(vm, "pool list")?[0]["hosts"][0]["reachable"] == false);
    ok(vm.until("the pool's state", PATIENCE, not_reached));
    told("the pool's state");

    let ports = [fleet::API_PORT, fleet::METRICS_PORT].map(|port| port.to_string());
    let probed = ok(vm.exec(&["python3", "-c", PROBE, &ports[0], &ports[1]]));
    eprintln!("while the server stands still: {}", probed.trim());
    let probed: Value = serde_json::from_str(&probed).expect("is JSON");
    for of in ["api", "metrics"] {
        let longest = probed["took_s"][of]["longest"].as_f64().expect("is a number");
        assert!(longest < NO_ANSWER_TAKES_S, "{probed}");
    }
    assert!(!probed["states"].to_string().contains("lost"), "{probed}");

    // The copy hangs with its server; its operation does not.
    ok(godwit(vm, "server delete one"));
    let undone = |vm: &Vm| {
        let operations = godwit(vm, "operation list")?;
        Ok(operations.as_array().is_some_and(|all| all.iter().any(|one| one["phase"] == "undoing")))
    };
    ok(vm.until("the creation's being given up", PATIENCE, undone));
    told("the creation was given up");
    ok(lab.server.pause(false));
    let gone = |vm: &Vm| Ok(godwit(vm, "server list")?.as_array().is_some_and(Vec::is_empty));
    ok(vm.until("the server's deletion", PATIENCE, gone));
    assert_eq!(ok(lab.server.shell("ls -A /export/ext4/instances")), "", "nothing of it is left");
    let reaped = |vm: &Vm| Ok(!vm.output(&["pgrep", "-f", "worker copy"])?.success());
    ok(vm.until("the worker's end", PATIENCE, reaped));
    ok(vm.until("the end of the stall", PATIENCE, |vm| Ok(value(vm, "godwit_pool_stalled")? == Some(0.0))));
    ok(vm.until("the event of its end", PATIENCE, |vm| Ok(events(vm, "pool_back") == 1)));
}

fn a_copy_goes_on_when_the_server_is_back(lab: &NfsLab, vm: &Vm) {
    ok(godwit(vm, "server create two --flavor small --image big --no-network"));
    stop_in_mid_copy(lab);
    ok(vm.until("the copy's stall", PATIENCE, |vm| Ok(value(vm, "godwit_copies_stalled")? == Some(1.0))));
    ok(lab.server.pause(false));
    ok(vm.until("the server's start", PATIENCE, |vm| {
        let server = godwit(vm, "server show two")?;
        assert_ne!(server["status"], "ERROR", "{server}\n{}", fleet::logs(vm));
        Ok(server["status"] == "ACTIVE")
    }));
    assert!(ok(value(vm, "godwit_copy_stalls_total")) >= Some(1.0));
    // The server's own view, and no cache of the client's.
    let image = ok(godwit(vm, "image show big"))["id"].as_str().map(str::to_owned).expect("an id");
    ok(lab.server.shell(&format!("cmp /export/ext4/images/{image} /export/ext4/instances/*/disk")));
    assert_eq!(ok(lab.server.shell("find /export/ext4 -name '*.partial*'")), "");
}
