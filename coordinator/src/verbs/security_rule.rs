//! Making and removing rules of security groups.

use super::check_text;
use super::security_group::{self, Decision, SecurityError, check_size, networks_of, ports_of};
use crate::error::Error;
use crate::fleet::security::{SecurityGroup, SecurityRule};
use crate::fleet::{Change, Fleet, Time};
use crate::l2;
use godwit_protocol::id::{NetworkId, SecurityGroupId, SecurityRuleId};
use godwit_protocol::security::{Direction, Family, Remote, Rule};
use std::collections::BTreeSet;

/// Rules of one group, at most.
pub const MAX_IN_GROUP: usize = 100;

/// Protocols by the names that clients know, and IANA's numbers. The first name of a number is the usual one.
const PROTOCOLS: [(&str, u8); 25] = [
    ("icmp", 1),
    ("igmp", 2),
    ("ipip", 4),
    ("tcp", 6),
    ("egp", 8),
    ("udp", 17),
    ("dccp", 33),
    ("ipv6-encap", 41),
    ("ipv6-route", 43),
    ("ipv6-frag", 44),
    ("rsvp", 46),
    ("gre", 47),
    ("esp", 50),
    ("ah", 51),
    ("ipv6-icmp", 58),
    ("icmpv6", 58),
    ("icmp6", 58),
    ("ipv6-nonxt", 59),
    ("ipv6-opts", 60),
    ("ospf", 89),
    ("vrrp", 112),
    ("pgm", 113),
    ("sctp", 132),
    ("udplite", 136),
    ("any", 0),
];

const ICMP: u8 = 1;
const ICMPV6: u8 = 58;

/// Protocols that have ports: TCP, UDP, DCCP, SCTP, UDP-Lite.
const WITH_PORTS: [u8; 5] = [6, 17, 33, 132, 136];

/// A rule to be made.
#[derive(Clone, Debug)]
pub struct NewRule {
    /// Its group.
    pub group: SecurityGroupId,
    /// For people.
    pub description: String,
    /// Which way.
    pub direction: Direction,
    /// Of which family.
    pub family: Family,
    /// By name or number; none or `any`: any.
    pub protocol: Option<String>,
    /// First port, or type of ICMP.
    pub first: Option<u64>,
    /// Last port, or code of ICMP.
    pub last: Option<u64>,
    /// Where the other end is.
    pub remote: Remote,
}

/// The rule that lets all of a family pass.
pub(super) fn whole(
    group: &SecurityGroup,
    direction: Direction,
    family: Family,
    remote: Remote,
    now: Time,
) -> SecurityRule {
    SecurityRule {
        id: SecurityRuleId::random(),
        group: group.id,
        project: group.project,
        description: String::new(),
        direction,
        family,
        protocol: None,
        protocol_text: None,
        range: (None, None),
        remote,
        created_at: now,
    }
}

fn bad(name: &'static str, text: String) -> SecurityError {
    SecurityError::BadRule { name, text }
}

fn protocol(text: Option<&str>, family: Family) -> Result<Option<u8>, SecurityError> {
    let Some(text) = text else { return Ok(None) };
    let name = text.to_ascii_lowercase();
    let known = PROTOCOLS.iter().find(|(known, _)| *known == name).map(|(_, number)| *number);
    let number = known.or_else(|| name.parse::<u8>().ok()).ok_or_else(|| {
        let names: Vec<&str> = PROTOCOLS.iter().map(|(name, _)| *name).collect();
        bad(
            "SecurityGroupRuleInvalidProtocol",
            format!(
                "Security group rule protocol {text} not supported. Only protocol values [{}] and integer \
                 representations [0 to 255] are supported.",
                names.join(", ")
            ),
        )
    })?;
    match (number, family) {
        (0, _) => Ok(None),
        // The name of one family's, in a rule of the other, means what its user means.
        (ICMP, Family::V6) => Ok(Some(ICMPV6)),
        (ICMPV6, Family::V4) => Err(bad(
            "SecurityGroupEthertypeConflictWithProtocol",
            format!("Invalid ethertype IPv4 for protocol {text}."),
        )),
        (number, _) => Ok(Some(number)),
    }
}

/// Ports, or type and code, as the protocol has them.
fn range(
    protocol: Option<u8>,
    first: Option<u64>,
    last: Option<u64>,
) -> Result<(Option<u16>, Option<u16>), SecurityError> {
    if first.is_none() && last.is_none() {
        return Ok((None, None));
    }
    let Some(protocol) = protocol else {
        let text = "Must also specify protocol if port range is given.";
        return Err(bad("SecurityGroupProtocolRequiredWithPorts", text.into()));
    };
    if protocol == ICMP || protocol == ICMPV6 {
        let byte = |value: Option<u64>, field| match value.map(u8::try_from) {
            Some(Err(_)) => Err(bad(
                "SecurityGroupInvalidIcmpValue",
                format!("Invalid value for ICMP {field} ({value:?}): it must be 0 to 255."),
            )),
            Some(Ok(value)) => Ok(Some(u16::from(value))),
            None => Ok(None),
        };
        if first.is_none() {
            let text = format!(
                "ICMP code (port-range-max) {} is provided but ICMP type (port-range-min) is missing.",
                last.unwrap_or_default()
            );
            return Err(bad("SecurityGroupMissingIcmpType", text));
        }
        return Ok((byte(first, "type (port-range-min)")?, byte(last, "code (port-range-max)")?));
    }
    if !WITH_PORTS.contains(&protocol) {
        let text = format!(
            "Invalid protocol {protocol} for port range, only supported for TCP, UDP, UDPLITE, SCTP and DCCP."
        );
        return Err(bad("SecurityGroupInvalidProtocolForPort", text));
    }
    let port = |value: Option<u64>| match value.map(u16::try_from) {
        Some(Ok(port)) if port > 0 => Ok(port),
        Some(_) => Err(bad(
            "SecurityGroupInvalidPortValue",
            format!("Invalid value for port {}: it must be 1 to 65535.", value.unwrap_or_default()),
        )),
        None => {
            let text = "For TCP/UDP protocols, port_range_min must be <= port_range_max: both are needed.";
            Err(bad("SecurityGroupInvalidPortRange", text.into()))
        }
    };
    match (port(first)?, port(last)?) {
        (first, last) if first > last => {
            let text = "For TCP/UDP protocols, port_range_min must be <= port_range_max.";
            Err(bad("SecurityGroupInvalidPortRange", text.into()))
        }
        (first, last) => Ok((Some(first), Some(last))),
    }
}

