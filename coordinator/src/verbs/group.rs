//! Making and removing groups of instances.

use super::{Decision, check_text};
use crate::error::Error;
use crate::fleet::group::ServerGroup;
use crate::fleet::{Change, Fleet};
use crate::placement::GroupPolicy;
use godwit_protocol::id::{InstanceId, ProjectId, ServerGroupId, UserId};

/// Makes a group.
///
/// # Errors
/// A name that is empty or too long; a maximum of members on a host with another policy than anti-affinity.
pub fn create(
    owner: (ProjectId, UserId),
    name: String,
    policy: GroupPolicy,
    max_per_host: Option<u32>,
) -> Decision<ServerGroup> {
    check_text("server group's name", &name)?;
    if name.trim().is_empty() {
        return Err(Error::Invalid("The server group's name must not be empty.".into()));
    }
    if max_per_host == Some(0) {
        return Err(Error::Invalid("max_server_per_host must be at least 1.".into()));
    }
    if max_per_host.is_some() && policy != GroupPolicy::AntiAffinity {
        return Err(Error::Invalid(format!(
            "Only anti-affinity policy supports rules, and the policy is {}.",
            policy.name()
        )));
    }
    let (project, user) = owner;
    let id = ServerGroupId::random();
    let group = ServerGroup { id, name, project, user, policy, max_per_host, members: Default::default() };
    Ok((vec![group.clone().into()], group))
}

/// Removes a group. Its members stay where they are, and no policy holds for them any more.
///
/// # Errors
/// No such group.
pub fn delete(fleet: &Fleet, id: ServerGroupId) -> Decision<()> {
    let group = fleet.server_groups.get(&id).ok_or_else(|| Error::not_found("Instance group", id))?;
    Ok((vec![Change::gone(group)], ()))
}

/// The group with one more member, and without those that are gone.
///
/// # Errors
/// No such group.
pub fn join(fleet: &Fleet, id: ServerGroupId, instance: InstanceId) -> Result<ServerGroup, Error> {
    let group = fleet.server_groups.get(&id).ok_or_else(|| Error::not_found("Instance group", id))?;
    let members = fleet.members_of(group).into_iter().chain([instance]).collect();
    Ok(ServerGroup { members, ..group.clone() })
}
