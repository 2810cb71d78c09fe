//! Security groups through the router, and what hosts are then told.

use super::*;
use crate::l2;
use godwit_protocol::security::{Direction, Family, Remote};

impl Scene {
    async fn default_group(&self) -> Value {
        let listed =
            self.net(As::Admin, Method::GET, "/security-groups?name=default", Value::Null).await.json();
        let project = self.api.admin.1.to_string();
        let groups = listed["security_groups"].as_array().unwrap();
        groups.iter().find(|g| g["project_id"] == project.as_str()).unwrap().clone()
    }

    async fn group(&self, name: &str) -> String {
        let body = json!({ "security_group": { "name": name } });
        text(&self.make("/security-groups", body).await["security_group"]["id"])
    }

    fn wanted(&self) -> godwit_protocol::network::NetworkWanted {
        let app = &self.api.app;
        app.ledger
            .read(|fleet| l2::wanted(fleet, &fleet.networks[&self.network], self.host, &app.config).unwrap())
    }
}

fn text(value: &Value) -> String {
    value.as_str().unwrap().to_owned()
}

#[tokio::test]
async fn each_project_has_a_default_group_that_lets_out_and_lets_its_members_in() {
    let scene = Scene::new().await;
    let group = scene.default_group().await;
    let rules = group["security_group_rules"].as_array().unwrap();
    let mut told: Vec<String> = rules
        .iter()
        .map(|r| {
            assert!(r["protocol"].is_null() && r["remote_ip_prefix"].is_null(), "{r}");
            let from = if r["remote_group_id"] == group["id"] { "members" } else { "any" };
            format!("{} {} {from}", text(&r["direction"]), text(&r["ethertype"]))
        })
        .collect();
    told.sort();
    assert_eq!(told, ["egress IPv4 any", "egress IPv6 any", "ingress IPv4 members", "ingress IPv6 members"]);
    assert_eq!(scene.default_group().await["id"], group["id"], "and only one");
    let of_member = scene.net(As::Member, Method::GET, "/security-groups", Value::Null).await.json();
    assert_eq!(of_member["security_groups"].as_array().unwrap().len(), 1);
    assert_ne!(of_member["security_groups"][0]["id"], group["id"], "each project its own");
    let path = format!("/security-groups/{}", text(&group["id"]));
    assert_eq!(scene.net(As::Member, Method::GET, &path, Value::Null).await.status, 404);
}

#[tokio::test]
async fn a_port_has_the_default_group_unless_it_names_others() {
    let scene = Scene::new().await;
    let default = scene.default_group().await["id"].clone();
    let web = scene.group("web").await;
    let port = |other: Value| {
        let mut body = json!({ "network_id": scene.network });
        body.as_object_mut().unwrap().extend(other.as_object().unwrap().clone());
        json!({ "port": body })
    };
    for (body, groups, secure) in [
        (json!({}), json!([default]), true),
        (json!({ "security_groups": [] }), json!([]), true),
        (json!({ "security_groups": [web, web] }), json!([web]), true),
        (json!({ "port_security_enabled": false }), json!([]), false),
    ] {
        let made = scene.make("/ports", port(body.clone())).await;
        let made = &made["port"];
        assert_eq!(
            (&made["security_groups"], &made["port_security_enabled"]),
            (&groups, &json!(secure)),
            "{body}"
        );
    }
    let both = port(json!({ "port_security_enabled": false, "security_groups": [web] }));
    let (status, text) = scene.refusal(Method::POST, "/ports", both).await;
    assert_eq!(status, 409, "{text}");
    assert!(text.contains("Cannot disable port security"), "{text}");
}

