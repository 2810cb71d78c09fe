//! The identity API, v3: tokens, the catalog, and who there is. One domain, `Default`.

mod catalog;
mod tokens;

use crate::api::context::{Links, Params, Session};
use crate::api::fault::{Answer, Fault};
use crate::app::Shared;
use crate::fleet::identity::{Project, Role, User};
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use godwit_protocol::id::{ProjectId, UserId};
use serde_json::{Value, json};

/// Id of the only domain.
const DOMAIN_ID: &str = "default";
/// Its name.
const DOMAIN_NAME: &str = "Default";

/// Its routes, below `/identity`.
pub fn router() -> Router<Shared> {
    Router::new()
        .route("/", get(versions))
        .route("/v3", get(version))
        .route("/v3/auth/tokens", get(tokens::show).post(tokens::create).delete(tokens::revoke))
        .route("/v3/auth/catalog", get(catalog::show))
        .route("/v3/auth/projects", get(own_projects))
        .route("/v3/projects", get(projects))
        .route("/v3/projects/{id}", get(project))
        .route("/v3/users", get(users))
        .route("/v3/users/{id}", get(user))
        .route("/v3/users/{id}/projects", get(user_projects))
        .route("/v3/domains", get(domains))
        .route("/v3/domains/{id}", get(domain))
        .route("/v3/roles", get(roles))
        .route("/v3/roles/{id}", get(role))
}

fn version_body(links: &Links) -> Value {
    json!({
        "id": "v3.14",
        "status": "stable",
        "updated": "2020-04-07T00:00:00Z",
        "links": [{ "rel": "self", "href": links.to("/identity/v3/") }],
        "media-types": [{
            "base": "application/json",
            "type": "application/vnd.openstack.identity-v3+json",
        }],
    })
}

async fn versions(links: Links) -> Response {
    let body = json!({ "versions": { "values": [version_body(&links)] } });
    (StatusCode::MULTIPLE_CHOICES, Json(body)).into_response()
}

async fn version(links: Links) -> Json<Value> {
    Json(json!({ "version": version_body(&links) }))
}

fn project_body(project: &Project, links: &Links) -> Value {
    json!({
        "id": project.id,
        "name": project.name,
        "description": "",
        "enabled": true,
        "is_domain": false,
        "domain_id": DOMAIN_ID,
        "parent_id": DOMAIN_ID,
        "tags": [],
        "options": {},
        "links": { "self": links.to(&format!("/identity/v3/projects/{}", project.id)) },
    })
}

fn user_body(user: &User, links: &Links) -> Value {
    json!({
        "id": user.id,
        "name": user.name,
        "enabled": true,
        "domain_id": DOMAIN_ID,
        "password_expires_at": null,
        "options": {},
        "links": { "self": links.to(&format!("/identity/v3/users/{}", user.id)) },
    })
}

fn list(noun: &str, items: Vec<Value>, links: &Links) -> Json<Value> {
    let url = links.to(&format!("/identity/v3/{noun}"));
    Json(json!({ noun: items, "links": { "self": url, "previous": null, "next": null } }))
}

/// Whether what is in the only domain and enabled passes the filters that every list has.
fn passes(params: &Params, name: &str) -> Answer<bool> {
    let domain = params.get("domain_id").is_none_or(|id| id == DOMAIN_ID);
    let enabled = params.flag("enabled")?.unwrap_or(true);
    Ok(domain && enabled && params.get("name").is_none_or(|wanted| wanted == name))
}

impl Session {
    fn is_admin(&self) -> bool {
        self.role == Some(Role::Admin)
    }

    fn require_self_or_admin(&self, user: UserId) -> Answer<()> {
        if self.is_admin() || self.claims.user == user {
            Ok(())
        } else {
            Err(Fault::forbidden("Only an administrator may look at other users."))
        }
    }
}

/// Projects in which a user has a role; an administrator has one in all.
fn projects_of(app: &Shared, user: UserId) -> Vec<Project> {
    app.ledger.read(|fleet| {
        let Some(user) = fleet.users.get(&user) else { return Vec::new() };
        let admin = user.roles.iter().any(|(_, role)| *role == Role::Admin);
        let has = |project: &&Project| admin || user.roles.iter().any(|(id, _)| *id == project.id);
        fleet.projects.values().filter(has).cloned().collect()
    })
}

fn project_list(projects: Vec<Project>, params: &Params, links: &Links) -> Answer<Json<Value>> {
    let mut items = Vec::new();
    for project in projects {
        if passes(params, &project.name)? {
            items.push(project_body(&project, links));
        }
    }
    Ok(list("projects", items, links))
}

async fn own_projects(
    State(app): State<Shared>,
    session: Session,
    params: Params,
    links: Links,
) -> Answer<Json<Value>> {
    project_list(projects_of(&app, session.claims.user), &params, &links)
}

/// All projects for an administrator, their own for others.
async fn projects(
    State(app): State<Shared>,
    session: Session,
    params: Params,
    links: Links,
) -> Answer<Json<Value>> {
    project_list(projects_of(&app, session.claims.user), &params, &links)
}

async fn user_projects(
    State(app): State<Shared>,
    session: Session,
    Path(id): Path<String>,
    params: Params,
    links: Links,
) -> Answer<Json<Value>> {
    let user: UserId = id.parse().map_err(|_| Fault::not_found("User", &id))?;
    session.require_self_or_admin(user)?;
    project_list(projects_of(&app, user), &params, &links)
}

