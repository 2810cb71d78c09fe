//! An API in memory for tests: a router over an app in a folder of its own, with an administrator, a member and a
//! reader who are logged in.

use crate::agents::Agents;
use crate::api::frame::Requests;
use crate::app::{App, Shared};
use crate::ca::Ca;
use crate::config::Config;
use crate::fleet::identity::{Project, Role, User};
use crate::images::Images;
use crate::ledger::{Ledger, now};
use crate::operations::Operations;
use crate::tokens::{Scope, Tokens};
use axum::Router;
use axum::body::Body;
use axum::http::{HeaderMap, Method, Request, StatusCode};
use godwit_protocol::id::{ProjectId, UserId};
use http_body_util::BodyExt;
use serde_json::Value;
use std::sync::Arc;
use std::time::Duration;
use tempfile::TempDir;
use tower_service::Service;

/// Whose token a request carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum As {
    Admin,
    /// A member of another project than the administrator's.
    Member,
    /// A reader of the member's project.
    Reader,
    Nobody,
}

/// The API under test.
pub(crate) struct Api {
    pub(crate) app: Shared,
    pub(crate) admin: (UserId, ProjectId),
    pub(crate) member: (UserId, ProjectId),
    router: Router,
    tokens: [String; 3],
    pub(crate) folder: TempDir,
}

/// An answer, whole.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) bytes: Vec<u8>,
}

impl Answer {
    /// The body as JSON; null when it is none.
    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.bytes).unwrap_or(Value::Null)
    }

    /// The body as text.
    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.bytes).into_owned()
    }

    /// A header; empty when it is missing.
    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default()
    }
}

impl Api {
    pub(crate) async fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let pool = folder.path().join("pool");
        std::fs::create_dir_all(&pool).unwrap();
        let config: Config = toml::from_str(&format!(
            "url = \"https://127.0.0.1:8774\"\nlisten = \"127.0.0.1:8774\"\nagents_listen = \"127.0.0.1:8775\"\n\
             pool = \"{}\"\nvlan_ranges = {{ ranged = \"100:102\" }}\n",
            pool.display()
        ))
        .unwrap();
        let (ca, key) = Ca::create(now()).unwrap();
        let tokens = Tokens::with_key([1; 32], Duration::from_secs(600));
        let ledger = Ledger::open(&folder.path().join("state.db")).unwrap();
        let projects = [("admin", Role::Admin), ("crew", Role::Member), ("crew", Role::Reader)];
        let mut ids: Vec<(UserId, ProjectId)> = Vec::new();
        let mut changes = Vec::new();
        for (index, (name, role)) in projects.into_iter().enumerate() {
            let user = UserId::random();
            let project = if index == 2 { ids[1].1 } else { ProjectId::random() };
            ids.push((user, project));
            changes.push(Project { id: project, name: name.into() }.into());
            let name = ["admin", "ann", "rob"][index].to_owned();
            changes.push(
                User { id: user, name, password_hash: String::new(), roles: vec![(project, role)] }.into(),
            );
        }
        ledger.change::<_, crate::error::Error>(|_| Ok((changes, ()))).await.unwrap();
        let issue = |i: usize| tokens.issue(ids[i].0, Scope::Project(ids[i].1), &["password"], now(), None).0;
        let issued = [issue(0), issue(1), issue(2)];
        let app = Arc::new(App {
            images: Images::new(&config.pool),
            config,
            ledger,
            agents: Agents::default(),
            operations: Operations::default(),
            l2: crate::l2::Queue::default(),
            events: Default::default(),
            tokens,
            ca: Ca::from_pem(ca, &key).unwrap(),
        });
        let requests = Requests::new(&prometheus::Registry::new()).unwrap();
        let router = crate::api::router(app.clone(), requests);
        Self { app, admin: ids[0], member: ids[1], router, tokens: issued, folder }
    }

    /// The token of one who is logged in.
    pub(crate) fn token(&self, who: As) -> &str {
        &self.tokens[who as usize]
    }

    /// Any request.
    pub(crate) async fn send(&self, request: Request<Body>) -> Answer {
        let response = self.router.clone().call(request).await.unwrap();
        let (parts, body) = response.into_parts();
        let bytes = body.collect().await.unwrap().to_bytes().to_vec();
        Answer { status: parts.status, headers: parts.headers, bytes }
    }

    /// GET as the administrator, whose body may end early: what came of it, and how it ended.
    pub(crate) async fn download(&self, path: &str) -> (StatusCode, Vec<u8>, Result<(), axum::Error>) {
        let request = Request::get(path).header("x-auth-token", self.token(As::Admin));
        let response = self.router.clone().call(request.body(Body::empty()).unwrap()).await.unwrap();
        let status = response.status();
        let (mut body, mut came) = (response.into_body(), Vec::new());
        while let Some(frame) = body.frame().await {
            match frame {
                Ok(frame) => came.extend_from_slice(&frame.into_data().unwrap_or_default()),
                Err(error) => return (status, came, Err(error)),
            }
        }
        (status, came, Ok(()))
    }

    /// A request with headers and a JSON body; null sends none.
    pub(crate) async fn ask(
        &self,
        who: As,
        method: Method,
        path: &str,
        headers: &[(&str, &str)],
        body: Value,
    ) -> Answer {
        let mut request = Request::builder().method(method).uri(path);
        if who != As::Nobody {
            request = request.header("x-auth-token", &self.tokens[who as usize]);
        }
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let body = if body.is_null() { Body::empty() } else { Body::from(body.to_string()) };
        self.send(request.body(body).unwrap()).await
    }

    /// GET as the administrator.
    pub(crate) async fn get(&self, path: &str) -> Answer {
        self.ask(As::Admin, Method::GET, path, &[], Value::Null).await
    }

    /// POST as the administrator.
    pub(crate) async fn post(&self, path: &str, body: Value) -> Answer {
        self.ask(As::Admin, Method::POST, path, &[], body).await
    }

    /// DELETE as the administrator.
    pub(crate) async fn delete(&self, path: &str) -> Answer {
        self.ask(As::Admin, Method::DELETE, path, &[], Value::Null).await
    }
}
