//! What handlers take out of a request: who asks, the query, the body, and where links point.

use crate::api::fault::{Answer, Fault};
use crate::app::Shared;
use crate::fleet::Fleet;
use crate::fleet::identity::Role;
use crate::ledger::now;
use crate::tokens::{Claims, Scope, TokenError};
use axum::body::Bytes;
use axum::extract::{FromRequest, FromRequestParts, Request};
use axum::http::StatusCode;
use axum::http::header::HOST;
use axum::http::request::Parts;
use godwit_protocol::id::{ProjectId, UserId};
use serde::de::DeserializeOwned;
use std::convert::Infallible;
use std::time::Duration;
use tokio::time::timeout;

/// Largest body of a request that is no image, in bytes.
pub const MAX_BODY_BYTES: usize = 1 << 20;

/// Such a body must be there this fast.
const BODY: Duration = Duration::from_secs(30);

/// A good token, whatever its scope.
#[derive(Clone, Debug)]
pub struct Session {
    /// What the token says.
    pub claims: Claims,
    /// What its user may do in its scope; none when it is unscoped.
    pub role: Option<Role>,
}

impl Session {
    /// Reads a token and looks up what its user may do now: a role taken away counts at once.
    ///
    /// # Errors
    /// 401.
    pub fn of_token(app: &Shared, token: &str) -> Answer<Self> {
        let claims =
            app.tokens.verify(token, now()).map_err(|error| Fault::unauthorized(error.to_string()))?;
        app.ledger
            .read(|fleet| Self::of_claims(fleet, claims))
            .map_err(|e| Fault::unauthorized(e.to_string()))
    }

    fn of_claims(fleet: &Fleet, claims: Claims) -> Result<Self, TokenError> {
        if fleet.revoked_tokens.contains_key(&claims.audit_id) {
            return Err(TokenError::Revoked);
        }
        let user = fleet.users.get(&claims.user).ok_or(TokenError::Gone)?;
        let role = match claims.scope {
            Scope::Unscoped => None,
            scope => Some(role_in(user, scope).ok_or(TokenError::Gone)?),
        };
        Ok(Self { claims, role })
    }
}

/// What a user may do in a scope: an administrator anywhere is one everywhere.
pub fn role_in(user: &crate::fleet::identity::User, scope: Scope) -> Option<Role> {
    let admin = user.roles.iter().any(|(_, role)| *role == Role::Admin);
    match scope {
        _ if admin => Some(Role::Admin),
        Scope::Project(project) => user.roles.iter().find(|(p, _)| *p == project).map(|(_, role)| *role),
        Scope::System | Scope::Unscoped => None,
    }
}

impl FromRequestParts<Shared> for Session {
    type Rejection = Fault;

    async fn from_request_parts(parts: &mut Parts, app: &Shared) -> Answer<Self> {
        let missing =
            || Fault::unauthorized("The request you have made requires authentication: no X-Auth-Token.");
        let header = parts.headers.get("x-auth-token").ok_or_else(missing)?;
        Self::of_token(app, header.to_str().unwrap_or_default())
    }
}

/// Who asks, in a project.
#[derive(Clone, Copy, Debug)]
pub struct Caller {
    /// The user.
    pub user: UserId,
    /// The project that the token is for.
    pub project: ProjectId,
    /// What the user may do there.
    pub role: Role,
}

impl Caller {
    /// Whether everything in all projects may be seen and done.
    pub fn is_admin(&self) -> bool {
        self.role == Role::Admin
    }

    /// Whether something of `project` may be seen.
    pub fn sees(&self, project: ProjectId) -> bool {
        self.is_admin() || self.project == project
    }

    /// That the user may change things of the project.
    ///
    /// # Errors
    /// 403 for readers.
    pub fn require_member(&self) -> Answer<()> {
        match self.role {
            Role::Admin | Role::Member => Ok(()),
            Role::Reader => Err(Fault::forbidden("Your role in this project may only look, not change.")),
        }
    }

