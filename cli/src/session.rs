//! A logged-in session: the token, the catalog, and requests to the services.

use crate::cloud::Cloud;
use crate::error::{Error, Result};
use crate::http;
use serde_json::Value;
use std::cell::RefCell;
use std::io::Read;
use std::rc::Rc;
use std::time::{Duration, Instant};
use ureq::http::{Method, Request, Response};
use ureq::{Agent, AsSendBody, Body, SendBody};

/// The compute microversion that every compute request asks for, so that answers keep their shape.
const COMPUTE_VERSION: &str = "2.87";
/// More than any list of ours; a larger answer is not one.
const ANSWER_LIMIT_BYTES: u64 = 256 << 20;
/// The service hashes and checks an image before it answers the upload.
const UPLOAD_ANSWER_TIMEOUT: Duration = Duration::from_secs(900);

/// The services that commands talk to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Service {
    /// `/v2.1`.
    Compute,
    /// `/v2`.
    Image,
    /// `/v2.0`.
    Network,
    /// `/operator/v1`, what OpenStack has no words for.
    Operator,
}

/// A session; it logs in at the first request and again when the token has run out.
pub(crate) struct Session {
    agent: Agent,
    cloud: Cloud,
    verbose: bool,
    login: RefCell<Option<Rc<Login>>>,
}

struct Login {
    token: String,
    catalog: Value,
}

impl Session {
    /// A session with `cloud`; `verbose` prints each request to standard error.
    pub(crate) fn new(cloud: Cloud, verbose: bool) -> Result<Self> {
        Ok(Session { agent: http::agent(&cloud)?, cloud, verbose, login: RefCell::new(None) })
    }

    /// The cloud's public address as agents join it, without a path: the auth URL's scheme and authority.
    pub(crate) fn root_url(&self) -> String {
        self.cloud.operator_url().trim_end_matches("/operator/v1").to_owned()
    }

    /// `GET`; the answer's JSON.
    pub(crate) fn get(&self, service: Service, path: &str) -> Result<Value> {
        self.request(Method::GET, service, path, None)
    }

    /// `POST` of JSON; the answer's JSON, null when it is empty.
    pub(crate) fn post(&self, service: Service, path: &str, body: &Value) -> Result<Value> {
        self.request(Method::POST, service, path, Some(body))
    }

    /// `PUT` of JSON; the answer's JSON, null when it is empty.
    pub(crate) fn put(&self, service: Service, path: &str, body: &Value) -> Result<Value> {
        self.request(Method::PUT, service, path, Some(body))
    }

    /// `DELETE`.
    pub(crate) fn delete(&self, service: Service, path: &str) -> Result<()> {
        self.request(Method::DELETE, service, path, None).map(|_| ())
    }

    /// `PUT` of `size` bytes from `source`, streamed.
    pub(crate) fn upload(
        &self,
        service: Service,
        path: &str,
        size: u64,
        source: &mut dyn Read,
    ) -> Result<()> {
        let login = self.login()?;
        let url = self.url(&login, service, path)?;
        let request = self
            .prepare(Method::PUT, &url, service, &login)
            .header("Content-Type", "application/octet-stream")
            .header("Content-Length", size)
            // A refusal then comes before the bytes are sent, not as a cut connection.
            .header("Expect", "100-continue");
        let request =
            request.body(SendBody::from_reader(source)).map_err(|error| bad_request(&url, error))?;
        let request =
            self.agent.configure_request(request).timeout_recv_response(Some(UPLOAD_ANSWER_TIMEOUT)).build();
        self.checked(self.send(request, &url)?, &url).map(|_| ())
    }

    /// `GET` of a stream; the reader, and its length when the service tells it.
    pub(crate) fn download(&self, service: Service, path: &str) -> Result<(impl Read + use<>, Option<u64>)> {
        let login = self.login()?;
        let url = self.url(&login, service, path)?;
        let request = self.prepare(Method::GET, &url, service, &login).body(());
        let request = request.map_err(|error| bad_request(&url, error))?;
        let response = self.checked(self.send(request, &url)?, &url)?;
        let body = response.into_body();
        let length = body.content_length();
        Ok((body.into_reader(), length))
    }

