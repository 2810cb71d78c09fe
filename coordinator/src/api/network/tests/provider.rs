//! Networks on links that the provider has.

use super::*;
use crate::config::Flood;
use crate::l2;
use godwit_protocol::host::PhysicalNetwork;
use godwit_protocol::network::{Carrier, FIRST_PROVIDED, Unknown};

impl Scene {
    async fn with_link(self) -> Self {
        let mut host = self.api.app.ledger.read(|fleet| fleet.hosts[&self.host].clone());
        let link = |name: &str| PhysicalNetwork { name: name.into(), link: "eth1".into(), mtu: 1500 };
        host.inventory.as_mut().unwrap().physical_networks = ["outside", "ranged"].map(link).into();
        self.apply(vec![host.into()]).await;
        self
    }
}

#[tokio::test]
async fn flat_and_vlan_networks_are_told_to_hosts_by_the_name_of_their_link() {
    let scene = Scene::new().await.with_link().await;
    let body = json!({ "network": {
        "provider:network_type": "vlan", "provider:physical_network": "outside", "provider:segmentation_id": 42,
    } });
    let network = scene.make("/networks", body.clone()).await["network"].clone();
    assert_eq!(
        (&network["provider:network_type"], &network["provider:segmentation_id"], &network["mtu"]),
        (&json!("vlan"), &json!(42), &json!(1500))
    );
    let (status, text) = scene.refusal(Method::POST, "/networks", body).await;
    assert_eq!(
        (status, text.contains("The VLAN 42 on physical network outside is in use")),
        (409, true),
        "{text}"
    );
    let flat =
        json!({ "network": { "provider:network_type": "flat", "provider:physical_network": "outside" } });
    let made = scene.make("/networks", flat.clone()).await["network"].clone();
    assert_eq!(made["provider:segmentation_id"], Value::Null);
    assert_eq!(scene.refusal(Method::POST, "/networks", flat).await.0, 409);
    let port = json!({ "port": { "network_id": network["id"], "binding:host_id": "h1" } });
    scene.make("/ports", port).await;
    let app = &scene.api.app;
    let wanted = app.ledger.read(|fleet| {
        let id = network["id"].as_str().unwrap().parse().unwrap();
        l2::wanted(fleet, &fleet.networks[&id], scene.host, &app.config).unwrap()
    });
    assert_eq!(wanted.carrier, Carrier::Vlan("outside".into(), 42));
    assert!(wanted.vni >= FIRST_PROVIDED && wanted.forwarding.is_empty() && wanted.flood.is_empty());
    assert_eq!(wanted.unknown_unicast, Unknown::Flood, "who is on the link is not known here");
}

#[tokio::test]
async fn what_carries_a_network_is_for_administrators_and_does_not_change() {
    let scene = Scene::new().await.with_link().await;
    let flat =
        json!({ "network": { "provider:network_type": "flat", "provider:physical_network": "outside" } });
    assert_eq!(scene.net(As::Member, Method::POST, "/networks", flat.clone()).await.status, 403);
    let path = format!("/networks/{}", scene.network);
    assert_eq!(scene.refusal(Method::PUT, &path, flat).await.0, 400);
    for (body, part) in [
        (
            json!({ "provider:network_type": "vxlan", "provider:physical_network": "outside" }),
            "specified for vxlan",
        ),
        (json!({ "provider:physical_network": "outside" }), "network_type required"),
        (json!({ "provider:network_type": "flat" }), "physical_network required for flat"),
        (json!({ "provider:network_type": "vlan", "provider:segmentation_id": 4 }), "required for VLAN"),
        (
            json!({ "provider:network_type": "vlan", "provider:physical_network": "outside" }),
            "requires segmentation_id",
        ),
        (
            json!({ "provider:network_type": "flat", "provider:physical_network": "inside" }),
            "physical_network 'inside' unknown for flat provider network",
        ),
        (
            json!({ "provider:network_type": "vlan", "provider:physical_network": "outside", "provider:segmentation_id": 4095 }),
            "4094",
        ),
        (
            json!({ "provider:network_type": "flat", "provider:physical_network": "outside", "provider:segmentation_id": 4 }),
            "prohibited for flat",
        ),
        (
            json!({ "provider:network_type": "flat", "provider:physical_network": "outside", "mtu": 9000 }),
            "1500",
        ),
    ] {
        let (status, text) = scene.refusal(Method::POST, "/networks", json!({ "network": body })).await;
        assert_eq!(status, 400, "{text}");
        assert!(text.contains(part), "{text}");
    }
}

#[tokio::test]
async fn a_vlan_that_is_not_named_is_one_of_its_links_range_until_none_is_left() {
    let scene = Scene::new().await.with_link().await;
    let vlan = |tag: Option<u16>| {
        json!({ "network": {
            "provider:network_type": "vlan", "provider:physical_network": "ranged", "provider:segmentation_id": tag,
        } })
    };
    scene.make("/networks", vlan(Some(101))).await;
    let mut tags = BTreeSet::new();
    for _ in 0..2 {
        let network = scene.make("/networks", vlan(None)).await["network"].clone();
        tags.insert(network["provider:segmentation_id"].as_u64().unwrap());
    }
    assert_eq!(tags, [100, 102].into());
    let (status, text) = scene.refusal(Method::POST, "/networks", vlan(None)).await;
    assert_eq!(status, 409);
    assert!(text.contains("100 to 102") && text.contains("vlan_ranges"), "{text}");
    scene.make("/networks", vlan(Some(4000))).await;
}

#[tokio::test]
async fn with_multicast_hosts_get_the_group_in_the_place_of_one_another() {
    let scene = Scene::new().await;
    scene.make("/ports", json!({ "port": { "network_id": scene.network, "binding:host_id": "h1" } })).await;
    let app = &scene.api.app;
    let mut config = app.config.clone();
    (config.flood, config.multicast_ttl) = (Flood::Multicast, 7);
    config.multicast_groups = Some("239.0.0.0/8".parse().unwrap());
    let wanted = app
        .ledger
        .read(|fleet| l2::wanted(fleet, &fleet.networks[&scene.network], scene.host, &config).unwrap());
    let group = "239.0.3.233".parse().unwrap();
    assert_eq!(wanted.vni, 1001);
    assert_eq!((wanted.carrier, wanted.flood), (Carrier::VxlanGroup { group, ttl: 7 }, vec![group]));
}

#[tokio::test]
async fn a_port_is_not_bound_to_a_host_that_lacks_its_link() {
    let scene = Scene::new().await.with_link().await;
    let body = json!({ "network": {
        "provider:network_type": "flat", "provider:physical_network": "outside",
    } });
    let network = scene.make("/networks", body).await["network"]["id"].clone();
    let mut host = scene.api.app.ledger.read(|fleet| fleet.hosts[&scene.host].clone());
    host.inventory.as_mut().unwrap().physical_networks.clear();
    scene.apply(vec![host.into()]).await;
    let port = json!({ "port": { "network_id": network, "binding:host_id": "h1" } });
    let (status, text) = scene.refusal(Method::POST, "/ports", port).await;
    assert_eq!((status, text.contains("lacks physical network outside")), (409, true), "{text}");
}
