//! Making and changing groups of hosts.

use super::{Decision, check_text};
use crate::error::Error;
use crate::fleet::group::Aggregate;
use crate::fleet::{Change, Fleet, Time};
use crate::placement::labels::ZONE_KEY;
use godwit_protocol::id::HostId;
use std::collections::{BTreeMap, BTreeSet};
use uuid::Uuid;

/// Metadata of one aggregate, at most.
const MAX_METADATA: usize = 128;

fn find(fleet: &Fleet, number: u64) -> Result<&Aggregate, Error> {
    fleet.aggregates.get(&number).ok_or_else(|| Error::not_found("Aggregate", number))
}

fn check_name(fleet: &Fleet, name: &str, except: Option<u64>) -> Result<(), Error> {
    check_text("aggregate's name", name)?;
    if name.is_empty() || name.trim() != name {
        return Err(Error::Invalid(
            "The aggregate's name must not be empty, nor have spaces at its ends.".into(),
        ));
    }
    let taken = fleet.aggregates.values().any(|a| a.name == name && Some(a.number) != except);
    if taken { Err(Error::Conflict(format!("Aggregate {name} already exists."))) } else { Ok(()) }
}

fn check_zone(zone: &str) -> Result<(), Error> {
    check_text("availability zone", zone)?;
    if zone.is_empty() || zone.contains(':') {
        return Err(Error::Invalid("The availability zone must not be empty, nor have a colon.".into()));
    }
    Ok(())
}

/// That the aggregate's hosts come into no second zone, and that none with instances changes its zone.
fn check_hosts(fleet: &Fleet, changed: &Aggregate) -> Result<(), Error> {
    for host in &changed.hosts {
        let name = fleet.hosts.get(host).map_or("", |h| h.name.as_str());
        let others =
            fleet.aggregates.values().filter(|a| a.number != changed.number && a.hosts.contains(host));
        let zones: BTreeSet<&str> = others.filter_map(Aggregate::zone).chain(changed.zone()).collect();
        if zones.len() > 1 {
            let zones = zones.into_iter().collect::<Vec<_>>().join(" and ");
            return Err(Error::Conflict(format!("Host {name} would be in the zones {zones}.")));
        }
        let zone = zones.into_iter().next().unwrap_or(crate::placement::labels::DEFAULT_ZONE);
        let used = fleet.instances.values().any(|i| i.host == Some(*host));
        if used && fleet.zone_of(*host) != zone {
            return Err(Error::Conflict(format!(
                "Host {name} has servers and would change its availability zone to {zone}; move them away first."
            )));
        }
    }
    Ok(())
}

/// Makes an aggregate without hosts.
///
/// # Errors
/// A name that is taken or none; a zone that is none.
pub fn create(fleet: &Fleet, name: String, zone: Option<String>, now: Time) -> Decision<Aggregate> {
    check_name(fleet, &name, None)?;
    let mut metadata = BTreeMap::new();
    if let Some(zone) = zone {
        check_zone(&zone)?;
        metadata.insert(ZONE_KEY.to_owned(), zone);
    }
    let number = fleet.aggregates.keys().next_back().map_or(1, |last| last + 1);
    let aggregate = Aggregate {
        number,
        uuid: Uuid::new_v4(),
        name,
        hosts: BTreeSet::new(),
        metadata,
        created_at: now,
        updated_at: None,
    };
    Ok((vec![aggregate.clone().into()], aggregate))
}

/// Renames an aggregate or gives it a zone.
///
/// # Errors
/// As [`create`]; no such aggregate; a host that would change its zone under its instances.
pub fn update(
    fleet: &Fleet,
    number: u64,
    name: Option<String>,
    zone: Option<String>,
    now: Time,
) -> Decision<Aggregate> {
    let mut changed = find(fleet, number)?.clone();
    if let Some(name) = name {
        check_name(fleet, &name, Some(number))?;
        changed.name = name;
    }
    if let Some(zone) = zone {
        check_zone(&zone)?;
        changed.metadata.insert(ZONE_KEY.to_owned(), zone);
    }
    settle(fleet, changed, now)
}

/// Sets metadata of an aggregate; none takes a key away.
///
/// # Errors
/// No such aggregate; too much or too long; a host that would change its zone under its instances.
pub fn set_metadata(
    fleet: &Fleet,
    number: u64,
    metadata: BTreeMap<String, Option<String>>,
    now: Time,
) -> Decision<Aggregate> {
    let mut changed = find(fleet, number)?.clone();
    for (key, value) in metadata {
        check_text("key of the metadata", &key)?;
        if key.is_empty() {
            return Err(Error::Invalid("A key of the metadata must not be empty.".into()));
        }
        match value {
            None => drop(changed.metadata.remove(&key)),
            Some(value) => {
                check_text("value of the metadata", &value)?;
                if key == ZONE_KEY {
                    check_zone(&value)?;
                }
                changed.metadata.insert(key, value);
            }
        }
    }
    if changed.metadata.len() > MAX_METADATA {
        return Err(Error::Invalid(format!("An aggregate has at most {MAX_METADATA} keys of metadata.")));
    }
    settle(fleet, changed, now)
}

/// Puts a host into an aggregate.
///
/// # Errors
/// No such aggregate or host; it is in it; it would be in two zones, or change its zone under its instances.
pub fn add_host(fleet: &Fleet, number: u64, host: HostId, now: Time) -> Decision<Aggregate> {
    let mut changed = find(fleet, number)?.clone();
    if !changed.hosts.insert(host) {
        let name = fleet.hosts.get(&host).map_or("", |h| h.name.as_str());
        return Err(Error::Conflict(format!("Aggregate {number} already has host {name}.")));
    }
    settle(fleet, changed, now)
}

/// Takes a host out of an aggregate.
///
/// # Errors
/// No such aggregate; the host is not in it, or would change its zone under its instances.
pub fn remove_host(fleet: &Fleet, number: u64, host: HostId, now: Time) -> Decision<Aggregate> {
    let mut changed = find(fleet, number)?.clone();
    if !changed.hosts.remove(&host) {
        return Err(Error::not_found("Host in the aggregate", host));
    }
    let before = fleet.zone_of(host);
    let leaves_zone = changed.zone().is_some_and(|zone| zone == before);
    let used = fleet.instances.values().any(|i| i.host == Some(host));
    let others = fleet.aggregates.values().filter(|a| a.number != number && a.hosts.contains(&host));
    if leaves_zone && used && others.filter_map(Aggregate::zone).next().is_none() {
        return Err(Error::Conflict(format!(
            "The host has servers in the availability zone {before}; move them away first."
        )));
    }
    settle(fleet, changed, now)
}

fn settle(fleet: &Fleet, changed: Aggregate, now: Time) -> Decision<Aggregate> {
    check_hosts(fleet, &changed)?;
    let changed = Aggregate { updated_at: Some(now), ..changed };
    Ok((vec![changed.clone().into()], changed))
}

/// Removes an aggregate that has no host.
///
/// # Errors
/// No such aggregate; it has hosts.
pub fn delete(fleet: &Fleet, number: u64) -> Decision<()> {
    let aggregate = find(fleet, number)?;
    if !aggregate.hosts.is_empty() {
        return Err(Error::Conflict(format!(
            "Aggregate {number} still has {} hosts; remove them from it first.",
            aggregate.hosts.len()
        )));
    }
    Ok((vec![Change::gone(aggregate)], ()))
}
