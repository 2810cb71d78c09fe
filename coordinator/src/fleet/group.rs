//! Groups: of instances, which lie to one another by a policy, and of hosts, which have metadata in common.

use super::{Fleet, Time};
use crate::placement::GroupPolicy;
use crate::placement::labels::{DEFAULT_ZONE, Labels, ZONE_KEY};
use godwit_protocol::id::{HostId, InstanceId, ProjectId, ServerGroupId, UserId};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use uuid::Uuid;

/// Instances that lie to one another by a policy.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ServerGroup {
    /// Its id.
    pub id: ServerGroupId,
    /// Not unique.
    pub name: String,
    /// Owner.
    pub project: ProjectId,
    /// Who made it.
    pub user: UserId,
    /// How its members lie to one another.
    pub policy: GroupPolicy,
    /// Members on one host at most, with anti-affinity; none means 1.
    pub max_per_host: Option<u32>,
    /// Its members; some may be gone by now.
    pub members: BTreeSet<InstanceId>,
}

/// Hosts that have metadata in common, and perhaps an availability zone of their own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Aggregate {
    /// A small number, which clients use.
    pub number: u64,
    /// For newer clients.
    pub uuid: Uuid,
    /// Unique.
    pub name: String,
    /// Its hosts.
    pub hosts: BTreeSet<HostId>,
    /// What its hosts have in common; `availability_zone` puts them into that zone.
    pub metadata: BTreeMap<String, String>,
    /// When.
    pub created_at: Time,
    /// When, after it was made.
    pub updated_at: Option<Time>,
}

impl Aggregate {
    /// The zone that it puts its hosts into.
    pub fn zone(&self) -> Option<&str> {
        self.metadata.get(ZONE_KEY).map(String::as_str)
    }
}

impl Fleet {
    /// The members of a group that are there.
    pub fn members_of(&self, group: &ServerGroup) -> Vec<InstanceId> {
        group.members.iter().copied().filter(|id| self.instances.contains_key(id)).collect()
    }

    /// What a host's aggregates say of it.
    pub fn labels_of(&self, host: HostId) -> Labels {
        let its = self.aggregates.values().filter(|aggregate| aggregate.hosts.contains(&host));
        Labels::of(its.map(|aggregate| &aggregate.metadata))
    }

    /// The availability zone of a host.
    pub fn zone_of(&self, host: HostId) -> &str {
        let zones = self.aggregates.values().filter(|aggregate| aggregate.hosts.contains(&host));
        zones.filter_map(Aggregate::zone).next_back().unwrap_or(DEFAULT_ZONE)
    }

    /// Every availability zone that has hosts or could have, the default one only when some host is in it.
    pub fn zones(&self) -> BTreeSet<&str> {
        let mut zones: BTreeSet<&str> = self.aggregates.values().filter_map(Aggregate::zone).collect();
        if self.hosts.is_empty() || self.hosts.keys().any(|host| self.zone_of(*host) == DEFAULT_ZONE) {
            zones.insert(DEFAULT_ZONE);
        }
        zones
    }
}
