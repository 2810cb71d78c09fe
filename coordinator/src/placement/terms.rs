//! What a request wants of a host beside room: zone, aggregates, groups, neighbours, networks, processor.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use godwit_protocol::id::HostId;
use serde::{Deserialize, Serialize};

use super::explain::{Quantity, Rule, Shortfall};
use super::host_view::HostView;
use super::labels;

/// Prefix of extra specs that ask something of the metadata of a host's aggregates.
pub const AGGREGATE_SPECS: &str = "aggregate_instance_extra_specs:";

/// Bytes that VXLAN puts around a frame, over IPv4 and over IPv6.
const OVERLAY_V4: u32 = 50;
const OVERLAY_V6: u32 = 70;

/// How the instances of a group lie to one another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum GroupPolicy {
    /// All on one host.
    Affinity,
    /// Each on a host of its own.
    AntiAffinity,
    /// On one host where that is possible.
    SoftAffinity,
    /// On as many hosts as possible.
    SoftAntiAffinity,
}

impl GroupPolicy {
    /// The policy of this name.
    pub fn from_name(name: &str) -> Option<Self> {
        [Self::Affinity, Self::AntiAffinity, Self::SoftAffinity, Self::SoftAntiAffinity]
            .into_iter()
            .find(|policy| policy.name() == name)
    }

    /// As clients write it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Affinity => "affinity",
            Self::AntiAffinity => "anti-affinity",
            Self::SoftAffinity => "soft-affinity",
            Self::SoftAntiAffinity => "soft-anti-affinity",
        }
    }

    /// Whether it is only a preference.
    pub fn is_soft(self) -> bool {
        matches!(self, Self::SoftAffinity | Self::SoftAntiAffinity)
    }
}

/// The group that the instance belongs to, without itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupTerms {
    /// How its members lie to one another.
    pub policy: GroupPolicy,
    /// Members on one host at most, with [`GroupPolicy::AntiAffinity`]; at least 1.
    pub max_per_host: u32,
    /// Members on each host that has any.
    pub members: BTreeMap<HostId, u32>,
}

/// A processor that a running guest has to find again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Processor {
    /// `x86_64`, …
    pub architecture: String,
    /// The kernel's name of the model; none when the guest is emulated and any will do.
    pub model: Option<String>,
}

/// What a request wants of a host beside room. By default nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Terms {
    /// The availability zone.
    pub zone: Option<String>,
    /// What the metadata of the host's aggregates must hold: key and wanted value, which may begin with an operator.
    pub aggregate_specs: Vec<(String, String)>,
    /// The project that owns the instance.
    pub project: String,
    /// Its group.
    pub group: Option<GroupTerms>,
    /// Hosts of which it must be one.
    pub beside: Option<BTreeSet<HostId>>,
    /// Hosts of which it must not be one.
    pub apart: BTreeSet<HostId>,
    /// The largest MTU of its overlay networks, in bytes; none without such networks.
    pub overlay_mtu: Option<u32>,
    /// The physical networks that it needs, with the largest MTU of its networks on each, in bytes.
    pub physical_networks: BTreeMap<String, u32>,
    /// The processor it needs.
    pub processor: Option<Processor>,
}

impl Terms {
    /// The terms that a flavor's extra specs say.
    pub fn of_specs(extra_specs: &BTreeMap<String, String>) -> Self {
        let spec = |(key, value): (&String, &String)| {
            Some((key.strip_prefix(AGGREGATE_SPECS)?.to_owned(), value.clone()))
        };
        Self { aggregate_specs: extra_specs.iter().filter_map(spec).collect(), ..Self::default() }
    }

    /// Whether the host meets the terms; else the first that it does not.
    pub fn check(&self, host: &HostView) -> Result<(), Shortfall> {
        self.check_labels(host)?;
        self.check_neighbours(host)?;
        self.check_processor(host)?;
        self.check_network(host)
    }

    fn check_labels(&self, host: &HostView) -> Result<(), Shortfall> {
        let labels = &host.labels;
        if let Some(zone) = self.zone.as_deref().filter(|zone| *zone != labels.zone) {
            return Err(Shortfall::new(Rule::AvailabilityZone, text(zone), text(&labels.zone)));
        }
        for (key, wanted) in &self.aggregate_specs {
            let had = labels.metadata.get(key);
            if !had.is_some_and(|values| values.iter().any(|value| labels::matches(value, wanted))) {
                let values = had.map(|values| values.iter().cloned().collect::<Vec<_>>().join(","));
                let have = values.map_or_else(|| format!("no {key}"), |values| format!("{key}={values}"));
                let need = text(&format!("{key}={wanted}"));
                return Err(Shortfall::new(Rule::AggregateMetadata, need, text(&have)));
            }
        }
        if !labels.projects.is_empty() && !labels.projects.contains(&self.project) {
            let have = format!("{} other projects", labels.projects.len());
            let need = text(&format!("project {}", self.project));
            return Err(Shortfall::new(Rule::AggregateProject, need, text(&have)));
        }
        Ok(())
    }

