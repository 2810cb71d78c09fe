//! Logging in, and what a token is worth.

use super::catalog::{catalog, domain};
use super::{DOMAIN_ID, DOMAIN_NAME, role_name};
use crate::api::context::{Body, Links, Params, Session, role_in};
use crate::api::fault::{Answer, Fault};
use crate::app::Shared;
use crate::error::Error;
use crate::fleet::identity::{RevokedToken, Role, User};
use crate::fleet::{Change, Time};
use crate::ledger::now;
use crate::tokens::{Claims, Scope};
use axum::Json;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::response::IntoResponse;
use godwit_protocol::id::{ProjectId, UserId};
use serde::Deserialize;
use serde_json::{Value, json};
use time::format_description::BorrowedFormatItem;
use time::macros::format_description;

const STAMP: &[BorrowedFormatItem<'_>] =
    format_description!("[year]-[month]-[day]T[hour]:[minute]:[second].[subsecond digits:6]Z");

/// Longest password that is looked at, in bytes.
const MAX_PASSWORD_BYTES: usize = 1024;

/// Body of a request for a token.
#[derive(Deserialize)]
pub(super) struct Request {
    auth: Auth,
}

#[derive(Deserialize)]
struct Auth {
    identity: Identity,
    scope: Option<ScopeRequest>,
}

#[derive(Deserialize)]
struct Identity {
    methods: Vec<String>,
    password: Option<PasswordMethod>,
    token: Option<TokenMethod>,
}

#[derive(Deserialize)]
struct PasswordMethod {
    user: UserRequest,
}

#[derive(Deserialize)]
struct UserRequest {
    id: Option<String>,
    name: Option<String>,
    domain: Option<Named>,
    password: String,
}

#[derive(Deserialize)]
struct TokenMethod {
    id: String,
}

#[derive(Deserialize)]
struct Named {
    id: Option<String>,
    name: Option<String>,
}

impl Named {
    fn is_default_domain(&self) -> bool {
        let name = self.name.as_deref().map(|name| name.eq_ignore_ascii_case(DOMAIN_NAME));
        self.id.as_deref().map(|id| id == DOMAIN_ID).or(name).unwrap_or(false)
    }
}

#[derive(Deserialize)]
#[serde(untagged)]
enum ScopeRequest {
    /// `"unscoped"`, or `{"unscoped": {}}`.
    Word(String),
    Fields(ScopeFields),
}

#[derive(Deserialize)]
struct ScopeFields {
    project: Option<ProjectRequest>,
    system: Option<SystemRequest>,
    domain: Option<Value>,
}

#[derive(Deserialize)]
struct ProjectRequest {
    id: Option<String>,
    name: Option<String>,
    domain: Option<Named>,
}

#[derive(Deserialize)]
struct SystemRequest {
    all: bool,
}

/// One text for a wrong name and a wrong password: who exists is nobody's business.
fn rejected() -> Fault {
    Fault::unauthorized("The user name, its domain or the password is wrong.")
}

/// POST /v3/auth/tokens.
pub(super) async fn create(
    State(app): State<Shared>,
    params: Params,
    links: Links,
    Body(Request { auth }): Body<Request>,
) -> Answer {
    let (user, methods, until) = identify(&app, auth.identity).await?;
    let scope = resolve(&app, &user, auth.scope)?;
    if scope != Scope::Unscoped && role_in(&user, scope).is_none() {
        return Err(Fault::unauthorized("The user has no role in that scope."));
    }
    let methods: Vec<&str> = methods.iter().map(String::as_str).collect();
    let (token, claims) = app.tokens.issue(user.id, scope, &methods, now(), until);
    let body = describe(&app, &claims, &links, params.get("nocatalog").is_none())?;
    Ok((StatusCode::CREATED, [("x-subject-token", token), ("vary", "X-Auth-Token".into())], body)
        .into_response())
}

/// Who it is, how that was proved, and until when a token made of this may live.
async fn identify(app: &Shared, identity: Identity) -> Answer<(User, Vec<String>, Option<Time>)> {
    let has = |method: &str| identity.methods.iter().any(|m| m == method);
    match identity {
        Identity { password: Some(PasswordMethod { user }), .. } if has("password") => {
            Ok((check_password(app, user).await?, vec!["password".into()], None))
        }
        Identity { token: Some(TokenMethod { id }), .. } if has("token") => {
            let claims = Session::of_token(app, &id)?.claims;
            let user = app.ledger.read(|fleet| fleet.users.get(&claims.user).cloned());
            let mut methods = claims.methods;
            if !methods.iter().any(|m| m == "token") {
                methods.push("token".into());
            }
            Ok((user.ok_or_else(rejected)?, methods, Some(claims.expires_at)))
        }
        _ => Err(Fault::unauthorized(
            "The methods to log in with are password and token; one of them, with its data.",
        )),
    }
}

async fn check_password(app: &Shared, wish: UserRequest) -> Answer<User> {
    if wish.password.len() > MAX_PASSWORD_BYTES {
        return Err(rejected());
    }
    let user = app.ledger.read(|fleet| match (&wish.id, &wish.name) {
        (Some(id), _) => id.parse::<UserId>().ok().and_then(|id| fleet.users.get(&id)).cloned(),
        (None, Some(name)) if wish.domain.as_ref().is_some_and(Named::is_default_domain) => {
            fleet.users.values().find(|user| user.name == *name).cloned()
        }
        _ => None,
    });
    let hash = user.as_ref().map(|user| user.password_hash.clone());
    let good = app.tokens.check_password(hash, wish.password).await;
    user.filter(|_| good).ok_or_else(rejected)
}

/// The scope a user asks for. Without one: their project when they have just one role, else none.
fn resolve(app: &Shared, user: &User, wish: Option<ScopeRequest>) -> Answer<Scope> {
    let fields = match wish {
        None => {
            return Ok(match user.roles.as_slice() {
                [(project, _)] => Scope::Project(*project),
                _ => Scope::Unscoped,
            });
        }
        Some(ScopeRequest::Word(word)) if word == "unscoped" => return Ok(Scope::Unscoped),
        Some(ScopeRequest::Word(word)) => {
            return Err(Fault::bad_request(format!("There is no scope {word:?}.")));
        }
        Some(ScopeRequest::Fields(fields)) => fields,
    };
    let missing = || Fault::unauthorized("There is no such project, or the user has no role in it.");
    match fields {
        ScopeFields { domain: Some(_), .. } => {
            Err(Fault::unauthorized("Roles are given for projects and the system here, not for a domain."))
        }
        ScopeFields { system: Some(SystemRequest { all: true }), .. } => Ok(Scope::System),
        ScopeFields { project: Some(wish), .. } => {
            let found = app.ledger.read(|fleet| match (&wish.id, &wish.name) {
                (Some(id), _) => id.parse::<ProjectId>().ok().filter(|id| fleet.projects.contains_key(id)),
                (None, Some(name)) if wish.domain.as_ref().is_none_or(Named::is_default_domain) => {
                    fleet.projects.values().find(|p| p.name == *name).map(|p| p.id)
                }
                _ => None,
            });
            found.map(Scope::Project).ok_or_else(missing)
        }
        _ => Ok(Scope::Unscoped),
    }
}

/// The body that tells what a token is.
fn describe(app: &Shared, claims: &Claims, links: &Links, with_catalog: bool) -> Answer<Json<Value>> {
    let stamp = |time: Time| time.format(STAMP).unwrap_or_default();
    let found = app.ledger.read(|fleet| {
        let user = fleet.users.get(&claims.user)?;
        let project = match claims.scope {
            Scope::Project(id) => Some(fleet.projects.get(&id)?.clone()),
            _ => None,
        };
        Some((user.clone(), project))
    });
    let (user, project) = found.ok_or_else(rejected)?;
    let mut token = json!({
        "methods": claims.methods,
        "user": { "id": user.id, "name": user.name, "domain": domain(), "password_expires_at": null },
        "audit_ids": [claims.audit_id],
        "issued_at": stamp(claims.issued_at),
        "expires_at": stamp(claims.expires_at),
    });
    if claims.scope != Scope::Unscoped {
        // An administrator may do what a member may, a member what a reader may; clients look for either name.
        let implied = match role_in(&user, claims.scope) {
            Some(Role::Admin) => &super::ROLES[..],
            Some(Role::Member) => &super::ROLES[1..],
            Some(Role::Reader) => &super::ROLES[2..],
            None => &[],
        };
        token["roles"] =
            implied.iter().map(|r| json!({ "id": role_name(*r), "name": role_name(*r) })).collect();
        if with_catalog {
            token["catalog"] = catalog(links);
        }
    }
    if let Some(project) = project {
        token["is_domain"] = json!(false);
        token["project"] = json!({ "id": project.id, "name": project.name, "domain": domain() });
    }
    if claims.scope == Scope::System {
        token["system"] = json!({ "all": true });
    }
    Ok(Json(json!({ "token": token })))
}

/// The token that a request is about; its own user or an administrator may ask.
fn subject(app: &Shared, session: &Session, headers: &HeaderMap) -> Answer<(String, Session)> {
    let missing = || Fault::new(StatusCode::NOT_FOUND, "The token in X-Subject-Token is not valid.");
    let header = headers.get("x-subject-token").ok_or_else(|| Fault::bad_request("No X-Subject-Token."))?;
    let token = header.to_str().map_err(|_| missing())?.to_owned();
    let subject = Session::of_token(app, &token).map_err(|_| missing())?;
    if session.role != Some(Role::Admin) && session.claims.user != subject.claims.user {
        return Err(Fault::forbidden("Only an administrator may look at other users' tokens."));
    }
    Ok((token, subject))
}

/// GET and HEAD /v3/auth/tokens.
pub(super) async fn show(
    State(app): State<Shared>,
    session: Session,
    params: Params,
    links: Links,
    headers: HeaderMap,
) -> Answer {
    let (token, subject) = subject(&app, &session, &headers)?;
    let body = describe(&app, &subject.claims, &links, params.get("nocatalog").is_none())?;
    Ok(([("x-subject-token", token), ("vary", "X-Auth-Token".into())], body).into_response())
}

/// DELETE /v3/auth/tokens.
pub(super) async fn revoke(
    State(app): State<Shared>,
    session: Session,
    headers: HeaderMap,
) -> Answer<StatusCode> {
    let claims = subject(&app, &session, &headers)?.1.claims;
    let now = now();
    app.ledger
        .change::<_, Error>(|fleet| {
            let expired = fleet.revoked_tokens.values().filter(|token| token.expires_at <= now);
            let mut changes: Vec<Change> = expired.map(Change::gone).collect();
            let revoked = RevokedToken { audit_id: claims.audit_id, expires_at: claims.expires_at };
            changes.push(revoked.into());
            Ok((changes, ()))
        })
        .await?;
    Ok(StatusCode::NO_CONTENT)
}

#[cfg(test)]
mod tests {
    use crate::api::testing::{Answer, Api, As};
    use crate::error::Error;
    use crate::fleet::identity::User;
    use crate::tokens::hash_password;
    use axum::http::Method;
    use serde_json::{Value, json};

    /// An API whose member has the password `secret`.
    async fn api() -> Api {
        let api = Api::new().await;
        let password_hash = hash_password("secret").unwrap();
        let change = |fleet: &crate::fleet::Fleet| {
            let ann = fleet.users[&api.member.0].clone();
            Ok::<_, Error>((vec![User { password_hash, ..ann }.into()], ()))
        };
        api.app.ledger.change(change).await.unwrap();
        api
    }

    fn password(name: &str, password: &str, scope: Value) -> Value {
        let user = json!({ "name": name, "domain": { "id": "default" }, "password": password });
        let identity = json!({ "methods": ["password"], "password": { "user": user } });
        json!({ "auth": { "identity": identity, "scope": scope } })
    }

    async fn log_in(api: &Api, body: Value) -> Answer {
        api.ask(As::Nobody, Method::POST, "/identity/v3/auth/tokens", &[], body).await
    }

    fn crew() -> Value {
        json!({ "project": { "name": "crew", "domain": { "name": "Default" } } })
    }

    #[tokio::test]
    async fn a_password_gives_a_token_with_roles_and_a_catalog_for_its_project() {
        let api = api().await;
        let answer = log_in(&api, password("ann", "secret", crew())).await;
        assert_eq!(answer.status, 201);
        let token = &answer.json()["token"];
        assert_eq!(token["project"]["id"], json!(api.member.1));
        assert_eq!(token["methods"], json!(["password"]));
        assert_eq!(token["roles"].as_array().map(Vec::len), Some(2));
        assert!(token["expires_at"].as_str().unwrap().ends_with('Z'));
        let types: Vec<_> = token["catalog"].as_array().unwrap().iter().map(|s| s["type"].clone()).collect();
        assert_eq!(types, ["identity", "compute", "image", "network", "placement"]);
        assert_eq!(token["catalog"][1]["endpoints"][0]["url"], "https://127.0.0.1:8774/compute/v2.1");
        let header = answer.header("x-subject-token");
        let headers = [("x-auth-token", header), ("x-subject-token", header)];
        let shown = api.ask(As::Nobody, Method::GET, "/identity/v3/auth/tokens", &headers, Value::Null).await;
        assert_eq!((shown.status.as_u16(), &shown.json()["token"]), (200, token));
    }

    #[tokio::test]
    async fn wrong_passwords_users_domains_and_projects_are_unauthorized() {
        let api = api().await;
        let mut other_domain = password("ann", "secret", crew());
        other_domain["auth"]["identity"]["password"]["user"]["domain"] = json!({ "name": "Other" });
        for body in [
            password("ann", "Secret", crew()),
            password("bob", "secret", crew()),
            password(
                "ann",
                "secret",
                json!({ "project": { "name": "admin", "domain": { "id": "default" } } }),
            ),
            password("ann", "secret", json!({ "project": { "id": "nope" } })),
            password("ann", "secret", json!({ "system": { "all": true } })),
            password("ann", "secret", json!({ "domain": { "id": "default" } })),
            other_domain,
            json!({ "auth": { "identity": { "methods": ["totp"] } } }),
        ] {
            let answer = log_in(&api, body.clone()).await;
            assert_eq!(answer.status, 401, "{body}");
            assert_eq!(answer.json()["error"]["title"], "Unauthorized");
            assert!(answer.header("www-authenticate").starts_with("Keystone uri="));
        }
        assert_eq!(log_in(&api, json!({ "auth": {} })).await.status, 400);
    }

    #[tokio::test]
    async fn a_token_can_be_exchanged_and_given_back() {
        let api = api().await;
        let unscoped = log_in(&api, password("ann", "secret", json!("unscoped"))).await;
        assert_eq!(unscoped.json()["token"].get("catalog"), None);
        let token = unscoped.header("x-subject-token");
        let body = json!({ "auth": {
            "identity": { "methods": ["token"], "token": { "id": token } },
            "scope": { "project": { "id": api.member.1 } },
        } });
        let scoped = log_in(&api, body.clone()).await;
        assert_eq!(scoped.status, 201);
        assert_eq!(scoped.json()["token"]["expires_at"], unscoped.json()["token"]["expires_at"]);
        let headers = [("x-auth-token", scoped.header("x-subject-token")), ("x-subject-token", token)];
        let revoke =
            || api.ask(As::Nobody, Method::DELETE, "/identity/v3/auth/tokens", &headers, Value::Null);
        assert_eq!(revoke().await.status, 204);
        assert_eq!(revoke().await.status, 404);
        assert_eq!(log_in(&api, body).await.status, 401);
    }

    #[tokio::test]
    async fn an_administrator_gets_a_token_for_the_system_and_for_every_project() {
        let api = Api::new().await;
        let token = api.app.tokens.issue(
            api.admin.0,
            crate::tokens::Scope::Unscoped,
            &["password"],
            crate::ledger::now(),
            None,
        );
        for (scope, key) in [(json!({ "system": { "all": true } }), "system"), (crew(), "project")] {
            let identity = json!({ "methods": ["token"], "token": { "id": token.0 } });
            let answer = log_in(&api, json!({ "auth": { "identity": identity, "scope": scope } })).await;
            assert_eq!(answer.status, 201);
            assert_eq!(answer.json()["token"]["roles"][0]["name"], "admin");
            assert!(!answer.json()["token"][key].is_null());
        }
    }
}