/// Makes a rule. The answer names the networks that are to be told.
///
/// # Errors
/// No such group; a rule that contradicts itself or is there already; a bound.
pub fn create(fleet: &Fleet, new: NewRule, now: Time) -> Decision<(SecurityRule, BTreeSet<NetworkId>)> {
    check_text("description", &new.description)?;
    let group = security_group::find(fleet, new.group)?;
    let protocol = protocol(new.protocol.as_deref(), new.family)?;
    let range = range(protocol, new.first, new.last)?;
    match new.remote {
        Remote::Range(cidr) if cidr.addr().is_ipv4() != (new.family == Family::V4) => {
            let text = format!("Conflicting value ethertype {} for CIDR {cidr}.", family_name(new.family));
            return Err(bad("SecurityGroupRuleParameterConflict", text));
        }
        Remote::Group(remote) => drop(security_group::find(fleet, remote)?),
        _ => {}
    }
    let rule = SecurityRule {
        id: SecurityRuleId::random(),
        group: group.id,
        project: group.project,
        description: new.description,
        direction: new.direction,
        family: new.family,
        protocol,
        protocol_text: new.protocol.filter(|_| protocol.is_some()),
        range,
        remote: new.remote,
        created_at: now,
    };
    let siblings = security_group::rules_of(fleet, group.id);
    if let Some(same) = siblings.iter().find(|r| meaning(r) == meaning(&rule)) {
        return Err(SecurityError::RuleExists(same.id));
    }
    if siblings.len() >= MAX_IN_GROUP {
        return Err(SecurityError::OverQuota(format!(
            "security_group_rule ({MAX_IN_GROUP} at most in one group)"
        )));
    }
    for port in ports_of(fleet, group.id) {
        check_size(fleet, port.security_groups.as_deref().unwrap_or_default(), Some(rule.direction))?;
    }
    let (changes, networks) = told(fleet, group, rule.clone().into(), now);
    Ok((changes, (rule, networks)))
}

/// All but who made it and why.
fn meaning(rule: &SecurityRule) -> impl PartialEq {
    // Everywhere may be written as a range, too.
    let remote = match rule.remote {
        Remote::Range(range) if range.prefix_len() == 0 => Remote::Any,
        remote => remote,
    };
    (rule.direction, rule.family, rule.protocol, rule.range, remote)
}

/// Removes a rule. The answer names the networks that are to be told.
///
/// # Errors
/// No such rule.
pub fn delete(fleet: &Fleet, id: SecurityRuleId, now: Time) -> Decision<BTreeSet<NetworkId>> {
    let rule = find(fleet, id)?;
    let group = security_group::find(fleet, rule.group)?;
    Ok(told(fleet, group, Change::gone(rule), now))
}

fn told(
    fleet: &Fleet,
    group: &SecurityGroup,
    change: Change,
    now: Time,
) -> (Vec<Change>, BTreeSet<NetworkId>) {
    let networks = networks_of(fleet, group.id);
    let counted = SecurityGroup { revision: group.revision + 1, updated_at: now, ..group.clone() };
    let touched = networks.iter().filter_map(|n| l2::touched(fleet, *n));
    ([change, counted.into()].into_iter().chain(touched).collect(), networks)
}

/// The rule of that id.
///
/// # Errors
/// There is none.
pub fn find(fleet: &Fleet, id: SecurityRuleId) -> Result<&SecurityRule, Error> {
    fleet.security_rules.get(&id).ok_or_else(|| Error::not_found("SecurityGroupRule", id))
}

/// As clients write it.
pub fn family_name(family: Family) -> &'static str {
    match family {
        Family::V4 => "IPv4",
        Family::V6 => "IPv6",
    }
}

/// A rule as hosts apply it.
pub fn applied(rule: &SecurityRule, stateful: bool) -> Rule {
    let is_icmp = matches!(rule.protocol, Some(ICMP | ICMPV6));
    let byte = |value: u16| u8::try_from(value).unwrap_or(u8::MAX);
    Rule {
        direction: rule.direction,
        family: rule.family,
        protocol: rule.protocol,
        ports: rule.range.0.zip(rule.range.1).filter(|_| !is_icmp),
        icmp: rule.range.0.filter(|_| is_icmp).map(|kind| (byte(kind), rule.range.1.map(byte))),
        remote: rule.remote,
        stateful,
    }
}
