//! What administrators change of a host without asking it.

use super::{Decision, check_text};
use crate::error::Error;
use crate::fleet::host::{Drain, Host};
use crate::fleet::migration::{Migration, MigrationStatus};
use crate::fleet::network::Port;
use crate::fleet::{Change, Fleet, Time};
use godwit_protocol::id::{HostId, InstanceId, UserId};

/// Lets new instances be placed on a host, or no longer, with the reason why not. Letting them ends a drain.
///
/// # Errors
/// No such host; the reason is too long.
pub fn set_enabled(fleet: &Fleet, id: HostId, enabled: bool, reason: Option<String>) -> Decision<Host> {
    check_text("reason", reason.as_deref().unwrap_or_default())?;
    let host = fleet.hosts.get(&id).ok_or_else(|| Error::not_found("Host", id))?;
    let drain = host.drain.clone().filter(|_| !enabled);
    let host = Host { enabled, disabled_reason: reason.filter(|_| !enabled), drain, ..host.clone() };
    Ok((vec![host.clone().into()], host))
}

/// Most instances that leave a host at once.
const MOST_AT_ONCE: u32 = 16;

/// Begins to empty a host: nothing new is placed there, and its instances move away, `at_once` of them at a time. A host
/// that drains already goes on so, with the new number.
///
/// # Errors
/// No such host; a number out of its bounds, 1 to 16.
pub fn drain(fleet: &Fleet, id: HostId, at_once: u32, user: UserId, now: Time) -> Decision<()> {
    if !(1..=MOST_AT_ONCE).contains(&at_once) {
        return Err(Error::Invalid(format!("at_once must be 1 to {MOST_AT_ONCE}, not {at_once}.")));
    }
    let host = fleet.hosts.get(&id).ok_or_else(|| Error::not_found("Host", id))?;
    let since = host.drain.as_ref().map_or(now, |drain| drain.since);
    Ok((vec![Host { drain: Some(Drain { since, at_once, user }), ..host.clone() }.into()], ()))
}

/// Ends a drain. What is on its way arrives; what has left does not come back by itself.
///
/// # Errors
/// No such host.
pub fn undrain(fleet: &Fleet, id: HostId) -> Decision<()> {
    let host = fleet.hosts.get(&id).ok_or_else(|| Error::not_found("Host", id))?;
    let changed = host.drain.is_some().then(|| Host { drain: None, ..host.clone() }.into());
    Ok((changed.into_iter().collect(), ()))
}

/// Forgets a host. `lost`: it is silent for good, as far as anybody can tell; then deletions and migrations that wait
/// for it stand not against it, because that is how an administrator says that it never comes back.
///
/// # Errors
/// No such host; something of ours is on it that nobody would know of any more.
pub fn remove(fleet: &Fleet, id: HostId, lost: bool) -> Decision<()> {
    let host = fleet.hosts.get(&id).ok_or_else(|| Error::not_found("Host", id))?;
    let name = &host.name;
    let conflict = |text: String| Err(Error::Conflict(text));
    let going = |instance: InstanceId| lost && fleet.instances.get(&instance).is_none_or(|i| i.delete_wanted);
    let here = fleet.instances.values().filter(|i| i.host == Some(id) && !going(i.id)).count();
    if here > 0 {
        return conflict(format!("Host {name} has {here} servers; delete them or migrate them away first."));
    }
    let moving = |m: &&Migration| m.status.is_running() && (m.source == id || m.target == Some(id));
    if let Some(migration) = fleet.migrations.values().filter(|_| !lost).find(moving) {
        let number = migration.number;
        return conflict(match migration.status {
            MigrationStatus::Finished => format!(
                "Host {name} holds what server {} was before its resize (migration {number}); confirm or revert that.",
                migration.instance
            ),
            _ => format!("Host {name} takes part in migration {number}; wait for it."),
        });
    }
    let bound =
        |p: &&Port| (p.host == Some(id) || p.target_host == Some(id)) && !p.instance.is_some_and(going);
    if let Some(port) = fleet.ports.values().find(bound) {
        return conflict(format!("Port {} is bound to host {name}; delete it first.", port.id));
    }
    let reported = fleet.observed.get(&id).and_then(|o| o.report.as_ref()).map_or(0, |r| r.instances.len());
    if reported > 0 && !lost {
        return conflict(format!(
            "Host {name} still reports {reported} instances; wait until they are gone."
        ));
    }
    // Its join token goes with it, and it leaves its aggregates.
    let token = fleet.join_tokens.values().filter(|t| t.used_by == Some(id)).map(Change::gone);
    let left = fleet.aggregates.values().filter(|a| a.hosts.contains(&id)).map(|aggregate| {
        let mut aggregate = aggregate.clone();
        aggregate.hosts.remove(&id);
        aggregate.into()
    });
    Ok((token.chain(left).chain([Change::gone(host)]).collect(), ()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::now;
    use godwit_protocol::id::{NetworkId, PortId, ProjectId};

    fn fleet() -> (Fleet, HostId) {
        let host = Host {
            id: HostId::random(),
            number: 1,
            name: "h1".into(),
            enabled: true,
            disabled_reason: None,
            drain: None,
            inventory: None,
            joined_at: now(),
            key_digest: String::new(),
        };
        let (mut fleet, id) = (Fleet::default(), host.id);
        fleet.apply(host.into());
        (fleet, id)
    }

    fn port(host: HostId, instance: Option<InstanceId>) -> Port {
        Port {
            id: PortId::random(),
            network: NetworkId::random(),
            name: String::new(),
            description: String::new(),
            project: ProjectId::random(),
            mac: "fa:16:3e:00:00:01".parse().unwrap(),
            fixed_ips: vec![],
            instance,
            device_id: String::new(),
            device_owner: String::new(),
            index: 0,
            owned_by_instance: false,
            host: Some(host),
            target_host: None,
            admin_state_up: true,
            port_security: true,
            allowed_pairs: Vec::new(),
            security_groups: None,
            tags: vec![],
            revision: 0,
            created_at: now(),
            updated_at: now(),
        }
    }

    #[test]
    fn a_host_with_nothing_on_it_goes() {
        let (fleet, id) = fleet();
        assert_eq!(remove(&fleet, id, false).unwrap().0.len(), 1);
        assert!(matches!(remove(&fleet, HostId::random(), true), Err(Error::NotFound { .. })));
    }

    #[test]
    fn a_port_bound_by_a_user_keeps_its_host_even_when_that_is_lost() {
        let (mut fleet, id) = fleet();
        fleet.apply(port(id, None).into());
        assert!(matches!(remove(&fleet, id, true), Err(Error::Conflict(_))));
    }

    #[test]
    fn what_waits_for_a_lost_host_does_not_keep_it() {
        let (mut fleet, id) = fleet();
        fleet.apply(port(id, Some(InstanceId::random())).into());
        assert!(matches!(remove(&fleet, id, false), Err(Error::Conflict(_))));
        assert!(remove(&fleet, id, true).is_ok());
    }
}
