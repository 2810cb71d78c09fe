//! What the coordinator knows: plain state in memory. Everything durable here is a [`Record`]; a change is a
//! list of [`Change`]s, applied to the store and to this state alike.

pub mod group;
pub mod host;
pub mod identity;
pub mod image;
pub mod instance;
pub mod migration;
pub mod network;
pub mod operation;
mod running;
mod seats;
pub mod security;
mod shared;

use godwit_protocol::host::PoolReport;
use godwit_protocol::id::{
    HostId, ImageId, InstanceId, MigrationId, NetworkId, OperationId, PortId, ProjectId, SecurityGroupId,
    SecurityRuleId, ServerGroupId, SubnetId, UserId,
};
use group::{Aggregate, ServerGroup};
use host::{Host, JoinToken, Observed};
use identity::{KeyPair, Project, RevokedToken, User};
use image::{Damage, Image, ImageCopy};
use instance::{Flavor, Instance};
use migration::Migration;
use network::{Network, Port, Subnet};
use operation::Operation;
use security::{SecurityGroup, SecurityRule};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::collections::BTreeMap;
use uuid::Uuid;

/// A point in time, UTC.
pub type Time = time::OffsetDateTime;

/// Something durable, with a key of its own.
pub trait Record: Serialize + DeserializeOwned + Clone + Send + Sync + 'static {
    /// Its table of the fleet and kind in the store.
    const KIND: &'static str;
    /// What identifies it among its kind.
    type Key: Ord + Clone + ToString + std::str::FromStr;
    /// Its key.
    fn key(&self) -> Self::Key;
    /// Its place in the fleet.
    fn table(fleet: &mut Fleet) -> &mut BTreeMap<Self::Key, Self>;
}