    /// That the user is an administrator.
    ///
    /// # Errors
    /// 403 for others.
    pub fn require_admin(&self) -> Answer<()> {
        if self.is_admin() { Ok(()) } else { Err(Fault::forbidden("Only an administrator may do this.")) }
    }
}

impl FromRequestParts<Shared> for Caller {
    type Rejection = Fault;

    async fn from_request_parts(parts: &mut Parts, app: &Shared) -> Answer<Self> {
        let session = Session::from_request_parts(parts, app).await?;
        match (session.claims.scope, session.role) {
            (Scope::Project(project), Some(role)) => Ok(Self { user: session.claims.user, project, role }),
            _ => Err(Fault::forbidden(
                "This needs a token for a project; yours has none: set OS_PROJECT_NAME.",
            )),
        }
    }
}

/// The query, in order; keys may repeat.
#[derive(Clone, Debug, Default)]
pub struct Params(Vec<(String, String)>);

impl Params {
    /// Parses the part of a URL after `?`.
    pub fn parse(query: &str) -> Self {
        Self(form_urlencoded::parse(query.as_bytes()).into_owned().collect())
    }

    /// The first value of a key.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.iter().find(|(k, _)| *k == key).map(|(_, v)| v)
    }

    /// Every value of a key.
    pub fn all<'a>(&'a self, key: &'a str) -> impl Iterator<Item = &'a str> {
        self.0.iter().filter(move |(k, _)| k == key).map(|(_, v)| v.as_str())
    }

    /// Every pair.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(k, v)| (k.as_str(), v.as_str()))
    }

    /// A number.
    ///
    /// # Errors
    /// 400 when it is none.
    pub fn number<T: std::str::FromStr>(&self, key: &str) -> Answer<Option<T>> {
        let parse = |v: &str| {
            v.parse().map_err(|_| Fault::bad_request(format!("{key} must be a whole number, not {v:?}.")))
        };
        self.get(key).map(parse).transpose()
    }

    /// A truth value, in any of the spellings that clients use.
    ///
    /// # Errors
    /// 400 when it is none of them.
    pub fn flag(&self, key: &str) -> Answer<Option<bool>> {
        self.get(key).map(|value| Self::read_flag(key, value)).transpose()
    }

    /// The truth value that a text means.
    ///
    /// # Errors
    /// 400 when it means none.
    pub fn read_flag(key: &str, value: &str) -> Answer<bool> {
        match value.to_ascii_lowercase().as_str() {
            "1" | "true" | "t" | "yes" | "y" | "on" => Ok(true),
            "0" | "false" | "f" | "no" | "n" | "off" => Ok(false),
            _ => Err(Fault::bad_request(format!("{key} must be true or false, not {value:?}."))),
        }
    }

    /// The query again with one key set, for links to the next page.
    pub fn with(&self, key: &str, value: &str) -> String {
        self.others(key).append_pair(key, value).finish()
    }

    /// The query again without one key.
    pub fn without(&self, key: &str) -> String {
        self.others(key).finish()
    }

    fn others(&self, key: &str) -> form_urlencoded::Serializer<'static, String> {
        let mut serializer = form_urlencoded::Serializer::new(String::new());
        serializer.extend_pairs(self.0.iter().filter(|(k, _)| k != key));
        serializer
    }
}

impl<S: Sync> FromRequestParts<S> for Params {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Infallible> {
        Ok(Self::parse(parts.uri.query().unwrap_or_default()))
    }
}

/// A JSON body. The content type is not asked for: clients forget it.
#[derive(Clone, Debug)]
pub struct Body<T>(pub T);

impl<T: DeserializeOwned> FromRequest<Shared> for Body<T> {
    type Rejection = Fault;

