//! What users change of an instance without its host.

use super::{Decision, check_text};
use crate::error::Error;
use crate::fleet::instance::Instance;
use crate::fleet::{Fleet, Time};
use godwit_protocol::id::InstanceId;
use std::collections::BTreeMap;

/// Pairs of metadata at most.
const MAX_METADATA: usize = 128;

/// That a name is one.
///
/// # Errors
/// It is empty, too long, or holds control characters.
pub fn check_name(name: &str) -> Result<(), Error> {
    check_text("name", name)?;
    if name.trim().is_empty() || name.chars().any(char::is_control) {
        return Err(Error::Invalid("The name must have printable characters.".into()));
    }
    Ok(())
}

/// That metadata fit a config drive.
///
/// # Errors
/// Too many pairs, or too long a key or value.
pub fn check_metadata(pairs: &BTreeMap<String, String>) -> Result<(), Error> {
    if pairs.len() > MAX_METADATA {
        let count = pairs.len();
        return Err(Error::Invalid(format!(
            "{count} metadata items are too many; {MAX_METADATA} are allowed."
        )));
    }
    for (key, value) in pairs {
        if key.is_empty() {
            return Err(Error::Invalid("A metadata item needs a key.".into()));
        }
        check_text("metadata key", key)?;
        check_text(&format!("value of metadata item '{key}'"), value)?;
    }
    Ok(())
}

/// Gives an instance another name or description. Its guest keeps its host name.
///
/// # Errors
/// No such instance; bad texts.
pub fn describe(
    fleet: &Fleet,
    id: InstanceId,
    name: Option<String>,
    description: Option<Option<String>>,
    now: Time,
) -> Decision<()> {
    let mut instance = find(fleet, id)?.clone();
    if let Some(name) = name {
        check_name(&name)?;
        instance.name = name;
    }
    if let Some(description) = description {
        check_text("description", description.as_deref().unwrap_or_default())?;
        instance.description = description;
    }
    instance.updated_at = now;
    Ok((vec![instance.into()], ()))
}

/// Sets all of an instance's metadata.
///
/// # Errors
/// No such instance; too many or too long.
pub fn set_metadata(
    fleet: &Fleet,
    id: InstanceId,
    metadata: BTreeMap<String, String>,
    now: Time,
) -> Decision<BTreeMap<String, String>> {
    check_metadata(&metadata)?;
    let instance = Instance { metadata: metadata.clone(), updated_at: now, ..find(fleet, id)?.clone() };
    Ok((vec![instance.into()], metadata))
}

/// The instance of that id.
///
/// # Errors
/// There is none.
pub fn find(fleet: &Fleet, id: InstanceId) -> Result<&Instance, Error> {
    fleet.instances.get(&id).ok_or_else(|| Error::not_found("Instance", id))
}
