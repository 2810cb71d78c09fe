//! Typed ids: a UUID that cannot be handed to the wrong noun.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;
use uuid::Uuid;

macro_rules! ids {
    ($($(#[$doc:meta])* $name:ident),+ $(,)?) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub Uuid);

        impl $name {
            /// A new random (version 4) id.
            pub fn random() -> Self {
                Self(Uuid::new_v4())
            }

            /// The first eight hexadecimal digits, for names that people read.
            pub fn short(&self) -> String {
                self.0.simple().to_string()[..8].to_owned()
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.hyphenated().fmt(f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({})", stringify!($name), self.0)
            }
        }

        impl FromStr for $name {
            type Err = uuid::Error;
            fn from_str(text: &str) -> Result<Self, Self::Err> {
                Uuid::from_str(text).map(Self)
            }
        }
    )+};
}

ids! {
    /// A machine with an agent.
    HostId,
    /// A user's virtual machine.
    InstanceId,
    /// A group of instances that lie to one another by a policy.
    ServerGroupId,
    /// An image.
    ImageId,
    /// A volume.
    VolumeId,
    /// A network.
    NetworkId,
    /// A subnet of a network.
    SubnetId,
    /// An instance's attachment to a network.
    PortId,
    /// A journaled operation.
    OperationId,
    /// A migration of one instance.
    MigrationId,
    /// A project that owns things.
    ProjectId,
    /// A user of the API.
    UserId,
    /// A security group.
    SecurityGroupId,
    /// A rule of a security group.
    SecurityRuleId,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_prints_as_it_parses() {
        let id = HostId::random();
        assert_eq!(id.to_string().parse::<HostId>(), Ok(id));
        assert_eq!(id.short(), id.to_string()[..8]);
    }
}
