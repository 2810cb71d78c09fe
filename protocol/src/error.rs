//! Why an agent could not do what it was asked.

use crate::reservation::Refusal;
use serde::{Deserialize, Serialize};

/// What the coordinator may do about an error. It decides by this, never by the text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorKind {
    /// The host's own veto: what it has reserved leaves no room. Place again.
    Refused,
    /// What the request names is not there.
    NotFound,
    /// It contradicts what is there; doing it again will not help.
    Conflict,
    /// A daemon or a mount does not answer now. Worth another try.
    Unavailable,
    /// The pool is full.
    NoSpace,
    /// The request itself is wrong.
    Invalid,
    /// Bytes on a pool are not what they should be.
    Damaged,
    /// It was cancelled.
    Cancelled,
    /// Anything else.
    Internal,
}

/// An agent's refusal or failure, as it travels.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[error("{message}")]
pub struct RequestError {
    /// What may be done about it.
    pub kind: ErrorKind,
    /// For people: what failed and, where there is one, what to do.
    pub message: String,
    /// With [`ErrorKind::Refused`]: the rule, for the coordinator to decide by.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refusal: Option<Box<Refusal>>,
}

impl RequestError {
    /// An error of `kind` that says `message`.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), refusal: None }
    }

    /// A host's veto.
    pub fn refused(message: impl Into<String>, refusal: Refusal) -> Self {
        Self { refusal: Some(Box::new(refusal)), ..Self::new(ErrorKind::Refused, message) }
    }

    /// Whether the plan was made from cells that are not there any more: with a new report it is worth another try
    /// on the same host.
    pub fn is_stale(&self) -> bool {
        matches!(self.refusal.as_deref(), Some(Refusal::Stale { .. }))
    }

    /// Whether the same request may succeed later with nothing else changed.
    pub fn is_transient(&self) -> bool {
        self.kind == ErrorKind::Unavailable
    }
}

/// An error and its sources in one line, as logs and a process's last words print it. Names of files may hold any character;
/// those that control a terminal or begin a line are escaped.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    match text.contains(char::is_control) {
        true => text.chars().flat_map(escape_control).collect(),
        false => text,
    }
}

fn escape_control(character: char) -> impl Iterator<Item = char> {
    let (escaped, plain) = match character.is_control() {
        true => (Some(character.escape_default()), None),
        false => (None, Some(character)),
    };
    escaped.into_iter().flatten().chain(plain)
}
