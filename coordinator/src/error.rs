//! Why the coordinator did not do what a user asked. The API gives each its status and shape.

use crate::fleet::instance::InstanceStatus;
use crate::store::StoreError;
use godwit_protocol::id::InstanceId;

/// A refusal, with a text for the user.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no such thing, or it is not the user's.
    #[error("{noun} {key} could not be found.")]
    NotFound {
        /// `Image`, `Instance`, …
        noun: &'static str,
        /// As the user named it.
        key: String,
    },
    /// What is there stands against it.
    #[error("{0}")]
    Conflict(String),
    /// What is wanted of an instance does not go with where it is in its life.
    #[error("Cannot {action} instance {instance} while it is {}.", .status.name())]
    State {
        /// What is wanted.
        action: &'static str,
        /// Of which.
        instance: InstanceId,
        /// Where it is.
        status: InstanceStatus,
    },
    /// The request is wrong.
    #[error("{0}")]
    Invalid(String),
    /// The user may not.
    #[error("{0}")]
    Forbidden(String),
    /// There is no room: addresses, numbers, bytes.
    #[error("{0}")]
    Exhausted(String),
    /// What is needed does not answer now.
    #[error("{0}")]
    Unavailable(String),
    /// The state database.
    #[error("The request could not be made durable.")]
    Store(#[from] StoreError),
    /// The pool.
    #[error("{what}")]
    Pool {
        /// What was tried.
        what: String,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
}

impl Error {
    /// `action` is nothing for an instance that is `status`.
    pub fn state(action: &'static str, instance: InstanceId, status: InstanceStatus) -> Self {
        Self::State { action, instance, status }
    }

    /// There is no `noun` called `key`.
    pub fn not_found(noun: &'static str, key: impl ToString) -> Self {
        Self::NotFound { noun, key: key.to_string() }
    }
}