    fn request(&self, method: Method, service: Service, path: &str, body: Option<&Value>) -> Result<Value> {
        let mut again = true;
        loop {
            let login = self.login()?;
            let url = self.url(&login, service, path)?;
            let request = self.prepare(method.clone(), &url, service, &login);
            let response = match body {
                Some(body) => {
                    let request = request.header("Content-Type", "application/json").body(body.to_string());
                    self.send(request.map_err(|error| bad_request(&url, error))?, &url)?
                }
                None => self.send(request.body(()).map_err(|error| bad_request(&url, error))?, &url)?,
            };
            if response.status() == 401 && again {
                again = false;
                self.login.replace(None);
                continue;
            }
            return self.json(self.checked(response, &url)?, &url);
        }
    }

    fn prepare(
        &self,
        method: Method,
        url: &str,
        service: Service,
        login: &Login,
    ) -> ureq::http::request::Builder {
        let request = Request::builder().method(method).uri(url).header("X-Auth-Token", &login.token);
        match service {
            Service::Compute => request
                .header("OpenStack-API-Version", format!("compute {COMPUTE_VERSION}"))
                .header("X-OpenStack-Nova-API-Version", COMPUTE_VERSION),
            _ => request,
        }
    }

    fn send(&self, request: Request<impl AsSendBody>, url: &str) -> Result<Response<Body>> {
        let method = request.method().clone();
        let start = Instant::now();
        let result = self.agent.run(request);
        if self.verbose {
            let ms = start.elapsed().as_millis();
            match &result {
                Ok(response) => {
                    let id = header(response, "x-openstack-request-id");
                    let id = id.map(|id| format!(", {id}")).unwrap_or_default();
                    eprintln!("{method} {url} → {} ({ms} ms{id})", response.status().as_u16());
                }
                Err(error) => eprintln!("{method} {url} → {error} ({ms} ms)"),
            }
        }
        result.map_err(|error| http::unreachable(&self.cloud, url, error))
    }

    /// Turns an answer that is not a success into the service's own words.
    fn checked(&self, mut response: Response<Body>, url: &str) -> Result<Response<Body>> {
        if response.status().is_success() {
            return Ok(response);
        }
        let status = response.status().as_u16();
        let request_id = header(&response, "x-openstack-request-id");
        let text = self.read(&mut response, url)?;
        Err(Error::Api {
            status,
            message: error_message(status, url, &String::from_utf8_lossy(&text)),
            request_id,
        })
    }

    fn json(&self, mut response: Response<Body>, url: &str) -> Result<Value> {
        let text = self.read(&mut response, url)?;
        if text.is_empty() {
            return Ok(Value::Null);
        }
        serde_json::from_slice(&text)
            .map_err(|error| Error::Answer { url: url.to_owned(), reason: format!("not JSON: {error}") })
    }

    fn read(&self, response: &mut Response<Body>, url: &str) -> Result<Vec<u8>> {
        let body = response.body_mut().with_config().limit(ANSWER_LIMIT_BYTES).read_to_vec();
        body.map_err(|error| http::unreachable(&self.cloud, url, error))
    }

    fn login(&self) -> Result<Rc<Login>> {
        if let Some(login) = self.login.borrow().as_ref() {
            return Ok(Rc::clone(login));
        }
        let url = format!("{}/auth/tokens", self.cloud.auth_url);
        let request = Request::post(&url).header("Content-Type", "application/json");
        let request = request.body(self.cloud.token_request().to_string());
        let response = self.send(request.map_err(|error| bad_request(&url, error))?, &url)?;
        let response = self.checked(response, &url).map_err(|error| match error {
            Error::Api { status: 401 | 403, message, .. } => Error::Unauthorized {
                url: url.clone(),
                who: self.cloud.who.clone(),
                message,
                origin: format!("the user name and password of {}", self.cloud.origin),
            },
            Error::Api { status: 404 | 405, .. } => Error::Cloud(format!(
                "{url} is no identity service: auth_url of {} should end in /identity/v3",
                self.cloud.origin
            )),
            other => other,
        })?;
        let token = header(&response, "x-subject-token")
            .ok_or_else(|| Error::Answer { url: url.clone(), reason: "no X-Subject-Token".into() })?;
        let mut answer = self.json(response, &url)?;
        let login = Rc::new(Login { token, catalog: answer["token"]["catalog"].take() });
        self.login.replace(Some(Rc::clone(&login)));
        Ok(login)
    }

