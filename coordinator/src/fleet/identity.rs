//! Projects, users, key pairs.

use super::Time;
use godwit_protocol::id::{ProjectId, UserId};
use serde::{Deserialize, Serialize};

/// Owns everything that users make.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Project {
    /// Its id.
    pub id: ProjectId,
    /// Unique.
    pub name: String,
}

/// What a user may do in a project.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Everything, in all projects.
    Admin,
    /// Everything in this project.
    Member,
    /// Look.
    Reader,
}

/// Somebody who may ask for a token.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct User {
    /// Their id.
    pub id: UserId,
    /// Unique.
    pub name: String,
    /// Argon2id, in PHC form.
    pub password_hash: String,
    /// Where they may do what.
    pub roles: Vec<(ProjectId, Role)>,
}

/// A token that was given back before its time.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RevokedToken {
    /// The token's audit id.
    pub audit_id: String,
    /// After this the record may go.
    pub expires_at: Time,
}

/// A user's public SSH key.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct KeyPair {
    /// Whose.
    pub user: UserId,
    /// Unique among the user's.
    pub name: String,
    /// One line of OpenSSH form.
    pub public_key: String,
    /// MD5 of the key with colons, as clients show it.
    pub fingerprint: String,
    /// When.
    pub created_at: Time,
}

impl KeyPair {
    /// Its key in the fleet's table.
    pub fn map_key(&self) -> String {
        Self::key_for(self.user, &self.name)
    }

    /// The key under which a user's key pair of that name is.
    pub fn key_for(user: UserId, name: &str) -> String {
        format!("{user}/{name}")
    }
}
