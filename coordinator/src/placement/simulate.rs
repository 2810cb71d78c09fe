//! How many more of a flavor fit, and where: places again and again, on a copy.

use std::collections::BTreeMap;

use godwit_protocol::id::InstanceId;

use super::explain::Refusal;
use super::host_view::HostView;
use super::request::Request;
use super::roster::Roster;
use super::search::{Choice, find, place};

/// How full a fleet can become.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fill {
    /// How many fit.
    pub placed: u64,
    /// How many on each host that takes any, by name.
    pub by_host: BTreeMap<String, u64>,
    /// Why there is not one more; none when it was not asked for more.
    pub stopped_by: Option<Refusal>,
}

/// Fills a fleet with instances that need the same, `most` of them at most.
pub fn fill(
    mut roster: Roster,
    request: &Request,
    choice: &Choice,
    most: u64,
    allowed: impl Fn(&HostView) -> bool,
) -> Fill {
    let mut fill = Fill { placed: 0, by_host: BTreeMap::new(), stopped_by: None };
    while fill.placed < most {
        let Some(placement) = find(&roster, request, choice, &allowed) else {
            let hosts = roster.views().filter(|host| allowed(host));
            fill.stopped_by = place(hosts, request, choice).err();
            break;
        };
        roster.hold(placement.host, &placement.reservation(InstanceId(uuid::Uuid::nil())));
        fill.placed += 1;
        *fill.by_host.entry(placement.host_name).or_default() += 1;
    }
    fill
}
