//! What the daemons answer while something stands still that they depend on.

use crate::fleet;
use godwit_tests::vm::Vm;
use serde_json::Value;

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

/// Asks all of them for some seconds: each answers soon, and the host is not taken for lost. How long it took.
#[track_caller]
pub(crate) fn all_answer(vm: &Vm) -> Value {
    let ports = [fleet::API_PORT, fleet::METRICS_PORT].map(|port| port.to_string());
    let probed = vm.exec(&["python3", "-c", PROBE, &ports[0], &ports[1]]).expect("they answer");
    let probed: Value = serde_json::from_str(&probed).expect("is JSON");
    for of in ["api", "metrics"] {
        let longest = probed["took_s"][of]["longest"].as_f64().expect("is a number");
        assert!(longest < NO_ANSWER_TAKES_S, "{probed}");
    }
    assert!(!probed["states"].to_string().contains("lost"), "{probed}");
    probed
}