async fn project(
    State(app): State<Shared>,
    session: Session,
    Path(id): Path<String>,
    links: Links,
) -> Answer<Json<Value>> {
    let missing = || Fault::not_found("Project", &id);
    let key: ProjectId = id.parse().map_err(|_| missing())?;
    let project = projects_of(&app, session.claims.user).into_iter().find(|p| p.id == key);
    Ok(Json(json!({ "project": project_body(&project.ok_or_else(missing)?, &links) })))
}

async fn users(
    State(app): State<Shared>,
    session: Session,
    params: Params,
    links: Links,
) -> Answer<Json<Value>> {
    let users: Vec<User> = app.ledger.read(|fleet| fleet.users.values().cloned().collect());
    let mut items = Vec::new();
    for user in users {
        let visible = session.is_admin() || session.claims.user == user.id;
        if visible && passes(&params, &user.name)? {
            items.push(user_body(&user, &links));
        }
    }
    Ok(list("users", items, &links))
}

async fn user(
    State(app): State<Shared>,
    session: Session,
    Path(id): Path<String>,
    links: Links,
) -> Answer<Json<Value>> {
    let missing = || Fault::not_found("User", &id);
    let key: UserId = id.parse().map_err(|_| missing())?;
    session.require_self_or_admin(key)?;
    let user = app.ledger.read(|fleet| fleet.users.get(&key).cloned()).ok_or_else(missing)?;
    Ok(Json(json!({ "user": user_body(&user, &links) })))
}

fn domain_body(links: &Links) -> Value {
    json!({
        "id": DOMAIN_ID,
        "name": DOMAIN_NAME,
        "description": "",
        "enabled": true,
        "tags": [],
        "options": {},
        "links": { "self": links.to("/identity/v3/domains/default") },
    })
}

async fn domains(_: Session, params: Params, links: Links) -> Answer<Json<Value>> {
    let matches = passes(&params, DOMAIN_NAME)?;
    Ok(list("domains", if matches { vec![domain_body(&links)] } else { Vec::new() }, &links))
}

async fn domain(_: Session, Path(id): Path<String>, links: Links) -> Answer<Json<Value>> {
    if id == DOMAIN_ID {
        Ok(Json(json!({ "domain": domain_body(&links) })))
    } else {
        Err(Fault::not_found("Domain", id))
    }
}

const ROLES: [Role; 3] = [Role::Admin, Role::Member, Role::Reader];

fn role_name(role: Role) -> &'static str {
    match role {
        Role::Admin => "admin",
        Role::Member => "member",
        Role::Reader => "reader",
    }
}

fn role_body(role: Role, links: &Links) -> Value {
    let name = role_name(role);
    json!({
        "id": name,
        "name": name,
        "domain_id": null,
        "description": null,
        "options": {},
        "links": { "self": links.to(&format!("/identity/v3/roles/{name}")) },
    })
}

async fn roles(_: Session, params: Params, links: Links) -> Json<Value> {
    let wanted = |role: &Role| params.get("name").is_none_or(|name| name == role_name(*role));
    list("roles", ROLES.into_iter().filter(wanted).map(|role| role_body(role, &links)).collect(), &links)
}

async fn role(_: Session, Path(id): Path<String>, links: Links) -> Answer<Json<Value>> {
    let role = ROLES.into_iter().find(|role| role_name(*role) == id);
    let role = role.ok_or_else(|| Fault::not_found("Role", &id))?;
    Ok(Json(json!({ "role": role_body(role, &links) })))
}

#[cfg(test)]
mod tests {
    use crate::api::testing::{Api, As};
    use axum::http::Method;
    use serde_json::{Value, json};

    #[tokio::test]
    async fn discovery_needs_no_token_and_links_to_itself() {
        let api = Api::new().await;
        let answer = api.ask(As::Nobody, Method::GET, "/identity/v3/", &[], Value::Null).await;
        assert_eq!(answer.status, 200);
        let body = answer.json();
        assert_eq!(body["version"]["id"], "v3.14");
        assert_eq!(body["version"]["links"][0]["href"], "https://127.0.0.1:8774/identity/v3/");
        assert!(answer.header("x-openstack-request-id").starts_with("req-"));
        assert_eq!(api.ask(As::Nobody, Method::GET, "/identity", &[], Value::Null).await.status, 300);
    }

    #[tokio::test]
    async fn a_name_where_an_id_is_wanted_is_not_found_and_the_filter_finds_it() {
        let api = Api::new().await;
        let missing = api.get("/identity/v3/projects/crew").await;
        assert_eq!(missing.status, 404);
        assert_eq!(missing.json()["error"]["title"], "Not Found");
        let found = api.get("/identity/v3/projects?name=crew").await.json();
        assert_eq!(found["projects"].as_array().map(Vec::len), Some(1));
        assert_eq!(found["projects"][0]["id"], json!(api.member.1));
    }

    #[tokio::test]
    async fn users_who_are_no_administrators_see_themselves_and_their_projects_only() {
        let api = Api::new().await;
        let ask = |path: String| {
            let api = &api;
            async move { api.ask(As::Member, Method::GET, &path, &[], Value::Null).await }
        };
        let users = ask("/identity/v3/users".into()).await.json();
        assert_eq!(users["users"].as_array().map(Vec::len), Some(1));
        assert_eq!(users["users"][0]["name"], "ann");
        let projects = ask("/identity/v3/projects".into()).await.json();
        assert_eq!(projects["projects"][0]["name"], "crew");
        assert_eq!(ask(format!("/identity/v3/users/{}", api.admin.0)).await.status, 403);
        assert_eq!(ask(format!("/identity/v3/projects/{}", api.admin.1)).await.status, 404);
    }
}
