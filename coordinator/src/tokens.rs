//! Users' tokens and passwords. A token is its claims and a MAC over them: nothing is stored for it, so that a
//! token survives a restart of the coordinator; one given back early is remembered until it would have expired.

use crate::fleet::Time;
use argon2::password_hash::{PasswordHash, PasswordHasher, PasswordVerifier, SaltString};
use argon2::{Algorithm, Argon2, Params, Version};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use godwit_protocol::id::{ProjectId, UserId};
use hmac::{Hmac, Mac};
use serde::{Deserialize, Serialize};
use sha2::Sha256;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::sync::Semaphore;

/// What the MAC is over begins with this, so that no other use of the key can make a token.
const CONTEXT: &[u8] = b"godwit user token 1\0";

/// Argon2id with 7 MiB and 5 passes: of OWASP's equally strong settings the one that needs the least memory, as an
/// idle coordinator is to stay small.
const ARGON2_MEMORY_KIB: u32 = 7 << 10;
const ARGON2_PASSES: u32 = 5;

/// Passwords checked at the same time; more wait, so that guessing cannot take all CPUs and memory.
const CHECKS: usize = 2;

/// What a token is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Scope {
    /// Only to ask for another token.
    Unscoped,
    /// The whole installation.
    System,
    /// One project.
    Project(ProjectId),
}

/// What a token says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claims {
    /// Identifies the token in logs and in the list of revoked ones.
    pub audit_id: String,
    /// Whose it is.
    pub user: UserId,
    /// What it is for.
    pub scope: Scope,
    /// How its user proved who they are: `password`, `token`.
    pub methods: Vec<String>,
    /// From when.
    #[serde(with = "time::serde::timestamp::microseconds")]
    pub issued_at: Time,
    /// Until when.
    #[serde(with = "time::serde::timestamp::microseconds")]
    pub expires_at: Time,
}

/// Why a token is not good. The text says what to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// Not made here, or changed since.
    #[error("This is no token of this cloud. Log in again.")]
    Forged,
    /// Too old.
    #[error("The token has expired. Log in again.")]
    Expired,
    /// Given back.
    #[error("The token was revoked. Log in again.")]
    Revoked,
    /// The user, the project or the role is gone.
    #[error("The token's user no longer has that role. Log in again.")]
    Gone,
}

/// Why the key cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// The file.
    #[error("{path} cannot be read")]
    Read {
        /// Which.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// The file does not hold a key.
    #[error(
        "{0} does not hold 64 hexadecimal digits; restore it, or write new ones and all users log in again"
    )]
    Malformed(PathBuf),
}

/// Why a password has no hash.
#[derive(Debug, thiserror::Error)]
#[error("the password cannot be hashed: {0}")]
pub struct HashError(String);

/// Makes and checks tokens and passwords.
pub struct Tokens {
    key: [u8; 32],
    life: Duration,
    checks: Semaphore,
}

impl Tokens {
    /// With the key of a file, 64 hexadecimal digits.
    ///
    /// # Errors
    /// [`KeyError`].
    pub fn open(path: &Path, life: Duration) -> Result<Self, KeyError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| KeyError::Read { path: path.to_owned(), source })?;
        let mut key = [0; 32];
        hex::decode_to_slice(text.trim(), &mut key).map_err(|_| KeyError::Malformed(path.to_owned()))?;
        Ok(Self::with_key(key, life))
    }

    /// With a key; tokens live for `life`.
    pub fn with_key(key: [u8; 32], life: Duration) -> Self {
        Self { key, life, checks: Semaphore::new(CHECKS) }
    }

    /// A new token. One made from another token never outlives that one: `until`.
    pub fn issue(
        &self,
        user: UserId,
        scope: Scope,
        methods: &[&str],
        now: Time,
        until: Option<Time>,
    ) -> (String, Claims) {
        let expires_at = now + self.life;
        let claims = Claims {
            audit_id: URL_SAFE_NO_PAD.encode(uuid::Uuid::new_v4().as_bytes()),
            user,
            scope,
            methods: methods.iter().map(|&m| m.to_owned()).collect(),
            issued_at: now,
            expires_at: until.map_or(expires_at, |until| until.min(expires_at)),
        };
        let body = URL_SAFE_NO_PAD.encode(serde_json::to_vec(&claims).unwrap_or_default());
        let mac = URL_SAFE_NO_PAD.encode(self.mac(&body).finalize().into_bytes());
        (format!("{body}.{mac}"), claims)
    }

    /// What a token says, if it is ours, unchanged and not too old. Revocation is the caller's to look up.
    ///
    /// # Errors
    /// [`TokenError::Forged`], [`TokenError::Expired`].
    pub fn verify(&self, token: &str, now: Time) -> Result<Claims, TokenError> {
        let (body, mac) = token.split_once('.').ok_or(TokenError::Forged)?;
        let mac = URL_SAFE_NO_PAD.decode(mac).map_err(|_| TokenError::Forged)?;
        self.mac(body).verify_slice(&mac).map_err(|_| TokenError::Forged)?;
        let claims = URL_SAFE_NO_PAD.decode(body).map_err(|_| TokenError::Forged)?;
        let claims: Claims = serde_json::from_slice(&claims).map_err(|_| TokenError::Forged)?;
        if claims.expires_at <= now { Err(TokenError::Expired) } else { Ok(claims) }
    }

    fn mac(&self, body: &str) -> Hmac<Sha256> {
        // A key of any length is a key for HMAC, so this cannot fail.
        let mut mac = <Hmac<Sha256> as Mac>::new_from_slice(&self.key).unwrap_or_else(|_| unreachable!());
        mac.update(CONTEXT);
        mac.update(body.as_bytes());
        mac
    }

    /// Whether `password` is what `hash` was made from. With no hash (there is no such user) as much work is done, so
    /// that the time does not tell whether there is.
    pub async fn check_password(&self, hash: Option<String>, password: String) -> bool {
        let Ok(_permit) = self.checks.acquire().await else { return false };
        let checked = tokio::task::spawn_blocking(move || match hash {
            Some(hash) => PasswordHash::new(&hash)
                .is_ok_and(|hash| argon2().verify_password(password.as_bytes(), &hash).is_ok()),
            None => {
                let _ = hash_password(&password);
                false
            }
        });
        checked.await.unwrap_or(false)
    }
}

