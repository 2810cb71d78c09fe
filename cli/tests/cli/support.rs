//! A small service to run the built `godwit` against: it answers from a table and remembers what was asked.

use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Command, Output};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

/// A request as it came.
#[derive(Debug, Clone)]
pub(crate) struct Request {
    /// `POST`.
    pub(crate) method: String,
    /// Path and query, `/compute/v2.1/servers?name=a`.
    pub(crate) target: String,
    /// Headers, names in lower case.
    pub(crate) headers: Vec<(String, String)>,
    /// The body.
    pub(crate) body: Vec<u8>,
}

impl Request {
    /// `POST /compute/v2.1/servers`.
    pub(crate) fn line(&self) -> String {
        format!("{} {}", self.method, self.target)
    }

    /// The body's JSON.
    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).expect("the client sends JSON")
    }

    /// A header's value.
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }
}

/// A status and a body; with status 0 the service hangs up.
pub(crate) struct Answer(pub u16, pub Vec<u8>);

impl Answer {
    /// With JSON.
    pub(crate) fn json(status: u16, body: Value) -> Answer {
        Answer(status, body.to_string().into_bytes())
    }

    /// A compute fault.
    pub(crate) fn fault(status: u16, kind: &str, message: &str) -> Answer {
        Answer::json(status, json!({kind: {"code": status, "message": message}}))
    }
}

type Handler = dyn FnMut(&Request) -> Option<Answer> + Send;

/// The service; it lives until the process ends.
pub(crate) struct Service {
    /// Where it listens.
    pub(crate) address: SocketAddr,
    requests: Arc<Mutex<Vec<Request>>>,
    folder: tempfile::TempDir,
}

impl Service {
    /// Starts one. Logins succeed with password `secret`; what `handler` does not answer is 404.
    pub(crate) fn start(handler: impl FnMut(&Request) -> Option<Answer> + Send + 'static) -> Service {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let requests = Arc::new(Mutex::new(Vec::new()));
        let handler: Arc<Mutex<Box<Handler>>> = Arc::new(Mutex::new(Box::new(handler)));
        let seen = Arc::clone(&requests);
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (seen, handler) = (Arc::clone(&seen), Arc::clone(&handler));
                thread::spawn(move || serve(stream, address, &seen, &handler));
            }
        });
        Service { address, requests, folder: tempfile::tempdir().unwrap() }
    }

    /// Runs `godwit` with these arguments against the service.
    pub(crate) fn run(&self, arguments: &[&str]) -> Run {
        self.run_as("secret", arguments)
    }

    /// The same with another password.
    pub(crate) fn run_as(&self, password: &str, arguments: &[&str]) -> Run {
        let url = format!("http://{}/identity/v3", self.address);
        let variables = [
            ("OS_AUTH_URL", url.as_str()),
            ("OS_USERNAME", "admin"),
            ("OS_PASSWORD", password),
            ("OS_PROJECT_NAME", "admin"),
        ];
        run(self.folder.path(), &variables, arguments)
    }

    /// A folder of the test's own.
    pub(crate) fn folder(&self) -> &std::path::Path {
        self.folder.path()
    }

    /// What was asked, logins left out, and forgets it.
    pub(crate) fn take_requests(&self) -> Vec<Request> {
        std::mem::take(&mut self.requests.lock().unwrap())
    }

    /// The lines of [`Self::take_requests`].
    pub(crate) fn take_lines(&self) -> Vec<String> {
        self.take_requests().iter().map(Request::line).collect()
    }
}

/// What a run of `godwit` left.
pub(crate) struct Run {
    /// Its exit code.
    pub(crate) code: i32,
    /// Standard output.
    pub(crate) stdout: String,
    /// Standard error.
    pub(crate) stderr: String,
}

impl Run {
    /// Standard output as JSON; it must be nothing but JSON.
    pub(crate) fn json(&self) -> Value {
        assert_eq!(self.code, 0, "{}", self.stderr);
        serde_json::from_str(&self.stdout).expect("standard output is JSON")
    }

    /// Standard output, of a success.
    pub(crate) fn text(&self) -> &str {
        assert_eq!(self.code, 0, "{}", self.stderr);
        &self.stdout
    }
}

/// Runs `godwit` in `folder` with `variables` and no others.
pub(crate) fn run(folder: &std::path::Path, variables: &[(&str, &str)], arguments: &[&str]) -> Run {
    let output: Output = Command::new(env!("CARGO_BIN_EXE_godwit"))
        .env_clear()
        .env("HOME", folder)
        .envs(variables.iter().copied())
        .current_dir(folder)
        .args(arguments)
        .output()
        .unwrap();
    Run {
        code: output.status.code().expect("godwit exits by itself"),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

fn serve(stream: TcpStream, address: SocketAddr, seen: &Mutex<Vec<Request>>, handler: &Mutex<Box<Handler>>) {
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let mut reader = BufReader::new(stream);
    let Some(request) = receive(&mut reader) else { return };
    let answer = if request.target == "/identity/v3/auth/tokens" {
        login(&request, address)
    } else {
        seen.lock().unwrap().push(request.clone());
        let answer = (handler.lock().unwrap())(&request);
        answer.unwrap_or_else(|| Answer::fault(404, "itemNotFound", "not here"))
    };
    if answer.0 == 0 {
        return;
    }
    let mut stream = reader.into_inner();
    let head = format!(
        "HTTP/1.1 {} X\r\nContent-Length: {}\r\nConnection: close\r\nX-Subject-Token: token-1\r\n\
         x-openstack-request-id: req-1\r\n\r\n",
        answer.0,
        answer.1.len()
    );
    // A client that has gone is a test's business, not the service's.
    let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(&answer.1));
}

fn receive(reader: &mut BufReader<TcpStream>) -> Option<Request> {
    let mut line = String::new();
    reader.read_line(&mut line).ok()?;
    let mut words = line.split_whitespace();
    let (method, target) = (words.next()?.to_owned(), words.next()?.to_owned());
    let mut headers = Vec::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).ok()?;
        let Some((name, value)) = line.split_once(':') else { break };
        headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
    }
    let mut request = Request { method, target, headers, body: Vec::new() };
    if request.header("expect") == Some("100-continue") {
        reader.get_mut().write_all(b"HTTP/1.1 100 Continue\r\n\r\n").ok()?;
    }
    let length = request.header("content-length").map_or(0, |length| length.parse().unwrap());
    request.body = vec![0; length];
    reader.read_exact(&mut request.body).ok()?;
    Some(request)
}

fn login(request: &Request, address: SocketAddr) -> Answer {
    if request.json()["auth"]["identity"]["password"]["user"]["password"] != "secret" {
        return Answer::json(401, json!({"error": {"code": 401, "message": "wrong password", "title": "X"}}));
    }
    let service = |kind: &str, path: &str| {
        json!({"type": kind, "endpoints": [
            {"interface": "public", "region": "RegionOne", "url": format!("http://{address}{path}")},
        ]})
    };
    let catalog = json!([
        service("compute", "/compute/v2.1"),
        service("image", "/image"),
        service("network", "/network"),
    ]);
    Answer::json(201, json!({"token": {"catalog": catalog}}))
}