#[tokio::test]
async fn rules_that_mean_nothing_are_refused_in_the_words_that_clients_know() {
    let scene = Scene::new().await;
    let group = scene.group("web").await;
    let rule = |other: Value| {
        let mut body = json!({ "security_group_id": group, "direction": "ingress" });
        body.as_object_mut().unwrap().extend(other.as_object().unwrap().clone());
        json!({ "security_group_rule": body })
    };
    scene
        .make(
            "/security-group-rules",
            rule(json!({ "protocol": "tcp", "port_range_min": 22, "port_range_max": 22 })),
        )
        .await;
    let twice = json!({ "protocol": "6", "port_range_min": 22, "port_range_max": 22, "remote_ip_prefix": "0.0.0.0/0" });
    for (body, status, name) in [
        (twice, 409, "SecurityGroupRuleExists"),
        (json!({ "direction": "sideways" }), 400, "direction"),
        (json!({ "ethertype": "IPX" }), 400, "ethertype"),
        (json!({ "protocol": "tpc" }), 400, "SecurityGroupRuleInvalidProtocol"),
        (json!({ "protocol": "256" }), 400, "SecurityGroupRuleInvalidProtocol"),
        (json!({ "protocol": "icmpv6" }), 400, "SecurityGroupEthertypeConflictWithProtocol"),
        (json!({ "port_range_min": 1, "port_range_max": 2 }), 400, "SecurityGroupProtocolRequiredWithPorts"),
        (
            json!({ "protocol": "tcp", "port_range_min": 9, "port_range_max": 2 }),
            400,
            "SecurityGroupInvalidPortRange",
        ),
        (json!({ "protocol": "tcp", "port_range_min": 9 }), 400, "SecurityGroupInvalidPortRange"),
        (
            json!({ "protocol": "udp", "port_range_min": 0, "port_range_max": 2 }),
            400,
            "SecurityGroupInvalidPortValue",
        ),
        (
            json!({ "protocol": "udp", "port_range_min": 1, "port_range_max": 65536 }),
            400,
            "SecurityGroupInvalidPortValue",
        ),
        (
            json!({ "protocol": "gre", "port_range_min": 1, "port_range_max": 2 }),
            400,
            "SecurityGroupInvalidProtocolForPort",
        ),
        (json!({ "protocol": "icmp", "port_range_max": 2 }), 400, "SecurityGroupMissingIcmpType"),
        (json!({ "protocol": "icmp", "port_range_min": 256 }), 400, "SecurityGroupInvalidIcmpValue"),
        (json!({ "remote_ip_prefix": "10.0.0.0/33" }), 400, "remote_ip_prefix"),
        (
            json!({ "remote_ip_prefix": "fd00::/64", "ethertype": "IPv4" }),
            400,
            "SecurityGroupRuleParameterConflict",
        ),
        (json!({ "remote_group_id": scene.network }), 404, "SecurityGroupNotFound"),
        (
            json!({ "remote_group_id": group, "remote_ip_prefix": "10.0.0.0/8" }),
            400,
            "SecurityGroupMultipleRemoteEntites",
        ),
        (json!({ "security_group_id": "web" }), 404, "SecurityGroupNotFound"),
        (json!({ "colour": "red" }), 400, "colour"),
    ] {
        let (code, text) = scene.refusal(Method::POST, "/security-group-rules", rule(body.clone())).await;
        assert_eq!(code, status, "{body}: {text}");
        assert!(text.contains(name), "{body}: {text}");
    }
    let path = "/security-group-rules/5b5b1bd4-3c6f-4f0a-8a3c-1e6d2a1b0c9d";
    assert_eq!(scene.refusal(Method::DELETE, path, Value::Null).await.0, 404);
}

#[tokio::test]
async fn the_default_group_and_groups_in_use_stay() {
    let scene = Scene::new().await;
    let default = format!("/security-groups/{}", text(&scene.default_group().await["id"]));
    let rename = json!({ "security_group": { "name": "other" } });
    let another = json!({ "security_group": { "name": "default" } });
    let group = scene.group("web").await;
    scene
        .make("/ports", json!({ "port": { "network_id": scene.network, "security_groups": [group] } }))
        .await;
    let used = format!("/security-groups/{group}");
    let stateless = json!({ "security_group": { "stateful": false } });
    for (method, path, body, name) in [
        (Method::DELETE, default.as_str(), Value::Null, "SecurityGroupCannotRemoveDefault"),
        (Method::PUT, &default, rename, "SecurityGroupCannotUpdateDefault"),
        (Method::POST, "/security-groups", another, "SecurityGroupDefaultAlreadyExists"),
        (Method::DELETE, &used, Value::Null, "SecurityGroupInUse"),
        (Method::PUT, &used, stateless, "SecurityGroupInUse"),
    ] {
        let (code, text) = scene.refusal(method, path, body).await;
        assert_eq!(code, 409, "{text}");
        assert!(text.starts_with(name), "{text}");
    }
}