fn argon2() -> Argon2<'static> {
    let params = Params::new(ARGON2_MEMORY_KIB, ARGON2_PASSES, 1, None).unwrap_or_default();
    Argon2::new(Algorithm::Argon2id, Version::V0x13, params)
}

/// A password's hash in PHC form, with a salt of its own. Takes about 30 ms of CPU: not on a runtime's thread.
///
/// # Errors
/// [`HashError`] when the system gives no randomness.
pub fn hash_password(password: &str) -> Result<String, HashError> {
    let failed = |error: &dyn std::fmt::Display| HashError(error.to_string());
    let salt = SaltString::encode_b64(&random::<16>().map_err(|e| failed(&e))?).map_err(|e| failed(&e))?;
    let hash = argon2().hash_password(password.as_bytes(), &salt).map_err(|e| failed(&e))?;
    Ok(hash.to_string())
}

/// Random bytes from the system.
///
/// # Errors
/// When the system has none.
pub fn random<const N: usize>() -> Result<[u8; N], getrandom::Error> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::now;

    fn tokens() -> Tokens {
        Tokens::with_key([7; 32], Duration::from_secs(60))
    }

    #[test]
    fn a_token_says_what_it_was_issued_for_until_it_expires() {
        let (at, project) = (now(), ProjectId::random());
        let (token, claims) =
            tokens().issue(UserId::random(), Scope::Project(project), &["password"], at, None);
        assert_eq!(tokens().verify(&token, at), Ok(claims.clone()));
        assert_eq!(claims.scope, Scope::Project(project));
        assert!(tokens().verify(&token, at + Duration::from_secs(59)).is_ok());
        assert_eq!(tokens().verify(&token, at + Duration::from_secs(60)), Err(TokenError::Expired));
    }

    #[test]
    fn a_token_changed_in_any_byte_is_forged() {
        let at = now();
        let (token, _) = tokens().issue(UserId::random(), Scope::System, &["password"], at, None);
        for index in 0..token.len() {
            let mut bytes = token.clone().into_bytes();
            bytes[index] = if bytes[index] == b'A' { b'B' } else { b'A' };
            let changed = String::from_utf8(bytes).unwrap();
            assert_eq!(tokens().verify(&changed, at), Err(TokenError::Forged), "byte {index}");
        }
        let other = Tokens::with_key([8; 32], Duration::from_secs(60));
        assert_eq!(other.verify(&token, at), Err(TokenError::Forged));
        for nonsense in ["", ".", "a.b", "gAAAAAB"] {
            assert_eq!(tokens().verify(nonsense, at), Err(TokenError::Forged));
        }
    }

    #[test]
    fn a_token_from_a_token_never_outlives_it() {
        let at = now();
        let until = at + Duration::from_secs(10);
        let (_, claims) = tokens().issue(UserId::random(), Scope::Unscoped, &["token"], at, Some(until));
        assert_eq!(claims.expires_at, until);
    }

    #[tokio::test]
    async fn only_the_password_itself_passes_and_no_user_has_one_by_default() {
        let hash = hash_password("correct horse").unwrap();
        assert!(hash.starts_with("$argon2id$v=19$m=7168,t=5,p=1$"));
        assert_ne!(hash, hash_password("correct horse").unwrap());
        let check = |hash: Option<&str>, password: &str| {
            let (hash, password) = (hash.map(str::to_owned), password.to_owned());
            async move { tokens().check_password(hash, password).await }
        };
        assert!(check(Some(&hash), "correct horse").await);
        assert!(!check(Some(&hash), "correct horsf").await);
        assert!(!check(Some("not a hash"), "").await);
        assert!(!check(None, "correct horse").await);
    }
}
