//! What is wanted of a host beside room.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use godwit_protocol::id::HostId;

use super::hosts::{request, view};
use crate::placement::labels::Labels;
use crate::placement::search::candidates;
use crate::placement::{
    Choice, GroupPolicy, GroupTerms, HostView, Limits, Processor, Roster, Rule, Terms, find,
};

fn hosts() -> Vec<HostView> {
    ["a", "b", "c"].map(view).into()
}

fn with(terms: Terms) -> Choice {
    Choice { terms, ..Choice::default() }
}

/// The hosts that fit, the preferred first, and the rules of the others. Roster and list agree.
fn ask(hosts: &[HostView], choice: &Choice) -> (String, Vec<Rule>) {
    let wanted = request(1, 64, &[]);
    let answers = candidates(hosts, &wanted, choice);
    let fitting: String = answers.iter().flatten().map(|placement| placement.host_name.as_str()).collect();
    let mut roster = Roster::new(hosts.iter().map(|host| (host.clone(), Vec::new())), Limits::default());
    hosts.iter().for_each(|host| roster.change(host.id, |view| *view = host.clone()));
    let found = find(&roster, &wanted, choice, |_| true).map(|placement| placement.host_name);
    assert_eq!(found.as_deref(), fitting.get(..1).filter(|first| !first.is_empty()));
    (fitting, answers.into_iter().filter_map(Result::err).map(|refusal| refusal.shortfall.rule).collect())
}

#[test]
fn zones_and_aggregates_narrow_the_choice() {
    let mut hosts = hosts();
    let metadata = |pairs: &[(&str, &str)]| -> BTreeMap<String, String> {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    };
    let label = |pairs| Arc::new(Labels::of([&metadata(pairs)]));
    hosts[0].labels = label(&[("availability_zone", "z1"), ("disk", "ssd")]);
    hosts[1].labels = label(&[("disk", "hdd"), ("filter_tenant_id", "p1")]);
    let zone = |zone: &str| {
        with(Terms { zone: Some(zone.to_owned()), project: "p1".to_owned(), ..Terms::default() })
    };
    assert_eq!(ask(&hosts, &zone("z1")), ("a".to_owned(), vec![Rule::AvailabilityZone; 2]));
    assert_eq!(ask(&hosts, &zone("nova")), ("bc".to_owned(), vec![Rule::AvailabilityZone]));
    let specs =
        BTreeMap::from([("aggregate_instance_extra_specs:disk".to_owned(), "<or> ssd <or> nvme".to_owned())]);
    assert_eq!(
        ask(&hosts, &with(Terms::of_specs(&specs))),
        ("a".to_owned(), vec![Rule::AggregateMetadata; 2])
    );
    let other = with(Terms { project: "p2".to_owned(), ..Terms::default() });
    assert_eq!(ask(&hosts, &other), ("ac".to_owned(), vec![Rule::AggregateProject]));
}

#[test]
fn groups_keep_together_or_apart_hard_or_soft() {
    let mut hosts = hosts();
    hosts[2].floating_memory_mib = 512;
    let group = |policy, max_per_host, members: &[(usize, u32)]| {
        let members = members.iter().map(|(host, count)| (hosts[*host].id, *count)).collect();
        with(Terms { group: Some(GroupTerms { policy, max_per_host, members }), ..Terms::default() })
    };
    use GroupPolicy::{Affinity, AntiAffinity, SoftAffinity, SoftAntiAffinity};
    for (choice, fitting, rules) in [
        (group(Affinity, 1, &[]), "abc", vec![]),
        (group(Affinity, 1, &[(2, 1)]), "c", vec![Rule::GroupAffinity; 2]),
        (group(AntiAffinity, 1, &[(0, 1), (2, 1)]), "b", vec![Rule::GroupAntiAffinity; 2]),
        (group(AntiAffinity, 2, &[(0, 1), (2, 2)]), "ab", vec![Rule::GroupAntiAffinity]),
        (group(SoftAffinity, 1, &[(2, 3), (1, 1)]), "cba", vec![]),
        (group(SoftAntiAffinity, 1, &[(0, 2), (1, 1)]), "cba", vec![]),
    ] {
        assert_eq!(ask(&hosts, &choice), (fitting.to_owned(), rules), "{choice:?}");
    }
}

#[test]
fn neighbours_processors_and_networks_are_looked_at() {
    let mut hosts = hosts();
    hosts[1].machine.cpu_model = "Another CPU".to_owned();
    hosts[2].machine.underlay_up = false;
    let set = |host: usize| BTreeSet::from([hosts[host].id]);
    let beside = with(Terms { beside: Some(set(1)), ..Terms::default() });
    assert_eq!(ask(&hosts, &beside), ("b".to_owned(), vec![Rule::SameHost; 2]));
    let apart = with(Terms { apart: set(1), ..Terms::default() });
    assert_eq!(ask(&hosts, &apart), ("ac".to_owned(), vec![Rule::DifferentHost]));
    let processor = |architecture: &str, model: Option<&str>| {
        let processor = Processor { architecture: architecture.to_owned(), model: model.map(str::to_owned) };
        with(Terms { processor: Some(processor), ..Terms::default() })
    };
    assert_eq!(ask(&hosts, &processor("x86_64", Some("Some CPU"))).0, "ac");
    assert_eq!(ask(&hosts, &processor("x86_64", None)).0, "abc", "emulated guests run anywhere");
    assert_eq!(ask(&hosts, &processor("aarch64", None)).1, vec![Rule::Architecture; 3]);
    let mtu = |mtu| with(Terms { overlay_mtu: Some(mtu), ..Terms::default() });
    assert_eq!(ask(&hosts, &mtu(1450)), ("ab".to_owned(), vec![Rule::NetworkReachable]));
    assert_eq!(ask(&hosts, &mtu(1451)).1, [Rule::NetworkMtu, Rule::NetworkMtu, Rule::NetworkReachable]);
    hosts[2].machine.physical_networks = BTreeMap::from([("outside".to_owned(), 1500)]);
    let on = |mtu| {
        let physical_networks = BTreeMap::from([("outside".to_owned(), mtu)]);
        with(Terms { physical_networks, ..Terms::default() })
    };
    assert_eq!(ask(&hosts, &on(1500)), ("c".to_owned(), vec![Rule::PhysicalNetwork; 2]));
    assert_eq!(ask(&hosts, &on(1501)).1[2], Rule::NetworkMtu);
    hosts[0].machine.underlay_v6 = true;
    assert_eq!(ask(&hosts, &mtu(1450)).0, "b");
    let nowhere = with(Terms { beside: Some(BTreeSet::from([HostId::random()])), ..Terms::default() });
    assert_eq!(ask(&hosts, &nowhere).0, "");
}