#[tokio::test]
async fn bounds_are_told_as_quotas() {
    let scene = Scene::new().await;
    let group = scene.group("web").await;
    let rule = |port: u32| {
        json!({ "security_group_id": group, "direction": "ingress", "protocol": "tcp",
                "port_range_min": port, "port_range_max": port })
    };
    // Two are there already.
    let rules: Vec<Value> = (1..=98).map(rule).collect();
    scene.make("/security-group-rules", json!({ "security_group_rules": rules })).await;
    let (code, text) = scene
        .refusal(Method::POST, "/security-group-rules", json!({ "security_group_rule": rule(99) }))
        .await;
    assert_eq!(code, 409);
    assert!(text.starts_with("OverQuota"), "{text}");
    let other = scene.group("more").await;
    let rules: Vec<Value> = (101..=131)
        .map(|port| {
            let mut rule = rule(port);
            rule["security_group_id"] = json!(other);
            rule
        })
        .collect();
    scene.make("/security-group-rules", json!({ "security_group_rules": rules })).await;
    let body = json!({ "port": { "network_id": scene.network, "security_groups": [group, other] } });
    let (code, text) = scene.refusal(Method::POST, "/ports", body).await;
    assert_eq!(code, 409);
    assert!(text.contains("129 rules in one direction; 128 at most"), "{text}");
}

#[tokio::test]
async fn hosts_are_told_of_rules_and_of_who_belongs_to_the_groups_that_they_name() {
    let scene = Scene::new().await;
    let path = scene.api.app.ledger.read(|fleet| format!("/ports/{}", fleet.ports.keys().next().unwrap()));
    assert_eq!(scene.wanted().ports[0].rules, None, "a port from before there were groups");
    let group = scene.group("web").await;
    let friends = scene.group("friends").await;
    let before = scene.wanted().generation;
    let body = json!({ "port": { "security_groups": [group] } });
    assert_eq!(scene.net(As::Admin, Method::PUT, &path, body).await.status, 200);
    assert_eq!(scene.wanted().generation, before + 1);
    assert_eq!(scene.wanted().ports[0].rules.as_ref().unwrap().len(), 2, "everything out");
    let rule = json!({ "security_group_rule": {
        "security_group_id": group, "direction": "ingress", "protocol": "icmp", "port_range_min": 8,
        "remote_group_id": friends,
    } });
    scene.make("/security-group-rules", rule).await;
    let wanted = scene.wanted();
    assert_eq!(wanted.generation, before + 2);
    let rules = wanted.ports[0].rules.as_ref().unwrap();
    let rule = rules.iter().find(|r| r.direction == Direction::Ingress).unwrap();
    assert_eq!((rule.family, rule.protocol, rule.icmp), (Family::V4, Some(1), Some((8, None))));
    assert_eq!(rule.remote, Remote::Group(friends.parse().unwrap()));
    assert!(wanted.groups[0].members.is_empty(), "nobody belongs to it yet");
    let member = json!({ "port": {
        "network_id": scene.network, "binding:host_id": "h1", "security_groups": [friends],
        "fixed_ips": [{ "ip_address": "10.0.0.77" }], "allowed_address_pairs": [{ "ip_address": "10.9.0.0/24" }],
    } });
    let member = scene.make("/ports", member).await;
    let wanted = scene.wanted();
    let members: Vec<String> = wanted.groups[0].members.iter().map(ToString::to_string).collect();
    assert_eq!(members, ["10.0.0.77/32", "10.9.0.0/24"]);
    let gone = format!("/ports/{}", text(&member["port"]["id"]));
    assert_eq!(scene.net(As::Admin, Method::DELETE, &gone, Value::Null).await.status, 204);
    assert!(scene.wanted().groups[0].members.is_empty());
    // Without the group that they name, rules go with it.
    let path = format!("/security-groups/{friends}");
    assert_eq!(scene.net(As::Admin, Method::DELETE, &path, Value::Null).await.status, 204);
    assert_eq!(scene.wanted().ports[0].rules.as_ref().unwrap().len(), 2);
}

#[tokio::test]
async fn a_server_is_given_a_group_and_loses_it_again() {
    let scene = Scene::new().await;
    scene.group("web").await;
    let path = format!("/compute/v2.1/servers/{}/action", scene.instance);
    let groups = async || {
        let path = format!("/compute/v2.1/servers/{}", scene.instance);
        scene.api.get(&path).await.json()["server"]["security_groups"].clone()
    };
    let act = async |action: &str| scene.api.post(&path, json!({ action: { "name": "web" } })).await.status;
    assert_eq!(act("addSecurityGroup").await, 202);
    assert_eq!(groups().await, json!([{ "name": "web" }]));
    assert_eq!(act("removeSecurityGroup").await, 202);
    assert_eq!(groups().await, Value::Null);
    assert_eq!(act("removeSecurityGroup").await, 404);
}