    fn check_neighbours(&self, host: &HostView) -> Result<(), Shortfall> {
        if self.beside.as_ref().is_some_and(|hosts| !hosts.contains(&host.id)) {
            return Err(Shortfall::new(
                Rule::SameHost,
                text("the host of another instance"),
                text("another host"),
            ));
        }
        if self.apart.contains(&host.id) {
            return Err(Shortfall::new(
                Rule::DifferentHost,
                text("another host"),
                text("an instance to avoid"),
            ));
        }
        let Some(group) = &self.group else { return Ok(()) };
        let here = group.members.get(&host.id).copied().unwrap_or(0);
        let elsewhere =
            group.members.values().map(|members| u64::from(*members)).sum::<u64>() - u64::from(here);
        match group.policy {
            GroupPolicy::Affinity if here == 0 && elsewhere > 0 => {
                let (need, have) = (Quantity::Members(elsewhere), Quantity::Members(0));
                Err(Shortfall::new(Rule::GroupAffinity, need, have))
            }
            GroupPolicy::AntiAffinity if here >= group.max_per_host => {
                let need = text(&format!("fewer than {} group members", group.max_per_host));
                Err(Shortfall::new(Rule::GroupAntiAffinity, need, Quantity::Members(u64::from(here))))
            }
            _ => Ok(()),
        }
    }

    fn check_processor(&self, host: &HostView) -> Result<(), Shortfall> {
        let Some(processor) = &self.processor else { return Ok(()) };
        let machine = &host.machine;
        if !processor.architecture.is_empty() && processor.architecture != machine.architecture {
            let (need, have) = (text(&processor.architecture), text(&machine.architecture));
            return Err(Shortfall::new(Rule::Architecture, need, have));
        }
        match processor.model.as_deref() {
            Some(model) if !machine.kvm => {
                Err(Shortfall::new(Rule::CpuModel, text(model), text("emulation only")))
            }
            Some(model) if model != machine.cpu_model => {
                Err(Shortfall::new(Rule::CpuModel, text(model), text(&machine.cpu_model)))
            }
            _ => Ok(()),
        }
    }

    fn check_network(&self, host: &HostView) -> Result<(), Shortfall> {
        let bytes = |of: &str, mtu: u32| text(&format!("an MTU of {mtu} on {of}"));
        for (name, mtu) in &self.physical_networks {
            let Some(had) = host.machine.physical_networks.get(name) else {
                let need = text(&format!("physical network {name}"));
                return Err(Shortfall::new(Rule::PhysicalNetwork, need, text("none of that name")));
            };
            if mtu > had {
                return Err(Shortfall::new(Rule::NetworkMtu, bytes(name, *mtu), bytes(name, *had)));
            }
        }
        let Some(mtu) = self.overlay_mtu else { return Ok(()) };
        let machine = &host.machine;
        if !machine.underlay_up {
            return Err(Shortfall::new(Rule::NetworkReachable, text("an underlay that is up"), text("down")));
        }
        let around = if machine.underlay_v6 { OVERLAY_V6 } else { OVERLAY_V4 };
        if mtu.saturating_add(around) > machine.underlay_mtu {
            let bytes = |mtu: u32| text(&format!("an underlay MTU of {mtu}"));
            let need = bytes(mtu.saturating_add(around));
            return Err(Shortfall::new(Rule::NetworkMtu, need, bytes(machine.underlay_mtu)));
        }
        Ok(())
    }

    /// The hosts that alone can meet the terms, where they are few and known by name.
    pub(super) fn only(&self) -> Option<BTreeSet<HostId>> {
        let group = self.group.as_ref().filter(|group| group.policy == GroupPolicy::Affinity);
        let group = group.filter(|group| !group.members.is_empty());
        self.beside.clone().or_else(|| group.map(|group| group.members.keys().copied().collect()))
    }

    /// The hosts with members of the group.
    pub(super) fn member_hosts(&self) -> impl Iterator<Item = HostId> + '_ {
        self.group.iter().flat_map(|group| group.members.keys().copied())
    }

    /// In how many rounds hosts are tried, and the round of a host: a soft group policy prefers some hosts.
    pub(super) fn round(&self, host: HostId) -> u32 {
        let Some(group) = &self.group else { return 0 };
        let here = || group.members.get(&host).copied().unwrap_or(0);
        let most = || group.members.values().copied().max().unwrap_or(0);
        match group.policy {
            GroupPolicy::SoftAffinity => most() - here(),
            GroupPolicy::SoftAntiAffinity => here(),
            GroupPolicy::Affinity | GroupPolicy::AntiAffinity => 0,
        }
    }

    /// The rounds there are, in order.
    pub(super) fn rounds(&self) -> BTreeSet<u32> {
        let hosts = self.group.iter().flat_map(|group| group.members.keys());
        let mut rounds: BTreeSet<u32> = hosts.map(|host| self.round(*host)).collect();
        rounds.insert(self.round(HostId(uuid::Uuid::nil())));
        rounds
    }
}

fn text(text: &str) -> Quantity {
    Quantity::Text(Arc::from(text))
}
