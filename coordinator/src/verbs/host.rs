//! What administrators change of a host without asking it.

use super::{Decision, check_text};
use crate::error::Error;
use crate::fleet::Fleet;
use crate::fleet::host::Host;
use godwit_protocol::id::HostId;

/// Lets new instances be placed on a host, or no longer, with the reason why not.
///
/// # Errors
/// No such host; the reason is too long.
pub fn set_enabled(fleet: &Fleet, id: HostId, enabled: bool, reason: Option<String>) -> Decision<Host> {
    check_text("reason", reason.as_deref().unwrap_or_default())?;
    let host = fleet.hosts.get(&id).ok_or_else(|| Error::not_found("Host", id))?;
    let host = Host { enabled, disabled_reason: reason.filter(|_| !enabled), ..host.clone() };
    Ok((vec![host.clone().into()], host))
}
