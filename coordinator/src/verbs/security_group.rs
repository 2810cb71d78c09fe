//! Making, changing and removing security groups, and which of them a port has.

use super::{check_tags, check_text, security_rule};
use crate::error::Error;
use crate::fleet::network::Port;
use crate::fleet::security::{SecurityGroup, SecurityRule};
use crate::fleet::{Change, Fleet, Time};
use crate::l2;
use godwit_protocol::id::{NetworkId, ProjectId, SecurityGroupId};
use godwit_protocol::security::{Direction, Family, MAX_RULES, Remote};
use std::collections::BTreeSet;

/// Groups of one project, at most.
pub const MAX_GROUPS: usize = 100;

/// Groups of one port, at most.
const PER_PORT: usize = 16;

/// The name of the group that each project has.
pub const DEFAULT: &str = "default";

/// Why a security group or a rule is not made, changed or removed.
#[derive(Debug, thiserror::Error)]
pub enum SecurityError {
    /// As for everything.
    #[error(transparent)]
    Plain(#[from] Error),
    /// There is one already.
    #[error("Default security group already exists.")]
    DefaultExists,
    /// It stays as long as its project.
    #[error("Insufficient rights for removing default security group.")]
    DefaultStays,
    /// Its name is what it is found by.
    #[error("Updating default security group not allowed.")]
    DefaultKeepsName,
    /// A port or a rule needs it.
    #[error("Security Group {group} in use: {by}.")]
    InUse {
        /// Which.
        group: SecurityGroupId,
        /// By what.
        by: String,
    },
    /// The bound of a project, group or port.
    #[error("Quota exceeded for resources: {0}.")]
    OverQuota(String),
    /// The same rule is there.
    #[error("Security group rule already exists. Rule id is {0}.")]
    RuleExists(godwit_protocol::id::SecurityRuleId),
    /// A rule that contradicts itself; the name is the one that clients know.
    #[error("{text}")]
    BadRule {
        /// Of the kind of mistake.
        name: &'static str,
        /// For people.
        text: String,
    },
}

/// What a decision about them is.
pub type Decision<T> = Result<(Vec<Change>, T), SecurityError>;

/// A group to be made.
#[derive(Clone, Debug)]
pub struct NewGroup {
    /// Need not be unique; not `default`.
    pub name: String,
    /// For people.
    pub description: String,
    /// Owner.
    pub project: ProjectId,
    /// See [`SecurityGroup::stateful`].
    pub stateful: bool,
}

/// What changes of a group; none: as it is.
#[derive(Clone, Debug, Default)]
pub struct GroupUpdate {
    /// New name.
    pub name: Option<String>,
    /// New description.
    pub description: Option<String>,
    /// Stateful from now on, or not.
    pub stateful: Option<bool>,
    /// New labels.
    pub tags: Option<Vec<String>>,
}

/// The group that a project's ports have when none is named, and the changes that make it where it is missing.
pub fn ensure_default(fleet: &Fleet, project: ProjectId, now: Time) -> (Vec<Change>, SecurityGroupId) {
    if let Some(group) = fleet.security_groups.values().find(|g| g.project == project && g.is_default) {
        return (vec![], group.id);
    }
    let new = NewGroup {
        name: DEFAULT.into(),
        description: "Default security group".into(),
        project,
        stateful: true,
    };
    let (mut changes, group) = made(new, true, now);
    changes.extend([Family::V4, Family::V6].map(|family| {
        let members = Remote::Group(group.id);
        security_rule::whole(&group, Direction::Ingress, family, members, now).into()
    }));
    (changes, group.id)
}

fn made(new: NewGroup, is_default: bool, now: Time) -> (Vec<Change>, SecurityGroup) {
    let group = SecurityGroup {
        id: SecurityGroupId::random(),
        name: new.name,
        description: new.description,
        project: new.project,
        is_default,
        stateful: new.stateful,
        tags: Vec::new(),
        revision: 1,
        created_at: now,
        updated_at: now,
    };
    let egress = [Family::V4, Family::V6]
        .map(|family| security_rule::whole(&group, Direction::Egress, family, Remote::Any, now).into());
    (std::iter::once(group.clone().into()).chain(egress).collect(), group)
}

/// Makes a group, with the two rules that let everything out.
///
/// # Errors
/// Bad texts; the name `default`; [`MAX_GROUPS`].
pub fn create(fleet: &Fleet, new: NewGroup, now: Time) -> Decision<SecurityGroup> {
    check_text("name", &new.name)?;
    check_text("description", &new.description)?;
    if new.name.eq_ignore_ascii_case(DEFAULT) {
        return Err(SecurityError::DefaultExists);
    }
    if fleet.security_groups.values().filter(|g| g.project == new.project).count() >= MAX_GROUPS {
        return Err(SecurityError::OverQuota("security_group".into()));
    }
    Ok(made(new, false, now))
}

/// Changes a group. The answer says of which networks hosts are to be told.
///
/// # Errors
/// No such group; the default group's name; a group that ports have stays as stateful as it is.
pub fn update(fleet: &Fleet, id: SecurityGroupId, update: GroupUpdate, now: Time) -> Decision<SecurityGroup> {
    let mut group = find(fleet, id)?.clone();
    if let Some(name) = update.name.filter(|name| *name != group.name) {
        check_text("name", &name)?;
        if group.is_default {
            return Err(SecurityError::DefaultKeepsName);
        }
        if name.eq_ignore_ascii_case(DEFAULT) {
            return Err(SecurityError::DefaultExists);
        }
        group.name = name;
    }
    if let Some(description) = update.description {
        check_text("description", &description)?;
        group.description = description;
    }
    if let Some(stateful) = update.stateful.filter(|stateful| *stateful != group.stateful) {
        if let Some(port) = ports_of(fleet, id).next() {
            return Err(SecurityError::InUse { group: id, by: format!("port {} has it", port.id) });
        }
        group.stateful = stateful;
    }
    if let Some(tags) = update.tags {
        check_tags(&tags)?;
        group.tags = tags;
    }
    group.revision += 1;
    group.updated_at = now;
    Ok((vec![group.clone().into()], group))
}

/// Removes a group and its rules, and the rules of other groups that name it.
///
/// # Errors
/// No such group; it is the default group; a port has it. The answer names the networks that are to be told.
pub fn delete(fleet: &Fleet, id: SecurityGroupId) -> Decision<BTreeSet<NetworkId>> {
    let group = find(fleet, id)?;
    if group.is_default {
        return Err(SecurityError::DefaultStays);
    }
    if let Some(port) = ports_of(fleet, id).next() {
        return Err(SecurityError::InUse { group: id, by: format!("port {} has it", port.id) });
    }
    let of_it = |r: &&SecurityRule| r.group == id || r.remote == Remote::Group(id);
    let rules: Vec<&SecurityRule> = fleet.security_rules.values().filter(of_it).collect();
    let mut networks = BTreeSet::new();
    for rule in &rules {
        networks.extend(networks_of(fleet, rule.group));
    }
    let mut changes: Vec<Change> = rules.into_iter().map(Change::gone).collect();
    changes.push(Change::gone(group));
    changes.extend(networks.iter().filter_map(|n| l2::touched(fleet, *n)));
    Ok((changes, networks))
}

/// The group of that id.
///
/// # Errors
/// There is none.
pub fn find(fleet: &Fleet, id: SecurityGroupId) -> Result<&SecurityGroup, Error> {
    fleet.security_groups.get(&id).ok_or_else(|| Error::not_found("SecurityGroup", id))
}

/// A group's rules, oldest first.
pub fn rules_of(fleet: &Fleet, id: SecurityGroupId) -> Vec<&SecurityRule> {
    let mut rules: Vec<&SecurityRule> = fleet.security_rules.values().filter(|r| r.group == id).collect();
    rules.sort_by_key(|r| (r.created_at, r.id));
    rules
}

/// Ports that have a group.
pub fn ports_of(fleet: &Fleet, id: SecurityGroupId) -> impl Iterator<Item = &Port> {
    fleet.ports.values().filter(move |p| p.security_groups.as_ref().is_some_and(|g| g.contains(&id)))
}

/// Networks in which a plugged-in port has the group.
pub fn networks_of(fleet: &Fleet, id: SecurityGroupId) -> BTreeSet<NetworkId> {
    ports_of(fleet, id).filter(|p| p.host.is_some()).map(|p| p.network).collect()
}

/// That a port of `project` may have these groups: all are there, of one kind, and together no more than a host's
/// filter holds.
///
/// # Errors
/// No such group; too many groups or rules; stateful groups beside stateless ones.
pub fn check_groups(fleet: &Fleet, groups: &[SecurityGroupId]) -> Result<(), SecurityError> {
    if groups.len() > PER_PORT {
        return Err(SecurityError::OverQuota(format!("security_group ({PER_PORT} at most on one port)")));
    }
    let mut kinds = BTreeSet::new();
    for id in groups {
        kinds.insert(find(fleet, *id)?.stateful);
    }
    if kinds.len() > 1 {
        let text = "A port cannot have stateful security groups beside stateless ones.".to_owned();
        return Err(Error::Conflict(text).into());
    }
    check_size(fleet, groups, None)
}

/// That the rules of these groups, with one more in `direction` perhaps, fit a host's filter.
pub(super) fn check_size(
    fleet: &Fleet,
    groups: &[SecurityGroupId],
    more: Option<Direction>,
) -> Result<(), SecurityError> {
    let rules = fleet.security_rules.values().filter(|r| groups.contains(&r.group));
    let mut counts = [0_usize; 2];
    rules.map(|r| r.direction).chain(more).for_each(|direction| counts[direction as usize] += 1);
    match counts.into_iter().max() {
        Some(count) if count > MAX_RULES => Err(SecurityError::OverQuota(format!(
            "security_group_rule (a port would have {count} rules in one direction; {MAX_RULES} at most)"
        ))),
        _ => Ok(()),
    }
}
