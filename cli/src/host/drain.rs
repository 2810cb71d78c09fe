//! `godwit host drain`: servers leave a host one after another, watched to the end if asked.

use crate::App;
use crate::error::{Error, Result};
use crate::http::encode;
use crate::output::cell;
use crate::resource::{HOST, id};
use crate::server::Waiting;
use crate::session::Service;
use crate::wait::{Look, Wait};
use clap::Args;
use serde_json::{Value, json};

/// Which host is emptied, and how.
#[derive(Args)]
pub(crate) struct Drain {
    /// Id or name
    host: String,
    /// Servers that are on their way at once
    #[arg(long, value_name = "COUNT", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=16))]
    at_once: u32,
    #[command(flatten)]
    waiting: Waiting,
}

impl Drain {
    /// Begins the drain and, if asked, waits until no server is left.
    pub(super) fn run(self, app: &App) -> Result<()> {
        let host = HOST.find(&app.session, &self.host)?;
        let host_id = id(&host)?;
        let path = format!("/hosts/{}/drain", encode(&host_id));
        app.session.put(Service::Operator, &path, &json!({"at_once": self.at_once}))?;
        if !self.waiting.wait {
            return app.output.done("draining host", &[host]);
        }
        let name = cell(&host["name"]);
        let bar = app.progress.spinner(&format!("draining {name}"));
        let wait = Wait {
            what: &format!("host {name} is empty"),
            look: format!("godwit host show {name}"),
            timeout: self.waiting.timeout(),
        };
        let empty = wait.run(&bar, || {
            let host = HOST.get(&app.session, &host_id)?;
            Ok(match host["drain"]["left"].as_array() {
                Some(left) if left.is_empty() => Look::Done(true),
                Some(left) => Look::Not(summary(left)),
                None => Look::Done(false),
            })
        })?;
        if !empty {
            return Err(Error::Failed(format!("host {name} is not drained any more: somebody stopped it")));
        }
        app.output.done("drained host", &[host])
    }
}

/// How many are left, and why those do not leave that do not.
fn summary(left: &[Value]) -> String {
    let held: Vec<String> = left
        .iter()
        .filter(|server| server["state"] == "held")
        .map(|server| format!("{}: {}", cell(&server["name"]), cell(&server["reason"])))
        .collect();
    let mut text = format!("{} left", left.len());
    if !held.is_empty() {
        text.push_str(&format!(", {} cannot move: {}", held.len(), held.join("; ")));
    }
    text
}