    fn url(&self, login: &Login, service: Service, path: &str) -> Result<String> {
        let (kind, suffix) = match service {
            Service::Compute => ("compute", "/v2.1"),
            Service::Image => ("image", "/v2"),
            Service::Network => ("network", "/v2.0"),
            Service::Operator => return Ok(format!("{}{path}", self.cloud.operator_url())),
        };
        let base = self.endpoint(&login.catalog, kind).ok_or_else(|| {
            let region =
                self.cloud.region.as_ref().map(|name| format!(" in region {name}")).unwrap_or_default();
            Error::Cloud(format!(
                "the catalog of {} has no {} endpoint for {kind}{region}",
                self.cloud.origin, self.cloud.interface
            ))
        })?;
        let base = base.trim_end_matches('/');
        let suffix = if base.ends_with(suffix) { "" } else { suffix };
        Ok(format!("{base}{suffix}{path}"))
    }

    fn endpoint<'a>(&self, catalog: &'a Value, kind: &str) -> Option<&'a str> {
        let services = catalog.as_array()?.iter().filter(|service| service["type"] == kind);
        let mut endpoints = services.filter_map(|service| service["endpoints"].as_array()).flatten();
        let here = |endpoint: &Value| {
            endpoint["interface"] == self.cloud.interface.as_str()
                && self.cloud.region.as_ref().is_none_or(|name| endpoint["region"] == name.as_str())
        };
        endpoints.find(|endpoint| here(endpoint))?["url"].as_str()
    }
}

fn header(response: &Response<Body>, name: &str) -> Option<String> {
    Some(response.headers().get(name)?.to_str().ok()?.to_owned())
}

fn bad_request(url: &str, error: ureq::http::Error) -> Error {
    Error::Usage(format!("{url} cannot be requested: {error}"))
}

/// The words in an error answer: `{"badRequest": {"message": …}}` and its kin, Neutron's, or plain text.
fn error_message(status: u16, url: &str, text: &str) -> String {
    let parsed: Option<Value> = serde_json::from_str(text).ok();
    let wrapped = parsed.as_ref().and_then(Value::as_object).and_then(|object| object.values().next());
    let message = wrapped.and_then(|inner| inner["message"].as_str().or(inner.as_str()));
    let detail = wrapped.and_then(|inner| inner["detail"].as_str()).filter(|detail| !detail.is_empty());
    match (message, detail) {
        (Some(message), Some(detail)) => format!("{message}\n{detail}"),
        (Some(message), None) => message.to_owned(),
        (None, _) if !text.trim().is_empty() && text.len() < 2000 && !text.contains('<') => {
            text.trim().to_owned()
        }
        (None, _) => format!("{url} answered with status {status}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_services_way_of_saying_no_is_read() {
        let read = |text| error_message(400, "http://x/y", text);
        assert_eq!(read(r#"{"badRequest":{"code":400,"message":"no flavor"}}"#), "no flavor");
        assert_eq!(read(r#"{"NeutronError":{"type":"T","message":"in use","detail":""}}"#), "in use");
        assert_eq!(read(r#"{"NeutronError":{"message":"in use","detail":"by p"}}"#), "in use\nby p");
        assert_eq!(read(r#"{"error":{"code":401,"message":"who?","title":"T"}}"#), "who?");
        assert_eq!(read("409 Conflict: exists\n"), "409 Conflict: exists");
        assert_eq!(read(""), "http://x/y answered with status 400");
        assert_eq!(read("<html>proxy</html>"), "http://x/y answered with status 400");
    }
}