    async fn from_request(request: Request, app: &Shared) -> Answer<Self> {
        let arrived = timeout(BODY, Bytes::from_request(request, app)).await;
        let arrived = arrived.map_err(|_| Fault::of_status(StatusCode::REQUEST_TIMEOUT))?;
        let bytes = arrived.map_err(|rejection| match rejection.status() {
            StatusCode::PAYLOAD_TOO_LARGE => Fault::new(
                StatusCode::PAYLOAD_TOO_LARGE,
                format!("The request's body is over the limit of {MAX_BODY_BYTES} bytes."),
            ),
            _ => Fault::bad_request("The request's body broke off."),
        })?;
        let read = serde_json::from_slice(&bytes);
        read.map(Self)
            .map_err(|error| Fault::bad_request(format!("The request's body does not read: {error}.")))
    }
}

/// Where links in answers point: the address that the client came by.
#[derive(Clone, Debug)]
pub struct Links {
    base: String,
}

/// How a connection came in; the listener puts it into each request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Via {
    /// The TLS listener.
    Tls,
    /// The plain listener.
    Plain,
}

impl Links {
    /// `https://ADDR:PORT`, no slash at the end.
    pub fn base(&self) -> &str {
        &self.base
    }

    /// An absolute link to `path`, which starts with a slash.
    pub fn to(&self, path: &str) -> String {
        format!("{}{path}", self.base)
    }

    /// Links that point to `base`.
    #[cfg(test)]
    pub(crate) fn for_tests(base: &str) -> Self {
        Self { base: base.to_owned() }
    }

    /// By the Host header when it can be true: over TLS any, over the plain listener only loopback's names (others
    /// come through somebody's proxy, which the configured URL is about).
    fn choose(url: &str, via: Option<Via>, host: Option<&str>) -> Self {
        let sane = |host: &&str| {
            host.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._:[]".contains(&b)) && !host.is_empty()
        };
        let local = |host: &&str| {
            let name = host.rsplit_once(':').map_or(*host, |(name, _)| name);
            matches!(name, "localhost" | "127.0.0.1" | "[::1]")
        };
        let base = match (via, host.filter(sane)) {
            (Some(Via::Tls), Some(host)) => format!("https://{host}"),
            (Some(Via::Plain), Some(host)) if local(&host) => format!("http://{host}"),
            _ => url.trim_end_matches('/').to_owned(),
        };
        Self { base }
    }
}

impl FromRequestParts<Shared> for Links {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, app: &Shared) -> Result<Self, Infallible> {
        let host = parts.headers.get(HOST).and_then(|host| host.to_str().ok());
        Ok(Self::choose(&app.config.url, parts.extensions.get().copied(), host))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repeated_keys_keep_all_their_values() {
        let params = Params::parse("fields=id&fields=name&name=a%20b&limit=7&all_tenants=True");
        assert_eq!(params.all("fields").collect::<Vec<_>>(), ["id", "name"]);
        assert_eq!(params.get("name"), Some("a b"));
        assert_eq!(params.number::<usize>("limit").unwrap(), Some(7));
        assert_eq!(params.flag("all_tenants").unwrap(), Some(true));
        assert!(params.number::<usize>("name").is_err());
        assert_eq!(params.with("limit", "1"), "fields=id&fields=name&name=a+b&all_tenants=True&limit=1");
    }

    #[test]
    fn links_follow_the_host_header_only_where_it_can_be_true() {
        let base = |via, host| Links::choose("https://cloud:8774", via, host).base;
        assert_eq!(base(Some(Via::Tls), Some("198.18.0.1:8774")), "https://198.18.0.1:8774");
        assert_eq!(base(Some(Via::Plain), Some("127.0.0.1:99")), "http://127.0.0.1:99");
        assert_eq!(base(Some(Via::Plain), Some("cloud.example")), "https://cloud:8774");
        assert_eq!(base(Some(Via::Tls), Some("a\"b")), "https://cloud:8774");
        assert_eq!(base(Some(Via::Tls), None), "https://cloud:8774");
    }
}