macro_rules! fleet {
    ($($table:ident: $kind:ident by $key:ty = $get:expr;)+) => {
        /// The whole state. Reading is free; changing goes through [`crate::ledger::Ledger::change`].
        #[derive(Default)]
        pub struct Fleet {
            $(#[doc = concat!("Every ", stringify!($kind), ".")] pub $table: BTreeMap<$key, $kind>,)+
            /// What the hosts said last; rebuilt from their reports after a restart.
            pub observed: BTreeMap<HostId, Observed>,
            /// Placement's view of the hosts, derived from the records.
            pub(crate) seats: seats::Seats,
            /// What runs on each instance, derived from the records.
            pub(crate) running: running::Running,
            /// What instances have in common.
            pub(crate) shared: shared::Shared,
        }

        /// One durable change.
        #[derive(Clone)]
        #[allow(clippy::large_enum_variant)] // lives for one commit
        pub enum Change {
            $(#[doc = concat!("A new or changed ", stringify!($kind), ".")] $kind($kind),)+
            /// A record is gone: its kind and key.
            Gone(&'static str, String),
        }

        $(
            impl Record for $kind {
                const KIND: &'static str = stringify!($table);
                type Key = $key;
                fn key(&self) -> $key {
                    let get: fn(&$kind) -> $key = $get;
                    get(self)
                }
                fn table(fleet: &mut Fleet) -> &mut BTreeMap<$key, $kind> {
                    &mut fleet.$table
                }
            }

            impl From<$kind> for Change {
                fn from(record: $kind) -> Self {
                    Self::$kind(record)
                }
            }
        )+

        impl Change {
            /// That `record` goes.
            pub fn gone<R: Record>(record: &R) -> Self {
                Self::Gone(R::KIND, record.key().to_string())
            }

            /// The row it writes: kind, key and, unless it goes, the body.
            ///
            /// # Errors
            /// When the record does not serialize.
            pub fn row(&self) -> Result<(&'static str, String, Option<String>), serde_json::Error> {
                Ok(match self {
                    $(Self::$kind(r) => ($kind::KIND, r.key().to_string(), Some(serde_json::to_string(r)?)),)+
                    Self::Gone(kind, key) => (kind, key.clone(), None),
                })
            }
        }

        impl Fleet {
            /// Takes a change in.
            pub fn apply(&mut self, change: Change) {
                let touched = seats::Touched::by(&change, self);
                self.note(change);
                self.settle(touched);
            }

            /// Takes a change into the records alone.
            fn note(&mut self, mut change: Change) {
                if let Change::Instance(instance) = &mut change {
                    instance.flavor = self.shared.flavor(instance.flavor.clone());
                }
                self.running.follow(&change, &self.operations, &self.migrations);
                match change {
                    $(Change::$kind(record) => { self.$table.insert(record.key(), record); })+
                    Change::Gone(kind, key) => match kind {
                        $($kind::KIND => { key.parse::<$key>().ok().and_then(|key| self.$table.remove(&key)); })+
                        _ => {}
                    },
                }
            }

            /// Takes a stored row in; [`Self::seat_all`] follows the last.
            ///
            /// # Errors
            /// When the body does not read. A kind that this version does not know is left alone.
            pub fn load(&mut self, kind: &str, body: &str) -> Result<(), serde_json::Error> {
                match kind {
                    $($kind::KIND => self.note(Change::$kind(serde_json::from_str(body)?)),)+
                    other => tracing::warn!(kind = other, "the store holds a kind that this version does not know"),
                }
                Ok(())
            }
        }
    };
}

fleet! {
    projects: Project by ProjectId = |p| p.id;
    users: User by UserId = |u| u.id;
    revoked_tokens: RevokedToken by String = |t| t.audit_id.clone();
    keypairs: KeyPair by String = KeyPair::map_key;
    images: Image by ImageId = |i| i.id;
    damages: Damage by ImageId = |d| d.image;
    image_copies: ImageCopy by String = ImageCopy::map_key;
    flavors: Flavor by String = |f| f.id.clone();
    networks: Network by NetworkId = |n| n.id;
    subnets: Subnet by SubnetId = |s| s.id;
    ports: Port by PortId = |p| p.id;
    security_groups: SecurityGroup by SecurityGroupId = |g| g.id;
    security_rules: SecurityRule by SecurityRuleId = |r| r.id;
    instances: Instance by InstanceId = |i| i.id;
    hosts: Host by HostId = |h| h.id;
    join_tokens: JoinToken by String = |t| t.hash.clone();
    migrations: Migration by MigrationId = |m| m.id;
    operations: Operation by OperationId = |o| o.id;
    server_groups: ServerGroup by ServerGroupId = |g| g.id;
    aggregates: Aggregate by u64 = |a| a.number;
}

impl Fleet {
    /// The host of that name.
    pub fn host_by_name(&self, name: &str) -> Option<&Host> {
        self.hosts.values().find(|h| h.name == name)
    }

    /// The pools of a host, as it said last.
    pub fn pools_of(&self, host: HostId) -> &[PoolReport] {
        let report = self.observed.get(&host).and_then(|observed| observed.report.as_ref());
        let said = report.map(|report| &report.inventory);
        let inventory = said.or_else(|| self.hosts.get(&host)?.inventory.as_ref());
        inventory.map_or(&[], |inventory| &inventory.pools)
    }

    /// The mark of the pool that a host has, if it has told one.
    pub fn pool_mark(&self, host: HostId) -> Option<Uuid> {
        self.pools_of(host).first()?.mark
    }

    /// Whether two hosts are known to have different pools.
    pub fn are_apart(&self, one: HostId, other: HostId) -> bool {
        self.pool_mark(one).zip(self.pool_mark(other)).is_some_and(|(one, other)| one != other)
    }

    /// Ports of an instance, in the order in which it asked for them.
    pub fn ports_of(&self, instance: InstanceId) -> Vec<&Port> {
        let mut ports: Vec<&Port> = self.ports.values().filter(|p| p.instance == Some(instance)).collect();
        ports.sort_by_key(|p| p.index);
        ports
    }

    /// The operation that runs on an instance.
    pub fn running_operation(&self, instance: InstanceId) -> Option<&Operation> {
        self.operations.get(&self.running.operation(instance)?)
    }

    /// The migration that runs on an instance.
    pub fn running_migration(&self, instance: InstanceId) -> Option<&Migration> {
        self.migrations.get(&self.running.migration(instance)?)
    }
}
