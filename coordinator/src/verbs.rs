//! What users do to the nouns that need no host: pure decisions for [`crate::ledger::Ledger::change`]. Each looks
//! at the fleet and answers with the changes and the record, or with the reason why not.

pub mod aggregate;
pub mod flavor;
pub mod group;
pub mod host;
pub mod instance;
pub mod keypair;
pub mod network;
pub mod port;
pub mod security_group;
pub mod security_rule;
pub mod subnet;

use crate::error::Error;
use crate::fleet::Change;

/// What a verb decides: changes and an answer, or a refusal.
pub type Decision<T> = Result<(Vec<Change>, T), Error>;

/// Characters of a name or a description, at most.
const TEXT: usize = 255;

/// That `text` is no longer than clients and tables take.
fn check_text(what: &str, text: &str) -> Result<(), Error> {
    let length = text.chars().count();
    if length <= TEXT {
        return Ok(());
    }
    Err(Error::Invalid(format!("The {what} has {length} characters; at most {TEXT} are allowed.")))
}

/// That labels are few and short.
fn check_tags(tags: &[String]) -> Result<(), Error> {
    if tags.len() > 50 {
        return Err(Error::Invalid(format!("{} tags are too many; at most 50 are allowed.", tags.len())));
    }
    match tags.iter().find(|tag| tag.is_empty() || tag.chars().count() > TEXT) {
        Some(tag) => Err(Error::Invalid(format!("The tag '{tag}' must have 1 to {TEXT} characters."))),
        None => Ok(()),
    }
}
